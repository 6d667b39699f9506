"""The storages that need nothing installed, ``file`` and ``memory``, and what storages over HTTP share."""
