# SPDX-License-Identifier: GPL-2.0-only
"""Guests under nested paging: state, both kinds on one engine, several engines, and guests that mean harm."""

from __future__ import annotations

import random
import threading

import pytest

from pyxen.errors import InternalError
from pyxen.machine.cpu.base import R15, RAX, RBX, RCX, RIP, RSP, Exit, HvmCpu, Seg, Segment
from tests.machine import hvm_programs as programs
from tests.machine import programs as pv_programs
from tests.machine.hvm_support import (
    CODE,
    DATA,
    DEVICE,
    GUEST,
    IDT,
    NESTED_ROOT,
    NX,
    PWU,
    STACK_TOP,
    TABLES,
    HvmMachine,
    P,
    U,
)
from tests.machine.support import Kicker

pytestmark = pytest.mark.engine

BEYOND_RAM = 0x40_0000_0000


def test_protocol(nested: HvmMachine) -> None:
    assert isinstance(nested.cpu, HvmCpu)


# --- state -----------------------------------------------------------------------------------------------------------

def test_start_of_day(nested: HvmMachine) -> None:
    r = nested.cpu.new_hvm_context(NESTED_ROOT).get_hvm()
    assert (r.cr0, r.cr3, r.cr4, r.efer, r.flags) == (0x11, 0, 0, 0, 2) and r.gpr == [0] * 17
    assert [s.attributes for s in r.segments] == [0xc093, 0xc09b, 0xc093, 0xc093, 0xc093, 0xc093]
    assert all(s.base == 0 and s.limit == 0xffffffff for s in r.segments)
    assert (r.tr.attributes, r.tr.base, r.tr.limit) == (0x8b, 0, 0x67)
    assert r.fxsave[:2] == b"\x7f\x03" and r.fxsave[24:28] == b"\x80\x1f\0\0"


def test_state_round_trip(nested: HvmMachine) -> None:
    rng = random.Random(1)
    context = nested.cpu.new_hvm_context(NESTED_ROOT)
    r = context.get_hvm()
    r.gpr = [rng.getrandbits(64) for _ in range(17)]
    r.flags = 0x10246
    r.segments = [Segment(rng.getrandbits(16), rng.getrandbits(64), rng.getrandbits(32), rng.getrandbits(16) & 0xf0ff)
                  for _ in range(6)]
    r.segments[Seg.CS].attributes = 0xa09b
    r.ldtr = Segment(0x48, 0x1234, 0xff, 0x82)
    r.tr = Segment(0x40, 0xffff_8000_1234_0000, 0x67, 0x8b)
    r.gdtr, r.idtr = (0xffff_8000_0000_1000, 0x7f), (0xffff_8000_0000_2000, 0xfff)
    r.cr0, r.cr2, r.cr3, r.cr4, r.efer = 0x80050033, 0x1234, 0x5000, 0x6f0, 0xd01
    r.dr = [1, 2, 3, 4, 0, 0, 0xffff0ff0, 0x400]
    r.msrs = {n: rng.getrandbits(16 if n == 0x174 else 47) for n in r.msrs}
    r.segments[Seg.FS].base, r.segments[Seg.GS].base = r.msrs[0xc0000100], r.msrs[0xc0000101]
    r.fxsave = r.fxsave[:160] + bytes(rng.getrandbits(8) for _ in range(256)) + r.fxsave[416:]
    context.put_hvm(r)
    assert context.get_hvm() == r
    nested.cpu.load(context)
    cpu = nested.cpu
    assert cpu.gpr.tolist() == r.gpr and cpu.flags == r.flags and cpu.get_efer() == r.efer
    assert [cpu.get_cr(n) for n in (0, 2, 3, 4)] == [r.cr0, r.cr2, r.cr3, r.cr4]
    assert [cpu.segment(n) for n in range(6)] == r.segments
    with pytest.raises(InternalError):
        context.get_hvm()
    cpu.unload()
    assert context.get_hvm() == r


def test_segments_decide_about_the_bases(nested: HvmMachine) -> None:
    context = nested.cpu.new_hvm_context(NESTED_ROOT)
    r = context.get_hvm()
    r.segments[Seg.FS].base, r.msrs[0xc0000101] = 0x1234, 0x5678
    context.put_hvm(r)
    r = context.get_hvm()
    assert (r.msrs[0xc0000100], r.segments[Seg.GS].base) == (0x1234, 0)


