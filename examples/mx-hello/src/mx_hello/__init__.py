"""Checkpoints from a web server: ``hello://host:port/path``."""
