# SPDX-License-Identifier: GPL-2.0-only
"""A machine of bytes and a privcmd over it that keeps the rules the real one keeps.

A pinned frame is no one's to write, frames belong to one domain, runs are scattered.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

from pyxen.abi.arch_x86 import GUEST_CONTEXT_SIZE, GuestContext
from pyxen.abi.xen import MMUEXT_OP, PAGE_SIZE, DomId, Gfn, MmuextCmd, VcpuId
from pyxen.errors import XenError

ADDRESS = 0x000F_FFFF_FFFF_F000
DOMID = DomId(7)
SHARED_INFO_MFN = 3
NX = 1 << 63


@dataclass
class Mapping:
    view: memoryview
    machine: FakeMachine
    mfn: int
    count: int
    told: bool = False

    def written(self) -> None:
        self.told = True

    def close(self) -> None:
        assert self.told, "engines were not told of a write"
        self.machine.open_mappings -= 1


@dataclass
class Info:
    shared_info_mfn: int = SHARED_INFO_MFN


@dataclass
class FakeMachine:
    """``frames`` frames of 0xA5; a domain's frames come in runs of ``run`` with a hole after each, downwards."""

    frames: int
    run: int = 1 << 20
    owned: set[int] = field(default_factory=lambda: {SHARED_INFO_MFN})
    m2p: dict[int, int] = field(default_factory=dict)
    context: GuestContext | None = None
    pinned: int | None = None
    open_mappings: int = 0

    def __post_init__(self) -> None:
        self.bytes = bytearray(b"\xa5" * (self.frames * PAGE_SIZE))
        self.bytes[SHARED_INFO_MFN * PAGE_SIZE : (SHARED_INFO_MFN + 1) * PAGE_SIZE] = bytes(PAGE_SIZE)
        self.top = self.frames

    # --- the privcmd the builder sees
    def populate_physmap(self, domid: DomId, pfns: range) -> Sequence[range]:
        assert domid == DOMID
        runs = []
        done = 0
        while done < len(pfns):
            size = min(self.run, len(pfns) - done)
            if self.top - size < 16:
                raise XenError(12)
            self.top -= size
            run = range(self.top, self.top + size)
            if self.run < 1 << 20:
                self.top -= 1
            for i, mfn in enumerate(run):
                self.m2p[mfn] = pfns[done + i]
            self.owned.update(run)
            runs.append(run)
            done += size
        return runs

    def foreign_map(self, domid: DomId, gfn: Gfn, count: int = 1, writable: bool = True) -> Mapping:
        assert self.pinned is None, "writing a guest that is already validated"
        assert all(mfn in self.owned for mfn in range(gfn, gfn + count))
        self.open_mappings += 1
        view = memoryview(self.bytes)[gfn * PAGE_SIZE : (gfn + count) * PAGE_SIZE]
        return Mapping(view, self, gfn, count)

    def domain_info(self, domid: DomId) -> Info:
        return Info()

    async def mmuext_op(self, domid: DomId, ops: bytes) -> None:
        assert self.open_mappings == 0, "a mapped frame cannot become a page table"
        command, mfn, _ = MMUEXT_OP.unpack(ops)
        assert command == MmuextCmd.PIN_L4_TABLE
        self.pinned = mfn
        self.validate(mfn)

    def vcpu_set_context(self, domid: DomId, vcpu: VcpuId, context: bytes) -> None:
        assert len(context) == GUEST_CONTEXT_SIZE
        self.context = GuestContext.unpack(context)

    # --- what the hypervisor and the guest would see
    def q(self, address: int) -> int:
        return int(struct.unpack_from("<Q", self.bytes, address)[0])

    def validate(self, l4: int) -> None:
        """The page-type rules: tables of one level each, own frames only, no writable mapping of a table."""
        level_of: dict[int, int] = {}
        leaves: list[int] = []

        def walk(mfn: int, level: int) -> None:
            assert mfn in self.owned
            assert level_of.setdefault(mfn, level) == level
            for index in range(512):
                entry = self.q(mfn * PAGE_SIZE + 8 * index)
                if not entry & 1:
                    assert entry == 0
                    continue
                assert not entry & (0x7FF0_0000_0000_0080 | 0xE00), "bits Xen refuses in a start-of-day entry"
                target = (entry & ADDRESS) >> 12
                if level == 4:
                    assert not 256 <= index < 272, "Xen's slots"
                if level > 1:
                    walk(target, level - 1)
                else:
                    assert target in self.owned
                    leaves.append(entry)

        walk(l4, 4)
        tables = set(level_of)
        for entry in leaves:
            assert not (entry & 2 and (entry & ADDRESS) >> 12 in tables), "writable mapping of a page table"
        self.tables = tables

    def pte(self, va: int) -> int:
        """The L1 entry of ``va``, 0 when there is none."""
        assert self.context is not None
        entry = self.context.ctrlreg[3]
        for shift in (39, 30, 21, 12):
            entry = self.q((entry & ADDRESS) + 8 * (va >> shift & 511))
            if not entry & 1:
                return 0
        return entry

    def read(self, va: int, size: int) -> bytes:
        """Guest memory through its own page tables."""
        out = b""
        while len(out) < size:
            entry = self.pte(va)
            assert entry, f"{va:#x} is not mapped"
            offset = va & 0xFFF
            part = min(size - len(out), PAGE_SIZE - offset)
            start = (entry & ADDRESS) + offset
            out += self.bytes[start : start + part]
            va += part
        return out
