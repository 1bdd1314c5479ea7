# SPDX-License-Identifier: GPL-2.0-only
"""Privileged instructions of PV guests, emulated at the #GP or #UD they cause (Xen: xen/arch/x86/traps.c,
emulate_privileged_op).

Instructions are decoded by iced-x86; what was decoded is remembered by its bytes, since a kernel executes few
distinct ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

from iced_x86 import Decoder, Instruction, MemorySizeExt, Mnemonic, OpKind, Register, RegisterExt

from pyxen.abi.xen import MASK64
from pyxen.errors import GuestAccessError
from pyxen.hypervisor.frames_types import ERESTART
from pyxen.hypervisor.x86 import msr
from pyxen.hypervisor.x86.pit import PORTS as PIT_PORTS
from pyxen.hypervisor.x86.pv.descriptors import FLAT_RING3_SS32, segment_base
from pyxen.hypervisor.x86.pv.mm_flags import PAGE_RW, PAGE_USER
from pyxen.hypervisor.x86.pv.mm_root import switch_guest_table
from pyxen.hypervisor.x86.pv.walk import guest_walk_flags
from pyxen.machine.cpu.base import RAX, RBX, RCX, RDI, RDX, RSI, RSP, Seg

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


Handler = Callable[["PvVcpu", "Cpu", Instruction, int], bool]


class Decoded(NamedTuple):
    """What the emulator needs to know of an instruction."""

    handler: Handler | None
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
    """Decode one instruction as 64-bit code. What user code in compatibility mode may have emulated (port I/O, CLI,
    STI) has the same encoding there."""
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
        code = fetch(pv, rip if cpu.selector(Seg.CS) in pv.flat_code else _linear(pv, cpu, rip))
    except GuestAccessError:
        return None
    found = decode(pv, code)
    if found.handler is None:
        return None
    try:
        if not found.handler(pv, cpu, found.instruction, rip):
            return None
    except _Restart:
        return rip
    except _Sysenter as entry:
        return entry.target
    except _PageFault as fault:
        return pv.inject_page_fault(fault.va, fault.error, rip)
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


def _linear(pv: PvVcpu, cpu: Cpu, rip: int) -> int:
    """Where code lies whose segment is not known to be flat: of compatibility mode, an LDT's, or changed since."""
    from pyxen.hypervisor.x86.pv import iret

    try:
        if iret.is_flat(pv, cpu.selector(Seg.CS)):
            return rip
        base = segment_base(iret.find_descriptor(pv, cpu.selector(Seg.CS)))
    except iret.SegmentFault:
        base = 0
    return base + rip & 0xFFFFFFFF


class _Restart(Exception):
    """Part of the instruction is done: let the guest execute it again."""


class _Sysenter(Exception):
    """The instruction entered the kernel."""

    def __init__(self, target: int) -> None:
        super().__init__(target)
        self.target = target


class _PageFault(Exception):
    """The instruction's memory operand faults; the user bit of ``error`` is added on delivery."""

    def __init__(self, va: int, error: int) -> None:
        super().__init__(va, error)
        self.va = va
        self.error = error


# --- ports --------------------------------------------------------------------------------------


def _port_allowed(pv: PvVcpu, port: int, size: int) -> bool:
    """guest_io_okay: by the virtual IOPL, else by the guest's I/O bitmap."""
    if pv.iopl >= (1 if pv.kernel_mode else 3):
        return True
    if not pv.iobmp or port + size > pv.iobmp_limit:
        return False
    try:
        bits = int.from_bytes(pv.read_as_kernel(pv.iobmp + (port >> 3), 2), "little")
    except GuestAccessError:
        return False
    return not bits >> (port & 7) & ((1 << size) - 1)


def _in(pv: PvVcpu, cpu: Cpu, instruction: Instruction, rip: int) -> bool:
    size = RegisterExt.size(instruction.op0_register)
    port = instruction.immediate8 if instruction.op1_kind == OpKind.IMMEDIATE8 else cpu.gpr[RDX] & 0xFFFF
    if not _port_allowed(pv, port, size):
        return False
    value = _port_read(pv, port, size)
    if size < 4:
        value |= cpu.gpr[RAX] & MASK64 << 8 * size & MASK64
    cpu.gpr[RAX] = value
    return True


