# SPDX-License-Identifier: GPL-2.0-only
"""A nested page table: four levels of x86-64 entries in frames of the hypervisor (Xen: xen/arch/x86/mm/p2m-pt.c).

Only the tree lives here: finding an entry, setting one of 4 KiB, 2 MiB or 1 GiB, breaking up a larger one on the way.
What the entries mean to anyone (references, M2P, TLBs) is :mod:`pyxen.hypervisor.x86.hvm.p2m`'s.  Superpages are
split when a part of them changes and never merged again; setting a whole one frees what lies below it.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from pyxen.errors import XenError
from pyxen.hypervisor.x86.hvm.p2m_types import ADDRESS, FLAGS, PRESENT, PSE, TABLE, P2mType, type_of

if TYPE_CHECKING:
    from pyxen.hypervisor.x86.hvm.paging_pool import PagingPool
    from pyxen.machine.memory import Memory

GFN_BITS: Final = 28
"""Guest-physical addresses have 40 bits, as CPUID says."""
ORDERS: Final = (0, 9, 18)
"""PAGE_ORDER_4K, PAGE_ORDER_2M, PAGE_ORDER_1G."""
_EMPTY: Final = bytes(4096)


class P2mTable:
    """One tree. Not locked: its user is."""

    def __init__(self, memory: Memory, pool: PagingPool) -> None:
        """XenError(ENOMEM)."""
        self._q = memory.q
        self._b = memory.b
        self._pool = pool
        self.root = pool.alloc()
        """Frame of the top table."""

    def lookup(self, gfn: int) -> tuple[int, int]:
        """The leaf entry that covers ``gfn`` and the order of what it (or the hole in its place) covers."""
        if gfn >> GFN_BITS:
            return 0, 0
        q = self._q
        table = self.root
        for order in (27, 18, 9, 0):
            entry = q[(table << 9) + (gfn >> order & 511)]
            if not order or not entry & PRESENT or entry & PSE:
                return entry, order
            table = (entry & ADDRESS) >> 12
        raise AssertionError("unreachable")

    def set(self, gfn: int, order: int, entry: int) -> int:
        """Set the leaf entry of 2**order frames from ``gfn`` on (aligned; one of :data:`ORDERS`); the old entry.

        ``entry`` has no PSE bit. Where a table was, it is freed with all below, and the old entry is 0.
        XenError: EINVAL for a frame number out of range, ENOMEM without a frame for a table; nothing changed then
        but that superpages may have been split.
        """
        if gfn >> GFN_BITS or order not in ORDERS or gfn & (1 << order) - 1:
            raise XenError(errno.EINVAL)
        q = self._q
        table = self.root
        level = 27
        while level > order:
            at = (table << 9) + (gfn >> level & 511)
            found = q[at]
            if not found & PRESENT:
                if not entry:
                    return 0  # a hole in a hole
                found = self._pool.alloc() << 12 | TABLE
                q[at] = found
            elif found & PSE:
                found = self._split(at, found, level)
            table = (found & ADDRESS) >> 12
            level -= 9
        at = (table << 9) + (gfn >> order & 511)
        old = q[at]
        q[at] = entry | PSE if order and entry & PRESENT else entry
        if order and old & PRESENT and not old & PSE:
            self._free_below((old & ADDRESS) >> 12, order - 9)
            return 0
        return old

    def _split(self, at: int, entry: int, level: int) -> int:
        """Replace a superpage by a table of the next smaller pages; the new entry."""
        table = self._pool.alloc()
        step = 1 << level - 9 + 12
        flags = entry if level > 9 else entry & ~PSE
        base = table << 9
        q = self._q
        for index in range(512):
            q[base + index] = flags + index * step
        new = table << 12 | TABLE
        q[at] = new
        return new

    def _free_below(self, table: int, level: int) -> None:
        if level:
            for entry in self._q[table << 9 : (table + 1) << 9]:
                if entry & PRESENT and not entry & PSE:
                    self._free_below((entry & ADDRESS) >> 12, level - 9)
        self._pool.free(table)

    def prune(self, gfn: int) -> None:
        """Free the tables on the way to ``gfn`` that hold nothing any more."""
        q = self._q
        path: list[tuple[int, int]] = []
        table = self.root
        for level in (27, 18, 9):
            at = (table << 9) + (gfn >> level & 511)
            entry = q[at]
            if not entry & PRESENT or entry & PSE:
                break
            table = (entry & ADDRESS) >> 12
            path.append((at, table))
        for at, table in reversed(path):
            if self._b[table << 12 : (table + 1) << 12] != _EMPTY:
                return
            q[at] = 0
            self._pool.free(table)

    def leaves(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(gfn, order, entry) of every leaf that is not a hole and that overlaps [start, end), in order.

        The tree may be changed at what was just yielded.
        """
        yield from self._leaves(self.root, 27, 0, start, min(end, 1 << GFN_BITS))

    def _leaves(self, table: int, level: int, base: int, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        first = max(start - base, 0) >> level
        last = min((end - base - 1 >> level) + 1, 512)
        q = self._q
        for index in range(first, last):
            entry = q[(table << 9) + index]
            if not entry:
                continue
            gfn = base + (index << level)
            if level and entry & PRESENT and not entry & PSE:
                yield from self._leaves((entry & ADDRESS) >> 12, level - 9, gfn, start, end)
            else:
                yield gfn, level, entry

    def run(self, gfn: int, count: int, change: dict[P2mType, P2mType]) -> bool:
        """Change the type of the entries in [gfn, gfn + count) as ``change`` says, frames as they are; superpages at
        the ends are split. Whether anything changed. XenError(ENOMEM), possibly half-way."""
        changed = False
        end = gfn + count
        for first, order, entry in list(self.leaves(gfn, end)):
            kind = type_of(entry)
            to = change.get(kind)
            if to is None:
                continue
            changed = True
            if order and (first < gfn or first + (1 << order) > end):
                self._change_part(first, order, entry, to, gfn, end)
            else:
                self.set(first, order, entry & ADDRESS | FLAGS[to])
        return changed

    def _change_part(self, first: int, order: int, entry: int, to: P2mType, start: int, end: int) -> None:
        smaller = order - 9
        step = 1 << smaller
        for index in range(512):
            at = first + index * step
            if at + step <= start or at >= end:
                continue
            part = (entry & ADDRESS) + (index << smaller + 12)
            if smaller and (at < start or at + step > end):
                # sets the smaller leaf as it was, which splits the larger one, then its part
                self.set(at, smaller, part | FLAGS[type_of(entry)])
                self._change_part(at, smaller, part | FLAGS[type_of(entry)], to, start, end)
            else:
                self.set(at, smaller, part | FLAGS[to])
