# SPDX-License-Identifier: GPL-2.0-only
"""Guests under nested paging take their exceptions through their own IDT, natively."""

from __future__ import annotations

import struct

import pytest

from pyxen.machine.cpu.base import RBX, RCX, RIP, RSI, RSP, Exit, Seg
from tests.machine import hvm_programs as programs
from tests.machine.hvm_support import (
    CODE,
    HANDLERS,
    IDT,
    IST1_TOP,
    KERNEL_CS,
    NX,
    PWU,
    RING0_TOP,
    STACK_TOP,
    TABLES,
    TSS,
    Frame,
    HvmMachine,
    P,
    U,
    W,
)

pytestmark = pytest.mark.engine

MODES = ("flat", "32", "pae", "64")


@pytest.mark.parametrize("mode", MODES)
def test_undefined_instruction(nested: HvmMachine, mode: str) -> None:
    assert nested.run(programs.UD2, mode) is Exit.STOP
    (frame,) = nested.rec.frames
    assert (frame.vector, frame.error_code, frame.rip, frame.cs) == (6, None, CODE, KERNEL_CS)


@pytest.mark.parametrize("mode", MODES)
def test_a_handler_fixes_and_returns(nested: HvmMachine, mode: str) -> None:
    """#DE again and again (a second one must not become #DF), with ECX put right in the fourth."""
    frames = nested.rec.frames

    def fix(_frame: Frame, next_rip: int) -> int:
        if len(frames) == 4:
            nested.cpu.gpr[RCX] = 1
        return next_rip

    nested.rec.on["frame"] = fix
    assert nested.run(programs.DIVIDE, mode) is Exit.STOP
    assert [(f.vector, f.rip) for f in frames] == [(0, CODE + 2)] * 4
    assert nested.rec.kinds == ["hypercall"]


PAGE_FAULTS = [
    ("load", 0, 0), ("store", 0, 2), ("store", P | U, 3), ("load user", P | W, 5), ("store user", P | U, 7),
    ("fetch", PWU | NX, 0x11), ("load", PWU | 1 << 51, 9),
]


@pytest.mark.parametrize(("mode", "access", "entry", "error"), [
    (mode, *case) for mode in ("32", "pae", "64") for case in PAGE_FAULTS
    if not (mode == "32" and case[1] >> 32)  # 32-bit entries have no such bit
])
def test_page_fault(nested: HvmMachine, mode: str, access: str, entry: int, error: int) -> None:
    if mode == "pae" and entry & 1 << 51:
        entry |= 1 << 62
    user = access.endswith("user")
    program = {"l": programs.LOAD if mode == "64" else programs.LOAD32,
               "s": programs.STORE if mode == "64" else programs.STORE32, "f": programs.CALL_RSI}[access[0]]
    nested.write(CODE, program)
    context = nested.context(mode, cpl=3 if user else 0)
    if mode == "32":
        nested.write(TABLES + 0x1000 + 4 * (0x20000 >> 12), (0x20000 | entry if entry & 1 else 0).to_bytes(4, "little"))
    else:
        nested.set_pte64(0x20000, 0x20000 | entry if entry & 1 else 0)
    r = context.get_hvm()
    r.efer |= 0x800
    context.put_hvm(r)
    nested.cpu.load(context)
    nested.cpu.gpr[RSI] = 0x20000
    nested.cpu.set_cr(0, nested.cpu.get_cr(0) | 1 << 16)
    assert nested.go() is Exit.STOP
    (frame,) = nested.rec.frames
    assert (frame.vector, frame.error_code, frame.cr2) == (14, error, 0x20000)
    if access != "fetch":
        assert frame.rip == CODE
    assert frame.cs & 3 == (3 if user else 0)


@pytest.mark.parametrize("mode", MODES)
def test_general_protection_names_the_selector(nested: HvmMachine, mode: str) -> None:
    nested.begin(programs.LOAD_FS, mode).gpr[RBX] = 0x1234
    assert nested.go() is Exit.STOP
    assert [(f.vector, f.error_code, f.rip) for f in nested.rec.frames] == [(13, 0x1234, CODE)]


def test_non_canonical_address(nested: HvmMachine) -> None:
    nested.begin(programs.LOAD).gpr[RSI] = 1 << 63
    assert nested.go() is Exit.STOP
    assert [(f.vector, f.error_code, f.rip) for f in nested.rec.frames] == [(13, 0, CODE)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("program", "vector", "length"), [
    (programs.INT80, 0x80, 2), (programs.INT3, 3, 1)])
