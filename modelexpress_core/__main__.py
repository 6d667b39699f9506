"""``python -m modelexpress_core``: the ``mx`` command."""

from __future__ import annotations

from modelexpress_core.cli import main

if __name__ == "__main__":
    main()
