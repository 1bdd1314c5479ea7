# SPDX-License-Identifier: GPL-2.0-only
"""Ticket locks: first come, first served, parked rather than spinning.

Xen's ticket locks spin; spinning under the GIL would keep the owner from running, so a waiter here parks on a
primitive lock of its own and the owner hands over in FIFO order.  The free case is one C-level ``acquire``.

Lock order (outermost first): hypervisor.domain_list -> domain.lock -> grant_table.lock -> domain.page_lock
-> event_lock -> runqueue.  None is held across ``await`` or file I/O.  The lock is recursive, as Xen's domain and
page_alloc locks are.
"""

from __future__ import annotations

import threading
from collections import deque
from types import TracebackType

_ident = threading.get_ident


class TicketLock:
    """A fair, recursive lock. ``guards`` says what it protects (shown by debug keys)."""

    __slots__ = ("_depth", "_gate", "_inner", "_owner", "_waiters", "guards")

    def __init__(self, guards: str) -> None:
        self.guards = guards
        self._inner = threading.Lock()  # the lock proper
        self._gate = threading.Lock()  # guards _waiters; never held while parking
        self._waiters: deque[threading.Lock] = deque()
        self._owner = 0
        self._depth = 0

    def acquire(self) -> None:
        me = _ident()
        if self._owner == me:
            self._depth += 1
            return
        if self._waiters or not self._inner.acquire(False):
            self._park()
        self._owner = me

    def _park(self) -> None:
        ticket = threading.Lock()
        ticket.acquire()
        with self._gate:
            self._waiters.append(ticket)
            # The owner may have gone before it could see the ticket; nobody would wake us then.
            self._hand_over()
        ticket.acquire()

    def _hand_over(self) -> None:
        """Give the lock, if nobody has it, to whoever waits longest: ``_inner`` stays taken. With ``_gate``."""
        if self._waiters and self._inner.acquire(False):
            self._waiters.popleft().release()

    def release(self) -> None:
        if self._owner != _ident():
            raise RuntimeError(f"release of a lock held by another thread ({self.guards})")
        if self._depth:
            self._depth -= 1
            return
        self._owner = 0
        self._inner.release()
        # First the release, then the look: who parks does it the other way round, so one of the two sees the other.
        if self._waiters:
            with self._gate:
                self._hand_over()

    def held(self) -> bool:
        """Whether the calling thread holds the lock."""
        return self._owner == _ident()

    def nested(self) -> bool:
        """Whether the owner took the lock more than once, and so keeps it at the next release."""
        return self._depth > 0

    def __enter__(self) -> None:
        self.acquire()

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.release()
