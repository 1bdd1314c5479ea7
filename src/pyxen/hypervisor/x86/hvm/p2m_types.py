# SPDX-License-Identifier: GPL-2.0-only
"""What a guest-physical frame is, and how a nested page-table entry says so (Xen: xen/include/asm-x86/p2m.h,
p2m_type_to_flags in xen/arch/x86/mm/p2m-pt.c).

An entry is an x86-64 page-table entry.  Its type stands in bits 52..56, which hardware leaves to software, as
``type ^ 1``: so an entry of zero is :attr:`P2mType.INVALID`, a hole.  Accessed and dirty bits are set from the start,
so that no walker has to write into our tables.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final


class P2mType(IntEnum):
    """``p2m_type_t`` (xen/include/asm-x86/p2m.h); numbers are Xen 4.6's."""

    RAM_RW = 0
    """Normal read/write guest RAM."""
    INVALID = 1
    """Nothing mapped here."""
    RAM_LOGDIRTY = 2
    """Temporarily read-only for log-dirty."""
    RAM_RO = 3
    """Read-only; writes are silently dropped."""
    MMIO_DM = 4
    """Emulated: reads all ones, writes nothing (there is no device model)."""
    MMIO_DIRECT = 5
    """A page of a device inside the hypervisor."""
    GRANT_MAP_RW = 7
    """A grant mapping of another domain's frame."""
    GRANT_MAP_RO = 8
    MAP_FOREIGN = 14
    """RAM page of a foreign domain."""


PRESENT: Final = 1
RW: Final = 2
USER: Final = 4
ACCESSED: Final = 0x20
DIRTY: Final = 0x40
PSE: Final = 0x80
NX: Final = 1 << 63
ADDRESS: Final = 0x000FFFFFFFFFF000

_TYPE_SHIFT: Final = 52
TYPE_MASK: Final = 0x1F << _TYPE_SHIFT
_READ: Final = PRESENT | USER | ACCESSED | DIRTY
TABLE: Final = _READ | RW
"""Flags of an entry that points to a table: rights are for the leaves to say."""

_WRITABLE: Final = frozenset((P2mType.RAM_RW, P2mType.MMIO_DM, P2mType.MMIO_DIRECT, P2mType.GRANT_MAP_RW,
                              P2mType.MAP_FOREIGN))
RAM: Final = frozenset((P2mType.RAM_RW, P2mType.RAM_LOGDIRTY, P2mType.RAM_RO))
"""P2M_RAM_TYPES: the domain's own memory."""
GRANT: Final = frozenset((P2mType.GRANT_MAP_RW, P2mType.GRANT_MAP_RO))
BACKED: Final = RAM | GRANT | {P2mType.MAP_FOREIGN}
"""What the hypervisor may read and write on the guest's behalf."""
READONLY: Final = frozenset((P2mType.RAM_LOGDIRTY, P2mType.RAM_RO, P2mType.GRANT_MAP_RO))
CHANGEABLE: Final = frozenset((P2mType.RAM_RW, P2mType.RAM_LOGDIRTY))
"""P2M_CHANGEABLE_TYPES."""

FLAGS: Final[dict[P2mType, int]] = {
    kind: (0 if kind is P2mType.INVALID else _READ | (RW if kind in _WRITABLE else 0))
    | (int(kind) ^ 1) << _TYPE_SHIFT
    for kind in P2mType
}
"""Flags of a leaf entry by type, PSE aside."""

_BY_FIELD: Final = [P2mType.INVALID] * 32
for _kind in P2mType:
    _BY_FIELD[int(_kind) ^ 1] = _kind


def type_of(entry: int) -> P2mType:
    """The type in a leaf entry."""
    return _BY_FIELD[entry >> _TYPE_SHIFT & 0x1F]
