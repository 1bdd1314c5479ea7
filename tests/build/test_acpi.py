# SPDX-License-Identifier: GPL-2.0-only
"""The ACPI tables of a PVH guest, read as a kernel reads them and, where it is installed, by ACPICA's own iasl."""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyxen.toolstack.build import acpi, aml

BASE = 0xFC000040
COUNTS = (1, 2, 15, 128, 300)


def walk(built: acpi.AcpiTables, base: int = BASE) -> dict[str, bytes]:
    """Every table, found from the RSDP by pointers; each checksum is checked on the way."""
    signature, _, _, revision, _, length, xsdt, _ = struct.unpack("<8sB6sBIIQB3x", built.rsdp)
    assert (signature, revision, length) == (b"RSD PTR ", 2, len(built.rsdp))
    assert sum(built.rsdp[:20]) & 0xFF == sum(built.rsdp) & 0xFF == 0

    def table(address: int) -> bytes:
        at = address - base
        (size,) = struct.unpack_from("<I", built.tables, at + 4)
        assert at >= 0 and at + size <= len(built.tables)
        data = built.tables[at : at + size]
        if data[:4] != b"FACS":  # the only one without a checksum
            assert sum(data) & 0xFF == 0
        return data

    found = {"XSDT": table(xsdt)}
    for (address,) in struct.iter_unpack("<Q", found["XSDT"][36:]):
        data = table(address)
        found[data[:4].decode()] = data
    facs, dsdt = struct.unpack_from("<II", found["FACP"], 36)
    x_facs, x_dsdt = struct.unpack_from("<QQ", found["FACP"], 132)
    assert (facs, dsdt) == (x_facs, x_dsdt)
    assert facs % 64 == 0
    found["FACS"], found["DSDT"] = table(facs), table(dsdt)
    return found


@pytest.mark.parametrize("vcpus", COUNTS)
def test_every_table_is_found_and_sums_to_zero(vcpus: int) -> None:
    assert set(walk(acpi.build_tables(BASE, vcpus))) == {"XSDT", "FACP", "FACS", "APIC", "DSDT"}


def test_fadt_has_the_registers_of_a_real_pvh_guest() -> None:
    """Recorded from a Xen 4.17 guest's memory (its save image), but for the GPE block, which there is none of here."""
    fadt = walk(acpi.build_tables(BASE, 1))["FACP"]
    assert len(fadt) == 268
    assert struct.unpack_from("<H", fadt, 46) == (9,)  # SCI
    assert struct.unpack_from("<IIIIIIII", fadt, 56) == (0xB000, 0, 0xB004, 0, 0, 0, 0, 0)
    assert tuple(fadt[88:94]) == (4, 2, 0, 0, 0, 0)
    assert struct.unpack_from("<HH", fadt, 96) == (0xFFF, 0xFFF)
    assert struct.unpack_from("<H", fadt, 109) == (0x24,)
    assert struct.unpack_from("<I", fadt, 112)[0] & ~(1 << 8) == 0x8075
    assert fadt[148:160] == bytes((1, 32, 0, 0)) + struct.pack("<Q", 0xB000)
    assert fadt[172:184] == bytes((1, 16, 0, 0)) + struct.pack("<Q", 0xB004)
    assert not any(fadt[160:172] + fadt[184:268])


@pytest.mark.parametrize("vcpus", COUNTS)
def test_madt_enables_every_vcpu_under_the_id_its_lapic_has(vcpus: int) -> None:
    madt = walk(acpi.build_tables(BASE, vcpus))["APIC"]
    assert struct.unpack_from("<II", madt, 36) == (0xFEE00000, 0)
    at, seen = 44, []
    while at < len(madt):
        kind, size = madt[at], madt[at + 1]
        if kind == 0:
            uid, apic_id, flags = struct.unpack_from("<BBI", madt, at + 2)
            assert apic_id < 255  # 255 is every APIC
        else:
            assert kind == 9
            _, apic_id, flags, uid = struct.unpack_from("<HIII", madt, at + 2)
        assert flags == 1
        seen.append((uid, apic_id))
        at += size
    assert seen == [(vcpu, 2 * vcpu) for vcpu in range(vcpus)]


@pytest.mark.parametrize(("base", "vcpus"), [(BASE + 16, 1), (0, 1), (1 << 32, 1), (BASE, 0)])
def test_absurd_requests_are_refused(base: int, vcpus: int) -> None:
    with pytest.raises(ValueError):
        acpi.build_tables(base, vcpus)


@pytest.mark.parametrize("vcpus", COUNTS)
def test_iasl_reads_every_table_and_writes_the_same_bytes_again(vcpus: int, tmp_path: Path) -> None:
    iasl = shutil.which("iasl")
    if iasl is None:
        pytest.skip("iasl is not installed (Debian: acpica-tools)")
    found = walk(acpi.build_tables(BASE, vcpus))
    for name, data in found.items():
        binary = tmp_path / f"{name}.aml"
        binary.write_bytes(data)
        read = run(iasl, "-d", str(binary))
        source = tmp_path / f"{name}.dsl"
        for text in (read, source.read_text()):
            assert "rror" not in text.replace("Error Source", "") and "arning" not in text, text
        written = run(iasl, "-vs", "-p", str(tmp_path / "again"), str(source))
        assert "0 Errors, 0 Warnings, 0 Remarks" in written, written
        again = (tmp_path / "again.aml").read_bytes()
        # The compiler puts its own name and version into the header.
        assert strip(again) == strip(data), name
    dsdt = (tmp_path / "DSDT.dsl").read_text()
    assert dsdt.count("ACPI0007") == vcpus
    assert "_S5" in dsdt


def strip(table: bytes) -> bytes:
    """Without what depends on who compiled it: checksum, creator."""
    return table if table[:4] == b"FACS" else table[:9] + table[10:28] + table[36:]


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


# --- AML ---------------------------------------------------------------------------------------------------------


def test_names() -> None:
    assert aml.name_string("_S5") == b"_S5_"
    assert aml.name_string("\\_SB") == b"\\_SB_"
    assert aml.name_string("\\_SB.PR00") == b"\\\x2e_SB_PR00"
    assert aml.name_string("A.B.C") == b"\x2f\x03A___B___C___"
    for wrong in ("", "\\", "abc", "TOOLONG", "1AB", "A..B"):
        with pytest.raises(ValueError):
            aml.name_string(wrong)


@pytest.mark.parametrize(
    ("value", "code"),
    [(0, "00"), (1, "01"), (2, "0a02"), (255, "0aff"), (256, "0b0001"), (1 << 16, "0c00000100"),
     (1 << 32, "0e0000000001000000")],
)  # fmt: skip
def test_integers_take_the_shortest_form(value: int, code: str) -> None:
    assert aml.integer(value).hex() == code


def test_integers_beyond_64_bits_are_refused() -> None:
    for wrong in (-1, 1 << 64):
        with pytest.raises(ValueError):
            aml.integer(wrong)


@given(st.integers(0, 70_000))
def test_package_lengths_count_themselves(size: int) -> None:
    term = aml.scope("_SB", bytes(size))
    lead = term[1]
    extra = lead >> 6
    length = lead & 0x3F if not extra else lead & 15 | int.from_bytes(term[2 : 2 + extra], "little") << 4
    assert length == len(term) - 1
    assert term[2 + extra :] == b"_SB_" + bytes(size)
