# SPDX-License-Identifier: GPL-2.0-only
"""Bits of page-table entries, and which of them a PV guest may set (Xen: xen/include/asm-x86/page.h, x86_64/page.h,
mm.c)."""

from __future__ import annotations

from typing import Final

PAGE_PRESENT: Final = 1 << 0
PAGE_RW: Final = 1 << 1
PAGE_USER: Final = 1 << 2
PAGE_PWT: Final = 1 << 3
PAGE_PCD: Final = 1 << 4
PAGE_ACCESSED: Final = 1 << 5
PAGE_DIRTY: Final = 1 << 6
PAGE_PSE: Final = 1 << 7
PAGE_PAT: Final = 1 << 7
"""Of an L1 entry, where the upper levels have PSE."""
PAGE_GLOBAL: Final = 1 << 8
PAGE_AVAIL: Final = 7 << 9
PAGE_GUEST_KERNEL: Final = 1 << 52
"""Exact mode: the guest did not set PAGE_USER itself (Xen's _PAGE_GUEST_KERNEL)."""
PAGE_AVAIL_HIGH: Final = 0x7FF << 52
PAGE_NX: Final = 1 << 63

ADDRESS_MASK: Final = 0x000FFFFFFFFFF000
"""Machine address in an entry. Bits above the machine's RAM are no "reserved bits" to be found here: they make it a
frame number that does not exist, which is refused as such."""
PAGE_AD: Final = PAGE_ACCESSED | PAGE_DIRTY

BASE_DISALLOW_MASK: Final = PAGE_PWT | PAGE_PCD | PAGE_PSE | PAGE_GLOBAL
"""base_disallow_mask: everything that a guest may not set in L2 to L4 entries. Superpages are off, as by Xen's
default."""
L1_DISALLOW_MASK: Final = PAGE_PWT | PAGE_PCD | PAGE_PAT
"""l1_disallow_mask() of a domain without I/O memory: no choice of caching, PAGE_GLOBAL allowed."""
L1_DISALLOW_MASK_IO: Final = 0
"""l1_disallow_mask() of a domain that may map I/O memory."""

FASTPATH_FLAG_WHITELIST: Final = (
    PAGE_NX | PAGE_AVAIL_HIGH | PAGE_AVAIL | PAGE_GLOBAL | PAGE_DIRTY | PAGE_ACCESSED | PAGE_USER
)
"""Flags whose change needs no new reference. PAGE_RW is not one of them at any level (XSA-182)."""
MUST_CHECK: Final = ((1 << 64) - 1) & ~FASTPATH_FLAG_WHITELIST

FIRST_XEN_SLOT: Final = 256
LAST_XEN_SLOT: Final = 271


def is_guest_l4_slot(slot: int) -> bool:
    """is_guest_l4_slot(): slots 256 to 271 of an L4 are Xen's."""
    return not FIRST_XEN_SLOT <= slot <= LAST_XEN_SLOT
