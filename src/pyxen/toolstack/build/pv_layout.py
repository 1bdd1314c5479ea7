# SPDX-License-Identifier: GPL-2.0-only
"""Where everything of a new x86-64 PV guest lies (Xen: tools/libxc/xc_dom_core.c, xc_dom_x86.c).

Pure arithmetic over pseudo-physical frame numbers. From ``virt_base`` on, virtual memory maps the frames from 0 on,
one to one and in this order:

    kernel · ramdisk · p2m list · start_info · xenstore · console · page tables · boot stack · >= 512 KiB free, to 4 MiB

A kernel that says so in its notes gets the ramdisk unmapped (MOD_START_PFN) and the p2m list at an address of its own
(INIT_P2M), with page tables of its own behind the list; both then lie after the mapped part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from pyxen.abi.arch_x86 import HYPERVISOR_VIRT_END
from pyxen.abi.xen import PAGE_SHIFT, PAGE_SIZE
from pyxen.errors import ImageError
from pyxen.toolstack.build.elf import SegmentFlags
from pyxen.toolstack.build.guest_memory import Area
from pyxen.toolstack.build.kernel import KernelImage

_SLACK_PAGES: Final = 128
_ALIGN: Final = 1 << 22
_ENTRIES: Final = 512


@dataclass(frozen=True, slots=True)
class Table:
    """One page table: its frame, its level (4 is the root) and the virtual address its first entry maps."""

    level: int
    va: int
    pfn: int


@dataclass(frozen=True, slots=True)
class VirtualMap:
    """``area`` mapped from ``va`` on.

    ``tables`` are the page tables it needs beyond those of maps before it, level by level from the root, each level
    ascending and contiguous in frames.
    """

    va: int
    area: Area
    tables: tuple[Table, ...]


@dataclass(frozen=True, slots=True)
class Layout:
    """The plan of one guest. Frame numbers are pseudo-physical."""

    nr_pages: int
    virt_base: int
    kernel: Area
    ramdisk: Area | None
    p2m: Area
    p2m_va: int
    start_info: int
    xenstore: int
    console: int
    page_tables: Area
    """Of the main map; the first frame is the L4."""
    boot_stack: int
    main: VirtualMap
    p2m_map: VirtualMap | None
    executable: tuple[Area, ...] | None
    """Frames with code; None when the kernel does not tell code from data, so that all must stay executable."""

    @property
    def p2m_with_tables(self) -> Area:
        """The p2m list and the page tables made for it alone: start_info.first_p2m_pfn and nr_p2m_frames."""
        return Area(self.p2m.pfn, self.p2m.pages + (len(self.p2m_map.tables) if self.p2m_map else 0))

    def va(self, pfn: int) -> int:
        """Address of a frame in the main map."""
        return self.virt_base + (pfn << PAGE_SHIFT)


def plan(image: KernelImage, *, nr_pages: int, ramdisk_bytes: int = 0) -> Layout:
    """Lay out a guest of ``nr_pages`` frames. Raises ImageError when it does not fit, saying how much it would need."""
    parms = image.parms
    if parms.virt_base & (PAGE_SIZE - 1) or 1 << 47 <= parms.virt_base < HYPERVISOR_VIRT_END:
        raise ImageError(f"kernel's VIRT_BASE {parms.virt_base:#x} is not page-aligned, or in Xen's part of memory")
    allocator = _Allocator(nr_pages)
    allocator.next = image.start >> PAGE_SHIFT
    kernel = allocator.take("kernel", _pages(image.end) - allocator.next)
    ramdisk: Area | None = None
    if ramdisk_bytes and not parms.mod_start_pfn:
        ramdisk = allocator.take("ramdisk", _pages(ramdisk_bytes))
    p2m_pages = _pages(nr_pages * 8)
    p2m = allocator.take("p2m list", p2m_pages) if parms.init_p2m is None else None
    start_info, xenstore, console = (allocator.take(what, 1).pfn for what in ("start info", "xenstore", "console"))
    page_tables, main, main_end = _main_map(allocator, parms.virt_base)
    boot_stack = allocator.take("boot stack", 1).pfn

    if ramdisk_bytes and ramdisk is None:
        allocator.next = max(allocator.next, main_end)
        ramdisk = allocator.take("ramdisk", _pages(ramdisk_bytes))
    p2m_map = None
    p2m_va = parms.virt_base + (p2m.pfn << PAGE_SHIFT) if p2m else 0
    if p2m is None:
        assert parms.init_p2m is not None
        p2m_va = parms.init_p2m
        allocator.next = max(allocator.next, main_end)
        p2m = allocator.take("p2m list", p2m_pages)
        _check_free(p2m_va, p2m_pages, main)
        indices = _missing_tables(p2m_va, p2m_pages, main.tables)
        tables = allocator.take("page tables of the p2m list", len(indices))
        p2m_map = VirtualMap(p2m_va, p2m, _number_tables(indices, tables.pfn))
    return Layout(
        nr_pages=nr_pages,
        virt_base=parms.virt_base,
        kernel=kernel,
        ramdisk=ramdisk,
        p2m=p2m,
        p2m_va=p2m_va,
        start_info=start_info,
        xenstore=xenstore,
        console=console,
        page_tables=page_tables,
        boot_stack=boot_stack,
        main=main,
        p2m_map=p2m_map,
        executable=_executable(image),
    )


class _Allocator:
    """Hands out frames upwards, as xc_dom_alloc_segment does."""

    def __init__(self, nr_pages: int) -> None:
        self.next = 0
        self._nr_pages = nr_pages

    def take(self, what: str, pages: int) -> Area:
        area = Area(self.next, pages)
        if area.end > self._nr_pages:
            raise too_little_memory(self._nr_pages, what, area.end << PAGE_SHIFT)
        self.next = area.end
        return area

    @property
    def nr_pages(self) -> int:
        return self._nr_pages


def too_little_memory(nr_pages: int, what: str, end: int) -> ImageError:
    """The error for a guest of ``nr_pages`` whose ``what`` ends at byte ``end``, which is beyond them."""
    need, have = end + (1 << 20) - 1 >> 20, nr_pages * PAGE_SIZE / (1 << 20)
    return ImageError(
        f"{have:g} MiB of memory are too little for this guest: its {what} ends at {need} MiB",
        hint="raise memory= in its configuration",
    )


def _pages(size_bytes: int) -> int:
    return size_bytes + PAGE_SIZE - 1 >> PAGE_SHIFT


def _main_map(allocator: _Allocator, virt_base: int) -> tuple[Area, VirtualMap, int]:
    """-> (page tables, map, frame after the map had the guest enough memory).

    The main map must cover its own page tables, so their number is a fixed point: grow until it fits.
    """
    count = 4
    while True:
        end = virt_base + (allocator.next + count + 1 + _SLACK_PAGES << PAGE_SHIFT)
        end = end + _ALIGN - 1 & -_ALIGN
        if end > 1 << 64 or (virt_base < 1 << 47 < end):
            raise ImageError(f"kernel, ramdisk and page tables do not fit into the address space above {virt_base:#x}")
        pages = end - virt_base >> PAGE_SHIFT
        indices = _missing_tables(virt_base, pages, ())
        if len(indices) <= count:
            break
        count = len(indices)
    area = allocator.take("page tables", len(indices))
    # Frames the guest does not have stay unmapped; the slack is then smaller.
    mapped = Area(0, min(pages, allocator.nr_pages))
    return area, VirtualMap(virt_base, mapped, _number_tables(indices, area.pfn)), pages


def _missing_tables(va: int, pages: int, have: tuple[Table, ...]) -> list[tuple[int, int]]:
    """(level, first address) of the tables that map [va, va + pages) and are not in ``have``."""
    known = {(table.level, table.va) for table in have}
    last = va + (pages << PAGE_SHIFT) - 1
    found = []
    for level in (4, 3, 2, 1):
        shift = PAGE_SHIFT + 9 * level
        for index in range(va >> shift, (last >> shift) + 1) if level < 4 else (0,):
            if (level, index << shift) not in known:
                found.append((level, index << shift))
    return found


def _number_tables(indices: list[tuple[int, int]], first_pfn: int) -> tuple[Table, ...]:
    return tuple(Table(level, va, first_pfn + i) for i, (level, va) in enumerate(indices))


def _check_free(va: int, pages: int, main: VirtualMap) -> None:
    """The p2m list's place must be canonical, outside of Xen's hole and apart from the main map."""
    end = va + (pages << PAGE_SHIFT)
    low = end <= 1 << 47
    high = va >= HYPERVISOR_VIRT_END and end <= 1 << 64
    # Apart by whole L1 tables, so that the two maps share none.
    own_l1 = [table.va for table in main.tables if table.level == 1]
    if not (low or high) or (va < own_l1[-1] + (1 << 21) and own_l1[0] < end + 0x1FFFFF & ~0x1FFFFF):
        raise ImageError(f"kernel's INIT_P2M address {va:#x} has no room for the {pages} pages of its p2m list")


def _executable(image: KernelImage) -> tuple[Area, ...] | None:
    """Areas of executable segments, or None.

    A kernel whose segments are all alike (unikernels are often one RWX segment) says nothing about where it executes.
    One that distinguishes gets the rest mapped NX, which makes its stores cheaper: the engine treats a store into a
    page that may execute as a possible change of code. The hypercall page executes wherever it lies.
    """
    code = [segment for segment in image.segments if segment.flags & SegmentFlags.EXECUTE]
    if not code or len(code) == len(image.segments):
        return None
    offset = image.parms.paddr_offset
    areas = []
    for segment in code:
        first = segment.paddr - offset >> PAGE_SHIFT
        areas.append(Area(first, _pages(segment.end - offset) - first))
    if image.parms.hypercall_page is not None:
        areas.append(Area(image.parms.hypercall_page - image.parms.virt_base >> PAGE_SHIFT, 1))
    return tuple(_merge(areas))


def _merge(areas: list[Area]) -> Iterator[Area]:
    """Ascending, not overlapping, not touching."""
    current: Area | None = None
    for area in sorted(areas, key=lambda area: area.pfn):
        if current is not None and area.pfn <= current.end:
            current = Area(current.pfn, max(current.end, area.end) - current.pfn)
            continue
        if current is not None:
            yield current
        current = area
    if current is not None:
        yield current
