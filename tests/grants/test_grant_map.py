# SPDX-License-Identifier: GPL-2.0-only
"""Rules of mapping and unmapping grants, one test each."""

from __future__ import annotations

import pytest

from pyxen.abi import grant_table as abi
from pyxen.abi.grant_table import Gntmap, Gntst, Gtf
from pyxen.abi.xen import PAGE_SIZE
from pyxen.errors import GuestAccessError
from pyxen.hypervisor.grant_entry import GrantError
from pyxen.hypervisor.grant_table import do_grant_table_op, map_for_backend
from pyxen.hypervisor.hypercall import Preempted
from tests.events.fake_hypervisor import FakeCaller
from tests.grants.conftest import ARG, BAD_VA, Grants, elsewhere

HOST, DEV, RO = int(Gntmap.HOST_MAP), int(Gntmap.DEVICE_MAP), int(Gntmap.READONLY)
R, W = Gtf.READING, Gtf.WRITING


def idle(grants: Grants) -> bool:
    """Nothing is mapped, pinned or held."""
    tables = [domain.grant_table for domain in (grants.host.dom0, grants.one, grants.two)]
    return (not grants.host.frames.held() and not grants.tables.ptes
            and not any(table.active or table.maptrack for table in tables))


def test_a_writable_mapping_and_back(grants: Grants) -> None:
    grants.grant(grants.one, 8, 40, grants.two)
    status, handle, bus = grants.map(grants.two, grants.one, 8)
    assert (status, bus) == (Gntst.OKAY, 40 * PAGE_SIZE)
    assert grants.flags(grants.one, 8) == Gtf.PERMIT_ACCESS | R | W
    assert grants.one.grant_table.active[8].pin == 0x00000001
    assert grants.host.frames.refs[40] == grants.host.frames.type_refs[40] == 1
    assert grants.tables.ptes == {(2, 0x5000): (40, 0)}
    assert grants.unmap(grants.two, handle) == Gntst.OKAY
    assert grants.flags(grants.one, 8) == Gtf.PERMIT_ACCESS
    assert grants.host.memory.written_frames == [40]
    assert idle(grants)


def test_a_read_only_mapping_takes_no_type(grants: Grants) -> None:
    grants.grant(grants.one, 8, 40, grants.two, int(Gtf.READONLY))
    status, handle, _ = grants.map(grants.two, grants.one, 8, flags=HOST | RO)
    assert status == Gntst.OKAY
    assert grants.flags(grants.one, 8) == Gtf.PERMIT_ACCESS | Gtf.READONLY | R
    assert grants.one.grant_table.active[8].pin == 0x00000100
    assert grants.host.frames.type_refs[40] == 0
    assert grants.unmap(grants.two, handle) == Gntst.OKAY
    assert idle(grants)


def test_a_read_only_grant_cannot_be_mapped_writable(grants: Grants) -> None:
    grants.grant(grants.one, 8, 40, grants.two, int(Gtf.READONLY))
    assert grants.map(grants.two, grants.one, 8)[0] == Gntst.GENERAL_ERROR
    ok, handle, _ = grants.map(grants.two, grants.one, 8, flags=HOST | RO)
    assert ok == Gntst.OKAY
    assert grants.map(grants.two, grants.one, 8)[0] == Gntst.GENERAL_ERROR  # nor while it is in use
    grants.unmap(grants.two, handle)
    assert idle(grants)


def test_the_last_writer_clears_writing_the_last_user_reading(grants: Grants) -> None:
    grants.grant(grants.one, 8, 40, grants.two)
    _, reader, _ = grants.map(grants.two, grants.one, 8, va=0x6000, flags=HOST | RO)
    _, writer, _ = grants.map(grants.two, grants.one, 8, va=0x7000)
    assert grants.flags(grants.one, 8) & (R | W) == R | W
    grants.unmap(grants.two, writer, va=0x7000)
    assert grants.flags(grants.one, 8) & (R | W) == R
    grants.unmap(grants.two, reader, va=0x6000)
    assert grants.flags(grants.one, 8) & (R | W) == 0
    assert idle(grants)


