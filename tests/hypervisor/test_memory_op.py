# SPDX-License-Identifier: GPL-2.0-only
"""HYPERVISOR_memory_op (Xen: common/memory.c)."""

from __future__ import annotations

import errno
import struct

import pytest

from pyxen.abi import memory as abi
from pyxen.abi.memory import Xenmem
from pyxen.abi.xen import DOMID_SELF, Hypercall
from pyxen.errors import XenError
from pyxen.hypervisor import memory_op
from tests.hypervisor.rig import DATA_PFN, PAGES, Guest, Machine, va

HERE, LIST = va(DATA_PFN), va(DATA_PFN + 1)
END = va(PAGES)


def op(guest: Guest, command: int, data: bytes = b"") -> int:
    guest.put(HERE, data)
    return guest.call(Hypercall.MEMORY_OP, command, HERE)


def reservation(extents: int, count: int, order: int = 0, flags: int = 0, domid: int = DOMID_SELF) -> bytes:
    return abi.RESERVATION.pack(extents, count, order, flags, domid)


def words(guest: Guest, address: int, count: int) -> tuple[int, ...]:
    return struct.unpack(f"<{count}Q", guest.get(address, 8 * count))


def put_words(guest: Guest, address: int, *values: int) -> None:
    guest.put(address, struct.pack(f"<{len(values)}Q", *values))


def test_populate_and_decrease(guest: Guest) -> None:
    frames, before = guest.hv.frames, guest.domain.tot_pages
    put_words(guest, LIST, 1000, 2000, (1 << 64) - 1)
    assert op(guest, Xenmem.POPULATE_PHYSMAP, reservation(LIST, 3, 1)) == 3
    mfns = words(guest, LIST, 3)
    assert [frames.get_gpfn(m + i) for m in mfns for i in (0, 1)] == [1000, 1001, 2000, 2001, (1 << 64) - 1, 0]
    assert guest.domain.tot_pages == before + 6
    assert op(guest, Xenmem.CURRENT_RESERVATION, struct.pack("<H", DOMID_SELF)) == before + 6
    assert op(guest, Xenmem.DECREASE_RESERVATION, reservation(LIST, 3, 1)) == 3
    assert guest.domain.tot_pages == before
    assert all(frames.page_owner(m) is None for m in mfns)


def test_decrease_stops_at_a_frame_that_is_not_the_domains(host: Machine) -> None:
    guest, other = host.guest("exact"), host.guest("exact")
    guest.load()
    put_words(guest, LIST, guest.mfns[60], other.mfns[60], guest.mfns[61])
    assert op(guest, Xenmem.DECREASE_RESERVATION, reservation(LIST, 3)) == 1
    for wrong in (0, (1 << 64) - 1, 1 << 52, guest.domain.shared_info_mfn << 20):
        put_words(guest, LIST, wrong)
        assert op(guest, Xenmem.DECREASE_RESERVATION, reservation(LIST, 1)) == 0
        assert op(guest, Xenmem.DECREASE_RESERVATION, reservation(LIST, 1, 9)) == 0
    assert other.hv.frames.page_owner(other.mfns[60]) == other.domid


@pytest.mark.parametrize("command", [Xenmem.POPULATE_PHYSMAP, Xenmem.INCREASE_RESERVATION])
def test_an_address_that_faults_ends_the_loop_with_the_count(guest: Guest, command: int) -> None:
    put_words(guest, END - 16, 1, 2)
    assert op(guest, command, reservation(END - 16, 5)) == 2
    assert op(guest, command, reservation(0x1000, 5)) == 0
    owned = guest.domain.tot_pages
    assert owned == len(list(guest.hv.frames.owned_by(guest.domain))) - guest.hv.frames.xenheap_pages[guest.domid]


def test_increase_without_a_list(guest: Guest) -> None:
    before = guest.domain.tot_pages
    assert op(guest, Xenmem.INCREASE_RESERVATION, reservation(0, 4, 2)) == 4
    assert guest.domain.tot_pages == before + 16


def test_limits(guest: Guest) -> None:
    assert op(guest, Xenmem.INCREASE_RESERVATION, reservation(0, 5000)) == guest.domain.max_pages - PAGES
    assert op(guest, Xenmem.INCREASE_RESERVATION, reservation(0, 1)) == 0
    assert op(guest, Xenmem.INCREASE_RESERVATION, reservation(0, 1, 10)) == 0
    assert op(guest, Xenmem.INCREASE_RESERVATION, reservation(0, (1 << 64) - 1)) == 0
    assert op(guest, Xenmem.INCREASE_RESERVATION, reservation(0, 1, 0xFFFFFFFF)) == 0
    assert op(guest, Xenmem.INCREASE_RESERVATION | 7 << 6, reservation(0, 3)) == 7  # Xen returns what it was told
    assert op(guest, Xenmem.POPULATE_PHYSMAP, reservation(LIST, 1, 0, 1 << 16)) == 0
    assert op(guest, Xenmem.INCREASE_RESERVATION, reservation(0, 1, 0, 13)) == 0  # below 8 KiB there is nothing