@pytest.mark.parametrize(("field", "value"), [
    ("efer", 0x400), ("efer", 0x500), ("cr0", 0x80000010), ("efer", 0x1000), ("cr0", 1 << 32), ("cr4", 1 << 40)])
def test_impossible_state_is_refused(nested: HvmMachine, field: str, value: int) -> None:
    context = nested.cpu.new_hvm_context(NESTED_ROOT)
    r = context.get_hvm()
    setattr(r, field, value)
    with pytest.raises(InternalError):
        context.put_hvm(r)


def test_only_guests_under_nested_paging_have_its_registers(nested: HvmMachine) -> None:
    nested.start(pv_programs.SPIN)
    for call in (lambda: nested.cpu.set_cr(0, 1), lambda: nested.cpu.set_efer(0), nested.cpu.inject_nmi,
                 lambda: nested.cpu.inject_interrupt(32), lambda: nested.cpu.set_nested_root(0)):
        with pytest.raises(InternalError):
            call()


# --- both kinds in turn ----------------------------------------------------------------------------------------------

def test_both_kinds_in_turn_with_preemption(nested: HvmMachine) -> None:
    """A PV guest that checks itself, and one under nested paging that takes 2,000 exceptions, kicked all the while."""
    steps, cpu = 100_000, nested.cpu
    nested.start(pv_programs.TORTURE, rax=5, rbx=9, rcx=steps, rdi=steps + 1, rsi=DATA)
    pv = cpu.loaded
    assert pv is not None
    nested.rec.on_syscall = lambda next_rip: (finished.add("pv"), cpu.stop(), next_rip)[2]
    finished: set[str] = set()
    nested.write(CODE, programs.PUSH_LOOP)
    hvm = nested.context()
    r = hvm.get_hvm()
    r.gpr[RCX] = 40_000
    hvm.put_hvm(r)
    nested.rec.on["frame"] = lambda _frame, next_rip: next_rip
    nested.rec.on["hypercall"] = lambda next_rip: (finished.add("hvm"), cpu.stop(), next_rip)[2]
    turns = 0
    with Kicker(cpu, 200e-6):
        while finished != {"pv", "hvm"}:
            for name, context in (("pv", pv), ("hvm", hvm)):
                if name not in finished:
                    cpu.load(context)
                    assert cpu.run(None) is not Exit.ERROR, cpu.error
                    turns += 1
    cpu.unload()
    registers = pv.get()
    assert (registers.gpr[R15], registers.gpr[RCX]) == (0, 0)
    assert hvm.get_hvm().gpr[RBX] == 40_000 == len(nested.rec.frames)
    assert {(f.vector, f.rip) for f in nested.rec.frames} == {(3, CODE + 3)} and turns > 20


def test_a_switch_inside_of_exits(nested: HvmMachine) -> None:
    """Handlers load the other context each time: a PV guest's SYSCALL, a hypercall, both ways 2,000 times."""
    cpu = nested.cpu
    nested.start(programs.PV_SYSCALL_LOOP)
    pv = cpu.loaded
    nested.write(CODE, b"\x48\xff\xc3" + bytes.fromhex("b8ff000000 0f01c1 ebf3"))   # 1: inc rbx; hypercall 0xff; jmp 1b
    hvm = nested.context()
    turns = 0

    def switch(context: object, next_rip: int) -> int:
        nonlocal turns
        turns += 1
        cpu.gpr[RIP] = next_rip
        if turns == 4000:
            cpu.stop()
            return next_rip
        cpu.load(context)  # type: ignore[arg-type]
        return cpu.gpr[RIP]

    nested.rec.on_syscall = lambda next_rip: switch(hvm, next_rip)
    nested.rec.on["hypercall"] = lambda next_rip: switch(pv, next_rip)
    assert nested.go() is Exit.STOP
    cpu.unload()
    assert pv is not None and pv.get().gpr[RBX] == 2000 == hvm.get_hvm().gpr[RBX]


def test_a_guest_moves_between_engines_with_its_event() -> None:
    pair = HvmMachine(engines=2)
    first, second = pair.cpus
    pair.begin(programs.UD2)
    pair.set_npte(STACK_TOP - 8, 0)
    assert pair.go() is Exit.STOP and pair.rec.kinds == ["nested_fault"]
    context = first.loaded
    first.unload()
    second.load(context)
    pair.grant(STACK_TOP - 8)
    seen: list[int] = []
    pair.hvm[1].on["frame"] = lambda frame, next_rip: (seen.append(frame), second.stop(), next_rip)[2]
    pair.cpu = second
    assert pair.go(second) is Exit.STOP
    assert [f.vector for f in seen] == [6]
    pair.cpu = first
    pair.close()


