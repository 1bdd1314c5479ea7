# SPDX-License-Identifier: GPL-2.0-only
"""HYPERVISOR_mmuext_op (Xen: xen/arch/x86/mm.c, do_mmuext_op)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from pyxen.abi.xen import MASK64, MMU_UPDATE_PREEMPTED, MMUEXT_OP, MmuextCmd
from pyxen.errors import XenError
from pyxen.hypervisor.frames_types import ERESTART, OWNED, PGT_L1, PGT_PINNED, PGT_WRITABLE
from pyxen.hypervisor.hypercall import Preempted
from pyxen.hypervisor.x86.pv.mm_root import get_pg_owner, switch_guest_table, switch_guest_table_user
from pyxen.hypervisor.x86.pv.mm_va import flush_tlb, flush_tlb_one, vcpus_of_mask
from pyxen.hypervisor.x86.pv.mmu_update import add_done, read_batch, signed32, start

if TYPE_CHECKING:
    from collections.abc import Callable

    from pyxen.hypervisor.domain import Domain
    from pyxen.hypervisor.frames import FrameTable
    from pyxen.hypervisor.hypercall import Caller
    from pyxen.hypervisor.vcpu import Vcpu
    from pyxen.hypervisor.x86.pv.vcpu import PvVcpu

_SIZE: Final = MMUEXT_OP.size
_BATCH: Final = 64
_MAX_LDT_ENTRIES: Final = 8192
_CANONICAL_LOW: Final = 1 << 47
_GUEST_HIGH: Final = 0xFFFF880000000000


def _addr_ok(va: int) -> bool:
    """__addr_ok(): canonical, and not in Xen's part of the address space."""
    return va < _CANONICAL_LOW or _GUEST_HIGH <= va <= MASK64


def do_mmuext_op(caller: Caller, uops: int, count: int, pdone: int, foreigndom: int) -> int:
    """HYPERVISOR_mmuext_op(ops, count, done_out, foreigndom): 0 or -errno. Raises Preempted (see mmu_update)."""
    current = caller.domain
    hypervisor = current.hypervisor
    frames = hypervisor.frames
    count &= 0xFFFFFFFF
    foreigndom &= 0xFFFFFFFF
    frames.lock.acquire()
    try:
        frames.start_budget()
        if not frames.put_deferred(current.domid):
            raise Preempted((uops, count, pdone, foreigndom))
        if count == MMU_UPDATE_PREEMPTED and not uops:
            return signed32(foreigndom)
        count, before = start(caller, uops, count, pdone, _SIZE)
        pg_owner = get_pg_owner(current, foreigndom & 0xFFFF)
        hypervisor.xsm.mmuext_op(current, pg_owner)
        done, rc = _Run(caller, pg_owner).operations(uops, count)
        add_done(caller, pdone, before, done)
        if rc == -ERESTART:
            raise Preempted((uops + _SIZE * done, (count - done) | MMU_UPDATE_PREEMPTED, pdone, foreigndom))
        if frames.deferred and not frames.put_deferred(pg_owner.domid) and pg_owner is current:
            raise Preempted((0, MMU_UPDATE_PREEMPTED, 0, rc & 0xFFFFFFFF))
        return rc
    finally:
        frames.release()


