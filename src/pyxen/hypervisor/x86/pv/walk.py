# SPDX-License-Identifier: GPL-2.0-only
"""Walking a PV guest's page tables in software (Xen: guest_walk_tables, map_guest_l1e).

The tables have been validated, so every entry on the way names a frame of this machine; a stale root need not have
been, so a walk that leaves RAM simply finds nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pyxen.hypervisor.x86.pv.mm_flags import ADDRESS_MASK, PAGE_NX, PAGE_PRESENT, PAGE_PSE, PAGE_RW, PAGE_USER

if TYPE_CHECKING:
    from pyxen.machine.memory import Memory

_RIGHTS: Final = PAGE_PRESENT | PAGE_RW | PAGE_USER
_OFFSET_2M: Final = (1 << 21) - 1
_CANONICAL_LOW: Final = 1 << 47
_CANONICAL_HIGH: Final = (1 << 64) - (1 << 47)


def guest_walk(memory: Memory, root_mfn: int, va: int, write: bool) -> int | None:
    """Machine address of ``va`` below the L4 in frame ``root_mfn`` for a kernel access (which PAGE_USER does not
    limit).

    None if it is not mapped, or with ``write`` not mapped writable at every level.  1 GiB pages are not walked: no PV
    guest can have one.
    """
    if not (va < _CANONICAL_LOW or va >= _CANONICAL_HIGH):
        return None
    q = memory.q
    try:
        e4 = q[(root_mfn << 9) + (va >> 39 & 511)]
        if not e4 & 1:
            return None
        e3 = q[((e4 & ADDRESS_MASK) >> 3) + (va >> 30 & 511)]
        if not e3 & 1 or e3 & PAGE_PSE:
            return None
        e2 = q[((e3 & ADDRESS_MASK) >> 3) + (va >> 21 & 511)]
        if not e2 & 1:
            return None
        if e2 & PAGE_PSE:
            if write and not e4 & e3 & e2 & PAGE_RW:
                return None
            maddr = e2 & ADDRESS_MASK & ~_OFFSET_2M | va & _OFFSET_2M
        else:
            e1 = q[((e2 & ADDRESS_MASK) >> 3) + (va >> 12 & 511)]
            if not e1 & 1 or (write and not e4 & e3 & e2 & e1 & PAGE_RW):
                return None
            maddr = e1 & ADDRESS_MASK | va & 0xFFF
    except IndexError:
        return None
    return maddr if maddr < memory.size_bytes else None


def guest_walk_flags(memory: Memory, root_mfn: int, va: int) -> tuple[int, int] | None:
    """Like :func:`guest_walk`, with the effective rights: PRESENT, RW and USER set at every level, NX set at any."""
    maddr = guest_walk(memory, root_mfn, va, False)
    if maddr is None:
        return None
    q = memory.q
    rights, nx, table = _RIGHTS, 0, root_mfn << 9
    for shift in (39, 30, 21, 12):
        entry = q[table + (va >> shift & 511)]
        rights &= entry
        nx |= entry & PAGE_NX
        if shift == 21 and entry & PAGE_PSE:
            break
        table = (entry & ADDRESS_MASK) >> 3
    return maddr, rights | nx


def guest_l1e(memory: Memory, root_mfn: int, va: int) -> int | None:
    """map_guest_l1e(): index into ``memory.q`` of the L1 entry for ``va``, present or not; None if there is no L1
    table.

    The table may be the hypervisor's own: who wants to write there checks owner and type.
    """
    if not (va < _CANONICAL_LOW or va >= _CANONICAL_HIGH):
        return None
    q = memory.q
    try:
        entry = q[(root_mfn << 9) + (va >> 39 & 511)]
        if not entry & 1:
            return None
        entry = q[((entry & ADDRESS_MASK) >> 3) + (va >> 30 & 511)]
        if not entry & 1 or entry & PAGE_PSE:
            return None
        entry = q[((entry & ADDRESS_MASK) >> 3) + (va >> 21 & 511)]
    except IndexError:
        return None
    if not entry & 1 or entry & PAGE_PSE:
        return None
    at = ((entry & ADDRESS_MASK) >> 3) + (va >> 12 & 511)
    return at if at < memory.nr_frames << 9 else None
