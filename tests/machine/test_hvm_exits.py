# SPDX-License-Identifier: GPL-2.0-only
"""What of a guest under nested paging reaches the hypervisor, and what it is told."""

from __future__ import annotations

import pytest

from pyxen.machine.cpu.base import R11, RAX, RBX, RCX, RDI, RDX, RIP, RSI, RSP, Exit, Seg, Segment
from tests.machine import hvm_programs as programs
from tests.machine.hvm_support import (
    CODE,
    DATA,
    DEVICE,
    GUEST,
    KERNEL_CS,
    KERNEL_DS,
    NESTED_ROOT,
    NX,
    PWU,
    STACK_TOP,
    TABLES,
    TSS,
    USER_CS32,
    HvmMachine,
    P,
    U,
)
from tests.machine.support import Kicker

pytestmark = pytest.mark.engine


@pytest.mark.parametrize(("program", "length"), [(programs.STOP, 5), (programs.VMMCALL, 5), (programs.VMCALL_REX, 6)])
@pytest.mark.parametrize("cpl", [0, 3])
def test_hypercall(nested: HvmMachine, program: bytes, length: int, cpl: int) -> None:
    assert nested.run(program, cpl=cpl) is Exit.STOP
    assert nested.rec.exits == [("hypercall", CODE + length)]


def test_hypercall_with_a_prefix_that_it_must_not_have(nested: HvmMachine) -> None:
    assert nested.run(programs.VMCALL_REP) is Exit.STOP
    assert [f.vector for f in nested.rec.frames] == [6]


@pytest.mark.parametrize("name", ["VMRUN", "VMLOAD", "VMSAVE", "STGI", "CLGI", "SKINIT", "INVLPGA", "RSM", "MONITOR",
                                  "MWAIT", "XSETBV", "RDPMC"])
@pytest.mark.parametrize("cpl", [0, 3])
def test_nobody_may_execute_these(nested: HvmMachine, name: str, cpl: int) -> None:
    assert nested.run(getattr(programs, name), cpl=cpl) is Exit.STOP
    (frame,) = nested.rec.frames
    assert frame.vector in ((6,) if cpl == 0 else (6, 13))


def test_halt_and_pause(nested: HvmMachine) -> None:
    cpu = nested.begin(programs.HALT)
    assert nested.go() is Exit.STOP and nested.rec.exits == [("halt", CODE + 1)] and cpu.gpr[RIP] == CODE + 1
    cpu.unload()
    nested.rec.exits.clear()
    cpu = nested.begin(programs.PAUSES)
    assert nested.go() is Exit.STOP and nested.rec.kinds == ["hypercall"]
    cpu.unload()
    nested.rec.exits.clear()
    cpu = nested.begin(programs.PAUSES)
    cpu.set_pause_exits(True)
    assert nested.go() is Exit.STOP
    assert nested.rec.exits[:2] == [("pause", CODE + 2), ("pause", CODE + 4)]


def test_pause_exits_of_a_pv_guest(nested: HvmMachine) -> None:
    nested.start(programs.PV_PAUSES)
    cpu = nested.cpu
    cpu.set_pause_exits(True)
    nested.rec.on["pause"] = lambda next_rip: (cpu.stop() if cpu.gpr[RBX] == 5 else None, next_rip)[1]
    assert nested.go() is Exit.STOP
    assert nested.rec.exits == [("pause", CODE + 2)] * 6
    context = cpu.loaded
    assert context is not None
    cpu.unload()
    cpu.load(context)                                            # turned off
    cpu.kick()
    assert cpu.run(None) is Exit.KICK and len(nested.rec.exits) == 6


def test_cpuid(nested: HvmMachine) -> None:
    def cpuid(rip: int) -> int:
        assert rip == CODE
        nested.cpu.gpr[RAX] = 0x1234
        return rip

    nested.rec.on_cpuid = cpuid
    assert nested.run(programs.CPUID) is Exit.STOP
    assert nested.cpu.gpr[RSI] == 0x1234


def test_time_stamps_and_caches_do_not_leave(nested: HvmMachine) -> None:
    """RDTSC, RDTSCP (with TSC_AUX), INVLPG and WBINVD."""
    cpu = nested.begin(programs.RDTSC)
    cpu.set_msr(0xc0000103, 0x17)
    assert nested.go() is Exit.STOP
    assert nested.rec.kinds == ["hypercall"] and cpu.gpr[RSI] == 0x17 and cpu.gpr[RBX] < 1 << 31


