# SPDX-License-Identifier: GPL-2.0-only
"""The credit scheduler (Xen: xen/common/sched_credit.c).

Each domain has a *weight* (its share of what is contended) and a *cap* (percent of one pCPU it may use at most, 0 for
no limit).  Running burns credit; every time slice (30 ms) :meth:`CreditScheduler._account` hands out new credit by
weight.  A vCPU with credit left is UNDER, one in debt OVER; UNDER runs before OVER, each round robin.  One that wakes
while UNDER is BOOSTed: it runs before both until the next tick, which gives I/O its latency.  A capped vCPU too far
in debt is *parked* (paused) until it has earned its way back.

Where this differs from Xen, and why:

* Credit is nanoseconds of CPU time and every run is charged in full, to the vCPU that made it.  Xen learns from a
  tick each 10 ms which vCPUs are "active"; one that always sleeps over the tick competes for free (a known theft),
  and shares depend on phase.  Here a vCPU is active from the first nanosecond it ran.
* What is handed out is the time that really passed since the last accounting, and any debt the active vCPUs have in
  sum: a late timer, or a sleeper that hoards credit it then forfeits, would otherwise push all others into the same
  bottom of debt, where weights mean nothing.
* Only a vCPU that does not want to run forfeits credit. Xen takes it also from one that has been waiting in the queue,
  so that a heavy domain beside several light ones got 45 % where its weight said 70.
* Leftovers of domains that cannot use their share are divided among the rest by weight at once (Xen: by a carry from
  one domain to the next in list order).

Locking: run queues and what is in :class:`_CreditVcpu` are under the run queue lock of the vCPU's pCPU.  ``_lock``
guards who is active and the parameters; it is a leaf, taken after a run queue lock.  Accounting takes the run queue
locks one vCPU at a time.
"""

from __future__ import annotations

import errno
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from pyxen.abi.sched import (
    CSCHED_TSLICE_MAX_MS,
    CSCHED_TSLICE_MIN_MS,
    SCHED_RATELIMIT_MAX_US,
    SCHED_RATELIMIT_MIN_US,
)
from pyxen.errors import XenError
from pyxen.hypervisor.sched.base import Decision, SchedulerHost
from pyxen.hypervisor.timer import Timer

if TYPE_CHECKING:
    from pyxen.hypervisor.domain import Domain
    from pyxen.hypervisor.vcpu import Vcpu

DEFAULT_WEIGHT: Final = 256
DEFAULT_TSLICE_MS: Final = 30
DEFAULT_RATELIMIT_US: Final = 1000
TICKS_PER_TSLICE: Final = 3
WEIGHT_MAX: Final = 65535

# CSCHED_PRI_TS_*: also the index of the run queue's list, negated.
BOOST: Final = 0
UNDER: Final = -1
OVER: Final = -2
_PRIORITY_NAMES: Final = ("boost", "under", "over")

_NOBODY: Final[tuple[int, ...]] = ()


class _CreditDomain:
    """``struct csched_dom``."""

    __slots__ = ("active", "cap", "domain", "weight")

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        self.weight = DEFAULT_WEIGHT
        self.cap = 0
        self.active: dict[_CreditVcpu, None] = {}


class _CreditVcpu:
    """``struct csched_vcpu``."""

    __slots__ = ("active", "credit_ns", "domain", "parked", "priority", "queued", "start_ns", "vcpu", "yielded")

    def __init__(self, vcpu: Vcpu, domain: _CreditDomain) -> None:
        self.vcpu = vcpu
        self.domain = domain
        self.priority = UNDER
        self.credit_ns = 0
        self.start_ns = 0
        """When the run not yet charged began."""
        self.active = False
        self.parked = False
        self.queued = False
        self.yielded = False


