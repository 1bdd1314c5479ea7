# SPDX-License-Identifier: GPL-2.0-only
"""The nested page table against a dict, and what stands around it: references, M2P, the pool."""

from __future__ import annotations

import errno

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyxen.abi.xen import INVALID_M2P_ENTRY, INVALID_MFN
from pyxen.errors import XenError
from pyxen.hypervisor.x86.hvm.p2m_table import GFN_BITS, P2mTable
from pyxen.hypervisor.x86.hvm.p2m_types import ADDRESS, FLAGS, P2mType, type_of
from pyxen.hypervisor.x86.hvm.paging_pool import PagingPool
from tests.hvm.rig import Guest, Machine, machine

_TYPES = [P2mType.RAM_RW, P2mType.RAM_LOGDIRTY, P2mType.RAM_RO, P2mType.INVALID]
_GFNS = st.one_of(st.integers(0, 40), st.integers(500, 530), st.integers((1 << 18) - 20, (1 << 18) + 20),
                  st.sampled_from([0, 512, 1024, 1 << 18, (1 << GFN_BITS) - 1, 1 << 27]))
_SET = st.tuples(st.just("set"), _GFNS, st.sampled_from([0, 0, 0, 9, 9, 18]), st.integers(0, 1 << 20),
                 st.sampled_from(_TYPES))
_RUN = st.tuples(st.just("run"), _GFNS, st.integers(1, 1500), st.sampled_from(_TYPES[:3]), st.sampled_from(_TYPES[:3]))


class Model:
    """Leaves as (gfn, order) -> (mfn, type), split and overwritten the slow way."""

    def __init__(self) -> None:
        self.leaves: dict[int, tuple[int, int, P2mType]] = {}

    def find(self, gfn: int) -> tuple[int, int, int, P2mType] | None:
        for order in (0, 9, 18):
            first = gfn & -(1 << order)
            leaf = self.leaves.get(first)
            if leaf is not None and leaf[0] == order:
                return first, *leaf
        return None

    def cut(self, gfn: int, order: int) -> None:
        """No leaf is larger than 2**order around gfn, none smaller below it."""
        while (leaf := self.find(gfn)) is not None and leaf[1] > order:
            first, size, mfn, kind = leaf
            del self.leaves[first]
            for i in range(512):
                step = i << size - 9
                self.leaves[first + step] = (size - 9, mfn + step, kind)
        for first in [g for g in self.leaves if gfn <= g < gfn + (1 << order)]:
            del self.leaves[first]

    def set(self, gfn: int, order: int, mfn: int, kind: P2mType) -> None:
        self.cut(gfn, order)
        if kind is not P2mType.INVALID:
            self.leaves[gfn] = (order, mfn, kind)

    def lookup(self, gfn: int) -> tuple[int, P2mType]:
        leaf = self.find(gfn)
        if leaf is None:
            return 0, P2mType.INVALID
        first, _, mfn, kind = leaf
        return mfn + gfn - first, kind


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(_SET, _RUN), max_size=12), st.lists(_GFNS, max_size=20))
def test_a_table_is_what_a_dict_is(operations: list[tuple], probes: list[int]) -> None:  # type: ignore[type-arg]
    with machine(32) as host:
        pool = PagingPool(host.hv.frames, 2000)
        table, model = P2mTable(host.memory, pool), Model()
        seen = set(probes)
        for operation in operations:
            if operation[0] == "set":
                _, gfn, order, mfn, kind = operation
                gfn &= -(1 << order)
                mfn &= -(1 << order)
                table.set(gfn, order, FLAGS[kind] | (mfn << 12 if kind is not P2mType.INVALID else 0))
                model.set(gfn, order, mfn, kind)
                seen |= {gfn, gfn + (1 << order) - 1, gfn + (1 << order) & (1 << GFN_BITS) - 1, max(gfn - 1, 0)}
            else:
                _, gfn, count, before, after = operation
                count = min(count, (1 << GFN_BITS) - gfn)
                table.run(gfn, count, {before: after})
                for frame in range(gfn, gfn + count):
                    mfn, kind = model.lookup(frame)
                    if kind is before and kind is not after:
                        model.set(frame, 0, mfn, after)
                seen |= {gfn, gfn + count - 1, max(gfn - 1, 0), gfn + count & (1 << GFN_BITS) - 1}
        for gfn in seen:
            entry, order = table.lookup(gfn)
            kind = type_of(entry)
            mfn = ((entry & ADDRESS) >> 12) + (gfn & (1 << order) - 1) if entry else 0
            assert (mfn, kind) == model.lookup(gfn), hex(gfn)
        leaves = {}
        for first, order, entry in table.leaves(0, 1 << GFN_BITS):
            for probe in (first, first + (1 << order) - 1):
                leaves[probe] = type_of(entry)
        for gfn, kind in leaves.items():
            assert model.lookup(gfn)[1] is kind
        used = pool.used
        assert pool.release(used)
        assert host.hv.allocator.free_frames == host.baseline


def test_entries_have_what_a_walker_wants(guest: Guest) -> None:
    """Present, user, accessed, dirty at every level: SVM's walker asks for user, and must not have to write."""
    q, table = guest.hv.memory.q, guest.p2m.table.root
    for shift in (27, 18, 9, 0):
        entry = q[(table << 9) + (20 >> shift & 511)]
        assert entry & 0x67 == 0x67
        table = (entry & ADDRESS) >> 12
    assert table == guest.mfn(20)