def test_only_the_domain_that_is_named_may_map(grants: Grants) -> None:
    grants.grant(grants.one, 8, 40, grants.host.dom0)
    assert grants.map(grants.two, grants.one, 8)[0] == Gntst.GENERAL_ERROR
    assert idle(grants)


def test_an_entry_in_use_keeps_its_user_whatever_the_granter_writes(grants: Grants) -> None:
    grants.grant(grants.one, 8, 40, grants.two)
    _, handle, _ = grants.map(grants.two, grants.one, 8)
    grants.grant(grants.one, 8, 41, grants.one)
    assert grants.map(grants.one, grants.one, 8)[0] == Gntst.GENERAL_ERROR
    status, second, bus = grants.map(grants.two, grants.one, 8, va=0x8000, flags=HOST | RO)
    assert (status, bus) == (Gntst.OKAY, 40 * PAGE_SIZE)  # the frame that was granted first
    grants.unmap(grants.two, handle)
    grants.unmap(grants.two, second, va=0x8000)
    assert idle(grants)


@pytest.mark.parametrize("kind", [Gtf.INVALID, Gtf.ACCEPT_TRANSFER, Gtf.TRANSITIVE, Gtf.PERMIT_ACCESS | Gtf.SUB_PAGE])
def test_other_kinds_of_entry_cannot_be_mapped(grants: Grants, kind: Gtf) -> None:
    grants.host.memory.q[grants.one.grant_table._word(8)] = int(kind) | 2 << 16 | 40 << 32
    assert grants.map(grants.two, grants.one, 8)[0] == Gntst.GENERAL_ERROR
    assert idle(grants)


def test_one_may_map_ones_own_grant(grants: Grants) -> None:
    grants.grant(grants.one, 8, 40, grants.one)
    status, handle, _ = grants.map(grants.one, grants.one, 8)
    assert status == Gntst.OKAY
    assert grants.unmap(grants.one, handle) == Gntst.OKAY
    assert idle(grants)


@pytest.mark.parametrize("frame", [48, 60, 255, 256, 0xFFFFFFFF])
def test_the_frame_must_be_the_granters(grants: Grants, frame: int) -> None:
    grants.grant(grants.one, 8, frame, grants.two)
    assert grants.map(grants.two, grants.one, 8)[0] == Gntst.BAD_PAGE
    assert grants.flags(grants.one, 8) == Gtf.PERMIT_ACCESS
    assert idle(grants)


def test_a_page_table_can_be_granted_for_reading_only(grants: Grants) -> None:
    frames = grants.host.frames
    frames.page_type[40], frames.type_refs[40] = -1, 1
    grants.grant(grants.one, 8, 40, grants.two)
    assert grants.map(grants.two, grants.one, 8)[0] == Gntst.GENERAL_ERROR
    assert grants.flags(grants.one, 8) == Gtf.PERMIT_ACCESS
    status, handle, _ = grants.map(grants.two, grants.one, 8, flags=HOST | RO)
    assert status == Gntst.OKAY
    grants.unmap(grants.two, handle)
    assert idle(grants)


@pytest.mark.parametrize(("granter", "ref", "flags", "status"), [
    (1, 512, HOST, Gntst.BAD_GNTREF),
    (1, 0xFFFFFFFF, HOST, Gntst.BAD_GNTREF),
    (77, 8, HOST, Gntst.BAD_DOMAIN),
    (1, 8, 0, Gntst.BAD_GNTREF),
    (1, 8, RO, Gntst.BAD_GNTREF),
])
def test_bad_arguments_of_map(grants: Grants, granter: int, ref: int, flags: int, status: Gntst) -> None:
    grants.grant(grants.one, 8, 40, grants.two)
    data = abi.MAP_GRANT_REF.pack(0x5000, flags, ref, granter, 99, 0, 0)
    assert abi.MAP_GRANT_REF.unpack(grants.op(FakeCaller(grants.two), 0, data))[4] == status
    assert idle(grants)


def test_a_bad_address_undoes_everything(grants: Grants) -> None:
    grants.grant(grants.one, 8, 40, grants.two)
    assert grants.map(grants.two, grants.one, 8, va=BAD_VA)[0] == Gntst.GENERAL_ERROR
    assert grants.flags(grants.one, 8) == Gtf.PERMIT_ACCESS
    assert idle(grants)


