# SPDX-License-Identifier: GPL-2.0-only
"""HYPERVISOR_mmu_update (Xen: xen/arch/x86/mm.c, do_mmu_update; xen/include/public/xen.h describes the request).

The hottest hypercall of a PV guest: requests are read and decoded many at a time, and an L1 update costs a few
microseconds.  A continuation is encoded as Xen's is: the remaining requests, MMU_UPDATE_PREEMPTED in the count,
progress in ``*pdone``; with no requests left but work to finish, a null pointer and the result in place of
``foreigndom``.
"""

from __future__ import annotations

import errno
import struct
from functools import cache
from typing import TYPE_CHECKING, Final

from pyxen.abi.xen import (
    DOMID_IO,
    DOMID_SELF,
    MASK64,
    MMU_MACHPHYS_UPDATE,
    MMU_NORMAL_PT_UPDATE,
    MMU_PT_UPDATE_PRESERVE_AD,
    MMU_UPDATE,
    MMU_UPDATE_PREEMPTED,
)
from pyxen.errors import GuestAccessError, XenError
from pyxen.hypervisor.frames_types import ERESTART, OWNED, PGT_L1, PGT_TYPE_MASK
from pyxen.hypervisor.hypercall import Preempted
from pyxen.hypervisor.x86.pv.mm_entry import mod_entry
from pyxen.hypervisor.x86.pv.mm_flags import PAGE_PRESENT, PAGE_RW
from pyxen.hypervisor.x86.pv.mm_root import get_pg_owner

if TYPE_CHECKING:
    from pyxen.hypervisor.domain import Domain
    from pyxen.hypervisor.frames import FrameTable
    from pyxen.hypervisor.hypercall import Caller

# XSM_MMU_* (xen/include/xsm/xsm.h)
XSM_MMU_UPDATE_READ: Final = 1
XSM_MMU_UPDATE_WRITE: Final = 2
XSM_MMU_NORMAL_UPDATE: Final = 4
XSM_MMU_MACHPHYS_UPDATE: Final = 8

BATCH: Final = 128
_CHECK_EVERY: Final = 64


@cache
def _words(count: int) -> struct.Struct:
    return struct.Struct(f"<{2 * count}Q")


