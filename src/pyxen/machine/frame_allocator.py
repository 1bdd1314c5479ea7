# SPDX-License-Identifier: GPL-2.0-only
"""Who hands out machine frames (Xen: common/page_alloc.c, without owners: those are the hypervisor's frame table).

Two shapes of demand rule the design: building a guest wants tens of thousands of frames in a few contiguous runs and
at once; a running host frees and allocates single frames all the time. So each node keeps a short list of *runs* and a
stack of *single* frames, and one byte a frame says whether it is free. That byte array is the truth: double frees are
found in it, and when the runs get too short for a request they are rebuilt from it by ``bytearray.find`` (memchr).

Frames are scrubbed between two owners. Freed single frames wait in a small "dirty" stack and are cleaned together,
since a run of
them can be given back to the host instead of being written.  What :meth:`FrameAllocator.alloc` returns reads as zero.
"""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING

from pyxen.errors import InternalError, XenError

if TYPE_CHECKING:
    from pyxen.machine.memory import Memory

_FREE, _USED, _DIRTY = 0, 1, 2
_DIRTY_LIMIT = 1024
_REFILL = 64
_FEW_RUNS = 64


class _Pool:
    """Free frames of one NUMA node. All methods run under the allocator's lock."""

    def __init__(self, state: bytearray, first: int, end: int) -> None:
        self.state = state
        self.first = first
        self.end = end
        self.runs: list[tuple[int, int]] = [(first, end)] if first < end else []
        self.singles: list[int] = []
        self.free = end - first

    def rebuild(self) -> None:
        """Merge everything free into maximal runs, lowest address last (it is taken first)."""
        state, end = self.state, self.end
        runs: list[tuple[int, int]] = []
        position = self.first
        while True:
            start = state.find(_FREE, position, end)
            if start < 0:
                break
            stop = start + 1
            while stop < end and state[stop] == _FREE:
                # memchr knows only "find"; the next used frame ends the run, whichever kind of used it is.
                used = state.find(_USED, stop, end)
                dirty = state.find(_DIRTY, stop, end if used < 0 else used)
                stop = dirty if dirty >= 0 else used if used >= 0 else end
            runs.append((start, stop))
            position = stop
        runs.reverse()
        self.runs = runs
        self.singles = []

    def take_one(self) -> int | None:
        if not self.singles:
            if not self.runs:
                return None
            start, stop = self.runs.pop()
            cut = min(start + _REFILL, stop)
            if cut < stop:
                self.runs.append((cut, stop))
            self.singles.extend(range(cut - 1, start - 1, -1))
        mfn = self.singles.pop()
        self.state[mfn] = _USED
        self.free -= 1
        return mfn

    def take_block(self, size: int) -> int | None:
        """A naturally aligned block of ``size`` (a power of two) frames."""
        for attempt in range(2):
            for index in range(len(self.runs) - 1, -1, -1):
                start, stop = self.runs[index]
                aligned = (start + size - 1) & -size
                if aligned + size <= stop:
                    rest = [(a, b) for a, b in ((aligned + size, stop), (start, aligned)) if a < b]
                    self.runs[index:index + 1] = rest
                    self._mark_used(aligned, aligned + size)
                    return aligned
            if attempt or self.free < size:
                return None
            self.rebuild()
        return None

    def take_many(self, count: int) -> list[range]:
        """At most ``count`` frames in few runs."""
        count = min(count, self.free)
        if sum(stop - start for start, stop in self.runs[-_FEW_RUNS:]) < count:
            self.rebuild()
        taken: list[range] = []
        while count:
            start, stop = self.runs.pop()
            cut = min(start + count, stop)
            if cut < stop:
                self.runs.append((cut, stop))
            self._mark_used(start, cut)
            taken.append(range(start, cut))
            count -= cut - start
        return taken

    def _mark_used(self, start: int, stop: int) -> None:
        self.state[start:stop] = bytes((_USED,)) * (stop - start)
        self.free -= stop - start

    def give(self, start: int, stop: int) -> None:
        self.state[start:stop] = bytes(stop - start)
        self.free += stop - start
        if stop - start == 1:
            self.singles.append(start)
        else:
            self.runs.append((start, stop))


