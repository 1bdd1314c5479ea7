# SPDX-License-Identifier: GPL-2.0-only
"""ACPI tables of a PVH guest: RSDP, XSDT, FADT, FACS, MADT and DSDT (Xen: tools/libacpi/).

They say what Xen's own say to such a guest (checked against a save image of a real one): PM1 registers at 0xb000 and
0xb004, no PM timer, no I/O APIC, no 8259, no VGA, no CMOS clock. Differences, and why:

* ``\\_S5`` is there, so that a kernel powers off by the PM1 control register; with Xen's tables, which have none, Linux
  halts every vCPU and Xen calls that a poweroff.
* Processors are devices, and there is no GPE block with a register of online vCPUs behind it: in PVH guests vCPUs come
  and go by xenstore (``cpu/N/availability``), on Xen too.
* MADT's PCAT_COMPAT is not set, because there is no 8259.
* No RSDT and no revision 1 FADT: nothing that starts by PHYS32_ENTRY is older than ACPI 2.0.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from pyxen.toolstack.build import aml

LAPIC_BASE: Final = 0xFEE00000
PM1A_EVT_BLK: Final = 0xB000
"""PM1 status (16 bits) and enable (16 bits)."""
PM1A_CNT_BLK: Final = 0xB004
"""PM1 control, 16 bits: SLP_TYP is bits 10 to 12, SLP_EN bit 13."""
S5_SLP_TYP: Final = 0
_SCI_INT: Final = 9

RSDP_BYTES: Final = 36
_HEADER: Final = struct.Struct("<4sIBB6s8sIII")
_RSDP: Final = struct.Struct("<8sB6sBIIQB3x")
_FACS: Final = struct.Struct("<4sIIIIIQB31x")
_GAS: Final = struct.Struct("<BBBBQ")
_FADT: Final = struct.Struct("<IIBBHIBBBBIIIIIIIIBBBBBBBBHHHHBBBBBHBI12sBHBQQ12s12s12s12s12s12s12s12s12s12s")
_MADT: Final = struct.Struct("<II")
_LAPIC: Final = struct.Struct("<BBBBI")
_X2APIC: Final = struct.Struct("<BBHIII")

_OEM: Final = (b"Xen", b"HVM", 0)
_CREATOR: Final = (int.from_bytes(b"PYXN", "little"), 1)
_SYSTEM_IO: Final = 1
_NO_REGISTER: Final = bytes(_GAS.size)

_FADT_REVISION, _MADT_REVISION, _DSDT_REVISION = 5, 3, 5
_WBINVD, _PROC_C1, _PWR_BUTTON, _SLP_BUTTON, _FIX_RTC = 1 << 0, 1 << 2, 1 << 4, 1 << 5, 1 << 6
_USE_PLATFORM_CLOCK: Final = 1 << 15
_NO_VGA, _NO_CMOS_RTC = 1 << 2, 1 << 5
_NO_C2, _NO_C3 = 0xFFF, 0xFFF
_APIC_ENABLED: Final = 1


@dataclass(frozen=True, slots=True)
class AcpiTables:
    """``tables`` go to the address they were made for; ``rsdp`` may lie anywhere the guest can find it."""

    rsdp: bytes
    tables: bytes


def apic_id(vcpu: int) -> int:
    """The local APIC id of a vCPU, as in Xen's vlapic.c."""
    return vcpu * 2


def build_tables(base: int, vcpus: int) -> AcpiTables:
    """All tables, to be placed at guest-physical address ``base`` (64-byte aligned, below 4 GiB).

    Every vCPU is *enabled* in the MADT, whether it starts online or not, as libxl has it: a kernel gives no APIC id to
    a disabled one and so could never bring it up.  Linux takes those that xenstore says are offline down again.
    """
    if base % 64 or not 0 < base < 1 << 32 or vcpus < 1:
        raise ValueError(f"no ACPI tables at {base:#x} for {vcpus} vCPUs")
    area = _Area(base)
    facs = area.add(_facs())
    dsdt = area.add(_dsdt(vcpus))
    fadt = area.add(_fadt(facs, dsdt))
    madt = area.add(_madt(vcpus))
    xsdt = area.add(_table(b"XSDT", 1, struct.pack("<QQ", fadt, madt)))
    return AcpiTables(_rsdp(xsdt), bytes(area.data))


