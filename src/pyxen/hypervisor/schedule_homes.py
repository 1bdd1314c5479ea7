# SPDX-License-Identifier: GPL-2.0-only
"""Where domains are executed: homes, affinity, and how a domain goes from one engine to another.

A pCPU with an engine of its own has a run queue; a modelled one beyond (``--cpus 128``) shares another's. An
engine's translated code and its locked instructions know nothing of other engines, so a domain is executed by one
engine at a time, its *home*, where all its vCPUs wait as far as their affinity allows. Homes change like this: whoever
wants the domain (a pCPU with nothing better to do, or one that finds a vCPU pinned to it waiting) *claims* it;
the home's own thread, in :meth:`Schedule.schedule`, marks it ``leaving`` when it is not executing it (or has had it for
:data:`HOME_TURN_NS`), and hands it over in :meth:`Schedule.hand_over` after it has switched away. So on the home's
thread "this domain is at home here" stays true for the length of a trap handler, without a lock.

"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, Protocol

from pyxen.hypervisor.lock import TicketLock
from pyxen.hypervisor.timer import Timer, TimerQueue

if TYPE_CHECKING:
    from pyxen.hypervisor.cpupool import CpuPools
    from pyxen.hypervisor.domain import Domain
    from pyxen.hypervisor.hypervisor import Hypervisor
    from pyxen.hypervisor.sched.base import Scheduler
    from pyxen.hypervisor.vcpu import Vcpu

HOME_REST_NS: Final = 1_000_000
"""How long a domain stays at least where it came to: two pCPUs that both want it must not pass it to and fro for
ever."""
HOME_TURN_NS: Final = 5_000_000
"""How long a domain stays where it is being executed, although another pCPU claims it."""


class SchedulablePcpu(Protocol):
    """What the scheduler asks of a pCPU (:class:`pyxen.hypervisor.pcpu.Pcpu`)."""

    timers: TimerQueue

    @property
    def index(self) -> int: ...

    def request_resched(self) -> None:
        """Call Schedule.schedule() soon. Any thread."""
        ...

    def kick(self) -> None:
        """Leave the guest and enter it again. Any thread."""
        ...

    def wait_descheduled(self, vcpu: Vcpu) -> None:
        """Return when ``vcpu`` is not executing, unless it became runnable again, and its context is saved.

        Any thread.
        """
        ...

    def release_domain(self, domain: Domain) -> None:
        """``domain`` is about to leave: save what is loaded of it. On the pCPU's thread, which does not execute it."""
        ...

    def executed_ns(self) -> int:
        """CPU time its thread has had since it switched to the vCPU it executes. On the thread."""
        ...

    @property
    def thread_ident(self) -> int | None:
        """threading.get_ident() of its thread; None before it runs."""
        ...

    @property
    def idle_ns(self) -> int:
        """Time spent with nothing to run, so far."""
        ...


class ScheduleData:
    """``struct schedule_data``: one pCPU."""

    __slots__ = (
        "claims", "current", "index", "leaving", "lock", "pcpu", "retry_timer", "slice_ns", "switches",
    )

    def __init__(self, pcpu: SchedulablePcpu) -> None:
        self.pcpu = pcpu
        self.index = pcpu.index
        self.lock = TicketLock(f"run queue of pCPU {pcpu.index}")
        self.current: Vcpu | None = None
        pcpu.timers.on_slice = pcpu.request_resched
        self.slice_ns: int | None = None
        """Length of the slice that pcpu.timers.slice_end_ns ends."""
        self.retry_timer = Timer(lambda _now: pcpu.request_resched())
        """When to look for other pCPUs' work again."""
        self.switches = 0
        self.claims: dict[Domain, int] = {}
        """Domains at home here that another pCPU wants. Changed by single atomic operations, any thread."""
        self.leaving: list[Domain] = []
        """Domains to be handed over by this pCPU's thread."""