def _port_read(pv: PvVcpu, port: int, size: int) -> int:
    """guest_io_read(): byte by byte. A domain without a port sees an empty bus."""
    value = 0
    for i in range(size):
        byte = pv.domain.pv.pit.read(port + i) if port + i in PIT_PORTS else 0xFF
        value |= byte << 8 * i
    return value


def _port_write(pv: PvVcpu, port: int, size: int, value: int) -> None:
    """guest_io_write(): byte by byte."""
    for i in range(size):
        if port + i in PIT_PORTS:
            pv.domain.pv.pit.write(port + i, value >> 8 * i & 0xFF)


def _out(pv: PvVcpu, cpu: Cpu, instruction: Instruction, rip: int) -> bool:
    size = RegisterExt.size(instruction.op1_register)
    port = instruction.immediate8 if instruction.op0_kind == OpKind.IMMEDIATE8 else cpu.gpr[RDX] & 0xFFFF
    if not _port_allowed(pv, port, size):
        return False
    _port_write(pv, port, size, cpu.gpr[RAX])
    return True


def _check_operand(pv: PvVcpu, va: int, size: int, write: bool) -> None:
    """What the MMU would have said about an access of the current mode."""
    table = pv.guest_table if pv.kernel_mode else pv.guest_table_user
    needed = (PAGE_RW if write else 0) | (0 if pv.kernel_mode else PAGE_USER)
    for at in {va, va + size - 1 & MASK64}:
        found = guest_walk_flags(pv.memory, table, at) if pv.guest_address_ok(at) else None
        if found is None or found[1] & needed != needed:
            raise _PageFault(at, (2 if write else 0) | (0 if found is None else 1))


def _string_io(pv: PvVcpu, cpu: Cpu, instruction: Instruction, rip: int) -> bool:
    gpr = cpu.gpr
    size = MemorySizeExt.size(instruction.memory_size)
    port = gpr[RDX] & 0xFFFF
    reads = instruction.mnemonic in (Mnemonic.INSB, Mnemonic.INSW, Mnemonic.INSD)
    operand = instruction.op0_kind if reads else instruction.op1_kind
    if operand not in (OpKind.MEMORY_ESRDI, OpKind.MEMORY_SEG_RSI) or not _port_allowed(pv, port, size):
        return False
    base = 0
    if not reads and instruction.memory_segment in (Register.FS, Register.GS):
        base = cpu.fs_base if instruction.memory_segment == Register.FS else cpu.gs_base
    repeated = instruction.has_rep_prefix or instruction.has_repne_prefix
    total = gpr[RCX] if repeated else 1
    count = min(total, _MAX_REP)
    step = -size if cpu.flags & 0x400 else size
    pointer = RDI if reads else RSI
    for _ in range(count):
        va = gpr[pointer] + base & MASK64
        _check_operand(pv, va, size, reads)
        if reads:
            pv.write(va, _port_read(pv, port, size).to_bytes(size, "little"))
        else:
            _port_write(pv, port, size, int.from_bytes(pv.read(va, size), "little"))
        gpr[pointer] = gpr[pointer] + step & MASK64
        if repeated:
            gpr[RCX] -= 1
    if total > count:
        raise _Restart
    return True


def _interrupt_flag(pv: PvVcpu, cpu: Cpu, instruction: Instruction, rip: int) -> bool:
    # CLI and STI with enough IOPL do nothing: the real flag is never the guest's (its mask is in vcpu_info).
    return pv.iopl >= (1 if pv.kernel_mode else 3)


# --- control and debug registers ---------------------------------------------------------------------


def _mov(pv: PvVcpu, cpu: Cpu, instruction: Instruction, rip: int) -> bool:
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


def _gpr(register: int) -> int:
    return int(RegisterExt.number(register))  # type: ignore[arg-type]  # iced-x86's stubs take a module for the type


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
        return _new_root(pv, value >> 12)
    if number == 4:
        if (value ^ pv.guest_cr4) & ~_CR4_WRITABLE:
            pv.hypervisor.log.guest_printk(
                pv.domain.domid, f"{pv.vcpu} tried to change reserved or host bits of CR4 to {value:#x}")
        pv.guest_cr4 = guest_cr4(pv, value)
        return True
    return False


def guest_cr4(pv: PvVcpu, value: int) -> int:
    """pv_guest_cr4_fixup(): what of ``value`` a guest may have in its CR4."""
    return pv.guest_cr4 & ~_CR4_WRITABLE | value & _CR4_WRITABLE


