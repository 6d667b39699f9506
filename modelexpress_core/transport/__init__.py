"""Transports that need nothing installed: ``inproc``."""
