# SPDX-License-Identifier: GPL-2.0-only
"""Deadlines by timer signals: on time whoever has the GIL, never lost, never after the engine is gone."""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
import random
import signal
import statistics
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pyxen.machine.clock import VirtualClock
from pyxen.machine.cpu import unicorn_timer
from pyxen.machine.cpu.base import RAX, RBX, Exit
from pyxen.machine.cpu.deadline import NEVER, AlarmClock, AlarmDeadline
from pyxen.machine.cpu.unicorn_timer import KickTimer, native
from pyxen.machine.cpu.unicorn_x86 import UnicornX86
from pyxen.machine.memory import Memory
from tests.machine import programs
from tests.machine.support import CLOCK, CODE, ROOT, Machine

pytestmark = [pytest.mark.engine, pytest.mark.skipif(native() is None, reason="this host refuses timer signals")]

# 1: rdtsc; shl rdx, 32; or rax, rdx; mov rbx, rax; jmp 1b: RBX says when the guest was last seen
TSC_SPIN = bytes.fromhex("0f31 48c1e220 4809d0 4889c3 ebf2")
MS = 1_000_000


def alarm_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "pyxen-alarm"]


def block_of(cpu: UnicornX86) -> unicorn_timer._Block:
    assert isinstance(cpu._deadline, KickTimer)
    return cpu._deadline._handle.block