def test_long_lists_are_preempted_and_resumed(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_op, "should_preempt", lambda _caller: True)
    assert op(guest, Xenmem.INCREASE_RESERVATION, reservation(LIST, 20)) == 20
    mfns = words(guest, LIST, 20)
    assert len(set(mfns)) == 20
    assert op(guest, Xenmem.DECREASE_RESERVATION, reservation(LIST, 20)) == 20
    assert guest.domain.tot_pages == PAGES


@pytest.mark.parametrize("domid", [0, 2])
def test_other_domains_are_not_a_guests(host: Machine, domid: int) -> None:
    guest = host.guest("exact")
    host.guest("exact")
    guest.load()
    for command in (Xenmem.INCREASE_RESERVATION, Xenmem.DECREASE_RESERVATION, Xenmem.POPULATE_PHYSMAP):
        assert op(guest, command, reservation(LIST, 1, 0, 0, domid)) == -errno.EPERM
        assert op(guest, command, reservation(LIST, 1, 0, 0, 77)) == -errno.ESRCH
    for command in (Xenmem.CURRENT_RESERVATION, Xenmem.MAXIMUM_RESERVATION, Xenmem.MAXIMUM_GPFN):
        assert op(guest, command, struct.pack("<H", domid)) == -errno.EPERM
    assert op(guest, Xenmem.SET_MEMORY_MAP, abi.FOREIGN_MEMORY_MAP.pack(domid, 1, LIST)) == -errno.EPERM
    assert op(guest, Xenmem.CLAIM_PAGES, reservation(0, 1, 0, 0, 1)) == -errno.EPERM


def test_dom0_stops_a_domain_while_it_takes_frames(exact: Guest) -> None:
    stopped: list[int] = []
    frames = exact.hv.frames
    real = frames.guest_remove_page

    def remove(mfn: int, domain: object) -> bool:
        stopped.append(exact.domain.pause_count)
        return real(mfn, exact.domain)

    frames.guest_remove_page = remove  # type: ignore[method-assign]
    before = exact.domain.pause_count
    # Handles are addresses of the call's own buffers: the first one is at 0x10000, the next a page and a hole further.
    request = bytearray(reservation(0x12000, 1, 0, 0, exact.domid))
    extents = bytearray(exact.mfns[50].to_bytes(8, "little"))
    command = int(Xenmem.DECREASE_RESERVATION)
    assert exact.machine.privcmd.hypercall(Hypercall.MEMORY_OP, [command, request, extents]) == 1
    assert stopped == [before + 1]
    assert exact.domain.pause_count == before


# --- exchange ----------------------------------------------------------------------------------------------


def exchange(in_count: int, in_order: int, out_count: int, out_order: int, done: int = 0, out: int = LIST + 2048,
             flags: int = 0, domid: int = DOMID_SELF) -> bytes:
    return abi.EXCHANGE.pack(LIST, in_count, in_order, 0, domid, out, out_count, out_order, flags, domid, done)


def nr_exchanged(guest: Guest) -> int:
    return words(guest, HERE + abi.EXCHANGE.size - 8, 1)[0]


def unmapped(guest: Guest, count: int) -> list[int]:
    """Frames that nothing maps."""
    assert op(guest, Xenmem.INCREASE_RESERVATION, reservation(LIST, count)) == count
    return list(words(guest, LIST, count))


def test_exchange_single_frames_for_a_block_and_back(guest: Guest) -> None:
    given = unmapped(guest, 8)
    put_words(guest, LIST + 2048, 0x100, 0x200)
    assert op(guest, Xenmem.EXCHANGE, exchange(8, 0, 2, 2)) == 0
    assert nr_exchanged(guest) == 8
    got = words(guest, LIST + 2048, 2)
    frames = guest.hv.frames
    assert all(m % 4 == 0 and frames.page_owner(m) == guest.domid for m in got)
    assert [frames.get_gpfn(got[1] + i) for i in range(4)] == [0x200, 0x201, 0x202, 0x203]
    assert all(frames.page_owner(m) is None for m in given if not any(b <= m < b + 4 for b in got))
    put_words(guest, LIST, *got)
    put_words(guest, LIST + 2048, *range(8))
    assert op(guest, Xenmem.EXCHANGE, exchange(2, 2, 8, 0)) == 0
    assert guest.domain.tot_pages == PAGES + 8


