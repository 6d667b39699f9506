"""How many examples a property test tries: each test names the number for nightly runs, a profile takes a share of it.

``HYPOTHESIS_PROFILE`` names the profile: ``fast`` (``make test-fast``), ``ci`` (``make test``, and the default) or
``nightly`` (``make test-nightly``). Only ``nightly`` draws at random and keeps what failed; the others try the same
examples in each run, so that a change that touches nothing fails nothing.
"""

from __future__ import annotations

import os

from hypothesis import settings

__all__ = ["PROFILES", "examples", "load_profile"]

#: Profile -> share of the examples of a nightly run.
PROFILES = {"fast": 0.05, "ci": 0.25, "nightly": 1.0}

_DEFAULT_EXAMPLES = 100
_MIN_EXAMPLES = 10


def _profile() -> str:
    name = os.environ.get("HYPOTHESIS_PROFILE") or "ci"
    if name not in PROFILES:
        message = f"HYPOTHESIS_PROFILE has to be one of {', '.join(PROFILES)}: {name}"
        raise ValueError(message)
    return name


def examples(nightly: int) -> int:
    """The number of examples in the current profile, where a nightly run tries ``nightly``."""
    return max(min(nightly, _MIN_EXAMPLES), round(nightly * PROFILES[_profile()]))


def load_profile() -> None:
    """Make the profile that ``HYPOTHESIS_PROFILE`` names the default of all property tests."""
    name = _profile()
    if name == "nightly":
        settings.register_profile(name, deadline=None, print_blob=True, max_examples=examples(_DEFAULT_EXAMPLES))
    else:
        settings.register_profile(
            name, deadline=None, database=None, derandomize=True, max_examples=examples(_DEFAULT_EXAMPLES)
        )
    settings.load_profile(name)
