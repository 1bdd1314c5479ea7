# SPDX-License-Identifier: GPL-2.0-only
"""A physical CPU: one thread that owns one engine (Xen: idle loop, softirqs and context_switch of
xen/arch/x86/domain.c).

The thread's loop is Xen's way out of the guest and back in: softirqs (functions others posted), expired timers, the
scheduler if somebody asked for it, then the chosen vCPU, or sleep.  Trap handlers run inside :meth:`Cpu.run` on this
thread; what must happen *after* them is asked for with :meth:`Pcpu.request_resched` or :meth:`Pcpu.post`, which make
the run end.

No request is lost: ``_poked`` is set under ``_lock`` by whoever asks; the thread clears it before it looks for
work, and looks at it again, under ``_lock``, before it enters the guest or sleeps.  From then on a poke wakes
the sleep, or kicks the engine (a kick between two runs ends the next one at once).

While vCPUs of one domain take turns, the thread stays in :meth:`Pcpu._enter`: timers run there, and Schedule.rotate()
decides. It is "in the guest" all that time, so a poke kicks the engine, and is seen after the next run, which ends at
once.

Contexts are switched lazily: a vCPU that stops running stays loaded until another one is entered.  Whoever wants its
registers calls :meth:`Pcpu.wait_descheduled` first.

Locking: ``_lock`` is a leaf but for the timer queue's lock; the engine is never called with it held.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from typing import TYPE_CHECKING, Final, TypeVar

from pyxen.errors import GuestFault, HostError, InternalError
from pyxen.hypervisor.code_pages import CodePages
from pyxen.hypervisor.runstate import update_runstate_area
from pyxen.hypervisor.time import vcpu_periodic_timer_work
from pyxen.hypervisor.timer import TimerQueue
from pyxen.machine.cpu.base import Exit
from pyxen.machine.cpu.deadline import NEVER

if TYPE_CHECKING:
    from pyxen.hypervisor.domain import Domain
    from pyxen.hypervisor.hypervisor import Hypervisor
    from pyxen.hypervisor.vcpu import Vcpu
    from pyxen.machine.cpu.base import Cpu

_T = TypeVar("_T")
_LONGEST_SLEEP_S: Final = 3600.0
_LEAST_RUN_NS: Final = 50_000
"""How long a guest that is entered gets, however late its timers are."""
_MOST_GRANTED_NS: Final = 200_000
"""How much longer a slice may get for exits that fell into it."""
_ident = threading.get_ident


class Pcpu:
    """One pCPU, with the engine's index.

    The hypervisor makes it known to the scheduler (Schedule.add_cpu) and starts it.
    """

    def __init__(self, hypervisor: Hypervisor, cpu: Cpu) -> None:
        self.ident: int | None = None
        """threading.get_ident() of its thread, once it runs."""
        self._thread = threading.Thread(target=self._loop, name=f"pcpu{cpu.index}", daemon=True)
        self.hypervisor = hypervisor
        self.cpu = cpu
        self.index = cpu.index
        self.clock = hypervisor.clock
        self._now = hypervisor.clock.now_ns
        self.timers = TimerQueue(hypervisor.clock)
        self.timers.on_earlier = self._timer_is_earlier
        self.timers.on_error = self._report
        self.scheduler = hypervisor.scheduler
        self.idle_ns = 0
        """Time spent with nothing to run."""
        self.entries = 0
        """How often a guest was entered."""
        self.max_run_ns: int | None = None
        """Leave the guest at least this often: a test of precise preemption sets 200 µs."""
        self._lock = threading.Lock()
        self._condition = threading.Condition(self._lock)
        """Of ``_lock``, which ``with`` takes at a fifth of the price."""
        self._rendezvous = hypervisor.rendezvous
        self._posted: list[Callable[[], None]] = []
        self._waiters: list[tuple[Vcpu, Future[None]]] = []
        self._poked = False
        self._started = False
        self._stopping = False
        self._finished = False
        self._in_guest = False
        """The engine is entered or about to be: a poke must kick it."""
        self._running = False
        """Inside Cpu.run(). Of this thread only: true in trap handlers."""
        self._run_until_ns = NEVER
        """Deadline of the run in progress."""
        self._resched = False
        self._slice_begins = False
        """A context was loaded that has not run since."""
        self._executed_from = 0
        self._exits_from = 0
        """What cpu.exits_ns was when the vCPU it executes was switched to."""
        self._granted_ns = 0
        """By how much that one's slice was made longer for it."""
        self._pause_exits = False
        """Whether PAUSE leaves the guest."""
        self._current: Vcpu | None = None
        self.code = CodePages(cpu)
        self.clock.subscribe(self.kick)

    # --- asking, from any thread -----------------------------------------------------------------------

    @property
    def thread_ident(self) -> int | None:
        """:attr:`ident`, as the scheduler asks for it."""
        return self.ident

    def executed_ns(self) -> int:
        """How much CPU time this thread has had since the vCPU it executes was switched to, but for what that was given
        for exits: less than what has passed where the computer has other things to do. On the thread."""
        return time.thread_time_ns() - self._executed_from - self._granted_ns

    def leave_guest(self) -> None:
        """See :class:`~pyxen.hypervisor.rendezvous.Inside`."""
        self.cpu.kick()

    @property
    def on_thread(self) -> bool:
        """Whether the caller is this pCPU's thread."""
        return self.ident == _ident()

    @property
    def work_pending(self) -> bool:
        """softirq_pending(): whether a long hypercall ought to let go because something else waits for this pCPU."""
        return self._poked or self._resched

    def kick(self) -> None:
        """Wake the pCPU, or make it leave the guest soon; it then looks for work and comes back."""
        if self.ident == _ident():
            if self._running:
                self.cpu.stop()
            else:
                self._poked = True
            return
        with self._lock:
            self._poked = True
            in_guest = self._in_guest
            if not in_guest:
                self._condition.notify_all()
        if in_guest:
            self.cpu.kick()

    def request_resched(self) -> None:
        """Call the scheduler before the guest goes on (SCHEDULE_SOFTIRQ)."""
        self._resched = True
        if self.ident != _ident():
            self.kick()
        elif self._running:  # else the loop looks at the flag on its way
            self.cpu.stop()

    def post(self, function: Callable[[], None]) -> None:
        """Run ``function`` on this pCPU's thread, outside of guest and trap handlers."""
        with self._lock:
            self._posted.append(function)
        self.kick()

    def call(self, function: Callable[[], _T]) -> Future[_T]:
        """:meth:`post`, with the result or exception in a future (``asyncio.wrap_future`` makes it awaitable).

        Before the thread was started the function runs at once, in the caller's; after it ended the future fails with
        HostError. A trap handler must not wait for its own pCPU's future.
        """
        future: Future[_T] = Future()

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                result = function()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)

        with self._lock:
            finished, started = self._finished, self._started
            if started and not finished:
                self._posted.append(work)
        if finished:
            future.set_exception(HostError(f"pCPU {self.index} has stopped"))
        elif started:
            self.kick()
        else:
            work()
        return future

    def execute(self, function: Callable[[], _T]) -> _T:
        """Run ``function`` where this engine may be touched, and return its result: here if this is its thread (a trap
        handler may touch its engine), else by :meth:`call`. Not with a lock held that a trap handler takes."""
        if self.on_thread:
            return function()
        return self.call(function).result()

    def descheduled(self, vcpu: Vcpu) -> Future[None]:
        """A future that is done when ``vcpu`` does not execute here and its context is saved.

        It must have been put to sleep before (Schedule.vcpu_sleep_nosync); if it became runnable again that ends the
        wait, too.
        """
        future: Future[None] = Future()
        with self._lock:
            queued = self._started and not self._finished
            if queued:
                self._waiters.append((vcpu, future))
        if queued:
            self.kick()
        else:
            self._save(vcpu)
            future.set_result(None)
        return future

    def wait_descheduled(self, vcpu: Vcpu) -> None:
        """:meth:`descheduled`, waited for. On this pCPU's own thread ``vcpu`` must not be the one it executes."""
        if not self.on_thread:
            self.descheduled(vcpu).result()
        elif vcpu is not self._current:
            self._save(vcpu)
        elif not vcpu.runnable:
            raise InternalError(f"{vcpu} waits for itself to stop")

    def is_alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread.is_alive()

    def start(self) -> None:
        """Start the thread."""
        with self._lock:
            self._started = True
        self._thread.start()

    def shutdown(self) -> None:
        """Stop the thread and close the engine. From another thread; idempotent."""
        with self._lock:
            first = not self._stopping
            self._stopping = True
            started = self._started
            if not started:
                self._finished = True
        if started:
            self.kick()
            self._thread.join()
        if first:
            self.cpu.close()

    def _timer_is_earlier(self, deadline_ns: int) -> None:
        if self.ident != _ident():
            self.kick()
        elif self._running and deadline_ns < self._run_until_ns:  # else the loop asks before it enters or sleeps
            self._run_until_ns = deadline_ns
            self.cpu.set_deadline(deadline_ns)

    # --- the loop --------------------------------------------------------------------------------------

    def _loop(self) -> None:
        """The thread. Nothing that goes wrong in here ends it: it would take all guests along."""
        self.ident = _ident()
        try:
            while not self._stopping:
                try:
                    self._once()
                except Exception as error:
                    self._report(error)
        finally:
            self._finish()

    def _once(self) -> None:
        with self._lock:
            self._poked = False
            posted = self._posted
            if posted:
                self._posted = []
        if posted:
            self._run_posted(posted)
        self.timers.run_expired(self._now())
        if self._resched:
            self._resched = False
            self._reschedule()
        if self._waiters:
            self._serve_waiters()
        vcpu = self._current
        if vcpu is None:
            self._idle()
        else:
            self._enter(vcpu)

    def _run_posted(self, posted: list[Callable[[], None]]) -> None:
        for function in posted:
            try:
                function()
            except Exception as error:
                self._report(error)

    def _reschedule(self) -> None:
        """schedule() and context_switch(). The engine is switched when the new vCPU is entered."""
        scheduler = self.scheduler
        previous = self._current
        vcpu = scheduler.schedule(self.index)
        if vcpu is not previous:
            if vcpu is not None and (previous is None or previous.domain is not vcpu.domain):
                domain = vcpu.domain
                if domain.evtchn.home_thread != self.ident:
                    domain.evtchn.home_thread = self.ident  # its first home, whose thread may not have run before
                self.code.enter(domain, self.hypervisor.frames)
            self._switch(previous, vcpu)
        scheduler.hand_over(self.index)

    def _switch(self, previous: Vcpu | None, vcpu: Vcpu | None) -> None:
        self._current = vcpu
        if previous is not None:
            update_runstate_area(previous)
            previous.cpu = None
            self.scheduler.context_saved(previous)
        if vcpu is not None:
            # Set before posted events are applied (before_entry): see event_channel on who kicks whom.
            vcpu.cpu = self.cpu
            self.cpu.traps = vcpu.arch.traps
            update_runstate_area(vcpu)
            if vcpu.periodic_period_ns:
                vcpu_periodic_timer_work(vcpu)

    def _enter(self, vcpu: Vcpu) -> None:
        """Execute ``vcpu`` and, as long as the thread has nothing else to do, those of its domain that take turns with
        it."""
        with self._lock:
            if self._poked or self._resched:
                return
            self._in_guest = True
        domain = vcpu.domain
        rendezvous = self._rendezvous
        rendezvous.enter(domain, self)
        try:
            following = self._run(vcpu)
            while following is not None:
                following = self._run(following)
        except GuestFault as error:
            self._crash(domain, str(error))
        except Exception as error:
            self._report(error)
            self._crash(domain, f"internal error: {error!r}")
        finally:
            rendezvous.leave(domain)
            self._in_guest = False

    def _run(self, vcpu: Vcpu) -> Vcpu | None:
        """Execute ``vcpu`` until something happens, and do what timers want; which of its domain's vCPUs is next, None
        if that is not all there is to do."""
        cpu = self.cpu
        context = vcpu.context
        if context is None:
            self._crash(vcpu.domain, f"{vcpu} was started without a context")
            return None
        if cpu.loaded is not context:
            cpu.load(context)
            self._slice_begins = True
        siblings = self.scheduler.ops.has_siblings(vcpu)
        if siblings is not self._pause_exits:
            # A vCPU that spins may wait for another one, which waits for this engine.
            self._pause_exits = siblings
            cpu.set_pause_exits(siblings)
        vcpu.arch.before_entry(cpu)
        if self._resched or self._poked:
            return None  # an event it just got woke somebody more important, or gave this thread work
        if not self._execute(vcpu):
            return None
        timers = self.timers
        now = self._now()
        if siblings and now >= timers.slice_end_ns and not (self._resched or self._granted_ns):
            # What we did for it was none of its code: so much it may still have, once. Most work that a vCPU wakes up
            # for is then done in one slice.
            granted = min(cpu.exits_ns - self._exits_from, _MOST_GRANTED_NS)
            if granted >= _LEAST_RUN_NS:
                self._granted_ns = granted
                timers.slice_end_ns = now + granted
        if self._poked or self._waiters or vcpu.domain.held:
            return None
        if now >= timers.first_ns or now >= timers.slice_end_ns:
            timers.run_expired(now)
        if not self._resched:
            return vcpu
        self._resched = False  # before the decision: who asks for another one after it is not forgotten
        following = self.scheduler.rotate(self.index, now, self.executed_ns())
        if following is None:
            self._resched = True
        elif following is not vcpu:
            self._switch(vcpu, following)
        return following

    def _execute(self, vcpu: Vcpu) -> bool:
        """Run the loaded context; False after an error."""
        cpu = self.cpu
        now = self._now()
        if self._slice_begins:
            self._slice_begins = False
            self.scheduler.slice_begins(self.index, now)
            self._executed_from = time.thread_time_ns()
            self._exits_from = cpu.exits_ns
            self._granted_ns = 0
        deadline = self.timers.next_deadline()
        if self.max_run_ns is not None:
            forced = now + self.max_run_ns
            deadline = forced if deadline is None else min(deadline, forced)
        if deadline is not None and deadline < now + _LEAST_RUN_NS:
            # A slice may be over before the switch to it is: on a busy host that could be so for ever.
            deadline = now + _LEAST_RUN_NS
        self._run_until_ns = NEVER if deadline is None else deadline
        self.entries += 1
        self._running = True
        try:
            reason = cpu.run(deadline)
        finally:
            self._running = False
        if reason is Exit.ERROR:
            self._crash(vcpu.domain, f"CPU engine failed: {cpu.error}")
            return False
        return True

    def _idle(self) -> None:
        begin = self.clock.now_ns()
        deadline = self.timers.next_deadline()
        left = None if deadline is None else self.clock.sleep_ns(deadline)
        if left is not None and left <= 0:
            return
        with self._lock:
            if not (self._poked or self._resched):
                self._condition.wait(None if left is None else min(left / 1e9, _LONGEST_SLEEP_S))
        self.idle_ns += self.clock.now_ns() - begin

    def release_domain(self, domain: Domain) -> None:
        """``domain`` goes to another engine: save what is loaded of it, and remember what its code looks like."""
        loaded = self.cpu.loaded
        if loaded is not None and any(vcpu.context is loaded for vcpu in domain.vcpus):
            self.cpu.unload()
        self.code.leave(domain, self.hypervisor.frames)

    # --- contexts ----------------------------------------------------------------------------------------

    def _save(self, vcpu: Vcpu) -> None:
        """Have the registers of a vCPU that does not execute in its context."""
        if vcpu.context is not None and self.cpu.loaded is vcpu.context and not self._running:
            self.cpu.unload()

    def _serve_waiters(self) -> None:
        with self._lock:
            waiters, self._waiters = self._waiters, []
        again = []
        for vcpu, future in waiters:
            if vcpu is not self._current:
                self._save(vcpu)
            elif not vcpu.runnable:
                again.append((vcpu, future))  # put to sleep after we decided
                continue
            future.set_result(None)
        if again:
            with self._lock:
                self._waiters += again
            self.request_resched()

    def _finish(self) -> None:
        """The thread ends: nobody executes here any more, and nobody waits for it for ever."""
        vcpu, self._current = self._current, None
        if vcpu is not None:
            vcpu.cpu = None
            self.scheduler.context_saved(vcpu)
        self.cpu.unload()
        with self._lock:
            self._finished = True
            posted, self._posted = self._posted, []
            waiters, self._waiters = self._waiters, []
        for function in posted:
            try:
                function()
            except Exception as error:
                self._report(error)
        for _vcpu, future in waiters:
            future.set_result(None)

    # --- when things go wrong ------------------------------------------------------------------------------

    def _crash(self, domain: Domain, reason: str) -> None:
        try:
            self.hypervisor.crash(domain, reason)
        except Exception as error:
            # Whatever is broken, the domain must not be entered again at once, for ever.
            self._report(error)
            self.scheduler.domain_pause_nosync(domain)

    def _report(self, error: Exception) -> None:
        for line in traceback.format_exception(error):
            self.hypervisor.log.printk(line.rstrip())