@contextmanager
def gil_hog() -> Iterator[None]:
    """A thread that keeps the GIL for 30 ms at a time, asleep."""
    stop = False
    sleep = ctypes.PyDLL(None).usleep

    def hold() -> None:
        while not stop:
            sleep(30_000)

    thread = threading.Thread(target=hold, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop = True
        thread.join()


def in_thread(function: Callable[[], object]) -> None:
    errors: list[BaseException] = []

    def body() -> None:
        try:
            function()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    if errors:
        raise errors[0]


def lateness(machine: Machine, rounds: int, wait_ns: int) -> float:
    """Median ns between a deadline and the last instructions of the guest: what run() waits for the GIL after that
    does not count."""
    late = []
    for _ in range(rounds):
        time.sleep(0)
        deadline = CLOCK.now_ns() + wait_ns
        assert machine.cpu.run(deadline) is Exit.KICK
        late.append(CLOCK.tsc_calibration().to_ns(machine.cpu.gpr[RBX]) - deadline)
    return statistics.median(late)


def test_deadlines_are_met_while_another_thread_has_the_gil(machine: Machine) -> None:
    """An alarm thread would have to ask for the GIL first."""
    machine.start(TSC_SPIN)
    with gil_hog():
        assert lateness(machine, 15, 2 * MS) < 10 * MS


def test_no_thread_is_started_for_the_real_clock_and_one_for_any_other(machine: Machine) -> None:
    before = set(alarm_threads())  # of other tests' clocks: one of them may end at any time
    machine.start(programs.SPIN)
    assert machine.cpu.run(CLOCK.now_ns() + MS) is Exit.KICK
    assert set(alarm_threads()) <= before
    cpu = UnicornX86(machine.memory, VirtualClock())
    assert isinstance(cpu._deadline, AlarmDeadline) and len(set(alarm_threads()) - before) == 1
    cpu.close()


def test_run_never_returns_before_its_deadline_without_a_reason(machine: Machine) -> None:
    """An alarm armed for an earlier deadline fires on the way."""
    machine.start(programs.SPIN)
    cpu, start = machine.cpu, CLOCK.now_ns()
    for delay in (3, 1, 2, 4, 1, 5):
        cpu.set_deadline(CLOCK.now_ns() + MS // 2)
        deadline = CLOCK.now_ns() + delay * MS
        assert cpu.run(deadline) is Exit.KICK
        assert CLOCK.now_ns() >= deadline
    assert CLOCK.now_ns() - start < 16 * MS + 2_000 * MS


def test_no_short_deadline_is_lost_nor_comes_early(machine: Machine) -> None:
    """However the signal falls on the start and the end of a run. A lost one would wait for the kick after a minute."""
    machine.start(programs.SPIN)
    cpu, rng = machine.cpu, random.Random(3)
    rescue = threading.Timer(60, cpu.kick)
    rescue.daemon = True
    rescue.start()
    for _ in range(5000):
        deadline = CLOCK.now_ns() + rng.randrange(500, 40_000)
        if rng.random() < 0.3:
            cpu.set_deadline(CLOCK.now_ns() + rng.randrange(500, 40_000))
            cpu._kicked = False                                  # it may have been past by then, which kicks
        assert cpu.run(deadline) is Exit.KICK
        assert deadline <= CLOCK.now_ns() < deadline + 30_000 * MS
    rescue.cancel()


def test_an_alarm_that_came_early_does_not_end_a_run_without_deadline(machine: Machine) -> None:
    machine.start(programs.SPIN)
    cpu = machine.cpu
    cpu.set_deadline(CLOCK.now_ns() + MS)
    threading.Timer(0.05, cpu.kick).start()
    started = CLOCK.now_ns()
    assert cpu.run(None) is Exit.KICK
    assert CLOCK.now_ns() - started >= 45 * MS


def test_a_kick_is_sticky_whatever_the_alarms_do(machine: Machine) -> None:
    machine.start(programs.SPIN)
    cpu = machine.cpu
    for _ in range(200):
        cpu.kick()
        deadline = CLOCK.now_ns() + 20_000
        while CLOCK.now_ns() < deadline + 20_000:                # the alarm may come between two runs, too
            cpu.set_deadline(deadline)
        count = cpu.gpr[RAX]
        assert cpu.run(None) is Exit.KICK and cpu.gpr[RAX] == count


def test_deadlines_that_move_in_a_handler_are_kept(machine: Machine) -> None:
    """Thousands of moves in random directions, while another thread kicks: no run ends early without a kick, and none
    misses its deadline."""
    cpu, rng = machine.cpu, random.Random(5)
    machine.start(programs.SYSCALL_LOOP)
    moves, kicks, ends = itertools.count(), 0, 0
    deadline, going = 0, True
    sent = threading.Semaphore(0)

    def move(next_rip: int) -> int:
        nonlocal deadline
        if next(moves) % 7 == 0:
            deadline = CLOCK.now_ns() + rng.choice((20_000, 100_000, 300_000, 900_000))
            cpu.set_deadline(deadline)
        return next_rip

    def kick() -> None:
        nonlocal kicks
        while going:
            time.sleep(0.002)
            kicks += 1
            cpu.kick()
        sent.release()

    machine.recorder.on_syscall = move
    thread = threading.Thread(target=kick, daemon=True)
    thread.start()
    early, until = 0, CLOCK.now_ns() + 1500 * MS
    while CLOCK.now_ns() < until:
        deadline = CLOCK.now_ns() + 500_000
        assert cpu.run(deadline) is Exit.KICK
        now = CLOCK.now_ns()
        ends += 1
        early += now < deadline
        assert now < deadline + 1000 * MS
    going = False
    thread.join()
    assert kicks > 50 and next(moves) > 5000 and ends > kicks // 2
    assert early <= kicks


def test_two_engines_in_two_threads_have_their_own_deadlines(pair: Machine) -> None:
    done: list[int] = []

    def slices(index: int) -> None:
        cpu = pair.cpus[index]
        pair.start(programs.SPIN, cpu=index, at=CODE + 0x1000 * index)
        for _ in range(300):
            deadline = CLOCK.now_ns() + (200_000 if index else 500_000)
            assert cpu.run(deadline) is Exit.KICK
            assert CLOCK.now_ns() >= deadline
        assert cpu.gpr[RAX] > 0
        done.append(index)

    other = threading.Thread(target=slices, args=(1,), daemon=True)
    other.start()
    slices(0)
    other.join(60)
    assert sorted(done) == [0, 1]


def test_another_thread_may_run_the_engine_even_when_the_first_is_gone(machine: Machine) -> None:
    """Every thread here is new, and most get the identifier of the one before."""
    machine.start(programs.SPIN)

    def slices() -> None:
        for wait in (100_000, 50_000):
            assert machine.cpu.run(CLOCK.now_ns() + wait) is Exit.KICK
        machine.cpu.set_deadline(CLOCK.now_ns() + 300_000)       # left behind, armed, when the thread ends

    started = CLOCK.now_ns()
    for _ in range(20):
        in_thread(slices)
        slices()
    assert CLOCK.now_ns() - started < 5_000 * MS


def test_a_thread_that_blocks_all_signals_can_run_an_engine(machine: Machine) -> None:
    machine.start(programs.SPIN)

    def blocked() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, set(signal.valid_signals()))
        assert machine.cpu.run(CLOCK.now_ns() + MS) is Exit.KICK

    in_thread(blocked)


def test_close_while_armed_leaves_the_engine_alone(machine: Machine) -> None:
    """Where the kick words were is watched through the block: after close it must point into itself for good."""
    for _ in range(50):
        cpu = UnicornX86(machine.memory, CLOCK)
        cpu.set_deadline(CLOCK.now_ns() + 100_000)
        block, engine = block_of(cpu), cpu._state.kick_words
        assert tuple(block.words[:2]) == engine
        cpu.close()
        own = range(block.address, block.address + block.SIZE)
        assert block.words[0] in own and block.words[1] in own and block.words[block.ARMED] == NEVER
        assert block in unicorn_timer._Block._free
        cpu.close()
    time.sleep(0.001)


def test_an_engine_that_nobody_closes_takes_its_timer_along() -> None:
    memory = Memory(1 << 20)
    cpu = UnicornX86(memory, CLOCK)
    cpu.set_deadline(CLOCK.now_ns() + 3_600_000 * MS)
    block = block_of(cpu)
    memory.remove_listener(cpu.invalidate)
    gone = weakref.ref(cpu)
    del cpu
    gc.collect()
    assert gone() is None
    assert block.words[0] == block.address + 8 * block.OWN_INTERRUPT
    memory.close()


def test_timers_do_not_pile_up(machine: Machine) -> None:
    before = Path("/proc/self/timers").read_text().count("ID:")
    for _ in range(10):
        cpu = UnicornX86(machine.memory, CLOCK)
        in_thread(lambda cpu=cpu: cpu.set_deadline(CLOCK.now_ns() + 1000 * MS))  # type: ignore[misc]
        cpu.set_deadline(CLOCK.now_ns() + 500 * MS)
        cpu.close()
    assert Path("/proc/self/timers").read_text().count("ID:") == before


def test_system_calls_of_the_engines_thread_are_taken_up_again(machine: Machine) -> None:
    """A timer is left armed when the thread goes to wait for something else."""
    machine.start(programs.SPIN)
    cpu, condition = machine.cpu, threading.Condition()
    reader, writer = os.pipe()
    threading.Timer(0.03, os.write, (writer, b"x")).start()
    cpu.set_deadline(CLOCK.now_ns() + 5 * MS)
    assert os.read(reader, 1) == b"x"
    cpu.set_deadline(CLOCK.now_ns() + 5 * MS)
    started = time.monotonic()
    with condition:
        assert not condition.wait(0.03)
    assert time.monotonic() - started >= 0.03
    cpu.set_deadline(CLOCK.now_ns() + 5 * MS)
    machine.memory.write(0x200000, b"\xff" * 0x800000)
    machine.memory.zero(0x200, 0x800)                            # madvise()
    assert not any(machine.memory.b[0x200000:0xa00000:4096])
    os.close(reader)
    os.close(writer)


def test_a_fork_has_no_timers_and_makes_its_own(machine: Machine) -> None:
    machine.start(programs.SPIN)
    cpu = machine.cpu
    assert cpu.run(CLOCK.now_ns() + MS) is Exit.KICK
    cpu.set_deadline(CLOCK.now_ns() + 100 * MS)                  # armed here, not there
    child = os.fork()
    if not child:
        code = 1
        try:
            signal.alarm(20)
            deadline = CLOCK.now_ns() + 200 * MS
            if cpu.run(deadline) is Exit.KICK and CLOCK.now_ns() >= deadline:
                code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    deadline = CLOCK.now_ns() + 200 * MS
    assert cpu.run(deadline) is Exit.KICK and CLOCK.now_ns() >= deadline


def test_programs_we_start_know_nothing_of_the_signal(machine: Machine) -> None:
    ours = native()
    assert ours is not None
    cpu = machine.cpu
    cpu.set_deadline(CLOCK.now_ns() + MS)
    report = subprocess.run([sys.executable, "-c", "print(open('/proc/self/status').read())"],
                            capture_output=True, text=True, check=True).stdout
    masks = {line.split()[0]: int(line.split()[1], 16) for line in report.splitlines()
             if line.startswith(("SigCgt", "SigIgn", "SigBlk", "SigPnd"))}
    assert len(masks) == 4 and not any(mask >> (ours.signal - 1) & 1 for mask in masks.values())


def test_a_signal_that_somebody_else_sends_is_ignored(machine: Machine) -> None:
    ours = native()
    assert ours is not None
    machine.start(programs.SPIN)
    deadline = CLOCK.now_ns() + 20 * MS
    for _ in range(100):
        os.kill(os.getpid(), ours.signal)
    assert machine.cpu.run(deadline) is Exit.KICK
    assert CLOCK.now_ns() >= deadline


# --- hosts that refuse -----------------------------------------------------------------------------------------------

def refuse(*_: object) -> int:
    ctypes.set_errno(11)
    return -1


def test_a_host_without_such_timers_gets_the_alarm_thread(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unicorn_timer, "native", lambda: None)
    cpu = UnicornX86(machine.memory, CLOCK)
    assert isinstance(cpu._deadline, AlarmDeadline)
    cpu.load(cpu.new_context())
    cpu.set_cr3(ROOT)
    machine.put_code(CODE, programs.SPIN)
    cpu.gpr[16] = CODE
    deadline = CLOCK.now_ns() + 2 * MS
    assert cpu.run(deadline) is Exit.KICK and CLOCK.now_ns() >= deadline
    cpu.close()


def test_a_kernel_that_refuses_one_timer_more_is_no_error(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    """RLIMIT_SIGPENDING counts timers. The alarm thread serves such an engine from then on."""
    cpu = machine.cpu
    assert isinstance(cpu._deadline, KickTimer)
    machine.start(programs.SPIN)
    assert cpu.run(CLOCK.now_ns() + MS) is Exit.KICK
    monkeypatch.setattr(native(), "create", refuse)
    before = len(alarm_threads())

    def elsewhere() -> None:
        for _ in range(20):
            deadline = CLOCK.now_ns() + 300_000
            assert cpu.run(deadline) is Exit.KICK and CLOCK.now_ns() >= deadline

    in_thread(elsewhere)
    assert len(alarm_threads()) == before + 1
    monkeypatch.undo()
    elsewhere()
    cpu.close()
    for _ in range(100):
        if len(alarm_threads()) == before:
            break
        time.sleep(0.01)
    assert len(alarm_threads()) == before


@pytest.mark.parametrize("missing", ["timer_create", "delivery", "signals", "platform"])
def test_what_a_host_can_lack_is_noticed_before_an_engine_counts_on_it(
        monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    before = native()
    assert before is not None
    fresh: Any = None
    monkeypatch.setattr(unicorn_timer, "_native", None)
    if missing == "timer_create":
        monkeypatch.setattr(unicorn_timer, "_SIGEV_THREAD_ID", 99)             # EINVAL
    elif missing == "delivery":
        monkeypatch.setattr(unicorn_timer, "_SIGEV_THREAD_ID", 1)              # SIGEV_NONE: a timer without a signal
    elif missing == "signals":
        monkeypatch.setattr(unicorn_timer, "_FIRST_SIGNAL", 1000)              # none is left
    else:
        monkeypatch.setattr(unicorn_timer.platform, "machine", lambda: "aarch64")
    fresh = native()
    assert fresh is None
    memory = Memory(1 << 20)
    cpu = UnicornX86(memory, CLOCK, alarms=AlarmClock(CLOCK))
    assert isinstance(cpu._deadline, AlarmDeadline)
    cpu.close()
    memory.close()
