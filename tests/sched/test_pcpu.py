# SPDX-License-Identifier: GPL-2.0-only
"""The pCPU's thread with a scripted engine, in real time: block against wake, pausing, timers, idling, crashes."""

from __future__ import annotations

import asyncio
import random
import struct
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from pyxen.abi.sched import SchedOp
from pyxen.errors import GuestFault, HostError, InternalError
from pyxen.hypervisor.domain import Domain
from pyxen.hypervisor.pcpu import Pcpu
from pyxen.hypervisor.sched.credit import CreditScheduler
from pyxen.hypervisor.sched_op import do_sched_op
from pyxen.hypervisor.time import do_set_timer_op
from pyxen.hypervisor.vcpu import Vcpu
from pyxen.machine.clock import RealClock
from pyxen.machine.cpu.base import R15, RAX, Exit
from pyxen.machine.cpu.scripted import ScriptedCpu, Set, Spin, Syscall
from tests.sched.model import MS, Hypervisor, Pv

BLOCK = 29
WAIT_S = 20.0
Script = Callable[[Any], Iterator[Any]]


class Traps:
    """System calls by number in RAX, each a function of the vCPU."""

    def __init__(self, vcpu: Vcpu, calls: dict[int, Callable[[Vcpu], None]]) -> None:
        self.vcpu = vcpu
        self.calls = calls

    def syscall(self, next_rip: int) -> int:
        cpu = self.vcpu.cpu
        assert cpu is not None
        number = cpu.gpr[RAX]
        cpu.gpr[RAX] = 0
        self.calls[number](self.vcpu)
        return next_rip

    def exception(self, vector: int, error_code: int | None, rip: int, software: bool) -> int:
        return rip

    def cpuid(self, rip: int) -> int:
        return rip + 2


def block(vcpu: Vcpu) -> None:
    do_sched_op(vcpu.pv, SchedOp.BLOCK, 0)


class Rig:
    """A host of one pCPU whose guests are scripts."""

    def __init__(self, cpu_class: type[ScriptedCpu] = ScriptedCpu, tslice_ms: int = 30) -> None:
        self.clock = RealClock()
        self.hypervisor = Hypervisor(self.clock, CreditScheduler(tslice_ms=tslice_ms))
        self.cpu = cpu_class(self.hypervisor.memory, self.clock)  # type: ignore[arg-type]
        self.pcpu = Pcpu(self.hypervisor, self.cpu)  # type: ignore[arg-type]
        self.scheduler = self.hypervisor.scheduler
        self.scheduler.add_cpu(self.pcpu)

    def domain(self, *scripts: Script, calls: dict[int, Callable[[Vcpu], None]] | None = None) -> Domain:
        domain = self.hypervisor.new_domain(vcpus=len(scripts), up=False)
        for vcpu, script in zip(domain.vcpus, scripts, strict=True):
            vcpu.context = self.cpu.new_context(script)
            vcpu.pv.traps = Traps(vcpu, {BLOCK: block, **(calls or {})})  # type: ignore[assignment]
        return domain

    def up(self, domain: Domain) -> None:
        for vcpu in domain.vcpus:
            self.scheduler.vcpu_up(vcpu)

    def running(self, domain: Domain) -> int:
        return sum(self.scheduler.vcpu_cpu_time(vcpu) for vcpu in domain.vcpus)


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    made.pcpu.start()
    yield made
    made.pcpu.shutdown()
    assert not made.pcpu.is_alive()


def spin(_cpu: Any) -> Iterator[Any]:
    while True:
        yield Spin()


def eventually(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.0005)
    return True


# --- blocking and waking -------------------------------------------------------------------------------------