class _Run:
    """The operations of one call."""

    def __init__(self, caller: Caller, pg_owner: Domain) -> None:
        self.caller = caller
        self.current = caller.domain
        self.pg_owner = pg_owner
        self.frames: FrameTable = self.current.hypervisor.frames

    def operations(self, uops: int, count: int) -> tuple[int, int]:
        """Carry out up to ``count`` operations: (how many were, 0 or -errno or -ERESTART)."""
        frames, deferred, domid = self.frames, self.frames.deferred, self.pg_owner.domid
        done = 0
        try:
            while done < count:
                data = read_batch(self.caller, uops + _SIZE * done, min(_BATCH, count - done), _SIZE)
                for command, arg1, arg2 in MMUEXT_OP.iter_unpack(data):
                    if deferred and not frames.put_deferred(domid):
                        return done, -ERESTART
                    if done and frames.preempt():
                        return done, -ERESTART
                    rc = self._one(command, arg1, arg2)
                    if rc:
                        return done, rc
                    done += 1
        except XenError as error:
            return done, -error.errno
        return done, 0

    def _one(self, command: int, arg1: int, arg2: int) -> int:
        if command <= MmuextCmd.PIN_L4_TABLE:
            return self._pin(arg1, PGT_L1 * (command + 1))
        operation = _OPERATIONS.get(command)
        return -errno.ENOSYS if operation is None else operation(self, arg1, arg2)

    def _self(self) -> PvVcpu:
        """The calling vCPU, for what only a guest can do to itself. XenError(EPERM) with a foreign domain."""
        if self.current is not self.pg_owner:
            raise XenError(errno.EPERM)
        return self._vcpu().pv

    def _vcpu(self) -> Vcpu:
        vcpu = self.caller.vcpu
        if vcpu is None:
            raise XenError(errno.EINVAL)  # dom0's software runs on no vCPU
        return vcpu

    # --- pinning ----------------------------------------------------------------------------------

    def _pin(self, mfn: int, page_type: int) -> int:
        frames, domid = self.frames, self.pg_owner.domid
        if self.pg_owner.dying:
            return -errno.EINVAL  # its end would have to undo this at once
        rc = frames.get_root(mfn, domid, page_type)
        if rc:
            return rc
        if frames.type_info[mfn] & PGT_PINNED:
            frames.put_root(mfn)
            return -errno.EINVAL
        frames.type_info[mfn] |= PGT_PINNED
        frames.pinned.setdefault(domid, set()).add(mfn)
        return 0

    def _unpin(self, mfn: int, _arg2: int) -> int:
        frames = self.frames
        if mfn >= frames.nr_frames or frames.owner[mfn] != self.pg_owner.domid | OWNED:
            return -errno.EINVAL
        if not frames.type_info[mfn] & PGT_PINNED:
            return -errno.EINVAL
        frames.type_info[mfn] &= ~PGT_PINNED
        frames.pinned.get(self.pg_owner.domid, set()).discard(mfn)
        frames.put_root(mfn)
        return 0

    # --- roots ------------------------------------------------------------------------------------

    def _new_baseptr(self, mfn: int, _arg2: int) -> int:
        return switch_guest_table(self._self(), mfn)

    def _new_user_baseptr(self, mfn: int, _arg2: int) -> int:
        return switch_guest_table_user(self._self(), mfn)

    # --- TLB and caches ---------------------------------------------------------------------------

    def _tlb_flush_local(self, _arg1: int, _arg2: int) -> int:
        flush_tlb(self.current, (self._self().vcpu,))
        return 0

    def _invlpg_local(self, va: int, _arg2: int) -> int:
        pv = self._self()
        if _addr_ok(va):
            pv.flush_tlb_page(va)
        return 0

    def _mask(self, bitmap: int) -> list[Vcpu]:
        self._self()
        try:
            return vcpus_of_mask(self.caller, bitmap)
        except XenError as error:
            raise XenError(errno.EINVAL) from error

    def _tlb_flush_multi(self, _arg1: int, bitmap: int) -> int:
        flush_tlb(self.current, self._mask(bitmap))
        return 0

    def _invlpg_multi(self, va: int, bitmap: int) -> int:
        vcpus = self._mask(bitmap)
        if _addr_ok(va):
            flush_tlb_one(vcpus, va)
        return 0

    def _tlb_flush_all(self, _arg1: int, _arg2: int) -> int:
        self._self()
        flush_tlb(self.current, self.current.vcpus)
        return 0

    def _invlpg_all(self, va: int, _arg2: int) -> int:
        self._self()
        if _addr_ok(va):
            flush_tlb_one(self.current.vcpus, va)
        return 0

    def _flush_cache(self, _arg1: int, _arg2: int) -> int:
        """cache_flush_permitted(): only who may map I/O memory. There is no cache to flush then either."""
        self._self()
        return 0 if self.current.is_privileged else -errno.EACCES

    def _flush_cache_global(self, _arg1: int, _arg2: int) -> int:
        self._self()
        return 0 if self.current.is_privileged else -errno.EINVAL

    # --- the rest ---------------------------------------------------------------------------------

    def _set_ldt(self, base: int, entries: int) -> int:
        from pyxen.hypervisor.x86.pv import ldt

        pv = self._self()
        entries &= 0xFFFFFFFF
        base = base if entries else 0
        if base & 0xFFF or not _addr_ok(base) or entries > _MAX_LDT_ENTRIES:
            return -errno.EINVAL
        ldt.set_ldt(pv, base, entries)
        return 0

    def _data_page(self, mfn: int) -> bool:
        """A writable reference for a moment: the page is not in use as anything else."""
        return not self.frames.get_and_type(mfn, self.pg_owner.domid, PGT_WRITABLE)

    def _wrote(self, mfn: int) -> None:
        self.frames.memory.written(mfn)
        self.frames.mark_dirty(mfn)
        self.frames.put_type(mfn)
        self.frames.put(mfn)

    def _clear_page(self, mfn: int, _arg2: int) -> int:
        if not self._data_page(mfn):
            return -errno.EINVAL
        self.frames.memory.zero(mfn)
        self._wrote(mfn)
        return 0

    def _copy_page(self, mfn: int, source: int) -> int:
        frames = self.frames
        if not frames.get(source, self.pg_owner.domid):
            return -errno.EINVAL
        copied = self._data_page(mfn)
        if copied:
            data = frames.memory.b
            data[mfn << 12 : (mfn + 1) << 12] = data[source << 12 : (source + 1) << 12]
            self._wrote(mfn)
        frames.put(source)
        return 0 if copied else -errno.EINVAL

    def _superpage(self, mfn: int, _arg2: int) -> int:
        """MMUEXT_(UN)MARK_SUPER without ``allowsuperpage``."""
        if self.current is not self.pg_owner:
            return -errno.EPERM
        if mfn & 511:
            return -errno.EINVAL
        return -errno.ENOSYS


_OPERATIONS: Final[dict[int, Callable[[_Run, int, int], int]]] = {
    MmuextCmd.UNPIN_TABLE: _Run._unpin,
    MmuextCmd.NEW_BASEPTR: _Run._new_baseptr,
    MmuextCmd.NEW_USER_BASEPTR: _Run._new_user_baseptr,
    MmuextCmd.TLB_FLUSH_LOCAL: _Run._tlb_flush_local,
    MmuextCmd.INVLPG_LOCAL: _Run._invlpg_local,
    MmuextCmd.TLB_FLUSH_MULTI: _Run._tlb_flush_multi,
    MmuextCmd.INVLPG_MULTI: _Run._invlpg_multi,
    MmuextCmd.TLB_FLUSH_ALL: _Run._tlb_flush_all,
    MmuextCmd.INVLPG_ALL: _Run._invlpg_all,
    MmuextCmd.FLUSH_CACHE: _Run._flush_cache,
    MmuextCmd.FLUSH_CACHE_GLOBAL: _Run._flush_cache_global,
    MmuextCmd.SET_LDT: _Run._set_ldt,
    MmuextCmd.CLEAR_PAGE: _Run._clear_page,
    MmuextCmd.COPY_PAGE: _Run._copy_page,
    MmuextCmd.MARK_SUPER: _Run._superpage,
    MmuextCmd.UNMARK_SUPER: _Run._superpage,
}