class _CreditCpu:
    """``struct csched_pcpu``: the run queue, one first-in-first-out list for each priority."""

    __slots__ = ("nr_vcpus", "queues", "tick")

    def __init__(self, tick: Callable[[int], None]) -> None:
        self.queues: tuple[OrderedDict[_CreditVcpu, None], ...] = (OrderedDict(), OrderedDict(), OrderedDict())
        self.tick = Timer(tick)
        self.nr_vcpus = 0

    def insert(self, svc: _CreditVcpu) -> None:
        """__runq_insert(): last of its priority."""
        svc.queued = True
        self.queues[-svc.priority][svc] = None

    def remove(self, svc: _CreditVcpu) -> None:
        """__runq_remove()."""
        if svc.queued:
            svc.queued = False
            del self.queues[-svc.priority][svc]

    def pop(self) -> _CreditVcpu | None:
        """Take the first of the highest priority."""
        for queue in self.queues:
            if queue:
                svc, _ = queue.popitem(last=False)
                svc.queued = False
                return svc
        return None


class _Claim(NamedTuple):
    """What one domain brings to an accounting."""

    domain: _CreditDomain
    vcpus: list[_CreditVcpu]
    share: int
    """weight × active vCPUs."""
    limit_ns: int
    """What it could use at most."""


