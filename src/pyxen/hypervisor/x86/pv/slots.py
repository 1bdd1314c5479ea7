# SPDX-License-Identifier: GPL-2.0-only
"""What Xen puts into a PV guest's address space: slots 256..271 of every validated L4 (Xen:
xen/include/asm-x86/config.h).

Two slots are used: 256 holds the machine-to-physical table, read-only, at its ABI address; 260 holds the per-domain
area with each vCPU's GDT and LDT window.  The leaves of both are read-only, so a guest (at CPL 3, or at CPL 1 in
fast mode, with
CR0.WP set) can write neither.  The tables themselves are mapped nowhere.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Final

from pyxen.abi.arch_x86 import ROOT_PAGETABLE_FIRST_XEN_SLOT, ROOT_PAGETABLE_XEN_SLOTS
from pyxen.errors import XenError
from pyxen.hypervisor.x86.pv.descriptors import (
    CODE32_DPL3,
    CODE64_DPL1,
    CODE64_DPL3,
    DATA_DPL1,
    DATA_DPL3,
    FIRST_RESERVED_GDT_PAGE,
)

if TYPE_CHECKING:
    from pyxen.machine.memory import FrameAllocator, Memory

PERDOMAIN_SLOT: Final = 260
PERDOMAIN_VIRT_START: Final = 0xFFFF820000000000
PAGES_PER_VCPU: Final = 32
"""GDT window (16 pages), then LDT window (16 pages)."""
LDT_PAGE: Final = 16

_PRESENT: Final = 1
_USER: Final = 4
_AD: Final = 0x60
_NX: Final = 1 << 63
_TABLE: Final = 0x67
_SUPERVISOR_RO: Final = _PRESENT | _AD | _NX
_USER_RO: Final = _PRESENT | _USER | _AD | _NX


def gdt_va(vcpu_id: int) -> int:
    """Linear address of a vCPU's GDT window."""
    return PERDOMAIN_VIRT_START + (vcpu_id * PAGES_PER_VCPU << 12)


def ldt_va(vcpu_id: int) -> int:
    """Linear address of a vCPU's LDT window."""
    return gdt_va(vcpu_id) + (LDT_PAGE << 12)


class XenSlots:
    """The hypervisor's frames that all PV domains share: M2P mapping, zero page, Xen's own GDT page of each mode."""

    def __init__(self, memory: Memory, allocator: FrameAllocator, m2p_frames: list[int]) -> None:
        self._memory = memory
        self._allocator = allocator
        q = memory.q
        self.zero_mfn = self._table()
        self._m2p_l3 = self._table()
        l1_tables = (len(m2p_frames) + 511) // 512
        l2 = 0
        for i in range(l1_tables):
            if not i % 512:
                l2 = self._table()
                q[(self._m2p_l3 << 9) + i // 512] = l2 << 12 | _TABLE
            l1 = self._table()
            q[(l2 << 9) + i % 512] = l1 << 12 | _TABLE
            for j, mfn in enumerate(m2p_frames[i * 512 : i * 512 + 512]):
                q[(l1 << 9) + j] = mfn << 12 | _USER_RO
        self.gdt_mfn = {"exact": self._xen_gdt(CODE64_DPL3), "fast": self._xen_gdt(CODE64_DPL1)}

    def _table(self) -> int:
        mfn = self._allocator.alloc()
        self._memory.zero(mfn)
        return mfn

    def _xen_gdt(self, code64: int) -> int:
        """Entries from selector 0xe000 on. In fast mode the 64-bit code segment has DPL 1: a far transfer to it with
        the ABI's
        RPL 3 then faults, and is emulated as what it is at CPL 3 (see far.py)."""
        mfn = self._table()
        entry = mfn << 9
        self._memory.q[entry + 4] = CODE32_DPL3  # 0xe023
        self._memory.q[entry + 5] = DATA_DPL3  # 0xe02b
        self._memory.q[entry + 6] = code64  # 0xe033
        if code64 == CODE64_DPL1:
            self._memory.q[entry + 9] = DATA_DPL1  # 0xe049: SS of a kernel in fast mode
        return mfn

    def root_entry(self) -> int:
        """L4 entry of slot 256."""
        return self._m2p_l3 << 12 | _TABLE


class PerDomain:
    """One domain's per-domain area: three levels of tables and the 16 L4 entries to install."""

    def __init__(self, shared: XenSlots, mode: str, max_vcpus: int) -> None:
        """XenError(ENOMEM) without frames for the tables."""
        self._shared = shared
        self._memory = shared._memory
        self._mode = mode
        q = self._memory.q
        self._tables: list[int] = []
        try:
            for _ in range(2 + (max_vcpus * PAGES_PER_VCPU + 511) // 512):
                self._tables.append(shared._table())
        except XenError:
            self.release()
            raise
        l3, l2, *self._l1s = self._tables
        q[l3 << 9] = l2 << 12 | _TABLE
        for i, l1 in enumerate(self._l1s):
            q[(l2 << 9) + i] = l1 << 12 | _TABLE
        entries = [0] * ROOT_PAGETABLE_XEN_SLOTS
        entries[0] = shared.root_entry()
        entries[PERDOMAIN_SLOT - ROOT_PAGETABLE_FIRST_XEN_SLOT] = l3 << 12 | _TABLE
        self._entries = memoryview(array("Q", entries))
        for vcpu_id in range(max_vcpus):
            self.set_gdt(vcpu_id, [])

    def install(self, l4_mfn: int) -> None:
        """Write Xen's slots into an L4 table."""
        at = (l4_mfn << 9) + ROOT_PAGETABLE_FIRST_XEN_SLOT
        self._memory.q[at : at + ROOT_PAGETABLE_XEN_SLOTS] = self._entries

    def _leaf(self, vcpu_id: int, page: int) -> int:
        index = vcpu_id * PAGES_PER_VCPU + page
        return (self._l1s[index >> 9] << 9) + (index & 511)

    def set_gdt(self, vcpu_id: int, frames: list[int]) -> None:
        """Map the guest's GDT frames; the rest reads as zero, then Xen's own page. The caller flushes the TLB."""
        q = self._memory.q
        zero = self._shared.zero_mfn << 12 | _SUPERVISOR_RO
        for page in range(LDT_PAGE):
            value = zero
            if page < len(frames):
                value = frames[page] << 12 | _SUPERVISOR_RO
            elif page == FIRST_RESERVED_GDT_PAGE:
                value = self._shared.gdt_mfn[self._mode] << 12 | _SUPERVISOR_RO
            q[self._leaf(vcpu_id, page)] = value

    def set_ldt_page(self, vcpu_id: int, page: int, mfn: int | None) -> None:
        """Map (or, with None, unmap) one page of the LDT window. The caller flushes the TLB."""
        self._memory.q[self._leaf(vcpu_id, LDT_PAGE + page)] = 0 if mfn is None else mfn << 12 | _SUPERVISOR_RO

    def release(self) -> None:
        """Give the tables back. No L4 may hold the slots any more."""
        for mfn in self._tables:
            self._shared._allocator.free(mfn)
        self._tables = []
