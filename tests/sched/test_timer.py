# SPDX-License-Identifier: GPL-2.0-only
"""Timer queues: order, stopping, moving, what callbacks may do, bounded memory, threads."""

from __future__ import annotations

import threading
import time

from hypothesis import given
from hypothesis import strategies as st

from pyxen.hypervisor.timer import Timer, TimerQueue
from pyxen.machine.clock import VirtualClock
from pyxen.machine.cpu.deadline import NEVER


def queue() -> TimerQueue:
    return TimerQueue(VirtualClock())


def test_timers_fire_in_order_of_their_deadlines_once() -> None:
    timers, fired = queue(), []
    for at in (30, 10, 20, 10):
        timers.set(Timer(lambda now, at=at: fired.append((at, now))), at)  # type: ignore[misc]
    assert timers.next_deadline() == 10
    assert timers.run_expired(9) == 0
    assert timers.run_expired(20) == 3
    assert fired == [(10, 20), (10, 20), (20, 20)]
    assert timers.run_expired(1000) == 1
    assert timers.run_expired(1000) == 0
    assert timers.next_deadline() is None
    assert len(timers) == 0


def test_the_end_of_a_slice_is_a_deadline_beside_the_timers() -> None:
    timers, ends = queue(), []
    timers.on_slice = lambda: ends.append(timers.slice_end_ns)
    timers.set(Timer(lambda _now: None), 50)
    timers.slice_end_ns = 30
    assert timers.next_deadline() == 30
    assert timers.run_expired(29) == 0 and not ends
    assert timers.run_expired(30) == 0 and ends == [NEVER]  # once
    assert timers.next_deadline() == 50
    timers.slice_end_ns = 60
    assert timers.next_deadline() == 50
    assert timers.run_expired(60) == 1 and len(ends) == 2
    assert timers.next_deadline() is None


def test_a_stopped_timer_does_not_fire_and_setting_again_moves_it() -> None:
    timers, fired = queue(), []
    timer = Timer(fired.append)
    timers.set(timer, 10)
    timer.stop()
    assert not timer.active
    assert timers.next_deadline() is None
    assert timers.run_expired(100) == 0
    timers.set(timer, 10)
    timers.set(timer, 50)
    assert timer.deadline_ns == 50
    assert timers.run_expired(49) == 0
    timers.set(timer, 20)
    assert timers.run_expired(49) == 1
    assert timers.run_expired(1000) == 0
    assert fired == [49]


def test_a_timer_armed_for_the_past_by_its_callback_fires_in_the_next_round() -> None:
    """A guest with a periodic timer of 1 ns cannot hold the pCPU."""
    timers, fired = queue(), []

    def again(now: int) -> None:
        fired.append(now)
        timers.set(timer, now - 5)

    timer = Timer(again)
    timers.set(timer, 1)
    assert timers.run_expired(10) == 1
    assert timers.run_expired(10) == 1
    assert fired == [10, 10]


def test_a_callback_may_stop_or_move_one_that_is_due_too() -> None:
    timers, fired = queue(), []
    second = Timer(lambda now: fired.append("second"))
    third = Timer(lambda now: fired.append("third"))

    def first(_now: int) -> None:
        second.stop()
        timers.set(third, 100)

    timers.set(Timer(first), 1)
    timers.set(second, 2)
    timers.set(third, 3)
    assert timers.run_expired(10) == 1
    assert len(timers) == 1
    assert timers.run_expired(100) == 1
    assert fired == ["third"]


def test_on_earlier_is_called_for_a_new_first_only() -> None:
    timers, calls = queue(), []
    timers.on_earlier = calls.append
    timers.set(Timer(lambda _: None), 50)
    timers.set(Timer(lambda _: None), 60)
    timers.set(Timer(lambda _: None), 40)
    assert calls == [50, 40]


def test_a_failing_callback_does_not_hold_up_the_others() -> None:
    timers, fired, errors = queue(), [], []
    timers.on_error = errors.append

    def fail(_now: int) -> None:
        raise RuntimeError("bug")

    timers.set(Timer(fail), 1)
    timers.set(Timer(fired.append), 2)
    assert timers.run_expired(5) == 2
    assert fired == [5]
    assert [str(error) for error in errors] == ["bug"]


