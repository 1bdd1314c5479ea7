# SPDX-License-Identifier: GPL-2.0-only
"""The frame table: allocation, owners and sharing, over the counts and types of :mod:`pyxen.hypervisor.frames_types`.

Xen: xen/common/page_alloc.c (assign_pages, alloc_domheap_pages), xen/arch/x86/mm.c (steal_page,
share_xen_page_with_guest), xen/common/memory.c (guest_remove_page, memory_exchange).  A domain's ``tot_pages``
counts the frames it owns, whoever else maps them; xenheap pages that are shared with it do not count.
"""

from __future__ import annotations

import errno
import re
from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from pyxen.abi.xen import DOMID_IO, DOMID_XEN
from pyxen.errors import InternalError, XenError
from pyxen.hypervisor.frames_m2p import MachineToPhys
from pyxen.hypervisor.frames_types import (
    COUNT_MASK,
    ERESTART,
    OWNED,
    PGC_ALLOCATED,
    PGC_HEAP_FREED,
    PGC_XEN_HEAP,
    PGT_L1,
    PGT_L2,
    PGT_L3,
    PGT_L4,
    PGT_NONE,
    PGT_PARTIAL,
    PGT_PINNED,
    PGT_SEG_DESC,
    PGT_TYPE_MASK,
    PGT_VALIDATED,
    PGT_WRITABLE,
    AfterFlush,
    DomainFlush,
    References,
    at_once,
)
from pyxen.hypervisor.x86.pv.validate import PageTables

if TYPE_CHECKING:
    from pyxen.hypervisor.domain import Domain
    from pyxen.machine.memory import FrameAllocator, Memory

__all__ = [
    "COUNT_MASK", "ERESTART", "PGC_ALLOCATED", "PGC_XEN_HEAP", "PGT_L1", "PGT_L2", "PGT_L3", "PGT_L4", "PGT_NONE",
    "PGT_PARTIAL", "PGT_PINNED", "PGT_SEG_DESC", "PGT_TYPE_MASK", "PGT_VALIDATED", "PGT_WRITABLE", "FrameTable",
]

OWNER_SCAN: Final = 1 << 16


