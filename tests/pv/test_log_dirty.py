# SPDX-License-Identifier: GPL-2.0-only
"""Log-dirty of a PV domain against a diff of its memory: whoever writes, what changed is in the bitmap."""

from __future__ import annotations

import errno
import random
import struct
from typing import Any

import pytest

from pyxen.abi import domctl as abi
from pyxen.abi.domctl import Domctl
from pyxen.abi.memory import RESERVATION, Xenmem
from pyxen.abi.vcpu import VcpuOp
from pyxen.abi.xen import DOMID_SELF, MMUEXT_OP, Hypercall, MmuextCmd
from pyxen.errors import XenError
from pyxen.hypervisor.runstate import update_runstate_area
from tests.hypervisor.rig import AD, GDT_PFN, PAGES, RW, USER, Guest, Machine, P, va

ARGUMENTS, AREA, FREE_L1, GRANTED = 11, 12, 13, 48
"""Frames of the guest with a use of their own."""
FIRST, LAST = 24, 40
"""Its data."""


def bits(data: bytes) -> set[int]:
    value = int.from_bytes(data, "little")
    return {n for n in range(len(data) * 8) if value >> n & 1}


class Engine:
    """Stores of the guest's code, as an engine makes them: the first through a translation marks its frame."""

    def __init__(self, guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
        self.guest, self.cpu = guest, guest.machine.cpu
        self.unmarked: set[int] = set()
        for name in ("flush_tlb", "set_cr3"):  # loading a context flushes nothing
            monkeypatch.setattr(self.cpu, name, self._flushing(getattr(self.cpu, name)))

    def _flushing(self, function: Any) -> Any:
        def flush(*arguments: Any) -> None:
            self.unmarked.clear()
            function(*arguments)

        return flush

    def store(self, address: int, data: bytes) -> None:
        frame = self.guest.mfns[(address - va(0)) >> 12]
        dirty = self.cpu._dirty_map
        if frame not in self.unmarked:
            self.unmarked.add(frame)
            if dirty is not None:
                dirty[frame] = 1
        self.guest.put(address, data)


@pytest.fixture
def engine(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> Engine:
    return Engine(guest, monkeypatch)


def clean(guest: Guest, pages: int = PAGES, start: int = 0) -> set[int]:
    """As dom0 does it, while the guest's vCPU is off its engine; then it goes on."""
    found = bits(guest.machine.privcmd.log_dirty_clean(guest.domid, pages, start)[0])
    guest.load()
    return found


def enable(guest: Guest) -> None:
    guest.machine.privcmd.log_dirty_enable(guest.domid)
    guest.load()


def tables(guest: Guest) -> set[int]:
    types = guest.hv.frames.type_info
    return {pfn for pfn, mfn in enumerate(guest.mfns) if 1 <= types[mfn] >> 44 & 7 <= 4 and types[mfn] >> 40 & 3}


def test_only_tables_are_dirty_at_first(engine: Engine) -> None:
    guest = engine.guest
    engine.store(va(30), b"before")
    guest.pv.write(va(31), b"before")
    enable(guest)
    assert clean(guest) == set(range(8)) == tables(guest)


def test_a_store_is_noticed_once_and_again_after_a_clean(engine: Engine) -> None:
    guest, privcmd = engine.guest, engine.guest.machine.privcmd
    engine.store(va(30), b"before")
    enable(guest)
    for _ in range(3):
        engine.store(va(30), b"x")
        engine.store(va(30), b"y")
        data, stats = privcmd.log_dirty_peek(guest.domid, PAGES)
        assert bits(data) == {30} | set(range(8))
        assert (stats.fault_count, stats.dirty_count) == (1, 9)
        guest.load()
        engine.store(va(30), b"z")
        assert clean(guest) == {30} | set(range(8))
        assert clean(guest) == set(range(8))


def test_copies_to_guest_memory_are_noticed_again_after_a_clean(engine: Engine) -> None:
    """Although the hypervisor keeps translations of its own."""
    guest = engine.guest
    guest.pv.write(va(30), b"before")
    enable(guest)
    for _ in range(2):
        guest.pv.write(va(30), b"x")
        guest.pv.read(va(31), 8)
        assert clean(guest) - set(range(8)) == {30}


def test_ranges(engine: Engine) -> None:
    guest = engine.guest
    enable(guest)
    for pfn in (0x20, 0x2F, 0x30, 0x3F):
        engine.store(va(pfn), b"x")
    assert clean(guest, 0x10, 0x25) == {0x2F - 0x25, 0x30 - 0x25}
    engine.store(va(0x20), b"y")
    engine.store(va(0x30), b"y")
    assert clean(guest) - set(range(8)) == {0x20, 0x30, 0x3F}
    for start, pages in ((-1, 5), (0, 1 << 29), (1 << 28, 1)):
        with pytest.raises(XenError):
            guest.machine.privcmd.log_dirty_peek(guest.domid, pages, start)


def test_what_ceases_to_be_a_table_is_dirty_once_more(engine: Engine) -> None:
    """The CPU may have set accessed bits in it until then."""
    guest = engine.guest
    guest.call(Hypercall.UPDATE_VA_MAPPING, va(FREE_L1), 0, 0)
    enable(guest)
    assert FREE_L1 not in clean(guest)
    pin = guest.mfns[FREE_L1]
    for command, dirty in ((MmuextCmd.PIN_L1_TABLE, (True, True)), (MmuextCmd.UNPIN_TABLE, (True, False))):
        guest.put(va(ARGUMENTS), MMUEXT_OP.pack(command, pin, 0))
        assert guest.call(Hypercall.MMUEXT_OP, va(ARGUMENTS), 1, 0, DOMID_SELF) == 0
        assert tuple(FREE_L1 in clean(guest) for _ in range(2)) == dirty


@pytest.mark.parametrize("mapped_first", [False, True])
def test_who_holds_a_writable_mapping_may_write_at_any_time(engine: Engine, mapped_first: bool) -> None:
    guest, privcmd = engine.guest, engine.guest.machine.privcmd
    grants = guest.domain.grant_table.frames[0] << 9
    guest.hv.memory.q[grants + 8] = 1 | guest.mfns[GRANTED] << 32
    if not mapped_first:
        enable(guest)
    backend = privcmd.gnttab_map(guest.domid, [8])[0]
    foreign = privcmd.foreign_map(guest.domid, guest.mfns[30], 2)
    reader = privcmd.foreign_map(guest.domid, guest.mfns[33], 1, False)
    if mapped_first:
        enable(guest)
    for _ in range(3):
        assert clean(guest) - set(range(8)) == {30, 31, GRANTED}
    backend.unmap()
    foreign.close()
    reader.close()
    assert clean(guest) - set(range(8)) == {30, 31, GRANTED}
    assert clean(guest) == set(range(8))


@pytest.mark.parametrize("seed", range(6))
def test_against_a_diff(engine: Engine, seed: int) -> None:
    """Stores of the guest and everything the hypervisor writes for it, in any order, in rounds."""
    guest, host, random_ = engine.guest, engine.guest.machine, random.Random(seed)
    memory, frames, baseline = host.memory, host.hv.frames, host.baseline

    def contents() -> dict[int, tuple[int, bytes]]:
        found = {}
        for mfn in frames.owned_by(guest.domain):
            pfn = frames.get_gpfn(mfn)
            if pfn < 1 << 20:
                found[pfn] = mfn, memory.read(mfn << 12, 4096)
        return found

    def argue(data: bytes) -> int:
        engine.store(va(ARGUMENTS), data)
        return va(ARGUMENTS)

    def mmuext(command: int, arg1: int, arg2: int = 0) -> int:
        return guest.call(Hypercall.MMUEXT_OP, argue(MMUEXT_OP.pack(command, arg1, arg2)), 1, 0, DOMID_SELF)

    def mmu_update(pointer: int, value: int) -> int:
        return guest.call(Hypercall.MMU_UPDATE, argue(struct.pack("<QQ", pointer, value)), 1, 0, DOMID_SELF)

    def step() -> None:
        pfn = random_.randrange(FIRST, LAST)
        mfn, stamp = guest.mfns[pfn], random_.randbytes(8)
        word = int.from_bytes(stamp, "little")
        match random_.randrange(13):
            case 0 | 1:
                engine.store(va(pfn) + 64, stamp)
            case 2:
                guest.pv.write(va(pfn) + 4092, stamp)  # two pages
            case 3:
                assert mmu_update((mfn << 12) + 128, word) == 0
            case 4:
                assert mmuext(MmuextCmd.CLEAR_PAGE, mfn) == 0
            case 5:
                assert mmuext(MmuextCmd.COPY_PAGE, mfn, guest.mfns[random_.randrange(FIRST, LAST)]) == 0
            case 6:
                at = (guest.mfns[GDT_PFN] << 12) + 8 * random_.randrange(16, 32)
                assert guest.call(Hypercall.UPDATE_DESCRIPTOR, at, 0x00AFFA000000FFFF | word & 0xFFFF) == 0
            case 7:
                flags = random_.choice((0, P | USER | AD, P | RW | USER | AD))
                pfn = random_.randrange(50, PAGES)
                value = guest.mfns[pfn] << 12 | flags if flags else 0
                assert guest.call(Hypercall.UPDATE_VA_MAPPING, va(pfn), value, 2) == 0
            case 8:
                with host.privcmd.foreign_map(guest.domid, mfn) as mapping:
                    mapping.write(256, stamp)
                    mapping.written()
            case 9:
                guest.fault(3, soft=True)  # a frame on the kernel's stack
            case 10:
                guest.vcpu.runstate_time_ns[0] += 1000
                update_runstate_area(guest.vcpu)
            case 11:
                new = random_.randrange(1000, 2000)  # the frame is another pfn now
                memory.write((mfn << 12) + 512, stamp) if frames.get_gpfn(mfn) != pfn else None
                assert mmu_update(mfn << 12 | 1, new if frames.get_gpfn(mfn) == pfn else pfn) == 0
            case 12:
                request = RESERVATION.pack(va(ARGUMENTS) + 64, 1, 0, 0, DOMID_SELF)
                argue(request.ljust(64, b"\0") + struct.pack("<Q", random_.randrange(3000, 3100)))
                assert guest.call(Hypercall.MEMORY_OP, Xenmem.POPULATE_PHYSMAP, va(ARGUMENTS)) == 1

    assert guest.call(Hypercall.VCPU_OP, VcpuOp.REGISTER_RUNSTATE_MEMORY_AREA, 0, _area(guest)) == 0
    enable(guest)
    for _round in range(8):
        before = contents()
        for _ in range(random_.randrange(12)):
            step()
        after = contents()
        changed = {pfn for pfn, was in after.items() if before.get(pfn) != was}
        said = clean(guest, 4096)
        assert changed <= said, sorted(changed - said)
        assert len(said - changed - tables(guest)) <= 24  # and it is no bitmap of everything
    host.privcmd.log_dirty_disable(guest.domid)
    assert engine.cpu._dirty_map is None
    host.destroy(guest.domain)
    assert host.hv.allocator.free_frames == baseline


def _area(guest: Guest) -> int:
    guest.put(va(ARGUMENTS), struct.pack("<Q", va(AREA)))
    return va(ARGUMENTS)


def test_engines_fill_the_map_while_somebody_wants_it(host: Machine) -> None:
    guests = [host.guest("exact"), host.guest("fast")]
    for guest in guests:
        host.privcmd.log_dirty_enable(guest.domid)
    shared = host.cpu._dirty_map
    assert shared is not None
    host.privcmd.log_dirty_disable(guests[0].domid)
    assert host.cpu._dirty_map is shared
    host.destroy(guests[1].domain)  # while it is on
    assert host.cpu._dirty_map is None
    host.privcmd.log_dirty_enable(guests[0].domid)
    assert host.cpu._dirty_map is shared


def test_a_domain_sees_its_own_frames_only(host: Machine) -> None:
    """What was written by others, or before it was on, is nobody's news."""
    first, second = host.guest("exact"), host.guest("fast")
    host.privcmd.log_dirty_enable(first.domid)
    assert host.cpu._dirty_map is not None
    for guest in (first, second):
        host.cpu._dirty_map[guest.mfns[30]] = 1
    host.privcmd.log_dirty_enable(second.domid)
    assert bits(host.privcmd.log_dirty_clean(second.domid, PAGES)[0]) == set(range(8))
    assert bits(host.privcmd.log_dirty_clean(first.domid, PAGES)[0]) == {30} | set(range(8))


def test_a_wild_machine_to_physical_entry_has_no_bit(engine: Engine) -> None:
    guest = engine.guest
    enable(guest)
    clean(guest)
    for pfn, wild in ((30, (1 << 64) - 1), (31, 1 << 63), (32, 1 << 28), (33, (1 << 28) - 1)):
        guest.put(va(ARGUMENTS), struct.pack("<QQ", guest.mfns[pfn] << 12 | 1, wild))
        assert guest.call(Hypercall.MMU_UPDATE, va(ARGUMENTS), 1, 0, DOMID_SELF) == 0
        engine.store(va(pfn), b"x")
    assert clean(guest) == set(range(8))
    assert len(guest.domain.log_dirty.bitmap) <= (1 << 25) + 4096  # type: ignore[union-attr]


def test_errors(host: Machine, guest: Guest) -> None:
    privcmd = host.privcmd
    for call in (privcmd.log_dirty_disable, lambda d: privcmd.log_dirty_peek(d, 5)):
        with pytest.raises(XenError) as caught:
            call(guest.domid)
        assert caught.value.errno == errno.EINVAL
    privcmd.log_dirty_enable(guest.domid)
    with pytest.raises(XenError) as caught:
        privcmd.log_dirty_enable(guest.domid)
    assert caught.value.errno == errno.EINVAL
    host.destroy(guest.domain)


def test_by_domctl(engine: Engine) -> None:
    from pyxen.hypervisor.privcmd import Dom0Caller

    guest, host = engine.guest, engine.guest.machine

    def shadow_op(op: int, mode: int = 0, pages: int = 0) -> tuple[int, ...]:
        request, bitmap = bytearray(abi.SIZE), bytearray(64)
        caller = Dom0Caller(host.hv.dom0, [request, bitmap])
        abi.HEADER.pack_into(request, 0, Domctl.SHADOW_OP, abi.INTERFACE_VERSION, guest.domid)
        abi.SHADOW_OP.pack_into(request, abi.UNION, op, mode, 0, caller.address(1), pages, 0, 0)
        assert host.privcmd._table[Hypercall.DOMCTL].handler(caller, caller.address(0)) == 0
        return (*abi.SHADOW_OP.unpack_from(request, abi.UNION), int.from_bytes(bitmap, "little"))

    shadow_op(abi.SHADOW_OP_ENABLE, abi.SHADOW_ENABLE_LOG_DIRTY)
    guest.load()
    engine.store(va(0x31), b"x")
    reply = shadow_op(abi.SHADOW_OP_CLEAN, pages=PAGES)
    assert (reply[5], reply[6], reply[7]) == (1, 9, 1 << 0x31 | 0xFF)
    assert shadow_op(abi.SHADOW_OP_PEEK, pages=PAGES)[7] == 0xFF
    shadow_op(abi.SHADOW_OP_OFF)
