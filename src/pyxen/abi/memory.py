# SPDX-License-Identifier: GPL-2.0-only
"""``xen/include/public/memory.h``."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final


class Xenmem(IntEnum):
    """``XENMEM_*`` sub-operations (low six bits of the command)."""

    INCREASE_RESERVATION = 0
    DECREASE_RESERVATION = 1
    MAXIMUM_RAM_PAGE = 2
    CURRENT_RESERVATION = 3
    MAXIMUM_RESERVATION = 4
    MACHPHYS_MFN_LIST = 5
    POPULATE_PHYSMAP = 6
    ADD_TO_PHYSMAP = 7
    MEMORY_MAP = 9
    MACHINE_MEMORY_MAP = 10
    EXCHANGE = 11
    MACHPHYS_MAPPING = 12
    SET_MEMORY_MAP = 13
    MAXIMUM_GPFN = 14
    REMOVE_FROM_PHYSMAP = 15
    SET_POD_TARGET = 16
    GET_POD_TARGET = 17
    GET_SHARING_FREED_PAGES = 18
    GET_SHARING_SHARED_PAGES = 19
    PAGING_OP = 20
    ACCESS_OP = 21
    SHARING_OP = 22
    ADD_TO_PHYSMAP_BATCH = 23
    CLAIM_PAGES = 24
    MACHPHYS_COMPAT_MFN_LIST = 25
    GET_VNUMAINFO = 26


MEMOP_EXTENT_SHIFT: Final = 6
MEMOP_CMD_MASK: Final = (1 << MEMOP_EXTENT_SHIFT) - 1
MEMF_ADDRESS_BITS: Final = 0xFF
"""XENMEMF_address_bits(): width of the addresses that frames may have, 0 for any."""
MEMF_POPULATE_ON_DEMAND: Final = 1 << 16

RESERVATION: Final = struct.Struct("<QQIIH6x")
"""struct xen_memory_reservation: extent_start (handle), nr_extents, extent_order, mem_flags, domid."""
MACHPHYS_MAPPING: Final = struct.Struct("<QQQ")
"""struct xen_machphys_mapping: v_start, v_end, max_mfn."""
MFN_LIST: Final = struct.Struct("<I4xQI4x")
"""struct xen_machphys_mfn_list: max_extents, extent_start (handle), nr_extents."""
MEMORY_MAP: Final = struct.Struct("<I4xQ")
"""struct xen_memory_map: nr_entries, buffer (handle)."""
FOREIGN_MEMORY_MAP: Final = struct.Struct("<H6xI4xQ")
"""struct xen_foreign_memory_map: domid, then struct xen_memory_map."""
EXCHANGE: Final = struct.Struct("<QQIIH6xQQIIH6xQ")
"""struct xen_memory_exchange: in, out (reservations), nr_exchanged."""
class MapSpace(IntEnum):
    """``XENMAPSPACE_*``."""

    SHARED_INFO = 0
    GRANT_TABLE = 1
    GMFN = 2
    GMFN_RANGE = 3
    GMFN_FOREIGN = 4


XENMAPIDX_GRANT_TABLE_STATUS: Final = 0x80000000
ADD_TO_PHYSMAP: Final = struct.Struct("<HHIQQ")
"""struct xen_add_to_physmap: domid, size (of a gmfn_range), space, idx, gpfn."""
ADD_TO_PHYSMAP_BATCH: Final = struct.Struct("<HHHHQQQ")
"""struct xen_add_to_physmap_batch: domid, space, size, foreign_domid, then handles: idxs, gpfns, errs."""
E820ENTRY: Final = struct.Struct("<QQI")
"""struct e820entry, packed: address, size, type."""
E820_RAM: Final = 1
E820_RESERVED: Final = 2
E820_MAX: Final = 128
