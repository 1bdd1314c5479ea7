# SPDX-License-Identifier: GPL-2.0-only
"""pytest fixtures (entry point ``pytest11``; in a source tree ``pytest_plugins = ["pyxen.testing.pytest_plugin"]``).

@pytest.mark.pyxen_host(memory="512M", pv_mode="fast")      # arguments of pyxen.Host; may be left out
def test_boots(pyxen_host):
    domain = pyxen_host.create("unikernel.cfg")
    pyxen_host.run(domain.console.expect(b"ready", timeout=10))
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pyxen.machine.clock import VirtualClock
    from pyxen.testing.blocking import BlockingHost

# The imports are in the fixtures: a plug-in is loaded into every test run, also into those that never ask for a host.


def pytest_configure(config: pytest.Config) -> None:
    """Declare the marker."""
    config.addinivalue_line("markers", "pyxen_host(**options): arguments of pyxen.Host for the fixture pyxen_host")


@pytest.fixture
def pyxen_host(request: pytest.FixtureRequest) -> Iterator[BlockingHost]:
    """A running host of this test's own; its hypervisor's log is shown when the test fails."""
    from pyxen.testing.blocking import BlockingHost

    marker = request.node.get_closest_marker("pyxen_host")
    options = {"memory": "512M", **(marker.kwargs if marker is not None else {})}
    with BlockingHost(*(marker.args if marker is not None else ()), **options) as host:
        yield host
        request.node.add_report_section("teardown", "xl dmesg", host.host.dmesg())


@pytest.fixture
def pyxen_virtual_clock() -> VirtualClock:
    """Time that moves when it is told to: pass it as ``clock`` to a host."""
    from pyxen.machine.clock import VirtualClock

    return VirtualClock()
