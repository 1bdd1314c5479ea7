# SPDX-License-Identifier: GPL-2.0-only
"""Walking a translated guest's own page tables in software (Xen: xen/arch/x86/mm/guest_walk.c).

For copies to and from the guest on its behalf, which Xen makes as a supervisor access.  Three kinds of tables: two
levels of 32-bit entries (with 4 MiB pages if CR4.PSE), PAE's three levels, four levels in long mode.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from pyxen.machine.memory import Memory

PFEC_PRESENT: Final = 1
PFEC_WRITE: Final = 2
PFEC_USER: Final = 4
PFEC_RESERVED: Final = 8
PFEC_FETCH: Final = 16

CR0_WP: Final = 1 << 16
CR0_PG: Final = 1 << 31
CR4_PSE: Final = 1 << 4
CR4_PAE: Final = 1 << 5
CR4_SMEP: Final = 1 << 20
CR4_SMAP: Final = 1 << 21
EFER_LMA: Final = 1 << 10
EFER_NXE: Final = 1 << 11
EFLAGS_AC: Final = 1 << 18

_P: Final = 1
_RW: Final = 2
_US: Final = 4
_PSE: Final = 0x80
_NX: Final = 1 << 63
_ADDRESS: Final = 0x000FFFFFFFFFF000
_PHYS: Final = (1 << 40) - 1
_RESERVED: Final = _ADDRESS & ~_PHYS
"""CPUID tells the guest 40 physical address bits."""
_CANONICAL_LOW: Final = 1 << 47
_CANONICAL_HIGH: Final = (1 << 64) - (1 << 47)


class PagingState(NamedTuple):
    """What decides how a linear address is translated."""

    cr0: int
    cr3: int
    cr4: int
    efer: int
    flags: int


class PageFault(Exception):
    """The walk ends in a page fault with this error code."""

    def __init__(self, error_code: int) -> None:
        super().__init__(error_code)
        self.error_code = error_code


class Translation(NamedTuple):
    """Where a page was found, and what said so: good as long as that stands, and the p2m has taken nothing away."""

    paging: tuple[int, int, int, int]
    """CR0, CR3, CR4, EFER."""
    maddr: int
    gfn: int
    path: tuple[tuple[int, int], ...]
    """(index into memory.q, entry)."""


def translate(memory: Memory, to_mfn: Callable[[int], int | None], state: PagingState, va: int, pfec: int,
              path: list[tuple[int, int]] | None = None) -> int:
    """Guest-physical address of ``va`` for an access ``pfec`` (PFEC_WRITE, PFEC_USER, PFEC_FETCH). ``path``, if given,
    gets the entries of a four-level walk, as (index into memory.q, entry).

    ``to_mfn`` finds the machine frame of a guest frame (None: no memory there). Raises PageFault with the error code
    that the access would have had.
    """
    if not state.cr0 & CR0_PG:
        return va & 0xFFFFFFFF
    if state.efer & EFER_LMA:
        if not (va < _CANONICAL_LOW or va >= _CANONICAL_HIGH):
            raise PageFault(pfec & (PFEC_WRITE | PFEC_USER))
        return _walk64(memory, to_mfn, state, va, pfec, 39, state.cr3 & _ADDRESS, _P | _RW | _US, path)
    va &= 0xFFFFFFFF
    if state.cr4 & CR4_PAE:
        # The four entries of the top level are loaded with CR3 on hardware, and have no rights.
        entry = _entry(memory, to_mfn, (state.cr3 & 0xFFFFFFE0) + (va >> 30 << 3), 8)
        if entry is None or not entry & _P:
            raise PageFault(pfec & (PFEC_WRITE | PFEC_USER))
        return _walk64(memory, to_mfn, state, va, pfec, 21, entry & _ADDRESS, _P | _RW | _US)
    return _walk32(memory, to_mfn, state, va, pfec)


def _entry(memory: Memory, to_mfn: Callable[[int], int | None], gpa: int, size: int) -> int | None:
    mfn = to_mfn(gpa >> 12)
    if mfn is None:
        return None
    offset = gpa & 0xFFF
    return memory.q[(mfn << 9) + (offset >> 3)] if size == 8 else memory.d[(mfn << 10) + (offset >> 2)]


def _walk64(memory: Memory, to_mfn: Callable[[int], int | None], state: PagingState, va: int, pfec: int, shift: int,
            table: int, rights: int, path: list[tuple[int, int]] | None = None) -> int:
    missing = pfec & (PFEC_WRITE | PFEC_USER) | (pfec & PFEC_FETCH if state.efer & EFER_NXE else 0)
    nx = 0
    while True:
        mfn = to_mfn(table >> 12)
        if mfn is None:
            raise PageFault(missing)
        at = (mfn << 9) + (va >> shift & 511)
        entry = memory.q[at]
        if not entry & _P:
            raise PageFault(missing)
        if path is not None:
            path.append((at, entry))
        if entry & _RESERVED or (entry & _NX and not state.efer & EFER_NXE) or (shift == 39 and entry & _PSE):
            raise PageFault(missing | PFEC_PRESENT | PFEC_RESERVED)
        rights &= entry
        nx |= entry & _NX
        if shift == 12 or entry & _PSE:
            break
        table = entry & _ADDRESS
        shift -= 9
    size = 1 << shift
    base = entry & _ADDRESS
    if shift > 12:
        if base & size - 1 & ~0x1FFF:  # bit 12 of a large page is its PAT bit
            raise PageFault(missing | PFEC_PRESENT | PFEC_RESERVED)
        base &= -size
    _check(state, va, pfec, rights, bool(nx))
    return base + (va & size - 1)


def _walk32(memory: Memory, to_mfn: Callable[[int], int | None], state: PagingState, va: int, pfec: int) -> int:
    missing = pfec & (PFEC_WRITE | PFEC_USER)
    l2 = _entry(memory, to_mfn, (state.cr3 & 0xFFFFF000) + (va >> 22 << 2), 4)
    if l2 is None or not l2 & _P:
        raise PageFault(missing)
    if l2 & _PSE and state.cr4 & CR4_PSE:
        if l2 >> 21 & 1:
            raise PageFault(missing | PFEC_PRESENT | PFEC_RESERVED)
        _check(state, va, pfec, l2, False)
        return l2 & 0xFFC00000 | (l2 >> 13 & 0xFF) << 32 | va & 0x3FFFFF
    l1 = _entry(memory, to_mfn, (l2 & 0xFFFFF000) + ((va >> 12 & 1023) << 2), 4)
    if l1 is None or not l1 & _P:
        raise PageFault(missing)
    _check(state, va, pfec, l1 & l2, False)
    return l1 & 0xFFFFF000 | va & 0xFFF


def _check(state: PagingState, va: int, pfec: int, rights: int, nx: bool) -> None:
    """What the rights of all levels together allow."""
    ok = True
    user_page = bool(rights & _US)
    if pfec & PFEC_USER:
        ok = user_page and (not pfec & PFEC_WRITE or bool(rights & _RW))
    else:
        if pfec & PFEC_WRITE and not rights & _RW:
            ok = not state.cr0 & CR0_WP
        if user_page:
            if pfec & PFEC_FETCH and state.cr4 & CR4_SMEP:
                ok = False
            if not pfec & PFEC_FETCH and state.cr4 & CR4_SMAP and not state.flags & EFLAGS_AC:
                ok = False
    if pfec & PFEC_FETCH and nx:
        ok = False
    if not ok:
        shown = PFEC_WRITE | PFEC_USER
        if state.efer & EFER_NXE or state.cr4 & CR4_SMEP:
            shown |= PFEC_FETCH
        raise PageFault(pfec & shown | PFEC_PRESENT)
