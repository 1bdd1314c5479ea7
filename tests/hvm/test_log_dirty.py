# SPDX-License-Identifier: GPL-2.0-only
"""Log-dirty against a diff of memory, page by page: whoever writes, what changed is in the bitmap."""

from __future__ import annotations

import errno
import random
import struct

import pytest

from pyxen.abi import domctl as abi
from pyxen.abi.domctl import Domctl
from pyxen.abi.memory import MapSpace, Xenmem
from pyxen.abi.xen import Hypercall
from pyxen.errors import XenError
from pyxen.hypervisor import log_dirty
from pyxen.hypervisor.x86.hvm.p2m_types import P2mType
from tests.hvm.rig import Guest, Machine

PF_PRESENT, PF_WRITE, PF_USER = 1, 2, 4


def bits(data: bytes) -> set[int]:
    value = int.from_bytes(data, "little")
    return {n for n in range(len(data) * 8) if value >> n & 1}


def contents(guest: Guest, pages: int) -> list[bytes | None]:
    found: list[bytes | None] = []
    for gfn in range(pages):
        mfn = guest.p2m.gfn_to_mfn(gfn)
        found.append(None if mfn is None else guest.hv.memory.read(mfn << 12, 4096))
    return found


def guest_store(guest: Guest, gpa: int, data: bytes) -> None:
    """A store of the guest's own code: what the engine does with the nested tables."""
    for _ in range(3):
        entry, order = guest.p2m.table.lookup(gpa >> 12)
        if entry & 2:
            mfn = guest.mfn(gpa >> 12)
            guest.hv.memory.write((mfn << 12) + (gpa & 0xFFF), data)
            return
        guest.traps.nested_fault(gpa, PF_WRITE | PF_USER | (PF_PRESENT if entry & 1 else 0) | 1 << 32, 0x1000)
    raise AssertionError(f"no store at {gpa:#x} ({order})")


def test_the_first_write_faults_and_the_next_does_not(host: Machine, guest: Guest) -> None:
    log_dirty.enable(guest.domain)
    guest.load()
    faults = guest.traps.counts["nested_fault"]
    guest_store(guest, 0x30000, b"x")
    guest_store(guest, 0x30010, b"y")
    assert guest.traps.counts["nested_fault"] == faults + 1
    data, stats = host.privcmd.log_dirty_peek(guest.domid, 64)
    assert bits(data) == {0x30}
    assert stats == (1, 1)
    assert bits(host.privcmd.log_dirty_clean(guest.domid, 64)[0]) == {0x30}
    assert bits(host.privcmd.log_dirty_peek(guest.domid, 64)[0]) == set()
    guest.load()
    guest_store(guest, 0x30000, b"z")
    assert bits(host.privcmd.log_dirty_peek(guest.domid, 64)[0]) == {0x30}


def test_ranges(host: Machine, guest: Guest) -> None:
    log_dirty.enable(guest.domain)
    guest.load()
    for gfn in (0x20, 0x2F, 0x30, 0x3F):
        guest_store(guest, gfn << 12, b"x")
    assert bits(host.privcmd.log_dirty_peek(guest.domid, 0x10, 0x21)[0]) == {0x2F - 0x21, 0x30 - 0x21}
    assert bits(host.privcmd.log_dirty_clean(guest.domid, 0x10, 0x25)[0]) == {0x2F - 0x25, 0x30 - 0x25}
    assert bits(host.privcmd.log_dirty_peek(guest.domid, 64)[0]) == {0x20, 0x3F}
    for start, pages in ((-1, 5), (0, 1 << 29), (1 << 28, 1)):
        with pytest.raises(XenError):
            host.privcmd.log_dirty_peek(guest.domid, pages, start)


@pytest.mark.parametrize("seed", range(6))
def test_against_a_diff(host: Machine, seed: int) -> None:
    """Stores of the guest, copies of the hypervisor, events, back ends, grants, ballooning: in any order, in rounds."""
    guest, random_ = host.guest(), random.Random(seed)
    pages = 64
    base = guest.domain.grant_table.frames[0] << 9
    for ref in range(8, 12):
        host.memory.q[base + ref] = 1 | (0x30 + ref) << 32
    port = struct.unpack("<II", guest.op(Hypercall.EVENT_CHANNEL_OP, 7, struct.pack("<II", 0, 0))[1])[1]
    guest.put(0x20000, struct.pack("<QII", 0x25, 64, 0))
    assert guest.call(Hypercall.VCPU_OP, 10, 0, 0x20000) == 0
    guest.put(0x20000, struct.pack("<HHIQQ", 0x7FF0, 0, MapSpace.SHARED_INFO, 0, 0x26))
    assert guest.call(Hypercall.MEMORY_OP, Xenmem.ADD_TO_PHYSMAP, 0x20000) == 0
    mapped = host.privcmd.gnttab_map(guest.domid, [8])[0]
    log_dirty.enable(guest.domain)
    for _round in range(5):
        guest.load()
        before = contents(guest, pages)
        for _ in range(random_.randrange(12)):
            gfn = random_.randrange(0x28, 0x3C)
            stamp = random_.randbytes(8)
            match random_.randrange(7):
                case 0 | 1:
                    if guest.p2m.gfn_to_mfn(gfn) is not None:
                        guest_store(guest, gfn << 12 | 64, stamp)
                case 2:
                    if guest.p2m.gfn_to_mfn(gfn) is not None:
                        guest.hvm.write(gfn << 12 | 128, stamp)
                case 3:
                    guest_store(guest, 0x20000, struct.pack("<I", port))
                    host.memory.q[(guest.domain.shared_info_mfn << 9) + 256] = 0
                    guest.call(Hypercall.EVENT_CHANNEL_OP, 4, 0x20000)
                case 4:
                    mapped.view[random_.randrange(4096)] ^= 0xFF
                case 5:
                    if guest.p2m.gfn_to_mfn(gfn) is not None:
                        host.privcmd.write_physical(guest.domid, gfn << 12 | 256, stamp)
                        guest.load()
                case 6:
                    if gfn > 0x34 and gfn != 0x38:  # the mapped one stays
                        guest_store(guest, 0x20000, struct.pack("<QQIIH6xQ", 0x20100, 1, 0, 0, 0x7FF0, gfn))
                        guest_store(guest, 0x20100, struct.pack("<Q", gfn))
                        there = guest.p2m.gfn_to_mfn(gfn) is not None
                        op = Xenmem.DECREASE_RESERVATION if there else Xenmem.POPULATE_PHYSMAP
                        assert guest.call(Hypercall.MEMORY_OP, op, 0x20000) == 1
        after = contents(guest, pages)
        changed = {gfn for gfn in range(pages) if before[gfn] != after[gfn]}
        said = bits(host.privcmd.log_dirty_clean(guest.domid, pages)[0])
        assert changed <= said, sorted(map(hex, changed - said))
        quiet = {gfn for gfn in range(0x28, 0x30) if before[gfn] == after[gfn]}
        assert len(quiet & said) <= 4  # and it is no bitmap of everything
    mapped.unmap()
    host.privcmd.log_dirty_disable(guest.domid)
    assert all(guest.p2m.get_entry(gfn)[1] is not P2mType.RAM_LOGDIRTY for gfn in range(pages))
    host.destroy(guest.domain)
    assert host.hv.allocator.free_frames == host.baseline


