# SPDX-License-Identifier: GPL-2.0-only
"""RAM and the frame allocator."""

from __future__ import annotations

import errno
import os
import random
import threading
from collections.abc import Iterator

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pyxen.errors import HostError, InternalError, XenError
from pyxen.machine.memory import PAGE_SIZE, FrameAllocator, Memory


@pytest.fixture
def memory() -> Iterator[Memory]:
    m = Memory(64 << 20)
    yield m
    m.close()


def resident_bytes(memory: Memory) -> int:
    """What the host really spends on the arena."""
    return os.fstat(memory.fd).st_blocks * 512


def test_all_views_show_the_same_bytes(memory: Memory) -> None:
    memory.write(0x1000, bytes(range(16)))
    assert memory.d[0x1004 >> 2] == 0x07060504
    assert memory.q[0x1008 >> 3] == 0x0f0e0d0c0b0a0908
    memory.q[0x1000 >> 3] = 0
    assert memory.read(0x1000, 16) == bytes(8) + bytes(range(8, 16))
    assert memory.nr_frames == 64 << 8


@pytest.mark.parametrize(("maddr", "size"), [(-1, 1), ((64 << 20) - 4, 8), (1 << 40, 1), (0, -1)])
def test_host_access_outside_of_ram_is_our_bug(memory: Memory, maddr: int, size: int) -> None:
    with pytest.raises(InternalError):
        memory.read(maddr, size)
    if size > 0:
        with pytest.raises(InternalError):
            memory.write(maddr, bytes(size))


def test_a_quarter_of_a_terabyte_costs_nothing_until_used() -> None:
    memory = Memory(256 << 30)
    allocator = FrameAllocator(memory, 0x1000)
    last = (256 << 18) - 1
    memory.q[last << 9] = 7
    assert memory.q[last << 9] == 7
    assert resident_bytes(memory) <= 1 << 20
    runs = allocator.alloc_many(1 << 20)
    assert sum(map(len, runs)) == 1 << 20 and resident_bytes(memory) <= 1 << 20
    memory.close()


@pytest.mark.parametrize(("size", "nodes"), [(0, 1), (-4096, 1), (4097, 1), (3 * 4096, 2)])
def test_impossible_sizes(size: int, nodes: int) -> None:
    with pytest.raises(HostError):
        Memory(size, nodes)


def test_zeroing_large_runs_gives_them_back_to_the_host(memory: Memory) -> None:
    memory.write(0x100000, b"\xaa" * (8 << 20))
    used = resident_bytes(memory)
    memory.zero(0x100, (8 << 20) >> 12)
    assert resident_bytes(memory) < used // 2                   # before reading: that would fill the holes
    assert memory.read(0x100000, 8 << 20) == bytes(8 << 20)
    memory.write(0x100000, b"\xaa" * 3 * PAGE_SIZE)
    memory.zero(0x101)
    assert memory.read(0x100000, 3 * PAGE_SIZE) == b"\xaa" * PAGE_SIZE + bytes(PAGE_SIZE) + b"\xaa" * PAGE_SIZE
    with pytest.raises(InternalError):
        memory.zero(memory.nr_frames, 1)


def test_listeners_hear_of_writes_until_removed(memory: Memory) -> None:
    heard: list[tuple[int, int]] = []

    def listener(maddr: int, size: int) -> None:
        heard.append((maddr, size))

    memory.add_listener(listener)
    memory.written(3, 2)
    memory.remove_listener(listener)
    memory.remove_listener(listener)
    memory.written(9)
    assert heard == [(0x3000, 0x2000)]


def test_nodes_share_memory_equally() -> None:
    memory = Memory(64 << 20, nodes=4)
    assert [memory.node_range(n) for n in (0, 3)] == [range(4096), range(12288, 16384)]
    assert [memory.node_of(mfn) for mfn in (0, 4095, 4096, 16383)] == [0, 0, 1, 3]
    allocator = FrameAllocator(memory, 100)
    assert memory.node_of(allocator.alloc(node=2)) == 2
    assert memory.node_of(allocator.alloc_many(10, node=3)[0].start) == 3
    assert allocator.free_frames_of_node(0) == 4096 - 100
    allocator.alloc_many(allocator.free_frames_of_node(1), node=1)
    assert memory.node_of(allocator.alloc(node=1)) != 1          # a preference, not a demand
    memory.close()


def test_memory_of_the_next_owner_is_zero(memory: Memory) -> None:
    allocator = FrameAllocator(memory, 0)
    everything = allocator.alloc_many(allocator.free_frames)
    for run in everything:
        for mfn in run:
            memory.q[mfn << 9] = mfn + 1
    singles = random.Random(1).sample(range(memory.nr_frames), 3000)
    for mfn in singles:
        allocator.free(mfn)
    assert allocator.free_frames == 3000
    for _ in range(3000):
        mfn = allocator.alloc()
        assert memory.q[mfn << 9] == 0
        allocator_used = mfn
    assert allocator.is_allocated(allocator_used)
    for run in everything:
        allocator.free(run.start, len(run))
    assert all(memory.q[mfn << 9] == 0 for run in allocator.alloc_many(memory.nr_frames) for mfn in run)


