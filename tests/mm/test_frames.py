# SPDX-License-Identifier: GPL-2.0-only
"""Owners, references, types and accounting of frames."""

from __future__ import annotations

import errno
import time

import pytest

from pyxen.abi.xen import DOMID_XEN, INVALID_M2P_ENTRY
from pyxen.errors import InternalError, XenError
from pyxen.hypervisor.domain import Dying
from pyxen.hypervisor.frames import PGT_L1, PGT_L4, PGT_SEG_DESC, PGT_WRITABLE
from tests.mm.rig import RW, P, Rig


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_allocated_frame_has_one_owner_and_one_reference(rig: Rig) -> None:
    d = rig.add(1)
    (mfn,) = rig.alloc(d)
    assert rig.frames.page_owner(mfn) == 1
    assert rig.count(mfn) == 1 and rig.type_count(mfn) == 0
    assert d.tot_pages == 1
    assert rig.frames.get_gpfn(mfn) == INVALID_M2P_ENTRY


def test_get_page_only_for_the_owner(rig: Rig) -> None:
    d, other = rig.add(1), rig.add(2)
    (mfn,) = rig.alloc(d)
    assert not rig.frames.get_page(mfn, other)
    assert not rig.frames.get_page(1 << 40, d)
    assert rig.frames.get_page(mfn, d)
    assert rig.count(mfn) == 2
    rig.frames.put_page(mfn)
    assert rig.count(mfn) == 1


def test_last_reference_frees_flushes_and_tells_the_engines(rig: Rig) -> None:
    d = rig.add(1)
    (mfn,) = rig.alloc(d)
    rig.memory.write(mfn << 12, b"secret")
    rig.frames.set_gpfn(mfn, 7)
    seen: list[tuple[int, int]] = []
    rig.memory.add_listener(lambda maddr, size: seen.append((maddr, size)))
    assert rig.frames.get_page(mfn, d)
    assert rig.frames.guest_remove_page(mfn, d)
    assert rig.frames.page_owner(mfn) == 1 and d.tot_pages == 1, "someone still refers to it"
    assert not rig.flushes
    rig.frames.put_page(mfn)
    assert rig.frames.page_owner(mfn) is None and d.tot_pages == 0
    assert rig.flushes == [1] and seen == [(mfn << 12, 4096)]
    assert rig.frames.get_gpfn(mfn) == INVALID_M2P_ENTRY
    assert rig.allocator.free_frames == rig.baseline
    assert not rig.frames.get_page(mfn, d)
    fresh = rig.alloc(rig.add(2), rig.baseline)
    assert mfn in fresh and rig.memory.read(mfn << 12, 6) == bytes(6)


def test_type_change_only_at_zero(rig: Rig) -> None:
    d = rig.add(1)
    (mfn,) = rig.alloc(d)
    assert rig.frames.get_page_and_type(mfn, d, PGT_WRITABLE)
    assert rig.frames.get_page_and_type(mfn, d, PGT_WRITABLE)
    assert not rig.frames.get_page_and_type(mfn, d, PGT_L1)
    assert not rig.frames.get_page_and_type(mfn, d, PGT_SEG_DESC)
    assert rig.count(mfn) == 3, "a refused type leaves no reference"
    rig.frames.put_page_and_type(mfn)
    assert not rig.frames.get_page_and_type(mfn, d, PGT_L1)
    rig.frames.put_page_and_type(mfn)
    assert rig.frames.get_page_and_type(mfn, d, PGT_L1)
    assert not rig.frames.get_page_and_type(mfn, d, PGT_WRITABLE)
    rig.frames.put_page_and_type(mfn)


def test_tlbflush_filter_flushes_once_and_only_if_needed(rig: Rig) -> None:
    """XSA-401: writable rights must be out of every TLB before the frame is a page table."""
    d = rig.add(1)
    a, b, c = rig.alloc(d, 3)
    for mfn in (a, b):
        assert rig.frames.get_page_and_type(mfn, d, PGT_WRITABLE)
        rig.frames.put_page_and_type(mfn)
    assert not rig.flushes
    assert rig.frames.get_page_and_type(a, d, PGT_L1)
    assert rig.flushes == [1]
    assert rig.frames.get_page_and_type(b, d, PGT_L1), "its rights were dropped before that flush"
    assert rig.frames.get_page_and_type(c, d, PGT_L1), "it never had a type"
    assert rig.flushes == [1]
    rig.frames.put_page_and_type(a)
    assert rig.frames.get_page_and_type(a, d, PGT_WRITABLE)
    assert rig.flushes == [1, 1]


