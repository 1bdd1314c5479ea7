# SPDX-License-Identifier: GPL-2.0-only
"""A running Linux is given and loses vCPUs and memory, is moved between pCPUs, and hears NMI and SysRq."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path

import pytest

import pyxen
from pyxen.toolstack.guests.initramfs import FIRST_USER_LINE

pytestmark = [pytest.mark.guest, pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(300)]

BOOT_S = 150.0


async def until(true: Callable[[], bool], seconds: float = 30.0) -> None:
    """The guest does as it was told when it likes."""
    async with asyncio.timeout(seconds):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.05)


@pytest.mark.parametrize(("kind", "most_mb"), [("pv", 224), ("pvh", 192)])
def test_a_running_linux_changes_size(debian: Path, kind: str, most_mb: int) -> None:
    """``most_mb``: a PVH domain cannot have more than it starts with (there is no populate-on-demand)."""

    async def main() -> None:
        async with pyxen.Host(memory="1G", pv_mode="fast", topology="nodes=2,sockets=2", max_engines=2) as host:
            config = debian.with_name(f"debian-{kind}.cfg")
            most = [f"maxmem={most_mb}"] if most_mb > 192 else []
            domain = await host.create(config, extra=['name="debian"', "vcpus=2", "memory=192", *most])
            console = domain.console
            await console.expect(FIRST_USER_LINE, BOOT_S)
            await console.expect("/ # ", BOOT_S)

            def online() -> list[bool]:
                return [row["cpu"] is not None for row in host.vcpus("debian")]

            assert online() == [True, True]
            await domain.set_vcpus(1)
            await until(lambda: online() == [True, False])
            await domain.set_vcpus(2)
            # The kernel has it again; without udev nobody brings it up by itself (xl(1) says so of vcpu-set).
            await console.write("until echo 1 > /sys/devices/system/cpu/cpu1/online; do sleep 1; done 2>/dev/null\n")
            await until(lambda: online() == [True, True])

            def has(megabytes: int) -> bool:
                found = host.row("debian")["memory_kb"]
                assert isinstance(found, int)
                # Special frames and ACPI tables come on top of a PVH guest's memory; what it maps over goes.
                return found - (megabytes << 10) in (range(41) if kind == "pvh" else (0,))

            assert has(192)
            await domain.set_memory(160 << 10)
            await until(lambda: has(160))
            await domain.set_memory(most_mb << 10)
            await until(lambda: has(most_mb))

            await domain.pin(hard="1")
            assert [row["cpu"] for row in host.vcpus("debian")] == [1, 1]
            await host.cpupools.numa_split()
            assert [pool.n_dom for pool in await host.cpupools.pools()] == [2, 0]
            await domain.move_to_pool("Pool-node1")
            assert [row["cpu"] for row in host.vcpus("debian")] == [1, 1]
            await domain.sysrq("h")
            await console.expect(re.compile(rb"sysrq: HELP"), 30)
            await domain.trigger("nmi")
            # A PVH guest has no port 0x61, which would say why: it reads all ones.
            why = rb"NMI received for unknown reason 00" if kind == "pv" else rb"NMI: .* for reason ff"
            await console.expect(re.compile(why + rb" on CPU 0"), 30)
            await console.write("poweroff\n")
            assert await asyncio.wait_for(domain.wait(), 60) == "poweroff"

    asyncio.run(main())
