# SPDX-License-Identifier: GPL-2.0-only
"""``xen/include/public/elfnote.h``: what a guest kernel says of itself in notes named "Xen".

Numeric notes hold 4 or 8 bytes, little-endian; string notes are NUL-terminated ASCII.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Final

XEN_NOTE_NAME: Final = b"Xen"
"""Note owner, without its terminating NUL."""


class XenElfNote(IntEnum):
    """``XEN_ELFNOTE_*``."""

    INFO = 0
    ENTRY = 1
    HYPERCALL_PAGE = 2
    VIRT_BASE = 3
    PADDR_OFFSET = 4
    XEN_VERSION = 5
    GUEST_OS = 6
    GUEST_VERSION = 7
    LOADER = 8
    PAE_MODE = 9
    FEATURES = 10
    BSD_SYMTAB = 11
    HV_START_LOW = 12
    L1_MFN_VALID = 13
    SUSPEND_CANCEL = 14
    INIT_P2M = 15
    MOD_START_PFN = 16
    SUPPORTED_FEATURES = 17
    PHYS32_ENTRY = 18


STRING_NOTES: Final = frozenset(
    {
        XenElfNote.INFO,
        XenElfNote.XEN_VERSION,
        XenElfNote.GUEST_OS,
        XenElfNote.GUEST_VERSION,
        XenElfNote.LOADER,
        XenElfNote.PAE_MODE,
        XenElfNote.FEATURES,
        XenElfNote.BSD_SYMTAB,
    }
)

LEGACY_NAMES: Final = {
    "VIRT_ENTRY": XenElfNote.ENTRY,
    "HYPERCALL_PAGE": XenElfNote.HYPERCALL_PAGE,
    "VIRT_BASE": XenElfNote.VIRT_BASE,
    "ELF_PADDR_OFFSET": XenElfNote.PADDR_OFFSET,
    "XEN_VER": XenElfNote.XEN_VERSION,
    "GUEST_OS": XenElfNote.GUEST_OS,
    "GUEST_VER": XenElfNote.GUEST_VERSION,
    "LOADER": XenElfNote.LOADER,
    "PAE": XenElfNote.PAE_MODE,
    "FEATURES": XenElfNote.FEATURES,
    "BSD_SYMTAB": XenElfNote.BSD_SYMTAB,
    "SUSPEND_CANCEL": XenElfNote.SUSPEND_CANCEL,
}
"""Keys of the ``__xen_guest`` section's string and the notes that replaced them (HYPERCALL_PAGE: a page number)."""