@pytest.fixture
def impatient_gil() -> Iterator[None]:
    """Threads change places after a microsecond: without it a thread mostly runs until it waits, and nothing races."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("impatient_gil")
def test_ten_thousand_wakes_race_with_block_and_none_is_lost(rig: Rig) -> None:
    """The waker answers as soon as the guest has handled the last event, just when it is about to block."""
    handled = threading.Semaphore(0)

    def handle(vcpu: Vcpu) -> None:
        b = rig.hypervisor.memory.b
        if b[vcpu.info_maddr]:
            b[vcpu.info_maddr] = 0
            handled.release()

    def guest(_cpu: Any) -> Iterator[Any]:
        while True:
            yield Syscall(rax=1)
            yield Syscall(rax=BLOCK)

    domain = rig.domain(guest, calls={1: handle})
    vcpu = domain.vcpus[0]
    events: Any = domain.evtchn
    rig.up(domain)
    rng = random.Random(1)
    for _ in range(10_000):
        if rng.random() < 0.1:
            time.sleep(rng.random() * 0.0002)  # let it get further into blocking now and then
        events.upcall(vcpu)
        assert handled.acquire(timeout=WAIT_S), rig.scheduler.dump()


def test_two_vcpus_wake_each_other_through_their_own_thread(rig: Rig) -> None:
    """Event ping-pong inside one engine: the wake comes from a trap handler."""
    rounds = [0, 0]
    done = threading.Event()

    def play(vcpu: Vcpu) -> None:
        rig.hypervisor.memory.b[vcpu.info_maddr] = 0
        rounds[vcpu.vcpu_id] += 1
        if rounds[vcpu.vcpu_id] >= 500:
            done.set()
        events: Any = vcpu.domain.evtchn
        events.upcall(vcpu.domain.vcpus[1 - vcpu.vcpu_id])

    def guest(_cpu: Any) -> Iterator[Any]:
        while True:
            yield Syscall(rax=1)
            yield Syscall(rax=BLOCK)

    domain = rig.domain(guest, guest, calls={1: play})
    rig.up(domain)
    assert done.wait(WAIT_S)
    assert abs(rounds[0] - rounds[1]) <= 1


@pytest.mark.usefixtures("impatient_gil")
def test_many_threads_pause_unpause_and_wake_one_vcpu(rig: Rig) -> None:
    """Whatever the order, the vCPU ends runnable and runs."""
    domain = rig.domain(spin)
    vcpu = domain.vcpus[0]
    rig.up(domain)

    def torment() -> None:
        for _ in range(150):
            rig.scheduler.vcpu_pause_nosync(vcpu)
            rig.scheduler.vcpu_wake(vcpu)
            rig.scheduler.domain_pause_nosync(domain)
            rig.scheduler.vcpu_unpause(vcpu)
            rig.scheduler.domain_unpause(domain)

    threads = [threading.Thread(target=torment) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (vcpu.pause_count, domain.pause_count) == (0, 0)
    assert eventually(lambda: vcpu.is_running)


def from_another_thread(function: Callable[[], None]) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def test_a_request_just_before_the_thread_sleeps_is_seen(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes after the loop looked for work; the last thing before sleeping is to ask the timers."""
    ran = threading.Event()
    original = rig.pcpu.timers.next_deadline

    def meanwhile() -> int | None:
        monkeypatch.setattr(rig.pcpu.timers, "next_deadline", original)
        from_another_thread(lambda: rig.pcpu.post(ran.set))
        return original()

    monkeypatch.setattr(rig.pcpu.timers, "next_deadline", meanwhile)
    rig.pcpu.kick()
    assert ran.wait(WAIT_S)


