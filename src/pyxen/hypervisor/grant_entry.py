# SPDX-License-Identifier: GPL-2.0-only
"""Grant tables: a domain's permission for another to use one of its frames (Xen: xen/common/grant_table.c), version 1.

A table has two sides.  As *granter*, a domain has shared frames full of entries that it writes and we read, and an
*active entry* for each reference that is in use, whose ``pin`` counts the uses.  As *mapper*, it has a *maptrack*: one
handle for each mapping it holds.  What maps and unmaps is :mod:`pyxen.hypervisor.grant_map`, what copies
:mod:`pyxen.hypervisor.grant_copy`; the hypercall is :mod:`pyxen.hypervisor.grant_table`.

**Status bits.**  GTF_reading and GTF_writing live in the entry's flags word, which the granter changes with a locked
cmpxchg; a read-modify-write from Python would race with it, unless no code of the granter runs meanwhile.  So whatever
touches entries does it inside :func:`stopped`: nothing to do on the thread of the granter's engine, where hypercalls
of guests on that engine are handled; any other thread (another engine's, dom0's software) holds the granter for the few
microseconds (:mod:`pyxen.hypervisor.rendezvous`), and must hold no lock that a trap handler takes.

Locks: ``GrantTable.lock`` guards shared frames and active entries of its domain; it comes before the frame table's.
Two tables are never locked at once: the maptrack is used by its own domain only, through single atomic operations.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from pyxen.abi.grant_table import GRANTS_PER_FRAME_V1, Gntmap, Gntst, Gtf
from pyxen.abi.xen import PAGE_SHIFT, DomId, Mfn
from pyxen.errors import XenError
from pyxen.hypervisor.frames import PGT_WRITABLE
from pyxen.hypervisor.lock import TicketLock

if TYPE_CHECKING:
    from pyxen.hypervisor.domain import Domain

DEFAULT_MAX_FRAMES: Final = 32
"""max_grant_frames of 4.6: 16384 references."""
DEFAULT_MAX_MAPTRACK_FRAMES: Final = 8 * DEFAULT_MAX_FRAMES
MAPTRACK_PER_FRAME: Final = 256

# GNTPIN_*: four counts of eight bits each in Active.pin.
HSTW_INC: Final = 1 << 0
HSTR_INC: Final = 1 << 8
DEVW_INC: Final = 1 << 16
DEVR_INC: Final = 1 << 24
WRITE_PINS: Final = 0x00FF00FF
OVERFLOW_RISK: Final = 0x80808080

# As plain integers: ~ of an IntFlag keeps only the bits it knows, and these are applied to whole entries.
_READING: Final = int(Gtf.READING)
_WRITING: Final = int(Gtf.WRITING)
_READONLY: Final = int(Gtf.READONLY)
_PERMIT_ACCESS: Final = int(Gtf.PERMIT_ACCESS)
_TYPE_MASK: Final = int(Gtf.TYPE_MASK)
_SUB_PAGE: Final = int(Gtf.SUB_PAGE)

_ERRNO: Final = {
    Gntst.BAD_DOMAIN: errno.ESRCH, Gntst.PERMISSION_DENIED: errno.EPERM, Gntst.EAGAIN: errno.EAGAIN,
    Gntst.NO_DEVICE_SPACE: errno.ENOSPC, Gntst.NO_SPACE: errno.ENOSPC,
}


class GrantError(XenError):
    """One grant operation failed with ``status``. Guests get the status; dom0's software an errno (EINVAL for most)."""

    def __init__(self, status: Gntst, why: str) -> None:
        super().__init__(_ERRNO.get(status, errno.EINVAL), f"{why} ({status.name})")
        self.status = status


class Active:
    """``struct active_grant_entry``: a reference in use."""

    __slots__ = ("domid", "frame", "mfn", "pin")

    def __init__(self, domid: DomId, frame: int, mfn: Mfn) -> None:
        self.domid = domid
        """Who uses it."""
        self.frame = frame
        """The frame number as it stood in the entry."""
        self.mfn = mfn
        self.pin = 0

    @property
    def writers(self) -> int:
        """Nonzero while somebody may write to the frame."""
        return self.pin & WRITE_PINS


class MapTrack:
    """``struct grant_mapping``: what one handle stands for. ``flags`` are the GNTMAP_* still in force."""

    __slots__ = ("flags", "granter", "ref", "via_pte")

    def __init__(self, granter: Domain, ref: int, flags: int, via_pte: bool) -> None:
        self.granter = granter
        self.ref = ref
        self.flags = flags
        self.via_pte = via_pte
        """The host mapping is an entry of a page table, which holds the frame's references; else we hold them."""


