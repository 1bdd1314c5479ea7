# SPDX-License-Identifier: GPL-2.0-only
"""Several pCPUs and up to thousands of vCPUs in virtual time, no engine: shares, caps, affinity, pools, no starvation.

Whatever happens, no two pCPUs execute the same domain at a time, and none executes a vCPU where it may not.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

import pytest

from pyxen.errors import XenError
from pyxen.hypervisor.cpupool import CpuPools
from pyxen.hypervisor.domain import Domain
from pyxen.hypervisor.sched.credit import ROTATE_NS, CreditScheduler
from pyxen.hypervisor.schedule_homes import HOME_TURN_NS
from pyxen.hypervisor.vcpu import Vcpu
from pyxen.machine.clock import VirtualClock
from pyxen.machine.topology import Topology
from tests.sched.model import MS, US, Hypervisor, ModelPcpu, S, burst, cpu_time, hog

Work = Callable[[], Iterator[tuple[int, int]]]


class Machine:
    """``engines`` pCPUs that run side by side, and modelled ones up to ``nr_cpus`` that share their run queues."""

    def __init__(self, engines: int, nr_cpus: int | None = None) -> None:
        self.clock = VirtualClock()
        self.hv = Hypervisor(self.clock, CreditScheduler())
        self.pcpus = [ModelPcpu(self.hv, index) for index in range(engines)]
        self.scheduler = self.hv.scheduler
        self.scheduler.share_cpus(nr_cpus or engines)
        self.hv.topology = Topology(cores=nr_cpus or engines)
        self.pools = self.scheduler.cpupools = CpuPools(self.hv, nr_cpus or engines)  # type: ignore[arg-type]
        self.worst_wait: dict[Vcpu, int] = {}

    def domain(self, work: Work = hog, *, vcpus: int = 1, weight: int | None = None, cap: int | None = None) -> Domain:
        domain = self.hv.new_domain(vcpus=vcpus, weight=weight, cap=cap, up=False)
        self.pools.admit(domain)
        for pcpu in self.pcpus:
            pcpu.load(domain, work)
        for vcpu in domain.vcpus:
            vcpu.is_initialised = True
            self.scheduler.vcpu_up(vcpu)
        return domain

    def check(self) -> None:
        running = [pcpu.current for pcpu in self.pcpus if pcpu.current is not None]
        domains = [vcpu.domain for vcpu in running]
        assert len(set(domains)) == len(domains), "a domain on two engines"
        for pcpu in self.pcpus:
            if pcpu.current is not None:
                assert pcpu.current.domain.home == pcpu.index

    def run_for(self, ns: int, *, longest_step: int = S) -> None:
        end = self.clock.now_ns() + ns
        while True:
            now = self.clock.now_ns()
            again = True
            while again:
                again = False
                for pcpu in self.pcpus:
                    while pcpu.wakes and pcpu.wakes[0][0] <= now:
                        vcpu = pcpu.wakes.pop(0)[2]
                        self.scheduler.vcpu_unblock(vcpu)
                    pcpu.timers.run_expired(now)
                    if pcpu.resched:
                        pcpu.reschedule()
                        again = True
            self.check()
            if now >= end:
                return
            until = min(end, now + longest_step)
            for pcpu in self.pcpus:
                if pcpu.wakes:
                    until = min(until, pcpu.wakes[0][0])
                deadline = pcpu.timers.next_deadline()
                if deadline is not None:
                    until = min(until, max(deadline, now + 1))
                if pcpu.current is not None:
                    until = min(until, now + self._left(pcpu))
            step = until - now
            self.clock.advance(step)
            for pcpu in self.pcpus:
                vcpu_now = pcpu.current
                if vcpu_now is None:
                    continue
                for other in self.pcpus:  # the work goes with the vCPU
                    other.left[vcpu_now] -= step
                if not pcpu.left[vcpu_now]:
                    nap = pcpu.nap[vcpu_now]
                    run, next_nap = next(pcpu.work[vcpu_now])
                    for other in self.pcpus:
                        other.left[vcpu_now], other.nap[vcpu_now] = run, next_nap
                    self.scheduler.begin_wait(vcpu_now)
                    self.scheduler.wait_begun(vcpu_now)
                    pcpu.wakes.append((until + nap, next(pcpu.order), vcpu_now))
                    pcpu.wakes.sort()

    @staticmethod
    def _left(pcpu: ModelPcpu) -> int:
        assert pcpu.current is not None
        return max(pcpu.left[pcpu.current], 1)


def share(domain: Domain, ns: int) -> float:
    return cpu_time(domain) / ns


def test_two_hogs_on_two_pcpus_have_one_each() -> None:
    machine = Machine(2)
    domains = [machine.domain() for _ in range(2)]
    machine.run_for(2 * S)
    assert all(share(domain, 2 * S) > 0.99 for domain in domains)


def test_a_domain_that_waits_goes_to_the_pcpu_that_became_idle() -> None:
    machine = Machine(2)
    busy = machine.domain()
    there = machine.domain()
    waits = machine.domain()  # shares a pCPU with one of them
    machine.run_for(S)
    assert busy.home != there.home
    machine.scheduler.domain_pause_nosync(there if waits.home == busy.home else busy)
    before = cpu_time(waits)
    machine.run_for(S)
    assert cpu_time(waits) - before > 0.98 * S


@pytest.mark.parametrize(("engines", "guests"), [(2, 3), (3, 4), (4, 7)])
def test_equal_domains_that_cannot_be_spread_evenly_get_equal_shares(engines: int, guests: int) -> None:
    machine = Machine(engines)
    domains = [machine.domain() for _ in range(guests)]
    machine.run_for(S)
    start = [cpu_time(domain) for domain in domains]
    machine.run_for(20 * S)
    fair = 20 * S * engines / guests
    for domain, before in zip(domains, start, strict=True):
        assert abs(cpu_time(domain) - before - fair) < 0.06 * fair
    assert sum(cpu_time(domain) for domain in domains) - sum(start) > 0.99 * 20 * S * engines


def test_weights_hold_across_pcpus() -> None:
    machine = Machine(2)
    light = [machine.domain(weight=256) for _ in range(3)]
    heavy = [machine.domain(weight=512) for _ in range(3)]
    machine.run_for(S)
    start = {domain: cpu_time(domain) for domain in light + heavy}
    machine.run_for(30 * S)
    gained = {domain: cpu_time(domain) - before for domain, before in start.items()}
    total = sum(gained.values())
    for domain in light:
        assert gained[domain] / total == pytest.approx(1 / 9, rel=0.08)
    for domain in heavy:
        assert gained[domain] / total == pytest.approx(2 / 9, rel=0.08)


def test_a_cap_holds_on_an_idle_machine() -> None:
    machine = Machine(4)
    capped = machine.domain(cap=30)
    free = machine.domain()
    machine.run_for(S)
    before = cpu_time(capped)
    machine.run_for(10 * S)
    assert (cpu_time(capped) - before) / (10 * S) == pytest.approx(0.3, abs=0.02)
    assert share(free, 11 * S) > 0.99


def test_a_domain_never_runs_where_its_hard_affinity_forbids() -> None:
    machine = Machine(3)
    pinned = machine.domain(vcpus=2)
    for vcpu in pinned.vcpus:
        machine.scheduler.vcpu_set_affinity(vcpu, frozenset({2}), None)
    crowd = [machine.domain() for _ in range(4)]
    for _ in range(400):
        machine.run_for(5 * MS)
        for pcpu in machine.pcpus[:2]:
            assert pcpu.current is None or pcpu.current.domain is not pinned
    assert all(vcpu.processor == 2 for vcpu in pinned.vcpus)
    assert share(pinned, 2 * S) > 0.4
    assert all(cpu_time(domain) for domain in crowd)


def test_vcpus_of_one_domain_pinned_apart_take_turns() -> None:
    """They cannot run at the same time: their domain goes to and fro, and neither starves."""
    machine = Machine(2)
    domain = machine.domain(vcpus=2)
    for vcpu in domain.vcpus:
        machine.scheduler.vcpu_set_affinity(vcpu, frozenset({vcpu.vcpu_id}), None)
    machine.run_for(2 * S)
    times = [machine.scheduler.vcpu_cpu_time(vcpu) for vcpu in domain.vcpus]
    assert sum(times) > 1.9 * S
    assert all(time > 0.8 * S for time in times)
    moves = 2 * S / HOME_TURN_NS
    assert sum(pcpu.switches for pcpu in machine.pcpus) < 3 * moves + 50


def test_vcpus_of_one_domain_rotate_within_its_turn() -> None:
    machine = Machine(1)
    many = machine.domain(vcpus=4)
    alone = machine.domain()
    longest = 0
    current, since = None, 0
    for _ in range(20_000):
        machine.run_for(20 * US)
        pcpu = machine.pcpus[0]
        if pcpu.current is not current:
            current, since = pcpu.current, machine.clock.now_ns()
        elif current is not None and current.domain is many:
            longest = max(longest, machine.clock.now_ns() - since)
    assert longest <= ROTATE_NS + 20 * US
    times = [machine.scheduler.vcpu_cpu_time(vcpu) for vcpu in many.vcpus]
    assert max(times) - min(times) < 0.1 * max(times)
    assert cpu_time(alone) > 0.15 * cpu_time(many)


def test_who_is_sent_an_ipi_runs_next() -> None:
    machine = Machine(1)
    domain = machine.domain(vcpus=8)
    machine.run_for(10 * MS)
    for target in (5, 2, 7, 0):
        current = machine.pcpus[0].current
        assert current is not None
        if current is domain.vcpus[target]:
            continue
        machine.scheduler.vcpu_yield_to(current, domain.vcpus[target])
        machine.run_for(1)
        assert machine.pcpus[0].current is domain.vcpus[target]


def test_waking_is_quick_on_a_busy_machine() -> None:
    """A domain that sleeps most of the time is boosted past hogs, wherever it is."""
    machine = Machine(2)
    for _ in range(4):
        machine.domain()
    sleeper = machine.domain(burst(100 * US, 5 * MS))
    machine.run_for(5 * S)
    assert cpu_time(sleeper) > 0.8 * 5 * S * 100 / 5100


def test_a_pools_domains_stay_on_its_pcpus_and_share_only_them() -> None:
    machine = Machine(4)
    pool = machine.pools.create(5)
    for cpu in (2, 3):
        machine.pools.remove_cpu(machine.pools.get(0), cpu)
        machine.pools.add_cpu(pool, cpu)
    ours = [machine.domain() for _ in range(3)]
    for domain in ours:
        machine.pools.move_domain(pool, domain)
    theirs = [machine.domain() for _ in range(1)]
    for _ in range(400):
        machine.run_for(10 * MS)
        for pcpu in machine.pcpus:
            if pcpu.current is not None:
                assert (pcpu.current.domain in ours) == (pcpu.index in (2, 3))
    assert share(theirs[0], 4 * S) > 0.98
    times = [cpu_time(domain) for domain in ours]
    assert sum(times) > 0.97 * 8 * S
    assert min(times) > 0.85 * max(times)
    machine.pools.remove_cpu(pool, 3)
    start = [cpu_time(domain) for domain in ours]
    machine.run_for(6 * S)
    assert sum(cpu_time(domain) - before for domain, before in zip(ours, start, strict=True)) < 6.01 * S
    with pytest.raises(XenError):
        machine.pools.remove_cpu(pool, 2)


def test_pool_errors_are_xens() -> None:
    machine = Machine(2)
    domain = machine.domain()
    pool = machine.pools.create(5)
    for action, errno in (
        (lambda: machine.pools.create(4), 22), (lambda: machine.pools.create(5, pool.poolid), 17),
        (lambda: machine.pools.get(77), 2), (lambda: machine.pools.destroy(0), 16),
        (lambda: machine.pools.add_cpu(pool), 19), (lambda: machine.pools.add_cpu(pool, 1), 16),
        (lambda: machine.pools.add_cpu(pool, 2), 22), (lambda: machine.pools.remove_cpu(pool, 0), 22),
        (lambda: machine.pools.move_domain(pool, domain), 19),
        (lambda: machine.scheduler.vcpu_set_affinity(domain.vcpus[0], frozenset({9}), None), 22),
    ):
        with pytest.raises(XenError) as caught:
            action()
        assert caught.value.errno == errno


def test_modelled_pcpus_show_but_do_not_run() -> None:
    machine = Machine(2, nr_cpus=128)
    domain = machine.domain(vcpus=8)
    assert len({vcpu.processor for vcpu in domain.vcpus}) == 8
    assert {vcpu.processor % 2 for vcpu in domain.vcpus} == {domain.home}
    machine.scheduler.vcpu_set_affinity(domain.vcpus[3], frozenset({100}), None)
    assert domain.vcpus[3].processor == 100
    machine.run_for(S)
    assert cpu_time(domain) > 0.99 * S


@pytest.mark.slow
def test_thousands_of_vcpus_none_starves() -> None:
    machine = Machine(4, nr_cpus=64)
    rng = random.Random(7)
    domains = [machine.domain(vcpus=rng.choice((4, 8, 32)), weight=256) for _ in range(150)]
    assert sum(len(domain.vcpus) for domain in domains) > 2000
    machine.run_for(3 * S // 2)
    starved = [vcpu for domain in domains for vcpu in domain.vcpus if not machine.scheduler.vcpu_cpu_time(vcpu)]
    assert not starved
    assert sum(map(cpu_time, domains)) > 0.98 * 4 * 3 * S // 2


@pytest.mark.parametrize("seed", range(6))
def test_nothing_is_lost_whatever_happens(seed: int) -> None:
    """Random pausing, pinning, moving between pools, blocking and dying of load: in the end everybody runs."""
    rng = random.Random(seed)
    machine = Machine(3, nr_cpus=6)
    pool = machine.pools.create(5)
    machine.pools.remove_cpu(machine.pools.get(0), 5)
    machine.pools.add_cpu(pool, 5)
    domains = [
        machine.domain(rng.choice((hog, burst(300 * US, MS), burst(2 * MS, 7 * MS))), vcpus=rng.choice((1, 1, 2, 4)))
        for _ in range(8)
    ]
    paused: list[Domain] = []
    for _ in range(300):
        machine.run_for(rng.randrange(1, 4 * MS))
        domain = rng.choice(domains)
        match rng.randrange(5):
            case 0:
                if domain in paused:
                    paused.remove(domain)
                    machine.scheduler.domain_unpause(domain)
                else:
                    paused.append(domain)
                    machine.scheduler.domain_pause(domain)
            case 1:
                cpus = frozenset(rng.sample(range(6), rng.randrange(1, 4)))
                if cpus & machine.pools.get(domain.cpupool).cpus:
                    machine.scheduler.vcpu_set_affinity(rng.choice(domain.vcpus), cpus, None)
            case 2:
                machine.scheduler.vcpu_set_affinity(rng.choice(domain.vcpus), None, frozenset({rng.randrange(6)}))
            case 3:
                machine.pools.move_domain(rng.choice((pool, machine.pools.get(0))), domain)
            case _:
                machine.scheduler.vcpu_kick(rng.choice(domain.vcpus))
    for domain in paused:
        machine.scheduler.domain_unpause(domain)
    for domain, vcpu in itertools.chain.from_iterable(((d, v) for v in d.vcpus) for d in domains):
        machine.pools.move_domain(machine.pools.get(0), domain)
        machine.scheduler.vcpu_set_affinity(vcpu, None, None)
    before = {vcpu: machine.scheduler.vcpu_cpu_time(vcpu) for domain in domains for vcpu in domain.vcpus}
    machine.run_for(6 * S)
    assert all(machine.scheduler.vcpu_cpu_time(vcpu) > time for vcpu, time in before.items())