class _Area:
    """Tables one after the other, each at a multiple of 64 (FACS needs it)."""

    def __init__(self, base: int) -> None:
        self.base = base
        self.data = bytearray()

    def add(self, table: bytes) -> int:
        """Append; the address of ``table``."""
        self.data += bytes(-len(self.data) % 64)
        address = self.base + len(self.data)
        self.data += table
        return address


def _checksum(data: bytes | bytearray) -> int:
    return -sum(data) & 0xFF


def _table(signature: bytes, revision: int, body: bytes) -> bytes:
    """``body`` behind a header with its length and checksum."""
    table = bytearray(_HEADER.pack(signature, _HEADER.size + len(body), revision, 0, *_OEM, *_CREATOR) + body)
    table[9] = _checksum(table)
    return bytes(table)


def _rsdp(xsdt: int) -> bytes:
    rsdp = bytearray(_RSDP.pack(b"RSD PTR ", 0, _OEM[0], 2, 0, RSDP_BYTES, xsdt, 0))
    rsdp[8] = _checksum(rsdp[:20])
    rsdp[32] = _checksum(rsdp)
    return bytes(rsdp)


def _facs() -> bytes:
    return _FACS.pack(b"FACS", _FACS.size, 0, 0, 0, 0, 0, 1)


def _io_register(port: int, bits: int) -> bytes:
    return _GAS.pack(_SYSTEM_IO, bits, 0, 0, port)


def _fadt(facs: int, dsdt: int) -> bytes:
    flags = _WBINVD | _PROC_C1 | _PWR_BUTTON | _SLP_BUTTON | _FIX_RTC | _USE_PLATFORM_CLOCK
    body = _FADT.pack(
        facs, dsdt, 0, 0, _SCI_INT, 0, 0, 0, 0, 0,
        PM1A_EVT_BLK, 0, PM1A_CNT_BLK, 0, 0, 0, 0, 0,
        4, 2, 0, 0, 0, 0, 0, 0, _NO_C2, _NO_C3, 0, 0, 0, 0, 0, 0, 0,
        _NO_VGA | _NO_CMOS_RTC, 0, flags, _NO_REGISTER, 0, 0, 0, facs, dsdt,
        _io_register(PM1A_EVT_BLK, 32), _NO_REGISTER, _io_register(PM1A_CNT_BLK, 16), *[_NO_REGISTER] * 7,
    )  # fmt: skip
    return _table(b"FACP", _FADT_REVISION, body)


def _madt(vcpus: int) -> bytes:
    entries = bytearray(_MADT.pack(LAPIC_BASE, 0))
    for vcpu in range(vcpus):
        if apic_id(vcpu) < 255 and vcpu < 255:
            entries += _LAPIC.pack(0, _LAPIC.size, vcpu, apic_id(vcpu), _APIC_ENABLED)
        else:
            entries += _X2APIC.pack(9, _X2APIC.size, 0, apic_id(vcpu), _APIC_ENABLED, vcpu)
    return _table(b"APIC", _MADT_REVISION, bytes(entries))


def _dsdt(vcpus: int) -> bytes:
    processors = [
        aml.device(
            f"P{vcpu:03X}", aml.define("_HID", aml.string("ACPI0007")), aml.define("_UID", aml.integer(vcpu))
        )
        for vcpu in range(vcpus)
    ]
    # PM1a's SLP_TYP, PM1b's, two that are reserved.
    s5 = aml.define("_S5", aml.package(*[aml.integer(S5_SLP_TYP)] * 2, *[aml.integer(0)] * 2))
    return _table(b"DSDT", _DSDT_REVISION, s5 + aml.scope("_SB", *processors))