class FrameAllocator:
    """Allocates the frames ``first_mfn`` … end of ``memory``; those below are the hypervisor's own.

    Thread-safe. Its lock is a leaf: no other lock is taken under it.
    """

    def __init__(self, memory: Memory, first_mfn: int = 0) -> None:
        if not 0 <= first_mfn <= memory.nr_frames:
            raise InternalError(f"first_mfn {first_mfn:#x} is outside of RAM")
        self._memory = memory
        self._first = first_mfn
        self._lock = threading.Lock()
        # bytearray(n) is calloc'ed: the host backs it as it is used, also for a 256 GiB machine.
        self._state = bytearray(memory.nr_frames)
        self._pools: list[_Pool] = []
        for node in range(memory.nodes):
            frames = memory.node_range(node)
            start = max(frames.start, first_mfn)
            end = memory.nr_frames if node == memory.nodes - 1 else frames.stop
            self._pools.append(_Pool(self._state, min(start, end), end))
        self._dirty: list[int] = []
        self._scrubbing = 0

    @property
    def free_frames(self) -> int:
        """Frames that an allocation could get now (those waiting to be scrubbed included)."""
        with self._lock:
            return sum(pool.free for pool in self._pools) + len(self._dirty) + self._scrubbing

    def free_frames_of_node(self, node: int) -> int:
        """The same for one NUMA node."""
        self._scrub()
        with self._lock:
            return self._pools[node].free

    def _order(self, node: int | None) -> list[_Pool]:
        """Pools to try: the wanted node first, then the others (Xen: a node is a preference, MEMF_exact_node is
        not)."""
        if node is None or not 0 <= node < len(self._pools):
            return self._pools
        return [self._pools[node], *(pool for index, pool in enumerate(self._pools) if index != node)]

    def alloc(self, order: int = 0, node: int | None = None) -> int:
        """The first of 2**order contiguous, naturally aligned frames, all zero. Raises XenError(ENOMEM)."""
        pools = self._order(node)
        for attempt in range(2):
            with self._lock:
                for pool in pools:
                    mfn = pool.take_one() if order == 0 else pool.take_block(1 << order)
                    if mfn is not None:
                        return mfn
            if attempt or not self._scrub():
                break
        raise XenError(errno.ENOMEM, f"no {1 << order} contiguous free machine frames")

    def alloc_many(self, count: int, node: int | None = None) -> list[range]:
        """``count`` zeroed frames in as few runs as possible; all or nothing. Raises XenError(ENOMEM)."""
        if count < 0:
            raise InternalError(f"allocation of {count} frames")
        if count > sum(pool.free for pool in self._pools):
            self._scrub()
        with self._lock:
            if count > sum(pool.free for pool in self._pools):
                free = sum(pool.free for pool in self._pools)
                raise XenError(errno.ENOMEM, f"{count} machine frames wanted, {free} free")
            taken: list[range] = []
            for pool in self._order(node):
                if count == 0:
                    break
                runs = pool.take_many(count)
                taken += runs
                count -= sum(map(len, runs))
            return taken

    def free(self, mfn: int, count: int = 1) -> None:
        """Return frames. Raises InternalError for a frame that is not allocated (a double free)."""
        end = mfn + count
        if mfn < self._first or count < 1 or end > len(self._state):
            raise InternalError(f"free of frames {mfn:#x}..{end:#x} outside of the allocator's range")
        state = self._state
        with self._lock:
            if state.count(_USED, mfn, end) != count:
                raise InternalError(f"double free in frames {mfn:#x}..{end:#x}")
            if count == 1:
                state[mfn] = _DIRTY
                self._dirty.append(mfn)
                if len(self._dirty) < _DIRTY_LIMIT:
                    return
            else:
                state[mfn:end] = bytes((_DIRTY,)) * count
                self._scrubbing += count
        if count == 1:
            self._scrub()
        else:
            self._clean(mfn, end)

    def is_allocated(self, mfn: int) -> bool:
        """Whether a frame is handed out."""
        return self._first <= mfn < len(self._state) and self._state[mfn] == _USED

    def _scrub(self) -> bool:
        """Clean what single frees left behind; True if that was anything."""
        with self._lock:
            dirty, self._dirty = self._dirty, []
            self._scrubbing += len(dirty)
        if not dirty:
            return False
        dirty.sort()
        start = previous = dirty[0]
        for mfn in dirty[1:]:
            if mfn != previous + 1:
                self._clean(start, previous + 1)
                start = mfn
            previous = mfn
        self._clean(start, previous + 1)
        return True

    def _clean(self, start: int, end: int) -> None:
        """Scrub frames marked dirty (without the lock: nobody else can touch them) and make them free."""
        self._memory.zero(start, end - start)
        with self._lock:
            self._scrubbing -= end - start
            for pool in self._pools:
                low, high = max(start, pool.first), min(end, pool.end)
                if low < high:
                    pool.give(low, high)
