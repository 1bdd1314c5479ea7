# SPDX-License-Identifier: GPL-2.0-only
"""Where everything of a new PVH guest lies (Xen: tools/libxc/xc_dom_x86.c, tools/libxl/libxl_dom.c, libxl_x86.c).

Pure arithmetic over guest-physical addresses:

    0            RAM: the kernel where it wants to be, behind it the ramdisk, then start_info with what it points to
    0xfc000000   ACPI: the RSDP and the tables
    0xfee00000   the local APIC
    0xfeff8000   eight special frames, xenstore's and the console's rings among them
    4 GiB        RAM that does not fit below 0xfc000000
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from pyxen.abi.hvm.start_info import (
    HVM_MEMMAP_ENTRY,
    HVM_MODLIST_ENTRY,
    HVM_START_INFO,
    HVM_START_MAGIC,
    HVM_START_VERSION,
    MemmapType,
)
from pyxen.abi.xen import PAGE_SHIFT, PAGE_SIZE, Gfn
from pyxen.errors import ImageError
from pyxen.toolstack.build import acpi
from pyxen.toolstack.build.guest_memory import Area
from pyxen.toolstack.build.kernel import PvhImage
from pyxen.toolstack.build.pv_layout import too_little_memory

ACPI_BASE: Final = 0xFC000000
"""ACPI_INFO_PHYSICAL_ADDRESS (tools/firmware/hvmloader/config.h); the hole below 4 GiB begins here."""
RSDP_BIOS: Final = 0x100000 - 64
"""Where libxl puts the RSDP for a Linux that looks for it below 1 MiB only."""
HIGH_BASE: Final = 1 << 32
NR_SPECIAL_PAGES: Final = 8
END_SPECIAL_REGION: Final = 0xFF000
_SPECIAL_XENSTORE, _SPECIAL_CONSOLE = 4, 7
_RSDP_SPACE: Final = 64
TABLES_BASE: Final = ACPI_BASE + _RSDP_SPACE
"""Where the ACPI tables go, behind the RSDP."""

MemoryMap = tuple[tuple[int, int, MemmapType], ...]
"""(address, size in bytes, type), ascending, not overlapping."""


@dataclass(frozen=True, slots=True)
class PvhLayout:
    """The plan of one guest. Addresses are guest-physical."""

    nr_pages: int
    ram: tuple[Area, ...]
    acpi: Area
    special: Area
    ramdisk: int | None
    ramdisk_bytes: int
    start_info: int
    modlist: int
    memmap: int
    cmdline: int
    rsdp: int
    tables: int
    memory_map: MemoryMap

    @property
    def xenstore(self) -> Gfn:
        return Gfn(self.special.pfn + _SPECIAL_XENSTORE)

    @property
    def console(self) -> Gfn:
        return Gfn(self.special.pfn + _SPECIAL_CONSOLE)

    @property
    def areas(self) -> tuple[Area, ...]:
        """All frames the guest gets, ascending."""
        low, *high = self.ram
        return low, self.acpi, self.special, *high


def plan(
    image: PvhImage, *, nr_pages: int, ramdisk_bytes: int = 0, cmdline_bytes: int = 0, acpi_bytes: int
) -> PvhLayout:
    """Lay out a guest of ``nr_pages`` frames (ACPI tables and special frames come on top of them, as libxl has it).

    ``cmdline_bytes`` is without its NUL, ``acpi_bytes`` without the RSDP. Raises ImageError when it does not fit.
    """
    low_pages = min(nr_pages, ACPI_BASE >> PAGE_SHIFT)
    ram = [Area(0, low_pages)]
    if nr_pages > low_pages:
        ram.append(Area(HIGH_BASE >> PAGE_SHIFT, nr_pages - low_pages))
    acpi_area = Area(ACPI_BASE >> PAGE_SHIFT, _pages(_RSDP_SPACE + acpi_bytes))
    special = Area(END_SPECIAL_REGION - NR_SPECIAL_PAGES, NR_SPECIAL_PAGES)
    elf = image.elf
    if elf.end > ACPI_BASE:
        raise ImageError(f"kernel ends at {elf.end:#x}, in the hole below 4 GiB")

    in_bios = not image.parms.finds_rsdp_anywhere and not any(
        segment.paddr < RSDP_BIOS + acpi.RSDP_BYTES and segment.end > RSDP_BIOS & -PAGE_SIZE for segment in elf.segments
    )
    memory_map = _memory_map(ram, acpi_area, special, rsdp_in_bios=in_bios)

    at = _Allocator(nr_pages, low_pages << PAGE_SHIFT)
    at.take("kernel", elf.end)
    # A kernel may sit so low that what follows it would meet the old BIOS area; nothing of ours goes there.
    at.next = max(_page_up(at.next), 1 << 20)
    ramdisk = at.take("ramdisk", ramdisk_bytes) if ramdisk_bytes else None
    at.next = _page_up(at.next)
    start_info = at.take("start info", HVM_START_INFO.size)
    at.next += -at.next % 8
    modlist = at.take("start info", HVM_MODLIST_ENTRY.size) if ramdisk_bytes else 0
    memmap = at.take("start info", HVM_MEMMAP_ENTRY.size * len(memory_map))
    cmdline = at.take("start info", cmdline_bytes + 1)
    return PvhLayout(
        nr_pages=nr_pages,
        ram=tuple(ram),
        acpi=acpi_area,
        special=special,
        ramdisk=ramdisk,
        ramdisk_bytes=ramdisk_bytes,
        start_info=start_info,
        modlist=modlist,
        memmap=memmap,
        cmdline=cmdline,
        rsdp=RSDP_BIOS if in_bios else ACPI_BASE,
        tables=TABLES_BASE,
        memory_map=memory_map,
    )


def start_info(layout: PvhLayout, cmdline: bytes) -> bytes:
    """``struct hvm_start_info`` and, right behind it as ``layout`` says, module list, memory map and command line."""
    out = bytearray(layout.cmdline + len(cmdline) + 1 - layout.start_info)
    HVM_START_INFO.pack_into(
        out,
        0,
        HVM_START_MAGIC,
        HVM_START_VERSION,
        0,
        0 if layout.ramdisk is None else 1,
        layout.modlist,
        layout.cmdline,
        layout.rsdp,
        layout.memmap,
        len(layout.memory_map),
    )
    if layout.ramdisk is not None:
        HVM_MODLIST_ENTRY.pack_into(
            out, layout.modlist - layout.start_info, layout.ramdisk, layout.ramdisk_bytes, 0
        )
    for number, (address, size, kind) in enumerate(layout.memory_map):
        at = layout.memmap - layout.start_info + number * HVM_MEMMAP_ENTRY.size
        HVM_MEMMAP_ENTRY.pack_into(out, at, address, size, kind)
    out[layout.cmdline - layout.start_info :] = cmdline + b"\0"
    return bytes(out)


class _Allocator:
    """Hands out bytes of low RAM upwards."""

    def __init__(self, nr_pages: int, limit: int) -> None:
        self.next = 0
        self._nr_pages = nr_pages
        self._limit = limit

    def take(self, what: str, size: int) -> int:
        """The address of the next ``size`` bytes. Raises ImageError when the guest's low memory ends before."""
        address = self.next
        self.next += size
        if self.next > self._limit:
            if self._limit == ACPI_BASE:
                raise ImageError(f"this guest's {what} ends at {self.next:#x}, in the hole below 4 GiB")
            raise too_little_memory(self._nr_pages, what, self.next)
        return address


def _memory_map(ram: list[Area], acpi_area: Area, special: Area, *, rsdp_in_bios: bool) -> MemoryMap:
    """The E820 map. The local APIC is in it as little as on Xen: its page is no memory."""
    entries = [_entry(area, MemmapType.RAM) for area in ram]
    if rsdp_in_bios:
        page = Area(RSDP_BIOS >> PAGE_SHIFT, 1)
        entries[:1] = [
            _entry(Area(0, page.pfn), MemmapType.RAM),
            _entry(page, MemmapType.ACPI),
            _entry(Area(page.end, ram[0].pages - page.end), MemmapType.RAM),
        ]
    entries += [_entry(acpi_area, MemmapType.ACPI), _entry(special, MemmapType.RESERVED)]
    return tuple(sorted(entries))


def _entry(area: Area, kind: MemmapType) -> tuple[int, int, MemmapType]:
    return area.pfn << PAGE_SHIFT, area.pages << PAGE_SHIFT, kind


def _pages(size_bytes: int) -> int:
    return size_bytes + PAGE_SIZE - 1 >> PAGE_SHIFT


def _page_up(address: int) -> int:
    return address + PAGE_SIZE - 1 & -PAGE_SIZE
