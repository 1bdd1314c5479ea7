# SPDX-License-Identifier: GPL-2.0-only
"""Deadlines of engines, and one thread that kicks those whose deadline has come.

On the real clock engines have a better one (``unicorn_timer``); this one serves every clock and every host.

Guests re-arm their timers thousands of times a second, mostly to a later moment, so arming must be cheap: an
:class:`Alarm` is a
plain attribute that its owner overwrites, and the thread is woken only for a deadline *earlier* than the one it
sleeps for. A deadline that moved
away costs one useless wake-up of the thread, off the guest's path.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

if TYPE_CHECKING:
    from pyxen.machine.clock import Clock

NEVER: Final = (1 << 63) - 1
"""Later than every deadline (Xen: STIME_MAX)."""


class Deadline(Protocol):
    """When an engine is to be kicked. For the engine's thread only, but for :meth:`cancel`.

    A kick may come early: whoever runs the engine compares the time and sets the deadline again.
    """

    def enter(self, deadline_ns: int | None) -> bool:
        """As :meth:`set`, at the start of a run."""
        ...

    def set(self, deadline_ns: int | None) -> bool:
        """Move the deadline (None: no deadline). False: it is past, and nothing was set."""
        ...

    def cancel(self) -> None:
        """The engine is about to go. Not while it runs."""
        ...


class Alarm:
    """One owner's deadline. ``fire`` runs on the alarm thread: it must be quick and thread-safe."""

    __slots__ = ("_clock", "deadline_ns", "fire", "fired_ns")

    def __init__(self, clock: AlarmClock, fire: Callable[[], None]) -> None:
        self._clock = clock
        self.fire = fire
        self.deadline_ns = NEVER
        self.fired_ns = NEVER

    def set(self, deadline_ns: int | None) -> None:
        """Move the deadline (None: no deadline). Fires once per distinct deadline."""
        if deadline_ns is None:
            self.deadline_ns = self.fired_ns = NEVER
            return
        self.fired_ns = NEVER
        self.deadline_ns = deadline_ns
        # Order matters: the thread sets wake_ns to NEVER before it reads deadlines, so either it sees the new one
        # or we see NEVER.
        if deadline_ns < self._clock.wake_ns:
            self._clock.wake()

    def cancel(self) -> None:
        """Forget this alarm for good."""
        self._clock.remove(self)


class AlarmClock:
    """All alarms of one machine clock and the thread that waits for them."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._condition = threading.Condition(threading.Lock())
        self._alarms: tuple[Alarm, ...] = ()
        self._thread: threading.Thread | None = None
        self.wake_ns = NEVER
        clock.subscribe(self.wake)

    def alarm(self, fire: Callable[[], None]) -> Alarm:
        """A new alarm, unarmed."""
        alarm = Alarm(self, fire)
        with self._condition:
            self._alarms = (*self._alarms, alarm)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="pyxen-alarm", daemon=True)
                self._thread.start()
        return alarm

    def remove(self, alarm: Alarm) -> None:
        """Stop serving ``alarm``; the last one ends the thread."""
        with self._condition:
            self._alarms = tuple(known for known in self._alarms if known is not alarm)
            self._condition.notify()

    def wake(self) -> None:
        """Look at the deadlines again."""
        with self._condition:
            self._condition.notify()

    def _run(self) -> None:
        clock, condition = self._clock, self._condition
        with condition:
            while self._alarms:
                self.wake_ns = NEVER
                now = clock.now_ns()
                earliest = NEVER
                for alarm in self._alarms:
                    deadline = alarm.deadline_ns
                    if deadline == alarm.fired_ns:
                        continue
                    if deadline <= now:
                        alarm.fired_ns = deadline
                        alarm.fire()
                    elif deadline < earliest:
                        earliest = deadline
                self.wake_ns = earliest
                sleep = None if earliest == NEVER else clock.sleep_ns(earliest)
                condition.wait(None if sleep is None else max(sleep, 0) / 1e9)
            self._thread = None


class AlarmDeadline:
    """A :class:`Deadline` made of an :class:`Alarm`."""

    def __init__(self, clock: Clock, alarm: Alarm) -> None:
        self._now = clock.now_ns
        self._alarm = alarm

    def set(self, deadline_ns: int | None) -> bool:
        """Move the deadline."""
        if deadline_ns is not None and deadline_ns <= self._now():
            return False
        self._alarm.set(deadline_ns)
        return True

    enter = set

    def cancel(self) -> None:
        """Forget it for good."""
        self._alarm.cancel()