def test_guest_requested_flush_counts(rig: Rig) -> None:
    d = rig.add(1)
    (mfn,) = rig.alloc(d)
    assert rig.frames.get_page_and_type(mfn, d, PGT_WRITABLE)
    rig.frames.put_page_and_type(mfn)
    assert rig.mmuext(d, (10, 0, 0)) == 0
    assert rig.frames.get_page_and_type(mfn, d, PGT_L1)
    assert not rig.flushes


def test_flush_of_one_of_two_vcpus_does_not_count(rig: Rig) -> None:
    d = rig.add(1, vcpus=2)
    (mfn,) = rig.alloc(d)
    assert rig.frames.get_page_and_type(mfn, d, PGT_WRITABLE)
    rig.frames.put_page_and_type(mfn)
    assert rig.mmuext(d, (6, 0, 0)) == 0
    assert rig.frames.get_page_and_type(mfn, d, PGT_L1)
    assert rig.flushes == [1]


def test_max_pages(rig: Rig) -> None:
    d = rig.add(1)
    d.max_pages = 3
    rig.alloc(d, 3)
    for attempt in (lambda: rig.alloc(d), lambda: rig.frames.alloc_domheap(d)):  # type: ignore[arg-type]
        with pytest.raises(XenError) as info:
            attempt()
        assert info.value.errno == errno.ENOMEM
    assert d.tot_pages == 3


def test_out_of_memory_changes_nothing(rig: Rig) -> None:
    d = rig.add(1)
    with pytest.raises(XenError) as info:
        rig.alloc(d, rig.baseline + 1)
    assert info.value.errno == errno.ENOMEM
    assert d.tot_pages == 0 and rig.allocator.free_frames == rig.baseline


def test_dying_domain_gets_no_frames(rig: Rig) -> None:
    d = rig.add(1)
    d.dying = Dying.DYING
    with pytest.raises(XenError):
        rig.alloc(d)


def test_order_is_aligned(rig: Rig) -> None:
    d = rig.add(1)
    mfn = rig.frames.alloc_domheap(d, 3)
    assert mfn % 8 == 0 and d.tot_pages == 8
    assert d.frames == list(range(mfn, mfn + 8))


def test_bulk_allocation_is_fast() -> None:
    rig = Rig(70_000)
    d = rig.add(1)
    best = 1.0
    for _ in range(3):
        begin = time.process_time()
        runs = rig.frames.alloc_domheap_many(d, 65_536)  # type: ignore[arg-type]
        best = min(best, time.process_time() - begin)
        assert sum(map(len, runs)) == 65_536
        rig.teardown(d)
        d.dying = Dying.ALIVE
    assert best < 0.03, f"65,536 frames took {best * 1000:.1f} ms"


def test_steal_needs_exactly_the_owners_reference(rig: Rig) -> None:
    d, other = rig.add(1), rig.add(2)
    a, b, c = rig.alloc(d, 3)
    with pytest.raises(XenError):
        rig.frames.steal_page(a, other)
    assert rig.frames.get_page(b, d)
    with pytest.raises(XenError):
        rig.frames.steal_page(b, d)
    heap = rig.frames.alloc_xenheap(d)  # type: ignore[arg-type]
    with pytest.raises(XenError):
        rig.frames.steal_page(heap, d)
    with pytest.raises(XenError):
        rig.frames.steal_page(1 << 50, d)
    rig.frames.steal_page(a, d)
    assert d.tot_pages == 2 and rig.flushes == [1]
    rig.frames.assign_page(a, other)
    assert rig.frames.page_owner(a) == 2 and other.tot_pages == 1
    with pytest.raises(InternalError):
        rig.frames.assign_page(a, d)
    rig.frames.steal_page(c, d)
    before = rig.allocator.free_frames
    rig.frames.free_stolen(c)
    assert rig.allocator.free_frames == before + 1


def test_assign_respects_max_pages(rig: Rig) -> None:
    d, other = rig.add(1), rig.add(2)
    other.max_pages = 0
    (mfn,) = rig.alloc(d)
    rig.frames.steal_page(mfn, d)
    with pytest.raises(XenError) as info:
        rig.frames.assign_page(mfn, other)
    assert info.value.errno == errno.ENOMEM


def test_exchange(rig: Rig) -> None:
    d = rig.add(1)
    given = rig.alloc(d, 4)
    got = rig.frames.exchange(d, given, 1, 2)  # type: ignore[arg-type]
    assert len(got) == 1 and got[0] % 4 == 0
    assert d.tot_pages == 4 and d.frames == list(range(got[0], got[0] + 4))