def test_xsm_can_refuse(grants: Grants) -> None:
    grants.grant(grants.one, 8, 40, grants.two)
    _, handle, _ = grants.map(grants.two, grants.one, 8)
    grants.host.xsm.refuse |= {"grant_mapref", "grant_unmapref"}
    assert grants.map(grants.two, grants.one, 8)[0] == Gntst.PERMISSION_DENIED
    assert grants.unmap(grants.two, handle) == Gntst.PERMISSION_DENIED


def test_a_reference_has_at_most_128_uses_of_a_kind(grants: Grants) -> None:
    """GNTPIN: eight bits a count; the top bit set means that the next could overflow into its neighbour."""
    grants.grant(grants.one, 8, 40, grants.two)
    for i in range(128):
        assert grants.map(grants.two, grants.one, 8, va=0x100000 + i * PAGE_SIZE)[0] == Gntst.OKAY
    assert grants.map(grants.two, grants.one, 8)[0] == Gntst.GENERAL_ERROR
    assert grants.one.grant_table.active[8].pin == 128


def test_handles_are_limited(grants: Grants) -> None:
    grants.two.grant_table.max_maptrack_frames = 0
    grants.grant(grants.one, 8, 40, grants.two)
    assert grants.map(grants.two, grants.one, 8)[0] == Gntst.NO_DEVICE_SPACE
    assert idle(grants)


# --- unmap -----------------------------------------------------------------------------------------------


def test_a_handle_is_good_once(grants: Grants) -> None:
    grants.grant(grants.one, 8, 40, grants.two)
    _, handle, _ = grants.map(grants.two, grants.one, 8)
    assert grants.unmap(grants.two, handle) == Gntst.OKAY
    assert grants.unmap(grants.two, handle) == Gntst.BAD_HANDLE
    assert grants.unmap(grants.two, 0xFFFFFFFF) == Gntst.BAD_HANDLE
    assert idle(grants)


def test_a_handle_twice_in_one_batch_is_unmapped_once(grants: Grants) -> None:
    grants.grant(grants.one, 8, 40, grants.two)
    _, handle, _ = grants.map(grants.two, grants.one, 8, flags=HOST | RO)
    data = abi.UNMAP_GRANT_REF.pack(0x5000, 0, handle, 99) * 2
    out = grants.op(FakeCaller(grants.two), 1, data, count=2)
    assert [abi.UNMAP_GRANT_REF.unpack_from(out, at)[3] for at in (0, 24)] == [Gntst.OKAY, Gntst.BAD_HANDLE]
    assert idle(grants)


def test_another_domains_handle_is_not_ours(grants: Grants) -> None:
    grants.grant(grants.one, 8, 40, grants.two)
    _, handle, _ = grants.map(grants.two, grants.one, 8)
    assert grants.unmap(grants.one, handle) == Gntst.BAD_HANDLE


def test_unmapping_at_a_wrong_address_changes_nothing(grants: Grants) -> None:
    grants.grant(grants.one, 8, 40, grants.two)
    _, handle, _ = grants.map(grants.two, grants.one, 8)
    assert grants.unmap(grants.two, handle, va=0x9000) == Gntst.GENERAL_ERROR
    assert grants.one.grant_table.active[8].pin == 1
    assert grants.unmap(grants.two, handle) == Gntst.OKAY
    assert idle(grants)


def test_zero_addresses_are_left_alone(grants: Grants) -> None:
    grants.grant(grants.one, 8, 40, grants.two)
    _, handle, bus = grants.map(grants.two, grants.one, 8, flags=HOST | DEV)
    assert grants.one.grant_table.active[8].pin == 0x00010001
    assert grants.host.frames.refs[40] == 2
    assert grants.unmap(grants.two, handle, va=0) == Gntst.OKAY
    assert grants.one.grant_table.active[8].pin == 0x00010001
    assert grants.unmap(grants.two, handle, va=0, bus=bus + PAGE_SIZE) == Gntst.BAD_DEV_ADDR
    assert grants.unmap(grants.two, handle, va=0, bus=bus) == Gntst.OKAY
    assert grants.one.grant_table.active[8].pin == 0x00000001
    assert grants.unmap(grants.two, handle) == Gntst.OKAY
    assert idle(grants)


