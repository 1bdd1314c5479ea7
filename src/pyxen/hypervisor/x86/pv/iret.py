# SPDX-License-Identifier: GPL-2.0-only
"""HYPERVISOR_iret and the loading of user segments (Xen: xen/arch/x86/x86_64/traps.c, do_iret)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pyxen.abi.arch_x86 import IRET_CONTEXT, VGCF_IN_SYSCALL
from pyxen.abi.xen import MASK64
from pyxen.errors import GuestAccessError, GuestFault
from pyxen.hypervisor.x86.pv import ldt
from pyxen.hypervisor.x86.pv.descriptors import (
    FAST_KERNEL_CS,
    FAST_KERNEL_SS,
    FIRST_RESERVED_GDT_ENTRY,
    FLAT_KERNEL_CS,
    FLAT_RING3_CS32,
    FLAT_RING3_DS32,
    segment_attributes,
    segment_base,
    segment_limit,
)
from pyxen.machine.cpu.base import R11, RAX, RCX, RSP, Seg

if TYPE_CHECKING:
    from pyxen.hypervisor.x86.pv.vcpu import PvVcpu
    from pyxen.machine.cpu.base import Cpu

_CS: Final = int(Seg.CS)
_SS: Final = int(Seg.SS)
_CODE64: Final = 0xAFFB00
_CODE32: Final = 0xCFFB00
_DATA: Final = 0xCFF300
_LONG_CODE: Final = 1 << 47 | 1 << 44 | 1 << 43 | 1 << 53
"""Of a descriptor: present, code or data, code, L."""
_FLAGS_KEPT: Final = 0x254FD5  # what IRET at CPL 3 may set: arithmetic, TF, DF, NT, RF, AC, ID
_CANONICAL_LOW: Final = 1 << 47
_CANONICAL_HIGH: Final = MASK64 + 1 - _CANONICAL_LOW


class SegmentFault(Exception):
    """A selector the guest wants to return to cannot be loaded."""


def find_descriptor(pv: PvVcpu, selector: int) -> int:
    """The descriptor a selector names in the vCPU's GDT or LDT. Raises SegmentFault."""
    index = selector >> 3
    if selector & 4:
        found = ldt.descriptor(pv, index)
        if found is None:
            raise SegmentFault
        return found
    if index >= FIRST_RESERVED_GDT_ENTRY:
        if index >= FIRST_RESERVED_GDT_ENTRY + 512:
            raise SegmentFault
        return int(pv.memory.q[(pv.hypervisor.xen_slots.gdt_mfn["exact"] << 9) + (index & 511)])
    if index >= pv.gdt_ents:
        raise SegmentFault
    return int(pv.memory.q[(pv.gdt_frames[index >> 9] << 9) + (index & 511)])


def is_flat(pv: PvVcpu, selector: int) -> bool:
    """Whether a code selector that the guest runs with names a 64-bit segment. ``flat_code`` answers for most; what
    another vCPU's update_descriptor had it forget is looked up again (Xen reads the table too)."""
    if selector in pv.flat_code:
        return True
    try:
        descriptor = find_descriptor(pv, selector)
    except SegmentFault:
        return False
    if descriptor & _LONG_CODE != _LONG_CODE:
        return False
    if not selector & 4:  # an LDT is the guest's to change by ordinary means
        pv.flat_code.add(selector)
    return True


def load_code(pv: PvVcpu, cpu: Cpu, selector: int) -> None:
    """Load CS for a guest that runs at CPL 3 by Xen's rules. Raises SegmentFault."""
    if selector == FLAT_KERNEL_CS:
        attributes, base, limit = _CODE64, 0, 0xFFFFFFFF
    elif selector == FLAT_RING3_CS32:
        attributes, base, limit = _CODE32, 0, 0xFFFFFFFF
    else:
        descriptor = find_descriptor(pv, selector)
        attributes = segment_attributes(descriptor)
        if attributes & 0x9800 != 0x9800 or selector & 0xFFFC == 0:  # present code segment
            raise SegmentFault
        if attributes & 0x6000 != 0x6000 and not attributes & 0x400:
            raise SegmentFault
        if attributes & 0x600000 == 0x600000:  # L and D together
            raise SegmentFault
        base, limit = segment_base(descriptor), segment_limit(descriptor)
        if attributes & 0x200000 and not selector & 4:
            pv.flat_code.add(selector)
            base, limit = 0, 0xFFFFFFFF
    cpu.load_segment(_CS, selector, base, limit, attributes)


def load_stack(pv: PvVcpu, cpu: Cpu, selector: int) -> None:
    """Load SS with RPL 3. Raises SegmentFault."""
    if selector == FLAT_RING3_DS32:
        cpu.load_segment(_SS, selector, 0, 0xFFFFFFFF, _DATA)
        return
    if selector & 0xFFFC == 0:
        raise SegmentFault
    descriptor = find_descriptor(pv, selector)
    attributes = segment_attributes(descriptor)
    if attributes & 0x9A00 != 0x9200 or attributes & 0x6000 != 0x6000:  # present, writable data, DPL 3
        raise SegmentFault
    cpu.load_segment(_SS, selector, segment_base(descriptor), segment_limit(descriptor), attributes)


