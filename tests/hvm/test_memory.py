# SPDX-License-Identifier: GPL-2.0-only
"""HYPERVISOR_memory_op and grants of a translated domain."""

from __future__ import annotations

import errno
import struct

import pytest

from pyxen.abi import grant_table as gnt
from pyxen.abi import memory as abi
from pyxen.abi.grant_table import Gntmap, Gntst, GnttabCmd
from pyxen.abi.memory import MapSpace, Xenmem
from pyxen.abi.xen import DOMID_SELF, INVALID_M2P_ENTRY, Hypercall
from pyxen.errors import XenError
from pyxen.hypervisor.x86.hvm.p2m_types import P2mType
from tests.hvm.rig import AT, Guest, Machine

MEMORY, GRANT = Hypercall.MEMORY_OP, Hypercall.GRANT_TABLE_OP


def add(guest: Guest, space: int, index: int, gpfn: int, size: int = 0, domid: int = DOMID_SELF) -> int:
    return guest.op(MEMORY, Xenmem.ADD_TO_PHYSMAP, abi.ADD_TO_PHYSMAP.pack(domid, size, space, index, gpfn))[0]


def reserve(guest: Guest, op: int, extents: list[int], order: int = 0, flags: int = 0) -> int:
    guest.put(AT + 256, struct.pack(f"<{len(extents)}Q", *extents))
    return guest.op(MEMORY, op, abi.RESERVATION.pack(AT + 256, len(extents), order, flags, DOMID_SELF))[0]


def test_shared_info(guest: Guest) -> None:
    pages = guest.domain.tot_pages
    assert add(guest, MapSpace.SHARED_INFO, 0, 0x30) == 0
    assert guest.mfn(0x30) == guest.domain.shared_info_mfn
    assert guest.domain.tot_pages == pages - 1  # what stood there is gone
    assert add(guest, MapSpace.SHARED_INFO, 0, 0x5000) == 0
    assert guest.p2m.gfn_to_mfn(0x30) is None
    assert add(guest, MapSpace.SHARED_INFO, 1, 0x30) == -errno.EINVAL
    assert guest.domain.tot_pages == pages - 1


def test_a_guest_that_unmaps_its_shared_info_still_gets_events(guest: Guest) -> None:
    assert add(guest, MapSpace.SHARED_INFO, 0, 0x30) == 0
    assert guest.op(MEMORY, Xenmem.REMOVE_FROM_PHYSMAP, struct.pack("<H6xQ", DOMID_SELF, 0x30))[0] == 0
    assert guest.p2m.gfn_to_mfn(0x30) is None
    port = struct.unpack("<II", guest.op(Hypercall.EVENT_CHANNEL_OP, 7, struct.pack("<II", 0, 0))[1])[1]
    assert guest.op(Hypercall.EVENT_CHANNEL_OP, 4, struct.pack("<I", port))[0] == 0
    assert not guest.domain.is_shut_down


def test_grant_frames_come_as_they_are_mapped(guest: Guest) -> None:
    table = guest.domain.grant_table
    assert add(guest, MapSpace.GRANT_TABLE, 0, 0x100) == 0
    assert add(guest, MapSpace.GRANT_TABLE, 3, 0x103) == 0
    assert len(table.frames) == 4
    assert guest.mfn(0x103) == table.frames[3]
    assert add(guest, MapSpace.GRANT_TABLE, table.max_frames, 0x104) == -errno.EINVAL
    assert add(guest, MapSpace.GRANT_TABLE, abi.XENMAPIDX_GRANT_TABLE_STATUS, 0x104) == -errno.EINVAL
    assert add(guest, MapSpace.GRANT_TABLE, (1 << 64) - 1, 0x104) == -errno.EINVAL
    data = gnt.SETUP_TABLE.pack(DOMID_SELF, 2, 0, AT + 512)
    assert guest.op(GRANT, GnttabCmd.SETUP_TABLE, data, 1)[0] == 0
    assert struct.unpack("<QQ", guest.get(AT + 512, 16)) == (0x100, INVALID_M2P_ENTRY)


