# SPDX-License-Identifier: GPL-2.0-only
"""A translated domain's physical-to-machine map (Xen: xen/arch/x86/mm/p2m.c).

The map *is* the nested page table that the engine walks (:mod:`pyxen.hypervisor.x86.hvm.p2m_table`).  One domain has
one *host* p2m; a vCPU runs under the root of ``vcpu.hvm.p2m``, which is the host's as long as there are no other views.

**References**, as Xen's: an entry of the domain's own memory holds none (the frame is held by its owner's
PGC_allocated); one of a foreign frame holds one; a grant mapping's are the grant table's.  M2P says where a frame of
the domain stands; a frame stands in one place only.

**TLB.**  Whoever takes rights away (:meth:`P2m.set_entry` sees it) flushes all vCPUs of the domain before the frame
may be used for something else: a vCPU that is loaded flushes before its next guest instruction, and one that is not
flushes when it is loaded. That is enough on the thread of the domain's engine; other threads have the domain paused.

Lock order: grant table -> :attr:`P2m.lock` -> frame table.
"""

from __future__ import annotations

import errno
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from pyxen.abi.xen import INVALID_M2P_ENTRY, INVALID_MFN
from pyxen.errors import XenError
from pyxen.hypervisor.lock import TicketLock
from pyxen.hypervisor.x86.hvm.p2m_table import GFN_BITS, P2mTable
from pyxen.hypervisor.x86.hvm.p2m_types import (
    ADDRESS,
    BACKED,
    FLAGS,
    GRANT,
    NX,
    PRESENT,
    RAM,
    READONLY,
    RW,
    P2mType,
    type_of,
)

if TYPE_CHECKING:
    from pyxen.hypervisor.domain import Domain
    from pyxen.hypervisor.x86.hvm.paging_pool import PagingPool

NULL_PAGES: Final = 16
"""How many holes are mapped to the null device at a time; a REP MOVS between two of them needs four."""
_RIGHTS: Final = PRESENT | RW


