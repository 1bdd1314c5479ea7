# SPDX-License-Identifier: GPL-2.0-only
"""The credit scheduler in virtual time: shares, caps, boost, starvation, rate limit."""

from __future__ import annotations

import errno
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyxen.errors import XenError
from pyxen.hypervisor.sched.credit import CreditScheduler
from pyxen.hypervisor.vcpu import RunState
from tests.sched.model import MS, US, S, burst, cpu_time, hog, host


def shares(*weights: int, seconds: int = 20) -> list[float]:
    hypervisor, pcpu = host()
    domains = [hypervisor.new_domain(weight=weight) for weight in weights]
    for domain in domains:
        pcpu.load(domain, hog)
    pcpu.run_for(S)  # let it settle
    before = [cpu_time(domain) for domain in domains]
    pcpu.run_for(seconds * S)
    return [(cpu_time(domain) - then) / (seconds * S) for domain, then in zip(domains, before, strict=True)]


@pytest.mark.parametrize("weights", [
    (256, 256), (256, 512), (256, 512, 1024), (128, 256, 384, 512), (100, 100, 100, 700), (64, 1024),
    (256,) * 10, (1000, 1001),
])
def test_busy_domains_get_the_share_of_their_weight_within_5_percent(weights: tuple[int, ...]) -> None:
    for share, weight in zip(shares(*weights), weights, strict=True):
        assert share == pytest.approx(weight / sum(weights), rel=0.05)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.integers(64, 1024), min_size=2, max_size=5))
def test_any_weights(weights: list[int]) -> None:
    for share, weight in zip(shares(*weights, seconds=30), weights, strict=True):
        assert share == pytest.approx(weight / sum(weights), rel=0.05)


def test_weights_hold_beside_a_domain_that_mostly_sleeps() -> None:
    """A sleeper collects credit that it does not use; it must not cost the others their proportion."""
    hypervisor, pcpu = host()
    light = hypervisor.new_domain(weight=1024)
    small = hypervisor.new_domain(weight=256)
    big = hypervisor.new_domain(weight=768)
    pcpu.load(light, burst(300 * US, 10 * MS))
    pcpu.load(small, hog)
    pcpu.load(big, hog)
    pcpu.run_for(30 * S)
    assert cpu_time(big) / cpu_time(small) == pytest.approx(3, rel=0.05)
    assert cpu_time(light) == pytest.approx(30 * S * 300 / 10_300, rel=0.2)  # all that it asked for


def test_a_domain_that_sleeps_over_each_tick_gets_no_more_than_its_share() -> None:
    """The theft that tick sampling allows: run between the ticks, sleep when they come."""
    hypervisor, pcpu = host()
    thief = hypervisor.new_domain()
    honest = hypervisor.new_domain()
    pcpu.load(thief, burst(9 * MS, 1 * MS))
    pcpu.load(honest, hog)
    pcpu.run_for(20 * S)
    assert cpu_time(thief) / (20 * S) < 0.55


def test_vcpus_of_one_domain_share_what_their_number_multiplies() -> None:
    """As in Xen: the weight counts for each active vCPU."""
    hypervisor, pcpu = host()
    two = hypervisor.new_domain(vcpus=2)
    one = hypervisor.new_domain()
    pcpu.load(two, hog)
    pcpu.load(one, hog)
    pcpu.run_for(20 * S)
    assert cpu_time(two) / cpu_time(one) == pytest.approx(2, rel=0.05)
    first, second = (hypervisor.scheduler.vcpu_cpu_time(vcpu) for vcpu in two.vcpus)
    assert first == pytest.approx(second, rel=0.05)


@pytest.mark.parametrize("cap", [10, 25, 50, 80])
def test_a_cap_holds_on_an_idle_host(cap: int) -> None:
    hypervisor, pcpu = host()
    domain = hypervisor.new_domain(cap=cap)
    pcpu.load(domain, hog)
    pcpu.run_for(20 * S)
    assert cpu_time(domain) / (20 * S) == pytest.approx(cap / 100, rel=0.05)
    assert cpu_time(domain) + pcpu_idle(hypervisor, domain) == pytest.approx(20 * S, rel=0.01)


def pcpu_idle(hypervisor: object, domain: object) -> int:
    """Time the only domain was parked."""
    state, _since, times = domain.hypervisor.scheduler.runstate(domain.vcpus[0])  # type: ignore[attr-defined]
    assert state in tuple(RunState)
    return int(times[RunState.OFFLINE])


