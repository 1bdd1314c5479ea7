# SPDX-License-Identifier: GPL-2.0-only
"""HYPERVISOR_xen_version (Xen: xen/common/kernel.c, xen/include/public/version.h, features.h)."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING, Final

from pyxen.abi.arch_x86 import HYPERVISOR_VIRT_START
from pyxen.abi.xen import PAGE_SIZE, VmAssist, xen_capabilities
from pyxen.errors import XenError

if TYPE_CHECKING:
    from pyxen.hypervisor.domain import Domain
    from pyxen.hypervisor.hypercall import Caller

MAJOR: Final = 4
MINOR: Final = 6
EXTRA: Final = ".0-pyxen"
COMPILER: Final = "CPython"
COMPILE_BY: Final = "pyxen"
COMPILE_DOMAIN: Final = "localdomain"
COMPILE_DATE: Final = "Mon Oct 12 2015"
CHANGESET: Final = "pyxen"

VERSION: Final = 0
EXTRAVERSION: Final = 1
COMPILE_INFO: Final = 2
CAPABILITIES: Final = 3
CHANGESET_CMD: Final = 4
PLATFORM_PARAMETERS: Final = 5
GET_FEATURES: Final = 6
PAGESIZE: Final = 7
GUEST_HANDLE: Final = 8
COMMANDLINE: Final = 9

# features.h, submap 0
FEATURE_WRITABLE_PAGE_TABLES: Final = 0
FEATURE_AUTO_TRANSLATED_PHYSMAP: Final = 2
FEATURE_PAE_PGDIR_ABOVE_4GB: Final = 4
FEATURE_MMU_PT_UPDATE_PRESERVE_AD: Final = 5
FEATURE_HIGHMEM_ASSIST: Final = 6
FEATURE_GNTTAB_MAP_AVAIL_BITS: Final = 7
FEATURE_HVM_CALLBACK_VECTOR: Final = 8
FEATURE_HVM_SAFE_PVCLOCK: Final = 9
FEATURE_DOM0: Final = 11


def features(domain: Domain) -> int:
    """XENVER_get_features, submap 0, of a 64-bit PV domain or a translated one (which has no physical interrupts:
    no hvm_pirqs)."""
    if domain.is_hvm:
        return (1 << FEATURE_WRITABLE_PAGE_TABLES | 1 << FEATURE_AUTO_TRANSLATED_PHYSMAP
                | 1 << FEATURE_HVM_CALLBACK_VECTOR | 1 << FEATURE_HVM_SAFE_PVCLOCK)
    bits = 1 << FEATURE_MMU_PT_UPDATE_PRESERVE_AD | 1 << FEATURE_HIGHMEM_ASSIST | 1 << FEATURE_GNTTAB_MAP_AVAIL_BITS
    if domain.vm_assist & 1 << VmAssist.PAE_EXTENDED_CR3:
        bits |= 1 << FEATURE_PAE_PGDIR_ABOVE_4GB
    if domain.is_privileged:
        bits |= 1 << FEATURE_DOM0
    return bits


def do_xen_version(caller: Caller, command: int, arg: int) -> int:
    """HYPERVISOR_xen_version(cmd, arg); ENOSYS for an unknown command."""
    command &= 0xFFFFFFFF
    if command == VERSION:
        return MAJOR << 16 | MINOR
    if command == PAGESIZE:
        return PAGE_SIZE
    if command == GET_FEATURES:
        if caller.read_u32(arg):  # XENFEAT_NR_SUBMAPS is 1
            raise XenError(errno.EINVAL)
        caller.write_u32(arg + 4, features(caller.domain))
        return 0
    if command == EXTRAVERSION:
        data = EXTRA.encode()[:15].ljust(16, b"\0")
    elif command == COMPILE_INFO:
        data = struct.pack(
            "<64s16s32s32s", COMPILER.encode(), COMPILE_BY.encode(), COMPILE_DOMAIN.encode(), COMPILE_DATE.encode()
        )
    elif command == CAPABILITIES:
        data = xen_capabilities().encode().ljust(1024, b"\0")
    elif command == CHANGESET_CMD:
        data = CHANGESET.encode().ljust(64, b"\0")
    elif command == PLATFORM_PARAMETERS:
        data = struct.pack("<Q", HYPERVISOR_VIRT_START)
    elif command == GUEST_HANDLE:
        data = caller.domain.handle
    elif command == COMMANDLINE:
        if not caller.domain.is_privileged:
            data = b"<denied>".ljust(1024, b"\0")
        else:
            data = b"".ljust(1024, b"\0")
    else:
        raise XenError(errno.ENOSYS)
    caller.write(arg, data)
    return 0
