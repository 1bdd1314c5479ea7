# SPDX-License-Identifier: GPL-2.0-only
"""Engine conformance, the facts the design stands on: stopping, and what traps and how."""

from __future__ import annotations

import threading

import pytest

from pyxen.errors import InternalError
from pyxen.machine.cpu.base import RAX, RBX, RCX, RDX, RIP, Exit
from tests.machine import programs
from tests.machine.support import (
    CLOCK,
    CODE,
    DATA,
    NX,
    PWU,
    Kicker,
    Machine,
    P,
    Trap,
    U,
    W,
    run_to_stop,
)

pytestmark = pytest.mark.engine
R8, R9, R10, R11, R15 = 8, 9, 10, 11, 15
U64 = (1 << 64) - 1


# --- stopping --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("period_us", [30, 100])
def test_kicks_under_load_never_replay_an_instruction(machine: Machine, period_us: int) -> None:
    steps = 300_000
    cpu = machine.cpu
    machine.start(programs.TORTURE, rax=5, rbx=9, rcx=steps, rdi=steps + 1, rsi=DATA)
    with Kicker(cpu, period_us / 1e6) as kicker:
        run_to_stop(cpu)
    assert kicker.kicks > 50
    assert cpu.gpr[R15] == 0 and cpu.gpr[RCX] == 0
    interrupted = (cpu.gpr[R8], cpu.gpr[R9])
    assert machine.memory.q[DATA + 24 >> 3] == steps
    cpu.unload()
    machine.memory.write(DATA, bytes(128))
    machine.start(programs.TORTURE, rax=5, rbx=9, rcx=steps, rdi=steps + 1, rsi=DATA)
    assert run_to_stop(cpu) <= 1                                 # the last kick may have come after the end
    assert (cpu.gpr[R8], cpu.gpr[R9]) == interrupted


def test_flags_survive_stops_between_setting_and_testing_them(machine: Machine) -> None:
    machine.start(programs.FLAGS_TORTURE, rcx=300_000)
    with Kicker(machine.cpu, 50e-6):
        kicks = run_to_stop(machine.cpu)
    assert kicks > 20
    assert machine.cpu.gpr[R15] == 0 and machine.cpu.gpr[RCX] == 0


def test_a_kick_between_runs_ends_the_next_run_before_its_first_instruction(machine: Machine) -> None:
    machine.start(programs.SPIN)
    machine.cpu.kick()
    machine.cpu.kick()
    assert machine.cpu.run(None) is Exit.KICK
    assert machine.cpu.gpr[RAX] == 0 and machine.cpu.gpr[RIP] == CODE
    assert machine.cpu.run(CLOCK.now_ns() + 5_000_000) is Exit.KICK
    assert machine.cpu.gpr[RAX] > 0


def test_no_kick_is_lost_however_it_falls_on_the_start_of_a_run(machine: Machine) -> None:
    """Each kick is answered by exactly one return of run(); a lost one would hang here until the alarm of 2 s."""
    cpu = machine.cpu
    machine.start(programs.SPIN)
    ready, rounds = threading.Semaphore(0), 2000

    def kick_once_per_run() -> None:
        for _ in range(rounds):
            ready.acquire()
            cpu.kick()

    thread = threading.Thread(target=kick_once_per_run, daemon=True)
    thread.start()
    for _ in range(rounds):
        ready.release()
        started = CLOCK.now_ns()
        assert cpu.run(started + 2_000_000_000) is Exit.KICK
        assert CLOCK.now_ns() < started + 2_000_000_000
    thread.join()


def test_stop_leaves_at_the_rip_that_the_handler_returns(machine: Machine) -> None:
    machine.start(programs.SYSCALL_LOOP)

    def elsewhere(next_rip: int) -> int:
        assert next_rip == CODE + 2
        machine.cpu.stop()
        return 0x1234

    machine.recorder.on_syscall = elsewhere
    assert machine.cpu.run(None) is Exit.STOP
    assert machine.cpu.gpr[RIP] == 0x1234


