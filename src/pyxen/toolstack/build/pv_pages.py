# SPDX-License-Identifier: GPL-2.0-only
"""Contents of the pages a domain builder makes up: page tables, the p2m list, the hypercall page, start_info.

Everything is produced in bulk (``array`` over ``range``): a page-table entry is the frame's address plus flags, so the
entries of a run of frames are an arithmetic progression.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Final

from pyxen.abi.xen import PAGE_SHIFT, PAGE_SIZE, START_INFO, Hypercall, Sif
from pyxen.toolstack.build.guest_memory import Area
from pyxen.toolstack.build.pv_layout import Layout, Table, VirtualMap

# As in libxc's xc_dom_x86.c. Xen adds _PAGE_USER to L1 entries itself where a guest kernel runs in ring 3.
_L1_FLAGS: Final = 0x23  # present, writable, accessed
_L1_READ_ONLY: Final = 0x21
_TABLE_FLAGS: Final = 0x67  # present, writable, user, accessed, dirty
_NX: Final = 1 << 63

_SLOT_BYTES: Final = 32
_HYPERCALL_SLOTS: Final = PAGE_SIZE // _SLOT_BYTES

START_MAGIC: Final = b"xen-3.0-x86_64"


class FrameMap:
    """pfn -> mfn of a new guest, as runs: ``runs[i]`` are the machine frames of consecutive pfns."""

    def __init__(self, runs: Sequence[range]) -> None:
        self.runs: list[tuple[int, range]] = []
        pfn = 0
        for run in runs:
            self.runs.append((pfn, run))
            pfn += len(run)
        self.nr_pages = pfn

    def split(self, area: Area) -> Iterator[tuple[int, range]]:
        """(first pfn, machine frames) of each contiguous piece of ``area``."""
        for first, run in self.runs:
            low, high = max(first, area.pfn), min(first + len(run), area.end)
            if low < high:
                yield low, run[low - first : high - first]

    def mfn(self, pfn: int) -> int:
        """Machine frame of one pfn; KeyError when there is none."""
        for _, run in self.split(Area(pfn, 1)):
            return run[0]
        raise KeyError(pfn)

    def p2m_list(self) -> bytes:
        """The list a guest reads: one u64 a pfn, up to a page boundary with INVALID_MFN."""
        out: array[int] = array("Q")
        for _, run in self.runs:
            out.extend(run)
        return out.tobytes().ljust(-(-len(out) * 8 // PAGE_SIZE) * PAGE_SIZE, b"\xff")


def leaf_entries(frames: FrameMap, area: Area, layout: Layout) -> array[int]:
    """L1 entries that map ``area``: page tables read-only, NX where the kernel has no code."""
    cuts = {area.pfn, area.end}
    tables = [layout.page_tables]
    if layout.p2m_map is not None:
        tables.append(Area(layout.p2m.end, len(layout.p2m_map.tables)))
    for other in (*tables, *(layout.executable or ())):
        cuts.update(edge for edge in (other.pfn, other.end) if area.pfn < edge < area.end)
    edges = sorted(cuts)
    out: array[int] = array("q")  # signed: NX is the sign bit, and both ends of the range stay machine words
    for low, high in pairwise(edges):
        flags = _L1_READ_ONLY if _within(low, tables) else _L1_FLAGS
        if layout.executable is not None and not _within(low, layout.executable):
            flags -= _NX
        for _, run in frames.split(Area(low, high - low)):
            start = (run.start << PAGE_SHIFT) + flags
            out.extend(range(start, start + (len(run) << PAGE_SHIFT), PAGE_SIZE))
    return out


def _within(pfn: int, areas: Sequence[Area]) -> bool:
    return any(area.pfn <= pfn < area.end for area in areas)


def page_tables(frames: FrameMap, layout: Layout) -> Iterator[tuple[int, bytes]]:
    """(pfn, contents) of all page tables; the contents may span several consecutive frames."""
    uppers: dict[int, array[int]] = {}
    by_place = {}
    maps = [layout.main] + ([layout.p2m_map] if layout.p2m_map else [])
    for virtual_map in maps:
        for table in virtual_map.tables:
            by_place[table.level, table.va] = table
            if table.level > 1:
                uppers[table.pfn] = array("Q", bytes(PAGE_SIZE))
    for table in by_place.values():
        if table.level < 4:
            shift = PAGE_SHIFT + 9 * table.level
            parent_span = PAGE_SHIFT + 9 * (table.level + 1)
            parent_va = table.va >> parent_span << parent_span if table.level < 3 else 0
            parent = by_place[table.level + 1, parent_va]
            uppers[parent.pfn][table.va >> shift & 511] = frames.mfn(table.pfn) << PAGE_SHIFT | _TABLE_FLAGS
    for virtual_map in maps:
        yield from _leaf_tables(frames, layout, virtual_map, by_place)
    for pfn, entries in uppers.items():
        yield pfn, entries.tobytes()


def _leaf_tables(
    frames: FrameMap, layout: Layout, virtual_map: VirtualMap, by_place: dict[tuple[int, int], Table]
) -> Iterator[tuple[int, bytes]]:
    """L1 tables of one map, as one piece: level 1 comes last in ``tables``, in address order and contiguous.

    Two maps never share an L1: INIT_P2M is 2 MiB aligned and apart from the main map.
    """
    own = [table for table in virtual_map.tables if table.level == 1]
    lead = virtual_map.va >> PAGE_SHIFT & 511
    entries = bytes(8 * lead) + leaf_entries(frames, virtual_map.area, layout).tobytes()
    yield own[0].pfn, entries.ljust(len(own) * PAGE_SIZE, b"\0")


def hypercall_page() -> bytes:
    """The transfer page of a 64-bit PV guest (Xen: arch/x86/x86_64/traps.c, hypercall_page_initialise_ring3_kernel).

    Slot n, 32 bytes: ``push %rcx; push %r11; mov $n,%eax; syscall; pop %r11; pop %rcx; ret``. Slot iret is jumped to,
    not called: ``push %rcx; push %r11; push %rax; mov $23,%eax; syscall``. Unused bytes are INT3.
    """
    page = bytearray(b"\xcc" * PAGE_SIZE)
    for number in range(_HYPERCALL_SLOTS):
        load = b"\xb8" + struct.pack("<I", number)
        if number == Hypercall.IRET:
            code = b"\x51\x41\x53\x50" + load + b"\x0f\x05"
        else:
            code = b"\x51\x41\x53" + load + b"\x0f\x05\x41\x5b\x59\xc3"
        page[number * _SLOT_BYTES : number * _SLOT_BYTES + len(code)] = code
    return bytes(page)


def start_info(
    layout: Layout,
    frames: FrameMap,
    *,
    shared_info_mfn: int,
    store_port: int,
    console_port: int,
    ramdisk_bytes: int,
    ramdisk_by_pfn: bool,
    cmdline: bytes,
) -> bytes:
    """``struct start_info`` (xen/include/public/xen.h). ``cmdline`` is shorter than MAX_GUEST_CMDLINE."""
    # No VIRT_P2M_4TOOLS: a guest then keeps the three-level p2m tree too, which is what 4.6's tools save and dump by.
    flags = Sif(0)
    mod_start = 0
    if layout.ramdisk is not None:
        mod_start = layout.ramdisk.pfn if ramdisk_by_pfn else layout.va(layout.ramdisk.pfn)
        if ramdisk_by_pfn:
            flags |= Sif.MOD_START_PFN
    p2m = layout.p2m_with_tables if layout.p2m_map else Area(0, 0)
    return START_INFO.pack(
        START_MAGIC,
        layout.nr_pages,
        shared_info_mfn << PAGE_SHIFT,
        flags,
        frames.mfn(layout.xenstore),
        store_port,
        frames.mfn(layout.console),
        console_port,
        layout.va(layout.page_tables.pfn),
        layout.page_tables.pages,
        layout.p2m_va,
        mod_start,
        ramdisk_bytes,
        cmdline,
        p2m.pfn,
        p2m.pages,
    )
