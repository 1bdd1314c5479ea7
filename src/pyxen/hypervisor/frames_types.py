# SPDX-License-Identifier: GPL-2.0-only
"""``struct page_info``: who owns each machine frame, who refers to it, and what it may be used for.

Xen: xen/arch/x86/mm.c (get_page ... put_page_type), xen/common/page_alloc.c, xen/include/asm-x86/mm.h.

Each frame has two counts.  ``count_info`` counts references of any kind; at zero the frame goes back to the
allocator. ``type_info`` counts uses *as its type*: writable data, page table of level 1 to 4, descriptor page.  The
type can only change while its count is zero, so a frame that is mapped writable is never a page table and a page
table is never mapped writable: the whole safety of PV guests is this one rule.

**Locking.**  Xen changes these words with cmpxchg and holds no lock.  Under the GIL there is no cmpxchg and also
nothing to win from finer locks: Python code runs one thread at a time anyway.  So one lock, :attr:`References.lock`,
guards all of it (it takes ``page_lock``'s place in the lock order, see lock.py), foreign mappings need no second
domain's lock, and nobody holds it for more than :data:`BUDGET_NS`: long work stops at :meth:`References.preempt` and
is continued. Methods that want the lock held are named ``get``, ``put``, ``get_type`` ...; those that take it have
Xen's names.

**TLB.**  A stale translation is what could turn an old right into a present one, so a frame whose type count falls
to zero is stamped with its owner's flush generation; giving it another type flushes the owner unless that has
happened since (tlbflush_filter()).  Freed frames flush before they are scrubbed and handed on, once for a batch.
Frames that others have mapped by grants are flushed by the grant table, which knows who that is.
"""

from __future__ import annotations

import errno
import mmap
import time
from array import array
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Literal, Protocol

from pyxen.abi.xen import DomId
from pyxen.errors import InternalError
from pyxen.hypervisor.lock import TicketLock

if TYPE_CHECKING:
    from pyxen.hypervisor.domain import Domain
    from pyxen.hypervisor.frames_m2p import MachineToPhys
    from pyxen.hypervisor.x86.pv.mm_relinquish import Progress
    from pyxen.machine.memory import FrameAllocator, Memory

# count_info: number of references and PGC_* flags.
COUNT_MASK: Final = (1 << 40) - 1
"""The number of references. Each has something that holds it (at least an entry of a page table), so it cannot
wrap."""
PGC_ALLOCATED: Final = 1 << 40
"""The owner's own reference, held from allocation until the owner gives the frame up."""
PGC_XEN_HEAP: Final = 1 << 41
"""The hypervisor's own frame, perhaps shared with a guest."""
PGC_HEAP_FREED: Final = 1 << 42
"""free_xenheap() came while a guest still referred to the frame."""

# type_info: count of uses and PGT_* flags.
PGT_VALIDATED: Final = 1 << 40
PGT_PARTIAL: Final = 1 << 41
"""Validation or its undoing stopped half-way. The flag owns the one type reference and one general reference."""
PGT_PINNED: Final = 1 << 42
PGT_TYPE_MASK: Final = 7 << 44
PGT_NONE: Final = 0
PGT_L1: Final = 1 << 44
PGT_L2: Final = 2 << 44
PGT_L3: Final = 3 << 44
PGT_L4: Final = 4 << 44
PGT_SEG_DESC: Final = 5 << 44
PGT_WRITABLE: Final = 7 << 44

OWNED: Final = 0x8000
"""Set in an owner word, whose other bits are the domid; the word of a frame without an owner is 0."""
ERESTART: Final = 85
"""Internal: preempted, the work done so far is kept (Xen's number; never returned to a guest)."""
BUDGET_NS: Final = 500_000

_GENERATION_MASK: Final = 0xFFFFFFFF
_ITEM: Final = {"H": 2, "I": 4, "Q": 8}


def lazy_zeros(count: int, code: Literal["H", "I", "Q"]) -> memoryview[int]:
    """An array that takes host memory only where it is touched, for hosts may be large. As fast to index as
    array.array."""
    return memoryview(mmap.mmap(-1, count * _ITEM[code])).cast(code)


_now = time.perf_counter_ns  # a budget of our own work: real time even under a virtual clock