def do_iret(pv: PvVcpu, cpu: Cpu) -> int:
    """HYPERVISOR_iret: take a struct iret_context from the guest's stack; returns the address to continue at.

    RAX, RCX and R11 come from the frame (RCX and R11 from RIP and RFLAGS with VGCF_in_syscall), the upcall mask from
    the
    frame's IF. A frame that cannot be read crashes the domain; selectors that cannot be loaded, and a RIP that is not
    canonical, make the real IRETQ fault and reach the failsafe callback.
    """
    gpr = cpu.gpr
    sp = gpr[RSP]
    rip: int
    try:
        base = pv._read_cache.get(sp >> 12)
        if base is None or sp & 0xFFF > 4024:
            frame = pv.read(sp, 72)
            rax, r11, rcx, flags, rip, cs, rflags, rsp, ss = IRET_CONTEXT.unpack(frame)
        else:
            rax, r11, rcx, flags, rip, cs, rflags, rsp, ss = IRET_CONTEXT.unpack_from(pv.bytes, base + (sp & 0xFFF))
    except GuestAccessError as error:
        raise GuestFault(f"fault while reading IRET context from guest kernel stack {sp:#x}") from error
    if cs & 3 == 3:
        if not pv.guest_table_user:
            raise GuestFault("guest switching to user mode with no user page tables")
        pv.to_user(cpu)
    cs = (cs | 3) & 0xFFFF
    ss = (ss | 3) & 0xFFFF
    gpr[RAX] = rax
    gpr[RSP] = rsp
    if flags & VGCF_IN_SYSCALL:
        # SYSRET: flat segments, whatever the frame says, but for the compatibility-mode selector.
        gpr[RCX] = rip
        gpr[R11] = rflags
        if cs != FLAT_RING3_CS32:
            cs = FLAT_KERNEL_CS
        ss = FLAT_RING3_DS32
    else:
        gpr[RCX] = rcx
        gpr[R11] = r11
    pv.bytes[pv.vcpu.info_maddr + 1] = 0 if rflags & 0x200 else 1
    if pv.nmi_masked:  # async_exception_cleanup()
        pv.nmi_masked = False
        if pv.vcpu.nmi_pending:
            cpu.stop()
    flat = pv.flat_code
    if cs in flat and (ss == FLAT_RING3_DS32 or (cs, ss) in pv.user_segments) and cpu.selector(_CS) in flat:
        if pv.kernel_mode and not pv.exact and cs == FLAT_KERNEL_CS:
            cs, ss = FAST_KERNEL_CS, FAST_KERNEL_SS
        cpu.set_selector(_CS, cs)
        cpu.set_selector(_SS, ss)
    else:
        try:
            load_code(pv, cpu, cs)
            load_stack(pv, cpu, ss)
        except SegmentFault:
            return failsafe(pv, rip, cs, ss, rflags)
        if cs in pv.flat_code:
            pv.user_segments[(cs, ss)] = (cs, ss)
        if pv.kernel_mode and not pv.exact:
            pv.at_cpl1(cpu)
        else:
            cpu.set_cpl(3)
    cpu.flags = rflags & _FLAGS_KEPT | 0x202
    if not (rip < _CANONICAL_LOW or rip >= _CANONICAL_HIGH):
        return failsafe(pv, rip, cs, ss, rflags)
    return rip


def failsafe(pv: PvVcpu, rip: int, cs: int, ss: int, rflags: int) -> int:
    """An IRET that faulted: enter the failsafe callback; its frame starts with the data selectors (entry.S,
    failsafe_callback)."""
    cpu = pv.cpu
    assert cpu is not None
    if not pv.failsafe_callback:
        raise GuestFault(f"return to rip {rip:#x} faulted and there is no failsafe callback")
    # The frame shows what could not be returned to; bounce() loads what the kernel runs with.
    cpu.set_selector(_CS, cs)
    cpu.set_selector(_SS, ss)
    target = pv.bounce(pv.failsafe_callback, rip, rflags & _FLAGS_KEPT | 0x202, None, pv.failsafe_masks_events)
    selectors = b"".join(cpu.selector(seg).to_bytes(8, "little") for seg in (Seg.DS, Seg.ES, Seg.FS, Seg.GS))
    stack = cpu.gpr[RSP] & MASK64
    # struct: rcx, r11, ds, es, fs, gs, then the usual frame; the bounce put rcx and r11 lowest.
    lowest = pv.read(stack, 16)
    stack = (stack - 32) & MASK64
    try:
        pv.write(stack, lowest + selectors)
    except GuestAccessError as error:
        raise GuestFault(f"guest kernel stack {stack:#x} is not writable (failsafe callback)") from error
    cpu.gpr[RSP] = stack
    return target