def test_software_interrupt_goes_through_its_gate(nested: HvmMachine, mode: str, program: bytes, vector: int,
                                                  length: int) -> None:
    nested.rec.on["frame"] = lambda _frame, next_rip: next_rip
    assert nested.run(program, mode, cpl=3) is Exit.STOP
    (frame,) = nested.rec.frames
    assert (frame.vector, frame.rip, frame.cs & 3) == (vector, CODE + length, 3)
    assert nested.rec.kinds == ["hypercall"] and nested.cpu.cpl() == 3          # and came back


def test_overflow(nested: HvmMachine) -> None:
    assert nested.run(programs.INTO, "32") is Exit.STOP
    assert [(f.vector, f.rip) for f in nested.rec.frames] == [(4, CODE + 5)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("program", "vector"), [(programs.INT81, 0x81), (programs.INT6, 6)])
def test_software_interrupt_of_too_low_privilege(nested: HvmMachine, mode: str, program: bytes, vector: int) -> None:
    """#GP names the gate, n * 8 + 2 in every mode, and is reported at the INT."""
    assert nested.run(program, mode, cpl=3) is Exit.STOP
    assert [(f.vector, f.error_code, f.rip) for f in nested.rec.frames] == [(13, vector * 8 + 2, CODE + 1)]


@pytest.mark.parametrize("mode", MODES)
def test_int6_from_ring0_is_no_undefined_instruction(nested: HvmMachine, mode: str) -> None:
    nested.rec.on["frame"] = lambda _frame, next_rip: next_rip
    assert nested.run(programs.INT6, mode) is Exit.STOP
    assert [(f.vector, f.rip) for f in nested.rec.frames] == [(6, CODE + 3)]
    assert nested.rec.kinds == ["hypercall"]


def test_exception_whose_gate_is_not_present(nested: HvmMachine) -> None:
    """#NP with EXT set, since it was no INT that needed the gate; in 32-bit mode too."""
    for mode, size in (("64", 16), ("flat", 8)):
        nested.rec.frames.clear()
        nested.begin(programs.UD2, mode)
        gate = bytearray(nested.read(IDT + 6 * size, 8))
        gate[5] &= 0x7f
        nested.write(IDT + 6 * size, bytes(gate))
        assert nested.go() is Exit.STOP
        assert [(f.vector, f.error_code, f.rip) for f in nested.rec.frames] == [(11, 6 * 8 + 3, CODE)]


def test_stack_switch_and_ist(nested: HvmMachine) -> None:
    assert nested.run(programs.UD2, cpl=3) is Exit.STOP
    assert nested.cpu.gpr[RSP] == RING0_TOP - 48 and nested.rec.frames[0].rsp == STACK_TOP
    assert nested.run(programs.UD2, ist={6: 1}) is Exit.STOP
    assert nested.cpu.gpr[RSP] == IST1_TOP - 48 and nested.rec.frames[1].rsp == STACK_TOP


@pytest.mark.parametrize("mode", ["64", "32"])
def test_double_fault(nested: HvmMachine, mode: str) -> None:
    """The stack is not present: #PF while #PF is delivered. In long mode the handler has a stack of its own."""
    nested.begin(programs.LOAD if mode == "64" else programs.LOAD32, mode, ist={8: 1})
    nested.cpu.gpr[RSI], nested.cpu.gpr[RSP] = 0x300000, 0x310000
    assert nested.go() is Exit.STOP
    if mode == "64":
        assert [(f.vector, f.error_code, f.rip) for f in nested.rec.frames] == [(8, 0, CODE)]
        assert nested.rec.frames[0].rsp == 0x310000
    else:
        assert nested.rec.kinds == ["triple_fault"]


def test_page_fault_after_a_benign_exception_is_just_that(nested: HvmMachine) -> None:
    nested.begin(programs.UD2, ist={14: 1}).gpr[RSP] = 0x310000
    assert nested.go() is Exit.STOP
    assert [(f.vector, f.error_code, f.cr2) for f in nested.rec.frames] == [(14, 2, 0x30fff8)]


@pytest.mark.parametrize("mode", MODES)
def test_triple_fault(nested: HvmMachine, mode: str) -> None:
    context = nested.context(mode)
    nested.write(CODE, programs.UD2)
    r = context.get_hvm()
    r.idtr = (IDT, 0)
    context.put_hvm(r)
    nested.cpu.load(context)
    assert nested.go() is Exit.STOP
    assert nested.rec.exits == [("triple_fault", CODE)]
    nested.cpu.unload()
    assert nested.run(programs.STOP, mode) is Exit.STOP and nested.rec.kinds[-1] == "hypercall"