def test_an_exchange_that_fails_says_how_far_it_came(guest: Guest) -> None:
    given = unmapped(guest, 2)
    put_words(guest, LIST, given[0], guest.mfns[DATA_PFN], given[1])
    put_words(guest, LIST + 2048, 1, 2, 3)
    assert op(guest, Xenmem.EXCHANGE, exchange(3, 0, 3, 0)) == -errno.EINVAL
    assert nr_exchanged(guest) == 1
    assert guest.hv.frames.page_owner(given[1]) == guest.domid
    put_words(guest, LIST, given[1], given[1])
    assert op(guest, Xenmem.EXCHANGE, exchange(2, 0, 1, 1)) == -errno.EINVAL  # the same frame twice
    assert guest.hv.frames.page_owner(given[1]) == guest.domid
    assert op(guest, Xenmem.EXCHANGE, exchange(1, 0, 1, 0, out=0x1000)) == -errno.EFAULT


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        (exchange(1, 10, 1, 10), errno.EPERM), (exchange(1, 0, 2, 0), errno.EINVAL),
        (exchange(2, 0, 2, 0, done=3), errno.EINVAL), (exchange(1 << 63, 1, 1 << 63, 1), errno.EINVAL),
        (exchange(1, 0, 1, 0, flags=13), errno.ENOMEM), (exchange(1, 0, 1, 0, domid=99), errno.ESRCH),
        (exchange(1, 0, 1, 0, domid=0), errno.EPERM), (exchange(1, 0xFFFFFFFF, 1, 0xFFFFFFFF), errno.EPERM),
    ],
)
def test_exchanges_that_cannot_be(exact: Guest, request_: bytes, error: int) -> None:
    assert op(exact, Xenmem.EXCHANGE, request_) == -error


# --- the rest ----------------------------------------------------------------------------------------------


def test_memory_maps(guest: Guest) -> None:
    assert op(guest, Xenmem.MEMORY_MAP, abi.MEMORY_MAP.pack(8, LIST)) == -errno.ENOSYS
    guest.machine.privcmd.set_memory_map(guest.domid, [(0, 4096, 1), (8192, 4096, 2)])
    assert op(guest, Xenmem.MEMORY_MAP, abi.MEMORY_MAP.pack(8, LIST)) == 0
    assert abi.MEMORY_MAP.unpack(guest.get(HERE, 16)) == (2, LIST)
    assert guest.get(LIST, 40) == abi.E820ENTRY.pack(0, 4096, 1) + abi.E820ENTRY.pack(8192, 4096, 2)
    assert op(guest, Xenmem.MEMORY_MAP, abi.MEMORY_MAP.pack(1, LIST)) == 0
    assert op(guest, Xenmem.SET_MEMORY_MAP, abi.FOREIGN_MEMORY_MAP.pack(DOMID_SELF, 129, LIST)) == -errno.EINVAL
    assert op(guest, Xenmem.MACHINE_MEMORY_MAP, abi.MEMORY_MAP.pack(8, LIST)) == -errno.EPERM
    with pytest.raises(XenError):
        guest.machine.privcmd.hypercall(Hypercall.MEMORY_OP, [int(Xenmem.MEMORY_MAP), bytearray(16)])


def test_the_m2p_tables_place(guest: Guest) -> None:
    assert op(guest, Xenmem.MACHPHYS_MAPPING) == 0
    start, end, last = words(guest, HERE, 3)
    assert (start, last) == (0xFFFF800000000000, guest.hv.memory.nr_frames - 1)
    assert end - start >= 8 * (last + 1)
    assert op(guest, Xenmem.MACHPHYS_MFN_LIST, abi.MFN_LIST.pack(0xFFFFFFFF, LIST, 0)) == 0
    assert words(guest, LIST, 1)[0] == guest.hv.frames.m2p.frames[0]
    assert guest.call(Hypercall.MEMORY_OP, Xenmem.MAXIMUM_RAM_PAGE, 0) == last


def test_unknown_operations(guest: Guest) -> None:
    for command in (*range(27, 64), Xenmem.PAGING_OP, Xenmem.SHARING_OP):
        assert op(guest, command) == -errno.ENOSYS
    assert op(guest, Xenmem.MEMORY_MAP | 1 << 6) == -errno.EINVAL
    assert op(guest, Xenmem.ADD_TO_PHYSMAP, struct.pack("<H", DOMID_SELF)) == -errno.EACCES
    assert op(guest, Xenmem.REMOVE_FROM_PHYSMAP, struct.pack("<H6xQ", DOMID_SELF, (1 << 64) - 1)) == -errno.ENOENT
    assert op(guest, Xenmem.SET_POD_TARGET) == -errno.EINVAL
    for command in range(27):
        assert guest.call(Hypercall.MEMORY_OP, command, 0x1000) in (
            -errno.EFAULT, -errno.ENOSYS, -errno.EINVAL, -errno.EOPNOTSUPP, -errno.EPERM, 0,
            guest.hv.memory.nr_frames - 1)
    assert not guest.domain.is_shut_down