def test_populating_a_guest_takes_few_runs_even_after_much_churn(memory: Memory) -> None:
    allocator = FrameAllocator(memory, 16)
    assert [len(run) for run in allocator.alloc_many(10_000)] == [10_000]
    rng = random.Random(2)
    held = [allocator.alloc() for _ in range(4000)]
    rng.shuffle(held)
    for mfn in held:
        allocator.free(mfn)
    runs = allocator.alloc_many(allocator.free_frames)
    assert len(runs) <= 2


def test_blocks_are_aligned_and_come_back_together(memory: Memory) -> None:
    allocator = FrameAllocator(memory, 3)
    blocks = [(order, allocator.alloc(order)) for order in (0, 9, 3, 0, 9, 1)]
    for order, mfn in blocks:
        assert mfn % (1 << order) == 0 and mfn >= 3
    frames = [mfn + n for order, mfn in blocks for n in range(1 << order)]
    assert len(set(frames)) == len(frames)
    for order, mfn in blocks:
        allocator.free(mfn, 1 << order)
    assert allocator.free_frames == memory.nr_frames - 3
    assert allocator.alloc(13) % (1 << 13) == 0                  # half of all: only if everything was merged


def test_exhaustion_is_enomem_and_takes_nothing(memory: Memory) -> None:
    allocator = FrameAllocator(memory, 0)
    free = allocator.free_frames
    for request in (lambda: allocator.alloc_many(free + 1), lambda: allocator.alloc(15)):
        with pytest.raises(XenError) as caught:
            request()
        assert caught.value.errno == errno.ENOMEM
        assert allocator.free_frames == free
    allocator.alloc_many(free)
    with pytest.raises(XenError):
        allocator.alloc()
    assert allocator.alloc_many(0) == []


def test_double_and_foreign_frees_are_our_bug(memory: Memory) -> None:
    allocator = FrameAllocator(memory, 8)
    mfn = allocator.alloc()
    allocator.free(mfn)
    (run,) = allocator.alloc_many(32)
    allocator.free(run.start, 32)
    outside = [(0, 1), (memory.nr_frames, 1), (9, 0), (8, 1 << 40)]
    for bad_mfn, count in ((mfn, 1), (run.start, 32), (run.start + 5, 1), *outside):
        before = allocator.free_frames
        with pytest.raises(InternalError):
            allocator.free(bad_mfn, count)
        assert allocator.free_frames == before


def test_threads_never_get_the_same_frame(memory: Memory) -> None:
    allocator = FrameAllocator(memory, 0)
    failures: list[str] = []

    def churn(seed: int) -> None:
        rng = random.Random(seed)
        mine: list[int] = []
        for _ in range(1500):
            if mine and rng.random() < 0.5:
                mfn = mine.pop(rng.randrange(len(mine)))
                if memory.q[mfn << 9] != seed:
                    failures.append(f"frame {mfn:#x} is shared")
                allocator.free(mfn)
            else:
                mfn = allocator.alloc()
                if memory.q[mfn << 9]:
                    failures.append(f"frame {mfn:#x} was not scrubbed")
                memory.q[mfn << 9] = seed
                mine.append(mfn)
        for mfn in mine:
            allocator.free(mfn)

    threads = [threading.Thread(target=churn, args=(seed,)) for seed in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert allocator.free_frames == memory.nr_frames


class AllocatorMachine(RuleBasedStateMachine):
    """What is handed out is disjoint, aligned, within bounds, and the free count is what remains."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = Memory(2048 << 12, nodes=2)
        self.allocator = FrameAllocator(self.memory, 5)
        self.held: list[tuple[int, int]] = []

    def _add(self, start: int, count: int) -> None:
        assert start >= 5 and start + count <= 2048
        for other, other_count in self.held:
            assert start + count <= other or other + other_count <= start
        assert not any(self.memory.q[mfn << 9] for mfn in range(start, start + count))
        for mfn in range(start, start + count):
            self.memory.q[mfn << 9] = 1
        self.held.append((start, count))

    @rule(order=st.integers(0, 8), node=st.sampled_from([None, 0, 1, 7]))
    def alloc(self, order: int, node: int | None) -> None:
        try:
            start = self.allocator.alloc(order, node)
        except XenError:
            return
        assert start % (1 << order) == 0
        self._add(start, 1 << order)

    @rule(count=st.integers(0, 900))
    def alloc_many(self, count: int) -> None:
        enough = self.allocator.free_frames >= count
        try:
            runs = self.allocator.alloc_many(count)
        except XenError:
            assert not enough
            return
        assert enough and sum(map(len, runs)) == count
        for run in runs:
            self._add(run.start, len(run))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        index = data.draw(st.integers(0, len(self.held) - 1))
        start, count = self.held.pop(index)
        part = data.draw(st.integers(1, count))
        self.allocator.free(start, part)
        if part < count:
            self.held.append((start + part, count - part))

    @invariant()
    def nothing_is_lost(self) -> None:
        assert self.allocator.free_frames == 2048 - 5 - sum(count for _, count in self.held)

    def teardown(self) -> None:
        self.memory.close()


TestAllocator = AllocatorMachine.TestCase
TestAllocator.settings = settings(max_examples=25, stateful_step_count=40, deadline=None)