def test_two_engines_in_two_threads() -> None:
    """Each runs a guest of its own through exceptions, nested faults, exits and MMIO, at once."""
    pair = HvmMachine(engines=2)
    roots = (NESTED_ROOT, 0x300000)
    guests = (GUEST, 0x800000)
    pair.build_nested(roots[1], guests[1])
    pair.write(CODE, programs.PUSH_LOOP)
    contexts = [pair.context(root=roots[0]), None]
    pair.memory.write(guests[1], pair.read(0, 0x200000))
    contexts[1] = pair.cpus[1].new_hvm_context(roots[1])
    contexts[1].put_hvm(contexts[0].get_hvm())
    count, counts, errors = 3000, [0, 0], []

    def serve(n: int) -> None:
        cpu, recorder = pair.cpus[n], pair.hvm[n]
        entry = (roots[n] + 0x3000 >> 3) + (STACK_TOP - 8 >> 12)

        def hypercall(next_rip: int) -> int:
            if cpu.gpr[RAX] == 0x103:
                counts[n] += 1
                pair.memory.q[entry] = 0
                cpu.flush_tlb()
            else:
                cpu.stop()
            return next_rip

        def grant(_gpa: int, _error: int, rip: int) -> int:
            pair.memory.q[entry] = guests[n] + (STACK_TOP - 8 & ~0xfff) | PWU
            return rip

        recorder.hypercall = hypercall  # type: ignore[method-assign]
        recorder.on["nested_fault"] = grant
        cpu.load(contexts[n])
        cpu.gpr[RCX] = count
        try:
            while (reason := cpu.run(None)) is Exit.KICK:
                pass
            assert reason is Exit.STOP, cpu.error
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=serve, args=(n,)) for n in range(2)]
    with Kicker(pair.cpus[0], 300e-6), Kicker(pair.cpus[1], 300e-6):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors and counts == [count, count]
    assert [cpu.gpr[RBX] for cpu in pair.cpus] == [count, count]
    pair.close()


# --- guests that mean harm: at worst their own end ------------------------------------------------------------------

def _ends(nested: HvmMachine) -> str:
    """How the run ends, within a moment."""
    timer = threading.Timer(0.1, nested.cpu.kick)
    timer.start()
    try:
        reason = nested.cpu.run(None)
    finally:
        timer.cancel()
    if reason is Exit.STOP and nested.rec.frames:
        return "exception"
    return nested.rec.kinds[-1] if reason is Exit.STOP and nested.rec.exits else reason.name


@pytest.mark.parametrize("case", [
    "stack in a device", "stack unmapped", "stack at the top", "idt in a device", "idt unmapped", "idt beyond",
    "gdt unmapped", "tss unmapped", "cr3 in a device", "cr3 beyond the nested tables", "table in a device",
    "table beyond RAM", "no nested tables", "nested tables beyond RAM", "nested tables of themselves",
    "nested page beyond RAM", "execute a device", "execute beyond RAM", "read-only stack", "read-only tables",
    "everything NX", "16-bit gate", "vm86", "null CS", "all segments null"])