def test_a_request_just_before_the_guest_is_entered_is_served_first(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig.up(rig.domain(spin))
    assert eventually(lambda: rig.pcpu.entries > 0)
    entries: list[int] = []
    ran = threading.Event()
    original = rig.pcpu.timers.run_expired

    def note() -> None:
        entries.append(rig.pcpu.entries)
        ran.set()

    def meanwhile(now: int) -> int:
        monkeypatch.setattr(rig.pcpu.timers, "run_expired", original)
        entries.append(rig.pcpu.entries)
        from_another_thread(lambda: rig.pcpu.post(note))
        return original(now)

    monkeypatch.setattr(rig.pcpu.timers, "run_expired", meanwhile)
    rig.pcpu.kick()
    assert ran.wait(WAIT_S)
    assert entries[0] == entries[1]


# --- pausing ----------------------------------------------------------------------------------------------------


def count(_cpu: Any) -> Iterator[Any]:
    n = 0
    while True:
        n += 1
        yield Set(r15=n)


def test_pause_returns_when_registers_are_saved_and_stay(rig: Rig) -> None:
    domain = rig.domain(count)
    vcpu = domain.vcpus[0]
    assert vcpu.context is not None
    rig.up(domain)
    last = 0
    for _ in range(50):
        assert eventually(lambda: vcpu.is_running)
        rig.scheduler.vcpu_pause(vcpu)
        seen = vcpu.context.get().gpr[R15]  # InternalError if an engine still held it
        assert not vcpu.is_running
        assert seen >= last
        time.sleep(0.001)
        assert vcpu.context.get().gpr[R15] == seen
        last = seen
        rig.scheduler.vcpu_unpause(vcpu)
    assert last > 0


@pytest.mark.usefixtures("impatient_gil")
def test_pausing_a_domain_twice_from_two_threads(rig: Rig) -> None:
    domain = rig.domain(spin, spin)
    rig.up(domain)

    def pause() -> None:
        for _ in range(50):
            rig.scheduler.domain_pause(domain)
            assert not any(vcpu.is_running for vcpu in domain.vcpus)
            rig.scheduler.domain_unpause(domain)

    failures: list[BaseException] = []

    def guarded() -> None:
        try:
            pause()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=guarded) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_a_trap_handler_may_pause_another_domain_but_not_wait_for_itself(rig: Rig) -> None:
    victim = rig.domain(count)
    rig.up(victim)
    assert eventually(lambda: rig.running(victim) > 0)
    saved: list[int] = []

    def pause_other(_vcpu: Vcpu) -> None:
        rig.scheduler.vcpu_pause(victim.vcpus[0])
        context = victim.vcpus[0].context
        assert context is not None
        saved.append(context.get().gpr[R15])

    def pause_self(vcpu: Vcpu) -> None:
        rig.scheduler.vcpu_pause(vcpu)

    def guest(_cpu: Any) -> Iterator[Any]:
        yield Syscall(rax=1)
        yield Syscall(rax=2)

    killer = rig.domain(guest, calls={1: pause_other, 2: pause_self})
    rig.up(killer)
    assert eventually(lambda: bool(rig.hypervisor.crashes))
    assert len(saved) == 1
    assert rig.hypervisor.crashes[0][0] == killer.domid
    assert InternalError.__name__ in rig.hypervisor.crashes[0][1]


def test_a_destroyed_vcpu_is_nowhere_any_more(rig: Rig) -> None:
    for _ in range(20):
        domain = rig.domain(spin)
        vcpu = domain.vcpus[0]
        rig.up(domain)
        assert eventually(lambda vcpu=vcpu: vcpu.is_running)  # type: ignore[misc]
        rig.scheduler.domain_pause(domain)
        rig.scheduler.vcpu_destroy(vcpu)
        rig.scheduler.domain_destroy(domain)
        assert rig.cpu.loaded is None
    assert len(rig.scheduler.dump()) == 2


# --- sharing the engine --------------------------------------------------------------------------------------------


def test_two_spinning_domains_share_the_engine() -> None:
    rig = Rig(tslice_ms=2)
    rig.pcpu.start()
    try:
        one, two = rig.domain(spin), rig.domain(spin)
        rig.up(one)
        rig.up(two)
        time.sleep(0.6)
        rig.scheduler.domain_pause(one)
        rig.scheduler.domain_pause(two)
        total = rig.running(one) + rig.running(two)
        assert total > 0.3e9  # a loaded machine may give us less than we asked for
        assert 0.4 < rig.running(one) / total < 0.6
        assert rig.pcpu.entries > 20
    finally:
        rig.pcpu.shutdown()


