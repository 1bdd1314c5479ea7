# SPDX-License-Identifier: GPL-2.0-only
"""HYPERVISOR_update_va_mapping and _otherdomain (Xen: xen/arch/x86/mm.c), and TLB flushes as guests ask for them."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from pyxen.abi.xen import UVMF_ALL, UVMF_FLUSHTYPE_MASK, UVMF_INVLPG, UVMF_LOCAL, UVMF_TLB_FLUSH
from pyxen.errors import XenError
from pyxen.hypervisor.frames_types import COUNT_MASK, OWNED, PGT_L1, PGT_TYPE_MASK, PGT_VALIDATED
from pyxen.hypervisor.x86.pv.mm_entry import mod_l1_entry
from pyxen.hypervisor.x86.pv.mm_root import get_pg_owner
from pyxen.hypervisor.x86.pv.walk import guest_l1e

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pyxen.hypervisor.domain import Domain
    from pyxen.hypervisor.frames import FrameTable
    from pyxen.hypervisor.hypercall import Caller
    from pyxen.hypervisor.vcpu import Vcpu

_L1_IN_USE = PGT_L1 | PGT_VALIDATED


def writable_l1e(frames: FrameTable, domain: Domain, at: int) -> bool:
    """Is word ``at`` of ``memory.q`` an entry of a validated L1 table of ``domain``? Lock held."""
    mfn = at >> 9
    if mfn >= frames.nr_frames or frames.owner[mfn] != domain.domid | OWNED:
        return False
    info = frames.type_info[mfn]
    return info & (PGT_TYPE_MASK | PGT_VALIDATED) == _L1_IN_USE and bool(info & COUNT_MASK)


def flush_tlb(domain: Domain, vcpus: Sequence[Vcpu]) -> None:
    """Flush all translations of these vCPUs of ``domain``."""
    for vcpu in vcpus:
        vcpu.pv.flush_tlb()
    if len(vcpus) == len(domain.vcpus):
        domain.hypervisor.frames.flushed(domain)


def flush_tlb_one(vcpus: Sequence[Vcpu], va: int) -> None:
    """Flush one page in these vCPUs."""
    for vcpu in vcpus:
        vcpu.pv.flush_tlb_page(va)


def vcpus_of_mask(caller: Caller, bitmap: int) -> list[Vcpu]:
    """vcpumask_to_pcpumask(): the vCPUs in a guest's bitmap of 64-bit words. GuestAccessError."""
    domain = caller.domain
    chosen: list[Vcpu] = []
    for first in range(0, domain.max_vcpus, 64):
        word = caller.read_u64(bitmap + first // 8)
        while word:
            bit = (word & -word).bit_length() - 1
            word &= word - 1
            if first + bit < len(domain.vcpus):
                chosen.append(domain.vcpus[first + bit])
    return chosen


def do_update_va_mapping(caller: Caller, va: int, value: int, flags: int) -> int:
    """HYPERVISOR_update_va_mapping(va, val, flags): 0 or -errno; the flush happens either way."""
    return _update(caller, va, value, flags, caller.domain)


def do_update_va_mapping_otherdomain(caller: Caller, va: int, value: int, flags: int, domid: int) -> int:
    """HYPERVISOR_update_va_mapping_otherdomain(va, val, flags, domid): the frame is ``domid``'s."""
    return _update(caller, va, value, flags, get_pg_owner(caller.domain, domid & 0xFFFF))


def _update(caller: Caller, va: int, value: int, flags: int, pg_owner: Domain) -> int:
    vcpu, domain = caller.vcpu, caller.domain
    if vcpu is None:
        raise XenError(errno.EINVAL)  # dom0's software has no linear addresses of this kind
    hypervisor = domain.hypervisor
    hypervisor.xsm.update_va_mapping(domain, pg_owner)
    frames, pv = hypervisor.frames, vcpu.pv
    frames.lock.acquire()
    try:
        rc = -errno.EINVAL
        root = pv.guest_table if pv.kernel_mode else pv.guest_table_user
        at = guest_l1e(frames.memory, root, va)
        if at is not None and writable_l1e(frames, domain, at):
            rc = mod_l1_entry(frames, at, value, domain, pg_owner, False)
    finally:
        frames.release()
    kind = flags & UVMF_FLUSHTYPE_MASK
    if kind:
        target = flags & ~UVMF_FLUSHTYPE_MASK
        if target == UVMF_LOCAL:
            vcpus: Sequence[Vcpu] = (vcpu,)
        elif target == UVMF_ALL:
            vcpus = domain.vcpus
        else:
            vcpus = vcpus_of_mask(caller, target)
        if kind == UVMF_TLB_FLUSH:
            flush_tlb(domain, vcpus)
        elif kind == UVMF_INVLPG:
            flush_tlb_one(vcpus, va)
    return rc
