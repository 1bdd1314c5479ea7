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
* A domain has the pCPU for a *turn*; its vCPUs rotate in it every 200 µs while several want to run, and at once when
  one yields, polls or sends another an IPI. They all share one engine (see :mod:`~pyxen.hypervisor.schedule`), and a
  guest whose spinlock's holder waits for 30 ms does nothing useful. Load balancing moves domains, not vCPUs.
* Leftovers of domains that cannot use their share are divided among the rest by weight at once (Xen: by a carry from
  one domain to the next in list order).

Locking: run queues and what is in :class:`~pyxen.hypervisor.sched.credit_queue.CreditVcpu` are under the run queue lock
of the vCPU's pCPU.  ``_lock`` guards who is active and the parameters; it is a leaf, taken after a run queue lock.
Accounting takes the run queue locks one vCPU at a time.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from pyxen.abi.sched import (
    CSCHED_TSLICE_MAX_MS,
    CSCHED_TSLICE_MIN_MS,
    SCHED_RATELIMIT_MAX_US,
    SCHED_RATELIMIT_MIN_US,
)
from pyxen.errors import XenError
from pyxen.hypervisor.sched.base import Decision, SchedulerHost
from pyxen.hypervisor.sched.credit_queue import BOOST, OVER, PRIORITY_NAMES, UNDER, CreditCpu, CreditDomain, CreditVcpu
from pyxen.hypervisor.timer import Timer

if TYPE_CHECKING:
    from pyxen.hypervisor.domain import Domain
    from pyxen.hypervisor.vcpu import Vcpu

DEFAULT_TSLICE_MS: Final = 30
DEFAULT_RATELIMIT_US: Final = 1000
TICKS_PER_TSLICE: Final = 3
WEIGHT_MAX: Final = 65535
ROTATE_NS: Final = 200_000
"""How long one vCPU runs while others of its domain wait for the same pCPU: they may be waiting for each other."""
MIGRATION_DELAY_NS: Final = 1_000_000
"""How long a domain must have waited before another pCPU takes it: a move costs about as much (Xen:
vcpu_migration_delay)."""

_NOBODY: Final[tuple[int, ...]] = ()
_NO_DOMAINS: Final[tuple[Domain, ...]] = ()
_LEAST_SLICE_NS: Final = SCHED_RATELIMIT_MIN_US * 1000


