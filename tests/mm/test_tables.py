# SPDX-License-Identifier: GPL-2.0-only
"""Validation of page tables and single entries: one test a rule of Xen's mm.c."""

from __future__ import annotations

import errno

import pytest

from pyxen.abi.xen import DOMID_IO, DOMID_SELF
from pyxen.hypervisor.frames import PGT_PARTIAL, PGT_SEG_DESC, PGT_WRITABLE
from tests.mm.rig import GUEST_KERNEL, NX, RW, USER, XEN_ENTRY, A, D, FakeDomain, P, Rig

PWT, PCD, PSE, GLOBAL = 8, 16, 128, 256


@pytest.fixture
def rig() -> Rig:
    return Rig()


@pytest.fixture
def d(rig: Rig) -> FakeDomain:
    return rig.add(1)


# --- pinning and whole tables --------------------------------------------------------------------------


def test_pin_takes_references_all_the_way_down(rig: Rig, d: FakeDomain) -> None:
    data, ro = rig.alloc(d, 2)
    l4, l3, l2, l1 = rig.tree(d, [(data, P | RW), (ro, P)])
    rig.set(l1, 2, l4 << 12 | P)  # read-only mapping of a page table is fine
    assert rig.pin(d, 4, l4) == 0
    assert [rig.type_of(m) for m in (l4, l3, l2, l1, data, ro)] == [4, 3, 2, 1, 7, 0]
    assert [rig.type_count(m) for m in (l4, l3, l2, l1, data, ro)] == [1, 1, 1, 1, 1, 0]
    assert [rig.count(m) for m in (l4, l3, l2, l1, data, ro)] == [3, 2, 2, 2, 2, 2]
    assert rig.unpin(d, l4) == 0
    assert [rig.type_count(m) for m in (l4, l3, l2, l1, data, ro)] == [0] * 6
    assert [rig.count(m) for m in (l4, l3, l2, l1, data, ro)] == [1] * 6


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_pin_each_level_twice_is_refused(rig: Rig, d: FakeDomain, level: int) -> None:
    (mfn,) = rig.alloc(d)
    assert rig.pin(d, level, mfn) == 0
    assert rig.pin(d, level, mfn) == -errno.EINVAL
    assert rig.type_count(mfn) == 1
    assert rig.unpin(d, mfn) == 0
    assert rig.unpin(d, mfn) == -errno.EINVAL
    assert rig.count(mfn) == 1


def test_pin_of_someone_elses_frame(rig: Rig, d: FakeDomain) -> None:
    other = rig.add(2)
    (mfn,) = rig.alloc(other)
    assert rig.pin(d, 1, mfn) == -errno.EINVAL
    assert rig.pin(d, 1, 1 << 50) == -errno.EINVAL
    assert rig.mmuext(d, (0, mfn, 0), foreigndom=2) == -errno.EPERM
    assert rig.mmuext(rig.dom0, (0, mfn, 0), foreigndom=2) == 0, "the builder may"
    assert rig.type_of(mfn) == 1
    assert rig.mmuext(rig.dom0, (4, mfn, 0), foreigndom=2) == 0


def test_foreign_domain_that_is_oneself_or_unknown(rig: Rig, d: FakeDomain) -> None:
    (mfn,) = rig.alloc(d)
    assert rig.mmuext(d, (0, mfn, 0), foreigndom=1) == -errno.ESRCH
    assert rig.mmuext(d, (0, mfn, 0), foreigndom=77) == -errno.ESRCH
    assert rig.mmu_update(d, [(0, 0)], 77) == -errno.ESRCH
    assert rig.mmu_update(d, [(0, 0)], DOMID_SELF | 78 << 16) == -errno.EINVAL


@pytest.mark.parametrize("bad", range(4))
def test_a_bad_leaf_refuses_the_whole_tree_and_leaves_nothing(rig: Rig, d: FakeDomain, bad: int) -> None:
    other = rig.add(2)
    (foreign,) = rig.alloc(other)
    good = rig.alloc(d, 3)
    l4, l3, l2, l1 = rig.tree(d, [(m, P | RW) for m in good])
    entry = [l1 << 12 | P | RW, foreign << 12 | P, good[0] << 12 | P | PCD, 1 << 45 | P][bad]
    rig.set(l1, 100, entry)
    assert rig.pin(d, 4, l4) == -errno.EINVAL
    for mfn in (l4, l3, l2, l1, *good):
        assert (rig.count(mfn), rig.type_count(mfn)) == (1, 0)
    assert rig.count(foreign) == 1
    assert not rig.frames.partial and not rig.frames.deferred and rig.frames.failed == -1


