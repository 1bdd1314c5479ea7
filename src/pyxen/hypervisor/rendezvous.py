# SPDX-License-Identifier: GPL-2.0-only
"""Keeping a domain's code from running for a moment, from another thread.

Some words in a guest's memory are changed by guest and hypervisor alike, with locked instructions on hardware (the
status bits of a grant entry). An emulated CPU's locked instructions are not atomic against another thread, so whoever
changes such a word does it while no engine is between two instructions of that domain: on the thread of its home
engine, or inside :meth:`Rendezvous.holding`.

``holding`` kicks the engine and waits until it has left the guest; the engine does not enter again before the last
holder is gone. Two engines may want to hold each other's domain at the same time, each in a trap handler of its
own guest. That is no deadlock: a thread that waits here is in a trap handler, so it executes no guest instruction, and
it has been kicked, so it comes past :meth:`enter` before it does; who waits counts as outside. (A trap handler must
therefore only hold others in a trap that ends a block: a hypercall or a fault, not CPUID or port I/O.)

Holding is for microseconds. A holder may take locks that trap handlers take, but must not wait for a pCPU.

Lock order: ``_lock`` is a leaf.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from pyxen.hypervisor.domain import Domain


class Inside(Protocol):
    """A pCPU, as far as this module needs it."""

    ident: int | None

    def leave_guest(self) -> None:
        """Make its engine leave the guest soon, and come past :meth:`Rendezvous.enter` before the next instruction.
        Any thread; takes no lock."""
        ...


class Rendezvous:
    """One for the whole host."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._condition = threading.Condition(self._lock)
        """Of ``_lock``, which ``with`` takes at a fifth of the price."""
        self._waiting: set[int] = set()

    def enter(self, domain: Domain, pcpu: Inside) -> None:
        """``pcpu``, the caller's, is about to execute ``domain``'s code. Waits while somebody holds it."""
        with self._lock:
            while domain.held:
                self._condition.wait()
            domain.inside = pcpu

    def leave(self, domain: Domain) -> None:
        """It does so no more."""
        with self._lock:
            domain.inside = None
            if domain.held:
                self._condition.notify_all()

    def is_inside_elsewhere(self, domain: Domain) -> bool:
        """Whether an engine on another thread than the caller's may be executing ``domain``."""
        with self._lock:
            inside = domain.inside
            return inside is not None and inside.ident != threading.get_ident()

    @contextmanager
    def holding(self, domain: Domain) -> Iterator[None]:
        """No engine executes ``domain``'s code inside ``with``. Any thread; see the module's text."""
        me = threading.get_ident()
        with self._lock:
            domain.held += 1
            inside = domain.inside
            if inside is not None and inside.ident != me:
                # Even one that is outside at the moment because it waits here: it must not return to its guest.
                inside.leave_guest()
                self._waiting.add(me)
                self._condition.notify_all()
                while (inside := domain.inside) is not None and inside.ident not in self._waiting:
                    self._condition.wait()
                self._waiting.discard(me)
        try:
            yield
        finally:
            with self._lock:
                domain.held -= 1
                if not domain.held:
                    self._condition.notify_all()
