# SPDX-License-Identifier: GPL-2.0-only
"""The LDT window: pages of a guest's LDT are typed and mapped when the CPU first looks into them (Xen:
map_ldt_shadow_page)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from pyxen.abi.xen import MASK64
from pyxen.errors import XenError
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
    cpu = pv.live_cpu
    if cpu is None:
        return
    if pv.ldt_ents:
        cpu.set_ldt(_LDT_SELECTOR, ldt_va(pv.vcpu.vcpu_id), pv.ldt_ents * 8 - 1)
    else:
        cpu.set_ldt(0, 0, 0)


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


def handle_fault(pv: PvVcpu, va: int) -> int | None:
    """A #PF of the CPU's own access to the window (handle_gdt_ldt_mapping_fault): map the page and return 0, or the
    address in the guest's own LDT that it is to be told of. None if ``va`` is elsewhere."""
    offset = va - ldt_va(pv.vcpu.vcpu_id)
    if not 0 <= offset < pv.ldt_ents * 8:
        return None
    page = offset >> 12
    if page in pv.ldt_frames:
        return None
    return 0 if _map_page(pv, page) else pv.ldt_base + offset & MASK64


def descriptor(pv: PvVcpu, index: int) -> int | None:
    """Entry ``index``, as the CPU would load it: from a page that is typed as descriptors. None if there is none."""
    page = index >> 9
    if index >= pv.ldt_ents or (page not in pv.ldt_frames and not _map_page(pv, page)):
        return None
    return int(pv.memory.q[(pv.ldt_frames[page] << 9) + (index & 511)])


def _map_page(pv: PvVcpu, page: int) -> bool:
    """map_ldt_shadow_page(): by the kernel's page tables, whoever runs."""
    found = guest_walk(pv.memory, pv.guest_table, pv.ldt_base + (page << 12), False)
    if found is None:
        return False
    mfn = found >> 12
    if not pv.hypervisor.frames.get_page_and_type(mfn, pv.domain, PGT_SEG_DESC):
        return False
    pv.ldt_frames[page] = mfn
    pv.domain.pv.area.set_ldt_page(pv.vcpu.vcpu_id, page, mfn)
    return True