def test_an_exception_in_a_handler_comes_out_of_run_and_the_engine_goes_on(machine: Machine) -> None:
    machine.start(programs.SYSCALL_LOOP)

    def broken(_next_rip: int) -> int:
        raise LookupError("a bug in a hypercall")

    machine.recorder.on_syscall = broken
    with pytest.raises(LookupError, match="a bug in a hypercall"):
        machine.cpu.run(None)
    machine.recorder.on_syscall = None
    assert machine.cpu.run(None) is Exit.STOP
    assert machine.recorder.traps[-1].kind == "syscall"


def test_deadlines_fire_in_order_and_may_move_both_ways(machine: Machine) -> None:
    cpu = machine.cpu
    machine.start(programs.SPIN)
    start = CLOCK.now_ns()
    ends = []
    for wait_ms in (3, 1, 2):
        deadline = CLOCK.now_ns() + wait_ms * 1_000_000
        assert cpu.run(deadline) is Exit.KICK
        ends.append(CLOCK.now_ns())
        assert ends[-1] >= deadline
    assert ends == sorted(ends) and ends[0] > start
    assert cpu.run(CLOCK.now_ns() - 1) is Exit.KICK

    cpu.unload()
    machine.start(programs.SYSCALL_LOOP)
    deadlines = iter([CLOCK.now_ns() + 60_000_000_000, CLOCK.now_ns() + 1_000_000_000, None])
    final = CLOCK.now_ns() + 3_000_000

    def rearm(next_rip: int) -> int:
        cpu.set_deadline(next(deadlines, final))
        return next_rip

    machine.recorder.on_syscall = rearm
    assert cpu.run(CLOCK.now_ns() + 500_000_000) is Exit.KICK
    assert final <= CLOCK.now_ns() < final + 400_000_000


def test_run_without_a_context_is_our_bug(machine: Machine) -> None:
    with pytest.raises(InternalError):
        machine.cpu.run(None)


# --- traps -----------------------------------------------------------------------------------------------------------

def test_a_prefixed_syscall_returns_behind_all_of_it(machine: Machine) -> None:
    machine.start(programs.PREFIXED_SYSCALL, rax=1)
    assert machine.cpu.run(None) is Exit.STOP
    assert [trap.rip for trap in machine.recorder.traps] == [CODE + 3, CODE + 8]


def test_a_prefixed_syscall_enters_where_the_handler_says(machine: Machine) -> None:
    machine.put_code(0x3000, programs.NOPS)
    machine.start(programs.PREFIXED_SYSCALL, rax=1)

    def enter_kernel(next_rip: int) -> int:
        if next_rip == 0x3006:
            machine.cpu.stop()
        machine.recorder.traps.append(Trap("syscall", next_rip))
        return 0x3000 if next_rip < 0x2000 else next_rip

    machine.recorder.on_syscall = enter_kernel
    assert machine.cpu.run(None) is Exit.STOP
    assert [trap.rip for trap in machine.recorder.traps] == [CODE + 3, 0x3006]


@pytest.mark.parametrize("cpl", [1, 3])
@pytest.mark.parametrize("name", programs.PRIVILEGED)
def test_privileged_instructions_fault_outside_of_ring_0(machine: Machine, name: str, cpl: int) -> None:
    machine.start(bytes.fromhex(programs.PRIVILEGED[name]) + b"\x0f\x05", cpl=cpl, rsi=DATA, rdi=DATA, rax=0x33)
    before = bytes(machine.memory.b[DATA:DATA + 64])
    assert machine.cpu.run(None) is Exit.STOP
    (trap,) = machine.recorder.traps
    assert (trap.vector, trap.error_code, trap.rip, trap.software) == (13, 0, CODE, False)
    assert machine.cpu.cpl() == cpl and machine.cpu.gpr[RAX] == 0x33
    assert bytes(machine.memory.b[DATA:DATA + 64]) == before


@pytest.mark.parametrize("name", programs.UNDEFINED)
def test_undefined_instructions_are_ud(machine: Machine, name: str) -> None:
    machine.start(bytes.fromhex(programs.UNDEFINED[name]) + b"\x0f\x05", rsi=DATA)
    assert machine.cpu.run(None) is Exit.STOP
    (trap,) = machine.recorder.traps
    assert (trap.vector, trap.error_code, trap.rip, trap.software) == (6, None, CODE, False)