class _Claim(NamedTuple):
    """What one domain brings to an accounting."""

    domain: CreditDomain
    vcpus: list[CreditVcpu]
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
        self._cpus: dict[int, CreditCpu] = {}
        self._queues: list[int] = []
        """pCPUs with a run queue of their own; the others in ``_cpus`` share one of these."""
        self._active: dict[CreditDomain, None] = {}
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
        """A pCPU with a run queue of its own comes online."""
        self._cpus[cpu] = CreditCpu(lambda now: self._tick(cpu, now))
        self._queues.append(cpu)

    def share_cpu(self, cpu: int, with_cpu: int) -> None:
        """A modelled pCPU comes online that has no engine: its vCPUs queue where those of ``with_cpu`` do."""
        self._cpus[cpu] = self._cpus[with_cpu]

    def add_domain(self, domain: Domain) -> None:
        """csched_dom_init()."""
        domain.sched_data = CreditDomain(domain)

    def remove_domain(self, domain: Domain) -> None:
        """csched_dom_destroy()."""
        sdom = _domain_data(domain)
        with self._lock:
            self._active.pop(sdom, None)
        for cpu in self._queues:
            with self._host.cpu_lock(cpu):
                if self._cpus[cpu].turn is sdom:
                    self._cpus[cpu].turn = None
        domain.sched_data = None

    def add_vcpu(self, vcpu: Vcpu) -> None:
        """csched_vcpu_insert()."""
        svc = CreditVcpu(vcpu, _domain_data(vcpu.domain))
        vcpu.sched_data = svc
        cpu = self._cpus[vcpu.processor]
        cpu.nr_vcpus += 1
        if vcpu.runnable and not vcpu.is_running:
            cpu.insert(svc, self._host.now_ns())

    def remove_vcpu(self, vcpu: Vcpu) -> None:
        """csched_vcpu_remove()."""
        svc = _vcpu_data(vcpu)
        cpu = self._cpus[vcpu.processor]
        cpu.nr_vcpus -= 1
        cpu.remove(svc)
        self._deactivate(svc)
        vcpu.sched_data = None

    def migrate(self, vcpu: Vcpu, cpu: int) -> None:
        """csched_vcpu_migrate: ``vcpu``, which nobody executes, is to wait for pCPU ``cpu`` from now on."""
        svc = _vcpu_data(vcpu)
        old, new = self._cpus[vcpu.processor], self._cpus[cpu]
        vcpu.processor = cpu
        if old is new:
            return
        old.nr_vcpus -= 1
        new.nr_vcpus += 1
        if svc.queued:
            old.remove(svc)
            new.insert(svc, self._host.now_ns())  # it has not waited here yet: nobody takes it on at once

    def load(self, cpu: int) -> int:
        """How many vCPUs are assigned to a pCPU's run queue."""
        return self._cpus[cpu].nr_vcpus

    # --- waking and sleeping -------------------------------------------------------------------------

    def wake(self, vcpu: Vcpu, now_ns: int) -> Sequence[int]:
        """csched_vcpu_wake()."""
        svc = _vcpu_data(vcpu)
        current = self._host.current(vcpu.processor)
        if current is vcpu or svc.queued:
            return _NOBODY
        if svc.priority == UNDER and not svc.parked:
            svc.priority = BOOST
        self._cpus[vcpu.processor].insert(svc, now_ns)
        if current is None or current.domain is vcpu.domain or svc.priority > _vcpu_data(current).priority:
            return (vcpu.processor,)
        return _NOBODY

    def sleep(self, vcpu: Vcpu) -> Sequence[int]:
        """csched_vcpu_sleep()."""
        if self._host.current(vcpu.processor) is vcpu:
            return (vcpu.processor,)
        self._cpus[vcpu.processor].remove(_vcpu_data(vcpu))
        return _NOBODY

    def yield_to_others(self, vcpu: Vcpu, target: Vcpu | None = None) -> bool:
        """csched_vcpu_yield(); see :class:`~pyxen.hypervisor.sched.base.Scheduler` for ``target``."""
        runq = self._cpus[vcpu.processor]
        svc = _vcpu_data(vcpu)
        if target is not None:
            other = _vcpu_data(target)
            if not other.queued or self._cpus[target.processor] is not runq:
                return False
            runq.directed = other
        svc.yielded = True
        return True

    def has_siblings(self, vcpu: Vcpu) -> bool:
        """Whether another vCPU of its domain waits for the pCPU that ``vcpu`` has. Any thread; a hint."""
        data = vcpu.sched_data
        return isinstance(data, CreditVcpu) and data.domain in self._cpus[vcpu.processor].siblings

    # --- deciding ------------------------------------------------------------------------------------

    def do_schedule(self, cpu: int, current: Vcpu | None, now_ns: int) -> Decision:
        """csched_schedule(), with turns: first who has the turn, then which of its vCPUs.

        Rotation comes this way 2,000 times a second: mind the calls.
        """
        runq = self._cpus[cpu]
        host = self._host
        scurr: CreditVcpu | None = None
        yielded = False
        ran = 0
        turn = runq.turn
        if turn is not None and not host.may_run(turn.domain, cpu):
            turn = None
        if current is not None:
            svc = _vcpu_data(current)
            if svc.start_ns < now_ns:
                self._burn(svc, now_ns)
            yielded, svc.yielded = svc.yielded, False
            ran = now_ns - current.runstate_since_ns
            if current.runnable:
                if svc.domain is turn or host.may_run(current.domain, cpu):
                    scurr = svc
                else:
                    runq.insert(svc, now_ns)
        sibling = runq.sibling(turn) if turn is not None and turn in runq.siblings else None
        directed, runq.directed = runq.directed, None
        wanted: Sequence[Domain] = _NO_DOMAINS
        other: CreditVcpu | None = None
        if len(runq.siblings) > (sibling is not None):
            other, wanted = self._first_other(runq, cpu, turn)
        mine = OVER - 1
        if scurr is not None:
            mine = scurr.priority
        if sibling is not None and sibling.priority > mine:
            mine = sibling.priority
        # Without the rate limit two guests that ping-pong events would spend their time in context switches.
        held_ns = self.ratelimit_ns - (now_ns - runq.turn_start_ns)
        over = now_ns >= runq.turn_end_ns
        take_other = (
            other is not None
            and (scurr is None or yielded or held_ns <= 0)
            and (
                other.priority > mine
                or (over and other.priority == mine)
                # Xen puts one that yields behind one vCPU of lower priority, if there is nobody else.
                or (yielded and sibling is None)
            )
        )
        if take_other or mine < OVER:
            chosen = other
        elif scurr is None:
            chosen = sibling
        elif sibling is None:
            chosen = scurr
        elif yielded or sibling is directed:
            chosen = sibling
        else:
            if ran >= ROTATE_NS:
                # A slice of which the computer took most away is not over: on a busy one a guest would only rotate.
                ran = min(ran, host.executed_ns(cpu))
            # One that just woke waits for the rotation: two more switches would cost more than that.
            chosen = sibling if ran >= ROTATE_NS else scurr
        if chosen is not scurr and scurr is not None:
            runq.insert(scurr, now_ns)
        if chosen is None:
            runq.turn = None
            return Decision(None, None, wanted)
        runq.remove(chosen)
        if chosen.domain is not runq.turn or over:
            runq.turn = chosen.domain
            runq.turn_start_ns, runq.turn_end_ns = now_ns, now_ns + self.tslice_ns
            held_ns = self.ratelimit_ns
        slice_ns = max(runq.turn_end_ns - now_ns, _LEAST_SLICE_NS)
        if chosen.domain in runq.siblings:
            slice_ns = min(slice_ns, ROTATE_NS - ran if chosen is scurr and ran < ROTATE_NS else ROTATE_NS)
        if other is not None and other.queued and other.priority > chosen.priority and held_ns > 0:
            slice_ns = min(slice_ns, max(held_ns, _LEAST_SLICE_NS))
        if chosen is not scurr:
            chosen.start_ns = now_ns
        return Decision(chosen.vcpu, slice_ns, wanted)

    def rotate(self, cpu: int, current: Vcpu, now_ns: int, executed_ns: int) -> tuple[Vcpu, int] | None:
        """What :meth:`do_schedule` decides while only the domain whose turn it is has anybody waiting."""
        runq = self._cpus[cpu]
        svc = _vcpu_data(current)
        turn = svc.domain
        left = runq.turn_end_ns - now_ns
        if runq.turn is not turn or left <= 0 or len(runq.siblings) != 1 or turn not in runq.siblings:
            return None
        runnable = current.runnable
        if runnable and not svc.yielded:
            ran = min(now_ns - current.runstate_since_ns, executed_ns)
            if ran < ROTATE_NS:
                # One that just woke waits for the rotation: two more switches would cost more than that.
                return current, max(min(ROTATE_NS - ran, left), _LEAST_SLICE_NS)
        self._burn(svc, now_ns)
        svc.yielded = False
        chosen = runq.exchange(svc if runnable else None, turn, now_ns)
        chosen.start_ns = now_ns
        if turn in runq.siblings and left > ROTATE_NS:
            return chosen.vcpu, ROTATE_NS
        return chosen.vcpu, max(left, _LEAST_SLICE_NS)

    def _first_other(
        self, runq: CreditCpu, cpu: int, turn: CreditDomain | None
    ) -> tuple[CreditVcpu | None, list[Domain]]:
        """The first of the highest priority that is not of ``turn`` and may run here, and the domains of those before
        it that are at home elsewhere."""
        wanted: list[Domain] = []
        may_run = self._host.may_run
        for queue in runq.queues:
            for svc in queue:
                if svc.domain is turn:
                    continue
                if may_run(svc.vcpu.domain, cpu):
                    return svc, wanted
                if svc.vcpu.domain not in wanted:
                    wanted.append(svc.vcpu.domain)
        return None, wanted

    def find_work(self, cpu: int, now_ns: int) -> Domain | int | None:
        """csched_load_balance(): a domain that waits on another pCPU, while what ``cpu`` has to run is of lower
        priority than it; or when to look again (ns), for it has not waited long enough to be worth a move; or None.
        Without locks, on ``cpu``'s thread."""
        current = self._host.current(cpu)
        if current is not None and _vcpu_data(current).priority > OVER:
            return None
        least = OVER if current is None else UNDER
        again: int | None = None
        start = self._queues.index(cpu)
        for peer in self._queues[start + 1 :] + self._queues[:start]:
            runq = self._cpus[peer]
            if not runq.siblings:
                continue
            with self._host.cpu_lock(peer):
                busy = self._host.current(peer)
                for queue in runq.queues[: 1 - least]:
                    for svc in queue:
                        domain = svc.vcpu.domain
                        if busy is not None and busy.domain is domain:
                            continue
                        if not (self._host.may_run(domain, peer) and self._host.allowed_on(svc.vcpu, cpu)):
                            continue
                        if now_ns - svc.queued_ns >= MIGRATION_DELAY_NS:
                            return domain
                        ready = svc.queued_ns + MIGRATION_DELAY_NS
                        again = ready if again is None else min(again, ready)
        return again

    def _burn(self, svc: CreditVcpu, now_ns: int) -> None:
        """burn_credits(): charge a run, as far as it is not charged yet."""
        ran = now_ns - svc.start_ns
        if ran <= 0:
            return
        svc.credit_ns -= ran
        svc.start_ns = now_ns
        if not svc.active:
            self._activate(svc)

    def _activate(self, svc: CreditVcpu) -> None:
        """__csched_vcpu_acct_start()."""
        with self._lock:
            svc.active = True
            svc.domain.active[svc] = None
            self._active[svc.domain] = None

    def _deactivate(self, svc: CreditVcpu) -> None:
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
        for cpu in self._queues:
            with self._host.cpu_lock(cpu):
                current = self._host.current(cpu)
                if current is not None:
                    self._burn(_vcpu_data(current), now_ns)
        pools: dict[int, list[_Claim]] = {}
        balances: dict[int, int] = {}
        for sdom, vcpus in claimants:
            debt = balance = 0
            for svc in vcpus:
                # Without the lock: what another pCPU charges meanwhile counts at the next accounting.
                credit = svc.credit_ns
                balance += credit
                if credit < 0:
                    debt -= credit
            limit = elapsed + debt  # all vCPUs of a domain share one engine
            if sdom.cap:
                limit = min(limit, sdom.cap * elapsed // 100)
            pool = sdom.domain.cpupool
            balances[pool] = balances.get(pool, 0) + balance
            pools.setdefault(pool, []).append(_Claim(sdom, vcpus, sdom.weight * len(vcpus), limit))
        park: list[Vcpu] = []
        unpark: list[Vcpu] = []
        for pool, claims in pools.items():
            total = max(int(elapsed * self._host.capacity(pool)), -balances[pool])
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
            self._host.timers(self._queues[0]).set(self._accounting, now_ns + self.tslice_ns)

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
                        runq.insert(svc, svc.queued_ns)

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


def _vcpu_data(vcpu: Vcpu) -> CreditVcpu:
    data = vcpu.sched_data
    assert isinstance(data, CreditVcpu)
    return data


def _domain_data(domain: Domain) -> CreditDomain:
    data = domain.sched_data
    assert isinstance(data, CreditDomain)
    return data


def _describe(svc: CreditVcpu) -> str:
    vcpu = svc.vcpu
    sdom = svc.domain
    return (
        f"[{vcpu.domain.domid}.{vcpu.vcpu_id}] pri={PRIORITY_NAMES[-svc.priority]} cpu={vcpu.processor} "
        f"credit={svc.credit_ns // 100_000} [w={sdom.weight},cap={sdom.cap}]{' parked' if svc.parked else ''}"
    )