def test_errno_of_leaf_failures(rig: Rig, d: FakeDomain) -> None:
    """get_page_from_l1e(): EBUSY for what cannot be pinned, EPERM for what is no RAM, EINVAL for flags."""
    other = rig.add(2)
    (foreign,) = rig.alloc(other)
    (l1,) = rig.alloc(d)
    for entry, error in (
        (l1 << 12 | P | RW, errno.EBUSY),
        (foreign << 12 | P, errno.EBUSY),
        (l1 << 12 | P | PWT, errno.EINVAL),
        ((rig.memory.nr_frames + 5) << 12 | P, errno.EPERM),
        (0x000FFFFFFFFFF000 | P, errno.EINVAL),
    ):
        rig.set(l1, 7, entry)
        assert rig.pin(d, 1, l1) == -error
        assert (rig.count(l1), rig.type_count(l1)) == (1, 0)


def test_failure_above_keeps_nothing_below(rig: Rig, d: FakeDomain) -> None:
    """Two good L2 entries, then a bad one: what was validated is undone (XSA-299: with the references moved
    correctly)."""
    l1a, l1b, l2, l3, l4 = rig.alloc(d, 5)
    for i, l1 in enumerate((l1a, l1b)):
        rig.set(l2, i, l1 << 12 | P | RW)
    rig.set(l2, 5, l1a << 12 | P | PSE)
    rig.set(l3, 9, l2 << 12 | P | RW)
    rig.set(l4, 3, l3 << 12 | P | RW)
    assert rig.pin(d, 4, l4) == -errno.EINVAL
    for mfn in (l1a, l1b, l2, l3, l4):
        assert (rig.count(mfn), rig.type_count(mfn)) == (1, 0)


@pytest.mark.parametrize("level", [2, 3, 4])
@pytest.mark.parametrize("flag", [PWT, PCD, PSE, GLOBAL])
def test_upper_levels_refuse_caching_superpages_and_global(rig: Rig, d: FakeDomain, level: int, flag: int) -> None:
    table, child = rig.alloc(d, 2)
    rig.set(table, 4, child << 12 | P | RW | flag)
    assert rig.pin(d, level, table) == -errno.EINVAL
    rig.set(table, 4, 0)
    assert rig.pin(d, level, table) == 0
    assert rig.update(d, table, 4, child << 12 | P | RW | flag) == -errno.EINVAL
    assert rig.update(d, table, 4, child << 12 | P | RW) == 0


def test_l1_allows_global_and_available_bits(rig: Rig, d: FakeDomain) -> None:
    l1, data = rig.alloc(d, 2)
    value = data << 12 | P | RW | GLOBAL | A | D | 0xE00 | NX | 0x3FF << 53
    rig.set(l1, 0, value)
    assert rig.pin(d, 1, l1) == 0
    assert rig.entry(l1, 0) == value


# --- linear page tables, slots ---------------------------------------------------------------------------


@pytest.mark.parametrize("flags", [P, P | RW])
def test_linear_page_tables_are_refused(rig: Rig, d: FakeDomain, flags: int) -> None:
    """XSA-213, XSA-240: no table maps a table of its own level."""
    l4, other_l4 = rig.alloc(d, 2)
    rig.set(l4, 300, l4 << 12 | flags)
    assert rig.pin(d, 4, l4) == -errno.EINVAL
    rig.set(l4, 300, 0)
    assert rig.pin(d, 4, l4) == 0 and rig.pin(d, 4, other_l4) == 0
    assert rig.update(d, l4, 300, l4 << 12 | flags) == -errno.EINVAL
    assert rig.update(d, l4, 300, other_l4 << 12 | flags) == -errno.EINVAL
    l2, l2b = rig.alloc(d, 2)
    assert rig.pin(d, 2, l2b) == 0
    rig.set(l2, 0, l2b << 12 | flags)
    assert rig.pin(d, 2, l2) == -errno.EINVAL