def test_exchange_is_all_or_nothing(rig: Rig) -> None:
    d = rig.add(1)
    a, b = rig.alloc(d, 2)
    rig.frames.set_gpfn(a, 11)
    for given in ([a, a], [a, b]):
        if given == [a, b]:
            assert rig.frames.get_page(b, d)
        with pytest.raises(XenError):
            rig.frames.exchange(d, given, 2, 0)  # type: ignore[arg-type]
        assert d.frames == sorted((a, b)) and d.tot_pages == 2
        assert rig.frames.get_gpfn(a) == 11
    with pytest.raises(XenError):
        rig.frames.exchange(d, [a], 1, 20)  # type: ignore[arg-type]
    assert d.frames == sorted((a, b))


def test_readonly_xenheap_page_is_never_writable(rig: Rig) -> None:
    """share_xen_page_with_guest(SHARE_ro): a type reference that is never dropped."""
    d = rig.add(1)
    mfn = rig.frames.alloc_xenheap(d, readonly=True)  # type: ignore[arg-type]
    assert d.tot_pages == 0 and rig.frames.pages_held(d) == 1
    assert not rig.frames.get_page_and_type(mfn, d, PGT_WRITABLE)
    assert not rig.frames.get_page_and_type(mfn, d, PGT_L1)
    assert rig.frames.get_page(mfn, d)
    rig.frames.put_page(mfn)


def test_writable_xenheap_page_is_no_page_table(rig: Rig) -> None:
    d = rig.add(1)
    mfn = rig.frames.alloc_xenheap(d)  # type: ignore[arg-type]
    assert rig.frames.get_page_and_type(mfn, d, PGT_WRITABLE)
    assert not rig.frames.get_page_and_type(mfn, d, PGT_L1)
    assert rig.frames.get_page_and_type_preemptible(mfn, d, PGT_L4) == -errno.EINVAL


@pytest.mark.parametrize("guest_first", [True, False])
def test_xenheap_page_outlives_either_side(rig: Rig, guest_first: bool) -> None:
    d = rig.add(1)
    mfn = rig.frames.alloc_xenheap(d)  # type: ignore[arg-type]
    rig.alloc(d, 2)
    if guest_first:
        rig.teardown(d)
        assert rig.frames.page_owner(mfn) is None and rig.frames.pages_held(d) == 0
        assert rig.allocator.is_allocated(mfn), "the hypervisor still uses it"
        rig.frames.free_xenheap(mfn)
    else:
        assert rig.frames.get_page(mfn, d)
        rig.frames.free_xenheap(mfn)
        assert rig.allocator.is_allocated(mfn), "the guest still maps it"
        rig.frames.put_page(mfn)
        rig.teardown(d)
    assert not rig.allocator.is_allocated(mfn)
    assert rig.allocator.free_frames == rig.baseline


def test_m2p_is_dom_xens_and_readonly(rig: Rig) -> None:
    d, dom0 = rig.add(1), rig.dom0
    m2p = rig.frames.m2p_frames[0]
    assert rig.frames.page_owner(m2p) == DOMID_XEN
    (l1,) = rig.alloc(dom0)
    assert rig.pin(dom0, 1, l1) == 0
    assert rig.update(dom0, l1, 0, m2p << 12 | P | RW, DOMID_XEN) == -errno.EBUSY
    assert rig.update(dom0, l1, 0, m2p << 12 | P, DOMID_XEN) == 0
    assert rig.update(dom0, l1, 0, 0) == 0
    (l1,) = rig.alloc(d)
    assert rig.pin(d, 1, l1) == 0
    assert rig.update(d, l1, 0, m2p << 12 | P, DOMID_XEN) == -errno.EPERM


def test_owned_by_skips_others(rig: Rig) -> None:
    d, other = rig.add(0x0101), rig.add(1)  # byte patterns that overlap in the owner array
    mine = []
    for _ in range(20):
        mine += rig.alloc(d)
        rig.alloc(other)
    assert d.frames == sorted(mine)
    assert len(other.frames) == 20


def test_update_descriptor(rig: Rig) -> None:
    d = rig.add(1)
    a, b, c = rig.alloc(d, 3)
    assert rig.frames.get_page_and_type(a, d, PGT_SEG_DESC)
    assert rig.frames.update_descriptor(a, d, 3, 0x1234)  # type: ignore[arg-type]
    assert rig.entry(a, 3) == 0x1234 and rig.type_count(a) == 1
    assert rig.frames.update_descriptor(b, d, 0, 5)  # type: ignore[arg-type]
    assert rig.pin(d, 1, c) == 0
    assert not rig.frames.update_descriptor(c, d, 0, 5)  # type: ignore[arg-type]
    assert not rig.frames.update_descriptor(a, rig.add(2), 0, 5)  # type: ignore[arg-type]


def test_reference_underflow_is_our_bug(rig: Rig) -> None:
    d = rig.add(1)
    (mfn,) = rig.alloc(d)
    assert rig.frames.guest_remove_page(mfn, d)
    with pytest.raises(InternalError):
        rig.frames.put_page(mfn)