class GrantTable:
    """Both sides of one domain's grant table. XenError(ENOMEM) without memory for the initial frames."""

    version = 1

    def __init__(self, domain: Domain, *, initial_frames: int = 1, max_frames: int = DEFAULT_MAX_FRAMES,
                 max_maptrack_frames: int = DEFAULT_MAX_MAPTRACK_FRAMES) -> None:
        self.domain = domain
        self.lock = TicketLock("grant table: shared frames and active entries")
        self.max_frames = max_frames
        self.max_maptrack_frames = max_maptrack_frames
        self.frames: list[int] = []
        """Shared frames (mfns); entry ``ref`` is the 64-bit word ``ref % 512`` of frame ``ref // 512``."""
        self.active: dict[int, Active] = {}
        """By reference; only those with pins."""
        self.maptrack: dict[int, MapTrack] = {}
        """By handle."""
        self._free_handles: list[int] = []
        self._next_handle = 0
        self._memory = domain.hypervisor.memory
        self._grow(initial_frames)

    # --- shared frames -------------------------------------------------------------------------------

    @property
    def nr_entries(self) -> int:
        """nr_grant_entries()."""
        return len(self.frames) * GRANTS_PER_FRAME_V1

    @property
    def maptrack_frames(self) -> int:
        """Frames that Xen would need for the handles made so far."""
        return -(-self._next_handle // MAPTRACK_PER_FRAME)

    def grow(self, nr_frames: int) -> None:
        """gnttab_grow_table(): have at least ``nr_frames`` shared frames.

        GrantError(GENERAL_ERROR): more than the maximum, or no memory.
        """
        if nr_frames > self.max_frames:
            raise GrantError(Gntst.GENERAL_ERROR, f"at most {self.max_frames} grant-table frames per domain")
        with self.lock:
            try:
                self._grow(nr_frames)
            except XenError as error:
                raise GrantError(Gntst.GENERAL_ERROR, f"grant table cannot grow to {nr_frames} frames") from error

    def _grow(self, nr_frames: int) -> None:
        while len(self.frames) < nr_frames:
            self.frames.append(self.domain.hypervisor.frames.alloc_xenheap(self.domain))

    def _word(self, ref: int) -> int:
        """Index into memory.q of entry ``ref``."""
        return (self.frames[ref // GRANTS_PER_FRAME_V1] << PAGE_SHIFT - 3) + ref % GRANTS_PER_FRAME_V1

    def entry(self, ref: int) -> tuple[Gtf, DomId, int]:
        """flags, domid and frame of entry ``ref``, which must exist."""
        word = self._memory.q[self._word(ref)]
        return Gtf(word & 0xFFFF), DomId(word >> 16 & 0xFFFF), word >> 32

    def check_ref(self, ref: int) -> None:
        """GrantError(BAD_GNTREF) for a reference beyond the table."""
        if not 0 <= ref < self.nr_entries:
            raise GrantError(Gntst.BAD_GNTREF, f"bad ref {ref:#x} for {self.domain!r}")

    # --- active entries (lock held, granter not running) ------------------------------------------------

    def _set_status(self, ref: int, mapper: DomId, *, readonly: bool, mapping: bool) -> int:
        """_set_status_v1(): mark the entry as being read or written by ``mapper``; its frame number.

        GrantError(GENERAL_ERROR): not granted to ``mapper``, not for this use, or read-only and a write is wanted.
        """
        index = self._word(ref)
        word = self._memory.q[index]
        flags, domid = word & 0xFFFF, word >> 16 & 0xFFFF
        mask = _TYPE_MASK | _SUB_PAGE if mapping else _TYPE_MASK
        if flags & mask != _PERMIT_ACCESS or domid != mapper:
            raise GrantError(Gntst.GENERAL_ERROR, f"bad flags ({flags:x}) or dom ({domid}), expected d{mapper}")
        new = flags | _READING
        if not readonly:
            if flags & _READONLY:
                raise GrantError(Gntst.GENERAL_ERROR, f"attempt to write-pin a r/o grant entry {ref:#x}")
            new |= _WRITING
        if new != flags:
            self._memory.q[index] = word & ~0xFFFF | new
        return word >> 32

    def _clear_status(self, ref: int, bits: int) -> None:
        if ref < self.nr_entries:  # the frames of a domain at its end may be gone before its last mapping
            index = self._word(ref)
            self._memory.q[index] &= ~bits

    def pin(self, ref: int, mapper: DomId, increment: int, *, readonly: bool, mapping: bool) -> Active:
        """Take one use of ``ref`` for ``mapper``: the active entry, ``increment`` added to its pin.

        GrantError: BAD_GNTREF, GENERAL_ERROR (another user, a count at its limit, the entry does not allow it),
        BAD_PAGE (its frame is not the granter's).
        """
        self.check_ref(ref)
        active = self.active.get(ref)
        if active is not None and (active.domid != mapper or active.pin & OVERFLOW_RISK):
            raise GrantError(
                Gntst.GENERAL_ERROR, f"bad domain ({active.domid} != {mapper}), or counter overflow {active.pin:08x}")
        if active is None:
            frame = self._set_status(ref, mapper, readonly=readonly, mapping=mapping)
            mfn = self._frame_to_mfn(frame, readonly)
            if self.domain.hypervisor.frames.page_owner(mfn) != self.domain.domid:
                self._clear_status(ref, _READING | _WRITING)
                raise GrantError(Gntst.BAD_PAGE, f"frame {frame:#x} is not of {self.domain!r}")
            active = self.active[ref] = Active(mapper, frame, Mfn(mfn))
        elif not readonly and not active.pin & WRITE_PINS:
            self._set_status(ref, mapper, readonly=False, mapping=mapping)
        active.pin += increment
        return active

    def _frame_to_mfn(self, frame: int, readonly: bool) -> int:
        """get_paged_frame(): the machine frame that an entry's frame number means; -1 for none that may be granted so.
        """
        if not self.domain.is_hvm:
            return frame
        p2m = self.domain.hvm.p2m
        mfn = p2m.gfn_to_mfn(frame) if readonly else p2m.writable_mfn(frame)
        return -1 if mfn is None else mfn

    def unpin(self, ref: int, decrement: int) -> None:
        """Give a use back: the status bits follow the counts, the active entry goes with the last one."""
        active = self.active[ref]
        assert active.pin >= decrement
        active.pin -= decrement
        if not active.pin:
            del self.active[ref]
            self._clear_status(ref, _READING | _WRITING)
        elif not active.pin & WRITE_PINS:
            self._clear_status(ref, _WRITING)
        if decrement & WRITE_PINS and not active.pin & WRITE_PINS and self.domain.log_dirty is not None:
            self.domain.log_dirty.mark_frames(active.mfn)  # its last writes; while it is mapped it is dirty anyway

    def swap(self, a: int, b: int) -> None:
        """GNTTABOP_swap_grant_ref. GrantError: BAD_GNTREF, EAGAIN when either is in use."""
        with self.lock:
            self.check_ref(a)
            self.check_ref(b)
            if a == b:
                return
            if a in self.active or b in self.active:
                raise GrantError(Gntst.EAGAIN, "grant entry is in use")
            q, i, j = self._memory.q, self._word(a), self._word(b)
            q[i], q[j] = q[j], q[i]

    # --- maptrack (the mapper's side) ----------------------------------------------------------------------

    def get_handle(self) -> int:
        """get_maptrack_handle(). GrantError(NO_DEVICE_SPACE) when all are in use."""
        try:
            return self._free_handles.pop()
        except IndexError:
            if self._next_handle >= self.max_maptrack_frames * MAPTRACK_PER_FRAME:
                raise GrantError(Gntst.NO_DEVICE_SPACE, "failed to obtain maptrack handle") from None
        self._next_handle += 1
        return self._next_handle - 1

    def put_handle(self, handle: int) -> None:
        """put_maptrack_handle()."""
        self.maptrack.pop(handle, None)
        self._free_handles.append(handle)

    def get_frame(self, mfn: Mfn, *, readonly: bool) -> None:
        """The references that one mapping of a frame of this domain holds. GrantError(GENERAL_ERROR)."""
        frames, domain = self.domain.hypervisor.frames, self.domain
        if not (frames.get_page(mfn, domain) if readonly else frames.get_page_and_type(mfn, domain, PGT_WRITABLE)):
            raise GrantError(Gntst.GENERAL_ERROR, f"could not pin grant frame {mfn:#x}")

    def put_frame(self, mfn: Mfn, *, readonly: bool) -> None:
        """Drop what :meth:`get_frame` took."""
        frames = self.domain.hypervisor.frames
        if readonly:
            frames.put_page(mfn)
        else:
            frames.put_page_and_type(mfn)

    # --- end -------------------------------------------------------------------------------------------------

    def release_mappings(self, budget: int = 64) -> bool:
        """gnttab_release_mappings(): drop what this dying domain holds of others, at most ``budget`` handles a call.

        True when none are left. To be called before its page tables go: PTEs keep and later drop their own references.
        """
        for handle, track in list(self.maptrack.items())[:budget]:
            with stopped(track.granter):
                track.granter.grant_table.release(track)
            self.put_handle(handle)
        return not self.maptrack

    def release(self, track: MapTrack) -> None:
        """The granter's half of that: pins, and references that no PTE holds."""
        readonly = bool(track.flags & Gntmap.READONLY)
        with self.lock:
            mfn = self.active[track.ref].mfn
            if track.flags & Gntmap.DEVICE_MAP:
                self.put_frame(mfn, readonly=readonly)
                self.unpin(track.ref, DEVR_INC if readonly else DEVW_INC)
            if track.flags & Gntmap.HOST_MAP:
                # A translated mapper's p2m entry holds nothing, and goes with the mapper.
                if not track.via_pte:
                    self.put_frame(mfn, readonly=readonly)
                self.unpin(track.ref, HSTR_INC if readonly else HSTW_INC)
            track.flags = 0

    def destroy(self) -> None:
        """grant_table_destroy(): the domain is gone; its shared frames go. What others still map stays referenced."""
        with self.lock:
            frames, self.frames = self.frames, []
            for mfn in frames:
                self.domain.hypervisor.frames.free_xenheap(mfn)


@contextmanager
def stopped(granter: Domain) -> Iterator[None]:
    """No code of ``granter`` runs inside ``with`` (see the head of this module). The caller holds no lock."""
    if granter.evtchn.home_thread == threading.get_ident():
        yield
        return
    with granter.hypervisor.rendezvous.holding(granter):
        yield
