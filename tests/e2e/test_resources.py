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


@pytest.mark.parametrize("kind", ["pv", "pvh"])
def test_a_running_linux_changes_size(debian: Path, kind: str) -> None:
    configuration = debian.with_name(f"debian-{kind}.cfg")
    start_mb = 192 if kind == "pv" else 224  # a PVH domain begins with all it may have (no populate-on-demand)

    async def main() -> None:
        async with pyxen.Host(memory="1G", pv_mode="fast", topology="nodes=2,sockets=2", max_engines=2) as host:
            extra = ['name="debian"', "vcpus=2", f"memory={start_mb}", "maxmem=224"]
            domain = await host.create(configuration, extra=extra)
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
                # A PVH domain has a few pages beside its memory: rings, tables.
                beyond = host.privcmd.domain_info(domain.domid).tot_pages - megabytes * 256  # type: ignore[union-attr]
                return 0 <= beyond <= (0 if kind == "pv" else 256)

            assert has(start_mb)
            await domain.set_memory(160 << 10)
            await until(lambda: has(160))
            await domain.set_memory(224 << 10)
            await until(lambda: has(224))

            await domain.pin(hard="1")
            assert [row["cpu"] for row in host.vcpus("debian")] == [1, 1]
            await host.cpupools.numa_split()
            assert [pool.n_dom for pool in await host.cpupools.pools()] == [2, 0]
            await domain.move_to_pool("Pool-node1")
            assert [row["cpu"] for row in host.vcpus("debian")] == [1, 1]
            await domain.sysrq("h")
            await console.expect(re.compile(rb"sysrq: HELP"), 30)
            await domain.trigger("nmi")
            await console.expect(re.compile(rb"Dazed and confused, but trying to continue"), 30)
            await console.write("poweroff\n")
            assert await asyncio.wait_for(domain.wait(), 60) == "poweroff"

    asyncio.run(main())
