# SPDX-License-Identifier: GPL-2.0-only
"""A new guest's memory as its builder writes it, by the guest's own frame numbers, a few MiB at a time.

Every write yields to the event loop after each piece, so that a build can be cancelled between any two of them; no
mapping is held while it does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Protocol

from pyxen.abi.xen import PAGE_SHIFT, PAGE_SIZE, DomId, Gfn

_CHUNK_PAGES: Final = 1024  # 4 MiB: about a millisecond of copying
_POPULATE_PAGES: Final = 4096


@dataclass(frozen=True, slots=True)
class Area:
    """``pages`` frames from ``pfn`` on."""

    pfn: int
    pages: int

    @property
    def end(self) -> int:
        return self.pfn + self.pages


class ForeignMapping(Protocol):
    """Frames of another domain, mapped."""

    @property
    def view(self) -> memoryview:
        """All of them, as one piece."""

    def written(self) -> None:
        """Tell the engines that the frames changed."""

    def close(self) -> None: ...


class MemoryPrivCmd(Protocol):
    """The part of hypervisor.privcmd that gives a guest memory and writes it."""

    def populate_physmap(self, domid: DomId, pfns: range) -> Sequence[range]:
        """Give the domain a frame for each pfn; machine frames as runs, in pfn order."""

    def foreign_map(self, domid: DomId, gfn: Gfn, count: int = 1, writable: bool = True) -> ForeignMapping: ...


async def populate(privcmd: MemoryPrivCmd, domid: DomId, area: Area) -> list[range]:
    """Give ``domid`` frames for all of ``area``; machine frames in its order, in runs as long as they come."""
    runs: list[range] = []
    for first in range(area.pfn, area.end, _POPULATE_PAGES):
        for run in privcmd.populate_physmap(domid, range(first, min(first + _POPULATE_PAGES, area.end))):
            if runs and runs[-1].stop == run.start:
                runs[-1] = range(runs[-1].start, run.stop)
            else:
                runs.append(run)
        await asyncio.sleep(0)
    return runs


class GuestMemory:
    """Writes by pfn. ``split`` divides an area into (first pfn, what foreign_map calls these frames) where the
    machine's frames are contiguous."""

    def __init__(
        self, privcmd: MemoryPrivCmd, domid: DomId, split: Callable[[Area], Iterator[tuple[int, range]]]
    ) -> None:
        self._privcmd = privcmd
        self._domid = domid
        self._split = split

    async def write(self, pfn: int, data: bytes | memoryview, offset: int = 0) -> None:
        """Write ``data`` from byte ``offset`` (below a page) of frame ``pfn`` on; the rest of its pages stays."""
        source = memoryview(data)
        area = Area(pfn, offset + len(source) + PAGE_SIZE - 1 >> PAGE_SHIFT)
        done = 0
        for first, run in self._pieces(area):
            skip = offset if first == pfn else 0
            size = min((len(run) << PAGE_SHIFT) - skip, len(source) - done)
            with self._mapped(run) as view:
                view[skip : skip + size] = source[done : done + size]
            done += size
            await asyncio.sleep(0)

    async def write_at(self, address: int, data: bytes | memoryview) -> None:
        """As :meth:`write`, at a byte address."""
        await self.write(address >> PAGE_SHIFT, data, address & PAGE_SIZE - 1)

    async def zero(self, start: int, end: int) -> None:
        """Clear pseudo-physical bytes [start, end)."""
        while start < end:
            size = min(end - start, (_CHUNK_PAGES << PAGE_SHIFT) - (start & PAGE_SIZE - 1))
            await self.write_at(start, bytes(size))
            start += size

    def _pieces(self, area: Area) -> Iterator[tuple[int, range]]:
        for first, run in self._split(area):
            for i in range(0, len(run), _CHUNK_PAGES):
                yield first + i, run[i : i + _CHUNK_PAGES]

    @contextmanager
    def _mapped(self, run: range) -> Iterator[memoryview]:
        mapping = self._privcmd.foreign_map(self._domid, Gfn(run[0]), len(run))
        try:
            yield mapping.view
            mapping.written()
        finally:
            mapping.close()
