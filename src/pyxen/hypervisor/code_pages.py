# SPDX-License-Identifier: GPL-2.0-only
"""An engine's translated code of a domain, while the domain is away on another engine.

Each engine has translations of its own, and notices only the stores that it executes itself. A domain that comes back
may have changed its code meanwhile. Dropping all its translations would be right and slow (Linux: half a second to
make them again), so the engine keeps a copy of the pages that it has translations of, and drops those that differ when
the domain returns: a millisecond for a Linux guest, each way.

Writes by others than the domain itself need nothing here: Memory.written() tells every engine, always.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pyxen.hypervisor.domain import Domain
    from pyxen.hypervisor.frames import FrameTable
    from pyxen.machine.cpu.base import Cpu

_SCAN: Final = 4096
MOST_PAGES: Final = 16384
"""Pages copied at most (64 MiB); translations of further pages are dropped when the domain leaves."""


class CodePages:
    """Of one engine. Everything here runs on its thread, outside of the guest."""

    def __init__(self, cpu: Cpu) -> None:
        self._cpu = cpu
        self._kept: dict[Domain, dict[int, bytes]] = {}

    def leave(self, domain: Domain, frames: FrameTable) -> int:
        """``domain`` goes to another engine; returns how many pages were copied."""
        if domain in self._kept:
            return 0  # it has come and goes without having run: the copies are still those of our translations
        kept: dict[int, bytes] = {}
        cpu, b = self._cpu, frames.memory.b
        domid = domain.domid
        start = frames.next_owned(domid, 0)
        while start >= 0:
            end = min(start + _SCAN, frames.nr_frames)
            mfn = cpu.next_code(start, end)
            while mfn >= 0:
                if frames.page_owner(mfn) == domid:
                    maddr = mfn << 12
                    if len(kept) < MOST_PAGES:
                        kept[mfn] = bytes(b[maddr : maddr + 4096])
                    else:
                        cpu.forget_code(maddr, 4096)
                mfn = cpu.next_code(mfn + 1, end)
            start = frames.next_owned(domid, end) if end < frames.nr_frames else -1
        self._kept[domain] = kept
        return len(kept)

    def enter(self, domain: Domain, frames: FrameTable) -> int:
        """``domain`` is about to run here; returns how many pages' translations were dropped."""
        kept = self._kept.pop(domain, None)
        if not kept:
            return 0
        b = frames.memory.b
        dropped = 0
        for mfn, content in kept.items():
            maddr = mfn << 12
            if b[maddr : maddr + 4096] != content:
                self._cpu.forget_code(maddr, 4096)
                dropped += 1
        return dropped

    def forget(self, domain: Domain) -> None:
        """The domain is gone. Any thread."""
        self._kept.pop(domain, None)