class CreditScheduler:
    """``sched_credit_def``."""

    name = "credit"

    def __init__(self, *, tslice_ms: int = DEFAULT_TSLICE_MS, ratelimit_us: int = DEFAULT_RATELIMIT_US) -> None:
        self._host: SchedulerHost
        self._lock = threading.Lock()
        self._cpus: dict[int, _CreditCpu] = {}
        self._active: dict[_CreditDomain, None] = {}
        self._accounting = Timer(self._account)
        self._last_account_ns = 0
        self.tslice_ns = DEFAULT_TSLICE_MS * 1_000_000
        self.ratelimit_ns = DEFAULT_RATELIMIT_US * 1000
        self.set_global(tslice_ms=tslice_ms, ratelimit_us=ratelimit_us)

    # --- configuration -----------------------------------------------------------------------------

    def set_global(self, *, tslice_ms: int, ratelimit_us: int) -> None:
        """XEN_SYSCTL_SCHEDOP_putinfo: time slice in ms (1..1000), rate limit in µs (0 for none, 100..500000, at most
        the slice).

        Raises XenError(EINVAL).
        """
        if not CSCHED_TSLICE_MIN_MS <= tslice_ms <= CSCHED_TSLICE_MAX_MS:
            raise XenError(errno.EINVAL)
        if ratelimit_us and not SCHED_RATELIMIT_MIN_US <= ratelimit_us <= SCHED_RATELIMIT_MAX_US:
            raise XenError(errno.EINVAL)
        if ratelimit_us > tslice_ms * 1000:
            raise XenError(errno.EINVAL)
        self.tslice_ns = tslice_ms * 1_000_000
        self.ratelimit_ns = ratelimit_us * 1000

    def global_parameters(self) -> dict[str, int]:
        """XEN_SYSCTL_SCHEDOP_getinfo."""
        return {"tslice_ms": self.tslice_ns // 1_000_000, "ratelimit_us": self.ratelimit_ns // 1000}

    def adjust(self, domain: Domain, weight: int | None = None, cap: int | None = None) -> None:
        """Set weight (1..65535) and cap (0..100 × vCPUs, percent of a pCPU). Raises XenError(EINVAL)."""
        sdom = _domain_data(domain)
        if weight is not None and not 1 <= weight <= WEIGHT_MAX:
            raise XenError(errno.EINVAL)
        if cap is not None and not 0 <= cap <= 100 * max(1, domain.max_vcpus):
            raise XenError(errno.EINVAL)
        with self._lock:
            if weight is not None:
                sdom.weight = weight
            if cap is not None:
                sdom.cap = cap

    def parameters(self, domain: Domain) -> tuple[int, int]:
        """Weight and cap of a domain."""
        sdom = _domain_data(domain)
        with self._lock:
            return sdom.weight, sdom.cap

    # --- who there is ------------------------------------------------------------------------------

    def attach(self, host: SchedulerHost) -> None:
        """See :class:`~pyxen.hypervisor.sched.base.Scheduler`."""
        self._host = host

    def add_cpu(self, cpu: int) -> None:
        """A pCPU comes online."""
        self._cpus[cpu] = _CreditCpu(lambda now: self._tick(cpu, now))

    def add_domain(self, domain: Domain) -> None:
        """csched_dom_init()."""
        domain.sched_data = _CreditDomain(domain)

    def remove_domain(self, domain: Domain) -> None:
        """csched_dom_destroy()."""
        with self._lock:
            self._active.pop(_domain_data(domain), None)
        domain.sched_data = None

    def pick_cpu(self, vcpu: Vcpu) -> int:
        """The allowed pCPU with the fewest vCPUs."""
        allowed = [cpu for cpu in self._cpus if vcpu.hard_affinity is None or cpu in vcpu.hard_affinity]
        return min(allowed or self._cpus, key=lambda cpu: self._cpus[cpu].nr_vcpus)

    def add_vcpu(self, vcpu: Vcpu) -> None:
        """csched_vcpu_insert()."""
        svc = _CreditVcpu(vcpu, _domain_data(vcpu.domain))
        vcpu.sched_data = svc
        cpu = self._cpus[vcpu.processor]
        cpu.nr_vcpus += 1
        if vcpu.runnable and not vcpu.is_running:
            cpu.insert(svc)

    def remove_vcpu(self, vcpu: Vcpu) -> None:
        """csched_vcpu_remove()."""
        svc = _vcpu_data(vcpu)
        cpu = self._cpus[vcpu.processor]
        cpu.nr_vcpus -= 1
        cpu.remove(svc)
        self._deactivate(svc)
        vcpu.sched_data = None

    # --- waking and sleeping -------------------------------------------------------------------------

    def wake(self, vcpu: Vcpu, now_ns: int) -> Sequence[int]:
        """csched_vcpu_wake()."""
        svc = _vcpu_data(vcpu)
        current = self._host.current(vcpu.processor)
        if current is vcpu or svc.queued:
            return _NOBODY
        if svc.priority == UNDER and not svc.parked:
            svc.priority = BOOST
        self._cpus[vcpu.processor].insert(svc)
        if current is None or svc.priority > _vcpu_data(current).priority:
            return (vcpu.processor,)
        return _NOBODY

    def sleep(self, vcpu: Vcpu) -> Sequence[int]:
        """csched_vcpu_sleep()."""
        if self._host.current(vcpu.processor) is vcpu:
            return (vcpu.processor,)
        self._cpus[vcpu.processor].remove(_vcpu_data(vcpu))
        return _NOBODY

    def yield_to_others(self, vcpu: Vcpu) -> None:
        """csched_vcpu_yield()."""
        _vcpu_data(vcpu).yielded = True

    # --- deciding ------------------------------------------------------------------------------------

    def do_schedule(self, cpu: int, current: Vcpu | None, now_ns: int) -> Decision:
        """csched_schedule()."""
        runq = self._cpus[cpu]
        chosen: _CreditVcpu | None = None
        if current is not None:
            scurr = _vcpu_data(current)
            self._burn(scurr, now_ns)
            yielded, scurr.yielded = scurr.yielded, False
            if current.runnable:
                ran = now_ns - current.runstate_since_ns
                if ran < self.ratelimit_ns and not yielded:
                    # Without this, two guests that ping-pong events would spend their time in context switches.
                    return Decision(current, max(self.ratelimit_ns - ran, SCHED_RATELIMIT_MIN_US * 1000))
                if yielded:
                    # Xen puts it behind one vCPU of lower priority, if there is nobody else: let that one go first.
                    chosen = runq.pop()
                runq.insert(scurr)
        if chosen is None:
            chosen = runq.pop()
        if chosen is None:
            return Decision(None, None)
        chosen.start_ns = now_ns
        return Decision(chosen.vcpu, self.tslice_ns)

    def _burn(self, svc: _CreditVcpu, now_ns: int) -> None:
        """burn_credits(): charge a run, as far as it is not charged yet."""
        ran = now_ns - svc.start_ns
        if ran <= 0:
            return
        svc.credit_ns -= ran
        svc.start_ns = now_ns
        if not svc.active:
            self._activate(svc)

    def _activate(self, svc: _CreditVcpu) -> None:
        """__csched_vcpu_acct_start()."""
        with self._lock:
            svc.active = True
            svc.domain.active[svc] = None
            self._active[svc.domain] = None

    def _deactivate(self, svc: _CreditVcpu) -> None:
        """__csched_vcpu_acct_stop_locked()."""
        with self._lock:
            svc.active = False
            svc.domain.active.pop(svc, None)
            if not svc.domain.active:
                self._active.pop(svc.domain, None)

    # --- time ----------------------------------------------------------------------------------------

    def busy(self, cpu: int) -> None:
        """csched_tick_resume(): a pCPU ticks while it runs something; the tick ends by itself when it finds it idle."""
        tick = self._cpus[cpu].tick
        if not tick.active:
            self._host.timers(cpu).set(tick, self._host.now_ns() + self.tslice_ns // TICKS_PER_TSLICE)

    def _tick(self, cpu: int, now_ns: int) -> None:
        """csched_tick(): the end of a boost, and the accounting timer's start."""
        runq = self._cpus[cpu]
        with self._host.cpu_lock(cpu):
            current = self._host.current(cpu)
            if current is None:
                return
            svc = _vcpu_data(current)
            self._burn(svc, now_ns)
            preempted = svc.priority == BOOST and bool(runq.queues[-BOOST])
            if svc.priority == BOOST:
                svc.priority = UNDER
        timers = self._host.timers(cpu)
        timers.set(runq.tick, now_ns + self.tslice_ns // TICKS_PER_TSLICE)
        if preempted:
            self._host.tickle((cpu,))
        with self._lock:
            # Several pCPUs may tick at once: the one that finds the timer unarmed, under the lock, sets it.
            start = bool(self._active) and not self._last_account_ns
            if start:
                self._last_account_ns = now_ns
        if start:
            timers.set(self._accounting, now_ns + self.tslice_ns)

    def _account(self, now_ns: int) -> None:
        """csched_acct(): hand out credit. On one pCPU's thread at a time: it is one timer's callback."""
        with self._lock:
            elapsed = now_ns - self._last_account_ns
            # Stopped for long (a suspended host): nobody ran, so there is nothing to hand out for it.
            elapsed = min(elapsed, 8 * self.tslice_ns)
            self._last_account_ns = now_ns
            claimants = [(sdom, list(sdom.active)) for sdom in self._active]
        for cpu in self._cpus:
            with self._host.cpu_lock(cpu):
                current = self._host.current(cpu)
                if current is not None:
                    self._burn(_vcpu_data(current), now_ns)
        claims: list[_Claim] = []
        balance = 0
        for sdom, vcpus in claimants:
            debt = 0
            for svc in vcpus:
                # Without the lock: what another pCPU charges meanwhile counts at the next accounting.
                credit = svc.credit_ns
                balance += credit
                if credit < 0:
                    debt -= credit
            limit = len(vcpus) * elapsed + debt
            if sdom.cap:
                limit = min(limit, sdom.cap * elapsed // 100)
            claims.append(_Claim(sdom, vcpus, sdom.weight * len(vcpus), limit))
        total = max(elapsed * len(self._cpus), -balance)
        park: list[Vcpu] = []
        unpark: list[Vcpu] = []
        for claim, grant_ns in _divide(total, claims):
            self._grant(claim, grant_ns, elapsed, park, unpark)
        # Without locks: pausing takes the run queue's lock itself and may kick an engine.
        for vcpu in park:
            self._host.vcpu_pause_nosync(vcpu)
        for vcpu in unpark:
            self._host.vcpu_unpause(vcpu)
        with self._lock:
            more = bool(self._active)
            if not more:
                self._last_account_ns = 0
        if more:
            self._host.timers(min(self._cpus)).set(self._accounting, now_ns + self.tslice_ns)

    def _grant(self, claim: _Claim, grant_ns: int, elapsed: int, park: list[Vcpu], unpark: list[Vcpu]) -> None:
        """The second half of csched_acct() for one domain: new credit, and the priority it means."""
        count = len(claim.vcpus)
        fair = grant_ns // count
        cap = claim.domain.cap
        most_debt = max(cap * elapsed // 100 // count, 1)
        for svc in claim.vcpus:
            vcpu = svc.vcpu
            with self._host.vcpu_lock(vcpu):
                if vcpu.sched_data is not svc or not svc.active:
                    continue  # removed meanwhile
                credit = svc.credit_ns + fair
                priority = svc.priority
                if credit < 0:
                    priority = OVER
                    if cap and credit < -most_debt and not svc.parked:
                        svc.parked = True
                        park.append(vcpu)
                    credit = max(credit, -2 * self.tslice_ns)
                else:
                    if priority == OVER:
                        priority = UNDER
                    if svc.parked:
                        svc.parked = False
                        unpark.append(vcpu)
                    if credit > self.tslice_ns and not vcpu.runnable:
                        # It does not use its share: out of the accounting, so that others get it. Some of the credit
                        # stays, so that it starts ahead when it comes back.
                        self._deactivate(svc)
                        credit = self.tslice_ns // 2
                svc.credit_ns = credit
                if priority != svc.priority:
                    queued = svc.queued
                    runq = self._cpus[vcpu.processor]
                    runq.remove(svc)
                    svc.priority = priority
                    if queued:
                        runq.insert(svc)

    # --- debug keys ------------------------------------------------------------------------------------

    def dump(self, cpu: int) -> list[str]:
        """csched_dump_pcpu()."""
        lines = []
        current = self._host.current(cpu)
        if current is not None:
            lines.append(f"\trun: {_describe(_vcpu_data(current))}")
        position = 0
        for queue in self._cpus[cpu].queues:
            for svc in queue:
                position += 1
                lines.append(f"\t{position:3d}: {_describe(svc)}")
        return lines


def _divide(total: int, claims: list[_Claim]) -> list[tuple[_Claim, int]]:
    """Divide ``total`` ns by share, nobody more than its limit, the leftovers again by share.

    Those whose limit is lowest for their share go first: what they leave is then known before the others are served.
    """
    shares = sum(claim.share for claim in claims)
    result = []
    for claim in sorted(claims, key=lambda claim: claim.limit_ns / claim.share):
        grant = min(claim.limit_ns, -(-total * claim.share // shares))
        total -= grant
        shares -= claim.share
        result.append((claim, grant))
    return result


def _vcpu_data(vcpu: Vcpu) -> _CreditVcpu:
    data = vcpu.sched_data
    assert isinstance(data, _CreditVcpu)
    return data


def _domain_data(domain: Domain) -> _CreditDomain:
    data = domain.sched_data
    assert isinstance(data, _CreditDomain)
    return data


def _describe(svc: _CreditVcpu) -> str:
    vcpu = svc.vcpu
    sdom = svc.domain
    return (
        f"[{vcpu.domain.domid}.{vcpu.vcpu_id}] pri={_PRIORITY_NAMES[-svc.priority]} cpu={vcpu.processor} "
        f"credit={svc.credit_ns // 100_000} [w={sdom.weight},cap={sdom.cap}]{' parked' if svc.parked else ''}"
    )
