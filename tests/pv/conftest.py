# SPDX-License-Identifier: GPL-2.0-only
"""The machine and guests of tests/hypervisor, for the rules of the PV CPU."""

from tests.hypervisor.conftest import exact, guest, host

__all__ = ["exact", "guest", "host"]
