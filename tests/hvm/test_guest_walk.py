# SPDX-License-Identifier: GPL-2.0-only
"""Walks of a guest's own tables in its three paging modes, with every right that counts."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyxen.errors import GuestAccessError
from pyxen.hypervisor.x86.hvm.guest_walk import (
    CR0_PG,
    CR0_WP,
    CR4_PAE,
    CR4_PSE,
    CR4_SMAP,
    CR4_SMEP,
    EFER_LMA,
    EFER_NXE,
    EFLAGS_AC,
    PFEC_FETCH,
    PFEC_PRESENT,
    PFEC_RESERVED,
    PFEC_USER,
    PFEC_WRITE,
    PageFault,
    PagingState,
    translate,
)
from pyxen.machine.memory import Memory
from tests.hvm.rig import AT, Guest

P, RW, US, PSE, NX = 1, 2, 4, 0x80, 1 << 63


class Tables:
    """Guest frame n is machine frame n + 3; tables in guest frames 1 to 5."""

    def __init__(self) -> None:
        self.memory = Memory(64 << 12)
        self.state = PagingState(CR0_PG | 1, 0x1000, CR4_PAE, EFER_LMA | EFER_NXE, 0)

    def to_mfn(self, gfn: int) -> int | None:
        return gfn + 3 if gfn < 40 else None

    def set64(self, gfn: int, index: int, entry: int) -> None:
        self.memory.q[(gfn + 3 << 9) + index] = entry

    def set32(self, gfn: int, index: int, entry: int) -> None:
        self.memory.d[(gfn + 3 << 10) + index] = entry

    def walk(self, va: int, pfec: int = 0) -> int:
        return translate(self.memory, self.to_mfn, self.state, va, pfec)

    def fault(self, va: int, pfec: int = 0) -> int:
        with pytest.raises(PageFault) as caught:
            self.walk(va, pfec)
        return caught.value.error_code

    def long(self, *flags: int, leaf: int = 0x10000, level: int = 1) -> Tables:
        """A map of one address, 0x0000_0080_4020_1000, down to ``level``."""
        for n, bits in enumerate(flags):
            last = n == len(flags) - 1
            self.set64(n + 1, 1, (leaf if last else (n + 2) << 12) | bits)
        return self


VA = 1 << 39 | 1 << 30 | 1 << 21 | 1 << 12


def test_long_mode_four_levels() -> None:
    t = Tables().long(P | RW | US, P | RW | US, P | RW | US, P | RW | US)
    assert t.walk(VA + 5) == 0x10005
    assert t.walk(VA + 0xFFF, PFEC_WRITE | PFEC_USER) == 0x10FFF
    assert t.fault(VA + 0x1000) == 0
    assert t.fault(VA + 0x1000, PFEC_WRITE | PFEC_USER) == PFEC_WRITE | PFEC_USER
    assert t.fault(1 << 47) == 0  # not canonical
    assert t.fault(VA | 1 << 60) == 0


def test_long_mode_large_pages() -> None:
    t = Tables().long(P | RW, P | RW, P | RW | PSE, leaf=0x400000)
    assert t.walk(VA + 5) == 0x401005
    t = Tables().long(P | RW, P | RW | PSE, leaf=0x80000000)
    assert t.walk(VA + 5) == 0x80000000 + (VA & (1 << 30) - 1) + 5
    t.long(P | RW, P | RW | PSE, leaf=0x80002000)  # a reserved bit of a 1 GiB page
    assert t.fault(VA) == PFEC_PRESENT | PFEC_RESERVED
    t.long(P | RW | PSE)
    assert t.fault(VA) == PFEC_PRESENT | PFEC_RESERVED  # no such thing in an L4


@pytest.mark.parametrize("level", range(4))
def test_rights_are_those_of_all_levels(level: int) -> None:
    def table(missing: int) -> Tables:
        flags = [P | RW | US] * 4
        flags[level] &= ~missing
        return Tables().long(*flags)

    t = table(RW)
    assert t.walk(VA, PFEC_WRITE)  # a supervisor may write, without WP
    t.state = t.state._replace(cr0=t.state.cr0 | CR0_WP)
    assert t.fault(VA, PFEC_WRITE) == PFEC_PRESENT | PFEC_WRITE
    assert t.walk(VA)
    t.state = t.state._replace(cr0=t.state.cr0 & ~CR0_WP)
    assert t.fault(VA, PFEC_WRITE | PFEC_USER) == PFEC_PRESENT | PFEC_WRITE | PFEC_USER
    t = table(US)
    assert t.walk(VA, PFEC_WRITE)
    assert t.fault(VA, PFEC_USER) == PFEC_PRESENT | PFEC_USER


@pytest.mark.parametrize("level", range(4))
def test_nx_at_any_level(level: int) -> None:
    flags = [P | RW | US] * 4
    flags[level] |= NX
    t = Tables().long(*flags)
    assert t.walk(VA)
    assert t.fault(VA, PFEC_FETCH) == PFEC_PRESENT | PFEC_FETCH
    t.state = t.state._replace(efer=t.state.efer & ~EFER_NXE)
    assert t.fault(VA) == PFEC_PRESENT | PFEC_RESERVED


def test_smep_and_smap() -> None:
    t = Tables().long(*[P | RW | US] * 4)
    assert t.walk(VA, PFEC_FETCH)
    t.state = t.state._replace(cr4=t.state.cr4 | CR4_SMEP)
    assert t.fault(VA, PFEC_FETCH) == PFEC_PRESENT | PFEC_FETCH
    assert t.walk(VA, PFEC_FETCH | PFEC_USER)
    t.state = t.state._replace(cr4=t.state.cr4 | CR4_SMAP)
    assert t.fault(VA) == PFEC_PRESENT
    assert t.fault(VA, PFEC_WRITE) == PFEC_PRESENT | PFEC_WRITE
    t.state = t.state._replace(flags=t.state.flags | EFLAGS_AC)
    assert t.walk(VA, PFEC_WRITE)
    t.state = t.state._replace(flags=0)
    assert Tables().long(P | RW, *[P | RW | US] * 3).walk(VA)  # a supervisor's page


@pytest.mark.parametrize("bit", [40, 45, 51])
def test_addresses_beyond_what_cpuid_says_are_reserved(bit: int) -> None:
    t = Tables().long(P, P, P, P, leaf=0x10000 | 1 << bit)
    assert t.fault(VA) == PFEC_PRESENT | PFEC_RESERVED


def test_tables_where_no_memory_is() -> None:
    t = Tables()
    t.set64(1, 1, 50 << 12 | P | RW | US)  # to_mfn ends at 40
    assert t.fault(VA) == 0


def test_pae() -> None:
    t = Tables()
    t.state = PagingState(CR0_PG | 1, 0x1020, CR4_PAE, EFER_NXE, 0)
    t.set64(1, 4 + 1, 2 << 12 | P)  # the top level stands at a multiple of 32 and has no rights
    t.set64(2, 1, 3 << 12 | P | RW | US)
    t.set64(3, 1, 0x10000 | P | RW | US)
    va = 1 << 30 | 1 << 21 | 1 << 12
    assert t.walk(va + 7, PFEC_WRITE | PFEC_USER) == 0x10007
    assert t.walk((1 << 32) + va) == 0x10000  # linear addresses have 32 bits
    t.set64(2, 2, 0x400000 | P | RW | PSE)
    assert t.walk(1 << 30 | 2 << 21 | 0x1234) == 0x401234
    assert t.fault(0) == 0


def test_two_levels() -> None:
    t = Tables()
    t.state = PagingState(CR0_PG | 1, 0x1000, 0, 0, 0)
    t.set32(1, 1, 2 << 12 | P | RW | US)
    t.set32(2, 3, 0x10000 | P | RW)
    va = 1 << 22 | 3 << 12
    assert t.walk(va + 9) == 0x10009
    assert t.fault(va, PFEC_USER) == PFEC_PRESENT | PFEC_USER
    t.set32(1, 2, 0x00C00000 | 3 << 13 | P | RW | PSE)  # PSE-36: bits 13 to 20 are address bits 32 to 39
    assert t.fault(2 << 22) == 0  # without CR4.PSE it is a table, far away
    t.state = t.state._replace(cr4=CR4_PSE)
    assert t.walk(2 << 22 | 0x123456) == 3 << 32 | 0xC00000 | 0x123456
    t.set32(1, 2, 0x00C00000 | 1 << 21 | P | PSE)
    assert t.fault(2 << 22) == PFEC_PRESENT | PFEC_RESERVED


def test_without_paging_addresses_are_physical() -> None:
    t = Tables()
    t.state = PagingState(0x11, 0, 0, 0, 0)
    assert t.walk(0x12345678) == 0x12345678
    assert t.walk(0x1_2345_6789) == 0x23456789


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, (1 << 64) - 1), min_size=5, max_size=5), st.integers(0, (1 << 64) - 1),
       st.integers(0, 31), st.integers(0, 3))
def test_no_table_makes_a_walk_do_anything_but_answer_or_fault(entries: list[int], va: int, pfec: int,
                                                               mode: int) -> None:
    t = Tables()
    t.state = [t.state, PagingState(CR0_PG | 1, 0x1FE0, CR4_PAE, 0, 0), PagingState(CR0_PG | 1, 0x1000, CR4_PSE, 0, 0),
               PagingState(CR0_PG | CR0_WP | 1, 0x1000, CR4_PAE | CR4_SMAP, EFER_LMA, 0)][mode]
    for gfn, entry in enumerate(entries):
        for index in range(512):
            t.set64(gfn + 1, index, entry & ~(0xFF << 12) & ~(0xFFFFFFF << 20) | (gfn + 2) << 12 if gfn % 2 else entry)
    try:
        assert 0 <= t.walk(va, pfec) < 1 << 40
    except PageFault as fault:
        assert 0 <= fault.error_code < 32


def test_copies_follow_the_tables_as_they_are_now(guest: Guest) -> None:
    """A page is remembered only as long as the entries that led to it stand."""
    hvm = guest.hvm
    hvm.write(AT, b"first")
    assert hvm.read(AT, 5) == b"first"
    guest.store(3, AT >> 12, 0x21000 | 3)
    assert hvm.read(AT, 5) != b"first"
    hvm.write(AT, b"again")
    assert guest.get(0x21000, 5) == b"again"
    assert guest.get(0x20000, 5) == b"first"
    guest.store(1, 0, 0)
    with pytest.raises(GuestAccessError):
        hvm.read(AT, 1)


def test_copies_cross_pages_and_stop_where_nothing_is(guest: Guest) -> None:
    guest.store(3, 0x21, 0x30000 | 3)
    guest.hvm.write(0x20FFE, b"abcd")
    assert guest.get(0x20FFE, 2) + guest.get(0x30000, 2) == b"abcd"
    assert guest.hvm.read(0x20FFE, 4) == b"abcd"
    with pytest.raises(GuestAccessError):
        guest.hvm.write(0x3FFFE, b"abcd")
    for bad in (0, 0x3F00000, 1 << 63, (1 << 64) - 2):
        with pytest.raises(GuestAccessError):
            guest.hvm.read(bad, 4)


def test_read_only_memory_swallows_writes(guest: Guest) -> None:
    from pyxen.hypervisor.x86.hvm.p2m_types import P2mType

    guest.hvm.write(AT, b"rom!")  # from now on the way there is remembered
    guest.p2m.set_entry(AT >> 12, guest.mfn(AT >> 12), 0, P2mType.RAM_RO)
    guest.hvm.write(AT, b"mine")
    assert guest.get(AT, 4) == b"rom!"