def test_moving_a_page(guest: Guest) -> None:
    mfn, pages = guest.mfn(0x30), guest.domain.tot_pages
    assert add(guest, MapSpace.GMFN, 0x30, 0x200) == 0
    assert guest.mfn(0x200) == mfn
    assert guest.p2m.gfn_to_mfn(0x30) is None
    assert guest.domain.tot_pages == pages
    assert add(guest, MapSpace.GMFN, 0x200, 0x200) == 0
    assert add(guest, MapSpace.GMFN, 0x30, 0x201) == -errno.EINVAL
    assert add(guest, MapSpace.GMFN, 0xFEE00, 0x201) == -errno.EINVAL


def test_a_range(guest: Guest) -> None:
    mfns = [guest.mfn(g) for g in range(0x30, 0x38)]
    assert add(guest, MapSpace.GMFN_RANGE, 0x30, 0x300, size=8) == 0
    assert [guest.mfn(g) for g in range(0x300, 0x308)] == mfns
    assert add(guest, MapSpace.GMFN_RANGE, 0x30, 0x400, size=0) == 0


@pytest.mark.parametrize(("space", "gpfn", "result"), [
    (MapSpace.SHARED_INFO, 1 << 28, -errno.EINVAL), (MapSpace.SHARED_INFO, (1 << 64) - 1, -errno.EINVAL),
    (MapSpace.GMFN_FOREIGN, 0x30, -errno.ENOSYS), (5, 0x30, -errno.ENOSYS), (99, 0x30, -errno.ENOSYS),
])
def test_places_and_spaces_that_are_not(guest: Guest, space: int, gpfn: int, result: int) -> None:
    assert add(guest, space, 0, gpfn) == result


def test_nobody_else_may(host: Machine, guest: Guest) -> None:
    other = Guest(host)
    assert add(guest, MapSpace.SHARED_INFO, 0, 0x30, domid=other.domid) == -errno.EPERM
    data = abi.ADD_TO_PHYSMAP_BATCH.pack(DOMID_SELF, MapSpace.GMFN_FOREIGN, 1, other.domid, AT + 64, AT + 72, AT + 80)
    assert guest.op(MEMORY, Xenmem.ADD_TO_PHYSMAP_BATCH, data)[0] == -errno.EPERM


def test_a_batch_has_a_result_for_each(guest: Guest) -> None:
    mfns = [guest.mfn(g) for g in (0x30, 0x31)]
    guest.put(AT + 256, struct.pack("<3Q", 0x30, 0x3000000, 0x31) + struct.pack("<3Q", 0x100, 0x101, 0x102))
    data = abi.ADD_TO_PHYSMAP_BATCH.pack(DOMID_SELF, MapSpace.GMFN, 3, 0, AT + 256, AT + 280, AT + 512)
    assert guest.op(MEMORY, Xenmem.ADD_TO_PHYSMAP_BATCH, data)[0] == 0
    assert struct.unpack("<3i", guest.get(AT + 512, 12)) == (0, -errno.EINVAL, 0)
    assert [guest.mfn(0x100), guest.mfn(0x102)] == mfns


def test_foreign_frames_are_held(host: Machine, guest: Guest) -> None:
    """Dom0 puts a frame of one domain into another's physmap: it lives until it is taken out."""
    other = Guest(host)
    mfn = other.mfn(0x30)
    buffer = bytearray(abi.ADD_TO_PHYSMAP_BATCH.pack(guest.domid, MapSpace.GMFN_FOREIGN, 1, other.domid, 0, 0, 0))
    index, gpfn, result = bytearray(struct.pack("<Q", 0x30)), bytearray(struct.pack("<Q", 0x5000)), bytearray(4)
    privcmd = host.privcmd

    def call() -> None:
        from pyxen.hypervisor.privcmd import Dom0Caller

        caller = Dom0Caller(host.hv.dom0, [buffer, index, gpfn, result])
        struct.pack_into("<QQQ", buffer, 8, *(caller.address(n) for n in (1, 2, 3)))
        assert privcmd._table[MEMORY].handler(caller, Xenmem.ADD_TO_PHYSMAP_BATCH, caller.address(0)) == 0

    call()
    assert result == bytearray(4)
    assert guest.p2m.get_entry(0x5000) == (mfn, P2mType.MAP_FOREIGN, 0)
    host.destroy(other.domain)
    assert host.hv.frames.page_owner(mfn) == other.domid  # still
    host.destroy(guest.domain)
    assert host.hv.frames.page_owner(mfn) is None
    host.hv.reap()
    assert host.hv.allocator.free_frames == host.baseline