def test_rearming_a_million_times_does_not_grow_the_heap() -> None:
    timers = queue()
    timer = Timer(lambda _: None)
    for i in range(100_000):
        timers.set(timer, 1 << 60 | i)
    assert len(timers._heap) < 200
    assert len(timers) == 1


def test_a_timer_moves_between_queues() -> None:
    one, two, fired = queue(), queue(), []
    timer = Timer(fired.append)
    one.set(timer, 10)
    two.set(timer, 20)
    assert one.run_expired(100) == 0
    assert len(one) == 0
    assert two.run_expired(100) == 1


def test_kill_waits_for_a_callback_that_runs_and_forbids_more() -> None:
    timers = queue()
    entered, leave = threading.Event(), threading.Event()
    state: list[str] = []

    def callback(_now: int) -> None:
        entered.set()
        assert leave.wait(5)
        state.append("left")

    timer = Timer(callback)
    timers.set(timer, 1)
    runner = threading.Thread(target=lambda: timers.run_expired(10))
    runner.start()
    assert entered.wait(5)
    threading.Timer(0.05, leave.set).start()
    timer.kill()
    assert state == ["left"]
    runner.join()
    timers.set(timer, 1)
    assert timers.run_expired(10) == 0


def test_a_callback_may_kill_its_own_timer() -> None:
    timers = queue()
    timer = Timer(lambda _now: timer.kill())
    timers.set(timer, 1)
    assert timers.run_expired(10) == 1
    assert not timer.active


_OPERATION = st.tuples(st.integers(0, 9), st.sampled_from(["set", "stop", "run"]), st.integers(0, 100))


@given(st.lists(_OPERATION, max_size=60))
def test_the_queue_agrees_with_a_plain_table(operations: list[tuple[int, str, int]]) -> None:
    timers, fired = queue(), []
    table: dict[int, int] = {}
    objects = [Timer(lambda _now, i=i: fired.append(i)) for i in range(10)]  # type: ignore[misc]
    now = 0
    for index, what, value in operations:
        if what == "set":
            timers.set(objects[index], now + value)
            table[index] = now + value
        elif what == "stop":
            objects[index].stop()
            table.pop(index, None)
        else:
            now += value
            fired.clear()
            timers.run_expired(now)
            due = {i for i, at in table.items() if at <= now}
            assert set(fired) == due
            assert [table[i] for i in fired] == sorted(table[i] for i in due)
            for i in due:
                del table[i]
        assert len(timers) == len(table)
        assert timers.next_deadline() == min(table.values(), default=None)


def test_threads_set_and_stop_while_another_runs_them() -> None:
    timers = queue()
    counts = [0] * 4
    stop = threading.Event()

    def run() -> None:
        while not stop.is_set():
            timers.run_expired(10)

    def count(i: int) -> None:
        counts[i] += 1

    def drive(i: int) -> None:
        timer = Timer(lambda _now: count(i))
        for n in range(2000):
            timers.set(timer, n % 20)
            if n % 3 == 0:
                timer.stop()
        timer.kill()

    runner = threading.Thread(target=run)
    runner.start()
    drivers = [threading.Thread(target=drive, args=(i,)) for i in range(4)]
    for thread in drivers:
        thread.start()
    for thread in drivers:
        thread.join()
    stop.set()
    runner.join()
    assert len(timers) == 0
    assert timers.next_deadline() is None


def test_setting_a_timer_costs_microseconds() -> None:
    """Guests arm one thousands of times a second. The bound is generous: a shared machine runs this."""
    timers = queue()
    timer = Timer(lambda _: None)
    best = min(_time_sets(timers, timer) for _ in range(5))
    assert best < 10_000


def _time_sets(timers: TimerQueue, timer: Timer) -> float:
    begin = time.perf_counter_ns()
    for i in range(2000):
        timers.set(timer, 1_000_000 + i)
    return (time.perf_counter_ns() - begin) / 2000
