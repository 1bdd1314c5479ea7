# SPDX-License-Identifier: GPL-2.0-only
"""The scripted CPU keeps the seam's promises, so that hypervisor tests need no engine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from typing import Any

import pytest

from pyxen.errors import InternalError
from pyxen.machine.clock import RealClock, VirtualClock
from pyxen.machine.cpu.base import RAX, RBX, RIP, Cpu, Exit
from pyxen.machine.cpu.scripted import (
    STEP,
    Cpuid,
    Fault,
    Load,
    Script,
    ScriptedContext,
    ScriptedCpu,
    Set,
    Spin,
    Store,
    Syscall,
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