def test_rw_change_of_an_upper_entry_is_no_fast_path(rig: Rig, d: FakeDomain) -> None:
    """XSA-182: turning on RW is checked like a new entry."""
    l4, l3, _, _ = rig.tree(d)
    rig.set(l4, 0, l3 << 12 | P)
    assert rig.pin(d, 4, l4) == 0
    calls: list[int] = []
    real = rig.frames.get_root
    rig.frames.get_root = lambda *args: calls.append(args[0]) or real(*args)  # type: ignore[method-assign,func-returns-value]
    assert rig.update(d, l4, 0, l3 << 12 | P | A) == 0 and not calls
    assert rig.update(d, l4, 0, l3 << 12 | P | RW) == 0 and calls == [l3]
    assert rig.type_count(l3) == 1 and rig.count(l3) == 2


def test_xen_slots_are_installed_and_not_the_guests(rig: Rig, d: FakeDomain) -> None:
    (l4,) = rig.alloc(d)
    (foreign,) = rig.alloc(rig.add(2))
    for slot in range(256, 272):
        rig.set(l4, slot, foreign << 12 | P | RW | USER)  # not validated, but replaced
    assert rig.pin(d, 4, l4) == 0
    assert rig.entry(l4, 256) == rig.xen_l3 << 12 | XEN_ENTRY
    assert not any(rig.entry(l4, slot) for slot in range(257, 272))
    for slot in (256, 260, 271):
        assert rig.update(d, l4, slot, 0) == -errno.EINVAL
    for slot in (255, 272, 511):
        assert rig.update(d, l4, slot, 0) == 0
    assert rig.count(foreign) == 1
    assert rig.unpin(d, l4) == 0


# --- the one rule -------------------------------------------------------------------------------------------


def test_page_table_is_never_mapped_writable(rig: Rig, d: FakeDomain) -> None:
    l1, pt, seg = rig.alloc(d, 3)
    assert rig.pin(d, 1, l1) == 0 and rig.pin(d, 2, pt) == 0
    assert rig.frames.get_page_and_type(seg, d, PGT_SEG_DESC)
    for frame in (pt, seg, l1):
        assert rig.update(d, l1, 0, frame << 12 | P | RW) == -errno.EBUSY
        assert rig.update(d, l1, 0, frame << 12 | P) == 0
        assert rig.update(d, l1, 0, frame << 12 | P | RW) == -errno.EBUSY, "nor by changing the flag"
        assert rig.update(d, l1, 0, 0) == 0


def test_writable_page_is_never_a_page_table(rig: Rig, d: FakeDomain) -> None:
    l1, data = rig.alloc(d, 2)
    rig.set(l1, 0, data << 12 | P | RW)
    assert rig.pin(d, 1, l1) == 0
    for level in range(1, 5):
        assert rig.pin(d, level, data) == -errno.EINVAL
    assert not rig.frames.get_page_and_type(data, d, PGT_SEG_DESC)
    assert rig.update(d, l1, 0, data << 12 | P) == 0
    assert rig.pin(d, 3, data) == 0


def test_descriptor_page_is_checked(rig: Rig, d: FakeDomain) -> None:
    good, bad = rig.alloc(d, 2)
    rig.set(good, 5, 0x00AF9B000000FFFF)  # 64-bit code, DPL 0: fixed up to the guest's privilege
    rig.set(bad, 5, 0x00008E0000000000)  # an interrupt gate
    assert rig.frames.get_page_and_type(good, d, PGT_SEG_DESC)
    assert rig.entry(good, 5) >> 45 & 3 == 3
    assert not rig.frames.get_page_and_type(bad, d, PGT_SEG_DESC)
    assert (rig.count(bad), rig.type_count(bad)) == (1, 0)


def test_unmapping_a_descriptor_page_lets_go_of_the_ldt(rig: Rig, d: FakeDomain) -> None:
    """put_page_from_l1e(): "we blow the entire shadow LDT"."""
    l1, page = rig.alloc(d, 2)
    rig.set(l1, 0, page << 12 | P)
    assert rig.pin(d, 1, l1) == 0
    assert rig.frames.get_page_and_type(page, d, PGT_SEG_DESC)
    d.v.ldt_frames[0] = page
    assert rig.update(d, l1, 0, 0) == 0
    assert not d.v.ldt_frames
    assert (rig.count(page), rig.type_count(page)) == (1, 0)


