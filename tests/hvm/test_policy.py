# SPDX-License-Identifier: GPL-2.0-only
"""CPUID, MSRs, control registers, ports and nested faults: what a guest gets for what it does."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyxen.hypervisor.x86.hvm.p2m_types import P2mType
from pyxen.machine.cpu.base import RAX, RBX, RCX, RDX
from tests.hvm.rig import Guest, Machine

WRITE, USER, FETCH, FINAL, TABLE = 2, 4, 16, 1 << 32, 1 << 33


def cpuid(guest: Guest, leaf: int, subleaf: int = 0) -> tuple[int, ...]:
    gpr = guest.machine.cpu.gpr
    gpr[RAX], gpr[RCX] = leaf, subleaf
    assert guest.machine.cpu.traps.cpuid(0x1000) == 0x1002
    return gpr[RAX], gpr[RBX], gpr[RCX], gpr[RDX]


# --- CPUID -----------------------------------------------------------------------------------------


def test_the_vcpu_is_named(host: Machine) -> None:
    guest = host.guest(vcpus=3)
    _, b, c, d = cpuid(guest, 1)
    assert b >> 24 == 0
    assert c >> 31 & c >> 21 & 1
    assert d >> 9 & d >> 16 & d >> 3 & d >> 13 & 1  # APIC PAT PSE PGE
    assert not c & (1 << 26 | 1 << 27 | 1 << 28)  # no XSAVE, no AVX
    host.privcmd.vcpu_set_hvm_context(guest.domid, 2, host.privcmd.vcpu_hvm_context(guest.domid, 0))
    guest.load(2)
    assert cpuid(guest, 1)[1] >> 24 == 4
    assert cpuid(guest, 0xB, 0)[3] == 4
    assert cpuid(guest, 0x40000004)[1:3] == (2, guest.domid)
    assert not cpuid(guest, 0x40000004)[0] & 1 << 6  # XEN_HVM_CPUID_UPCALL_VECTOR: 4.17's


def test_xen_leaves(guest: Guest) -> None:
    assert cpuid(guest, 0x40000000) == (0x40000004, 0x566E6558, 0x65584D4D, 0x4D4D566E)
    assert cpuid(guest, 0x40000001)[0] == 4 << 16 | 6
    assert cpuid(guest, 0x40000002)[:2] == (1, 0x40000000)
    assert cpuid(guest, 0x40000003)[2] == 1_000_000  # kHz of the virtual clock
    mul, shift = cpuid(guest, 0x40000003, 1)[2:]
    assert (mul, shift) == guest.hv.tsc[:2] or shift == guest.hv.tsc.shift & 0xFFFFFFFF
    assert cpuid(guest, 0x40000005) == (0, 0, 0, 0)


def test_the_apic_bit_follows_the_apic(guest: Guest) -> None:
    assert guest.traps.write_msr(0x1B, 0xFEE00100)
    assert not cpuid(guest, 1)[3] >> 9 & 1


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 0xFFFFFFFF), st.integers(0, 0xFFFFFFFF))
def test_every_leaf_has_an_answer(guest: Guest, leaf: int, subleaf: int) -> None:
    assert all(0 <= register <= 0xFFFFFFFF for register in cpuid(guest, leaf, subleaf))


# --- MSRs ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "value"), [
    (0x277, 0x0007040600070406), (0x2FF, 0xC06), (0x200, 0xC0000006), (0x201, 0xFFF0000800),
    (0x250, 0x0606060606060606), (0x26F, 0x0101010101010101), (0xC0000103, 7),
])
def test_what_is_kept(guest: Guest, number: int, value: int) -> None:
    assert guest.traps.write_msr(number, value)
    assert guest.traps.read_msr(number) == value


@pytest.mark.parametrize(("number", "value"), [
    (0x277, 2), (0x277, 8 << 56), (0x2FF, 0x1006), (0x2FF, 7), (0x200, 1 << 45), (0x200, 0x100), (0x201, 0x400),
    (0x250, 2), (0xC0000103, 1 << 32), (0xFE, 1), (0x3A, 1), (0xC0000080, 1 << 12), (0xC0000080, 1 << 63),
    (0x12345678, 0), (0xC0010020, 0), (0x79, 0),
])
def test_what_faults_when_written(guest: Guest, number: int, value: int) -> None:
    before = guest.traps.read_msr(number)
    assert not guest.traps.write_msr(number, value)
    assert guest.traps.read_msr(number) == before


@pytest.mark.parametrize("number", [0x12345678, 0xC0010020, 0x79, 0x480, 0x210, 0x40000001, 0x800])
def test_what_faults_when_read(guest: Guest, number: int) -> None:
    assert guest.traps.read_msr(number) is None


def test_efer(guest: Guest) -> None:
    assert guest.traps.read_msr(0xC0000080) == 0xD01
    assert not guest.traps.write_msr(0xC0000080, 0x801)  # LME under paging
    assert guest.traps.write_msr(0xC0000080, 0x900)
    assert guest.traps.read_msr(0xC0000080) == 0xD00  # LMA is not written
    assert guest.traps.read_msr(0x1A0) == 1
    assert guest.traps.read_msr(0xFE) == 0x508


# --- control registers -----------------------------------------------------------------------------


@pytest.mark.parametrize(("number", "value"), [
    (0, 1 << 32 | 0x80000011), (0, 0x80000000), (0, 0x20000011), (0, 0x00000011), (4, 1 << 11 | 0x20),
    (4, 1 << 13 | 0x20), (4, 1 << 18 | 0x20), (4, 1 << 17 | 0x20), (4, 1 << 32 | 0x20), (4, 0), (8, 16), (2, 0),
])
def test_what_is_general_protection(guest: Guest, number: int, value: int) -> None:
    """In 64-bit mode: reserved bits, PG without PE, NW without CD, paging or PAE off."""
    before = len(guest.journal("cr"))
    assert not guest.traps.write_cr(number, value)
    assert len(guest.journal("cr")) == before


def test_what_is_set(guest: Guest) -> None:
    assert guest.traps.write_cr(0, 0x80010001 | 1 << 10)
    assert guest.machine.cpu.get_cr(0) == 0x80010011  # ET is fixed, an unknown bit is not kept
    assert guest.traps.write_cr(4, 0x3006B0)
    assert guest.machine.cpu.get_cr(4) == 0x3006B0
    assert guest.traps.write_cr(8, 5)
    assert guest.hvm.vlapic.tpr == 0x50


def test_long_mode_needs_pae(host: Machine) -> None:
    guest = host.guest(long_mode=False)
    assert guest.traps.write_msr(0xC0000080, 0x100)
    assert not guest.traps.write_cr(0, 0x80000011)
    assert guest.traps.write_cr(4, 0x20)
    assert guest.traps.write_cr(0, 0x80000011)
    assert guest.traps.read_msr(0xC0000080) == 0x500
    assert not guest.traps.write_cr(4, 0)


# --- ports -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("port", "size"), [
    (0x42, 1), (0x61, 1), (0x64, 1), (0x70, 1), (0xCF8, 4), (0xB00C, 4), (0xAFFF, 4)])
def test_ports_without_a_device(guest: Guest, port: int, size: int) -> None:
    assert guest.traps.io_read(port, size) == (1 << 8 * size) - 1
    guest.traps.io_write(port, size, 0)
    assert not guest.domain.is_shut_down


def test_soft_off(guest: Guest) -> None:
    assert guest.traps.io_read(0xB004, 2) == 1  # SCI_EN
    guest.traps.io_write(0xB004, 2, 1 << 13 | 5 << 10)  # another sleep type
    assert not guest.domain.is_shut_down
    guest.traps.io_write(0xB004, 2, 1 << 13)
    assert (guest.domain.is_shut_down, guest.domain.shutdown_code) == (True, 0)


def test_the_power_management_timer(guest: Guest) -> None:
    first = guest.traps.io_read(0xB008, 4)
    guest.machine.clock.advance(1_000_000_000)
    assert guest.traps.io_read(0xB008, 4) - first == 3579545


def test_the_debug_port(guest: Guest) -> None:
    for char in b"hello\x1b[31m\n":
        guest.traps.io_write(0xE9, 1, char)
    assert "hello[31m" in guest.machine.log()


# --- nested faults -----------------------------------------------------------------------------------


def test_a_hole_reads_as_ones(guest: Guest) -> None:
    assert guest.traps.nested_fault(0x5000123, USER | FINAL, 0x1000) == 0x1000
    entry, _ = guest.p2m.table.lookup(0x5000)
    assert entry & (1 << 40) - 4096 == guest.machine.cpu.mmio_base + 4096 and entry & 7 == 7
    assert guest.traps.mmio_read(4096 + 0x123, 4) == 0xFFFFFFFF
    guest.traps.mmio_write(4096 + 0x123, 4, 5)
    assert not guest.domain.is_shut_down


@pytest.mark.parametrize(("gpa", "code", "says"), [
    (0x5000000, TABLE | USER, "page tables"), (0xFEE00000, TABLE | USER | WRITE, "page tables"),
    (0x5000000, FINAL | USER | FETCH, "executes"), (0xFEE00000, FINAL | USER | FETCH, "executes"),
    (1 << 41, FINAL | USER, "no memory"),
])
def test_devices_and_holes_are_no_memory(guest: Guest, gpa: int, code: int, says: str) -> None:
    """Taken as page table or code: that domain's crash, with a line."""
    guest.traps.nested_fault(gpa, code, 0x1234)
    assert guest.domain.is_shut_down and guest.domain.shutdown_code == 3
    assert says in guest.domain.crash_reason
    log = guest.machine.log()
    assert f"{gpa:#x}" in log and "0000000000001234" in log