# --- MSRs ------------------------------------------------------------------------------------------------------------

def test_native_msrs_do_not_leave(nested: HvmMachine) -> None:
    for number in sorted(nested.cpu.native_msrs):
        nested.rec.exits.clear()
        cpu = nested.begin(programs.WRMSR_RDMSR)
        value = 0x5678 if number == 0x174 else 0x7ffe_1234_5678
        cpu.gpr[RCX], cpu.gpr[RAX], cpu.gpr[RDX] = number, value & 0xffffffff, value >> 32
        assert nested.go() is Exit.STOP
        assert nested.rec.kinds == ["hypercall"], hex(number)
        assert cpu.gpr[RBX] | cpu.gpr[RSI] << 32 == value == cpu.get_msr(number)
        cpu.set_msr(number, 0x21)
        context = cpu.loaded
        cpu.unload()
        assert context.get_hvm().msrs[number] == 0x21


@pytest.mark.parametrize("number", [0xc0000082, 0xc0000083, 0xc0000100, 0xc0000101, 0xc0000102, 0x175, 0x176])
@pytest.mark.parametrize(("value", "refused"), [
    (0x0000_8000_0000_0000, True), (0xffff_7fff_ffff_ffff, True), (0x8000_0000_0000_0000, True),
    (0xffff_8000_0000_0000, False), (0x0000_7fff_ffff_ffff, False)])
def test_non_canonical_addresses(nested: HvmMachine, number: int, value: int, refused: bool) -> None:
    cpu = nested.begin(programs.WRMSR)
    cpu.gpr[RCX], cpu.gpr[RAX], cpu.gpr[RDX] = number, value & 0xffffffff, value >> 32
    assert nested.go() is Exit.STOP
    assert [(f.vector, f.error_code, f.rip) for f in nested.rec.frames] == ([(13, 0, CODE)] if refused else [])


@pytest.mark.parametrize("number", [0x1b, 0x10, 0x8b, 0x277, 0xc0000080, 0xc0010117, 0x40000000, 0xffffffff, 0x2000])
def test_other_msrs_leave(nested: HvmMachine, number: int) -> None:
    cpu = nested.begin(programs.RDMSR)
    cpu.gpr[RCX] = number | 0x1234 << 32
    assert nested.go() is Exit.STOP
    assert nested.rec.exits[0] == ("read_msr", number)
    assert (cpu.gpr[RBX], cpu.gpr[RSI]) == (0x55667788, 0x11223344)
    nested.rec.exits.clear()
    cpu = nested.begin(programs.WRMSR)
    cpu.gpr[RCX], cpu.gpr[RAX], cpu.gpr[RDX] = number, 0xffffffff_00000001, 0xffffffff_00000002
    assert nested.go() is Exit.STOP
    assert nested.rec.exits[0] == ("write_msr", number, 0x2_00000001)
    nested.rec.on.update(read_msr=lambda _n: None, write_msr=lambda _n, _v: False)
    for program in (programs.RDMSR, programs.WRMSR):
        nested.rec.frames.clear()
        nested.begin(program).gpr[RCX] = number
        assert nested.go() is Exit.STOP
        assert [(f.vector, f.error_code, f.rip) for f in nested.rec.frames] == [(13, 0, CODE)]


# --- control registers -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("program", "number", "value"), [
    (programs.MOV_CR0, 0, 0x80010033), (programs.MOV_CR4, 4, 0x6a0), (programs.MOV_CR8, 8, 9)])
def test_control_registers_leave(nested: HvmMachine, program: bytes, number: int, value: int) -> None:
    cpu = nested.begin(program)
    cpu.gpr[RAX] = value
    assert nested.go() is Exit.STOP
    assert nested.rec.exits[0] == ("write_cr", number, value) and nested.rec.kinds[-1] == "hypercall"
    assert cpu.get_cr(number) == value
    if number == 8:
        assert cpu.gpr[RBX] == 9
    nested.rec.on["write_cr"] = lambda _n, _v: False
    cpu = nested.begin(program)
    cpu.gpr[RAX] = 1 << 63
    assert nested.go() is Exit.STOP
    assert [(f.vector, f.error_code, f.rip) for f in nested.rec.frames] == [(13, 0, CODE)]