# --- entries ---------------------------------------------------------------------------------------------------


def test_replacing_an_entry_moves_references(rig: Rig, d: FakeDomain) -> None:
    l1, a, b = rig.alloc(d, 3)
    assert rig.pin(d, 1, l1) == 0
    assert rig.update(d, l1, 0, a << 12 | P | RW) == 0
    assert (rig.count(a), rig.type_count(a)) == (2, 1)
    assert rig.update(d, l1, 0, b << 12 | P | RW) == 0
    assert (rig.count(a), rig.type_count(a)) == (1, 0)
    assert rig.update(d, l1, 0, b << 12 | P) == 0
    assert (rig.count(b), rig.type_count(b)) == (2, 0)
    assert rig.update(d, l1, 0, b << 12) == 0
    assert (rig.count(b), rig.type_count(b)) == (1, 0)
    assert rig.entry(l1, 0) == b << 12, "a non-present entry is the guest's to use"


def test_refused_entry_changes_nothing(rig: Rig, d: FakeDomain) -> None:
    l1, a = rig.alloc(d, 2)
    (foreign,) = rig.alloc(rig.add(2))
    assert rig.pin(d, 1, l1) == 0
    assert rig.update(d, l1, 0, a << 12 | P | RW) == 0
    before = rig.entry(l1, 0)
    for value in (foreign << 12 | P, l1 << 12 | P | RW, a << 12 | P | PCD, 1 << 46 | P):
        assert rig.update(d, l1, 0, value) < 0
        assert rig.entry(l1, 0) == before
        assert (rig.count(a), rig.type_count(a)) == (2, 1)


def test_preserve_ad(rig: Rig, d: FakeDomain) -> None:
    l1, a, b = rig.alloc(d, 3)
    assert rig.pin(d, 1, l1) == 0
    rig.set(l1, 0, 0)
    assert rig.update(d, l1, 0, a << 12 | P | RW | A | D) == 0
    assert rig.mmu_update(d, [(l1 << 12 | 2, a << 12 | P)]) == 0
    assert rig.entry(l1, 0) == a << 12 | P | A | D
    assert rig.mmu_update(d, [(l1 << 12 | 2, b << 12 | P | RW)]) == 0
    assert rig.entry(l1, 0) == b << 12 | P | RW | A | D
    assert rig.update(d, l1, 0, b << 12 | P) == 0
    assert rig.entry(l1, 0) == b << 12 | P


def test_exact_mode_adjusts_entries(rig: Rig) -> None:
    """adjust_guest_l1e() ... adjust_guest_l4e(): everything is user-accessible; bit 52 remembers what was the
    kernel's."""
    d = rig.add(5, "exact")
    kernel, user = rig.alloc(d, 2)
    l4, l3, l2, l1 = rig.tree(d, [(kernel, P | RW), (user, P | RW | USER)])
    for table, child in ((l4, l3), (l3, l2), (l2, l1)):
        rig.set(table, 0, child << 12 | P | RW)
    assert rig.pin(d, 4, l4) == 0
    assert rig.entry(l1, 0) == kernel << 12 | P | RW | USER | GUEST_KERNEL
    assert rig.entry(l1, 1) == user << 12 | P | RW | USER
    for table, child in ((l4, l3), (l3, l2), (l2, l1)):
        assert rig.entry(table, 0) == child << 12 | P | RW | USER
    assert rig.update(d, l1, 2, kernel << 12 | P) == 0
    assert rig.entry(l1, 2) == kernel << 12 | P | USER | GUEST_KERNEL
    assert rig.update(d, l1, 3, kernel << 12) == 0
    assert rig.entry(l1, 3) == kernel << 12, "only present entries are adjusted"
    assert rig.update(d, l2, 0, l1 << 12 | P) == 0
    assert rig.entry(l2, 0) == l1 << 12 | P | USER


