# SPDX-License-Identifier: GPL-2.0-only
"""Timers of one pCPU (Xen: xen/common/timer.c).

A heap of (deadline, serial, timer).  Stopping or moving a timer does not search the heap: it takes the timer's serial
away, and an entry whose serial is not its timer's is dropped when it comes to the top.  Guests re-arm a far timer
thousands of times a second, so dead entries are also swept when they outnumber the live ones; the heap never holds
more than twice the armed timers and a little.

``set`` and ``stop`` may come from any thread; callbacks run on the pCPU's thread, in :meth:`TimerQueue.run_expired`.

Beside the heap there is one deadline that comes and goes with every switch between vCPUs, the end of the running one's
slice (:attr:`TimerQueue.slice_end_ns`); it is the thread's own and costs an assignment.

Locking: one plain lock per queue, a leaf: taken after a run queue's lock or a pCPU's condition, never before, and
never held while a callback or :attr:`TimerQueue.on_earlier` runs.  Two queues' locks are never held together.  It is
a plain lock and not a TicketLock because it is held for a microsecond at most and each guest timer pays for it.
"""

from __future__ import annotations

import heapq
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from pyxen.machine.cpu.deadline import NEVER

if TYPE_CHECKING:
    from pyxen.machine.clock import Clock

_SWEEP_MIN = 64


class Timer:
    """``struct timer``: calls ``callback(now_ns)`` once when its time has come.

    It belongs to the queue it was last set on. Setting it on another queue moves it; whoever does that must not race
    with another ``set`` of the same timer.
    """

    __slots__ = ("_callback", "_killed", "_queue", "_serial", "deadline_ns")

    def __init__(self, callback: Callable[[int], None]) -> None:
        self._callback = callback
        self._queue: TimerQueue | None = None
        self._serial = 0
        self._killed = False
        self.deadline_ns: int | None = None
        """System time it is armed for; None when it is not."""

    @property
    def active(self) -> bool:
        """active_timer(): whether it is armed."""
        return self.deadline_ns is not None

    def stop(self) -> None:
        """stop_timer(), on whatever queue it is. Its callback may be running on the pCPU's thread at this moment."""
        queue = self._queue
        if queue is not None:
            queue.stop(self)

    def kill(self) -> None:
        """kill_timer(): never fires again, and its callback is not running any more (unless it is the caller)."""
        queue = self._queue
        if queue is None:
            self._killed = True
        else:
            queue.kill(self)


class TimerQueue:
    """The armed timers of one pCPU.

    ``on_earlier(deadline_ns)`` is called, without the lock and on the thread of ``set``, when a timer became the
    first of all. ``on_error(exception)`` gets what a callback raised; the other timers are not held up by it.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.on_earlier: Callable[[int], None] | None = None
        self.on_error: Callable[[Exception], None] | None = None
        self.on_slice: Callable[[], None] | None = None
        """Called in :meth:`run_expired` when :attr:`slice_end_ns` has come."""
        self.slice_end_ns = NEVER
        """A deadline beside the timers. Of the pCPU's thread only, which must not be in the guest when it sets one."""
        self.first_ns = NEVER
        """No timer is armed for an earlier time. Written under the lock, read without it: one that another thread sets
        at this moment makes itself heard by ``on_earlier``."""
        self._lock = threading.Lock()
        self._idle = threading.Condition(self._lock)
        self._heap: list[tuple[int, int, Timer]] = []
        self._serial = 0
        self._armed = 0
        self._running: Timer | None = None
        self._runner = 0
        self._killers = 0

    def __len__(self) -> int:
        """How many timers are armed."""
        with self._lock:
            return self._armed

    def set(self, timer: Timer, deadline_ns: int) -> None:
        """set_timer(): (re-)arm ``timer`` for system time ``deadline_ns``; a time in the past fires as soon as
        possible.
        """
        if timer._queue is not self:
            if timer._queue is not None:
                timer._queue.stop(timer)
            timer._queue = self
        with self._lock:
            if timer._killed:
                return
            if timer.deadline_ns is None:
                self._armed += 1
            serial = self._serial = self._serial + 1
            timer._serial = serial
            timer.deadline_ns = deadline_ns
            heap = self._heap
            heapq.heappush(heap, (deadline_ns, serial, timer))
            if deadline_ns < self.first_ns:
                self.first_ns = deadline_ns
            if len(heap) > 2 * self._armed + _SWEEP_MIN:
                self._sweep()
                heap = self._heap
            # A dead entry may be in front of it: then whoever waits, waits for that one, which is earlier still.
            first = heap[0][1] == serial
        if first and self.on_earlier is not None:
            self.on_earlier(deadline_ns)

    def stop(self, timer: Timer) -> None:
        """stop_timer()."""
        if timer.deadline_ns is not None:  # else it is not armed: most that are stopped at a switch are not
            with self._lock:
                self._disarm(timer)

    def kill(self, timer: Timer) -> None:
        """kill_timer(): see :meth:`Timer.kill`."""
        with self._idle:
            self._disarm(timer)
            timer._killed = True
            if self._runner == threading.get_ident():
                return
            self._killers += 1
            while self._running is timer:
                self._idle.wait()
            self._killers -= 1

    def _disarm(self, timer: Timer) -> None:
        if timer._queue is self and timer.deadline_ns is not None:
            timer.deadline_ns = None
            timer._serial = 0
            self._armed -= 1

    def _sweep(self) -> None:
        self._heap = [entry for entry in self._heap if entry[2]._serial == entry[1] and entry[2]._queue is self]
        heapq.heapify(self._heap)

    def next_deadline(self) -> int | None:
        """System time of the first armed timer or of the end of the slice, None without either. On the pCPU's
        thread."""
        end = self.slice_end_ns
        if self.first_ns < end:
            with self._lock:
                heap = self._heap
                while heap:
                    deadline, serial, timer = heap[0]
                    if timer._serial == serial and timer._queue is self:
                        self.first_ns = deadline
                        return min(deadline, end)
                    heapq.heappop(heap)
                self.first_ns = NEVER
        return end if end != NEVER else None

    def run_expired(self, now_ns: int) -> int:
        """Call back every timer whose deadline is not after ``now_ns``; returns how many.

        On the pCPU's thread, without locks. A timer that its callback arms for the past fires at the next call, not
        in this one, so a guest cannot keep the pCPU in here.
        """
        if now_ns >= self.slice_end_ns:
            self.slice_end_ns = NEVER
            if self.on_slice is not None:
                self.on_slice()
        if now_ns < self.first_ns:
            return 0
        due: list[tuple[int, int, Timer]] = []
        with self._lock:
            heap = self._heap
            while heap and heap[0][0] <= now_ns:
                entry = heapq.heappop(heap)
                if entry[2]._serial == entry[1] and entry[2]._queue is self:
                    due.append(entry)
            self.first_ns = heap[0][0] if heap else NEVER
            if not due:
                return 0
            self._runner = threading.get_ident()
        fired = 0
        failure: Exception | None = None
        for _, serial, timer in due:
            with self._lock:
                if timer._serial != serial or timer._queue is not self:
                    continue  # stopped or set anew by a callback before it
                self._disarm(timer)
                self._running = timer
            fired += 1
            try:
                timer._callback(now_ns)
            except Exception as error:
                if self.on_error is None:
                    failure = error
                else:
                    self.on_error(error)
            with self._idle:
                self._running = None
                if self._killers:
                    self._idle.notify_all()
        with self._lock:
            self._runner = 0
        if failure is not None:
            raise failure
        return fired
