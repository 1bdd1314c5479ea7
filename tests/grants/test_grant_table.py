# SPDX-License-Identifier: GPL-2.0-only
"""The table itself, copies, and the odd operations of HYPERVISOR_grant_table_op."""

from __future__ import annotations

import errno
import struct

import pytest

from pyxen.abi import grant_table as abi
from pyxen.abi.grant_table import Gntst, Gtf
from pyxen.abi.xen import DOMID_SELF, PAGE_SIZE
from pyxen.errors import XenError
from pyxen.hypervisor.grant_table import do_grant_table_op, dump_grant_tables
from tests.events.fake_hypervisor import FakeCaller
from tests.grants.conftest import ARG, Grants

SELF = int(DOMID_SELF)
SOURCE_REF, DEST_REF = abi.GNTCOPY_SOURCE_GREF, abi.GNTCOPY_DEST_GREF


def setup_table(grants: Grants, domid: int, nr_frames: int, frame_list: int = ARG + 0x100) -> tuple[int, list[int]]:
    caller = FakeCaller(grants.one)
    out = grants.op(caller, 2, abi.SETUP_TABLE.pack(domid, nr_frames, 99, frame_list))
    status = abi.SETUP_TABLE.unpack(out)[2]
    return status, list(struct.unpack(f"<{nr_frames}Q", caller.read(ARG + 0x100, 8 * nr_frames))) if status == 0 else []


def test_setup_table_grows_and_lists_frames(grants: Grants) -> None:
    status, frames = setup_table(grants, SELF, 3)
    assert status == Gntst.OKAY
    assert frames == grants.one.grant_table.frames
    assert len(set(frames)) == 3
    assert all(grants.host.frames.owner[mfn] is grants.one for mfn in frames)
    assert setup_table(grants, SELF, 1) == (Gntst.OKAY, frames[:1])
    assert grants.one.grant_table.nr_entries == 3 * 512


def test_setup_table_limits(grants: Grants) -> None:
    assert setup_table(grants, SELF, 33)[0] == Gntst.GENERAL_ERROR
    assert setup_table(grants, 77, 1)[0] == Gntst.BAD_DOMAIN
    assert setup_table(grants, SELF, 1, frame_list=0xFFFF_8000_0000_0000)[0] == Gntst.BAD_VIRT_ADDR
    grants.host.xsm.refuse.add("grant_setup")
    assert setup_table(grants, 2, 1)[0] == Gntst.PERMISSION_DENIED
    with pytest.raises(XenError) as caught:
        do_grant_table_op(FakeCaller(grants.one), 2, ARG, 2)
    assert caught.value.errno == errno.EINVAL


def test_a_table_that_cannot_grow_says_so(grants: Grants) -> None:
    grants.host.frames._next = grants.host.memory.nr_frames
    assert setup_table(grants, SELF, 2)[0] == Gntst.GENERAL_ERROR


def test_query_size(grants: Grants) -> None:
    def query(domid: int) -> tuple[int, ...]:
        out = grants.op(FakeCaller(grants.one), 6, abi.QUERY_SIZE.pack(domid, 7, 7, 99))
        return abi.QUERY_SIZE.unpack(out)[1:]

    assert query(SELF) == (1, 32, Gntst.OKAY)
    assert query(77) == (7, 7, Gntst.BAD_DOMAIN)
    grants.host.xsm.refuse.add("grant_query_size")
    assert query(2) == (7, 7, Gntst.PERMISSION_DENIED)


# --- versions ---------------------------------------------------------------------------------------------


def test_only_version_1(grants: Grants) -> None:
    caller = FakeCaller(grants.one)
    assert grants.op(caller, 8, abi.SET_VERSION.pack(1)) == abi.SET_VERSION.pack(1)
    assert grants.op(caller, 10, abi.GET_VERSION.pack(SELF, 0, 9)) == abi.GET_VERSION.pack(SELF, 0, 1)
    caller.write(ARG, abi.SET_VERSION.pack(2))
    with pytest.raises(XenError) as caught:
        do_grant_table_op(caller, 8, ARG, 1)
    assert caught.value.errno == errno.ENOSYS
    assert caller.read_u32(ARG) == 1
    caller.write(ARG, abi.SET_VERSION.pack(3))
    with pytest.raises(XenError) as caught:
        do_grant_table_op(caller, 8, ARG, 1)
    assert caught.value.errno == errno.EINVAL
    out = grants.op(caller, 9, abi.GET_STATUS_FRAMES.pack(1, SELF, 99, ARG))
    assert abi.GET_STATUS_FRAMES.unpack(out)[2] == Gntst.GENERAL_ERROR