def test_a_wrong_bus_address_leaves_the_host_mapping(grants: Grants) -> None:
    grants.grant(grants.one, 8, 40, grants.two)
    _, handle, _ = grants.map(grants.two, grants.one, 8, flags=HOST | DEV)
    assert grants.unmap(grants.two, handle, bus=PAGE_SIZE) == Gntst.BAD_DEV_ADDR
    assert grants.tables.ptes


def test_unmap_and_replace_moves_another_mapping_there(grants: Grants) -> None:
    grants.grant(grants.one, 8, 40, grants.two)
    _, handle, _ = grants.map(grants.two, grants.one, 8)
    grants.tables.ptes[2, 0x9000] = 50, 0
    out = grants.op(FakeCaller(grants.two), 7, abi.UNMAP_AND_REPLACE.pack(0x5000, 0x9000, handle, 99))
    assert abi.UNMAP_AND_REPLACE.unpack(out)[3] == Gntst.OKAY
    assert grants.tables.ptes == {(2, 0x5000): (50, 0)}
    assert not grants.host.frames.held()


def test_the_mapper_flushes_before_references_go(grants: Grants) -> None:
    order: list[str] = []
    frames = grants.host.frames
    flush, put = frames.flush, frames.put_page_and_type
    frames.flush = lambda domain: (order.append(f"flush d{domain.domid}"), flush(domain))  # type: ignore[assignment]
    frames.put_page_and_type = lambda mfn: (order.append("put"), put(mfn))  # type: ignore[assignment]
    grants.grant(grants.one, 8, 40, grants.two)
    _, handle, _ = grants.map(grants.two, grants.one, 8)
    grants.unmap(grants.two, handle)
    assert order == ["flush d2", "put"]


def test_a_bad_pointer_in_a_batch_of_unmaps_finishes_what_was_begun(grants: Grants) -> None:
    grants.grant(grants.one, 8, 40, grants.two)
    _, handle, _ = grants.map(grants.two, grants.one, 8)
    caller = FakeCaller(grants.two)
    last = caller.base + len(caller.buffer) - abi.UNMAP_GRANT_REF.size
    caller.write(last, abi.UNMAP_GRANT_REF.pack(0x5000, 0, handle, 99))
    with pytest.raises(GuestAccessError):
        do_grant_table_op(caller, 1, last, 2)
    assert idle(grants)


def test_batches_are_preempted_between_elements(grants: Grants) -> None:
    for ref in range(8, 80):
        grants.grant(grants.one, ref, 40 + ref % 8, grants.two)
    caller = FakeCaller(grants.two)

    def in_slices(cmd: int, size: int) -> None:
        arguments, rounds = (cmd, ARG, 72), 0
        while True:
            caller.preempt_at = 1 if rounds < 2 else 0  # long ago
            try:
                do_grant_table_op(caller, *arguments)
                break
            except Preempted as preempted:
                _, address, left = preempted.arguments
                assert (address - ARG) // size == 72 - left
                arguments = cmd, address, left
                rounds += 1
        assert rounds >= 2

    caller.write(ARG, b"".join(abi.MAP_GRANT_REF.pack(ref * PAGE_SIZE, HOST, ref, 1, 99, 0, 0) for ref in range(8, 80)))
    in_slices(0, 32)
    maps = [abi.MAP_GRANT_REF.unpack_from(caller.buffer, i * 32) for i in range(72)]
    assert {m[4] for m in maps} == {Gntst.OKAY}
    caller.write(ARG, b"".join(abi.UNMAP_GRANT_REF.pack(m[0], 0, m[5], 99) for m in maps))
    in_slices(1, 24)
    assert idle(grants)


# --- dom0's software -----------------------------------------------------------------------------------------