def _new_root(pv: PvVcpu, mfn: int) -> bool:
    """new_guest_cr3(), a slice of it; a root that takes longer to validate has the instruction executed again."""
    frames = pv.hypervisor.frames
    frames.lock.acquire()
    try:
        frames.start_budget()
        rc = switch_guest_table(pv, mfn) if frames.put_deferred(pv.domain.domid) else -ERESTART
    finally:
        frames.release()
    if rc == -ERESTART:
        raise _Restart
    return not rc


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
    cpu = pv.live_cpu
    if cpu is not None:
        cpu.set_debug_register(number, value)
    return True


def _clts(pv: PvVcpu, cpu: Cpu, instruction: Instruction, rip: int) -> bool:
    if not pv.kernel_mode:
        return False
    set_task_switched(pv, cpu, False)
    return True


def _lmsw(pv: PvVcpu, cpu: Cpu, instruction: Instruction, rip: int) -> bool:
    if not pv.kernel_mode or instruction.op0_kind != OpKind.REGISTER:
        return False
    value = cpu.gpr[_gpr(instruction.op0_register)]
    return write_cr(pv, cpu, 0, _CR0_GUEST & ~0xF | value & 0xF)


def _nothing_in_kernel(pv: PvVcpu, cpu: Cpu, instruction: Instruction, rip: int) -> bool:
    return pv.kernel_mode


def _invlpg(pv: PvVcpu, cpu: Cpu, instruction: Instruction, rip: int) -> bool:
    if not pv.kernel_mode:
        return False
    pv.flush_tlb_page(effective_address(cpu, instruction, rip))
    return True


def effective_address(cpu: Cpu, instruction: Instruction, rip: int) -> int:
    """Linear address of a memory operand, decoded as if the instruction, which is at ``rip``, were at address 0."""
    base = instruction.memory_base
    value = instruction.memory_displacement
    gpr = cpu.gpr
    if base in (Register.RIP, Register.EIP):
        value += rip
    elif base != Register.NONE:
        value += gpr[_gpr(base)]
    if instruction.memory_index != Register.NONE:
        value += gpr[_gpr(instruction.memory_index)] * instruction.memory_index_scale
    if RegisterExt.is_gpr32(base) or RegisterExt.is_gpr32(instruction.memory_index) or base == Register.EIP:
        value &= 0xFFFFFFFF
    segment = instruction.memory_segment
    if segment == Register.FS:
        value += cpu.fs_base
    elif segment == Register.GS:
        value += cpu.gs_base
    return value & MASK64


# --- MSRs, CPUID, XGETBV --------------------------------------------------------------------------------


def _rdmsr(pv: PvVcpu, cpu: Cpu, instruction: Instruction, rip: int) -> bool:
    if not pv.kernel_mode:
        return False
    value = msr.read(pv, cpu, cpu.gpr[RCX] & 0xFFFFFFFF)
    if value is None:
        return False
    cpu.gpr[RAX] = value & 0xFFFFFFFF
    cpu.gpr[RDX] = value >> 32
    return True


def _wrmsr(pv: PvVcpu, cpu: Cpu, instruction: Instruction, rip: int) -> bool:
    if not pv.kernel_mode:
        return False
    gpr = cpu.gpr
    return msr.write(pv, cpu, gpr[RCX] & 0xFFFFFFFF, (gpr[RDX] & 0xFFFFFFFF) << 32 | gpr[RAX] & 0xFFFFFFFF)


def _sysenter(pv: PvVcpu, cpu: Cpu, instruction: Instruction, rip: int) -> bool:
    """sysenter_entry in entry.S: the frame shows RIP 0, a null CS and RSP 0, for the instruction keeps none of them."""
    if pv.kernel_mode or not pv.sysenter_callback:
        return False
    gpr, flags = cpu.gpr, cpu.flags
    gpr[RSP] = 0
    cpu.set_selector(Seg.CS, 3)
    cpu.set_selector(Seg.SS, FLAT_RING3_SS32)
    raise _Sysenter(pv.bounce(pv.sysenter_callback, 0, flags, None, pv.sysenter_masks_events))


_HANDLERS: Final[dict[int, Handler]] = {
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
    Mnemonic.SYSENTER: _sysenter,
}