def test_get_version_of_another_domain_passes_xsm(grants: Grants) -> None:
    caller = FakeCaller(grants.one)
    for domid, refuse, number in ((77, "", errno.ESRCH), (2, "grant_query_size", errno.EPERM)):
        grants.host.xsm.refuse = {refuse}
        caller.write(ARG, abi.GET_VERSION.pack(domid, 0, 0))
        with pytest.raises(XenError) as caught:
            do_grant_table_op(caller, 10, ARG, 1)
        assert caught.value.errno == number


@pytest.mark.parametrize("cmd", [3, 4, 13, 0xFFFFFFFF])
def test_what_is_not_offered(grants: Grants, cmd: int) -> None:
    with pytest.raises(XenError) as caught:
        do_grant_table_op(FakeCaller(grants.one), cmd, ARG, 1)
    assert caught.value.errno == errno.ENOSYS


def test_a_negative_count_is_refused(grants: Grants) -> None:
    for count in (0x80000000, (1 << 64) - 1):
        with pytest.raises(XenError) as caught:
            do_grant_table_op(FakeCaller(grants.one), 0, ARG, count)
        assert caught.value.errno == errno.EINVAL


# --- swap -----------------------------------------------------------------------------------------------------


def test_swap_exchanges_unused_entries(grants: Grants) -> None:
    def swap(a: int, b: int) -> int:
        out = grants.op(FakeCaller(grants.one), 11, abi.SWAP_GRANT_REF.pack(a, b, 99))
        return int(abi.SWAP_GRANT_REF.unpack(out)[2])

    grants.grant(grants.one, 8, 40, grants.two)
    assert swap(8, 511) == Gntst.OKAY
    assert grants.one.grant_table.entry(511) == (Gtf.PERMIT_ACCESS, 2, 40)
    assert grants.one.grant_table.entry(8) == (0, 0, 0)
    assert swap(511, 511) == Gntst.OKAY
    assert swap(511, 512) == Gntst.BAD_GNTREF
    grants.map(grants.two, grants.one, 511)
    assert swap(8, 511) == Gntst.EAGAIN


# --- copy -----------------------------------------------------------------------------------------------------


def test_copy_from_a_grant(grants: Grants) -> None:
    grants.host.memory.write(40 * PAGE_SIZE + 100, b"payload")
    grants.grant(grants.one, 8, 40, grants.two, int(Gtf.READONLY))
    assert grants.copy(grants.two, (8, 1, 100), (48, SELF, 4089), 7, SOURCE_REF) == Gntst.OKAY
    assert grants.host.memory.read(48 * PAGE_SIZE + 4089, 7) == b"payload"
    assert grants.host.memory.written_frames == [48]
    assert grants.flags(grants.one, 8) == Gtf.PERMIT_ACCESS | Gtf.READONLY
    assert not grants.host.frames.held()
    assert not grants.one.grant_table.active


def test_copy_to_a_grant_and_between_two(grants: Grants) -> None:
    grants.host.memory.write(48 * PAGE_SIZE, b"abc")
    grants.grant(grants.one, 8, 40, grants.two)
    grants.grant(grants.one, 9, 41, grants.two)
    assert grants.copy(grants.two, (48, SELF, 0), (8, 1, 0), 3, DEST_REF) == Gntst.OKAY
    assert grants.copy(grants.two, (8, 1, 0), (9, 1, 1), 3, SOURCE_REF | DEST_REF) == Gntst.OKAY
    assert grants.host.memory.read(41 * PAGE_SIZE, 4) == b"\0abc"
    assert not grants.host.frames.held()


def test_copy_within_one_own_page(grants: Grants) -> None:
    grants.host.memory.write(48 * PAGE_SIZE, bytes(range(200)))
    assert grants.copy(grants.two, (48, SELF, 0), (48, SELF, 50), 150, 0) == Gntst.OKAY
    assert grants.host.memory.read(48 * PAGE_SIZE + 50, 150) == bytes(range(150))


