# SPDX-License-Identifier: GPL-2.0-only
"""Privileged instructions of PV guests, emulated at the #GP or #UD they cause (Xen: xen/arch/x86/traps.c,
emulate_privileged_op).

Instructions are decoded by iced-x86; what was decoded is remembered by its bytes, since a kernel executes few
distinct ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from iced_x86 import Decoder, Instruction, Mnemonic, OpKind, Register, RegisterExt

from pyxen.abi.xen import MASK64
from pyxen.errors import GuestAccessError, XenError
from pyxen.hypervisor.x86 import msr
from pyxen.hypervisor.x86.pit import PORTS as PIT_PORTS
from pyxen.machine.cpu.base import RAX, RBX, RCX, RDI, RDX, RSI

if TYPE_CHECKING:
    from pyxen.hypervisor.x86.pv.vcpu import PvVcpu
    from pyxen.machine.cpu.base import Cpu

FORCED_PREFIX: Final = b"\x0f\x0bxen"
"""XEN_EMULATE_PREFIX (xen/include/public/arch-x86/xen.h): ud2a; .ascii "xen"."""

_MAX_CACHED: Final = 4096
_CR0_TS: Final = 8
_CR0_GUEST: Final = 0x80050033
_CR4_WRITABLE: Final = 0x4 | 0x8 | 0x200 | 0x400 | 0x10000  # TSD, DE, OSFXSR, OSXMMEXCPT, FSGSBASE
_MAX_REP: Final = 1024


class Decoded(NamedTuple):
    """What the emulator needs to know of an instruction."""

    handler: Callable[[PvVcpu, Cpu, Instruction], bool] | None
    length: int
    instruction: Instruction


_decoded: dict[bytes, Decoded] = {}


def fetch(pv: PvVcpu, rip: int) -> bytes:
    """Up to 15 instruction bytes; fewer when the next page cannot be read. Raises GuestAccessError if none can."""
    room = 4096 - (rip & 0xFFF)
    if room >= 15:
        return pv.read(rip, 15)
    code = pv.read(rip, room)
    try:
        return code + pv.read(rip + room, 15 - room)
    except GuestAccessError:
        return code


def decode(pv: PvVcpu, code: bytes) -> Decoded:
    """Decode one instruction as 64-bit code (as 32-bit code if the current CS is not a long-mode segment)."""
    found = _decoded.get(code)
    if found is None:
        instruction = Decoder(64, code).decode()
        handler = None if instruction.is_invalid else _HANDLERS.get(instruction.mnemonic)
        found = Decoded(handler, instruction.len, instruction)
        if len(_decoded) >= _MAX_CACHED:
            _decoded.clear()
        _decoded[code] = found
    return found


def privileged_op(pv: PvVcpu, cpu: Cpu, rip: int) -> int | None:
    """Emulate the instruction at ``rip`` that raised #GP(0); None if the guest is to have the fault."""
    try:
        code = fetch(pv, rip)
    except GuestAccessError:
        return None
    found = decode(pv, code)
    if found.handler is None:
        return None
    try:
        if not found.handler(pv, cpu, found.instruction):
            return None
    except _Restart:
        return rip
    return rip + found.length & MASK64


def forced_op(pv: PvVcpu, cpu: Cpu, rip: int) -> int | None:
    """Emulate an instruction behind Xen's forced-emulation prefix (CPUID is the one the ABI names); None if it is a
    plain #UD."""
    try:
        code = fetch(pv, rip)
    except GuestAccessError:
        return None
    if not code.startswith(FORCED_PREFIX):
        return None
    if len(code) < 7:
        return None
    if code[5:7] != b"\x0f\xa2":
        return None
    gpr = cpu.gpr
    gpr[RAX], gpr[RBX], gpr[RCX], gpr[RDX] = pv.domain.pv.cpuid.leaf(gpr[RAX] & 0xFFFFFFFF, gpr[RCX] & 0xFFFFFFFF, pv)
    return rip + 7 & MASK64


class _Restart(Exception):
    pass


# --- ports --------------------------------------------------------------------------------------


def _port_allowed(pv: PvVcpu, port: int, size: int) -> bool:
    """guest_io_okay: by the virtual IOPL, else by the guest's I/O bitmap."""
    if pv.iopl >= (1 if pv.kernel_mode else 3):
        return True
    if not pv.iobmp or port + size > pv.iobmp_limit:
        return False
    try:
        bits = int.from_bytes(pv.read(pv.iobmp + (port >> 3), 2), "little")
    except GuestAccessError:
        return False
    return not bits >> (port & 7) & ((1 << size) - 1)


def _in(pv: PvVcpu, cpu: Cpu, instruction: Instruction) -> bool:
    size = RegisterExt.size(instruction.op0_register)
    port = instruction.immediate8 if instruction.op1_kind == OpKind.IMMEDIATE8 else cpu.gpr[RDX] & 0xFFFF
    if not _port_allowed(pv, port, size):
        return False
    if port in PIT_PORTS and size == 1:
        cpu.gpr[RAX] = cpu.gpr[RAX] & ~0xFF | pv.domain.pv.pit.read(port)
        return True
    # A domain without the port sees an empty bus.
    if size == 4:
        cpu.gpr[RAX] = 0xFFFFFFFF
    else:
        cpu.gpr[RAX] |= (1 << 8 * size) - 1
    return True


