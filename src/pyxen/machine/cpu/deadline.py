# SPDX-License-Identifier: GPL-2.0-only
"""One thread that kicks engines whose deadline has come.

Guests re-arm their timers thousands of times a second, mostly to a later moment, so arming must be cheap: an
:class:`Alarm` is a
plain attribute that its owner overwrites, and the thread is woken only for a deadline *earlier* than the one it
sleeps for. A deadline that moved
away costs one useless wake-up of the thread, off the guest's path.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyxen.machine.clock import Clock

_NEVER = 1 << 63


class Alarm:
    """One owner's deadline. ``fire`` runs on the alarm thread: it must be quick and thread-safe."""

    __slots__ = ("_clock", "deadline_ns", "fire", "fired_ns")

    def __init__(self, clock: AlarmClock, fire: Callable[[], None]) -> None:
        self._clock = clock
        self.fire = fire
        self.deadline_ns = _NEVER
        self.fired_ns = _NEVER

    def set(self, deadline_ns: int | None) -> None:
        """Move the deadline (None: no deadline). Fires once per distinct deadline."""
        if deadline_ns is None:
            self.deadline_ns = self.fired_ns = _NEVER
            return
        self.fired_ns = _NEVER
        self.deadline_ns = deadline_ns
        # Order matters: the thread sets wake_ns to _NEVER before it reads deadlines, so either it sees the new one
        # or we see _NEVER.
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
        self.wake_ns = _NEVER
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
                self.wake_ns = _NEVER
                now = clock.now_ns()
                earliest = _NEVER
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
                sleep = None if earliest == _NEVER else clock.sleep_ns(earliest)
                condition.wait(None if sleep is None else max(sleep, 0) / 1e9)
            self._thread = None