@pytest.mark.parametrize(("source", "dest", "length", "flags", "status"), [
    ((48, SELF, 4000), (49, SELF, 0), 97, 0, Gntst.BAD_COPY_ARG),
    ((48, SELF, 0), (49, SELF, 4095), 2, 0, Gntst.BAD_COPY_ARG),
    ((48, SELF, 0xFFFF), (49, SELF, 0), 0xFFFF, 0, Gntst.BAD_COPY_ARG),
    ((40, 1, 0), (49, SELF, 0), 1, 0, Gntst.PERMISSION_DENIED),
    ((48, 2, 0), (49, SELF, 0), 1, 0, Gntst.PERMISSION_DENIED),
    ((8, 77, 0), (49, SELF, 0), 1, SOURCE_REF, Gntst.BAD_DOMAIN),
    ((600, 1, 0), (49, SELF, 0), 1, SOURCE_REF, Gntst.BAD_GNTREF),
    ((9, 1, 0), (49, SELF, 0), 1, SOURCE_REF, Gntst.GENERAL_ERROR),
    ((48, SELF, 0), (8, 1, 0), 1, DEST_REF, Gntst.GENERAL_ERROR),
    ((40, SELF, 0), (49, SELF, 0), 1, 0, Gntst.BAD_PAGE),
    ((1 << 63, SELF, 0), (49, SELF, 0), 1, 0, Gntst.BAD_PAGE),
    ((48, SELF, 0), (40, SELF, 0), 1, 0, Gntst.BAD_PAGE),
])
def test_bad_copies(grants: Grants, source: tuple[int, int, int], dest: tuple[int, int, int], length: int, flags: int,
                    status: Gntst) -> None:
    grants.grant(grants.one, 8, 40, grants.two, int(Gtf.READONLY))
    before = bytes(grants.host.memory.b[40 * PAGE_SIZE : 56 * PAGE_SIZE])
    assert grants.copy(grants.two, source, dest, length, flags) == status
    assert bytes(grants.host.memory.b[40 * PAGE_SIZE : 56 * PAGE_SIZE]) == before
    assert not grants.host.frames.held()
    assert not grants.one.grant_table.active


def test_copy_never_writes_a_page_table(grants: Grants) -> None:
    frames = grants.host.frames
    frames.page_type[49], frames.type_refs[49] = -1, 1
    assert grants.copy(grants.two, (48, SELF, 0), (49, SELF, 0), 8, 0) == Gntst.GENERAL_ERROR
    assert not frames.held()


def test_copy_passes_xsm(grants: Grants) -> None:
    grants.host.xsm.refuse.add("grant_copy")
    assert grants.copy(grants.two, (48, SELF, 0), (49, SELF, 0), 8, 0) == Gntst.PERMISSION_DENIED


# --- cache_flush ----------------------------------------------------------------------------------------------


def test_cache_flush_checks_what_it_is_given(grants: Grants) -> None:
    def flush(mfn: int, offset: int, length: int, op: int) -> int:
        caller = FakeCaller(grants.two)
        caller.write(ARG, abi.CACHE_FLUSH.pack(mfn * PAGE_SIZE, offset, length, op))
        try:
            return do_grant_table_op(caller, 12, ARG, 1)
        except XenError as error:
            return -error.errno

    assert flush(48, 0, 64, abi.GNTTAB_CACHE_CLEAN) == 0
    assert flush(48, 0, 64, 3) == 0
    assert flush(48, 0, 64, abi.GNTTAB_CACHE_INVAL) == -errno.EOPNOTSUPP
    assert flush(48, 4090, 64, 1) == -errno.EINVAL
    assert flush(48, 4096, 0, 1) == -errno.EINVAL
    assert flush(48, 0, 64, abi.GNTTAB_CACHE_SOURCE_GREF | 1) == -errno.EOPNOTSUPP
    assert flush(1000, 0, 64, 1) == -errno.EINVAL
    assert flush(100, 0, 64, 1) == -errno.EPERM
    assert flush(40, 0, 64, 1) == -errno.EINVAL
    grants.grant(grants.one, 8, 40, grants.two)
    grants.map(grants.two, grants.one, 8)
    assert flush(40, 0, 64, 1) == 0


# --- debug key g ------------------------------------------------------------------------------------------------


def test_debug_key_g(grants: Grants) -> None:
    grants.grant(grants.one, 0x208 & 0x1FF, 40, grants.two)
    grants.map(grants.two, grants.one, 8)
    dump_grant_tables(grants.host)  # type: ignore[arg-type]
    head = ["      -------- active --------       -------- shared --------",
            "[ref] localdom mfn      pin          localdom gmfn     flags"]
    assert grants.host.log.lines == [
        "gnttab_usage_print_all [ key 'g' pressed",
        *head, "grant-table for remote d0 (v1)", "  1 frames (32 max), 0 maptrack frames (256 max)",
        "no active grant table entries",
        *head, "grant-table for remote d1 (v1)", "  1 frames (32 max), 0 maptrack frames (256 max)",
        "[0x008]      2 0x000028 0x00000001          2 0x000028 0x19",
        *head, "grant-table for remote d2 (v1)", "  1 frames (32 max), 1 maptrack frames (256 max)",
        "no active grant table entries",
        "gnttab_usage_print_all ] done",
    ]