def test_fast_mode_leaves_entries_alone(rig: Rig, d: FakeDomain) -> None:
    (data,) = rig.alloc(d)
    l4, _, l2, l1 = rig.tree(d, [(data, P | RW)])
    rig.set(l2, 0, l1 << 12 | P | RW)
    assert rig.pin(d, 4, l4) == 0
    assert rig.entry(l1, 0) == data << 12 | P | RW and rig.entry(l2, 0) == l1 << 12 | P | RW


def test_foreign_mapping_needs_privilege_and_the_right_owner(rig: Rig, d: FakeDomain) -> None:
    dom0 = rig.dom0
    other = rig.add(2)
    (mfn,), (third,) = rig.alloc(d), rig.alloc(other)
    (l1,) = rig.alloc(dom0)
    assert rig.pin(dom0, 1, l1) == 0
    assert rig.update(dom0, l1, 0, mfn << 12 | P | RW) == -errno.EBUSY
    assert rig.update(dom0, l1, 0, third << 12 | P | RW, 1) == -errno.EBUSY
    assert rig.update(dom0, l1, 0, mfn << 12 | P | RW, 1) == 0
    assert (rig.count(mfn), rig.type_count(mfn)) == (2, 1)
    assert rig.pin(d, 1, mfn) == -errno.EINVAL, "mapped writable elsewhere"
    assert rig.update(dom0, l1, 0, 0) == 0
    (l1,) = rig.alloc(other)
    assert rig.pin(other, 1, l1) == 0
    assert rig.update(other, l1, 0, mfn << 12 | P, 1) == -errno.EPERM


def test_foreign_page_tables_need_privilege(rig: Rig, d: FakeDomain) -> None:
    l1, data = rig.alloc(d, 2)
    assert rig.pin(d, 1, l1) == 0
    pfd = 2 << 16  # domid 1
    assert rig.mmu_update(rig.add(2), [(l1 << 12, 0)], pfd | 1) == -errno.EPERM
    assert rig.mmu_update(rig.dom0, [(l1 << 12, data << 12 | P | RW)], pfd | 1) == 0
    assert (rig.count(data), rig.type_count(data)) == (2, 1)


def test_io_memory_is_for_the_privileged(rig: Rig, d: FakeDomain) -> None:
    """DOMID_IO: only I/O frames, at the caller's privilege; nothing is counted."""
    (io,) = rig.alloc(d)
    rig.frames.steal_page(io, d)
    rig.frames.assign_io(io)
    (l1,) = rig.alloc(d)
    assert rig.pin(d, 1, l1) == 0
    assert rig.update(d, l1, 0, io << 12 | P | RW) == -errno.EPERM
    assert rig.update(d, l1, 0, io << 12 | P | RW, DOMID_IO) == -errno.EPERM
    (l1,), (ram,) = rig.alloc(rig.dom0), rig.alloc(rig.dom0)
    assert rig.pin(rig.dom0, 1, l1) == 0
    assert rig.update(rig.dom0, l1, 0, ram << 12 | P, DOMID_IO) == -errno.EBUSY
    count = rig.count(io)
    assert rig.update(rig.dom0, l1, 0, io << 12 | P | RW, DOMID_IO) == 0
    assert rig.update(rig.dom0, l1, 0, 0) == 0
    assert rig.count(io) == count
    assert rig.update(rig.dom0, l1, 0, (1 << 38) << 12 | P | RW, DOMID_IO) == -errno.EPERM


# --- mmu_update as a request list ----------------------------------------------------------------------------


def test_update_of_a_writable_page_is_a_plain_store(rig: Rig, d: FakeDomain) -> None:
    (data,) = rig.alloc(d)
    seen: list[int] = []
    rig.memory.add_listener(lambda maddr, size: seen.append(maddr >> 12))
    assert rig.update(d, data, 3, 0xDEAD) == 0
    assert rig.entry(data, 3) == 0xDEAD and seen == [data]
    assert (rig.count(data), rig.type_count(data), rig.type_of(data)) == (1, 0, 7)
    assert rig.frames.get_page_and_type(data, d, PGT_WRITABLE)
    assert rig.update(d, data, 3, 0xBEEF) == 0