def _out(pv: PvVcpu, cpu: Cpu, instruction: Instruction) -> bool:
    size = RegisterExt.size(instruction.op1_register)
    port = instruction.immediate8 if instruction.op0_kind == OpKind.IMMEDIATE8 else cpu.gpr[RDX] & 0xFFFF
    if not _port_allowed(pv, port, size):
        return False
    if port in PIT_PORTS and size == 1:
        pv.domain.pv.pit.write(port, cpu.gpr[RAX] & 0xFF)
    return True


def _string_size(instruction: Instruction) -> int:
    return {Mnemonic.INSB: 1, Mnemonic.OUTSB: 1, Mnemonic.INSW: 2, Mnemonic.OUTSW: 2}.get(instruction.mnemonic, 4)


def _string_io(pv: PvVcpu, cpu: Cpu, instruction: Instruction) -> bool:
    gpr = cpu.gpr
    size = _string_size(instruction)
    if not _port_allowed(pv, gpr[RDX] & 0xFFFF, size):
        return False
    repeated = instruction.has_rep_prefix or instruction.has_repne_prefix
    total = gpr[RCX] if repeated else 1
    count = min(total, _MAX_REP)
    step = -size if cpu.flags & 0x400 else size
    reads = instruction.mnemonic in (Mnemonic.INSB, Mnemonic.INSW, Mnemonic.INSD)
    pointer = RDI if reads else RSI
    for done in range(count):
        if reads:
            try:
                pv.write(gpr[pointer], b"\xff" * size)
            except GuestAccessError:
                if repeated:
                    gpr[RCX] = total - done
                return False
        gpr[pointer] = gpr[pointer] + step & MASK64
    if repeated:
        gpr[RCX] = total - count
        if total > count:
            raise _Restart
    return True


def _interrupt_flag(pv: PvVcpu, cpu: Cpu, instruction: Instruction) -> bool:
    # CLI and STI with enough IOPL do nothing: the real flag is never the guest's (its mask is in vcpu_info).
    return pv.iopl >= (1 if pv.kernel_mode else 3)


# --- control and debug registers ---------------------------------------------------------------------


def _mov(pv: PvVcpu, cpu: Cpu, instruction: Instruction) -> bool:
    if not pv.kernel_mode or instruction.op_count != 2:
        return False
    if instruction.op0_kind != OpKind.REGISTER or instruction.op1_kind != OpKind.REGISTER:
        return False
    target, source = instruction.op0_register, instruction.op1_register
    if Register.CR0 <= source <= Register.CR15:
        value = read_cr(pv, source - Register.CR0)
        if value is None:
            return False
        cpu.gpr[_gpr(target)] = value
        return True
    if Register.CR0 <= target <= Register.CR15:
        return write_cr(pv, cpu, target - Register.CR0, cpu.gpr[_gpr(source)])
    if Register.DR0 <= source <= Register.DR15:
        number = source - Register.DR0
        if number > 7:
            return False
        cpu.gpr[_gpr(target)] = get_debugreg(pv, number)
        return True
    if Register.DR0 <= target <= Register.DR15:
        return set_debugreg(pv, target - Register.DR0, cpu.gpr[_gpr(source)])
    return False


def _gpr(register: Register) -> int:
    return int(RegisterExt.number(register))


def read_cr(pv: PvVcpu, number: int) -> int | None:
    """What MOV from CRn shows a PV kernel; None for registers it has not."""
    if number == 0:
        return _CR0_GUEST | (_CR0_TS if pv.cr0_ts else 0)
    if number == 2:
        return int(pv.memory.q[(pv.vcpu.info_maddr + 16) >> 3])
    if number == 3:
        return pv.guest_table << 12
    if number == 4:
        return pv.guest_cr4
    return None


def write_cr(pv: PvVcpu, cpu: Cpu, number: int, value: int) -> bool:
    """MOV to CRn of a PV kernel. CR0: only TS may change. CR3: as MMUEXT_NEW_BASEPTR. CR4: the bits a guest owns."""
    if number == 0:
        if (value ^ _CR0_GUEST) & ~_CR0_TS:
            return False
        set_task_switched(pv, cpu, bool(value & _CR0_TS))
        return True
    if number == 2:
        pv.memory.q[(pv.vcpu.info_maddr + 16) >> 3] = value
        return True
    if number == 3:
        from pyxen.hypervisor.x86.pv.mm import new_guest_cr3

        try:
            new_guest_cr3(pv, value >> 12)
        except XenError:
            return False
        return True
    if number == 4:
        if (value ^ pv.guest_cr4) & ~_CR4_WRITABLE:
            pv.hypervisor.log.printk(f"{pv.vcpu} tried to change reserved or host bits of CR4 to {value:#x}")
        pv.guest_cr4 = pv.guest_cr4 & ~_CR4_WRITABLE | value & _CR4_WRITABLE
        return True
    return False