def test_single_step(nested: HvmMachine) -> None:
    nested.rec.on["frame"] = lambda _frame, next_rip: next_rip
    assert nested.run(programs.TRAP_FLAG) is Exit.STOP
    starts = [f.rip - CODE for f in nested.rec.frames]
    # behind the instruction after POPF, and so on; a hypercall behind the last
    assert [f.vector for f in nested.rec.frames] == [1] * len(starts)
    assert starts == [0xa, 0xb, 0xd], starts
    del nested.rec.on["frame"]                           # and one behind the hypercall, which others executed
    assert nested.go() is Exit.STOP
    assert (nested.rec.frames[-1].vector, nested.rec.frames[-1].rip) == (1, CODE + 0x10)
    assert nested.cpu.get_debug_register(6) & 1 << 14


@pytest.mark.parametrize("mode", MODES)
def test_int1_is_a_debug_trap(nested: HvmMachine, mode: str) -> None:
    """Of any privilege, whatever the gate's."""
    nested.rec.on["frame"] = lambda _frame, next_rip: next_rip
    assert nested.run(programs.INT1, mode, cpl=3) is Exit.STOP
    assert [(f.vector, f.rip) for f in nested.rec.frames] == [(1, CODE + 1)] and nested.rec.kinds == ["hypercall"]


def test_instruction_breakpoint(nested: HvmMachine) -> None:
    """In the context it was set in only; a #DB before the instruction, which RF lets through."""
    def resume(frame: Frame, next_rip: int) -> int:
        at = nested.cpu.gpr[RSP] + 8 + 16                                # the saved RFLAGS
        nested.write(at, (frame.flags | 1 << 16).to_bytes(8, "little"))
        return next_rip

    nested.rec.on["frame"] = resume
    cpu = nested.begin(programs.STOP)
    cpu.set_debug_register(0, CODE + 2)
    cpu.set_debug_register(7, 0x401)
    context = cpu.loaded
    cpu.unload()
    assert nested.run(programs.STOP) is Exit.STOP and not nested.rec.frames
    cpu.load(context)
    assert nested.go() is Exit.STOP
    assert [(f.vector, f.rip) for f in nested.rec.frames] == [(1, CODE + 2)]
    assert cpu.get_debug_register(6) & 0xf == 1 and cpu.gpr[RIP] == CODE + 5


