# SPDX-License-Identifier: GPL-2.0-only
"""Fast mode only: far transfers and stack-segment loads of a guest kernel, with the meaning they have at CPL 3.

In fast mode the kernel runs at CPL 1 with selectors of its own, but the ABI's have RPL 3.  Xen's 64-bit code segment
has DPL 1 in fast mode's GDT, so a far transfer to it (``iretq``, ``lretq``) and a load of SS raise #GP; what the
instruction would have done at CPL 3 is done here.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from iced_x86 import Code, Mnemonic, OpKind, Register, RegisterExt

from pyxen.abi.xen import MASK64
from pyxen.errors import GuestAccessError
from pyxen.hypervisor.x86.pv.emulate import decode, fetch
from pyxen.hypervisor.x86.pv.iret import SegmentFault, load_code, load_stack
from pyxen.machine.cpu.base import RSP

if TYPE_CHECKING:
    from pyxen.hypervisor.x86.pv.vcpu import PvVcpu
    from pyxen.machine.cpu.base import Cpu

_FLAGS_KEPT: Final = 0x254DD5
_IRET_FRAME: Final = struct.Struct("<5Q")


def emulate(pv: PvVcpu, cpu: Cpu, rip: int) -> int | None:
    """Do a far return or SS load of a kernel in fast mode; None if the guest is to have its #GP."""
    try:
        code = fetch(pv, rip)
        found = decode(pv, code)
        instruction = found.instruction
        gpr = cpu.gpr
        if instruction.code == Code.IRETQ:
            target, cs, flags, rsp, ss = _IRET_FRAME.unpack(pv.read(gpr[RSP], 40))
            return _transfer(pv, cpu, target, cs, ss & 0xFFFF, rsp, flags)
        if instruction.mnemonic == Mnemonic.RETF and instruction.code in (Code.RETFQ, Code.RETFQ_IMM16):
            target, cs = struct.unpack("<QQ", pv.read(gpr[RSP], 16))
            extra = instruction.immediate16 if instruction.code == Code.RETFQ_IMM16 else 0
            return _transfer(pv, cpu, target, cs, None, gpr[RSP] + 16 + extra & MASK64, None)
        if instruction.code in (Code.MOV_SREG_RM16, Code.MOV_SREG_R32M16, Code.MOV_SREG_R64M16) and (
            instruction.op0_register == Register.SS and instruction.op1_kind == OpKind.REGISTER
        ):
            selector = gpr[int(RegisterExt.number(instruction.op1_register))] & 0xFFFF
            return _stack_segment(pv, cpu, selector, rip + found.length)
    except GuestAccessError:
        return None
    return None


def _stack_segment(pv: PvVcpu, cpu: Cpu, selector: int, next_rip: int) -> int | None:
    if selector & 3 != 3:
        return None
    try:
        load_stack(pv, cpu, selector)
    except SegmentFault:
        return None
    pv.at_cpl1(cpu)
    return next_rip & MASK64


def _transfer(pv: PvVcpu, cpu: Cpu, target: int, cs: int, ss: int | None, rsp: int, flags: int | None) -> int | None:
    cs &= 0xFFFF
    if cs & 3 != 3 or not (target < 1 << 47 or target >= MASK64 + 1 - (1 << 47)):
        return None
    try:
        load_code(pv, cpu, cs)
        if ss is not None and ss & 0xFFFC:
            load_stack(pv, cpu, ss)
    except SegmentFault:
        return None
    pv.at_cpl1(cpu)
    cpu.gpr[RSP] = rsp
    if flags is not None:
        cpu.flags = flags & _FLAGS_KEPT | cpu.flags & 0x3200 | 2
    return target