class FrameTable(References):
    """All frames of the machine; see :class:`References` for ``domain_flush``."""

    def __init__(
        self, memory: Memory, allocator: FrameAllocator, domain_flush: DomainFlush, after_flush: AfterFlush = at_once
    ) -> None:
        super().__init__(memory, allocator, MachineToPhys(memory, allocator), domain_flush, after_flush)
        self.tables = self.validator = PageTables(self)
        for mfn in self.m2p.frames:
            self._share(mfn, DOMID_XEN, readonly=True)

    @property
    def m2p_frames(self) -> list[int]:
        """Machine frames of the machine-to-physical table, in order."""
        return self.m2p.frames

    def set_gpfn(self, mfn: int, gpfn: int) -> None:
        """set_gpfn_from_mfn(), and the pfn is dirty: it has another frame now. ``mfn`` must be a frame of this
        machine."""
        self.m2p.set(mfn, gpfn)
        self.mark_dirty(mfn)

    def get_gpfn(self, mfn: int) -> int:
        """get_gpfn_from_mfn()."""
        return self.m2p.get(mfn)

    # --- allocation ---------------------------------------------------------------------------------

    def _admit(self, domain: Domain, count: int) -> None:
        if domain.dying:
            raise XenError(errno.EINVAL)
        if domain.tot_pages + count > domain.max_pages:
            raise XenError(errno.ENOMEM)
        self.domains[domain.domid] = domain

    def _assign_run(self, mfn: int, count: int, domain: Domain) -> None:
        end = mfn + count
        self.owner[mfn:end] = memoryview(array("H", [domain.domid | OWNED]) * count)
        self.count_info[mfn:end] = memoryview(array("Q", [PGC_ALLOCATED | 1]) * count)
        self.type_info[mfn:end] = memoryview(array("Q", bytes(8 * count)))
        self.m2p.invalidate(mfn, count)
        domain.tot_pages += count

    def alloc_domheap(self, domain: Domain, order: int = 0, node: int | None = None) -> int:
        """alloc_domheap_pages(): 2**order aligned frames; the first mfn. XenError(ENOMEM) past max_pages or if there
        are none, EINVAL for a dying domain."""
        self.lock.acquire()
        try:
            self._admit(domain, 1 << order)
            mfn = self.allocator.alloc(order, node)
            self._assign_run(mfn, 1 << order, domain)
            return mfn
        finally:
            self.lock.release()

    def alloc_domheap_many(self, domain: Domain, count: int) -> list[range]:
        """``count`` frames in few runs. All or nothing: XenError(ENOMEM)."""
        if count <= 0:
            return []
        self.lock.acquire()
        try:
            self._admit(domain, count)
            runs = self.allocator.alloc_many(count)
            for run in runs:
                self._assign_run(run.start, len(run), domain)
            return runs
        finally:
            self.lock.release()

    def assign_page(self, mfn: int, domain: Domain) -> None:
        """assign_pages() of one stolen frame. XenError(ENOMEM) past max_pages, EINVAL for a dying domain."""
        self.lock.acquire()
        try:
            if self.owner[mfn] or self.count_info[mfn]:
                raise InternalError(f"mfn {mfn:#x} is in use")
            self._admit(domain, 1)
            self._assign_run(mfn, 1, domain)
        finally:
            self.lock.release()

    def steal_page(self, mfn: int, domain: Domain) -> None:
        """steal_page(): take a frame from its owner: assign_page() or free_stolen() comes next.

        XenError(EINVAL) unless it is ``domain``'s, with no reference left but the owner's own, and no xenheap page.
        """
        self.lock.acquire()
        try:
            self._steal(mfn, domain)
            self.m2p.invalidate(mfn)
            if not domain.dying:
                self.flush(domain)
        finally:
            self.lock.release()

    def _steal(self, mfn: int, domain: Domain) -> None:
        if (
            not 0 <= mfn < self.nr_frames
            or self.owner[mfn] != domain.domid | OWNED
            or self.count_info[mfn] != PGC_ALLOCATED | 1
            or self.type_info[mfn] & COUNT_MASK
        ):
            raise XenError(errno.EINVAL)
        self.owner[mfn] = 0
        self.count_info[mfn] = 0
        self.type_info[mfn] = 0
        domain.tot_pages -= 1

    def exchange(self, domain: Domain, given: list[int], count: int, order: int) -> list[int]:
        """One step of memory_exchange(): swap frames for as many in ``count`` blocks of 2**order. All or nothing.

        Returns the first frame of each block. XenError: EINVAL if a given frame cannot be stolen, ENOMEM.
        """
        stolen: list[tuple[int, int]] = []
        blocks: list[int] = []
        self.lock.acquire()
        try:
            if domain.dying:
                raise XenError(errno.EINVAL)
            try:
                for mfn in given:
                    self._steal(mfn, domain)
                    stolen.append((mfn, self.m2p.get(mfn)))
                for _ in range(count):
                    blocks.append(self.allocator.alloc(order))
            except XenError:
                for mfn in blocks:
                    self.allocator.free(mfn, 1 << order)
                for mfn, gpfn in stolen:
                    self._assign_run(mfn, 1, domain)
                    self.m2p.set(mfn, gpfn)
                raise
            self.flush(domain)
            for mfn, _ in stolen:
                self.m2p.invalidate(mfn)
                self._to_allocator(mfn, 1)
            for mfn in blocks:
                self._assign_run(mfn, 1 << order, domain)
            return blocks
        finally:
            self.lock.release()

    def free_stolen(self, mfn: int) -> None:
        """Give a stolen frame back to the allocator."""
        self.lock.acquire()
        try:
            if self.owner[mfn] or self.count_info[mfn]:
                raise InternalError(f"mfn {mfn:#x} is in use")
            self._to_allocator(mfn, 1)
        finally:
            self.lock.release()

    def guest_remove_page(self, mfn: int, domain: Domain) -> bool:
        """guest_remove_page() (xen/common/memory.c): the owner gives a frame up: unpin, and drop its own reference.

        False if the frame is not the domain's.  The frame stays until the last mapping of it goes.
        """
        if not self.lock.held():
            self.start_budget()
        self.lock.acquire()
        try:
            if not self.get(mfn, domain.domid):
                return False
            self.drop_owner_refs(mfn)
            self.put(mfn)
            return True
        finally:
            self.release()

    def drop_owner_refs(self, mfn: int) -> None:
        """Clear PGT_PINNED and PGC_ALLOCATED with the references they stand for. Lock and another reference held."""
        if self.type_info[mfn] & PGT_PINNED:
            self.type_info[mfn] &= ~PGT_PINNED
            self.pinned.get(self.owner[mfn] & ~OWNED, set()).discard(mfn)
            self.put_root(mfn)
        if self.count_info[mfn] & PGC_ALLOCATED:
            self.count_info[mfn] &= ~PGC_ALLOCATED
            self.put(mfn)

    def update_descriptor(self, mfn: int, domain: Domain, index: int, descriptor: int) -> bool:
        """The store of do_update_descriptor(): into a descriptor page if the frame is one, else into writable data.

        ``descriptor`` has passed check_descriptor(). False if the frame is not ``domain``'s or in use as something
        else.
        """
        self.lock.acquire()
        try:
            if not self.get(mfn, domain.domid):
                return False
            wanted = PGT_SEG_DESC if self.type_info[mfn] & PGT_TYPE_MASK == PGT_SEG_DESC else PGT_WRITABLE
            refused = self.get_type(mfn, wanted)
            if not refused:
                self.memory.q[(mfn << 9) + (index & 511)] = descriptor
                self.memory.written(mfn)
                self.mark_dirty(mfn)
                self.put_type(mfn)
            self.put(mfn)
            return not refused
        finally:
            self.release()

    # --- the hypervisor's own frames ------------------------------------------------------------------

    def alloc_xenheap(self, domain: Domain | None = None, *, readonly: bool = False) -> int:
        """alloc_xenheap_page(), zeroed by the allocator; shared with ``domain`` if given. XenError(ENOMEM)."""
        self.lock.acquire()
        try:
            mfn = self.allocator.alloc()
            self.count_info[mfn] = PGC_XEN_HEAP
            self.type_info[mfn] = 0
            if domain is not None:
                self.share_xen_page_with_guest(mfn, domain, readonly)
            return mfn
        finally:
            self.lock.release()

    def share_xen_page_with_guest(self, mfn: int, domain: Domain, readonly: bool) -> None:
        """share_xen_page_with_guest(): let the guest map a xenheap page for as long as it lives."""
        self.lock.acquire()
        try:
            owner = self.page_owner(mfn)
            if owner is not None:
                if owner == domain.domid:
                    return
                raise InternalError(f"xenheap mfn {mfn:#x} is shared with d{owner} already")
            self.domains[domain.domid] = domain
            self._share(mfn, domain.domid, readonly)
        finally:
            self.lock.release()

    def share_xen_page_with_privileged(self, mfn: int, readonly: bool) -> None:
        """share_xen_page_with_privileged_guests(): DOMID_XEN owns it; only who may act for DOMID_XEN can map it."""
        self.lock.acquire()
        try:
            if self.page_owner(mfn) != DOMID_XEN:
                self._share(mfn, DOMID_XEN, readonly)
        finally:
            self.lock.release()

    def _share(self, mfn: int, domid: int, readonly: bool) -> None:
        # The type reference is never dropped, so a page of type "none" can never become writable.
        self.type_info[mfn] = (PGT_NONE if readonly else PGT_WRITABLE) | PGT_VALIDATED | 1
        self.count_info[mfn] = PGC_XEN_HEAP | PGC_ALLOCATED | 1
        self.owner[mfn] = domid | OWNED
        self.m2p.invalidate(mfn)
        self.xenheap_pages[domid] = self.xenheap_pages.get(domid, 0) + 1

    def assign_io(self, mfn: int, count: int = 1) -> None:
        """Frames that are no RAM for anyone: DOMID_IO's, mapped only by who may touch I/O memory."""
        self.lock.acquire()
        try:
            for frame in range(mfn, mfn + count):
                self._share(frame, DOMID_IO, readonly=False)
        finally:
            self.lock.release()

    def free_xenheap(self, mfn: int) -> None:
        """free_xenheap_page(): the hypervisor has no use for it any more; it is freed when no guest refers to it."""
        self.lock.acquire()
        try:
            if not self.count_info[mfn] & PGC_XEN_HEAP:
                raise InternalError(f"mfn {mfn:#x} is no xenheap page")
            self.count_info[mfn] |= PGC_HEAP_FREED
            if self.count_info[mfn] & PGC_ALLOCATED:
                self.count_info[mfn] &= ~PGC_ALLOCATED
                self.put(mfn)
            elif not self.count_info[mfn] & COUNT_MASK:
                self.count_info[mfn] = 0
                self.type_info[mfn] = 0
                self._doomed.append(mfn)
        finally:
            self.release()

    # --- by owner ---------------------------------------------------------------------------------------

    def owned_by(self, domain: Domain) -> Iterator[int]:
        """The frames of a domain in ascending order, xenheap pages included."""
        mfn = self.next_owned(domain.domid, 0)
        while mfn >= 0:
            yield mfn
            mfn = self.next_owned(domain.domid, mfn + 1)

    def next_owned(self, domid: int, start: int, stop: int | None = None) -> int:
        """First frame from ``start`` on, and before ``stop``, with this owner; -1 if none (a memchr-speed scan of
        the owner
        array: about a tenth of a millisecond for :data:`OWNER_SCAN` frames)."""
        end = self.nr_frames if stop is None else min(stop, self.nr_frames)
        word = domid | OWNED
        needle = word.to_bytes(2, "little")
        owners = self.owner.cast("B")
        while start < end:
            # Runs are the rule: look at the next frame before copying a chunk.
            if self.owner[start] == word:
                return start
            chunk = bytes(owners[start * 2 : min(start + OWNER_SCAN, end) * 2])
            at = chunk.find(needle)
            while at >= 0:
                if not at & 1:
                    return start + (at >> 1)
                at = chunk.find(needle, at + 1)
            start += OWNER_SCAN
        return -1

    def owned_runs(self, domain: Domain) -> Iterator[range]:
        """The same as :meth:`owned_by`, as runs of at most :data:`OWNER_SCAN` frames."""
        word = (domain.domid | OWNED).to_bytes(2, "little")
        run = re.compile(b"(?:" + re.escape(word) + b")+", re.DOTALL)
        owners = self.owner.cast("B")
        mfn = self.next_owned(domain.domid, 0)
        while mfn >= 0:
            found = run.match(bytes(owners[mfn * 2 : (mfn + OWNER_SCAN) * 2]))
            end = mfn + (found.end() // 2 if found else 1)  # none: it has just changed hands
            yield range(mfn, end)
            mfn = self.next_owned(domain.domid, end)

    def pages_held(self, domain: Domain) -> int:
        """Frames that still name this domain as owner; its domid may be used again only at zero."""
        return domain.tot_pages + self.xenheap_pages.get(domain.domid, 0)

    def forget(self, domain: Domain) -> None:
        """The domain is gone (pages_held() is 0)."""
        self.domains.pop(domain.domid, None)
        self.pinned.pop(domain.domid, None)
        self.xenheap_pages.pop(domain.domid, None)