def test_a_backend_sees_the_granted_frame(grants: Grants) -> None:
    grants.grant(grants.one, 8, 40, grants.host.dom0)
    grants.grant(grants.one, 9, 41, grants.host.dom0)
    first, second = map_for_backend(grants.host.dom0, grants.one, [8, 9], readonly=False)
    first.view[:5] = b"hello"
    first.written()
    assert grants.host.memory.read(40 * PAGE_SIZE, 5) == b"hello"
    assert 40 in grants.host.memory.written_frames
    assert grants.flags(grants.one, 9) & (R | W) == R | W
    first.unmap()
    first.unmap()
    with second:
        assert len(second.view) == PAGE_SIZE
    assert idle(grants)


def test_a_read_only_view_cannot_be_written(grants: Grants) -> None:
    grants.grant(grants.one, 8, 40, grants.host.dom0, int(Gtf.READONLY))
    with map_for_backend(grants.host.dom0, grants.one, [8], readonly=True)[0] as mapping, pytest.raises(TypeError):
        mapping.view[0] = 1
    assert idle(grants)


def test_a_backend_maps_all_or_none(grants: Grants) -> None:
    grants.grant(grants.one, 8, 40, grants.host.dom0)
    with pytest.raises(GrantError) as caught:
        map_for_backend(grants.host.dom0, grants.one, [8, 9], readonly=False)
    assert caught.value.status is Gntst.GENERAL_ERROR
    assert idle(grants)


def test_a_backend_holds_the_granter_while_it_changes_status_bits(grants: Grants) -> None:
    grants.grant(grants.one, 8, 40, grants.host.dom0)

    def io() -> None:
        (mapping,) = map_for_backend(grants.host.dom0, grants.one, [8], readonly=False)
        mapping.unmap()

    elsewhere(io)
    assert grants.host.rendezvous.held == [grants.one, grants.one]
    assert grants.one.held == 0
    assert idle(grants)


def test_guests_on_the_same_engine_hold_nobody(grants: Grants) -> None:
    grants.grant(grants.one, 8, 40, grants.two)
    _, handle, _ = grants.map(grants.two, grants.one, 8)
    grants.unmap(grants.two, handle)
    assert not grants.host.rendezvous.held


def test_dom0s_software_has_no_ptes(grants: Grants) -> None:
    """A map hypercall from dom0 fails cleanly, and its views are not unmapped by unmap_grant_ref."""
    grants.grant(grants.one, 8, 40, grants.host.dom0)
    assert grants.map(grants.host.dom0, grants.one, 8)[0] == Gntst.GENERAL_ERROR
    with map_for_backend(grants.host.dom0, grants.one, [8], readonly=False)[0]:
        assert grants.unmap(grants.host.dom0, 0) == Gntst.BAD_HANDLE
    assert idle(grants)


# --- ends ---------------------------------------------------------------------------------------------------


def test_a_dying_mapper_leaves_the_references_to_its_ptes(grants: Grants) -> None:
    for ref in range(8, 16):
        grants.grant(grants.one, ref, 40, grants.two)
        grants.map(grants.two, grants.one, ref, va=ref * PAGE_SIZE)
    steps = 0
    while not grants.two.grant_table.release_mappings(budget=3):
        steps += 1
    assert steps == 2
    assert not grants.one.grant_table.active
    assert grants.flags(grants.one, 8) == Gtf.PERMIT_ACCESS
    assert grants.host.frames.held() == {40: 8}  # dropped when the page tables are


def test_a_dying_dom0_view_drops_everything(grants: Grants) -> None:
    grants.grant(grants.one, 8, 40, grants.host.dom0)
    (mapping,) = map_for_backend(grants.host.dom0, grants.one, [8], readonly=False)
    assert grants.host.dom0.grant_table.release_mappings()
    mapping.unmap()
    assert idle(grants)


def test_a_frame_outlives_its_granter_while_mapped(grants: Grants) -> None:
    grants.grant(grants.one, 8, 40, grants.host.dom0)
    (mapping,) = map_for_backend(grants.host.dom0, grants.one, [8], readonly=False)
    grants.one.grant_table.destroy()
    assert grants.host.frames.refs[40] == 1
    mapping.unmap()
    assert idle(grants)