def test_clts_lmsw_and_cr3(nested: HvmMachine) -> None:
    cpu = nested.begin(programs.CLTS)
    cpu.set_cr(0, 0x80010039)
    assert nested.go() is Exit.STOP
    assert nested.rec.exits == [("write_cr", 0, 0x80010031), ("hypercall", CODE + 7)]
    nested.rec.exits.clear()
    cpu = nested.begin(programs.LMSW)
    nested.write(DATA, b"\x0e\0")
    cpu.gpr[RSI] = DATA
    assert nested.go() is Exit.STOP
    assert nested.rec.exits == [("write_cr", 0, 0x8001001f), ("hypercall", CODE + 8)]
    nested.rec.exits.clear()
    cpu = nested.begin(programs.MOV_CR3)
    assert nested.go() is Exit.STOP
    assert nested.rec.kinds == ["hypercall"] and cpu.gpr[RBX] == 0x80010011


def test_a_guest_enters_long_mode(nested: HvmMachine) -> None:
    """As a PVH kernel does: from flat 32-bit mode by PAE, CR3, EFER.LME and CR0.PG to a far jump."""
    cpu = nested.begin(programs.LONG_MODE_SWITCH, "flat")
    nested.identity("64")
    nested.write(0x18038, (0x00af9b000000ffff).to_bytes(8, "little"))
    nested.write(0x1080, programs.STOP)

    def write_cr(number: int, value: int) -> bool:
        if number == 0 and value >> 31 and cpu.get_efer() & 0x100:
            cpu.set_cr(0, value)
            assert cpu.get_efer() == 0x500
        else:
            cpu.set_cr(number, value)
        return True

    def write_msr(number: int, value: int) -> bool:
        assert number == 0xc0000080
        cpu.set_efer(value)
        return True

    nested.rec.on.update(write_cr=write_cr, write_msr=write_msr, read_msr=lambda _n: cpu.get_efer())
    assert nested.go() is Exit.STOP
    assert nested.rec.exits[-1] == ("hypercall", 0x1085)
    assert cpu.selector(Seg.CS) == 0x38 and cpu.segment(Seg.CS).attributes == 0xa09b


# --- SYSCALL and its like --------------------------------------------------------------------------------------------

def _with_msrs(nested: HvmMachine, program: bytes, mode: str = "64", cpl: int = 3, efer: int = 0xd01,
               **msrs: int) -> None:
    nested.write(CODE, program)
    context = nested.context(mode, cpl=cpl)
    r = context.get_hvm()
    if mode == "64":
        r.efer = efer
    r.msrs.update({0xc0000081: 0x001b_0008 << 32, 0xc0000082: 0x2000, 0xc0000083: 0x2100, 0xc0000084: 0x47700,
                   0x174: KERNEL_CS, 0x175: 0xa000, 0x176: 0x2000})
    r.msrs.update({int(name[1:], 16): value for name, value in msrs.items()})
    context.put_hvm(r)
    nested.cpu.load(context)


def test_syscall_and_sysret(nested: HvmMachine) -> None:
    _with_msrs(nested, programs.SYSCALL)
    cpu = nested.cpu
    cpu.flags = 0x40246                                          # AC IF ZF PF
    nested.write(0x2000, programs.SYSRET)
    nested.rec.on["hypercall"] = lambda next_rip: (cpu.stop(), next_rip)[1]
    assert nested.go() is Exit.STOP
    # back at CPL 3 behind the SYSCALL; STC came before it
    assert (cpu.cpl(), cpu.gpr[RCX], cpu.gpr[RBX]) == (3, CODE + 3, 0x55)
    assert cpu.gpr[R11] == 0x40247 and cpu.flags & 0x40fff == 0x40247
    assert (cpu.selector(Seg.CS), cpu.selector(Seg.SS)) == (0x2b, 0x23)
    assert cpu.segment(Seg.CS).attributes == 0xa0fb