def test_what_a_capped_domain_leaves_goes_to_the_others() -> None:
    hypervisor, pcpu = host()
    capped = hypervisor.new_domain(weight=2048, cap=20)
    small = hypervisor.new_domain(weight=256)
    big = hypervisor.new_domain(weight=512)
    for domain in (capped, small, big):
        pcpu.load(domain, hog)
    pcpu.run_for(30 * S)
    assert cpu_time(capped) / (30 * S) == pytest.approx(0.20, rel=0.05)
    assert cpu_time(big) / cpu_time(small) == pytest.approx(2, rel=0.05)
    assert cpu_time(big) + cpu_time(small) + cpu_time(capped) == pytest.approx(30 * S, rel=0.01)


def test_lifting_a_cap_unparks() -> None:
    hypervisor, pcpu = host()
    domain = hypervisor.new_domain(cap=5)
    pcpu.load(domain, hog)
    pcpu.run_for(5 * S)
    hypervisor.credit.adjust(domain, cap=0)
    pcpu.run_for(S)
    before = cpu_time(domain)
    pcpu.run_for(5 * S)
    assert cpu_time(domain) - before == pytest.approx(5 * S, rel=0.01)
    assert not domain.vcpus[0].pause_count


def test_boost_a_vcpu_that_does_io_runs_within_the_rate_limit() -> None:
    hypervisor, pcpu = host()
    io = hypervisor.new_domain()
    pcpu.load(io, burst(100 * US, 5 * MS))
    for _ in range(4):
        pcpu.load(hypervisor.new_domain(), hog)
    pcpu.run_for(S)  # every new vCPU starts boosted
    pcpu.latency.clear()
    pcpu.run_for(10 * S)
    latencies = sorted(pcpu.latency[io.vcpus[0]])
    assert len(latencies) > 1000
    assert latencies[len(latencies) * 99 // 100] <= 1 * MS + 100 * US  # rate limit: 1 ms
    assert latencies[-1] < 10 * MS


def test_without_rate_limit_boost_is_immediate() -> None:
    hypervisor, pcpu = host(ratelimit_us=0)
    io = hypervisor.new_domain()
    pcpu.load(io, burst(100 * US, 5 * MS))
    pcpu.load(hypervisor.new_domain(), hog)
    pcpu.run_for(5 * S)
    latencies = sorted(pcpu.latency[io.vcpus[0]])
    assert latencies[len(latencies) * 99 // 100] == 0


def test_rate_limit_bounds_context_switches() -> None:
    """Two boosters that wake all the time cannot make a hog switch more often than once a millisecond."""
    def switches(ratelimit_us: int) -> int:
        hypervisor, pcpu = host(ratelimit_us=ratelimit_us)
        for _ in range(2):
            pcpu.load(hypervisor.new_domain(), burst(10 * US, 50 * US))
        pcpu.load(hypervisor.new_domain(), hog)
        pcpu.run_for(S)
        return pcpu.switches

    assert switches(0) > 20_000
    # Each time the hog runs it runs for 1 ms, then at most both others and the hog again.
    assert switches(1000) < 3 * 1000 + 100


def test_a_hog_that_boosted_once_does_not_keep_its_boost() -> None:
    hypervisor, pcpu = host()
    waker = hypervisor.new_domain()
    other = hypervisor.new_domain()
    pcpu.load(waker, burst(200 * MS, MS))
    pcpu.load(other, hog)
    pcpu.run_for(20 * S)
    assert cpu_time(waker) / (20 * S) == pytest.approx(0.5, rel=0.06)


def test_no_starvation_beside_heavy_weights_and_boosters() -> None:
    hypervisor, pcpu = host()
    poor = hypervisor.new_domain(weight=64)
    pcpu.load(poor, hog)
    for _ in range(3):
        pcpu.load(hypervisor.new_domain(weight=4096), hog)
    for _ in range(3):
        pcpu.load(hypervisor.new_domain(weight=1024), burst(2 * MS, 2 * MS))
    runs = []
    for _ in range(40):
        before = cpu_time(poor)
        pcpu.run_for(5 * S)
        runs.append(cpu_time(poor) - before)
    assert sum(runs) > 0
    gaps = [len(list(group)) for ran, group in itertools.groupby(run > 0 for run in runs) if not ran]
    assert max(gaps, default=0) <= 4


def test_a_yield_lets_one_of_lower_priority_go_first() -> None:
    hypervisor, pcpu = host()
    spinner = hypervisor.new_domain()
    other = hypervisor.new_domain()
    pcpu.load(spinner, hog)
    pcpu.load(other, hog)
    pcpu.run_for(10 * MS)
    running = pcpu.current
    assert running is not None
    hypervisor.scheduler.vcpu_yield(running)
    pcpu.run_for(1)
    assert pcpu.current is not running


def test_a_yield_alone_goes_on() -> None:
    hypervisor, pcpu = host()
    domain = hypervisor.new_domain()
    pcpu.load(domain, hog)
    pcpu.run_for(10 * MS)
    hypervisor.scheduler.vcpu_yield(domain.vcpus[0])
    pcpu.run_for(1)
    assert pcpu.current is domain.vcpus[0]


def test_pause_and_unpause() -> None:
    hypervisor, pcpu = host()
    scheduler = hypervisor.scheduler
    paused, other = hypervisor.new_domain(), hypervisor.new_domain()
    pcpu.load(paused, hog)
    pcpu.load(other, hog)
    pcpu.run_for(S)
    scheduler.domain_pause(paused)
    scheduler.domain_pause(paused)
    before = cpu_time(paused)
    pcpu.run_for(S)
    assert cpu_time(paused) == before
    assert paused.vcpus[0].runstate == RunState.OFFLINE
    scheduler.domain_unpause(paused)
    pcpu.run_for(S)
    assert cpu_time(paused) == before
    scheduler.domain_unpause(paused)
    pcpu.run_for(10 * S)
    assert cpu_time(paused) - before == pytest.approx(5 * S, rel=0.05)


def test_an_idle_pcpu_has_no_timers_left() -> None:
    hypervisor, pcpu = host()
    domain = hypervisor.new_domain()
    pcpu.load(domain, burst(50 * MS, 1000 * S))
    pcpu.run_for(10 * S)
    assert pcpu.timers.next_deadline() is None


def test_a_thousand_vcpus_each_get_their_share() -> None:
    hypervisor, pcpu = host(tslice_ms=10)
    domains = [hypervisor.new_domain() for _ in range(1000)]
    for domain in domains:
        pcpu.load(domain, hog)
    pcpu.run_for(15 * S)
    times = [cpu_time(domain) for domain in domains]
    assert sum(times) == 15 * S
    assert min(times) >= 10 * MS  # 15 ms each, within two slices
    assert max(times) <= 35 * MS


def test_removed_vcpus_leave_nothing_behind() -> None:
    hypervisor, pcpu = host()
    scheduler = hypervisor.scheduler
    stay = hypervisor.new_domain()
    pcpu.load(stay, hog)
    for _ in range(50):
        domain = hypervisor.new_domain(weight=1024, cap=30)
        pcpu.load(domain, hog)
        pcpu.run_for(45 * MS)
        scheduler.domain_pause(domain)
        for vcpu in domain.vcpus:
            scheduler.vcpu_destroy(vcpu)
        scheduler.domain_destroy(domain)
    before = cpu_time(stay)
    pcpu.run_for(S)
    assert cpu_time(stay) - before == S
    assert len(scheduler.dump()) == 3  # header, pCPU, the one that runs


@pytest.mark.parametrize(("weight", "cap"), [(0, None), (65536, None), (-1, None), (None, -1), (None, 101)])
def test_bad_parameters_are_einval(weight: int | None, cap: int | None) -> None:
    hypervisor, _pcpu = host()
    domain = hypervisor.new_domain()
    with pytest.raises(XenError) as caught:
        hypervisor.credit.adjust(domain, weight, cap)
    assert caught.value.errno == errno.EINVAL
    assert hypervisor.credit.parameters(domain) == (256, 0)


def test_a_cap_may_exceed_one_cpu_for_a_domain_with_more_vcpus() -> None:
    hypervisor, _pcpu = host()
    domain = hypervisor.new_domain(vcpus=2)
    hypervisor.credit.adjust(domain, 512, 200)
    assert hypervisor.credit.parameters(domain) == (512, 200)


@pytest.mark.parametrize("values", [(0, 100), (1001, 100), (30, 99), (30, 500_001), (1, 1001)])
def test_bad_global_parameters_are_einval(values: tuple[int, int]) -> None:
    scheduler = CreditScheduler()
    with pytest.raises(XenError):
        scheduler.set_global(tslice_ms=values[0], ratelimit_us=values[1])
    assert scheduler.global_parameters() == {"tslice_ms": 30, "ratelimit_us": 1000}
