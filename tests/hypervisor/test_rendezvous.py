# SPDX-License-Identifier: GPL-2.0-only
"""Holding a domain: no engine is inside while anybody holds it, and two that hold each other do not wait for ever."""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from pyxen.hypervisor.rendezvous import Rendezvous


@pytest.fixture(autouse=True)
def impatient_gil() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def domain() -> Any:
    return SimpleNamespace(held=0, inside=None, executing=False, operated=0)


class Engine(threading.Thread):
    """Enters its guest over and over; in it, traps now and then, and some traps hold the peer's domain."""

    def __init__(self, rendezvous: Rendezvous, own: Any, peers: list[Any], seed: int) -> None:
        super().__init__(daemon=True)
        self.rendezvous, self.own, self.peers = rendezvous, own, peers
        self.random = random.Random(seed)
        self.kicked = False
        self.stopping = False
        self.failures: list[str] = []
        self.holds = 0

    def leave_guest(self) -> None:
        self.kicked = True

    def run(self) -> None:
        while not self.stopping:
            self.rendezvous.enter(self.own, self)
            while not self.stopping:
                # A trap handler has returned: a kick ends the run before the next instruction of the guest.
                if self.kicked:
                    self.kicked = False
                    break
                self.own.executing = True
                if self.own.operated:
                    self.failures.append("guest code ran while its domain was held")
                self.own.executing = False
                if self.random.random() < 0.3:
                    self.hold(self.random.choice(self.peers))
            self.rendezvous.leave(self.own)

    def hold(self, peer: Any) -> None:
        with self.rendezvous.holding(peer):
            peer.operated += 1
            if peer.executing:
                self.failures.append("a held domain was executing")
            peer.operated -= 1
            self.holds += 1


def test_a_domain_that_does_not_run_is_held_at_once() -> None:
    rendezvous, idle = Rendezvous(), domain()
    with rendezvous.holding(idle), rendezvous.holding(idle):
        assert idle.held == 2
    assert idle.held == 0


def test_engines_that_hold_each_other_all_the_time_make_progress_and_never_run_held_code() -> None:
    rendezvous = Rendezvous()
    domains = [domain() for _ in range(3)]
    engines = [
        Engine(rendezvous, own, [other for other in domains if other is not own], seed)
        for seed, own in enumerate(domains)
    ]
    for engine in engines:
        engine.start()
    end = time.monotonic() + 60
    holds = 0
    while time.monotonic() < end and (holds < 300 or min(engine.holds for engine in engines) < 100):
        with rendezvous.holding(domains[holds % 3]):  # dom0's software, which is no engine
            domains[holds % 3].operated += 1
            assert not domains[holds % 3].executing
            domains[holds % 3].operated -= 1
        holds += 1
    for engine in engines:
        engine.stopping = True
    for engine in engines:
        engine.join(20)
        assert not engine.is_alive()
        assert not engine.failures
        assert engine.holds >= 100
    assert [each.held for each in domains] == [0, 0, 0]