def test_a_writable_grant_is_dirty_until_it_is_unmapped(host: Machine, guest: Guest) -> None:
    base = guest.domain.grant_table.frames[0] << 9
    host.memory.q[base + 8] = 1 | 0x30 << 32
    (mapping,) = host.privcmd.gnttab_map(guest.domid, [8])
    log_dirty.enable(guest.domain)
    for _ in range(3):
        assert bits(host.privcmd.log_dirty_clean(guest.domid, 64)[0]) == {0x30}
    mapping.unmap()
    assert bits(host.privcmd.log_dirty_clean(guest.domid, 64)[0]) == {0x30}
    assert bits(host.privcmd.log_dirty_clean(guest.domid, 64)[0]) == set()


def test_superpages_are_split_one_by_one(host: Machine) -> None:
    guest = Guest(host, 1, 1536).boot()
    assert guest.p2m.get_entry(600)[2] == 9
    log_dirty.enable(guest.domain)
    guest.load()
    assert guest.p2m.get_entry(600)[1:] == (P2mType.RAM_LOGDIRTY, 9)
    guest_store(guest, 600 << 12, b"x")
    assert guest.p2m.get_entry(600)[1:] == (P2mType.RAM_RW, 0)
    assert guest.p2m.get_entry(601)[1:] == (P2mType.RAM_LOGDIRTY, 0)
    assert guest.p2m.get_entry(1100)[2] == 9
    assert bits(host.privcmd.log_dirty_clean(guest.domid, 1536)[0]) == {600}
    assert guest.p2m.get_entry(600)[1] is P2mType.RAM_LOGDIRTY


def test_errors(host: Machine, guest: Guest) -> None:
    for call in (host.privcmd.log_dirty_disable, lambda d: host.privcmd.log_dirty_peek(d, 5)):
        with pytest.raises(XenError) as caught:
            call(guest.domid)
        assert caught.value.errno == errno.EINVAL
    host.privcmd.log_dirty_enable(guest.domid)
    with pytest.raises(XenError) as caught:
        host.privcmd.log_dirty_enable(guest.domid)
    assert caught.value.errno == errno.EINVAL


def test_by_domctl(host: Machine, guest: Guest) -> None:
    from pyxen.hypervisor.privcmd import Dom0Caller

    def shadow_op(op: int, mode: int = 0, mb: int = 0, pages: int = 0) -> tuple[int, ...]:
        request, bitmap = bytearray(abi.SIZE), bytearray(64)
        caller = Dom0Caller(host.hv.dom0, [request, bitmap])
        abi.HEADER.pack_into(request, 0, Domctl.SHADOW_OP, abi.INTERFACE_VERSION, guest.domid)
        abi.SHADOW_OP.pack_into(request, abi.UNION, op, mode, mb, caller.address(1), pages, 0, 0)
        result = host.privcmd._table[Hypercall.DOMCTL].handler(caller, caller.address(0))
        assert result == 0
        return (*abi.SHADOW_OP.unpack_from(request, abi.UNION), int.from_bytes(bitmap, "little"))

    shadow_op(abi.SHADOW_OP_ENABLE, abi.SHADOW_ENABLE_LOG_DIRTY)
    guest.load()
    guest_store(guest, 0x31000, b"x")
    reply = shadow_op(abi.SHADOW_OP_CLEAN, pages=64)
    assert (reply[5], reply[6], reply[7]) == (1, 1, 1 << 0x31)
    assert shadow_op(abi.SHADOW_OP_PEEK, pages=64)[7] == 0
    shadow_op(abi.SHADOW_OP_OFF)
    assert shadow_op(abi.SHADOW_OP_SET_ALLOCATION, mb=3)[2] == 3
    assert shadow_op(abi.SHADOW_OP_GET_ALLOCATION)[2] == 3
    assert guest.domain.hvm.pool.limit == 768
    with pytest.raises(XenError):
        shadow_op(77)
