"""The transport keeps to the contract of all transports."""

from __future__ import annotations

from typing import ClassVar

import pytest

from modelexpress_core.providers import TransportProvider
from modelexpress_core.testing import TransportContract
from mx_nixl.plugin import mx_register_transports

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("nixl"), pytest.mark.xdist_group("nixl")]


class TestNixlTransport(TransportContract):
    """Within one process, over shared memory.

    NIXL reads without the worker, so that nothing on its side looks at a lease. Core shows the description to holders
    of a lease alone, and does not believe what was read unless the worker confirms the lease at the end.
    """

    counts_sent: ClassVar[bool] = False  # readers tell what they read

    known_gaps: ClassVar[dict[str, str]] = {
        "test_without_a_lease_nothing_is_read": "NIXL reads without the worker, which cannot look at the lease",
        "test_a_lease_that_ends_ends_the_read": "as above",
    }

    @pytest.fixture
    def provider(self) -> TransportProvider:
        (record,) = mx_register_transports()
        return record
