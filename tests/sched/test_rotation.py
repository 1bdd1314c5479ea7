# SPDX-License-Identifier: GPL-2.0-only
"""vCPUs of one domain that take turns: Schedule.rotate(), and the pCPU that lets them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from pyxen.abi.vcpu import RUNSTATE_INFO
from pyxen.hypervisor.domain import Domain
from pyxen.hypervisor.sched.credit import ROTATE_NS
from pyxen.hypervisor.vcpu import RunState, Vcpu
from tests.sched.model import MS, US, Hypervisor, ModelPcpu, Pv, host
from tests.sched.test_pcpu import Rig, eventually, spin


class Turns:
    """A domain on one pCPU, its first vCPU running; the others wait."""

    def __init__(self, vcpus: int = 3) -> None:
        self.hypervisor: Hypervisor
        self.pcpu: ModelPcpu
        self.hypervisor, self.pcpu = host()
        self.clock = self.hypervisor.clock
        self.scheduler = self.hypervisor.scheduler
        self.domain: Domain = self.hypervisor.new_domain(vcpus=vcpus)
        self.pcpu.resched = False
        assert self.schedule() is self.vcpu(0)

    def vcpu(self, number: int) -> Vcpu:
        return self.domain.vcpus[number]

    def schedule(self) -> Vcpu | None:
        previous, chosen = self.pcpu.current, self.scheduler.schedule(0)
        return self._switched(previous, chosen)

    def rotate(self, executed_ns: int = MS) -> Vcpu | None:
        previous, chosen = self.pcpu.current, self.scheduler.rotate(0, self.clock.now_ns(), executed_ns)
        return chosen if chosen is None else self._switched(previous, chosen)

    def _switched(self, previous: Vcpu | None, chosen: Vcpu | None) -> Vcpu | None:
        if previous is not None and previous is not chosen:
            self.scheduler.context_saved(previous)
        self.pcpu.current = chosen
        return chosen

    def left(self) -> int:
        return self.pcpu.timers.slice_end_ns - self.clock.now_ns()


def test_each_has_its_turn_and_time_is_accounted() -> None:
    turns = Turns()
    order = []
    for _ in range(6):
        turns.clock.advance(ROTATE_NS)
        chosen = turns.rotate()
        assert chosen is not None and chosen.is_running and chosen.runstate is RunState.RUNNING
        assert turns.left() == ROTATE_NS
        order.append(chosen.vcpu_id)
    assert order == [1, 2, 0, 1, 2, 0]
    assert [vcpu.is_running for vcpu in turns.domain.vcpus] == [True, False, False]
    for vcpu in turns.domain.vcpus:
        _state, _since, times = turns.scheduler.runstate(vcpu)
        assert (times[RunState.RUNNING], times[RunState.RUNNABLE]) == (2 * ROTATE_NS, 4 * ROTATE_NS)


@pytest.mark.parametrize(("passed", "executed"), [(150 * US, MS), (MS, 150 * US)])
def test_a_slice_that_is_not_over_goes_on_for_the_rest(passed: int, executed: int) -> None:
    """By the clock, and by what the computer gave to the thread."""
    turns = Turns()
    turns.clock.advance(passed)
    assert turns.rotate(executed) is turns.vcpu(0)
    assert turns.left() == 100 * US, "not less than the least slice"
    assert not any(vcpu.is_running for vcpu in turns.domain.vcpus[1:])


def test_one_that_blocks_or_yields_makes_room_at_once() -> None:
    turns = Turns()
    turns.scheduler.begin_wait(turns.vcpu(0))
    assert turns.rotate(0) is turns.vcpu(1)
    assert turns.vcpu(0).runstate is RunState.BLOCKED
    turns.scheduler.vcpu_yield(turns.vcpu(1))
    assert turns.rotate(0) is turns.vcpu(2)
    turns.clock.advance(ROTATE_NS)
    assert turns.rotate() is turns.vcpu(1), "the one that blocked is not in the queue"
    turns.scheduler.begin_wait(turns.vcpu(1))
    assert turns.rotate() is turns.vcpu(2)
    assert turns.left() > 10 * MS, "alone, it has the rest of the turn"
    turns.scheduler.begin_wait(turns.vcpu(2))
    assert turns.rotate() is None and turns.schedule() is None


def test_who_was_sent_an_ipi_is_next_and_the_order_of_the_others_stays() -> None:
    turns = Turns(vcpus=4)
    turns.scheduler.vcpu_yield_to(turns.vcpu(0), turns.vcpu(3))
    assert turns.rotate(0) is turns.vcpu(3)
    order = []
    for _ in range(3):
        turns.clock.advance(ROTATE_NS)
        chosen = turns.rotate()
        assert chosen is not None
        order.append(chosen.vcpu_id)
    assert order == [1, 2, 0]


def test_a_paused_vcpu_goes_offline() -> None:
    turns = Turns()
    turns.scheduler.vcpu_pause_nosync(turns.vcpu(0))
    assert turns.rotate(0) is turns.vcpu(1)
    assert turns.vcpu(0).runstate is RunState.OFFLINE
    turns.scheduler.vcpu_unpause(turns.vcpu(0))
    turns.clock.advance(ROTATE_NS)
    assert turns.rotate() is turns.vcpu(2)


def test_what_concerns_others_is_decided_in_full() -> None:
    turns = Turns()
    turns.clock.advance(ROTATE_NS)
    other = turns.hypervisor.new_domain(vcpus=1)
    assert turns.rotate() is None, "another domain waits"
    turns.scheduler.vcpu_pause_nosync(other.vcpus[0])
    assert turns.rotate() is turns.vcpu(1)
    turns.clock.advance(40 * MS)
    assert turns.rotate() is None, "the turn is over"
    assert turns.schedule() is turns.vcpu(2)
    turns.clock.advance(ROTATE_NS)
    turns.scheduler._cpus[0].claims[turns.domain] = 7
    assert turns.rotate() is None, "another pCPU wants the domain"
    turns.scheduler._cpus[0].claims.clear()
    for vcpu in turns.domain.vcpus[:2]:
        turns.scheduler.vcpu_pause_nosync(vcpu)
    assert turns.rotate() is None, "nobody waits"


# --- on a pCPU's thread ------------------------------------------------------------------------------------------


@pytest.fixture
def rig() -> Iterator[Rig]:
    made = Rig()
    made.pcpu.start()
    yield made
    made.pcpu.shutdown()


def test_busy_vcpus_rotate_and_see_it_in_their_runstate_areas(rig: Rig) -> None:
    domain = rig.domain(spin, spin, spin)
    for number, vcpu in enumerate(domain.vcpus):
        vcpu.runstate_guest_va = Pv.BASE + 64 * number
    rig.up(domain)
    scheduler = rig.scheduler
    assert eventually(lambda: all(scheduler.vcpu_cpu_time(vcpu) > 5 * MS for vcpu in domain.vcpus))
    scheduler.domain_pause(domain)
    for number, vcpu in enumerate(domain.vcpus):
        _state, _since, running, runnable, *_ = RUNSTATE_INFO.unpack(vcpu.pv.read(Pv.BASE + 64 * number, 48))
        assert running > 4 * MS and runnable > 4 * MS
        assert running <= vcpu.runstate_time_ns[RunState.RUNNING]


def test_a_domain_that_rotates_is_still_held_paused_and_posted_to(rig: Rig) -> None:
    """The thread does not leave the domain to rotate; whoever wants something of it gets it all the same."""
    domain = rig.domain(spin, spin)
    rig.up(domain)
    assert eventually(lambda: rig.running(domain) > 2 * MS)
    waits = []
    for _ in range(50):
        begin = time.monotonic()
        with rig.hypervisor.rendezvous.holding(domain):
            assert domain.inside is None
        assert rig.pcpu.call(threading.get_ident).result(timeout=10) == rig.pcpu.ident
        rig.scheduler.domain_pause(domain)
        assert not any(vcpu.is_running for vcpu in domain.vcpus)
        rig.scheduler.domain_unpause(domain)
        waits.append(time.monotonic() - begin)
    assert sorted(waits)[len(waits) // 2] < 0.05
    before = [rig.scheduler.vcpu_cpu_time(vcpu) for vcpu in domain.vcpus]
    assert eventually(lambda: all(rig.scheduler.vcpu_cpu_time(vcpu) > then + MS
                                  for vcpu, then in zip(domain.vcpus, before, strict=True)))


def test_what_exits_took_is_granted_once_in_a_slice(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that says that each run spent 150 µs in exits: slices get as much longer, not more."""
    run = rig.cpu.run

    def with_exits(deadline_ns: int | None) -> Any:
        rig.cpu.exits_ns += 150 * US
        return run(deadline_ns)

    monkeypatch.setattr(rig.cpu, "run", with_exits)
    granted = []
    rotate = rig.scheduler.rotate

    def seen(cpu: int, now: int, executed_ns: int) -> Vcpu | None:
        granted.append(rig.pcpu._granted_ns)
        return rotate(cpu, now, executed_ns)

    monkeypatch.setattr(rig.scheduler, "rotate", seen)
    domain = rig.domain(spin, spin)
    rig.up(domain)
    assert eventually(lambda: len(granted) > 50)
    assert set(granted) <= {0, 150 * US} and granted.count(150 * US) > 10
