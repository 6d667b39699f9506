"""The ``mx`` command."""

from __future__ import annotations

__all__ = ["main"]


def main() -> None:
    """Run ``mx`` with the arguments of the process."""
    from modelexpress_core.cli.interruption import exit_codes_of_signals

    with exit_codes_of_signals():
        from modelexpress_core.cli.app import build_app

        build_app()()
