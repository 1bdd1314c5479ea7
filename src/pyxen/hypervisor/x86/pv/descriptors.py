# SPDX-License-Identifier: GPL-2.0-only
"""Segment descriptors of PV guests (Xen: xen/arch/x86/pv/descriptor-tables.c, check_descriptor).

A guest's GDT and LDT pages are typed ``PGT_seg_desc``: every descriptor in them has passed :func:`check_descriptor`, so
loading one can never raise privilege.  Descriptors are 64-bit words; "high" below is bits 32..63 as in the manuals.
"""

from __future__ import annotations

from typing import Final

FIRST_RESERVED_GDT_PAGE: Final = 14
FIRST_RESERVED_GDT_ENTRY: Final = FIRST_RESERVED_GDT_PAGE * 512
FIRST_RESERVED_GDT_BYTE: Final = FIRST_RESERVED_GDT_ENTRY * 8
"""Selectors from 0xe000 up belong to Xen (xen/include/public/arch-x86/xen-x86_64.h)."""
LAST_GDT_BYTE: Final = 16 * 4096 - 1
MAX_LDT_ENTRIES: Final = 8192

# Selectors of the ABI (xen-x86_64.h): ring 3, in Xen's part of the GDT.
FLAT_RING3_CS32: Final = 0xE023
FLAT_RING3_CS64: Final = 0xE033
FLAT_RING3_DS32: Final = 0xE02B
FLAT_RING3_SS32: Final = 0xE02B
FLAT_KERNEL_CS: Final = FLAT_RING3_CS64
FLAT_KERNEL_SS: Final = FLAT_RING3_SS32
FAST_KERNEL_CS: Final = 0xE031
FAST_KERNEL_SS: Final = 0xE049
"""What a kernel in fast mode finds in CS and SS: selectors it can return to by itself (Linux serialises with IRETQ to
its own CS, a hundred thousand times in a boot). Frames and contexts show the ABI's."""

_TYPE: Final = 0xF << 40
_ACCESSED: Final = 1 << 40
_S: Final = 1 << 44
_DPL: Final = 3 << 45
_P: Final = 1 << 47
_CALL_GATE: Final = 0xC << 40
_GATE_RESERVED: Final = 0xFF << 32

CODE64_DPL3: Final = 0x00AFFB000000FFFF
CODE32_DPL3: Final = 0x00CFFB000000FFFF
DATA_DPL3: Final = 0x00CFF3000000FFFF
CODE64_DPL1: Final = 0x00AFBB000000FFFF
DATA_DPL1: Final = 0x00CFB3000000FFFF


def valid_code_selector(selector: int) -> bool:
    """VALID_CODE_SEL: may a guest's far pointer name this selector?"""
    if selector & 4 or selector < FIRST_RESERVED_GDT_BYTE:
        return bool(selector & 4 or selector >> 2)
    return selector in (FLAT_RING3_CS32, FLAT_RING3_CS64)


def check_descriptor(descriptor: int, *, allow_gates: bool) -> int | None:
    """check_descriptor(): the descriptor as it may be stored, or None if the guest may not have it.

    Present code and data segments get DPL 3 when they ask for more privilege and are stored as accessed (the CPU then
    never writes to the table, which is mapped read-only).  Of system descriptors only call gates to a guest's own code
    are left, and those only with ``allow_gates`` (exact mode: in fast mode a gate could lead from guest user mode to
    CPL 1).
    """
    if not descriptor & _P:
        return descriptor
    if not (descriptor & _S):
        kind = descriptor & _TYPE
        if kind == 0:  # harmless: second half of a 16-byte descriptor
            return descriptor
        if kind != _CALL_GATE or not allow_gates:
            return None
        if not valid_code_selector((descriptor >> 16) & 0xFFFF) or descriptor & _GATE_RESERVED:
            return None
        return descriptor | _DPL
    return descriptor | _DPL | _ACCESSED


def segment_base(descriptor: int) -> int:
    """Base address of a code or data descriptor (32 bits)."""
    return (descriptor >> 16 & 0xFFFFFF) | (descriptor >> 32 & 0xFF000000)


def segment_limit(descriptor: int) -> int:
    """Limit in bytes (inclusive) of a code or data descriptor."""
    limit = (descriptor & 0xFFFF) | (descriptor >> 32 & 0xF0000)
    return (limit << 12 | 0xFFF) if descriptor & (1 << 55) else limit


def segment_attributes(descriptor: int) -> int:
    """Bits 8..23 of the high word in place: what :meth:`pyxen.machine.cpu.base.Cpu.load_segment` takes."""
    return (descriptor >> 32) & 0x00F0FF00