def set_task_switched(pv: PvVcpu, cpu: Cpu, on: bool) -> None:
    """The guest's CR0.TS (HYPERVISOR_fpu_taskswitch, CLTS, MOV to CR0)."""
    pv.cr0_ts = on
    cpu.set_task_switched(on)


def get_debugreg(pv: PvVcpu, number: int) -> int:
    """HYPERVISOR_get_debugreg."""
    if number in (4, 5):
        number += 2
    return pv.debugreg[number]


def set_debugreg(pv: PvVcpu, number: int, value: int) -> bool:
    """HYPERVISOR_set_debugreg: breakpoints only in the guest's own range, no general detect, no I/O breakpoints."""
    if number in (4, 5):
        number += 2
    if number <= 3:
        if not pv.guest_address_ok(value):
            return False
    elif number == 6:
        value = value & 0xE00F | 0xFFFF0FF0
    elif number == 7:
        value = value & 0xFFFF2BFF | 0x400
        if value & 0xFF:
            for i in range(4):
                if value >> (16 + 4 * i) & 3 == 2 and not pv.guest_cr4 & 8:
                    return False
        if value & 0x2000:
            return False
    else:
        return False
    pv.debugreg[number] = value
    if pv.cpu is not None:
        pv.cpu.set_debug_register(number, value)
    return True


def _clts(pv: PvVcpu, cpu: Cpu, instruction: Instruction) -> bool:
    if not pv.kernel_mode:
        return False
    set_task_switched(pv, cpu, False)
    return True


def _lmsw(pv: PvVcpu, cpu: Cpu, instruction: Instruction) -> bool:
    if not pv.kernel_mode or instruction.op0_kind != OpKind.REGISTER:
        return False
    value = cpu.gpr[_gpr(instruction.op0_register)]
    return write_cr(pv, cpu, 0, _CR0_GUEST & ~0xF | value & 0xF)


def _nothing_in_kernel(pv: PvVcpu, cpu: Cpu, instruction: Instruction) -> bool:
    return pv.kernel_mode


def _invlpg(pv: PvVcpu, cpu: Cpu, instruction: Instruction) -> bool:
    if not pv.kernel_mode:
        return False
    pv.flush_tlb_page(effective_address(cpu, instruction))
    return True


def effective_address(cpu: Cpu, instruction: Instruction) -> int:
    """Linear address of a decoded memory operand (decoded at address 0: RIP-relative ones are relative to it)."""
    base = instruction.memory_base
    value = instruction.memory_displacement
    gpr = cpu.gpr
    if base == Register.RIP:
        value = (value + gpr[16]) & MASK64
    elif base != Register.NONE:
        value += gpr[_gpr(base)]
    if instruction.memory_index != Register.NONE:
        value += gpr[_gpr(instruction.memory_index)] * instruction.memory_index_scale
    segment = instruction.memory_segment
    if segment == Register.FS:
        value += cpu.fs_base
    elif segment == Register.GS:
        value += cpu.gs_base
    return value & MASK64


# --- MSRs, CPUID, XGETBV --------------------------------------------------------------------------------


def _rdmsr(pv: PvVcpu, cpu: Cpu, instruction: Instruction) -> bool:
    if not pv.kernel_mode:
        return False
    value = msr.read(pv, cpu, cpu.gpr[RCX] & 0xFFFFFFFF)
    if value is None:
        return False
    cpu.gpr[RAX] = value & 0xFFFFFFFF
    cpu.gpr[RDX] = value >> 32
    return True


def _wrmsr(pv: PvVcpu, cpu: Cpu, instruction: Instruction) -> bool:
    if not pv.kernel_mode:
        return False
    gpr = cpu.gpr
    return msr.write(pv, cpu, gpr[RCX] & 0xFFFFFFFF, (gpr[RDX] & 0xFFFFFFFF) << 32 | gpr[RAX] & 0xFFFFFFFF)


_HANDLERS: Final[dict[int, Callable[[PvVcpu, Cpu, Instruction], bool]]] = {
    Mnemonic.IN: _in,
    Mnemonic.OUT: _out,
    Mnemonic.INSB: _string_io,
    Mnemonic.INSW: _string_io,
    Mnemonic.INSD: _string_io,
    Mnemonic.OUTSB: _string_io,
    Mnemonic.OUTSW: _string_io,
    Mnemonic.OUTSD: _string_io,
    Mnemonic.CLI: _interrupt_flag,
    Mnemonic.STI: _interrupt_flag,
    Mnemonic.MOV: _mov,
    Mnemonic.CLTS: _clts,
    Mnemonic.LMSW: _lmsw,
    Mnemonic.WBINVD: _nothing_in_kernel,
    Mnemonic.INVD: _nothing_in_kernel,
    Mnemonic.INVLPG: _invlpg,
    Mnemonic.RDMSR: _rdmsr,
    Mnemonic.WRMSR: _wrmsr,
}