def test_ballooning(guest: Guest) -> None:
    pages, mfn = guest.domain.tot_pages, guest.mfn(0x30)
    assert reserve(guest, Xenmem.DECREASE_RESERVATION, [0x30, 0x31]) == 2
    assert guest.domain.tot_pages == pages - 2
    assert guest.p2m.gfn_to_mfn(0x30) is None
    assert guest.hv.frames.page_owner(mfn) is None
    assert reserve(guest, Xenmem.DECREASE_RESERVATION, [0x30]) == 0
    assert reserve(guest, Xenmem.DECREASE_RESERVATION, [0x32, 0xFEE00, 0x33]) == 1
    assert reserve(guest, Xenmem.POPULATE_PHYSMAP, [0x30, 0x31, 0x32]) == 3
    assert guest.domain.tot_pages == pages
    assert guest.get(0x30000, 4096) == bytes(4096)
    assert struct.unpack("<3Q", guest.get(AT + 256, 24)) == (0x30, 0x31, 0x32)  # no machine frame is told
    assert guest.hv.frames.m2p.get(guest.mfn(0x31)) == 0x31


def test_populating_in_2_mib(guest: Guest) -> None:
    assert reserve(guest, Xenmem.POPULATE_PHYSMAP, [0x400], order=9) == 1
    assert guest.p2m.get_entry(0x433)[2] == 9
    assert reserve(guest, Xenmem.DECREASE_RESERVATION, [0x433]) == 1
    assert guest.p2m.gfn_to_mfn(0x433) is None
    assert guest.p2m.get_entry(0x434)[2] == 0
    assert reserve(guest, Xenmem.DECREASE_RESERVATION, [0x400], order=9) == 0  # not all of it is there: it stops
    assert guest.p2m.gfn_to_mfn(0x432) is None  # what came before is gone, as in Xen


def test_populating_where_nothing_can_be(guest: Guest) -> None:
    pages = guest.domain.tot_pages
    assert reserve(guest, Xenmem.POPULATE_PHYSMAP, [0x300, 1 << 28]) == 1
    assert reserve(guest, Xenmem.POPULATE_PHYSMAP, [0x301], flags=abi.MEMF_POPULATE_ON_DEMAND) == 0
    guest.domain.hvm.pool.set_limit(guest.domain.hvm.pool.used)
    assert reserve(guest, Xenmem.POPULATE_PHYSMAP, [1 << 27]) == 0
    assert guest.domain.tot_pages == pages + 1


def test_exchange_is_refused(guest: Guest) -> None:
    data = struct.pack("<QQIIH6xQQIIH6xQ", AT + 256, 1, 0, 0, DOMID_SELF, AT + 264, 1, 0, 0, DOMID_SELF, 0)
    assert guest.op(MEMORY, Xenmem.EXCHANGE, data)[0] == -errno.EOPNOTSUPP


def test_the_highest_frame(guest: Guest) -> None:
    assert guest.op(MEMORY, Xenmem.MAXIMUM_GPFN, struct.pack("<H6x", DOMID_SELF))[0] == 63
    assert add(guest, MapSpace.SHARED_INFO, 0, 0x7000) == 0
    assert guest.op(MEMORY, Xenmem.MAXIMUM_GPFN, struct.pack("<H6x", DOMID_SELF))[0] == 0x7000


# --- grants ----------------------------------------------------------------------------------------