def test_syscall_enters_with_masked_flags(nested: HvmMachine) -> None:
    _with_msrs(nested, programs.SYSCALL)
    nested.write(0x2000, programs.STOP)
    nested.cpu.flags = 0x40646                                   # AC DF IF ZF PF
    assert nested.go() is Exit.STOP
    cpu = nested.cpu
    assert (cpu.cpl(), cpu.selector(Seg.CS), cpu.selector(Seg.SS)) == (0, KERNEL_CS, KERNEL_DS)
    assert cpu.flags & 0x40700 == 0 and nested.rec.exits == [("hypercall", 0x2005)]
    assert cpu.gpr[R11] & 0x40fff == 0x40647


def test_syscall_without_sce_or_long_mode(nested: HvmMachine) -> None:
    _with_msrs(nested, programs.SYSCALL, efer=0xd00)
    assert nested.go() is Exit.STOP
    _with_msrs(nested, programs.SYSCALL, mode="32")
    assert nested.go() is Exit.STOP
    assert [(f.vector, f.rip) for f in nested.rec.frames] == [(6, CODE + 1)] * 2


def test_sysret_to_a_non_canonical_address(nested: HvmMachine) -> None:
    """On Intel's CPUs it is the SYSRET that faults, in ring 0: what CVE-2012-0217 is about."""
    _with_msrs(nested, programs.SYSRET, cpl=0)
    nested.cpu.gpr[RCX], nested.cpu.gpr[R11] = 1 << 47, 0x30202
    assert nested.go() is Exit.STOP
    assert [(f.vector, f.error_code, f.rip, f.cs) for f in nested.rec.frames] == [(13, 0, CODE, KERNEL_CS)]


def test_sysret_ignores_vm_and_rf(nested: HvmMachine) -> None:
    _with_msrs(nested, programs.SYSRET, cpl=0)
    nested.cpu.gpr[RCX], nested.cpu.gpr[R11] = 0x2000, 0x33202
    nested.write(0x2000, programs.STOP)
    assert nested.go() is Exit.STOP
    assert nested.cpu.cpl() == 3 and nested.cpu.flags & 0x33202 == 0x3202


def test_sysenter_and_sysexit(nested: HvmMachine) -> None:
    _with_msrs(nested, programs.SYSENTER32, mode="32")
    nested.write(0x2000, programs.SYSEXIT32)
    nested.write(0x1100, programs.STOP)
    nested.cpu.flags = 0x202
    assert nested.go() is Exit.STOP
    cpu = nested.cpu
    assert (cpu.cpl(), cpu.gpr[RSP], cpu.selector(Seg.CS)) == (3, STACK_TOP, KERNEL_CS + 16 | 3)
    assert cpu.flags & 0x200 == 0 and nested.rec.exits == [("hypercall", 0x1105)]
    _with_msrs(nested, programs.SYSENTER32, mode="32", _174=0)
    assert nested.go() is Exit.STOP
    assert [(f.vector, f.error_code, f.rip) for f in nested.rec.frames] == [(13, 0, CODE + 7)]


def test_sysenter_from_compatibility_mode(nested: HvmMachine) -> None:
    _with_msrs(nested, programs.SYSENTER32, mode="64")
    nested.write(0x2000, programs.STOP)
    context = nested.cpu.loaded
    nested.cpu.unload()
    r = context.get_hvm()
    r.segments[Seg.CS].selector, r.segments[Seg.CS].attributes = USER_CS32, 0xc0fb
    r.msrs[0x175] = 0xffff_8000_0000_a000
    context.put_hvm(r)
    nested.cpu.load(context)
    assert nested.go() is Exit.STOP
    assert nested.cpu.cpl() == 0 and nested.cpu.segment(Seg.CS).attributes == 0xa09b
    assert nested.cpu.gpr[RSP] == 0xffff_8000_0000_a000


# --- ports -----------------------------------------------------------------------------------------------------------

def test_ports(nested: HvmMachine) -> None:
    nested.rec.on["io_read"] = lambda port, size: {0x42: 0x1ff, 0x3f8: 0xaabbccdd}[port]
    cpu = nested.begin(programs.IN_OUT)
    assert nested.go() is Exit.STOP
    assert nested.rec.exits[:4] == [("io_read", 0x42, 1), ("io_write", 0x3f8, 2, 0xff), ("io_read", 0x3f8, 4),
                                    ("io_write", 0x80, 1, 0xdd)]
    assert (cpu.gpr[RBX], cpu.gpr[RSI]) == (0xff, 0xaabbccdd)