def test_a_write_to_read_only_memory(guest: Guest) -> None:
    guest.p2m.set_entry(40, guest.mfn(40), 0, P2mType.RAM_RO)
    guest.traps.nested_fault(40 << 12, 1 | WRITE | USER | FINAL, 0x1000)
    assert guest.journal("exception") == [("exception", 13, 0)]
    assert not guest.domain.is_shut_down
    guest.traps.nested_fault(40 << 12, 1 | WRITE | USER | TABLE, 0x1000)
    assert "read-only page tables" in guest.domain.crash_reason


def test_a_fault_that_is_none_any_more_is_retried_and_not_for_ever(guest: Guest) -> None:
    for _ in range(10):
        guest.traps.nested_fault(40 << 12, WRITE | USER | FINAL, 0x1000)
    assert not guest.domain.is_shut_down
    for _ in range(2000):
        guest.traps.nested_fault(40 << 12, WRITE | USER | FINAL, 0x1000)
    assert "does not go away" in guest.domain.crash_reason


def test_triple_fault(guest: Guest) -> None:
    guest.traps.triple_fault(0x1000)
    assert (guest.domain.is_shut_down, guest.domain.shutdown_code) == (True, 1)
    assert "Triple fault" in guest.machine.log()


def test_virtualisation_instructions_are_undefined(guest: Guest) -> None:
    assert guest.traps.intercept(0x80, 0, 0x1000) == 0x1000
    assert guest.journal("exception") == [("exception", 6, None)]


def test_a_crash_shows_registers(guest: Guest) -> None:
    guest.hv.crash(guest.domain, "because", 0xABCDEF)
    assert "0000000000abcdef" in guest.machine.log()
    assert "mode: kernel" in guest.machine.log()


def test_nmi(guest: Guest) -> None:
    guest.hv.scheduler.vcpu_kick(guest.vcpu())
    guest.vcpu().nmi_pending = True
    guest.load()
    assert guest.journal("nmi") == [("nmi",)]
    assert not guest.vcpu().nmi_pending