class P2m:
    """The host p2m of one domain."""

    def __init__(self, domain: Domain, pool: PagingPool) -> None:
        """XenError(ENOMEM)."""
        self.domain = domain
        self.pool = pool
        self.frames = domain.hypervisor.frames
        self.lock = TicketLock("p2m of a domain")
        self.table = P2mTable(domain.hypervisor.memory, pool)
        self.max_mapped_gfn = 0
        """Highest frame number that was ever mapped."""
        self.changes = 0
        """Counts changes that take something away: caches of translations compare it."""
        self.null_page: int | None = None
        """Machine address of the null device's page in the MMIO window."""
        self.holes: deque[int] = deque()
        """Frames that the null device stands at, oldest first."""

    @property
    def root_maddr(self) -> int:
        """What the engine takes as nested root."""
        return self.table.root << 12

    # --- reading -----------------------------------------------------------------------------------

    def get_entry(self, gfn: int) -> tuple[int, P2mType, int]:
        """(mfn, type, order) of what covers ``gfn``; INVALID_MFN for a hole. Devices have no mfn either."""
        entry, order = self.table.lookup(gfn)
        kind = type_of(entry)
        if kind not in BACKED:
            return INVALID_MFN, kind, order
        return ((entry & ADDRESS) >> 12) + (gfn & (1 << order) - 1), kind, order

    def gfn_to_mfn(self, gfn: int) -> int | None:
        """The frame behind ``gfn`` that the hypervisor may read for the guest; None for holes and devices."""
        entry, order = self.table.lookup(gfn)
        if type_of(entry) not in BACKED:
            return None
        return ((entry & ADDRESS) >> 12) + (gfn & (1 << order) - 1)

    def writable_mfn(self, gfn: int) -> int | None:
        """Like :meth:`gfn_to_mfn`, for a write on the guest's behalf. A page that is read-only for log-dirty's sake
        counts as writable; the caller marks it dirty."""
        mfn, kind, _ = self.get_entry(gfn)
        return None if mfn == INVALID_MFN or kind in (P2mType.RAM_RO, P2mType.GRANT_MAP_RO) else mfn

    def get_page(self, gfn: int, *, writable: bool = False) -> int:
        """get_page_from_gfn() of the domain's own RAM, with a reference taken. XenError(EINVAL)."""
        with self.lock:
            mfn, kind, _ = self.get_entry(gfn)
            if kind not in RAM or (writable and kind is P2mType.RAM_RO):
                raise XenError(errno.EINVAL)
            if not self.frames.get_page(mfn, self.domain):
                raise XenError(errno.EINVAL)
            return mfn

    def machine_runs(self, gfn: int, count: int, *, writable: bool) -> Iterator[range]:
        """The machine frames behind [gfn, gfn + count) in order, page by page of the map. XenError(EINVAL): one is
        not the domain's own RAM, or is read-only to the guest and ``writable`` is wanted. Lock held."""
        end = gfn + count
        while gfn < end:
            mfn, kind, order = self.get_entry(gfn)
            if kind not in RAM or (writable and kind is P2mType.RAM_RO):
                raise XenError(errno.EINVAL)
            size = min((1 << order) - (gfn & (1 << order) - 1), end - gfn)
            yield range(mfn, mfn + size)
            gfn += size

    # --- writing -----------------------------------------------------------------------------------

    def set_entry(self, gfn: int, mfn: int, order: int, kind: P2mType) -> None:
        """p2m_set_entry(): map 2**order frames, aligned at both ends (order 0, 9 or 18), or make a hole. Lock held.

        Keeps no M2P. XenError: EINVAL, ENOMEM.
        """
        entry = FLAGS[kind] | (mfn << 12 if kind is not P2mType.INVALID else 0)
        covered = order > 0 and bool(self.table.lookup(gfn)[1] < order)
        old = self.table.set(gfn, order, entry)
        if kind is not P2mType.INVALID:
            self.max_mapped_gfn = max(self.max_mapped_gfn, gfn + (1 << order) - 1)
        if covered or (old & PRESENT and (
                (old ^ entry) & ADDRESS or old & _RIGHTS & ~entry or entry & NX & ~old)):
            self.flush()
        if type_of(old) is P2mType.MAP_FOREIGN and old & ADDRESS != entry & ADDRESS:
            self.frames.put_page((old & ADDRESS) >> 12)

    def flush(self) -> None:
        """Every vCPU of the domain forgets its translations before its next instruction."""
        self.changes += 1
        self.domain.hypervisor.flush_domain(self.domain)

    def set_mmio(self, gfn: int, maddr: int) -> None:
        """set_mmio_p2m_entry(): a device's page of the engine's MMIO window at ``gfn``. XenError(ENOMEM)."""
        with self.lock:
            self.set_entry(gfn, maddr >> 12, 0, P2mType.MMIO_DIRECT)

    def add_entry(self, gfn: int, mfn: int, order: int, kind: P2mType) -> None:
        """guest_physmap_add_entry(): ``mfn`` (2**order frames of the domain, or a grant or foreign frame) at ``gfn``.

        What was there before is not mapped any more; a frame of the domain that stood elsewhere no longer does.
        XenError: EINVAL, also for a place where a grant or foreign frame is mapped (the domain crashes, as in Xen:
        it must be unmapped first); ENOMEM.
        """
        m2p, domain = self.frames.m2p, self.domain
        count = 1 << order
        if gfn >> GFN_BITS or gfn + count - 1 >> GFN_BITS or gfn & count - 1:
            raise XenError(errno.EINVAL)
        log = domain.log_dirty
        with self.lock:
            for first, _order, entry in self.table.leaves(gfn, gfn + count):
                was = type_of(entry)
                if was in GRANT or was is P2mType.MAP_FOREIGN:
                    domain.hypervisor.crash(domain, f"mapped over a grant or foreign frame at gfn {first:#x}")
                    raise XenError(errno.EINVAL)
            self._forget(gfn, count)
            if kind in RAM:
                for i in range(count):
                    elsewhere = m2p.get(mfn + i)
                    if elsewhere == INVALID_M2P_ENTRY or elsewhere == gfn + i or elsewhere >> GFN_BITS:
                        continue
                    there, its_kind, _ = self.get_entry(elsewhere)
                    if its_kind in RAM and there == mfn + i:
                        self.set_entry(elsewhere, 0, 0, P2mType.INVALID)
                        if log is not None:
                            log.mark(elsewhere)
            for at, size in pieces(gfn, mfn, count):
                self.set_entry(gfn + at, mfn + at, size, kind)
            if kind in RAM:
                for i in range(count):
                    m2p.set(mfn + i, gfn + i)
            if log is not None and kind not in GRANT:
                log.mark(gfn, count)

    def _forget(self, gfn: int, count: int) -> None:
        """M2P of what is about to be replaced."""
        m2p = self.frames.m2p
        for first, order, entry in self.table.leaves(gfn, gfn + count):
            if type_of(entry) in RAM:
                begin, end = max(first, gfn), min(first + (1 << order), gfn + count)
                for frame in range(begin, end):
                    mfn = ((entry & ADDRESS) >> 12) + frame - first
                    if m2p.get(mfn) == frame:
                        m2p.set(mfn, INVALID_M2P_ENTRY)

    def remove_page(self, gfn: int, mfn: int, order: int = 0) -> None:
        """guest_physmap_remove_page(): take ``mfn`` away from ``gfn``. EINVAL if it does not stand there."""
        with self.lock:
            for i in range(1 << order):
                found, kind, _ = self.get_entry(gfn + i)
                if found != mfn + i or kind not in RAM:
                    raise XenError(errno.EINVAL)
            self._forget(gfn, 1 << order)
            for at, size in pieces(gfn, gfn, 1 << order):
                self.set_entry(gfn + at, 0, size, P2mType.INVALID)
            if self.domain.log_dirty is not None:
                self.domain.log_dirty.mark(gfn, 1 << order)

    def remove_grant(self, gfn: int, mfn: int) -> bool:
        """The p2m half of replace_grant_p2m_mapping(); False if ``mfn`` is not mapped there by a grant."""
        with self.lock:
            found, kind, _ = self.get_entry(gfn)
            if found != mfn or kind not in GRANT:
                return False
            self.set_entry(gfn, 0, 0, P2mType.INVALID)
            return True

    def populate(self, gfn: int, runs: list[range]) -> None:
        """Map fresh frames of the domain from ``gfn`` on, in the largest pages that alignment allows. ENOMEM."""
        for run in runs:
            at = 0
            while at < len(run):
                size = largest(gfn + at, run.start + at, len(run) - at)
                self.add_entry(gfn + at, run.start + at, size, P2mType.RAM_RW)
                at += 1 << size
            gfn += len(run)

    # --- what nested faults ask for ----------------------------------------------------------------------

    def map_hole(self, gfn: int) -> bool:
        """Let the null device answer at a hole: reads are all ones, writes are lost. False if there is no frame left
        for a table, or ``gfn`` is no hole or beyond the physical address space."""
        with self.lock:
            if gfn >> GFN_BITS or self.null_page is None or type_of(self.table.lookup(gfn)[0]) is not P2mType.INVALID:
                return False
            if len(self.holes) >= NULL_PAGES:
                self._unmap_hole(self.holes.popleft())
            high = self.max_mapped_gfn
            try:
                self.set_entry(gfn, self.null_page >> 12, 0, P2mType.MMIO_DM)
            except XenError:
                self.table.prune(gfn)  # tables that were made before there were no more
                while self.holes:
                    self._unmap_hole(self.holes.popleft())
                try:
                    self.set_entry(gfn, self.null_page >> 12, 0, P2mType.MMIO_DM)
                except XenError:
                    self.table.prune(gfn)
                    return False
            finally:
                self.max_mapped_gfn = high  # a hole is not mapped
            self.holes.append(gfn)
            return True

    def _unmap_hole(self, gfn: int) -> None:
        if type_of(self.table.lookup(gfn)[0]) is P2mType.MMIO_DM:
            self.set_entry(gfn, 0, 0, P2mType.INVALID)
            self.table.prune(gfn)

    def unprotect(self, gfn: int) -> bool:
        """The write fault of log-dirty: make ``gfn`` writable again; False if it was not that. Its superpage, if any,
        is split, so that the rest stays protected."""
        with self.lock:
            mfn, kind, _ = self.get_entry(gfn)
            if kind is not P2mType.RAM_LOGDIRTY:
                return False
            self.set_entry(gfn, mfn, 0, P2mType.RAM_RW)
            return True

    def protect(self, gfn: int, count: int) -> None:
        """Write-protect what is ordinary RAM in a range, for log-dirty. The caller flushes. XenError(ENOMEM)."""
        with self.lock:
            self.table.run(gfn, count, {P2mType.RAM_RW: P2mType.RAM_LOGDIRTY})

    def change_type_range(self, gfn: int, count: int, change: dict[P2mType, P2mType]) -> None:
        """p2m_change_type_range(): frames stay, types change; flushes once. XenError(ENOMEM)."""
        with self.lock:
            try:
                self.table.run(gfn, count, change)
            finally:
                self.flush()

    # --- end ------------------------------------------------------------------------------------------

    def put_foreign(self) -> None:
        """Drop the references of foreign entries (p2m_teardown of a domain that runs no more)."""
        with self.lock:
            for gfn, _order, entry in list(self.table.leaves(0, self.max_mapped_gfn + 1)):
                if type_of(entry) is P2mType.MAP_FOREIGN:
                    self.set_entry(gfn, 0, 0, P2mType.INVALID)


def largest(gfn: int, mfn: int, count: int) -> int:
    """The largest page order that both numbers are aligned to and ``count`` frames fill."""
    for order in (18, 9):
        if count >= 1 << order and not (gfn | mfn) & (1 << order) - 1:
            return order
    return 0


def pieces(gfn: int, mfn: int, count: int) -> list[tuple[int, int]]:
    """``count`` frames as (offset, order) of pages."""
    found = []
    at = 0
    while at < count:
        order = largest(gfn + at, mfn + at, count - at)
        found.append((at, order))
        at += 1 << order
    return found


__all__ = ["NULL_PAGES", "READONLY", "P2m", "largest", "pieces"]
