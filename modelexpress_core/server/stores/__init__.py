"""The built-in metadata stores, registered like those of any plugin."""
