# SPDX-License-Identifier: GPL-2.0-only
"""HYPERVISOR_set_gdt and HYPERVISOR_update_descriptor (Xen: xen/arch/x86/mm.c, pv/descriptor-tables.c)."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from pyxen.errors import XenError
from pyxen.hypervisor.frames import PGT_SEG_DESC
from pyxen.hypervisor.x86.pv.descriptors import (
    FAST_KERNEL_CS,
    FIRST_RESERVED_GDT_ENTRY,
    FLAT_KERNEL_CS,
    LAST_GDT_BYTE,
    check_descriptor,
)
from pyxen.hypervisor.x86.pv.slots import gdt_va

if TYPE_CHECKING:
    from pyxen.hypervisor.x86.pv.vcpu import PvVcpu


def destroy_gdt(pv: PvVcpu) -> None:
    """Unmap the guest's GDT frames and drop their references."""
    if not pv.gdt_frames:
        return
    old, pv.gdt_frames, pv.gdt_ents = pv.gdt_frames, [], 0
    pv.domain.pv.area.set_gdt(pv.vcpu.vcpu_id, [])
    forget_segments(pv)
    pv.flush_tlb()
    for mfn in old:
        pv.hypervisor.frames.put_page_and_type(mfn)


def forget_segments(pv: PvVcpu) -> None:
    """The GDT changed: nothing is known any more of what its selectors name."""
    pv.flat_code.intersection_update((FLAT_KERNEL_CS, FAST_KERNEL_CS))
    pv.user_segments.clear()


def set_gdt(pv: PvVcpu, mfns: list[int], entries: int) -> None:
    """Install ``entries`` descriptors in whole frames, each typed as a descriptor page. EINVAL if one cannot be."""
    if entries > FIRST_RESERVED_GDT_ENTRY:
        raise XenError(errno.EINVAL)
    frames = pv.hypervisor.frames
    taken: list[int] = []
    for mfn in mfns:
        if not frames.get_page_and_type(mfn, pv.domain, PGT_SEG_DESC):
            for done in taken:
                frames.put_page_and_type(done)
            raise XenError(errno.EINVAL)
        taken.append(mfn)
    destroy_gdt(pv)
    pv.gdt_frames, pv.gdt_ents = taken, entries
    pv.domain.pv.area.set_gdt(pv.vcpu.vcpu_id, taken)
    forget_segments(pv)
    pv.flush_tlb()
    cpu = pv.live_cpu
    if cpu is not None:
        cpu.set_gdt(gdt_va(pv.vcpu.vcpu_id), LAST_GDT_BYTE)


def do_set_gdt(pv: PvVcpu, frame_list: int, entries: int) -> int:
    """HYPERVISOR_set_gdt(frame_list, entries)."""
    entries &= 0xFFFFFFFF
    if entries > FIRST_RESERVED_GDT_ENTRY:
        raise XenError(errno.EINVAL)
    pages = (entries + 511) // 512
    mfns = list(struct.unpack(f"<{pages}Q", pv.read(frame_list, pages * 8))) if pages else []
    set_gdt(pv, mfns, entries)
    return 0


def do_update_descriptor(pv: PvVcpu, maddr: int, descriptor: int) -> int:
    """HYPERVISOR_update_descriptor: one entry of a frame of the caller's, if it passes as a descriptor. EINVAL
    otherwise."""
    hypervisor = pv.hypervisor
    if maddr & 7:
        raise XenError(errno.EINVAL)
    checked = check_descriptor(descriptor, allow_gates=pv.exact)
    mfn = maddr >> 12
    if checked is None or not hypervisor.frames.get_page(mfn, pv.domain):
        raise XenError(errno.EINVAL)
    try:
        if not hypervisor.frames.update_descriptor(mfn, pv.domain, (maddr & 0xFFF) >> 3, checked):
            raise XenError(errno.EINVAL)
        for vcpu in pv.domain.vcpus:
            if mfn in vcpu.pv.gdt_frames or mfn in vcpu.pv.ldt_frames.values():
                forget_segments(vcpu.pv)
    finally:
        hypervisor.frames.put_page(mfn)
    return 0
