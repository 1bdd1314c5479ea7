# SPDX-License-Identifier: GPL-2.0-only
"""Clocks, alarms and topology."""

from __future__ import annotations

import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyxen.errors import ConfigError, InternalError
from pyxen.machine.clock import RealClock, TscCalibration, VirtualClock, calibration_for
from pyxen.machine.cpu.base import RAX, RDX, Exit
from pyxen.machine.cpu.deadline import AlarmClock
from pyxen.machine.cpu.unicorn_x86 import UnicornX86
from pyxen.machine.topology import Topology
from tests.machine.support import Machine


def test_real_time_is_the_tsc_seen_through_the_published_calibration() -> None:
    clock = RealClock(calibration_ms=5)
    calibration = clock.tsc_calibration()
    for _ in range(100):
        before = calibration.to_ns(clock.read_tsc())
        now = clock.now_ns()
        assert before <= now <= calibration.to_ns(clock.read_tsc())


def test_real_time_passes_as_the_hosts_does() -> None:
    clock = RealClock()
    ours, hosts = clock.now_ns(), time.monotonic_ns()
    time.sleep(0.05)
    ours, hosts = clock.now_ns() - ours, time.monotonic_ns() - hosts
    assert abs(ours - hosts) < hosts // 100
    assert abs(clock.wallclock_ns() - time.time_ns()) < 1_000_000_000
    left = clock.sleep_ns(clock.now_ns() + 1_000_000_000)
    assert left is not None and 0 < left <= 1_000_000_000


@pytest.mark.engine
def test_a_guests_rdtsc_is_the_clocks_tsc() -> None:
    machine = Machine()
    clock = RealClock(calibration_ms=5)
    # rdtsc; syscall
    machine.start(bytes.fromhex("0f310f05"))
    machine.recorder.on_syscall = machine.recorder.stop
    before = clock.read_tsc()
    assert machine.cpu.run(None) is Exit.STOP
    after = clock.read_tsc()
    tsc = machine.cpu.gpr[RDX] << 32 | machine.cpu.gpr[RAX] & 0xffffffff
    assert before < tsc < after
    machine.close()


@given(hz=st.integers(1_000_000, 100_000_000_000), ticks=st.integers(0, 1 << 50))
def test_calibrations_keep_31_bits_of_precision(hz: int, ticks: int) -> None:
    calibration = calibration_for(hz, 1000)
    assert 1 << 31 <= calibration.mul < 1 << 32 and -32 < calibration.shift < 32
    exact = ticks * 1_000_000_000 // hz
    assert abs(calibration.to_ns(1000 + ticks) - exact) <= exact / (1 << 30) + (1_000_000_000 << 2) // hz + 2
    assert abs(calibration.hz - hz) <= hz / (1 << 30) + 1


def test_an_impossible_frequency_is_our_bug() -> None:
    with pytest.raises(InternalError):
        calibration_for(0, 0)


def test_virtual_time_moves_only_by_hand() -> None:
    clock = VirtualClock(wallclock_ns=5_000_000_000)
    calls = []
    clock.subscribe(lambda: calls.append(clock.now_ns()))
    assert clock.now_ns() == 0 and clock.sleep_ns(1) is None
    clock.advance(10)
    clock.advance(5)
    assert (clock.now_ns(), clock.wallclock_ns(), clock.read_tsc(), calls) == (15, 5_000_000_015, 15, [10, 15])
    assert clock.sleep_ns(15) == 0
    assert clock.tsc_calibration().to_ns(1 << 40) == 1 << 40
    assert clock.tsc_calibration() == TscCalibration(0x80000000, 1, 0)
    with pytest.raises(InternalError):
        clock.advance(-1)


class Bell:
    """Counts rings and lets a test wait for the next."""

    def __init__(self) -> None:
        self.rung = threading.Semaphore(0)

    def __call__(self) -> None:
        self.rung.release()

    def wait(self, seconds: float = 5.0) -> bool:
        return self.rung.acquire(timeout=seconds)


def test_alarms_ring_once_each_and_when_time_is_virtual_only_by_advance() -> None:
    clock = VirtualClock()
    alarms = AlarmClock(clock)
    early, late = Bell(), Bell()
    first, second = alarms.alarm(early), alarms.alarm(late)
    first.set(100)
    second.set(200)
    assert not early.wait(0.02)
    clock.advance(100)
    assert early.wait() and not late.wait(0.02) and not early.wait(0.02)
    clock.advance(1000)
    assert late.wait() and not early.wait(0.02)
    first.set(1500)
    first.set(None)
    clock.advance(1000)
    assert not early.wait(0.02)
    first.cancel()
    second.cancel()


def test_a_deadline_may_move_nearer_or_away() -> None:
    clock = RealClock(calibration_ms=1)
    alarms = AlarmClock(clock)
    bell = Bell()
    alarm = alarms.alarm(bell)
    alarm.set(clock.now_ns() + 60_000_000_000)
    alarm.set(clock.now_ns() + 2_000_000)
    assert bell.wait()
    alarm.set(clock.now_ns() + 5_000_000)
    alarm.set(clock.now_ns() + 60_000_000_000)
    assert not bell.wait(0.03)
    alarm.set(clock.now_ns())                                    # in the past by now
    assert bell.wait()
    for _ in range(50):                                          # the same distance again and again: each rings
        alarm.set(clock.now_ns() + 200_000)
        assert bell.wait()
    alarm.cancel()


@pytest.mark.engine
def test_engines_obey_a_virtual_clock() -> None:
    machine = Machine()
    clock = VirtualClock()
    cpu = UnicornX86(machine.memory, clock)
    machine.cpus.append(cpu)
    machine.recorders.append(machine.recorder)
    cpu.traps = machine.recorder
    machine.start(bytes.fromhex("ebfe"), cpu=1)
    advance = threading.Timer(0.02, clock.advance, (1_000_000_000,))
    advance.start()
    assert cpu.run(1_000_000_000) is Exit.KICK
    assert clock.now_ns() == 1_000_000_000
    machine.close()


@pytest.mark.parametrize(("text", "expected"), [
    ("1:1:2:1", Topology(1, 1, 2, 1)), ("nodes=2,sockets=2,cores=4,threads=2", Topology(2, 2, 4, 2)),
    ("cores=4", Topology(cores=4)), (" threads=2 , cores=3 ", Topology(cores=3, threads=2))])
def test_topologies(text: str, expected: Topology) -> None:
    assert Topology.parse(text) == expected


@pytest.mark.parametrize("text", [
    "", "1:2:3", "a:b:c:d", "1:1:1:1:1", "cores=0", "cores=-1", "cores=1,cores=2", "nodes=3,sockets=2", "boards=1",
    "cores=", "cores=99999", "nodes=65,sockets=65", "nodes=2,sockets=1,cores=1", "cores=１"])
def test_impossible_topologies(text: str) -> None:
    with pytest.raises(ConfigError):
        Topology.parse(text)


def test_cpus_have_places() -> None:
    topology = Topology(nodes=2, sockets=2, cores=2, threads=2)
    assert topology.nr_cpus == 8
    places = [topology.place(cpu) for cpu in range(8)]
    assert [p.socket for p in places] == [0] * 4 + [1] * 4
    assert [p.core for p in places] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [p.thread for p in places] == [0, 1] * 4
    assert [p.node for p in places] == [0] * 4 + [1] * 4
    assert topology.cpus_of_node(1) == range(4, 8)
    with pytest.raises(IndexError):
        topology.place(8)