class Homes:
    """The part of :class:`~pyxen.hypervisor.schedule.Schedule` that knows where domains are."""

    hypervisor: Hypervisor
    ops: Scheduler
    now_ns: Callable[[], int]

    def __init__(self) -> None:
        self._cpus: dict[int, ScheduleData] = {}
        self._queues: list[ScheduleData] = []
        self.cpupools: CpuPools | None = None

    def may_run(self, domain: Domain, cpu: int) -> bool:
        """Whether ``domain`` is at home on ``cpu``'s engine, and not about to leave it."""
        return domain.home == self._cpus[cpu].index and domain.leaving < 0

    def executed_ns(self, cpu: int) -> int:
        """How long ``cpu``'s current vCPU has really been executed since it was switched to. On its thread."""
        return self._cpus[cpu].pcpu.executed_ns()

    def allowed(self, vcpu: Vcpu) -> Sequence[int]:
        """The pCPUs that ``vcpu`` may be assigned to: its hard affinity within its domain's cpupool. Never empty: a
        pool that lost the last of them counts as a whole, as in Xen."""
        cpus = self._pool_cpus(vcpu.domain.cpupool)
        hard = vcpu.hard_affinity
        if hard is None:
            return cpus
        return [cpu for cpu in cpus if cpu in hard] or cpus

    def allowed_on(self, vcpu: Vcpu, cpu: int) -> bool:
        """Whether one of the pCPUs it is allowed on has the engine of ``cpu``."""
        data = self._cpus[cpu]
        if vcpu.hard_affinity is None and self.cpupools is None:
            return True
        return any(self._cpus[allowed] is data for allowed in self.allowed(vcpu))

    def capacity(self, poolid: int) -> float:
        """Engines of a cpupool: one that modelled pCPUs of several pools share counts in part."""
        cpus = self._pool_cpus(poolid)
        total = 0.0
        for data in self._queues:
            sharing = sum(1 for other in self._cpus.values() if other is data)
            total += sum(1 for cpu in cpus if self._cpus[cpu] is data) / sharing
        return max(total, 1 / len(self._cpus))

    def _pool_cpus(self, poolid: int) -> Sequence[int]:
        if self.cpupools is None:
            return list(self._cpus)
        return self.cpupools.cpus_of(poolid) or list(self._cpus)

    # --- placing ---------------------------------------------------------------------------------------

    def _pick_cpu(self, vcpu: Vcpu) -> int:
        """Where ``vcpu`` should wait: at home if it may, else where the least waits; there on the pCPU that its soft
        affinity prefers and that has the fewest of its domain's vCPUs."""
        allowed = self.allowed(vcpu)
        home = vcpu.domain.home
        there = [cpu for cpu in allowed if self._cpus[cpu].index == home]
        soft = vcpu.soft_affinity
        if not there:
            preferred = [cpu for cpu in allowed if soft is None or cpu in soft] or allowed
            least = min(preferred, key=lambda cpu: (self._homes(self._cpus[cpu]), self.ops.load(cpu), cpu))
            there = [cpu for cpu in allowed if self._cpus[cpu] is self._cpus[least]]
        preferred = [cpu for cpu in there if soft is None or cpu in soft] or there
        placed = [other for other in vcpu.domain.vcpus if other is not vcpu and other.sched_data is not None]
        siblings = [other.processor for other in placed]
        return min(preferred, key=lambda cpu: (siblings.count(cpu), cpu))

    def _homes(self, data: ScheduleData) -> int:
        return sum(domain.home == data.index for domain in self.hypervisor.domains.copy().values())

    def _migrate(self, vcpu: Vcpu, cpu: int) -> None:
        while True:
            old, new = self._cpus[vcpu.processor], self._cpus[cpu]
            first, second = (old, new) if old.index <= new.index else (new, old)
            with first.lock, second.lock:
                if self._cpus[vcpu.processor] is not old:
                    continue  # it moved while we waited
                if vcpu.sched_data is not None:
                    self.ops.migrate(vcpu, cpu)
                return

    def hand_over(self, cpu: int) -> None:
        """After a switch: let go of the domains that :meth:`schedule` chose to. On the pCPU's thread."""
        data = self._cpus[cpu]
        if not data.leaving:
            return
        leaving, data.leaving = data.leaving, []
        for domain in leaving:
            data.pcpu.release_domain(domain)
            target = self._cpus[domain.leaving]
            for vcpu in domain.vcpus:
                if self._cpus[vcpu.processor] is target:
                    continue
                if not self.allowed_on(vcpu, target.index):
                    data.pcpu.request_resched()  # it waits here, and this pCPU will ask for the domain again
                else:
                    allowed = [cpu for cpu in self.allowed(vcpu) if self._cpus[cpu] is target]
                    siblings = [other.processor for other in domain.vcpus if other is not vcpu]
                    self._migrate(vcpu, min(allowed, key=lambda cpu: (siblings.count(cpu), cpu)))
            domain.home_since_ns = self.now_ns()
            # From here on the other thread may touch the domain: the last two stores of this one.
            domain.evtchn.home_thread = target.pcpu.thread_ident
            domain.home, domain.leaving = target.index, -1
            target.pcpu.request_resched()

    def claim(self, domain: Domain, cpu: int) -> None:
        """Ask ``domain``'s home to hand it over to ``cpu``. Without locks."""
        home = self._cpus.get(domain.home)
        if home is None or home.index == cpu or domain.leaving >= 0:
            return
        if home.claims.get(domain) != cpu:  # else it knows, and looks again when the domain may leave
            home.claims[domain] = cpu
            home.pcpu.request_resched()

    def _answer_claims(self, data: ScheduleData, now: int) -> int | None:
        """Mark what may leave; when to look again for what may not yet. Run queue lock held."""
        again: int | None = None
        executing = data.current.domain if data.current is not None and data.current.runnable else None
        for domain, wanting in list(data.claims.items()):
            stay = HOME_TURN_NS if domain is executing else min(HOME_TURN_NS, HOME_REST_NS)
            until = domain.home_since_ns + stay
            if now < until:
                again = until if again is None else min(again, until)
                continue
            data.claims.pop(domain, None)
            if domain.home == data.index and domain.leaving < 0 and wanting != data.index:
                domain.leaving = wanting
                data.leaving.append(domain)
        return again

    def idle_time(self, cpu: int) -> int:
        """How long pCPU ``cpu`` had nothing to run (ns). One that only shares another's run queue never does anything
        of its own."""
        data = self._cpus[cpu]
        return data.pcpu.idle_ns if data.index == cpu else self.now_ns()

    def _balance(self, data: ScheduleData, now: int) -> None:
        """Ask for work of others, if this pCPU has little to do."""
        work = self.ops.find_work(data.index, now)
        if work is None:
            data.pcpu.timers.stop(data.retry_timer)
        elif isinstance(work, int):
            data.pcpu.timers.set(data.retry_timer, work)
        else:
            self.claim(work, data.index)