def test_string_ports(nested: HvmMachine) -> None:
    cpu = nested.begin(programs.REP_OUTS)
    nested.write(DATA, b"xyz")
    cpu.gpr[RSI], cpu.gpr[RCX], cpu.gpr[RDX] = DATA, 3, 0xe9
    assert nested.go() is Exit.STOP
    assert nested.rec.exits[:3] == [("io_write", 0xe9, 1, ord(c)) for c in "xyz"]
    assert (cpu.gpr[RSI], cpu.gpr[RCX]) == (DATA + 3, 0)
    nested.rec.exits.clear()
    cpu = nested.begin(programs.REP_INS)
    cpu.gpr[RDI], cpu.gpr[RCX], cpu.gpr[RDX] = DATA, 2, 0xcf8
    assert nested.go() is Exit.STOP
    assert nested.rec.exits[:2] == [("io_read", 0xcf8, 4)] * 2 and nested.q(DATA) == 0x11223344_11223344


@pytest.mark.parametrize("allowed", ["iopl", "bitmap", "no bitmap", "denied", "half"])
def test_port_permission(nested: HvmMachine, allowed: str) -> None:
    nested.write(CODE, programs.IN_OUT)
    context = nested.context(cpl=3)
    r = context.get_hvm()
    if allowed != "no bitmap":
        r.tr.limit = 0x67 + 0x81
    context.put_hvm(r)
    nested.write(TSS + 0x66, (0x68).to_bytes(2, "little"))
    bits = bytearray(0x80 if allowed == "bitmap" else b"\xff" * 0x80)
    if allowed == "half":
        bits[0x42 >> 3] = bits[0x10] = 0
        bits[0x3f8 >> 3] = 2                                     # the second byte of a 16-bit access
    nested.write(TSS + 0x68, bytes(bits) + b"\xff")
    nested.cpu.load(context)
    if allowed == "iopl":
        nested.cpu.flags = 0x3202
    assert nested.go() is Exit.STOP
    if allowed in ("iopl", "bitmap"):
        assert nested.rec.kinds == ["io_read", "io_write", "io_read", "io_write", "hypercall"]
        return
    (frame,) = nested.rec.frames
    assert (frame.vector, frame.error_code) == (13, 0)
    assert frame.rip == (CODE + 8 if allowed == "half" else CODE)
    assert nested.rec.kinds == (["io_read"] if allowed == "half" else [])


# --- interrupts ------------------------------------------------------------------------------------------------------

def _inject_once(nested: HvmMachine, vector: int) -> None:
    cpu = nested.cpu

    def window(rip: int) -> int:
        cpu.request_interrupt_window(False)
        cpu.inject_interrupt(vector)
        return rip

    nested.rec.on["interrupt_window"] = window
    cpu.request_interrupt_window(True)


def test_interrupt_into_a_running_guest(nested: HvmMachine) -> None:
    cpu = nested.begin(programs.STI_SPIN)
    _inject_once(nested, 0x41)
    assert nested.go() is Exit.STOP
    (frame,) = nested.rec.frames
    assert (frame.vector, frame.error_code) == (0x41, None) and frame.flags & 0x200
    assert not cpu.flags & 0x200                                 # an interrupt gate


def test_interrupt_shadow_of_sti(nested: HvmMachine) -> None:
    nested.begin(programs.STI_SHADOW)
    _inject_once(nested, 0x41)
    assert nested.go() is Exit.STOP
    assert [f.rip for f in nested.rec.frames] == [CODE + 2]


def test_interrupt_shadow_of_mov_ss(nested: HvmMachine) -> None:
    """The request comes one instruction before; the one behind MOV SS is still executed."""
    nested.begin(programs.MOV_SS_SHADOW).flags = 0x202
    nested.rec.on["io_write"] = lambda *_: _inject_once(nested, 0x41)
    assert nested.go() is Exit.STOP
    assert [f.rip for f in nested.rec.frames] == [CODE + 7]