def test_a_woken_vcpu_preempts_one_that_spins(rig: Rig) -> None:
    """Boost: it does not wait for the end of a 30 ms slice, let alone for ever."""
    hog = rig.domain(spin)
    woken = threading.Semaphore(0)

    def handle(vcpu: Vcpu) -> None:
        rig.hypervisor.memory.b[vcpu.info_maddr] = 0
        woken.release()

    def guest(_cpu: Any) -> Iterator[Any]:
        while True:
            yield Syscall(rax=BLOCK)
            yield Syscall(rax=1)

    sleeper = rig.domain(guest, calls={1: handle})
    rig.up(hog)
    rig.up(sleeper)
    events: Any = sleeper.evtchn
    assert eventually(lambda: bool(sleeper.vcpus[0].pause_flags))
    waits = []
    for _ in range(30):
        time.sleep(0.003)
        begin = time.monotonic()
        events.upcall(sleeper.vcpus[0])
        assert woken.acquire(timeout=WAIT_S)
        waits.append(time.monotonic() - begin)
    assert sorted(waits)[len(waits) // 2] < 0.008
    assert rig.running(hog) > 0


def test_max_run_forces_exits_that_the_guest_does_not_notice(rig: Rig) -> None:
    rig.pcpu.max_run_ns = 200_000
    domain = rig.domain(spin)
    rig.up(domain)
    assert eventually(lambda: rig.pcpu.entries > 200)
    assert domain.vcpus[0].is_running


def test_the_engine_is_loaded_only_when_another_vcpu_comes(rig: Rig) -> None:
    """Lazy switching: a vCPU that blocks and wakes alone stays loaded."""
    wakes = threading.Semaphore(0)

    def handle(vcpu: Vcpu) -> None:
        rig.hypervisor.memory.b[vcpu.info_maddr] = 0
        wakes.release()

    def guest(_cpu: Any) -> Iterator[Any]:
        while True:
            yield Syscall(rax=1)
            yield Syscall(rax=BLOCK)

    domain = rig.domain(guest, calls={1: handle})
    rig.up(domain)
    events: Any = domain.evtchn
    for _ in range(20):
        events.upcall(domain.vcpus[0])
        assert wakes.acquire(timeout=WAIT_S)
    assert rig.cpu.journal.count(("load",)) == 1


# --- timers ----------------------------------------------------------------------------------------------------


def test_timers_reach_a_guest_that_runs_and_one_that_sleeps(rig: Rig) -> None:
    """Armed by the guest's own hypercall: in the run the deadline moves, asleep the thread wakes for it."""
    late: list[float] = []
    deadlines: list[int] = []
    done = threading.Event()

    def arm(vcpu: Vcpu) -> None:
        b = rig.hypervisor.memory.b
        if b[vcpu.info_maddr]:
            b[vcpu.info_maddr] = 0
            late.append((rig.clock.now_ns() - deadlines[-1]) / 1e6)
            if len(late) >= 20:
                done.set()
        if len(deadlines) == len(late):
            deadlines.append(rig.clock.now_ns() + 3 * MS)
            do_set_timer_op(vcpu.pv, deadlines[-1])

    def guest(_cpu: Any) -> Iterator[Any]:
        while len(late) < 10:
            yield Syscall(rax=1)
            yield Spin()
        while True:
            yield Syscall(rax=1)
            yield Syscall(rax=BLOCK)

    rig.up(rig.domain(guest, calls={1: arm}))
    assert done.wait(WAIT_S)
    assert min(late) >= 0  # never early: Linux would arm it again, thousands of times a second
    assert sorted(late)[len(late) // 2] < 10


def test_poll_times_out(rig: Rig) -> None:
    done = threading.Event()
    begin: list[int] = []

    def poll(vcpu: Vcpu) -> None:
        begin.append(rig.clock.now_ns())
        at = Pv.BASE + 0x100
        vcpu.pv.write(at, struct.pack("<QI4xQ", 0, 0, begin[0] + 5 * MS))
        do_sched_op(vcpu.pv, SchedOp.POLL, at)

    def guest(_cpu: Any) -> Iterator[Any]:
        yield Syscall(rax=1)
        done.set()

    rig.up(rig.domain(guest, calls={1: poll}))
    assert done.wait(WAIT_S)
    assert rig.clock.now_ns() - begin[0] >= 5 * MS


def test_an_idle_host_sleeps(rig: Rig) -> None:
    def guest(_cpu: Any) -> Iterator[Any]:
        yield Syscall(rax=BLOCK)

    domain = rig.domain(guest)
    rig.up(domain)
    assert eventually(lambda: bool(domain.vcpus[0].pause_flags))
    time.sleep(0.05)  # the scheduler's last tick
    assert rig.pcpu.timers.next_deadline() is None
    rounds = 0
    once = rig.pcpu._once

    def counted() -> None:
        nonlocal rounds
        rounds += 1
        once()

    rig.pcpu._once = counted  # type: ignore[method-assign]
    busy, idle = time.process_time(), rig.pcpu.idle_ns
    time.sleep(0.5)
    assert rounds == 0
    assert time.process_time() - busy < 0.1
    rig.pcpu.kick()
    assert eventually(lambda: rig.pcpu.idle_ns - idle > 0.4e9)


# --- when things go wrong ---------------------------------------------------------------------------------------------


def fault(_vcpu: Vcpu) -> None:
    raise GuestFault("it jumped into the void")


def bug(_vcpu: Vcpu) -> None:
    raise RuntimeError("ours")


def one_call(_cpu: Any) -> Iterator[Any]:
    yield Syscall(rax=1)


def test_a_guest_fault_and_a_bug_of_ours_crash_one_domain_each(rig: Rig) -> None:
    bystander = rig.domain(spin)
    rig.up(bystander)
    guilty = rig.domain(one_call, calls={1: fault})
    rig.up(guilty)
    assert eventually(lambda: len(rig.hypervisor.crashes) == 1)
    assert rig.hypervisor.crashes == [(guilty.domid, "it jumped into the void")]
    assert rig.hypervisor.log.lines == []
    unlucky = rig.domain(one_call, calls={1: bug})
    rig.up(unlucky)
    assert eventually(lambda: len(rig.hypervisor.crashes) == 2)
    assert rig.hypervisor.crashes[1][0] == unlucky.domid
    assert any("RuntimeError: ours" in line for line in rig.hypervisor.log.lines)
    before = rig.running(bystander)
    assert eventually(lambda: rig.running(bystander) > before)
    assert not bystander.is_shut_down


class FailingCpu(ScriptedCpu):
    """An engine that gives up."""

    def run(self, deadline_ns: int | None) -> Exit:
        self.error = "segment gone at rip 0x10"
        return Exit.ERROR


def test_an_engine_failure_crashes_the_domain_it_ran() -> None:
    rig = Rig(FailingCpu)
    rig.pcpu.start()
    try:
        domain = rig.domain(spin)
        rig.up(domain)
        assert eventually(lambda: domain.is_shut_down)
        assert rig.hypervisor.crashes == [(domain.domid, "CPU engine failed: segment gone at rip 0x10")]
    finally:
        rig.pcpu.shutdown()


def test_a_failing_crash_handler_does_not_let_the_domain_spin(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_domain: Domain, _reason: str) -> None:
        raise RuntimeError("no crash today")

    monkeypatch.setattr(rig.hypervisor, "crash", broken)
    domain = rig.domain(one_call, calls={1: fault})
    rig.up(domain)
    assert eventually(lambda: domain.pause_count == 1 and not domain.vcpus[0].is_running)
    assert rig.pcpu.is_alive()


def test_what_is_posted_may_fail_and_the_thread_lives(rig: Rig) -> None:
    def fail() -> None:
        raise RuntimeError("posted")

    rig.pcpu.post(fail)
    assert rig.pcpu.call(threading.get_ident).result(WAIT_S) == rig.pcpu.ident
    assert any("posted" in line for line in rig.hypervisor.log.lines)


# --- calls from other threads -----------------------------------------------------------------------------------


def test_call_runs_on_the_pcpus_thread_while_a_guest_spins(rig: Rig) -> None:
    rig.up(rig.domain(spin))
    assert rig.pcpu.call(threading.get_ident).result(WAIT_S) == rig.pcpu.ident
    assert rig.pcpu.execute(lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        rig.pcpu.execute(lambda: 1 // 0)

    async def wait() -> int | None:
        return await asyncio.wrap_future(rig.pcpu.call(threading.get_ident))

    assert asyncio.run(wait()) == rig.pcpu.ident


def test_call_before_start_and_after_shutdown() -> None:
    rig = Rig()
    assert rig.pcpu.execute(threading.get_ident) == threading.get_ident()
    domain = rig.domain(spin)
    rig.scheduler.domain_pause(domain)  # does not wait for a thread that is not there
    rig.pcpu.start()
    rig.pcpu.shutdown()
    rig.pcpu.shutdown()
    with pytest.raises(HostError):
        rig.pcpu.execute(lambda: None)
    rig.scheduler.domain_pause(domain)


def test_a_pcpu_that_was_never_started_shuts_down() -> None:
    rig = Rig()
    rig.pcpu.shutdown()
    assert not rig.pcpu.is_alive()


def test_shutdown_with_a_guest_running_leaves_it_saved() -> None:
    rig = Rig()
    rig.pcpu.start()
    domain = rig.domain(count)
    vcpu = domain.vcpus[0]
    rig.up(domain)
    assert eventually(lambda: vcpu.is_running)
    rig.pcpu.shutdown()
    assert not vcpu.is_running
    assert vcpu.context is not None
    assert vcpu.context.get().gpr[R15] >= 0
