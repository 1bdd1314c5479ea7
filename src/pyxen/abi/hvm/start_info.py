# SPDX-License-Identifier: GPL-2.0-only
"""``xen/include/public/arch-x86/hvm/start_info.h``: what a PVH guest finds at the address in EBX.

All addresses are guest-physical and below 4 GiB; 0 means "not there".
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final

HVM_START_MAGIC: Final = 0x336EC578
HVM_START_VERSION: Final = 1
HVM_START_INFO: Final = struct.Struct("<IIIIQQQQI4x")
"""struct hvm_start_info, version 1: magic, version, flags, nr_modules, modlist, cmdline, rsdp, memmap (addresses),
memmap_entries. Not packed: 56 bytes, with four of zeroes at the end."""
HVM_MODLIST_ENTRY: Final = struct.Struct("<QQQ8x")
"""struct hvm_modlist_entry: address, size in bytes, address of its command line."""
HVM_MEMMAP_ENTRY: Final = struct.Struct("<QQI4x")
"""struct hvm_memmap_table_entry: address, size in bytes, type."""


class MemmapType(IntEnum):
    """``XEN_HVM_MEMMAP_TYPE_*``, the same numbers as E820's and ACPI's."""

    RAM = 1
    RESERVED = 2
    ACPI = 3
