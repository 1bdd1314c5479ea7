# SPDX-License-Identifier: GPL-2.0-only
"""The LDT window: pages of a guest's LDT are typed and mapped when the CPU first looks into them (Xen:
map_ldt_shadow_page)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from pyxen.errors import GuestAccessError, XenError
from pyxen.hypervisor.frames import PGT_SEG_DESC
from pyxen.hypervisor.x86.pv.descriptors import MAX_LDT_ENTRIES
from pyxen.hypervisor.x86.pv.slots import ldt_va
from pyxen.hypervisor.x86.pv.walk import guest_walk

if TYPE_CHECKING:
    from pyxen.hypervisor.x86.pv.vcpu import PvVcpu

_LDT_SELECTOR: Final = 0xE048


def set_ldt(pv: PvVcpu, base: int, entries: int) -> None:
    """MMUEXT_SET_LDT: at most 8192 entries, page-aligned, in the guest's own range. Raises XenError(EINVAL)."""
    if entries > MAX_LDT_ENTRIES or base & 0xFFF or (entries and not pv.guest_address_ok(base, entries * 8)):
        raise XenError(errno.EINVAL)
    if (base, entries) == (pv.ldt_base, pv.ldt_ents) and entries == 0:
        return
    invalidate(pv)
    pv.ldt_base, pv.ldt_ents = base, entries
    load(pv)


def load(pv: PvVcpu) -> None:
    """load_LDT: point the CPU at the window, or at nothing."""
    if pv.cpu is None:
        return
    if pv.ldt_ents:
        pv.cpu.set_ldt(_LDT_SELECTOR, ldt_va(pv.vcpu.vcpu_id), pv.ldt_ents * 8 - 1)
    else:
        pv.cpu.set_ldt(0, 0, 0)


def invalidate(pv: PvVcpu) -> None:
    """invalidate_shadow_ldt: unmap the window's pages and drop their type references."""
    if not pv.ldt_frames:
        return
    area, frames = pv.domain.pv.area, pv.hypervisor.frames
    for page in pv.ldt_frames:
        area.set_ldt_page(pv.vcpu.vcpu_id, page, None)
    pv.flush_tlb()
    for mfn in pv.ldt_frames.values():
        frames.put_page_and_type(mfn)
    pv.ldt_frames.clear()
    pv.user_segments.clear()


def handle_fault(pv: PvVcpu, va: int) -> bool:
    """A #PF of the CPU's own access to the window: map the page. False if ``va`` is elsewhere or the guest has no
    such page."""
    window = ldt_va(pv.vcpu.vcpu_id)
    offset = va - window
    if not 0 <= offset < pv.ldt_ents * 8 or not pv.ldt_ents:
        return False
    page = offset >> 12
    if page in pv.ldt_frames:
        return False
    table = pv.guest_table if pv.kernel_mode else pv.guest_table_user
    try:
        found = guest_walk(pv.memory, table, pv.ldt_base + (page << 12), False)
    except GuestAccessError:
        return False
    if found is None:
        return False
    mfn = found >> 12
    if not pv.hypervisor.frames.get_page_and_type(mfn, pv.domain, PGT_SEG_DESC):
        return False
    pv.ldt_frames[page] = mfn
    pv.domain.pv.area.set_ldt_page(pv.vcpu.vcpu_id, page, mfn)
    return True
