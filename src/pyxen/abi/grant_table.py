# SPDX-License-Identifier: GPL-2.0-only
"""``xen/include/public/grant_table.h``: grant entries, grant-table operations and their structures (x86-64)."""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import Final


class GnttabCmd(IntEnum):
    """``GNTTABOP_*``."""

    MAP_GRANT_REF = 0
    UNMAP_GRANT_REF = 1
    SETUP_TABLE = 2
    DUMP_TABLE = 3
    TRANSFER = 4
    COPY = 5
    QUERY_SIZE = 6
    UNMAP_AND_REPLACE = 7
    SET_VERSION = 8
    GET_STATUS_FRAMES = 9
    GET_VERSION = 10
    SWAP_GRANT_REF = 11
    CACHE_FLUSH = 12


class Gntst(IntEnum):
    """``GNTST_*``: the status of one element of a batch."""

    OKAY = 0
    GENERAL_ERROR = -1
    BAD_DOMAIN = -2
    BAD_GNTREF = -3
    BAD_HANDLE = -4
    BAD_VIRT_ADDR = -5
    BAD_DEV_ADDR = -6
    NO_DEVICE_SPACE = -7
    PERMISSION_DENIED = -8
    BAD_PAGE = -9
    BAD_COPY_ARG = -10
    ADDRESS_TOO_BIG = -11
    EAGAIN = -12
    NO_SPACE = -13


class Gtf(IntFlag):
    """``GTF_*``: flags word of a grant entry (the type is its low two bits)."""

    INVALID = 0
    PERMIT_ACCESS = 1
    ACCEPT_TRANSFER = 2
    TRANSITIVE = 3
    TYPE_MASK = 3
    READONLY = 1 << 2
    READING = 1 << 3
    WRITING = 1 << 4
    PWT = 1 << 5
    PCD = 1 << 6
    PAT = 1 << 7
    SUB_PAGE = 1 << 8
    # For ACCEPT_TRANSFER the same bits mean:
    TRANSFER_COMMITTED = 1 << 2
    TRANSFER_COMPLETED = 1 << 3


class Gntmap(IntFlag):
    """``GNTMAP_*``: flags of map_grant_ref."""

    DEVICE_MAP = 1 << 0
    HOST_MAP = 1 << 1
    READONLY = 1 << 2
    APPLICATION_MAP = 1 << 3
    CONTAINS_PTE = 1 << 4


GNTMAP_GUEST_AVAIL_SHIFT: Final = 16
GNTMAP_GUEST_AVAIL_MASK: Final = 0xFFFF0000

GRANT_ENTRY_V1: Final = struct.Struct("<HHI")
"""struct grant_entry_v1: flags, domid, frame."""
GRANT_ENTRY_V1_SIZE: Final = 8
GRANTS_PER_FRAME_V1: Final = 4096 // GRANT_ENTRY_V1_SIZE
GNTTAB_NR_RESERVED_ENTRIES: Final = 8
GNTTAB_RESERVED_CONSOLE: Final = 0
GNTTAB_RESERVED_XENSTORE: Final = 1

MAP_GRANT_REF: Final = struct.Struct("<QIIHhIQ")
"""struct gnttab_map_grant_ref: host_addr, flags, ref, dom, OUT status, OUT handle, OUT dev_bus_addr."""
UNMAP_GRANT_REF: Final = struct.Struct("<QQIh2x")
"""struct gnttab_unmap_grant_ref: host_addr, dev_bus_addr, handle, OUT status."""
UNMAP_AND_REPLACE: Final = struct.Struct("<QQIh2x")
"""struct gnttab_unmap_and_replace: host_addr, new_addr, handle, OUT status."""
SETUP_TABLE: Final = struct.Struct("<H2xIh6xQ")
"""struct gnttab_setup_table: dom, nr_frames, OUT status, frame_list (guest address)."""
DUMP_TABLE: Final = struct.Struct("<Hh")
"""struct gnttab_dump_table: dom, OUT status."""
TRANSFER: Final = struct.Struct("<QH2xIh6x")
"""struct gnttab_transfer: mfn, domid, ref, OUT status."""
COPY: Final = struct.Struct("<QHH4xQHH4xHHh2x")
"""struct gnttab_copy: source (ref or gmfn, domid, offset), dest (same), len, flags, OUT status."""
QUERY_SIZE: Final = struct.Struct("<H2xIIh2x")
"""struct gnttab_query_size: dom, OUT nr_frames, OUT max_nr_frames, OUT status."""
SET_VERSION: Final = struct.Struct("<I")
"""struct gnttab_set_version: IN/OUT version."""
GET_STATUS_FRAMES: Final = struct.Struct("<IHhQ")
"""struct gnttab_get_status_frames: nr_frames, dom, OUT status, frame_list (guest address)."""
GET_VERSION: Final = struct.Struct("<HHI")
"""struct gnttab_get_version: dom, pad, OUT version."""
SWAP_GRANT_REF: Final = struct.Struct("<IIh2x")
"""struct gnttab_swap_grant_ref: ref_a, ref_b, OUT status."""
CACHE_FLUSH: Final = struct.Struct("<QHHI")
"""struct gnttab_cache_flush: ref or dev_bus_addr, offset, length, op."""

MAP_STATUS_OFFSET: Final = 18
"""Offset of the OUT fields (status, handle, dev_bus_addr) in struct gnttab_map_grant_ref."""
UNMAP_STATUS_OFFSET: Final = 20
SETUP_STATUS_OFFSET: Final = 8
TRANSFER_STATUS_OFFSET: Final = 16
COPY_STATUS_OFFSET: Final = 36

GNTCOPY_SOURCE_GREF: Final = 1 << 0
GNTCOPY_DEST_GREF: Final = 1 << 1

GNTTAB_CACHE_CLEAN: Final = 1 << 0
GNTTAB_CACHE_INVAL: Final = 1 << 1
GNTTAB_CACHE_SOURCE_GREF: Final = 1 << 31

INVALID_GRANT_HANDLE: Final = 0xFFFFFFFF