@pytest.mark.parametrize("vector", range(256))
def test_int_n_is_a_trap_for_open_gates_and_gp_for_the_others(machine: Machine, vector: int) -> None:
    machine.start(bytes((0xcd, vector, 0x0f, 0x05)))
    assert machine.cpu.run(None) is Exit.STOP
    (trap,) = machine.recorder.traps
    if vector in (3, 4, 0x80):
        assert (trap.vector, trap.error_code, trap.rip, trap.software) == (vector, None, CODE + 2, True)
    else:
        assert (trap.vector, trap.error_code, trap.rip, trap.software) == (13, vector * 8 + 2, CODE, False)


def test_int3_is_one_byte_long(machine: Machine) -> None:
    machine.start(b"\xcc\x0f\x05")
    machine.recorder.on_exception = lambda trap: trap.rip
    assert machine.cpu.run(None) is Exit.STOP
    assert [(t.kind, t.vector, t.rip, t.software) for t in machine.recorder.traps] == [
        ("exception", 3, CODE + 1, True), ("syscall", None, CODE + 3, False)]


def test_a_prefixed_int_n_faults_at_its_prefix(machine: Machine) -> None:
    machine.start(bytes.fromhex("48cd21"))
    assert machine.cpu.run(None) is Exit.STOP
    assert machine.recorder.traps[0].rip == CODE and machine.recorder.traps[0].error_code == 0x21 * 8 + 2


def test_faults_in_a_row_never_become_a_double_fault(machine: Machine) -> None:
    """#GP after #GP, and #GP after INT3, whose "software" mark must not stick."""
    machine.start(b"\xcc" + programs.FAULT_THREE_TIMES)
    machine.recorder.on_exception = lambda trap: trap.rip if trap.software else trap.rip + 1
    assert machine.cpu.run(None) is Exit.STOP
    assert [(t.vector, t.software) for t in machine.recorder.traps[:-1]] == [(3, True)] + [(13, False)] * 3


def test_a_fault_inside_a_fault_handler_path_is_reported_as_itself(machine: Machine) -> None:
    """The handler sends the guest to an address that faults at once: #PF, then #PF, then #GP, none merged."""
    machine.set_pte(0x6000, 0)
    machine.set_pte(0x7000, 0)
    machine.start(programs.LOAD_TWICE, rsi=0x6000)
    targets = iter([0x7000, 0x8000_0000_0000_0000])

    def next_target(trap: Trap) -> int:
        target = next(targets, None)
        if target is None:
            machine.cpu.stop()
            return trap.rip
        return target

    machine.recorder.on_exception = next_target
    assert machine.cpu.run(None) is Exit.STOP
    assert [(t.vector, t.error_code) for t in machine.recorder.traps] == [(14, 4), (14, 0x14), (13, 0)]
    assert [t.cr2 for t in machine.recorder.traps[:2]] == [0x6000, 0x7000]


@pytest.mark.parametrize(("entry", "code", "cpl", "error"), [
    (0, programs.LOAD, 3, 4), (0, programs.STORE, 3, 6), (0x6000 | P | U, programs.STORE, 3, 7),
    (0x6000 | P | W, programs.LOAD, 3, 5), (0x6000 | P | W, programs.STORE, 3, 7),
    (0, programs.LOAD, 1, 0), (0, programs.STORE, 1, 2), (0x6000 | P, programs.STORE, 1, 3),
    (0x6000 | P | U, programs.STORE, 1, 3),          # CR0.WP holds in rings 0-2 too
    (0x6000 | PWU | 1 << 51, programs.LOAD, 3, 0xd),  # reserved bit
])
def test_page_fault_error_codes(machine: Machine, entry: int, code: bytes, cpl: int, error: int) -> None:
    machine.set_pte(0x6000, entry)
    machine.start(code, cpl=cpl, rsi=0x6008)
    assert machine.cpu.run(None) is Exit.STOP
    (trap,) = machine.recorder.traps
    assert (trap.vector, trap.error_code, trap.cr2, trap.rip) == (14, error, 0x6008, CODE)


@pytest.mark.parametrize(("entry", "cpl", "error"), [
    (0x6000 | PWU | NX, 3, 0x15), (0x6000 | P | W, 3, 0x15), (0, 3, 0x14), (0x6000 | P | W | NX, 1, 0x11)])
