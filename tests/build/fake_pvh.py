# SPDX-License-Identifier: GPL-2.0-only
"""A translated domain made of bytes, and the part of privcmd that builds one: frames by gfn, scattered."""

from __future__ import annotations

import errno
from collections.abc import Sequence
from dataclasses import dataclass, field

from pyxen.abi.xen import PAGE_SIZE, DomId, Gfn
from pyxen.errors import XenError

DOMID = DomId(9)


@dataclass
class PvhMapping:
    view: memoryview
    machine: FakePvh
    first: int
    told: bool = False

    def written(self) -> None:
        self.told = True

    def close(self) -> None:
        assert self.told, "engines were not told of a write"
        for i in range(len(self.view) // PAGE_SIZE):
            data = bytes(self.view[i * PAGE_SIZE : (i + 1) * PAGE_SIZE])
            self.machine.pages[self.first + i] = data
        self.machine.open_mappings -= 1


@dataclass
class FakePvh:
    """``frames`` machine frames, handed out in runs of ``run``; pages nobody wrote hold zeroes, as Xen scrubs."""

    frames: int = 1 << 40
    run: int = 1 << 40
    runs: list[tuple[int, int]] = field(default_factory=list)
    """(first gfn, pages) of each run of frames that are neighbours in the machine."""
    pages: dict[int, bytes] = field(default_factory=dict)
    params: dict[int, int] = field(default_factory=dict)
    memory_map: list[tuple[int, int, int]] = field(default_factory=list)
    start: tuple[int, int] | None = None
    """EIP and EBX of vCPU 0."""
    open_mappings: int = 0
    given: int = 0
    top: int = 0

    def populate_physmap(self, domid: DomId, pfns: range) -> Sequence[range]:
        assert domid == DOMID
        assert not any(self.owns(pfn) for pfn in (pfns[0], pfns[-1])), "a frame populated twice"
        if self.given + len(pfns) > self.frames:
            raise XenError(errno.ENOMEM)
        self.given += len(pfns)
        out = []
        for first in range(0, len(pfns), self.run):
            size = min(self.run, len(pfns) - first)
            self.top += 1  # a hole before each
            out.append(range(self.top, self.top + size))
            self.top += size
            self.runs.append((pfns[first], size))
        return out

    def owns(self, gfn: int) -> bool:
        return any(first <= gfn < first + size for first, size in self.runs)

    def foreign_map(self, domid: DomId, gfn: Gfn, count: int = 1, writable: bool = True) -> PvhMapping:
        assert domid == DOMID and writable
        # One piece of memory is mapped only where the machine's frames are neighbours.
        assert any(first <= gfn and gfn + count <= first + size for first, size in self.runs), "not one piece"
        self.open_mappings += 1
        data = bytearray().join(self.page(gfn + i) for i in range(count))
        return PvhMapping(memoryview(data), self, gfn)

    def set_memory_map(self, domid: DomId, entries: Sequence[tuple[int, int, int]]) -> None:
        self.memory_map = [(address, size, int(kind)) for address, size, kind in entries]

    def hvm_param_set(self, domid: DomId, index: int, value: int) -> None:
        self.params[index] = value

    def vcpu_set_pvh_start(self, domid: DomId, entry: int, start_info: int) -> None:
        assert domid == DOMID
        assert self.open_mappings == 0
        self.start = entry, start_info

    # --- what the guest sees
    def page(self, gfn: int) -> bytes:
        assert self.owns(gfn), f"frame {gfn:#x} is not there"
        return self.pages.get(gfn, bytes(PAGE_SIZE))

    def read(self, address: int, size: int) -> bytes:
        out = bytearray()
        while len(out) < size:
            offset = address + len(out) & PAGE_SIZE - 1
            out += self.page(address + len(out) >> 12)[offset : offset + size - len(out)]
        return bytes(out)

    def text(self, address: int) -> bytes:
        out = bytearray()
        while (byte := self.read(address + len(out), 1)) != b"\0":
            out += byte
        return bytes(out)
