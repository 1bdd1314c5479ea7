# SPDX-License-Identifier: GPL-2.0-only
"""Grant mappings in a PV guest's page tables (Xen: xen/arch/x86/mm.c, create_grant_host_mapping and
replace_grant_host_mapping; later pv/grant_table.c).

A grant is mapped by storing an L1 entry.  The references that the entry stands for (one to the granted frame, and one
as writable data unless it is read-only) are the grant table's to take before and to put after: they belong to the
entry while it stands, so a guest that overwrites it without unmapping drops them, and the grant stays in use without
harm.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pyxen.hypervisor.x86.pv.mm_flags import (
    ADDRESS_MASK,
    PAGE_ACCESSED,
    PAGE_DIRTY,
    PAGE_GUEST_KERNEL,
    PAGE_NX,
    PAGE_PRESENT,
    PAGE_RW,
    PAGE_USER,
)
from pyxen.hypervisor.x86.pv.mm_va import writable_l1e
from pyxen.hypervisor.x86.pv.walk import guest_l1e

if TYPE_CHECKING:
    from pyxen.hypervisor.vcpu import Vcpu

# GNTMAP_* and GNTST_* (xen/include/public/grant_table.h)
GNTMAP_READONLY: Final = 1 << 2
GNTMAP_APPLICATION_MAP: Final = 1 << 3
GNTMAP_CONTAINS_PTE: Final = 1 << 4
_GNTMAP_GUEST_AVAIL0: Final = 16
_PAGE_AVAIL_SHIFT: Final = 9
GNTST_OKAY: Final = 0
GNTST_GENERAL_ERROR: Final = -1


def grant_pte_flags(vcpu: Vcpu, flags: int) -> int:
    """grant_to_pte_flags(), and what adjust_guest_l1e() makes of them."""
    bits = PAGE_PRESENT | PAGE_ACCESSED | PAGE_DIRTY | PAGE_NX
    bits |= (flags >> _GNTMAP_GUEST_AVAIL0 & 7) << _PAGE_AVAIL_SHIFT
    if not flags & GNTMAP_READONLY:
        bits |= PAGE_RW
    if flags & GNTMAP_APPLICATION_MAP:
        bits |= PAGE_USER
    elif vcpu.domain.pv.mode == "exact":
        bits |= PAGE_USER | PAGE_GUEST_KERNEL
    return bits


def _entry(vcpu: Vcpu, address: int, flags: int) -> int | None:
    """Index into ``memory.q`` of the L1 entry that ``address`` means: its machine address or a linear address it
    maps."""
    frames = vcpu.domain.hypervisor.frames
    at: int | None
    if flags & GNTMAP_CONTAINS_PTE:
        at = None if address & 7 else address >> 3
    else:
        pv = vcpu.pv
        at = guest_l1e(frames.memory, pv.guest_table if pv.kernel_mode else pv.guest_table_user, address)
    return at if at is not None and writable_l1e(frames, vcpu.domain, at) else None


def create_grant_pv_mapping(vcpu: Vcpu, address: int, frame: int, flags: int) -> int:
    """create_grant_host_mapping(): map ``frame`` at ``address`` (see GNTMAP_contains_pte) with the rights in ``flags``.

    GNTST_okay or GNTST_general_error.  The caller holds the references that the entry needs, and gives them to it on
    success.  Whatever was mapped there before is put.
    """
    frames = vcpu.domain.hypervisor.frames
    frames.lock.acquire()
    try:
        at = _entry(vcpu, address, flags)
        if at is None:
            return GNTST_GENERAL_ERROR
        old = frames.memory.q[at]
        frames.memory.q[at] = frame << 12 | grant_pte_flags(vcpu, flags)
        frames.tables.put_page_from_l1e(old, vcpu.domain)
        return GNTST_OKAY
    finally:
        frames.release()


def replace_grant_pv_mapping(vcpu: Vcpu, address: int, frame: int, new_address: int, flags: int) -> int:
    """replace_grant_host_mapping(): take the mapping of ``frame`` at ``address`` away.

    With ``new_address`` (GNTTABOP_unmap_and_replace; a linear address) the entry there moves to ``address``, references
    and all, and leaves nothing behind.  GNTST_okay: the references of the removed entry are the caller's again, who
    flushes the TLB before putting them.  GNTST_general_error: ``address`` does not map ``frame`` with these rights;
    nothing changed.
    """
    frames = vcpu.domain.hypervisor.frames
    q = frames.memory.q
    frames.lock.acquire()
    try:
        if flags & GNTMAP_CONTAINS_PTE and new_address:
            return GNTST_GENERAL_ERROR
        at = _entry(vcpu, address, flags)
        if at is None:
            return GNTST_GENERAL_ERROR
        old = q[at]
        if (old & ADDRESS_MASK) >> 12 != frame or (old ^ grant_pte_flags(vcpu, flags)) & (PAGE_PRESENT | PAGE_RW):
            return GNTST_GENERAL_ERROR
        new = 0
        if new_address:
            source = _entry(vcpu, new_address, 0)
            if source is None or source == at:
                return GNTST_GENERAL_ERROR
            new = q[source]
            q[source] = 0
        q[at] = new
        return GNTST_OKAY
    finally:
        frames.release()
