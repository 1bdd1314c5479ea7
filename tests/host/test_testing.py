# SPDX-License-Identifier: GPL-2.0-only
"""What pyxen offers to other people's tests."""

from __future__ import annotations

import gc
import threading
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from pyxen.errors import ConfigError
from pyxen.testing import BlockingHost, ScriptedCpu, Spin, Syscall, VirtualClock, scripted_engine
from tests.host import leftovers
from tests.host.small_guests import config, write_kernel

pytestmark = [pytest.mark.timeout(60), pytest.mark.engine]


def test_fixture_gives_a_host(pyxen_host: BlockingHost, tmp_path: Path) -> None:
    domain = pyxen_host.create(config(write_kernel(tmp_path / "k", b"ready\n")))
    assert pyxen_host.run(domain.console.expect("ready", 10)) == b"ready"
    assert pyxen_host.run(domain.wait()) == "poweroff"


@pytest.mark.pyxen_host(memory="64M", pv_mode="fast", cpus=3)
def test_marker_says_which(pyxen_host: BlockingHost, tmp_path: Path) -> None:
    info = pyxen_host.host.info()
    assert (info["total_memory"], info["nr_cpus"]) == ("64", "3")
    pyxen_host.create(config(write_kernel(tmp_path / "k", then="block")))
    assert pyxen_host.host.rows()[1]["pv_mode"] == "fast"


def test_a_timeout_cancels_and_nothing_stays(tmp_path: Path) -> None:
    kernel = write_kernel(tmp_path / "k", then="block")
    with BlockingHost("64M") as host:
        host.create(config(kernel))
    gc.collect()
    before = leftovers.of_process()
    with BlockingHost("64M") as host:
        domain = host.create(config(kernel))
        with pytest.raises(TimeoutError):
            host.run(domain.wait(), timeout_s=0.05)
        with pytest.raises(ConfigError):
            host.create(config(kernel))
    gc.collect()
    assert leftovers.of_process() == before
    assert not any(thread.name == "pyxen-host" for thread in threading.enumerate())


def test_scripted_guests_in_a_real_host(pyxen_virtual_clock: VirtualClock, tmp_path: Path) -> None:
    """A Python generator makes the hypercalls; time stands still."""
    results: list[Any] = []

    def guest(cpu: ScriptedCpu) -> Generator[Any, Any, None]:
        results.append((yield Syscall(rax=17, rdi=0)))  # xen_version
        results.append((yield Syscall(rax=63)))  # there is no such hypercall
        while True:
            yield Spin()

    with BlockingHost("64M", engine=scripted_engine(guest), clock=pyxen_virtual_clock) as host:
        domain = host.create(config(write_kernel(tmp_path / "k")))
        for _ in range(2000):
            if len(results) == 2:
                break
            host.run(host.host.wait_events(10**6, 0, 0.005))
        assert results[0] == 4 << 16 | 6
        assert results[1] == (1 << 64) - 38  # -ENOSYS
        assert host.host.uptime()[1]["seconds"] == 0
        pyxen_virtual_clock.advance(90 * 10**9)
        assert host.host.uptime()[1]["seconds"] == 90
        host.run(domain.destroy())
