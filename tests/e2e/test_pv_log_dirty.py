# SPDX-License-Identifier: GPL-2.0-only
"""Log-dirty of a running PV Linux against a diff of all its memory, page by page."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import pytest

import pyxen
from pyxen.hypervisor.hypervisor import Hypervisor
from pyxen.hypervisor.log_dirty import MAX_PAGES

pytestmark = [pytest.mark.guest, pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(300)]

LOAD = "dd if=/dev/urandom of=/tmp/f bs=64k count=8 2>/dev/null; md5sum /tmp/f; (true; true) | cat; echo don''e\n"


def snapshot(hypervisor: Hypervisor, domid: int) -> dict[int, tuple[int, bytes]]:
    """Of each pfn: its frame, and a digest, which is enough to see a change."""
    frames, memory = hypervisor.frames, hypervisor.memory
    found = {}
    for mfn in frames.owned_by(hypervisor.domains[domid]):  # type: ignore[index]
        pfn = frames.get_gpfn(mfn)
        if pfn < MAX_PAGES:
            found[pfn] = mfn, hashlib.blake2b(memory.b[mfn << 12 : (mfn + 1) << 12], digest_size=8).digest()
    return found


@pytest.mark.parametrize(("mode", "vcpus"), [("exact", 1), ("fast", 2)])
def test_what_linux_writes_is_in_the_bitmap(debian: Path, mode: str, vcpus: int) -> None:
    async def run() -> None:
        async with pyxen.Host(memory="1G", pv_mode=mode) as host:
            # A second guest keeps the engines busy with other translations and marks frames of its own.
            other = await host.create(debian, extra=["name='other'", "memory=128"])
            domain = await host.create(debian, extra=[f"vcpus={vcpus}", "memory=192"])
            privcmd, hypervisor, domid = host.privcmd, host.hypervisor, domain.domid
            for guest in (other, domain):
                await guest.console.expect(b"/ # ", timeout=120)
            await other.console.write("while true; do dd if=/dev/zero of=/tmp/g bs=64k count=4 2>/dev/null; done\n")
            pages = 192 * 256
            privcmd.domain_pause(domid)
            privcmd.log_dirty_enable(domid)
            before = snapshot(hypervisor, domid)
            assert len(before) > pages * 9 // 10
            quiet = []
            for round_ in range(5):
                privcmd.domain_unpause(domid)
                if round_ != 2:
                    await domain.console.write(LOAD)
                    await domain.console.expect(b"\ndone\r\n", timeout=60)
                privcmd.domain_pause(domid)
                after = snapshot(hypervisor, domid)
                changed = {pfn for pfn, was in after.items() if before.get(pfn) != was}
                peeked, _ = privcmd.log_dirty_peek(domid, pages)
                bitmap, stats = privcmd.log_dirty_clean(domid, pages)
                assert peeked == bitmap
                said = {n for n in range(pages) if bitmap[n >> 3] >> (n & 7) & 1}
                assert changed <= said, sorted(changed - said)
                assert stats.dirty_count == len(said)
                tables = count_tables(hypervisor, domid)
                # What was written with what it held already, besides tables.
                assert len(said) <= 2 * len(changed) + tables + 64, (len(said), len(changed), tables)
                quiet.append(len(changed))
                before = after
            assert min(quiet[:2] + quiet[3:]) > 100 > quiet[2], quiet
            privcmd.log_dirty_disable(domid)
            privcmd.domain_unpause(domid)
            await domain.console.write("cat /tmp/f | wc -c; echo don''e\n")
            assert b"524288" in await domain.console.expect(b"\ndone\r\n", timeout=60)
            assert "crash" not in privcmd.console_ring()

    asyncio.run(run())


def count_tables(hypervisor: Hypervisor, domid: int) -> int:
    """Page tables, by the log of their types."""
    frames = hypervisor.frames
    types = (frames.type_info[mfn] >> 40 for mfn in frames.owned_by(hypervisor.domains[domid]))  # type: ignore[index]
    return sum(1 <= word >> 4 & 7 <= 4 and bool(word & 3) for word in types)