@pytest.fixture
def pair(host: Machine) -> tuple[Guest, Guest]:
    """Mapper (on the engine) and granter, whose reference 8 + n grants frame 0x30 + n; 16 + n read-only."""
    granter, mapper = host.guest(), host.guest()
    base = granter.domain.grant_table.frames[0] << 9
    for n in range(8):
        host.memory.q[base + 8 + n] = 1 | mapper.domid << 16 | (0x30 + n) << 32
        host.memory.q[base + 16 + n] = 1 | 4 | mapper.domid << 16 | (0x30 + n) << 32
    granter.domain.evtchn.home_thread = mapper.domain.evtchn.home_thread
    return mapper, granter


def gmap(mapper: Guest, granter: Guest, ref: int, address: int, flags: int = Gntmap.HOST_MAP) -> tuple[int, int]:
    data = gnt.MAP_GRANT_REF.pack(address, flags, ref, granter.domid, 0, 0, 0)
    result, data = mapper.op(GRANT, GnttabCmd.MAP_GRANT_REF, data, 1)
    assert result == 0
    fields = gnt.MAP_GRANT_REF.unpack(data)
    return fields[4], fields[5]


def gunmap(mapper: Guest, handle: int, address: int) -> int:
    result, data = mapper.op(GRANT, GnttabCmd.UNMAP_GRANT_REF, gnt.UNMAP_GRANT_REF.pack(address, 0, handle, 0), 1)
    assert result == 0
    return int(gnt.UNMAP_GRANT_REF.unpack(data)[3])


def test_a_grant_is_mapped_at_a_guest_physical_address(pair: tuple[Guest, Guest]) -> None:
    mapper, granter = pair
    frames, mfn = mapper.hv.frames, granter.mfn(0x31)
    before = frames.count_info[mfn], frames.type_info[mfn]
    status, handle = gmap(mapper, granter, 9, 0x500000)
    assert status == Gntst.OKAY
    assert mapper.p2m.get_entry(0x500) == (mfn, P2mType.GRANT_MAP_RW, 0)
    assert frames.m2p.get(mfn) == 0x31  # the granter's number stays
    assert frames.count_info[mfn] == before[0] + 1
    assert gunmap(mapper, handle, 0x500000) == Gntst.OKAY
    assert mapper.p2m.gfn_to_mfn(0x500) is None
    assert (frames.count_info[mfn], frames.type_info[mfn] & 0xFF) == (before[0], before[1] & 0xFF)
    assert gunmap(mapper, handle, 0x500000) == Gntst.BAD_HANDLE


def test_read_only_grants(pair: tuple[Guest, Guest]) -> None:
    mapper, granter = pair
    assert gmap(mapper, granter, 17, 0x500000)[0] == Gntst.GENERAL_ERROR
    status, handle = gmap(mapper, granter, 17, 0x500000, Gntmap.HOST_MAP | Gntmap.READONLY)
    assert status == Gntst.OKAY
    entry, _ = mapper.p2m.table.lookup(0x500)
    assert entry & 3 == 1
    assert gunmap(mapper, handle, 0x501000) == Gntst.GENERAL_ERROR
    assert gunmap(mapper, handle, 0x500000) == Gntst.OKAY


@pytest.mark.parametrize(("address", "flags"), [
    (0x500008, 2), (1 << 40, 2), (0x500000, 2 | 16), ((1 << 64) - 4096, 2)])
def test_addresses_that_cannot_be(pair: tuple[Guest, Guest], address: int, flags: int) -> None:
    mapper, granter = pair
    assert gmap(mapper, granter, 8, address, flags)[0] == Gntst.GENERAL_ERROR
    assert not granter.domain.grant_table.active
    assert not mapper.domain.grant_table.maptrack


def test_mapping_over_a_grant_crashes_the_mapper_only(pair: tuple[Guest, Guest]) -> None:
    mapper, granter = pair
    assert gmap(mapper, granter, 8, 0x500000)[0] == Gntst.OKAY
    assert gmap(mapper, granter, 9, 0x500000)[0] == Gntst.GENERAL_ERROR
    assert mapper.domain.is_shut_down
    assert not granter.domain.is_shut_down
    assert "grant or foreign" in mapper.domain.crash_reason