@pytest.mark.parametrize("mode", ["flat", "32", "pae", "64"])
def test_harm(nested: HvmMachine, mode: str, case: str) -> None:
    program = programs.INT80 if len(case) % 2 else programs.UD2
    nested.write(CODE, program)
    context = nested.context(mode)
    r = context.get_hvm()
    q = nested.memory.q
    match case:
        case "stack in a device":
            r.gpr[RSP] = DEVICE + 0x800
        case "stack unmapped":
            r.gpr[RSP] = 0x700000
        case "stack at the top":
            r.gpr[RSP] = 4
        case "idt in a device":
            r.idtr = (DEVICE, 0xfff)
        case "idt unmapped":
            r.idtr = (0x700000, 0xfff)
        case "idt beyond":
            r.idtr = ((1 << 64) - 8, 0xffff)
        case "gdt unmapped":
            r.gdtr = (0x700000, 0xffff)
        case "tss unmapped":
            r.tr.base = 0x700000
            r.segments[Seg.SS].attributes |= 0x60
            r.segments[Seg.CS].attributes |= 0x60
        case "cr3 in a device":
            r.cr3 = DEVICE
        case "cr3 beyond the nested tables":
            r.cr3 = 0xfffff000
        case "table in a device":
            nested.write(TABLES, (DEVICE | PWU).to_bytes(8, "little"))
        case "table beyond RAM":
            nested.set_npte(TABLES, BEYOND_RAM | PWU)
            nested.set_npte(TABLES + 0x1000, BEYOND_RAM | PWU)
        case "no nested tables":
            nested.memory.zero(NESTED_ROOT >> 12, 1)
        case "nested tables beyond RAM":
            context.set_nested_root(BEYOND_RAM)
        case "nested tables of themselves":
            q[NESTED_ROOT >> 3] = NESTED_ROOT | PWU
        case "nested page beyond RAM":
            nested.set_npte(STACK_TOP - 8, BEYOND_RAM | PWU)
        case "execute a device":
            r.gpr[RIP] = DEVICE
        case "execute beyond RAM":
            nested.set_npte(CODE, BEYOND_RAM | PWU)
        case "read-only stack":
            nested.grant(STACK_TOP - 8, P | U)
        case "read-only tables":
            for page in range(6):
                nested.grant(TABLES + page * 0x1000, P | U)
        case "everything NX":
            for page in range(512):
                nested.grant(page << 12, PWU | NX)
        case "16-bit gate":
            size = 16 if mode == "64" else 8
            for vector in range(256):
                nested.write(IDT + size * vector + 5, b"\x86")
        case "vm86":
            r.flags = 0x20002
        case "null CS":
            r.segments[Seg.CS] = Segment()
        case "all segments null":
            r.segments = [Segment() for _ in range(6)]
    context.put_hvm(r)
    nested.cpu.load(context)
    end = _ends(nested)
    assert end in ("nested_fault", "triple_fault", "exception", "hypercall", "KICK", "ERROR"), end
    if case in ("idt unmapped", "idt beyond") and mode != "flat":
        assert end == "triple_fault"
    if case in ("no nested tables", "everything NX"):
        assert end == "nested_fault"
    if case == "execute beyond RAM":
        assert end == "ERROR"
    # and the engine still works for others
    nested.cpu.unload()
    nested.build_nested()
    nested.rec.exits.clear()
    nested.rec.on.clear()
    assert nested.run(programs.STOP) is Exit.STOP and nested.rec.kinds == ["hypercall"]
    nested.start(pv_programs.NOPS)
    assert nested.cpu.run(None) is Exit.STOP


def test_random_state(nested: HvmMachine) -> None:
    """Descriptor tables, page tables and segments of noise, in every mode: no crash, and no damage to the engine."""
    rng = random.Random(7)
    timer_limit = 0.05
    nested.rec.on["nested_fault"] = lambda gpa, _e, rip: (nested.cpu.stop(), rip)[1]
    for _round in range(150):
        mode = rng.choice(("flat", "32", "pae", "64"))
        nested.write(CODE, bytes(rng.getrandbits(8) for _ in range(64)))
        context = nested.context(mode, cpl=rng.choice((0, 3)))
        r = context.get_hvm()
        for n in range(16):
            r.gpr[n] = rng.choice((rng.getrandbits(64), rng.getrandbits(21), DEVICE + rng.getrandbits(12)))
        for _ in range(rng.randrange(4)):
            at = rng.choice((0x18000, IDT, 0x1a000, TABLES, TABLES + 0x1000, TABLES + 0x3000))
            nested.write(at + rng.randrange(0, 0x800, 8), rng.getrandbits(64).to_bytes(8, "little"))
        if rng.random() < 0.3:
            r.segments[rng.randrange(6)].attributes = rng.getrandbits(16) & 0xf0ff
        if rng.random() < 0.3:
            r.tr = Segment(rng.getrandbits(16), rng.getrandbits(21), rng.getrandbits(8), rng.getrandbits(16) & 0xf0ff)
        r.flags = rng.getrandbits(22) & ~0x100
        context.put_hvm(r)
        nested.cpu.load(context)
        timer = threading.Timer(timer_limit, nested.cpu.kick)
        timer.start()
        try:
            nested.cpu.run(None)
        finally:
            timer.cancel()
        nested.cpu.unload()
        nested.build_nested()
    nested.cpu.error = ""
    nested.rec.exits.clear()
    nested.cpu.kick()
    assert nested.run(programs.STOP) is Exit.STOP and nested.rec.kinds == ["hypercall"]