def test_an_interrupt_before_a_run(nested: HvmMachine) -> None:
    """What waits, an interrupt shadow and IF decide whether there can be one; it needs no window."""
    cpu = nested.begin(programs.STI_SHADOW)
    assert not cpu.interruptible()                               # IF is clear
    nested.rec.on["halt"] = lambda next_rip: next_rip
    cpu.flags = 0x202
    assert cpu.interruptible()
    cpu.inject_nmi()
    assert not cpu.interruptible()
    cpu.load(nested.context())
    cpu.flags = 0x202
    cpu.inject_interrupt(0x41)
    assert not cpu.interruptible()                               # that one waits
    nested.write(CODE, programs.STI_SPIN)
    cpu.gpr[RIP] = CODE
    assert nested.go() is Exit.STOP
    (frame,) = nested.rec.frames
    assert (frame.vector, frame.rip) == (0x41, CODE)
    assert "interrupt_window" not in nested.rec.kinds


@pytest.mark.parametrize(("mode", "size"), [("64", 8), ("pae", 4), ("32", 4), ("flat", 4)])
def test_what_the_code_is(nested: HvmMachine, mode: str, size: int) -> None:
    cpu = nested.cpu
    context = nested.context(mode)
    cpu.load(context)
    assert cpu.code_bytes() == size
    cpu.unload()
    registers = context.get_hvm()
    registers.segments[1].attributes &= ~0x6000                  # L and D clear: 16-bit code
    context.put_hvm(registers)
    cpu.load(context)
    assert cpu.code_bytes() == 2
    cpu.unload()
    if mode != "64":
        registers.flags |= 0x20000
        context.put_hvm(registers)
        cpu.load(context)
        assert cpu.code_bytes() == 1                             # virtual-8086 mode
        cpu.unload()
    registers.flags &= ~0x20000
    registers.cr0, registers.efer = 0x10, 0
    context.put_hvm(registers)
    cpu.load(context)
    assert cpu.code_bytes() == 0


def test_virtual_8086_mode_outlives_a_switch(nested: HvmMachine) -> None:
    """Another context is loaded in between; HLT is #GP there, and its frame has RFLAGS.VM."""
    cpu = nested.cpu
    nested.write(CODE, b"\x90\xf4")
    context, other = nested.context("32"), nested.context("32")
    registers = context.get_hvm()
    registers.flags |= 0x20000
    registers.segments = [Segment(CODE >> 4, CODE, 0xffff, 0xf3) for _ in range(6)]
    registers.gpr[RIP], registers.gpr[RSP] = 0, 0x100
    context.put_hvm(registers)
    cpu.load(context)
    cpu.load(other)
    cpu.load(context)
    assert cpu.code_bytes() == 1 and cpu.flags & 0x20000
    assert nested.go() is Exit.STOP
    (frame,) = nested.rec.frames
    assert (frame.vector, frame.error_code, frame.rip, frame.cs & 0xffff) == (13, 0, 1, CODE >> 4)
    assert frame.flags & 0x20000
    assert cpu.code_bytes() != 1 and not cpu.flags & 0x20000  # the handler is ordinary code


@pytest.mark.parametrize("change", [{"efer": 0xd01}, {"cr0": 0x10}])
def test_virtual_8086_mode_is_dropped_where_there_is_none(nested: HvmMachine, change: dict[str, int]) -> None:
    context = nested.context("64" if "efer" in change else "flat")
    registers = context.get_hvm()
    for name, value in change.items():
        setattr(registers, name, value)
    registers.flags |= 0x20000
    context.put_hvm(registers)
    assert context.get_hvm().flags & 0x20000 == 0
    nested.cpu.load(context)
    assert nested.cpu.code_bytes() != 1


def test_sti_hlt_with_an_interrupt_waiting(nested: HvmMachine) -> None:
    """The window opens behind the HLT, at once: the HLT counts as executed."""
    nested.begin(programs.STI_HALT)
    _inject_once(nested, 0x41)
    nested.rec.on["halt"] = lambda next_rip: next_rip
    assert nested.go() is Exit.STOP
    assert nested.rec.kinds == ["halt", "interrupt_window"]
    assert [f.rip for f in nested.rec.frames] == [CODE + 2]


