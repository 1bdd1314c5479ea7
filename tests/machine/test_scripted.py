# SPDX-License-Identifier: GPL-2.0-only
"""The scripted CPU keeps the seam's promises, so that hypervisor tests need no engine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest

from pyxen.errors import InternalError
from pyxen.machine.clock import RealClock, VirtualClock
from pyxen.machine.cpu.base import RAX, RBX, RIP, Cpu, Exit, HvmCpu
from pyxen.machine.cpu.scripted import (
    STEP,
    Cpuid,
    Fault,
    Halt,
    Hypercall,
    In,
    Intercept,
    Load,
    MmioRead,
    MmioWrite,
    NestedFault,
    Out,
    Pause,
    ReadMsr,
    Script,
    ScriptedContext,
    ScriptedCpu,
    ScriptedHvmContext,
    Set,
    Spin,
    Store,
    Syscall,
    TripleFault,
    WriteCr,
    WriteMsr,
)
from pyxen.machine.cpu.unicorn_x86 import UnicornX86
from pyxen.machine.memory import Memory
from tests.machine.support import Recorder, Trap

Guest = Generator[Any, Any, None]


@pytest.fixture
def cpu() -> Iterator[ScriptedCpu]:
    memory = Memory(1 << 20)
    scripted = ScriptedCpu(memory, RealClock(calibration_ms=1))
    scripted.traps = Recorder(scripted)
    yield scripted
    scripted.close()
    memory.close()


def load(cpu: ScriptedCpu, script: Script, rip: int = 0x1000) -> ScriptedContext:
    context = cpu.new_context(script)
    cpu.load(context)
    cpu.gpr[RIP] = rip
    return context


def test_both_engines_are_cpus(cpu: ScriptedCpu) -> None:
    assert isinstance(cpu, Cpu)
    memory = Memory(1 << 20)
    unicorn = UnicornX86(memory, VirtualClock())
    assert isinstance(unicorn, Cpu)
    unicorn.close()
    memory.close()


def test_a_script_makes_hypercalls_and_reads_their_results(cpu: ScriptedCpu) -> None:
    results = []

    def guest(_cpu: ScriptedCpu) -> Guest:
        results.append((yield Syscall(rax=29, rdi=1)))
        yield Set(rbx=7)
        results.append((yield Syscall(rax=30)))

    load(cpu, guest)
    seen = []

    def hypercall(next_rip: int) -> int:
        seen.append((next_rip, cpu.gpr[RAX], cpu.gpr[7], cpu.gpr[RBX]))
        cpu.gpr[RAX] = 1000 + cpu.gpr[RAX]
        if len(seen) == 2:
            cpu.stop()
        return next_rip

    cpu.traps.on_syscall = hypercall  # type: ignore[attr-defined]
    assert cpu.run(None) is Exit.STOP
    cpu.kick()
    assert cpu.run(None) is Exit.KICK
    assert seen == [(0x1000 + STEP, 29, 1, 0), (0x1000 + 3 * STEP, 30, 1, 7)]
    assert results == [1029]
    cpu.kick()
    threading.Timer(0.01, cpu.kick).start()
    cpu.run(None)
    assert cpu.run(None) is Exit.KICK
    assert results == [1029, 1030]


def test_a_preempted_hypercall_is_executed_again_with_the_handlers_arguments(cpu: ScriptedCpu) -> None:
    def guest(_cpu: ScriptedCpu) -> Guest:
        yield Syscall(rax=1, rdi=3)
        yield Spin()

    load(cpu, guest)
    counts = []

    def hypercall(next_rip: int) -> int:
        counts.append(cpu.gpr[7])
        cpu.gpr[7] -= 1
        if cpu.gpr[7]:
            return next_rip - STEP
        cpu.stop()
        return next_rip

    cpu.traps.on_syscall = hypercall  # type: ignore[attr-defined]
    assert cpu.run(None) is Exit.STOP
    assert counts == [3, 2, 1] and cpu.gpr[RIP] == 0x1000 + STEP


def test_faults_software_interrupts_and_cpuid(cpu: ScriptedCpu) -> None:
    outcome: list[Any] = []

    def guest(_cpu: ScriptedCpu) -> Guest:
        outcome.append((yield Fault(14, error_code=6, cr2=0xdead000)))
        outcome.append((yield Fault(3, software=True)))
        outcome.append((yield Cpuid(1, 2)))
        yield Syscall(rax=0)

    load(cpu, guest)
    recorder = cpu.traps
    assert isinstance(recorder, Recorder)
    recorder.on_exception = lambda trap: trap.rip if trap.vector == 14 else 0x8000

    def answer(rip: int) -> int:
        cpu.gpr[RAX], cpu.gpr[RBX] = 5, 6
        return rip + 2

    recorder.on_cpuid = answer
    assert cpu.run(None) is Exit.STOP
    assert recorder.traps[:2] == [Trap("exception", 0x1000, 14, 6, False, 0xdead000),
                                  Trap("exception", 0x1000 + 2 * STEP, 3, None, True, 0xdead000)]
    assert outcome == [0x1000, 0x8000, (5, 6, 2, 0)]


def test_stores_and_loads_reach_machine_memory(cpu: ScriptedCpu) -> None:
    got = []

    def guest(_cpu: ScriptedCpu) -> Guest:
        yield Store(0x2000, b"hello")
        got.append((yield Load(0x2001, 3)))
        yield Syscall(rax=0)

    load(cpu, guest)
    assert cpu.run(None) is Exit.STOP
    assert got == [b"ell"]


def test_kicks_are_sticky_and_wake_a_spinning_guest(cpu: ScriptedCpu) -> None:
    steps = []

    def guest(_cpu: ScriptedCpu) -> Guest:
        while True:
            steps.append(1)
            yield Spin()

    load(cpu, guest)
    cpu.kick()
    assert cpu.run(None) is Exit.KICK and steps == []
    threading.Timer(0.01, cpu.kick).start()
    assert cpu.run(None) is Exit.KICK and steps == [1]
    assert cpu.run(cpu._clock.now_ns() + 1_000_000) is Exit.KICK and steps == [1, 1]


def test_contexts_keep_their_registers_and_scripts(cpu: ScriptedCpu) -> None:
    def counting(start: int) -> Callable[[ScriptedCpu], Guest]:
        def guest(_cpu: ScriptedCpu) -> Guest:
            for n in range(3):
                yield Syscall(rax=start + n)
            yield Syscall(rax=0)
        return guest

    contexts = [cpu.new_context(counting(10)), cpu.new_context(counting(20))]
    seen = []

    def hypercall(next_rip: int) -> int:
        seen.append(cpu.gpr[RAX])
        cpu.stop()
        return next_rip

    cpu.traps.on_syscall = hypercall  # type: ignore[attr-defined]
    for _ in range(3):
        for context in contexts:
            cpu.load(context)
            assert cpu.run(None) is Exit.STOP
    assert seen == [10, 20, 11, 21, 12, 22]
    with pytest.raises(InternalError):
        contexts[1].get()
    cpu.unload()
    registers = contexts[1].get()
    assert registers.gpr[RAX] == 22 and registers.gpr[RIP] == 3 * STEP
    registers.flags, registers.bases[5] = 0x246, 0x1234
    contexts[1].put(registers)
    cpu.load(contexts[1])
    assert (cpu.flags, cpu.gs_base) == (0x246, 0x1234)


def test_a_broken_handler_comes_out_of_run(cpu: ScriptedCpu) -> None:
    def guest(_cpu: ScriptedCpu) -> Guest:
        yield Syscall(rax=1)

    load(cpu, guest)

    def broken(_next_rip: int) -> int:
        raise LookupError("a bug")

    cpu.traps.on_syscall = broken  # type: ignore[attr-defined]
    with pytest.raises(LookupError):
        cpu.run(None)


def test_the_journal_tells_what_was_done_to_the_cpu(cpu: ScriptedCpu) -> None:
    load(cpu, lambda _cpu: iter(()))  # type: ignore[arg-type, return-value]
    cpu.set_cr3(0x5000)
    cpu.switch_space(1, 0x6000)
    cpu.flush_tlb_page(0x7000)
    cpu._memory.written(3)
    assert list(cpu.journal)[-4:] == [
        ("cr3", 0x5000), ("space", 1, 0x6000), ("flush_page", 0x7000), ("invalidate", 0x3000, 0x1000)]


def test_a_step_with_an_unknown_register_is_a_bug_of_the_test() -> None:
    with pytest.raises(InternalError):
        Syscall(eax=1)


# --- guests under nested paging --------------------------------------------------------------------------------------

class HvmTrapsRecorder(Recorder):
    """Answers every exit, and keeps a list."""

    def __init__(self, cpu: ScriptedCpu) -> None:
        super().__init__(cpu)
        self.exits: list[tuple[Any, ...]] = []
        self.refuse = False

    def _note(self, *what: Any) -> None:
        self.exits.append(what)

    def hypercall(self, next_rip: int) -> int:
        self._note("hypercall", next_rip)
        if self.cpu.gpr[RAX] == 99:
            self.cpu.gpr[RAX] = 7
            return next_rip - STEP                               # again, once
        self.cpu.gpr[RAX] += 1
        return next_rip

    def nested_fault(self, gpa: int, error_code: int, rip: int) -> int:
        self._note("nested_fault", gpa, error_code, rip)
        return rip

    def io_read(self, port: int, size: int) -> int:
        self._note("io_read", port, size)
        return 0x55

    def io_write(self, port: int, size: int, value: int) -> None:
        self._note("io_write", port, size, value)

    def mmio_read(self, offset: int, size: int) -> int:
        self._note("mmio_read", offset, size)
        return 0x66

    def mmio_write(self, offset: int, size: int, value: int) -> None:
        self._note("mmio_write", offset, size, value)

    def read_msr(self, number: int) -> int | None:
        self._note("read_msr", number)
        return None if self.refuse else 0x1_0000_0002

    def write_msr(self, number: int, value: int) -> bool:
        self._note("write_msr", number, value)
        return not self.refuse

    def write_cr(self, number: int, value: int) -> bool:
        self._note("write_cr", number, value)
        if not self.refuse:
            self.cpu.set_cr(number, value)  # type: ignore[attr-defined]
        return not self.refuse

    def halt(self, next_rip: int) -> int:
        self._note("halt", next_rip)
        return next_rip

    def pause(self, next_rip: int) -> int:
        self._note("pause", next_rip)
        return next_rip

    def interrupt_window(self, rip: int) -> int:
        self._note("interrupt_window", rip)
        self.cpu.request_interrupt_window(False)  # type: ignore[attr-defined]
        self.cpu.inject_interrupt(0x41)  # type: ignore[attr-defined]
        return rip

    def triple_fault(self, rip: int) -> int:
        self._note("triple_fault", rip)
        self.cpu.stop()
        return rip

    def intercept(self, code: int, info: int, rip: int) -> int:
        self._note("intercept", code, info)
        return rip


def load_hvm(cpu: ScriptedCpu, script: Script) -> tuple[ScriptedHvmContext, HvmTrapsRecorder]:
    recorder = HvmTrapsRecorder(cpu)
    cpu.traps = recorder
    context = cpu.new_hvm_context(0x5000, script)
    cpu.load(context)
    cpu.gpr[RIP] = 0x1000
    return context, recorder


def test_it_is_an_hvm_cpu_too(cpu: ScriptedCpu) -> None:
    assert isinstance(cpu, HvmCpu)
    memory = Memory(1 << 20)
    unicorn = UnicornX86(memory, VirtualClock())
    assert cpu.native_msrs == unicorn.native_msrs
    blank, real = cpu.new_hvm_context(0x5000).get_hvm(), unicorn.new_hvm_context(0x5000).get_hvm()
    unicorn.close()
    memory.close()
    assert blank.fxsave[:28] == real.fxsave[:28]
    real.fxsave = blank.fxsave                                   # but for MXCSR_MASK
    assert blank == real


def test_every_step_of_a_guest_under_nested_paging(cpu: ScriptedCpu) -> None:
    values: list[Any] = []

    def guest(_cpu: ScriptedCpu) -> Guest:
        for step in (Hypercall(rax=5), Hypercall(rax=99), NestedFault(0x3000), In(0x42), Out(0x80, 3), MmioRead(0x20),
                     MmioWrite(0xb0, 1), ReadMsr(0x1b), WriteMsr(0x1b, 9), WriteMsr(0xc0000082, 0x77),
                     ReadMsr(0xc0000082), WriteCr(4, 0x20), Pause(), Halt(), Intercept(0x8a), TripleFault()):
            values.append((yield step))

    _context, recorder = load_hvm(cpu, guest)
    assert cpu.run(None) is Exit.STOP
    assert [e[0] for e in recorder.exits] == [
        "hypercall", "hypercall", "hypercall", "nested_fault", "io_read", "io_write", "mmio_read", "mmio_write",
        "read_msr", "write_msr", "write_cr", "halt", "intercept", "triple_fault"]
    assert values == [6, 8, None, 0x55, None, 0x66, None, 0x1_0000_0002, True, True, 0x77, True, None, None, None]
    assert recorder.exits[1][1] == recorder.exits[2][1] and cpu.get_cr(4) == 0x20


def test_events_are_taken_between_steps(cpu: ScriptedCpu) -> None:
    def guest(_cpu: ScriptedCpu) -> Guest:
        yield ReadMsr(0x1b)
        yield WriteCr(0, 0)
        cpu.flags |= 0x200
        yield Set(rbx=1)
        yield Pause()
        yield TripleFault()

    context, recorder = load_hvm(cpu, guest)
    recorder.refuse = True
    cpu.request_interrupt_window(True)
    cpu.inject_nmi()
    cpu.set_pause_exits(True)
    assert cpu.run(None) is Exit.STOP
    events = [entry for entry in cpu.journal if entry[0] in ("exception", "nmi", "interrupt")]
    assert events == [("nmi",), ("exception", 13, 0), ("exception", 13, 0), ("interrupt", 0x41)]
    assert [e[0] for e in recorder.exits] == ["read_msr", "write_cr", "interrupt_window", "pause", "triple_fault"]
    assert not context.window


def test_hvm_state_moves(cpu: ScriptedCpu) -> None:
    context, _recorder = load_hvm(cpu, lambda _cpu: iter(()))  # type: ignore[arg-type, return-value]
    cpu.set_efer(0x100)
    cpu.set_cr(4, 0x20)
    cpu.set_cr(3, 0x9000)
    cpu.set_cr(0, 0x80000001)
    cpu.set_msr(0xc0000100, 0x1234)
    assert (cpu.get_efer(), cpu.get_cr(0), cpu.get_cr(3)) == (0x500, 0x80000011, 0x9000)
    assert cpu.segment(4).base == 0x1234 == cpu.get_msr(0xc0000100)
    cpu.unload()
    r = context.get_hvm()
    assert (r.efer, r.cr3, r.segments[4].base, r.msrs[0xc0000100]) == (0x500, 0x9000, 0x1234, 0x1234)
    context.put_hvm(r)
    assert context.get_hvm() == r
    r.efer = 0x400
    with pytest.raises(InternalError):
        context.put_hvm(r)