@pytest.mark.parametrize("page", ["stack", "idt", "tss", "gdt", "handler"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("event", ["fault", "int", "trap", "interrupt", "nmi", "injected"])
def test_nested_fault_in_a_delivery(nested: HvmMachine, mode: str, page: str, event: str) -> None:
    """The event waits until the page is there, and arrives once."""
    if event == "int":
        program = programs.INT80
    elif event == "trap":
        program = programs.TRAP_FLAG if mode == "64" else programs.INT3
    elif event == "fault":
        program = programs.UD2
    else:
        program = programs.SPIN
    cpu = nested.begin(program, mode, cpl=3 if event != "trap" else 0)
    if event in ("interrupt", "nmi"):
        cpu.flags = 0x202
    missing = {"stack": (STACK_TOP if event == "trap" else RING0_TOP) - 8, "idt": IDT, "tss": TSS,
               "gdt": 0x18000, "handler": HANDLERS}[page] & ~0xfff
    pages = [missing, 0x3000, 0x4000] if page == "handler" else [missing]
    if page == "stack" and event == "trap" and mode == "64":
        pages = []                                       # the program's PUSHF would fault first
    for gpa in pages:
        nested.set_npte(gpa, 0)
    faults: list[tuple[int, int]] = []

    def grant(gpa: int, error: int, rip: int) -> int:
        faults.append((gpa, error))
        nested.grant(gpa)
        return rip

    nested.rec.on["nested_fault"] = grant
    if event == "interrupt":
        nested.rec.on["interrupt_window"] = lambda rip: (cpu.request_interrupt_window(False),
                                                         cpu.inject_interrupt(0x31), rip)[-1]
        cpu.request_interrupt_window(True)
    elif event == "nmi":
        cpu.inject_nmi()
    elif event == "injected":
        cpu.inject_exception(13, 0x1230)
    assert nested.go() is Exit.STOP
    vector = {"fault": 6, "int": 0x80, "interrupt": 0x31, "nmi": 2, "injected": 13}.get(event)
    if event == "trap":
        vector = 1 if mode == "64" else 3
    (frame,) = nested.rec.frames
    assert frame.vector == vector
    if event == "injected":
        assert frame.error_code == 0x1230
    if event == "int":
        assert frame.rip == CODE + 2
    elif event == "fault":
        assert frame.rip == CODE
    elif event == "trap":
        assert frame.rip == (CODE + 0xa if mode == "64" else CODE + 1)
    assert len(faults) <= len(pages) and all(error >> 32 == 1 for _, error in faults)
    if page in ("idt", "gdt", "handler") or (page == "stack" and event != "trap"):
        assert faults and faults[0][0] & ~0xfff in pages


def test_thousands_of_nested_faults_in_deliveries(nested: HvmMachine) -> None:
    """Each INT3 finds its stack page gone; nothing is lost, nothing comes twice."""
    count = 2000
    cpu = nested.begin(programs.PUSH_LOOP)
    cpu.gpr[RCX] = count
    seen: list[Frame] = nested.rec.frames

    def handler(_frame: Frame, next_rip: int) -> int:
        nested.set_npte(STACK_TOP - 8, 0)
        cpu.flush_tlb()
        return next_rip

    def grant(gpa: int, _error: int, rip: int) -> int:
        nested.grant(gpa)
        return rip

    nested.rec.on.update(frame=handler, nested_fault=grant)
    assert nested.go() is Exit.STOP
    assert len(seen) == count == cpu.gpr[RBX]
    assert nested.rec.kinds.count("nested_fault") >= count - 1


def test_injected_exception_meets_one_in_flight(nested: HvmMachine) -> None:
    """A #PF's delivery hits a nested fault, whose handler makes the guest take #GP: together a double fault."""
    cpu = nested.begin(programs.LOAD, ist={8: 1})
    cpu.gpr[RSI] = 0x300000
    nested.set_npte(STACK_TOP - 8, 0)

    def inject(gpa: int, _error: int, rip: int) -> int:
        nested.grant(gpa)
        cpu.inject_exception(13, 0)
        return rip

    nested.rec.on["nested_fault"] = inject
    assert nested.go() is Exit.STOP
    assert [(f.vector, f.error_code) for f in nested.rec.frames] == [(8, 0)]


def test_injected_exception_sees_its_address_and_code(nested: HvmMachine) -> None:
    def handler(next_rip: int) -> int:
        nested.cpu.cr2 = 0xdead000
        nested.cpu.inject_exception(14, 6)
        return next_rip - 3

    nested.rec.on["hypercall"] = handler
    assert nested.run(programs.STOP) is Exit.STOP
    assert [(f.vector, f.error_code, f.rip, f.cr2) for f in nested.rec.frames] == [(14, 6, CODE + 2, 0xdead000)]


def test_a_waiting_event_moves_with_its_context(nested: HvmMachine) -> None:
    """The handler of a nested fault switches to another vCPU; the event is delivered when the first one runs again."""
    cpu = nested.begin(programs.UD2)
    first = cpu.loaded
    nested.set_npte(STACK_TOP - 8, 0)
    assert nested.go() is Exit.STOP and nested.rec.kinds == ["nested_fault"]
    cpu.unload()
    other = nested.context()
    r = other.get_hvm()
    r.gpr[RIP] = 0x2000
    other.put_hvm(r)
    nested.write(0x2000, programs.STOP)
    cpu.load(other)
    assert nested.go() is Exit.STOP and nested.rec.kinds[-1] == "hypercall" and not nested.rec.frames
    cpu.load(first)
    nested.grant(STACK_TOP - 8)
    assert nested.go() is Exit.STOP
    assert [(f.vector, f.rip) for f in nested.rec.frames] == [(6, CODE)]


def test_tss_that_is_none(nested: HvmMachine) -> None:
    """QEMU aborts the process there."""
    assert nested.run(programs.LTR_NULL_INT) is Exit.STOP
    nested.rec.exits.clear()
    cpu = nested.begin(programs.UD2, cpl=3)
    context = cpu.loaded
    cpu.unload()
    r = context.get_hvm()
    r.tr.attributes = 0
    context.put_hvm(r)
    cpu.load(context)
    assert nested.go() is Exit.STOP and nested.rec.kinds == ["triple_fault"]


def test_iopl_and_flags_are_those_of_the_guest(nested: HvmMachine) -> None:
    nested.begin(programs.UD2).flags = 0x3246
    assert nested.go() is Exit.STOP
    assert struct.unpack("<5Q", nested.read(nested.cpu.gpr[RSP] + 8, 40))[2] & 0x3fff == 0x3246
    assert nested.cpu.selector(Seg.CS) == KERNEL_CS
