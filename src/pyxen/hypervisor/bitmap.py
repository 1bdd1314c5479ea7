# SPDX-License-Identifier: GPL-2.0-only
"""struct xenctl_bitmap: sets of pCPUs (or nodes) in a caller's memory (Xen: xen/common/domctl.c,
``bitmap_to_xenctl_bitmap`` and back)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pyxen.hypervisor.hypercall import Caller

_ZEROS: Final = bytes(4096)


def from_xenctl_bitmap(caller: Caller, handle: int, nr_bits: int, limit: int) -> frozenset[int]:
    """The members below ``limit``; what the caller names beyond it is left out, what it does not name is not a member.

    Raises GuestAccessError.
    """
    size = min((nr_bits + 7) // 8, (limit + 7) // 8)
    if not size:
        return frozenset()
    value = int.from_bytes(caller.read(handle, size), "little") & (1 << min(nr_bits, limit)) - 1
    return frozenset(bit for bit in range(value.bit_length()) if value >> bit & 1)


def to_xenctl_bitmap(caller: Caller, handle: int, nr_bits: int, members: Iterable[int], limit: int) -> None:
    """Write ``members`` (below ``limit``) as far as the caller has room, and zeros into the rest of its room.

    Raises GuestAccessError.
    """
    room, size = (nr_bits + 7) // 8, (limit + 7) // 8
    data = sum(1 << member for member in members).to_bytes(size, "little")[:room]
    if data:
        caller.write(handle, data)
    at = len(data)
    while at < room:  # in pages: the room is a number that the caller chose
        chunk = _ZEROS[: room - at]
        caller.write(handle + at, chunk)
        at += len(chunk)