def signed32(value: int) -> int:
    """An argument that carries an ``int``."""
    return ((value & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000


def table_owner(current: Domain, foreigndom: int) -> Domain:
    """The domain named in the upper half of ``foreigndom`` (PFD): 0 is the caller, else domid + 1. XenError(EINVAL)."""
    pfd = foreigndom >> 16 & 0xFFFF
    if not pfd or pfd - 1 == current.domid:
        return current
    try:
        owner = current.hypervisor.domain(pfd - 1)
    except XenError as error:
        raise XenError(errno.EINVAL) from error
    if not owner.vcpus:
        raise XenError(errno.EINVAL)
    return owner


def read_batch(caller: Caller, at: int, count: int, unit: int) -> bytes:
    """Up to ``count`` records of ``unit`` bytes; fewer if only fewer can be read. GuestAccessError if not even one
    can."""
    try:
        return caller.read(at, count * unit)
    except GuestAccessError:
        if count == 1:
            raise
        return caller.read(at, unit)


def add_done(caller: Caller, pdone: int, before: int, done: int) -> None:
    """Report progress in ``*pdone``; Xen does not mind if that cannot be written."""
    if pdone:
        try:
            caller.write_u32(pdone, (before + done) & 0xFFFFFFFF)
        except GuestAccessError:
            pass


def start(caller: Caller, ureqs: int, count: int, pdone: int, unit: int) -> tuple[int, int]:
    """Undo the encoding of a continuation: (number of requests, how many were done before). GuestAccessError for a
    range that is no address range at all."""
    before = 0
    if count & MMU_UPDATE_PREEMPTED:
        count &= ~MMU_UPDATE_PREEMPTED
        if pdone:
            try:
                before = caller.read_u32(pdone)
            except GuestAccessError:
                pass
    if ureqs + count * unit > MASK64 + 1:
        raise GuestAccessError(ureqs)
    return count, before


def do_mmu_update(caller: Caller, ureqs: int, count: int, pdone: int, foreigndom: int) -> int:
    """HYPERVISOR_mmu_update(reqs, count, done_out, foreigndom): 0 or -errno. Raises Preempted."""
    current = caller.domain
    frames = current.hypervisor.frames
    count &= 0xFFFFFFFF
    foreigndom &= 0xFFFFFFFF
    frames.lock.acquire()
    try:
        frames.start_budget()
        if frames.deferred and not frames.put_deferred(current.domid):
            raise Preempted((ureqs, count, pdone, foreigndom))
        if count == MMU_UPDATE_PREEMPTED and not ureqs:
            return signed32(foreigndom)
        count, before = start(caller, ureqs, count, pdone, 16)
        pt_owner = pg_owner = current
        if foreigndom != DOMID_SELF:
            pt_owner = table_owner(current, foreigndom)
            pg_owner = get_pg_owner(current, foreigndom & 0xFFFF)
        if count == 1 and pg_owner is current and not before and _single(caller, current, frames, ureqs):
            done, rc = 1, 0
        else:
            done, rc = _Run(caller, pt_owner, pg_owner).requests(ureqs, count)
        if pdone:
            add_done(caller, pdone, before, done)
        if rc == -ERESTART:
            raise Preempted((ureqs + 16 * done, (count - done) | MMU_UPDATE_PREEMPTED, pdone, foreigndom))
        if frames.deferred and not frames.put_deferred(pt_owner.domid) and pt_owner is current:
            raise Preempted((0, MMU_UPDATE_PREEMPTED, 0, rc & 0xFFFFFFFF))
        return rc
    finally:
        frames.release()


def _single(caller: Caller, current: Domain, frames: FrameTable, ureqs: int) -> bool:
    """Half of a Linux guest's calls: one update of a table of its own. False if it is anything else, or fails: then
    nothing
    has happened, and the long way says what is wrong."""
    try:
        pointer, value = MMU_UPDATE.unpack(caller.read(ureqs, 16))
    except GuestAccessError:
        return False
    command = pointer & 7
    mfn = pointer >> 12
    if command & ~MMU_PT_UPDATE_PRESERVE_AD or mfn >= frames.nr_frames or frames.owner[mfn] != current.domid | OWNED:
        return False
    needed = XSM_MMU_NORMAL_UPDATE
    if value & PAGE_PRESENT:
        needed |= XSM_MMU_UPDATE_READ | (value & PAGE_RW)
    current.hypervisor.xsm.mmu_update(current, current, current, needed)
    return mod_entry(frames, pointer >> 3, value, current, current, command != MMU_NORMAL_PT_UPDATE) == 0


class _Run:
    """One call's requests; remembers which kinds of update XSM has allowed."""

    def __init__(self, caller: Caller, pt_owner: Domain, pg_owner: Domain) -> None:
        self.caller = caller
        self.current = caller.domain
        self.pt_owner = pt_owner
        self.pg_owner = pg_owner
        self.frames = self.current.hypervisor.frames
        self.allowed = 0

    def _allow(self, needed: int) -> None:
        needed |= self.allowed
        foreign = None if self.pg_owner.domid == DOMID_IO else self.pg_owner  # XSM checks nothing about DOMID_IO here
        self.current.hypervisor.xsm.mmu_update(self.current, self.pt_owner, foreign, needed)
        self.allowed = needed

    def requests(self, ureqs: int, count: int) -> tuple[int, int]:
        """Carry out up to ``count`` requests: (how many were, 0 or -errno or -ERESTART)."""
        done = 0
        try:
            while done < count:
                if done and self.frames.preempt():
                    return done, -ERESTART
                data = read_batch(self.caller, ureqs + 16 * done, min(BATCH, count - done), 16)
                batch = len(data) >> 4
                did, rc = self._batch(_words(batch).unpack(data), batch)
                done += did
                if rc:
                    return done, rc
        except XenError as error:
            return done, -error.errno
        return done, 0

    def _batch(self, words: tuple[int, ...], batch: int) -> tuple[int, int]:
        frames, pt_owner, pg_owner = self.frames, self.pt_owner, self.pg_owner
        owners, types, nr_frames = frames.owner, frames.type_info, frames.nr_frames
        deferred = frames.deferred
        pt_word = pt_owner.domid | OWNED
        check = _CHECK_EVERY
        rc = 0
        for i in range(batch):
            pointer, value = words[2 * i], words[2 * i + 1]
            command = pointer & 7
            try:
                if not command & ~MMU_PT_UPDATE_PRESERVE_AD:  # that, or MMU_NORMAL_PT_UPDATE
                    needed = XSM_MMU_NORMAL_UPDATE
                    if value & PAGE_PRESENT:
                        needed |= XSM_MMU_UPDATE_READ | (value & PAGE_RW)
                    if needed & ~self.allowed:
                        self._allow(needed)
                    mfn = pointer >> 12
                    if mfn >= nr_frames or owners[mfn] != pt_word:
                        return i, -errno.EINVAL
                    rc = mod_entry(frames, pointer >> 3, value, pt_owner, pg_owner, command != MMU_NORMAL_PT_UPDATE)
                    if rc:
                        return i, rc
                    if types[mfn] & PGT_TYPE_MASK != PGT_L1:
                        check = 0
                elif command == MMU_MACHPHYS_UPDATE:
                    rc = self._machphys(pointer, value)
                    if rc:
                        return i, rc
                else:
                    return i, -errno.ENOSYS
            except XenError as error:
                return i, -error.errno
            if deferred and i + 1 < batch and not frames.put_deferred(pt_owner.domid):
                return i + 1, -ERESTART
            check -= 1
            if check <= 0:
                check = _CHECK_EVERY
                if i + 1 < batch and frames.preempt():
                    return i + 1, -ERESTART
        return batch, 0

    def _machphys(self, pointer: int, gpfn: int) -> int:
        if self.current is not self.pt_owner:
            return -errno.EPERM
        if not self.allowed & XSM_MMU_MACHPHYS_UPDATE:
            self._allow(XSM_MMU_MACHPHYS_UPDATE)
        frames = self.frames
        mfn = pointer >> 12
        if mfn >= frames.nr_frames or frames.owner[mfn] != self.pg_owner.domid | OWNED:
            return -errno.EINVAL
        frames.set_gpfn(mfn, gpfn)
        return 0