def budget_from_now(budget_ns: int) -> int:
    """A deadline for :meth:`References.start_budget`."""
    return _now() + budget_ns


DomainFlush = Callable[["Domain"], "bool | None"]
"""Drop all translations of a domain; False: an engine elsewhere will, in a moment."""
AfterFlush = Callable[["list[Domain]", Callable[[], None]], None]
"""Call a function when those moments have passed."""


def at_once(_domains: list[Domain], function: Callable[[], None]) -> None:
    """The :data:`AfterFlush` of a machine whose domains are never executed by another thread."""
    function()


class Validator(Protocol):
    """What knows the contents of typed pages: :class:`pyxen.hypervisor.x86.pv.validate.PageTables`."""

    def validate(self, mfn: int, page_type: int) -> int:
        """Make every entry's references. 0, -ERESTART (continue later) or another -errno."""
        ...

    def devalidate(self, mfn: int, page_type: int) -> int:
        """Drop every entry's references. 0 or -ERESTART."""
        ...


class References:
    """Counts and types of all frames of the machine.

    ``domain_flush(domain)`` drops every translation of a domain, in its vCPUs' caches and in engines.  It is called
    with :attr:`lock` held: it must not wait for anyone who may want that lock, and says when it would have to. Frames
    that were freed then go back to the allocator through ``after_flush``.
    """

    def __init__(
        self,
        memory: Memory,
        allocator: FrameAllocator,
        m2p: MachineToPhys,
        domain_flush: DomainFlush,
        after_flush: AfterFlush,
    ) -> None:
        self.memory = memory
        self.allocator = allocator
        self.nr_frames: int = memory.nr_frames
        self.lock = TicketLock("frame table: owners, references and types of all frames")
        self.owner = lazy_zeros(self.nr_frames, "H")
        self.count_info = lazy_zeros(self.nr_frames, "Q")
        self.type_info = lazy_zeros(self.nr_frames, "Q")
        self.stamp = lazy_zeros(self.nr_frames, "I")
        self.generation = array("I", bytes(4 * 0x8000))
        """Full TLB flushes of each domain so far (by domid, modulo 2**32: a wrap can only cause a flush too many)."""
        self.partial: dict[int, tuple[int, bool]] = {}
        """Of each PGT_PARTIAL table: entries [0, n) hold their references; whether entry n holds a general one
        (PTF_partial_set)."""
        self.failed = -1
        """Table that a failing validation has just left partial; who asked for it takes over one general
        reference."""
        self.deferred: dict[int, list[tuple[int, bool]]] = {}
        """By owner: tables to put before anything else happens there (Xen: vcpu->arch.old_guest_table,
        ..._partial)."""
        self.relinquishing: dict[int, Progress] = {}
        self.pinned: dict[int, set[int]] = {}
        """By owner: frames with PGT_PINNED, so that teardown need not look for them."""
        """Dying domains whose memory is being given back."""
        self.deadline = 0
        self.domains: dict[int, Domain] = {}
        self.xenheap_pages: dict[int, int] = {}
        self.validator: Validator
        self._domain_flush = domain_flush
        self._after_flush = after_flush
        self._unflushed: list[Domain] = []
        """Domains told to flush that may go on executing for a moment, on another thread."""
        self._doomed: list[int] = []
        self._stale: set[int] = set()
        self.m2p = m2p

    # --- budget --------------------------------------------------------------------------------

    def start_budget(self, until_ns: int = 0) -> None:
        """Start the time that one holder of the lock may take; ``until_ns`` is on time.perf_counter_ns()'s scale."""
        self.deadline = until_ns or _now() + BUDGET_NS

    def preempt(self) -> bool:
        """hypercall_preempt_check() for loops that hold the lock."""
        return _now() >= self.deadline

    def release(self) -> None:
        """Release the lock; frames that lost their last reference under it go back to the allocator then.

        They have no owner and the allocator does not offer them yet, so nobody can reach them while they are scrubbed
        without the lock, which takes milliseconds for many.
        """
        doomed: list[int] = []
        unflushed: list[Domain] = []
        try:
            if self._stale:
                self._flush_stale()
            if not self.lock.nested():
                if self._doomed:
                    doomed, self._doomed = self._doomed, []
                    unflushed = self._unflushed
                self._unflushed = []
        finally:
            self.lock.release()
        if unflushed:
            self._after_flush(unflushed, lambda: self._give_back(doomed))
        elif doomed:
            self._give_back(doomed)

    # --- TLB -------------------------------------------------------------------------------------

    def flush(self, domain: Domain) -> None:
        """Flush all of a domain's translations now. Lock held."""
        if self._domain_flush(domain) is False:
            self._unflushed.append(domain)
        self.flushed(domain)

    def flushed(self, domain: Domain) -> None:
        """*All* translations of the domain (each vCPU's) have just been dropped by someone: earlier stamps are
        void."""
        domid = domain.domid
        self.generation[domid] = (self.generation[domid] + 1) & _GENERATION_MASK

    def _flush_for_type_change(self, mfn: int) -> None:
        domid = self.owner[mfn] & ~OWNED
        if self.stamp[mfn] == self.generation[domid]:
            domain = self.domains.get(domid)
            if domain is not None and not domain.dying:
                self.flush(domain)

    # --- log-dirty -------------------------------------------------------------------------------------

    def mark_dirty(self, mfn: int) -> None:
        """paging_mark_dirty(): the content of a frame of this machine has changed, behind the back of what notices
        its owner's own writes. Any thread."""
        domain = self.domains.get(self.owner[mfn] & ~OWNED)
        log = None if domain is None else domain.log_dirty
        if log is not None:
            log.mark(self.m2p.get(mfn))

    # --- general references, lock held ------------------------------------------------------------

    def get(self, mfn: int, domid: int) -> bool:
        """Take a reference if the frame exists and is ``domid``'s. An owner implies a count above zero."""
        if mfn < self.nr_frames and self.owner[mfn] == domid | OWNED:
            self.count_info[mfn] += 1
            return True
        return False

    def put(self, mfn: int) -> None:
        """Drop a reference."""
        info = self.count_info[mfn]
        if not info & COUNT_MASK:
            raise InternalError(f"reference count of mfn {mfn:#x} below zero")
        info -= 1
        self.count_info[mfn] = info
        if not info & COUNT_MASK:
            self._last_reference(mfn)

    def _last_reference(self, mfn: int) -> None:
        domid, info = self.owner[mfn] & ~OWNED, self.count_info[mfn]
        heap = info & PGC_XEN_HEAP
        if not heap and self.type_info[mfn] & COUNT_MASK:
            raise InternalError(f"mfn {mfn:#x} freed with type {self.type_info[mfn]:#x}")
        self.owner[mfn] = 0
        self.type_info[mfn] = 0
        self.m2p.invalidate(mfn)
        self._stale.add(domid)
        if heap:
            self.xenheap_pages[domid] -= 1
            if not info & PGC_HEAP_FREED:
                self.count_info[mfn] = PGC_XEN_HEAP
                return
        else:
            self.domains[domid].tot_pages -= 1
        self.count_info[mfn] = 0
        self._doomed.append(mfn)

    def flush_at_release(self, domain: Domain) -> None:
        """Flush ``domain`` before the lock is released, whatever else happens. Lock held."""
        self._stale.add(domain.domid)

    def _flush_stale(self) -> None:
        """Flush who may still see the doomed frames."""
        for domid in self._stale:
            domain = self.domains.get(domid)
            if domain is not None and not domain.dying:  # a dying domain's vCPUs run no more
                self.flush(domain)
        self._stale.clear()

    def _give_back(self, doomed: list[int]) -> None:
        """Tell the engines, and hand frames to the allocator (which scrubs). Without the lock."""
        doomed.sort()
        at, total = 0, len(doomed)
        while at < total:
            first = doomed[at]
            end = at + 1
            while end < total and doomed[end] == first + end - at:
                end += 1
            self._to_allocator(first, end - at)
            at = end

    def _to_allocator(self, mfn: int, count: int) -> None:
        self.memory.written(mfn, count)
        self.allocator.free(mfn, count)

    # --- type references, lock held ------------------------------------------------------------------

    def get_type(self, mfn: int, page_type: int) -> int:
        """_get_page_type(): one more use as ``page_type``. The caller holds a general reference.

        0; -EINVAL: in use as another type, or not acceptable as this one; -ERESTART (tables of level 2 and up).
        After an error :attr:`failed` may name the frame (see :meth:`get_and_type`).
        """
        x = self.type_info[mfn]
        if not x & COUNT_MASK:
            if x & PGT_TYPE_MASK != page_type:
                if x & PGT_TYPE_MASK:
                    self._flush_for_type_change(mfn)
                x = page_type | PGT_VALIDATED if page_type == PGT_WRITABLE else page_type
        elif x & PGT_TYPE_MASK != page_type:
            return -errno.EINVAL
        elif not x & (PGT_VALIDATED | PGT_PARTIAL):
            return -errno.EINVAL  # a table that (indirectly) contains itself
        if x & PGT_VALIDATED:
            self.type_info[mfn] = x + 1
            return 0
        was_partial = x & PGT_PARTIAL
        # The type count was left at 1 when PGT_PARTIAL was set.
        self.type_info[mfn] = x & ~PGT_PARTIAL if was_partial else x + 1
        rc = self.validator.validate(mfn, page_type)
        self.mark_dirty(mfn)  # validation may adjust entries; a table is dirty as long as it is one
        if not rc:
            self.type_info[mfn] |= PGT_VALIDATED
        elif rc == -ERESTART or self.failed == mfn:
            self.count_info[mfn] += 1
            self.type_info[mfn] |= PGT_PARTIAL
        else:
            self.type_info[mfn] = 0
        if was_partial:
            self.put(mfn)
        return rc

    def put_type(self, mfn: int, partial_set: bool = False) -> int:
        """_put_page_type(): one use less. 0, or -ERESTART: PGT_PARTIAL owns what the caller held, who may only come
        back with ``partial_set``.

        With ``partial_set`` the caller holds no type reference of its own but had interrupted an operation on this
        page: it is undone if nobody has finished it in the meantime (XSA-299).
        """
        x = self.type_info[mfn]
        if partial_set and not x & PGT_PARTIAL:
            return 0
        if not x & COUNT_MASK:
            raise InternalError(f"type count of mfn {mfn:#x} below zero")
        if x & COUNT_MASK == 1:
            page_type = x & PGT_TYPE_MASK
            if PGT_L1 <= page_type <= PGT_L4 and x & (PGT_VALIDATED | PGT_PARTIAL):
                return self._put_final_type(mfn, x)
            self.stamp[mfn] = self.generation[self.owner[mfn] & ~OWNED]
        self.type_info[mfn] = x - 1
        return 0

    def _put_final_type(self, mfn: int, x: int) -> int:
        self.type_info[mfn] = x & ~(PGT_VALIDATED | PGT_PARTIAL)
        if not x & PGT_PARTIAL:
            self.partial[mfn] = (512, False)
        rc = self.validator.devalidate(mfn, x & PGT_TYPE_MASK)
        self.mark_dirty(mfn)  # free_page_type(): the last of its accessed and dirty bits
        if rc:
            self.count_info[mfn] += 1
            self.type_info[mfn] |= PGT_PARTIAL
        else:
            self.stamp[mfn] = self.generation[self.owner[mfn] & ~OWNED]
            self.type_info[mfn] -= 1
        if x & PGT_PARTIAL:
            self.put(mfn)
        return rc

    def get_and_type(self, mfn: int, domid: int, page_type: int, partial_set: bool = False) -> int:
        """get_page_and_type_from_mfn() for an entry of a table that is being validated.

        With ``partial_set`` the entry already holds its general reference.  On -ERESTART the entry holds one
        afterwards, and so it does after an error if :attr:`failed` is ``mfn`` or it held one before.
        """
        if not partial_set and not self.get(mfn, domid):
            return -errno.EINVAL
        rc = self.get_type(mfn, page_type)
        if rc and not partial_set and rc != -ERESTART and self.failed != mfn:
            self.put(mfn)
        return rc

    def get_root(self, mfn: int, domid: int, page_type: int) -> int:
        """A general and a type reference for something that is not an entry being validated (pin, CR3, one new
        entry).

        0, another -errno, or -ERESTART: call again. An error may leave work for :meth:`put_deferred`.
        """
        if mfn < self.nr_frames and self.owner[mfn] == domid | OWNED:
            info = self.type_info[mfn]
            if info & COUNT_MASK and info & (PGT_TYPE_MASK | PGT_VALIDATED) == page_type | PGT_VALIDATED:
                self.type_info[mfn] = info + 1  # in use as what is wanted: one more
                self.count_info[mfn] += 1
                return 0
        rc = self.get_and_type(mfn, domid, page_type)
        if rc == -ERESTART:
            self.put(mfn)  # PGT_PARTIAL has its own
        elif rc and self.failed == mfn:
            self.failed = -1
            self.deferred.setdefault(domid, []).append((mfn, True))
        return rc

    def put_root(self, mfn: int) -> None:
        """Drop a general and a type reference; what the budget does not allow is left to :meth:`put_deferred`."""
        info = self.type_info[mfn]
        if info & COUNT_MASK > 1 and self.count_info[mfn] & COUNT_MASK > 1 and not info & PGT_PARTIAL:
            self.type_info[mfn] = info - 1  # neither the last use nor the last reference
            self.count_info[mfn] -= 1
            return
        domid = self.owner[mfn] & ~OWNED
        if self.put_type(mfn):
            self.deferred.setdefault(domid, []).append((mfn, True))
        else:
            self.put(mfn)

    def put_deferred(self, domid: int) -> bool:
        """put_old_guest_table(): work on what was left; True when nothing is left."""
        waiting = self.deferred.get(domid)
        if waiting is None:
            return True
        while waiting:
            mfn, partial_set = waiting[-1]
            if self.put_type(mfn, partial_set):
                waiting[-1] = (mfn, True)
                return False
            waiting.pop()
            self.put(mfn)
            if waiting and self.preempt():
                return False
        del self.deferred[domid]
        return True

    # --- the same for other mechanisms: they take the lock ---------------------------------------------

    def get_page(self, mfn: int, domain: Domain) -> bool:
        """Take a reference to a frame that must be ``domain``'s."""
        self.lock.acquire()
        try:
            return self.get(mfn, domain.domid)
        finally:
            self.lock.release()

    def put_page(self, mfn: int) -> None:
        """Drop a reference."""
        self.lock.acquire()
        try:
            self.put(mfn)
        finally:
            self.release()

    def get_page_type(self, mfn: int, page_type: int) -> bool:
        """Take a type reference; the caller holds a general one. Not for tables above level 1."""
        self.lock.acquire()
        try:
            return not self.get_type(mfn, page_type)
        finally:
            self.release()

    def put_page_type(self, mfn: int) -> None:
        """Drop a type reference that get_page_type() gave; the caller keeps its general one."""
        self.lock.acquire()
        try:
            if self.put_type(mfn):
                raise InternalError(f"put_page_type of a table: mfn {mfn:#x}")
        finally:
            self.release()

    def get_page_and_type(self, mfn: int, domain: Domain, page_type: int) -> bool:
        """Take a general and a type reference to a frame of ``domain``. Any type but tables above level 1, which may
        need several goes: :meth:`get_page_and_type_preemptible`."""
        if PGT_L2 <= page_type <= PGT_L4:
            raise InternalError("page tables above level 1 are validated preemptibly")
        self.lock.acquire()
        try:
            return not self.get_and_type(mfn, domain.domid, page_type)
        finally:
            self.release()

    def get_page_and_type_preemptible(self, mfn: int, domain: Domain, page_type: int) -> int:
        """The same for any type: 0, -EINVAL, or -ERESTART after :data:`BUDGET_NS`: call again, nothing is held."""
        self.lock.acquire()
        try:
            self.start_budget()
            if not self.put_deferred(domain.domid):
                return -ERESTART
            return self.get_root(mfn, domain.domid, page_type)
        finally:
            self.release()

    def put_page_and_type(self, mfn: int) -> None:
        """Drop a general and a type reference. Any type: the rest of a large table is undone before the owner's next
        memory hypercall, or at its end."""
        if not self.lock.held():
            self.start_budget()
        self.lock.acquire()
        try:
            self.put_root(mfn)
        finally:
            self.release()

    def page_owner(self, mfn: int) -> DomId | None:
        """Owner of a frame, None for a free frame, a private one of the hypervisor, or no frame."""
        if not 0 <= mfn < self.nr_frames or not self.owner[mfn]:
            return None
        return DomId(self.owner[mfn] & ~OWNED)