def test_superpages_when_both_sides_are_aligned(host: Machine) -> None:
    guest = Guest(host, 1, 1536)
    orders = [order for gfn, order, entry in guest.p2m.table.leaves(0, 1536) if type_of(entry) is P2mType.RAM_RW]
    assert orders == [9, 9, 9]
    mfns = [guest.mfn(gfn) for gfn in range(1536)]
    assert len(set(mfns)) == 1536
    m2p = guest.hv.frames.m2p
    assert [m2p.get(mfn) for mfn in mfns] == list(range(1536))


def test_a_frame_stands_in_one_place(guest: Guest) -> None:
    mfn = guest.mfn(20)
    guest.p2m.add_entry(100, mfn, 0, P2mType.RAM_RW)
    assert guest.p2m.get_entry(20)[0] == INVALID_MFN
    assert guest.mfn(100) == mfn
    assert guest.hv.frames.m2p.get(mfn) == 100


def test_what_is_replaced_has_no_place_and_stays_owned(guest: Guest) -> None:
    old, pages = guest.mfn(21), guest.domain.tot_pages
    guest.p2m.add_entry(21, guest.mfn(22), 0, P2mType.RAM_RW)
    assert guest.hv.frames.m2p.get(old) == INVALID_M2P_ENTRY
    assert guest.domain.tot_pages == pages
    assert guest.hv.frames.page_owner(old) == guest.domid


def test_taking_a_right_away_flushes_and_giving_one_does_not(guest: Guest) -> None:
    p2m, mfn = guest.p2m, guest.mfn(20)
    before = p2m.changes
    p2m.set_entry(200, mfn, 0, P2mType.RAM_RO)
    p2m.set_entry(200, mfn, 0, P2mType.RAM_RW)
    assert p2m.changes == before
    p2m.set_entry(200, mfn, 0, P2mType.RAM_LOGDIRTY)
    assert p2m.changes == before + 1
    assert guest.hvm.flush_wanted
    p2m.set_entry(200, guest.mfn(21), 0, P2mType.RAM_LOGDIRTY)
    p2m.set_entry(200, 0, 0, P2mType.INVALID)
    assert p2m.changes == before + 3


def test_the_pool_ends_before_the_host_does(guest: Guest) -> None:
    """A guest that asks for tables all over the place gets ENOMEM, and frees nothing of anybody."""
    pool = guest.domain.hvm.pool
    pool.set_limit(pool.used + 5)
    mfn = guest.mfn(20)
    with pytest.raises(XenError) as caught:
        for slot in range(1, 10):
            guest.p2m.add_entry(slot << 18, mfn, 0, P2mType.RAM_RW)
    assert caught.value.errno == errno.ENOMEM
    assert pool.used <= pool.limit
    with pytest.raises(XenError) as caught:
        pool.set_limit(pool.used - 1)
    assert caught.value.errno == errno.ENOMEM


@pytest.mark.parametrize("gfn", [1 << GFN_BITS, (1 << GFN_BITS) + 5, 1 << 40, (1 << 52) - 1, (1 << 64) - 1])
def test_beyond_the_physical_address_space(guest: Guest, gfn: int) -> None:
    with pytest.raises(XenError) as caught:
        guest.p2m.add_entry(gfn, guest.mfn(20), 0, P2mType.RAM_RW)
    assert caught.value.errno == errno.EINVAL
    assert guest.p2m.get_entry(gfn)[:2] == (INVALID_MFN, P2mType.INVALID)
    assert not guest.p2m.map_hole(gfn)


def test_holes_are_answered_by_the_null_device_a_few_at_a_time(guest: Guest) -> None:
    """However many a guest touches, they cost no more tables than a few holes do."""
    pool = guest.domain.hvm.pool
    high, used = guest.p2m.max_mapped_gfn, []
    for i in range(100):
        assert guest.p2m.map_hole((i << 18) + 0x8000000)
        used.append(pool.used)
    assert max(used[20:]) == used[20]
    assert guest.p2m.max_mapped_gfn == high
    assert guest.p2m.get_entry((99 << 18) + 0x8000000)[1] is P2mType.MMIO_DM
    assert guest.p2m.get_entry(0x8000000)[1] is P2mType.INVALID


def test_a_hole_is_found_a_frame_even_when_the_pool_is_empty(guest: Guest) -> None:
    pool = guest.domain.hvm.pool
    assert guest.p2m.map_hole(0x4000000)
    pool.set_limit(pool.used)
    assert guest.p2m.map_hole(0x4000000 + (1 << 18))  # at the first one's expense
    pool.limit = pool.used - 3
    assert not guest.p2m.map_hole(0x4000000 + (2 << 18))


def test_destroying_gives_everything_back(host: Machine) -> None:
    guest = host.guest()
    guest.p2m.map_hole(0x8000000)
    guest.p2m.add_entry(1 << 20, guest.mfn(30), 0, P2mType.RAM_RW)
    host.destroy(guest.domain)
    assert host.hv.allocator.free_frames == host.baseline