def test_nmi_is_blocked_until_iret(nested: HvmMachine) -> None:
    cpu = nested.begin(programs.NMI_SPIN)
    vectors: list[int] = []

    def handler(frame: object, next_rip: int) -> int:
        vectors.append(frame.vector)  # type: ignore[attr-defined]
        if len(vectors) < 4:
            cpu.inject_nmi()
            assert len(vectors) == len(nested.rec.frames)
        else:
            cpu.stop()
        return next_rip

    nested.rec.on["frame"] = handler
    cpu.inject_nmi()
    assert nested.go() is Exit.STOP
    assert vectors == [2] * 4
    assert all(f.rip in (CODE, CODE + 3) and f.cs == KERNEL_CS for f in nested.rec.frames), nested.rec.frames


def test_a_request_belongs_to_its_context(nested: HvmMachine) -> None:
    cpu = nested.begin(programs.STI_SPIN)
    _inject_once(nested, 0x41)
    first = cpu.loaded
    other = nested.context()
    r = other.get_hvm()
    r.flags, r.gpr[RIP] = 0x202, 0x2000
    other.put_hvm(r)
    nested.write(0x2000, programs.STOP)
    cpu.load(other)
    assert nested.go() is Exit.STOP and nested.rec.kinds == ["hypercall"]
    cpu.load(first)
    assert nested.go() is Exit.STOP and [f.vector for f in nested.rec.frames] == [0x41]


# --- memory ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", ["flat", "32", "pae", "64"])
@pytest.mark.parametrize(("access", "flags", "code"), [
    ("load", None, 4), ("store", None, 6), ("store", P | U, 7), ("fetch", PWU | NX, 0x15), ("fetch", None, 0x14),
    ("load", PWU | 1 << 45, 0xd)])
def test_nested_fault(nested: HvmMachine, mode: str, access: str, flags: int | None, code: int) -> None:
    long = mode == "64"
    program = {"load": programs.LOAD if long else programs.LOAD32,
               "store": programs.STORE if long else programs.STORE32, "fetch": programs.CALL_RSI}[access]
    if access == "fetch" and not long:
        program = b"\xff\xd6" + programs.CALL_RSI[2:]
    cpu = nested.begin(program, mode)
    nested.write(0x20000, programs.RETURN_7)
    gpa = 0x20000
    nested.set_npte(gpa, 0 if flags is None else GUEST + gpa | flags)
    cpu.gpr[RSI] = gpa + (0 if access == "fetch" else 0x123)
    nested.rec.on["nested_fault"] = lambda gpa, _e, rip: (nested.grant(gpa), rip)[1]
    assert nested.go() is Exit.STOP
    assert nested.rec.exits[0] == ("nested_fault", cpu.gpr[RSI], code | 1 << 32, gpa if access == "fetch" else CODE)
    assert nested.rec.kinds == ["nested_fault", "hypercall"]


@pytest.mark.parametrize("flags", [None, P | U])
@pytest.mark.parametrize(("mode", "table"), [("32", 0x1000), ("pae", 0x3000), ("64", 0), ("64", 0x1000),
                                             ("64", 0x3000)])
def test_nested_fault_of_a_page_table(nested: HvmMachine, mode: str, table: int, flags: int | None) -> None:
    """The walk counts as a write, as on hardware, and names the entry's address."""
    nested.begin(programs.STOP, mode)
    gpa = TABLES + table
    nested.set_npte(gpa, 0 if flags is None else GUEST + gpa | flags)
    nested.rec.on["nested_fault"] = lambda gpa, _e, rip: (nested.grant(gpa), rip)[1]
    assert nested.go() is Exit.STOP
    name, at, code, rip = nested.rec.exits[0]
    assert (name, at & ~0xfff, code, rip) == ("nested_fault", gpa, (6 if flags is None else 7) | 1 << 33, CODE)
    assert nested.rec.kinds == ["nested_fault", "hypercall"]


def test_page_tables_in_no_execute_pages(nested: HvmMachine) -> None:
    """get_hphys was called with a null pointer for these, and wrote through it."""
    for mode in ("32", "pae", "64"):
        nested.rec.exits.clear()
        nested.begin(programs.STOP, mode)
        for page in range(6):
            nested.grant(TABLES + page * 0x1000, PWU | NX)
        assert nested.go() is Exit.STOP and nested.rec.kinds == ["hypercall"]