def test_page_fault_error_codes_of_fetches(machine: Machine, entry: int, cpl: int, error: int) -> None:
    machine.set_pte(0x6000, entry)
    machine.start(programs.NOPS, at=0x5000, cpl=cpl)
    machine.cpu.gpr[RIP] = 0x6000
    assert machine.cpu.run(None) is Exit.STOP
    (trap,) = machine.recorder.traps
    assert (trap.vector, trap.error_code, trap.cr2, trap.rip) == (14, error, 0x6000, 0x6000)


def test_the_u_bit_follows_the_cpl_as_soon_as_it_changes(machine: Machine) -> None:
    """Fast mode: a supervisor page is there for the kernel, gone for its user program, without any flush."""
    machine.set_pte(DATA, DATA | P | W)
    machine.memory.q[DATA >> 3] = 0x1234
    machine.start(programs.LOAD_TWICE, cpl=1, rsi=DATA)

    def leave_kernel(next_rip: int) -> int:
        assert machine.cpu.gpr[RAX] == 0x1234
        machine.cpu.set_cpl(3)
        return next_rip

    machine.recorder.on_syscall = leave_kernel
    assert machine.cpu.run(None) is Exit.STOP
    assert (machine.recorder.traps[0].vector, machine.recorder.traps[0].error_code) == (14, 5)


def test_non_canonical_access_is_gp(machine: Machine) -> None:
    machine.start(programs.LOAD, rsi=0x8000_0000_0000)
    assert machine.cpu.run(None) is Exit.STOP
    assert (machine.recorder.traps[0].vector, machine.recorder.traps[0].error_code) == (13, 0)


def test_cpuid_is_the_hypervisors(machine: Machine) -> None:
    machine.start(programs.CPUID)
    seen = []

    def answer(rip: int) -> int:
        seen.append((rip, machine.cpu.gpr[RAX], machine.cpu.gpr[RCX]))
        machine.cpu.gpr[RAX], machine.cpu.gpr[RBX], machine.cpu.gpr[RCX], machine.cpu.gpr[RDX] = 0, 11, 22, 33
        return rip + 2

    machine.recorder.on_cpuid = answer
    assert machine.cpu.run(None) is Exit.STOP
    assert seen == [(CODE + 10, 7, 2)]
    assert [machine.cpu.gpr[n] for n in (RAX, RBX, RCX, RDX)] == [0, 11, 22, 33]
    assert machine.recorder.traps[-1].rip == CODE + 14


def test_single_step_traps_after_each_instruction(machine: Machine) -> None:
    machine.start(programs.NOPS)
    machine.cpu.flags |= 0x100
    machine.recorder.on_exception = lambda trap: trap.rip

    def clear(next_rip: int) -> int:
        machine.cpu.flags &= ~0x100
        machine.cpu.stop()
        return next_rip

    machine.recorder.on_syscall = clear
    assert machine.cpu.run(None) is Exit.STOP
    assert [(t.vector, t.rip) for t in machine.recorder.traps] == [(1, CODE + 1), (1, CODE + 2), (1, CODE + 4)]
    assert machine.cpu.get_debug_register(6) & 0x4000
    assert machine.cpu.flags & 0x100 == 0


def test_access_outside_of_ram_ends_the_run_with_a_reason(machine: Machine) -> None:
    machine.set_pte(DATA, machine.memory.size_bytes | PWU)
    machine.start(programs.LOAD, rsi=DATA)
    assert machine.cpu.run(None) is Exit.ERROR
    assert "outside of RAM" in machine.cpu.error
    machine.cpu.unload()
    machine.set_pte(DATA, DATA | PWU)
    machine.recorder.on_syscall = machine.recorder.stop
    machine.start(programs.LOAD, rsi=DATA)                       # the engine itself is unharmed
    assert machine.cpu.run(None) is Exit.STOP


def test_pause_neither_ends_a_run_nor_delays_a_kick(machine: Machine) -> None:
    machine.start(bytes.fromhex("f390 48ffc0 ebf9"))             # 1: pause; inc rax; jmp 1b
    deadline = CLOCK.now_ns() + 5_000_000
    assert machine.cpu.run(deadline) is Exit.KICK
    assert CLOCK.now_ns() >= deadline and machine.cpu.gpr[RAX] > 10