def test_update_of_a_descriptor_or_readonly_page_is_refused(rig: Rig, d: FakeDomain) -> None:
    (seg,) = rig.alloc(d)
    assert rig.frames.get_page_and_type(seg, d, PGT_SEG_DESC)
    assert rig.update(d, seg, 0, 1) == -errno.EINVAL
    heap = rig.frames.alloc_xenheap(d, readonly=True)  # type: ignore[arg-type]
    assert rig.update(d, heap, 0, 1) == -errno.EINVAL
    assert rig.update(d, rig.frames.m2p_frames[0], 0, 1) == -errno.EINVAL
    assert rig.update(d, 1 << 45, 0, 1) == -errno.EINVAL


def test_done_counts_up_to_the_bad_request(rig: Rig, d: FakeDomain) -> None:
    l1, a = rig.alloc(d, 2)
    assert rig.pin(d, 1, l1) == 0
    good = [(l1 << 12 | i << 3, a << 12 | P) for i in range(300)]
    assert rig.mmu_update(d, [*good[:200], (l1 << 12, l1 << 12 | P | RW), *good[200:]]) == -errno.EBUSY
    assert rig.done == 200 and rig.count(a) == 201
    assert rig.mmu_update(d, good) == 0 and rig.done == 300


def test_unknown_command(rig: Rig, d: FakeDomain) -> None:
    (l1,) = rig.alloc(d)
    for command in (3, 4, 5, 6, 7):
        assert rig.mmu_update(d, [(l1 << 12 | command, 0)]) == -errno.ENOSYS
    assert rig.mmuext(d, (14, 0, 0)) == -errno.ENOSYS
    assert rig.mmuext(d, (21, 0, 0)) == -errno.ENOSYS
    assert rig.mmuext(d, (0xFFFFFFFF, 0, 0)) == -errno.ENOSYS


def test_machphys_update(rig: Rig, d: FakeDomain) -> None:
    (mfn,), (foreign,) = rig.alloc(d), rig.alloc(rig.add(2))
    assert rig.mmu_update(d, [(mfn << 12 | 1, 42)]) == 0
    assert rig.frames.get_gpfn(mfn) == 42
    assert rig.mmu_update(d, [(foreign << 12 | 1, 42)]) == -errno.EINVAL
    assert rig.mmu_update(d, [(1 << 50 | 1, 42)]) == -errno.EINVAL
    assert rig.mmu_update(rig.dom0, [(foreign << 12 | 1, 43)], 2) == 0
    assert rig.mmu_update(rig.dom0, [(foreign << 12 | 1, 43)], 2 | 3 << 16) == -errno.EPERM


def test_bad_pointers(rig: Rig, d: FakeDomain) -> None:
    from pyxen.hypervisor.x86.pv import mm
    from tests.mm.rig import Caller

    (l1,) = rig.alloc(d)
    assert rig.pin(d, 1, l1) == 0
    caller = Caller(d, (l1 << 12).to_bytes(8, "little") + (9 << 12).to_bytes(8, "little"))
    assert rig.call(mm.do_mmu_update, caller, Caller.BASE, 2, 0, DOMID_SELF) == -errno.EFAULT
    assert rig.entry(l1, 0) == 9 << 12, "the first request could be read"
    assert rig.call(mm.do_mmu_update, caller, (1 << 64) - 16, 2, 0, DOMID_SELF) == -errno.EFAULT
    assert rig.call(mm.do_mmuext_op, caller, 0x666000, 0x7FFFFFFF, 0, DOMID_SELF) == -errno.EFAULT
    assert rig.call(mm.do_mmu_update, caller, Caller.BASE, 1, 0x666000, DOMID_SELF) == 0, "pdone is best effort"
    assert rig.call(mm.do_mmu_update, caller, 0, 0, 0, DOMID_SELF) == 0


# --- the guest gives a pinned table away -----------------------------------------------------------------------


def test_removed_page_table_stays_until_unused(rig: Rig, d: FakeDomain) -> None:
    l4, l3, l2, l1 = rig.tree(d)
    assert rig.pin(d, 4, l4) == 0
    assert rig.frames.guest_remove_page(l1, d)
    assert rig.frames.page_owner(l1) == 1, "the L2 still refers to it"
    assert rig.frames.guest_remove_page(l4, d)  # unpins: the tree falls
    assert [rig.frames.page_owner(m) for m in (l4, l3, l2, l1)] == [None, 1, 1, None]
    assert d.tot_pages == 2
    assert not rig.frames.type_info[l4] & PGT_PARTIAL
