# SPDX-License-Identifier: GPL-2.0-only
"""The scheduler's common part (Xen: xen/common/schedule.c, pause functions of xen/common/domain.c).

It owns run states, pausing, blocking and waking; *who* runs is the policy's (:mod:`pyxen.hypervisor.sched`), and
switching an engine from one vCPU to another is :mod:`pyxen.hypervisor.pcpu`'s, which calls :meth:`Schedule.schedule`
when it has been asked to decide again.

How no wake-up is lost: whoever makes a vCPU runnable or not changes its flags first and takes the run queue's lock
second, and decides under it by what the flags say *then*. So the last of several racing changes sees them all, and
the run queue ends in the state of the flags. A vCPU that blocks sets BLOCKED, then looks for events; a sender makes
the event pending, then clears BLOCKED: both take ``pause_lock``, so one of the two sees the other.

Where a domain is executed is :mod:`pyxen.hypervisor.schedule_homes`'s subject.

Lock order: ... -> event lock -> run queue's lock (two only to move a vCPU, lower pCPU first) -> scheduler's own leaf
locks, timers, pCPU's condition. ``Vcpu.pause_lock`` and ``Domain.pause_lock`` are leaves. With a run queue's lock held
nobody calls an engine, a timer callback or an event channel: pCPUs to be poked are collected and poked after it.

The ``_sync`` functions wait for the vCPU's pCPU. They must not be called with a lock that a trap handler takes, nor
by a pCPU's thread about the vCPU it is executing.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Final

from pyxen.abi.sched import (
    TRC_SCHED_BLOCK,
    TRC_SCHED_DOM_ADD,
    TRC_SCHED_DOM_REM,
    TRC_SCHED_SHUTDOWN,
    TRC_SCHED_SLEEP,
    TRC_SCHED_SWITCH,
    TRC_SCHED_WAKE,
    TRC_SCHED_YIELD,
)
from pyxen.abi.xen import Virq
from pyxen.errors import InternalError, XenError
from pyxen.hypervisor.lock import TicketLock
from pyxen.hypervisor.runstate import runstate_change, runstate_snapshot
from pyxen.hypervisor.sched.credit import CreditScheduler
from pyxen.hypervisor.sched_op import do_sched_op as do_sched_op
from pyxen.hypervisor.sched_op import do_sched_op_compat as do_sched_op_compat
from pyxen.hypervisor.schedule_homes import Homes, SchedulablePcpu, ScheduleData
from pyxen.hypervisor.time import send_timer_event, vcpu_periodic_timer_work
from pyxen.hypervisor.timer import Timer, TimerQueue
from pyxen.hypervisor.vcpu import PauseFlag, RunState
from pyxen.machine.cpu.deadline import NEVER

if TYPE_CHECKING:
    from pyxen.hypervisor.domain import Domain
    from pyxen.hypervisor.hypervisor import Hypervisor
    from pyxen.hypervisor.sched.base import Scheduler
    from pyxen.hypervisor.vcpu import Vcpu

VPF_BLOCKED: Final = int(PauseFlag.BLOCKED)
VPF_DOWN: Final = int(PauseFlag.DOWN)
VPF_POLLING: Final = int(PauseFlag.POLLING)
_WAITING: Final = VPF_BLOCKED | VPF_POLLING

PV_TICK_NS: Final = 10_000_000
"""PV guests start with a 100 Hz periodic timer (vcpu_initialise in xen/arch/x86/domain.c)."""

_RUNNING: Final = RunState.RUNNING
_RUNNABLE: Final = RunState.RUNNABLE
_BLOCKED: Final = RunState.BLOCKED
_OFFLINE: Final = RunState.OFFLINE


class _Held:
    """``with`` over a lock that is held already: released at the end."""

    __slots__ = ("_lock",)

    def __init__(self, lock: TicketLock) -> None:
        self._lock = lock

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._lock.release()


class Schedule(Homes):
    """All vCPUs of the host and the pCPUs they run on."""

    def __init__(self, hypervisor: Hypervisor, scheduler: Scheduler | None = None) -> None:
        super().__init__()
        self.hypervisor = hypervisor
        self.ops: Scheduler = scheduler if scheduler is not None else CreditScheduler()
        self.now_ns = hypervisor.clock.now_ns
        self.ops.attach(self)

    # --- for the policy (SchedulerHost) --------------------------------------------------------------

    def current(self, cpu: int) -> Vcpu | None:
        """The vCPU that pCPU ``cpu`` has chosen to run, None when idle."""
        return self._cpus[cpu].current

    def cpu_lock(self, cpu: int) -> TicketLock:
        """The run queue lock of a pCPU."""
        return self._cpus[cpu].lock

    def vcpu_lock(self, vcpu: Vcpu) -> _Held:
        """Take the run queue lock of the pCPU that ``vcpu`` is assigned to; released by leaving ``with``."""
        return _Held(self._lock_vcpu(vcpu).lock)

    def timers(self, cpu: int) -> TimerQueue:
        """The timers of a pCPU; a vCPU's are those of ``vcpu.processor``."""
        return self._cpus[cpu].pcpu.timers

    def tickle(self, cpus: Sequence[int]) -> None:
        """Make pCPUs decide again. Without locks."""
        for cpu in cpus:
            self._cpus[cpu].pcpu.request_resched()

    def _lock_vcpu(self, vcpu: Vcpu) -> ScheduleData:
        while True:
            data = self._cpus[vcpu.processor]
            data.lock.acquire()
            if self._cpus[vcpu.processor] is data:
                return data
            data.lock.release()  # it moved while we waited

    # --- affinity --------------------------------------------------------------------------------------

    def vcpu_set_affinity(self, vcpu: Vcpu, hard: frozenset[int] | None, soft: frozenset[int] | None) -> None:
        """vcpu_set_affinity(): ``hard`` is where it may run, ``soft`` where it had best; None: anywhere.

        XenError(EINVAL) when the domain's cpupool has none of ``hard``. Waits for the vCPU to be off its pCPU: not from
        a trap handler.
        """
        if hard is not None and not hard.intersection(self._pool_cpus(vcpu.domain.cpupool)):
            raise XenError(errno.EINVAL)
        vcpu.hard_affinity = hard
        vcpu.soft_affinity = soft
        self.replace(vcpu)

    def replace(self, vcpu: Vcpu) -> None:
        """Where ``vcpu`` may run has changed: move it, if it may not, or had better not, stay where it is."""
        if vcpu.sched_data is None:
            return
        cpu = self._pick_cpu(vcpu)
        soft = vcpu.soft_affinity
        stays = vcpu.processor in self.allowed(vcpu) and (soft is None or vcpu.processor in soft or cpu not in soft)
        if stays:
            return
        self.vcpu_pause(vcpu)
        try:
            self._migrate(vcpu, cpu)
        finally:
            self.vcpu_unpause(vcpu)
        self.tickle((cpu,))

    # --- coming and going ------------------------------------------------------------------------------

    def add_cpu(self, pcpu: SchedulablePcpu) -> None:
        """A pCPU comes online. Before any vCPU is assigned to it."""
        self._cpus[pcpu.index] = ScheduleData(pcpu)
        self._queues.append(self._cpus[pcpu.index])
        self.ops.add_cpu(pcpu.index)

    def share_cpus(self, nr_cpus: int) -> None:
        """The machine has ``nr_cpus`` pCPUs in all: those that have no engine share the run queues of the others."""
        engines = len(self._queues)
        for cpu in range(engines, nr_cpus):
            self._cpus[cpu] = self._queues[cpu % engines]
            self.ops.share_cpu(cpu, self._queues[cpu % engines].index)

    def domain_init(self, domain: Domain) -> None:
        """sched_init_domain()."""
        self._trace(TRC_SCHED_DOM_ADD, None, domain.domid)
        self.ops.add_domain(domain)

    def domain_destroy(self, domain: Domain) -> None:
        """sched_destroy_domain(): after its vCPUs, see :meth:`vcpu_destroy`. Its watchdogs never fire again."""
        with domain.watchdog_lock:
            watchdogs, domain.watchdogs = domain.watchdogs, []
        for timer in watchdogs:
            if timer is not None:
                timer.kill()
        self._trace(TRC_SCHED_DOM_REM, None, domain.domid)
        if domain.sched_data is not None:
            self.ops.remove_domain(domain)

    def vcpu_init(self, vcpu: Vcpu) -> None:
        """sched_init_vcpu(): timers, a pCPU, an entry in the scheduler. The vCPU is down."""
        vcpu.singleshot_timer = Timer(lambda _now: send_timer_event(vcpu))
        vcpu.periodic_timer = Timer(lambda _now: self._periodic_timer(vcpu))
        vcpu.poll_timer = Timer(lambda _now: self._poll_timer(vcpu))
        vcpu.periodic_period_ns = PV_TICK_NS
        vcpu.periodic_last_ns = vcpu.runstate_since_ns = self.now_ns()
        vcpu.processor = self._pick_cpu(vcpu)
        if vcpu.domain.home < 0:
            vcpu.domain.home = self._cpus[vcpu.processor].index
        with self.vcpu_lock(vcpu):
            self.ops.add_vcpu(vcpu)

    def vcpu_destroy(self, vcpu: Vcpu) -> None:
        """sched_destroy_vcpu().

        The vCPU is paused for good; waits until it is off its pCPU and its timers are quiet.
        """
        if vcpu.sched_data is None:
            return
        self._wait(vcpu)
        for timer in (vcpu.singleshot_timer, vcpu.periodic_timer, vcpu.poll_timer):
            timer.kill()
        with self.vcpu_lock(vcpu):
            self.ops.remove_vcpu(vcpu)

    def vcpu_stop_timers(self, vcpu: Vcpu) -> None:
        """Its timers fire no more, unless it sets them again: for a vCPU that is paused for good."""
        for timer in (vcpu.singleshot_timer, vcpu.periodic_timer, vcpu.poll_timer):
            timer.stop()

    # --- waking and sleeping ---------------------------------------------------------------------------

    def vcpu_wake(self, vcpu: Vcpu) -> None:
        """Something that kept ``vcpu`` from running is gone. Any thread."""
        tickled: Sequence[int] = ()
        contended = False
        data = self._lock_vcpu(vcpu)
        try:
            if vcpu.runnable:
                now = self.now_ns()
                if vcpu.runstate >= _BLOCKED:
                    runstate_change(vcpu, _RUNNABLE, now)
                if vcpu.sched_data is not None:
                    tickled = self.ops.wake(vcpu, now)
                    current = data.current
                    contended = current is not None and current.domain is not vcpu.domain
            elif vcpu.runstate == _BLOCKED and not vcpu.pause_flags & VPF_BLOCKED:
                runstate_change(vcpu, _OFFLINE, self.now_ns())
        finally:
            data.lock.release()
        if self.hypervisor.trace.enabled:
            self._trace(TRC_SCHED_WAKE, vcpu, vcpu.domain.domid, vcpu.vcpu_id)
        if tickled:
            self.tickle(tickled)
        if contended and len(self._queues) > 1:
            self._tickle_idle(vcpu)

    def _tickle_idle(self, vcpu: Vcpu) -> None:
        """__runq_tickle(): somebody has to wait here, and an idle pCPU could do it."""
        for data in self._queues:
            if data.current is None and not data.retry_timer.active and self.allowed_on(vcpu, data.index):
                data.pcpu.request_resched()
                return

    def vcpu_sleep_nosync(self, vcpu: Vcpu) -> None:
        """Something keeps ``vcpu`` from running now; it may go on executing for a moment. Any thread."""
        tickled: Sequence[int] = ()
        data = self._lock_vcpu(vcpu)
        try:
            if not vcpu.runnable:
                if vcpu.runstate == _RUNNABLE:
                    runstate_change(vcpu, _OFFLINE, self.now_ns())
                if vcpu.sched_data is not None:
                    tickled = self.ops.sleep(vcpu)
        finally:
            data.lock.release()
        self._trace(TRC_SCHED_SLEEP, vcpu, vcpu.domain.domid, vcpu.vcpu_id)
        if tickled:
            self.tickle(tickled)

    def vcpu_sleep_sync(self, vcpu: Vcpu) -> None:
        """:meth:`vcpu_sleep_nosync`, and wait until it is off its pCPU and its context is saved."""
        self.vcpu_sleep_nosync(vcpu)
        self._wait(vcpu)

    def _wait(self, vcpu: Vcpu) -> None:
        # A vCPU executes at home only, and one that is not runnable will not be executed anywhere else.
        home = self._cpus.get(vcpu.domain.home)
        if home is not None:
            home.pcpu.wait_descheduled(vcpu)

    def set_pause_flag(self, vcpu: Vcpu, flag: int) -> bool:
        """test_and_set_bit on pause_flags: True if it was clear. The caller then calls :meth:`vcpu_sleep_nosync`."""
        with vcpu.pause_lock:
            was = vcpu.pause_flags
            vcpu.pause_flags = was | flag
            return not was & flag

    def clear_pause_flag(self, vcpu: Vcpu, flag: int) -> bool:
        """test_and_clear_bit on pause_flags: True if it was set. The caller then calls :meth:`vcpu_wake`."""
        with vcpu.pause_lock:
            was = vcpu.pause_flags
            vcpu.pause_flags = was & ~flag
            return bool(was & flag)

    def vcpu_up(self, vcpu: Vcpu) -> None:
        """Bring it up (VCPUOP_up, VGCF_online)."""
        if self.clear_pause_flag(vcpu, VPF_DOWN):
            self.vcpu_wake(vcpu)

    def vcpu_down(self, vcpu: Vcpu) -> None:
        """Take it down (VCPUOP_down); it may go on for a moment, as Xen warns."""
        if self.set_pause_flag(vcpu, VPF_DOWN):
            self.vcpu_sleep_nosync(vcpu)

    # --- blocking ----------------------------------------------------------------------------------------

    def begin_wait(self, vcpu: Vcpu, port: int = 0) -> None:
        """Mark ``vcpu``, the caller's, as waiting: for any event, or with ``port`` as a poller (-1: for several ports).

        The caller then looks for events (events before this may not have seen that it waits), and ends with
        :meth:`vcpu_unblock` if there are some, else with :meth:`wait_begun`.
        """
        with vcpu.pause_lock:
            vcpu.pause_flags |= _WAITING if port else VPF_BLOCKED
            vcpu.poll_port = port

    def wait_begun(self, vcpu: Vcpu) -> None:
        """Nothing was pending: give the pCPU to others when the trap handler returns."""
        if self.hypervisor.trace.enabled:
            self._trace(TRC_SCHED_BLOCK, vcpu, vcpu.domain.domid, vcpu.vcpu_id)
        self._home(vcpu).request_resched()

    def vcpu_block(self, vcpu: Vcpu) -> None:
        """Block until an event can be delivered (SCHEDOP_block, HLT). On the pCPU's thread, for the vCPU it executes.

        The caller has unmasked event delivery if it is to be (SCHEDOP_block does, HLT does not).
        """
        self.begin_wait(vcpu)
        # Check for events *after* blocking: avoids the wake-up-waiting race.
        if vcpu.domain.evtchn.local_events_need_delivery(vcpu):
            self.clear_pause_flag(vcpu, VPF_BLOCKED)
        else:
            self.wait_begun(vcpu)

    def vcpu_unblock(self, vcpu: Vcpu) -> None:
        """An event arrived: end SCHEDOP_block or SCHEDOP_poll.

        Does nothing to a vCPU that does not wait. Any thread.
        """
        with vcpu.pause_lock:
            flags = vcpu.pause_flags
            if not flags & VPF_BLOCKED:
                return
            vcpu.pause_flags = flags & ~_WAITING
            vcpu.poll_port = 0  # a poll ends when the vCPU is unblocked, whatever for
        if flags & VPF_POLLING:
            vcpu.poll_timer.stop()
        self.vcpu_wake(vcpu)

    def vcpu_kick(self, vcpu: Vcpu) -> None:
        """Make ``vcpu`` look at what is pending for it (NMI, event): unblock it, or interrupt it. Any thread."""
        running = vcpu.is_running
        self.vcpu_unblock(vcpu)
        if running:
            self._home(vcpu).kick()

    def _home(self, vcpu: Vcpu) -> SchedulablePcpu:
        return self._cpus[vcpu.domain.home].pcpu

    def vcpu_yield(self, vcpu: Vcpu) -> None:
        """SCHEDOP_yield: let others run first. On the pCPU's thread, for the vCPU it executes."""
        data = self._lock_vcpu(vcpu)
        self.ops.yield_to_others(vcpu)
        data.lock.release()
        self._trace(TRC_SCHED_YIELD, vcpu, vcpu.domain.domid, vcpu.vcpu_id)
        data.pcpu.request_resched()

    def vcpu_pause_instruction(self, vcpu: Vcpu) -> None:
        """``vcpu`` executes PAUSE: its domain's other vCPUs go first, if any waits here (Xen: pause-loop exits).

        On the pCPU's thread, for the vCPU it executes.
        """
        if self.ops.has_siblings(vcpu):
            self.vcpu_yield(vcpu)

    def vcpu_yield_to(self, vcpu: Vcpu, target: Vcpu) -> None:
        """``vcpu`` has sent ``target``, another vCPU of its domain, an interrupt that it may be waiting for: if that
        waits for the same pCPU, let it have it. On the pCPU's thread, for the vCPU it executes."""
        data = self._lock_vcpu(vcpu)
        try:
            yielded = data.current is vcpu and self.ops.yield_to_others(vcpu, target)
        finally:
            data.lock.release()
        if yielded:
            data.pcpu.request_resched()

    # --- pausing -----------------------------------------------------------------------------------------

    def vcpu_pause_nosync(self, vcpu: Vcpu) -> None:
        """Keep ``vcpu`` from running until :meth:`vcpu_unpause`; counts. Any thread."""
        with vcpu.pause_lock:
            vcpu.pause_count += 1
        self.vcpu_sleep_nosync(vcpu)

    def vcpu_pause(self, vcpu: Vcpu) -> None:
        """:meth:`vcpu_pause_nosync`, and wait until its registers are in ``vcpu.context``."""
        self.vcpu_pause_nosync(vcpu)
        self._wait(vcpu)

    def vcpu_unpause(self, vcpu: Vcpu) -> None:
        """Undo one pause."""
        with vcpu.pause_lock:
            if vcpu.pause_count <= 0:
                raise InternalError(f"{vcpu}: unpaused more often than paused")
            vcpu.pause_count -= 1
            wake = not vcpu.pause_count
        if wake:
            self.vcpu_wake(vcpu)

    def domain_pause_nosync(self, domain: Domain) -> None:
        """Keep all vCPUs of ``domain`` from running; counts. Any thread."""
        with domain.pause_lock:
            domain.pause_count += 1
        for vcpu in domain.vcpus:
            self.vcpu_sleep_nosync(vcpu)

    def domain_pause(self, domain: Domain) -> None:
        """:meth:`domain_pause_nosync`, and wait until no vCPU of it executes and all contexts are saved."""
        self.domain_pause_nosync(domain)
        for vcpu in domain.vcpus:
            self._wait(vcpu)

    def domain_unpause(self, domain: Domain) -> None:
        """Undo one pause."""
        with domain.pause_lock:
            if domain.pause_count <= 0:
                raise InternalError(f"{domain}: unpaused more often than paused")
            domain.pause_count -= 1
            wake = not domain.pause_count
        if wake:
            for vcpu in domain.vcpus:
                self.vcpu_wake(vcpu)

    # --- shutting down -----------------------------------------------------------------------------------

    def domain_shutdown(self, domain: Domain, reason: int) -> None:
        """domain_shutdown() of xen/common/domain.c: its vCPUs run no more, dom0 is told (VIRQ_DOM_EXC). Any thread.

        ``reason`` (SHUTDOWN_*, 8 bits) counts unless SCHEDOP_shutdown_code set one before.
        """
        with domain.shutdown_lock:
            if domain.shutdown_code == -1:
                domain.shutdown_code = reason & 0xFF
            if domain.is_shutting_down:
                return
            domain.is_shutting_down = True
        self._trace(TRC_SCHED_SHUTDOWN, None, domain.domid, 0, domain.shutdown_code)
        for vcpu in domain.vcpus:
            vcpu.paused_for_shutdown = True
            self.vcpu_pause_nosync(vcpu)
        domain.is_shut_down = True
        self.hypervisor.send_global_virq(Virq.DOM_EXC)

    def domain_resume(self, domain: Domain) -> None:
        """domain_resume(): undo a shutdown (after SHUTDOWN_suspend). Waits for the domain to be off its pCPUs."""
        self.domain_pause(domain)
        with domain.shutdown_lock:
            domain.is_shutting_down = domain.is_shut_down = False
            domain.shutdown_code = -1
            domain.crash_reason = ""
        for vcpu in domain.vcpus:
            if vcpu.paused_for_shutdown:
                vcpu.paused_for_shutdown = False
                self.vcpu_unpause(vcpu)
        self.domain_unpause(domain)

    # --- deciding: for the pCPU --------------------------------------------------------------------------

    def schedule(self, cpu: int) -> Vcpu | None:
        """Decide who runs on ``cpu`` now, account for the change, and return it (None: idle). On the pCPU's thread,
        no locks.

        The pCPU then switches contexts and calls :meth:`context_saved` for the vCPU that ran before.
        """
        data = self._cpus[cpu]
        timers = data.pcpu.timers
        with data.lock:
            now = self.now_ns()
            previous = data.current
            recheck = self._answer_claims(data, now) if data.claims else None
            vcpu, slice_ns, wanted = self.ops.do_schedule(cpu, previous, now)
            if vcpu is not previous:
                _change(data, vcpu, now)
        if recheck is not None:
            slice_ns = recheck - now if slice_ns is None else min(slice_ns, recheck - now)
        timers.slice_end_ns = NEVER if slice_ns is None else now + slice_ns
        data.slice_ns = slice_ns
        if vcpu is not previous:
            if previous is None:
                self.ops.busy(cpu)
            else:
                timers.stop(previous.periodic_timer)
            if vcpu is not None:
                self._trace(TRC_SCHED_SWITCH, vcpu, vcpu.domain.domid, vcpu.vcpu_id)
        for domain in wanted:
            self.claim(domain, data.index)
        if len(self._queues) > 1:
            self._balance(data, now)
        return vcpu

    def rotate(self, cpu: int, now: int, executed_ns: int) -> Vcpu | None:
        """:meth:`schedule` for the frequent case that vCPUs of one domain take turns: who is next, perhaps the same as
        before. None, and nothing happened, if it is not the case. On the pCPU's thread, no locks; ``now`` is the time,
        and ``executed_ns`` how long the current one has really been executed.

        Most switches are of this kind, thousands a second in a guest with several busy vCPUs: mind the calls.
        """
        data = self._cpus[cpu]
        previous = data.current
        if previous is None or data.claims or data.leaving or previous.domain.leaving >= 0:
            return None
        lock = data.lock
        lock.acquire()
        try:
            rotation = self.ops.rotate(cpu, previous, now, executed_ns)
            if rotation is None:
                return None
            vcpu, slice_ns = rotation
            if vcpu is not previous:
                _change(data, vcpu, now)
        finally:
            lock.release()
        data.slice_ns = slice_ns
        timers = data.pcpu.timers
        timers.slice_end_ns = now + slice_ns
        if vcpu is previous:
            return vcpu
        timers.stop(previous.periodic_timer)
        if self.hypervisor.trace.enabled:
            self._trace(TRC_SCHED_SWITCH, vcpu, vcpu.domain.domid, vcpu.vcpu_id)
        return vcpu

    def slice_begins(self, cpu: int, now_ns: int) -> None:
        """The switch to the vCPU that :meth:`schedule` chose is done: its slice begins at ``now_ns``. (To switch takes
        a good part of one, and on a busy host all of it: nobody would get anywhere.)"""
        data = self._cpus[cpu]
        if data.slice_ns is not None:
            data.pcpu.timers.slice_end_ns = now_ns + data.slice_ns

    def context_saved(self, vcpu: Vcpu) -> None:
        """The pCPU executes ``vcpu`` no more."""
        vcpu.is_running = False

    def _periodic_timer(self, vcpu: Vcpu) -> None:
        if vcpu.is_running:
            vcpu_periodic_timer_work(vcpu)

    def _poll_timer(self, vcpu: Vcpu) -> None:
        if vcpu.pause_flags & VPF_POLLING:
            self.vcpu_unblock(vcpu)

    # --- information ---------------------------------------------------------------------------------------

    def runstate(self, vcpu: Vcpu) -> tuple[int, int, list[int]]:
        """vcpu_runstate_get(): state, since when (ns), and ns spent in each of the four states up to now."""
        with self.vcpu_lock(vcpu):
            return runstate_snapshot(vcpu, self.now_ns())

    def vcpu_cpu_time(self, vcpu: Vcpu) -> int:
        """How long ``vcpu`` has been running, in all (ns)."""
        return self.runstate(vcpu)[2][_RUNNING]

    def dump(self) -> list[str]:
        """Debug key 'r': run queues."""
        lines = [f"Scheduler: {self.ops.name}, now={self.now_ns()}"]
        for cpu, data in sorted(self._cpus.items()):
            if cpu != data.index:
                continue
            lines.append(f"CPU[{cpu:02d}] switches={data.switches} timers={len(data.pcpu.timers)}")
            with data.lock:
                lines += self.ops.dump(cpu)
        return lines

    def _trace(self, event: int, vcpu: Vcpu | None, *words: int) -> None:
        trace = self.hypervisor.trace
        if trace.enabled:
            trace.event(event, vcpu, *words)


def _change(data: ScheduleData, vcpu: Vcpu | None, now: int) -> None:
    """``vcpu`` is what a pCPU runs from now on. Run queue lock held."""
    previous = data.current
    if previous is not None:
        if previous.pause_flags & VPF_BLOCKED:
            state = _BLOCKED
        else:
            state = _RUNNABLE if previous.runnable else _OFFLINE
        runstate_change(previous, state, now)
    if vcpu is not None:
        runstate_change(vcpu, _RUNNING, now)
        vcpu.is_running = True
    data.current = vcpu
    data.switches += 1


def vcpu_down_at_creation(vcpu: Vcpu) -> None:
    """How each vCPU starts: down and offline, until VCPUOP_up or XEN_DOMCTL_setvcpucontext with VGCF_online."""
    vcpu.pause_flags = VPF_DOWN
    vcpu.runstate = _OFFLINE