def test_large_nested_pages(nested: HvmMachine) -> None:
    nested.memory.q[(NESTED_ROOT + 0x2000 >> 3)] = GUEST | PWU | 0x80
    assert nested.run(programs.STOP) is Exit.STOP and nested.rec.kinds == ["hypercall"]


def test_another_root(nested: HvmMachine) -> None:
    """set_nested_root in an exit: the same code then sees other memory (altp2m)."""
    other = NESTED_ROOT + 0x20000
    nested.build_nested(other)
    nested.set_npte(DATA, GUEST + 0x30000 | PWU, other)
    nested.write(DATA, b"first...")
    nested.write(0x30000, b"second..")
    cpu = nested.begin(programs.LOAD)
    cpu.gpr[RSI] = DATA
    assert nested.go() is Exit.STOP and cpu.gpr[RBX].to_bytes(8, "little") == b"first..."
    cpu.set_nested_root(other)
    cpu.gpr[RIP] = CODE
    assert nested.go() is Exit.STOP and cpu.gpr[RBX].to_bytes(8, "little") == b"second.."
    context = cpu.loaded
    cpu.unload()
    context.set_nested_root(NESTED_ROOT)
    cpu.load(context)
    cpu.gpr[RIP] = CODE
    assert nested.go() is Exit.STOP and cpu.gpr[RBX].to_bytes(8, "little") == b"first..."


def test_self_modifying_code_through_another_mapping(nested: HvmMachine) -> None:
    """Nested pages that may not be executed and one that may, same frame."""
    nested.set_npte(0x20000, GUEST + 0x5000 | PWU | NX)
    nested.write(0x5000, programs.RETURN_IMMEDIATE)
    assert nested.run(programs.WRITE_CODE) is Exit.STOP
    assert nested.rec.kinds == ["hypercall"] and nested.cpu.gpr[RBX] == 1000


def test_mmio(nested: HvmMachine) -> None:
    cpu = nested.begin(programs.MMIO_MIX)
    cpu.gpr[RSI], cpu.gpr[RDX] = DEVICE, 0x1122334455667788
    assert nested.go() is Exit.STOP, cpu.error
    reads = [e[1:] for e in nested.rec.exits if e[0] == "mmio_read"]
    writes = [e[1:] for e in nested.rec.exits if e[0] == "mmio_write"]
    assert reads[:3] == [(1, 1), (2, 2), (4, 4)]
    assert {(8, 4), (12, 4), (16, 4), (20, 4), (24, 4), (28, 4)} <= set(reads)
    assert (4, 4, 0x8877665544332211 + 4 & 0xffffffff) in writes
    assert (8, 4, 0x55667788) in writes and (12, 4, 0x11223344) in writes
    assert (0x40, 4) in reads and (0x40, 4, (0x8877665544332211 + 0x40 & 0xffffffff) + 1) in writes
    assert (0x44, 4, 0x55667788) in writes
    assert (0xffc, 4) in reads and (0x1000, 4) in reads          # across two pages
    assert nested.read(DATA, 12) == b"".join((0x8877665544332211 + 0x80 + 4 * n & 0xffffffff).to_bytes(4, "little")
                                             for n in range(3))


def test_mmio_again_and_again(nested: HvmMachine) -> None:
    cpu = nested.begin(programs.MMIO_LOOP)
    cpu.gpr[RSI], cpu.gpr[RCX] = DEVICE, 3000
    with Kicker(cpu, 200e-6):
        assert nested.go() is Exit.STOP
    assert nested.rec.kinds == ["mmio_read", "mmio_write"] * 3000 + ["hypercall"]


def test_an_exception_in_a_callback_ends_the_run(nested: HvmMachine) -> None:
    def broken(*_: int) -> int:
        raise ValueError("broken")

    for name, program in (("mmio_read", programs.LOAD), ("mmio_write", programs.STORE), ("io_read", programs.IN_OUT),
                          ("read_msr", programs.RDMSR), ("hypercall", programs.STOP)):
        nested.rec.on = {name: broken}
        cpu = nested.begin(program)
        cpu.gpr[RSI], cpu.gpr[RCX] = DEVICE, 0x1b
        with pytest.raises(ValueError, match="broken"):
            nested.go()
        cpu.unload()
