# SPDX-License-Identifier: GPL-2.0-only
"""The truth about references, counted from scratch: who could hold one, and does the sum agree with the counts?"""

from __future__ import annotations

from collections import Counter

from pyxen.abi.xen import DOMID_XEN
from pyxen.hypervisor.frames import (
    COUNT_MASK,
    PGC_ALLOCATED,
    PGC_XEN_HEAP,
    PGT_L1,
    PGT_L4,
    PGT_PARTIAL,
    PGT_PINNED,
    PGT_TYPE_MASK,
    PGT_VALIDATED,
    PGT_WRITABLE,
)
from pyxen.hypervisor.frames_types import OWNED
from tests.mm.rig import RW, P, Rig

ADDRESS = 0x000FFFFFFFFFF000


class Audit:
    """Recounts a rig. ``held`` are references that the test itself holds: (mfn, is it a type reference too)."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.held: Counter[tuple[int, bool]] = Counter()
        self.tlb: dict[int, dict[int, bool]] = {}
        """By domain: frames that a CPU may still translate to, and whether for writing."""

    def entries(self, mfn: int) -> list[tuple[int, int]]:
        q = self.rig.memory.q
        return [(i, e) for i, e in enumerate(q[mfn << 9 : (mfn + 1) << 9].tolist()) if e & P]

    def check(self) -> None:
        """Every invariant of the page-type machine."""
        rig, frames = self.rig, self.rig.frames
        general: Counter[int] = Counter()
        typed: Counter[int] = Counter()
        writable_of: list[tuple[int, int]] = []
        mapped: dict[int, dict[int, bool]] = {}

        def both(mfn: int) -> None:
            general[mfn] += 1
            typed[mfn] += 1

        for mfn in range(rig.memory.nr_frames):
            info, count = frames.type_info[mfn], frames.count_info[mfn]
            if count & PGC_ALLOCATED:
                general[mfn] += 1
            if count & PGC_XEN_HEAP and frames.owner[mfn]:
                typed[mfn] += 1
            if info & PGT_PINNED:
                both(mfn)
            if info & PGT_PARTIAL:
                assert info & COUNT_MASK == 1 and not info & PGT_VALIDATED
                both(mfn)
            kind = info & PGT_TYPE_MASK
            if not PGT_L1 <= kind <= PGT_L4 or not info & (PGT_VALIDATED | PGT_PARTIAL):
                continue
            valid, partial_set = frames.partial[mfn] if info & PGT_PARTIAL else (512, False)
            domid = frames.owner[mfn] & ~OWNED
            for i, entry in self.entries(mfn):
                if kind == PGT_L4 and 256 <= i < 272:
                    if info & PGT_VALIDATED:
                        assert entry >> 12 == rig.xen_l3, "a guest's entry in Xen's slots"
                    continue
                target = (entry & ADDRESS) >> 12
                if i == valid and partial_set:
                    general[target] += 1
                if i >= valid:
                    continue
                assert target < rig.memory.nr_frames
                if kind > PGT_L1:
                    both(target)
                    assert frames.type_info[target] & PGT_TYPE_MASK == kind - PGT_L1
                    assert frames.type_info[target] & PGT_VALIDATED
                    assert frames.owner[target] == frames.owner[mfn]
                    continue
                general[target] += 1
                if entry & RW:
                    typed[target] += 1
                    writable_of.append((mfn, target))
                here = mapped.setdefault(domid, {})
                here[target] = here.get(target, False) or bool(entry & RW)
        assert set(frames.partial) == {
            m for m in range(rig.memory.nr_frames) if frames.type_info[m] & PGT_PARTIAL
        }
        for domain in rig.domains.values():
            for vcpu in domain.vcpus:
                for root in (vcpu.pv.guest_table, vcpu.pv.guest_table_user):
                    if root:
                        both(root)
        for waiting in frames.deferred.values():
            for mfn, partial_set in waiting:
                general[mfn] += 1
                typed[mfn] += not partial_set
        for (mfn, is_typed), times in self.held.items():
            general[mfn] += times
            typed[mfn] += times * is_typed

        owned: Counter[int] = Counter()
        for mfn in range(rig.memory.nr_frames):
            where = f"mfn {mfn:#x} type_info {frames.type_info[mfn]:#x} count_info {frames.count_info[mfn]:#x}"
            assert frames.count_info[mfn] & COUNT_MASK == general[mfn], f"{where}: {general[mfn]} references"
            assert frames.type_info[mfn] & COUNT_MASK == typed[mfn], f"{where}: {typed[mfn]} type references"
            assert bool(frames.owner[mfn]) == bool(general[mfn]), f"{where}: owner {frames.owner[mfn]:#x}"
            if frames.owner[mfn]:
                assert rig.allocator.is_allocated(mfn)
                if not frames.count_info[mfn] & PGC_XEN_HEAP:
                    owned[frames.owner[mfn] & ~OWNED] += 1
        for domain in (*rig.domains.values(), rig.dom_io, rig.dom_xen):
            assert domain.tot_pages == owned[domain.domid], f"d{domain.domid} tot_pages"
        for table, target in writable_of:
            assert frames.type_info[target] & PGT_TYPE_MASK == PGT_WRITABLE, (
                f"L1 {table:#x} maps {target:#x} writable, whose type_info is {frames.type_info[target]:#x}"
            )
        assert frames.failed == -1 and not frames._doomed and not frames.lock.held()
        self._check_tlb(mapped)

    def _check_tlb(self, mapped: dict[int, dict[int, bool]]) -> None:
        """What a TLB may still hold must not be worth anything: the frame is the same domain's, and no table if
        writable."""
        frames = self.rig.frames
        for domain in self.rig.domains.values():
            log = domain.v.log
            if "flush" in log or "cr3" in log:
                self.tlb.pop(domain.domid, None)
            log.clear()
            cached = self.tlb.setdefault(domain.domid, {})
            for mfn, writable in mapped.get(domain.domid, {}).items():
                if frames.owner[mfn] == domain.domid | OWNED:
                    cached[mfn] = cached.get(mfn, False) or writable
            if domain.dying:
                cached.clear()
            for mfn, writable in cached.items():
                assert frames.owner[mfn] == domain.domid | OWNED, f"d{domain.domid} may still see mfn {mfn:#x}"
                if writable:
                    info = frames.type_info[mfn]
                    assert not info & COUNT_MASK or info & PGT_TYPE_MASK == PGT_WRITABLE, (
                        f"d{domain.domid} may still write to mfn {mfn:#x}, whose type_info is {info:#x}"
                    )


def nothing_left(rig: Rig) -> None:
    """After all domains are gone: every frame is back."""
    frames = rig.frames
    assert rig.allocator.free_frames == rig.baseline
    assert not frames.partial and not frames.deferred and not frames.relinquishing
    for mfn in range(rig.memory.nr_frames):
        assert not frames.owner[mfn] or frames.owner[mfn] == DOMID_XEN | OWNED