def test_grants_of_frames_that_are_not_there(pair: tuple[Guest, Guest]) -> None:
    mapper, granter = pair
    base = granter.domain.grant_table.frames[0] << 9
    q = mapper.hv.memory.q
    for frame in (0x5000, 0xFEE00, 0xFFFFFFFF):
        q[base + 30] = 1 | mapper.domid << 16 | frame << 32
        assert gmap(mapper, granter, 30, 0x500000)[0] == Gntst.BAD_PAGE
        assert q[base + 30] & 0x18 == 0
    granter.p2m.set_entry(0x30, granter.mfn(0x30), 0, P2mType.RAM_RO)
    assert gmap(mapper, granter, 8, 0x500000)[0] == Gntst.BAD_PAGE
    # what it has mapped itself is not its to grant
    status, _handle = gmap(mapper, granter, 9, 0x600000)
    assert status == Gntst.OKAY
    own = mapper.domain.grant_table.frames[0] << 9
    q[own + 8] = 1 | granter.domid << 16 | 0x600 << 32
    with pytest.raises(XenError):
        mapper.domain.grant_table.pin(8, granter.domid, 1, readonly=True, mapping=False)


def test_the_end_of_either(host: Machine, pair: tuple[Guest, Guest]) -> None:
    mapper, granter = pair
    assert gmap(mapper, granter, 8, 0x500000)[0] == Gntst.OKAY
    host.destroy(granter.domain)
    assert granter.domid in host.hv.domains  # its frame is in use
    host.destroy(mapper.domain)
    host.hv.reap()
    assert granter.domid not in host.hv.domains
    assert host.hv.allocator.free_frames == host.baseline


def test_copies_name_guest_frames(pair: tuple[Guest, Guest]) -> None:
    mapper, granter = pair
    granter.put(0x30000, b"granted")
    data = gnt.COPY.pack(8, granter.domid, 0, 0x35, DOMID_SELF, 16, 7, gnt.GNTCOPY_SOURCE_GREF, 0)
    result, data = mapper.op(GRANT, GnttabCmd.COPY, data, 1)
    assert (result, gnt.COPY.unpack(data)[8]) == (0, Gntst.OKAY)
    assert mapper.get(0x35010, 7) == b"granted"
    data = gnt.COPY.pack(0x5000, DOMID_SELF, 0, 0x35, DOMID_SELF, 16, 7, 0, 0)
    result, data = mapper.op(GRANT, GnttabCmd.COPY, data, 1)
    assert gnt.COPY.unpack(data)[8] == Gntst.BAD_PAGE


def test_dom0_maps_what_a_pvh_guest_grants(host: Machine, guest: Guest) -> None:
    base = guest.domain.grant_table.frames[0] << 9
    host.memory.q[base + 8] = 1 | 0 << 16 | 0x30 << 32
    guest.put(0x30000, b"ring")
    (mapping,) = host.privcmd.gnttab_map(guest.domid, [8])
    assert bytes(mapping.view[:4]) == b"ring"
    mapping.unmap()
    with host.privcmd.foreign_map(guest.domid, 0x30) as foreign:
        assert bytes(foreign.view[:4]) == b"ring"


def test_foreign_mappings_are_by_guest_frame(host: Machine, guest: Guest) -> None:
    """And have pieces where machine memory has no run."""
    guest.p2m.add_entry(0x31, guest.mfn(0x3A), 0, P2mType.RAM_RW)
    with host.privcmd.foreign_map(guest.domid, 0x30, 3) as mapping:
        assert len(mapping.pieces) == 3
        with pytest.raises(XenError):
            _ = mapping.view
        mapping.write(4094, b"abcd")
        assert mapping.read(4094, 4) == b"abcd"
    assert guest.get(0x30FFE, 2) + guest.get(0x31000, 2) == b"abcd"
    host.privcmd.write_physical(guest.domid, 0x31FFF, b"xyz")
    assert host.privcmd.read_physical(guest.domid, 0x31FFF, 3) == b"xyz"
    for first, count in ((0x3E, 3), (0xFEE00, 1), (1 << 40, 1)):
        with pytest.raises(XenError) as caught:
            host.privcmd.foreign_map(guest.domid, first, count)
        assert caught.value.errno == errno.EINVAL
    host.destroy(guest.domain)
    assert host.hv.allocator.free_frames == host.baseline
