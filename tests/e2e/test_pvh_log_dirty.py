# SPDX-License-Identifier: GPL-2.0-only
"""Log-dirty of a running Linux against a diff of all its memory, page by page; and an NMI to it."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest

import pyxen
from pyxen.hypervisor.privcmd import PrivCmd

pytestmark = [pytest.mark.guest, pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(300)]


def snapshot(privcmd: PrivCmd, domid: int, pages: int) -> list[bytes]:
    """Digests are enough to see a change."""
    import hashlib

    found = []
    for first in range(0, pages, 256):
        with privcmd.foreign_map(domid, first, min(256, pages - first), False) as mapping:
            for piece in mapping.pieces:
                found += [hashlib.blake2b(piece[at : at + 4096], digest_size=8).digest()
                          for at in range(0, len(piece), 4096)]
    return found


@pytest.mark.parametrize("vcpus", [1, 2])
def test_what_linux_writes_is_in_the_bitmap(debian: Path, vcpus: int) -> None:
    async def run() -> None:
        async with pyxen.Host(memory="1G") as host:
            domain = await host.create(debian.with_name("debian-pvh.cfg"), extra=[f"vcpus={vcpus}", "memory=192"])
            privcmd, domid = host.privcmd, domain.domid
            await domain.console.expect(b"/ # ", timeout=120)
            pages = 192 * 256 - 256  # below the special pages
            privcmd.domain_pause(domid)
            privcmd.log_dirty_enable(domid)
            before = snapshot(privcmd, domid, pages)
            for _round in range(3):
                privcmd.domain_unpause(domid)
                await domain.console.write("dd if=/dev/urandom of=/tmp/f bs=64k count=8 2>/dev/null; md5sum /tmp/f; "
                                           "echo don''e\n")
                await domain.console.expect(b"\ndone\r\n", timeout=60)
                privcmd.domain_pause(domid)
                after = snapshot(privcmd, domid, pages)
                changed = {n for n in range(pages) if before[n] != after[n]}
                bitmap, stats = privcmd.log_dirty_clean(domid, pages)
                said = {n for n in range(pages) if bitmap[n >> 3] >> (n & 7) & 1}
                assert changed <= said, sorted(changed - said)
                assert 100 < len(changed) <= len(said) < pages // 4
                assert stats.dirty_count == len(said)
                before = after
            privcmd.log_dirty_disable(domid)
            privcmd.domain_unpause(domid)
            await domain.console.write("cat /tmp/f | wc -c; echo don''e\n")
            assert b"524288" in await domain.console.expect(b"\ndone\r\n", timeout=60)
            assert "crash" not in privcmd.console_ring()

    asyncio.run(run())


def test_an_nmi_reaches_linux(debian: Path) -> None:
    async def run() -> None:
        async with pyxen.Host(memory="1G") as host:
            domain = await host.create(debian.with_name("debian-pvh.cfg"))
            await domain.console.expect(b"/ # ", timeout=120)
            vcpu = host.hypervisor.domains[domain.domid].vcpus[0]
            vcpu.nmi_pending = True
            host.hypervisor.scheduler.vcpu_kick(vcpu)
            await domain.console.write("grep NMI: /proc/interrupts; dmesg | tail -5; echo don''e\n")
            said = await domain.console.expect(b"\ndone\r\n", timeout=60)
            assert re.search(rb"NMI.* reason .. on CPU 0", said), said  # by port 0x61, which is not there

    asyncio.run(run())
