# SPDX-License-Identifier: GPL-2.0-only
"""Build a PVH guest: memory, kernel, ACPI tables, start_info, vCPU 0 (Xen: tools/libxc/xc_dom_x86.c ``vcpu_hvm``,
``bootlate_hvm``, ``alloc_magic_pages_hvm``).

The plan is pvh_layout's, the tables are acpi's; here they meet the hypervisor, through privcmd alone.

:func:`build` yields to the event loop after every few MiB. Cancelling it leaves a domain that the caller destroys; it
holds nothing else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from pyxen.abi.hvm.params import HvmParam
from pyxen.abi.xen import PAGE_SHIFT, DomId, EvtchnPort, Gfn
from pyxen.errors import ConfigError
from pyxen.toolstack.build import acpi, pvh_layout
from pyxen.toolstack.build.guest_memory import Area, GuestMemory, MemoryPrivCmd, populate
from pyxen.toolstack.build.kernel import PvhImage
from pyxen.toolstack.build.pvh_layout import PvhLayout

MAX_CMDLINE: Final = 4096
"""The ABI has no limit; Linux keeps 2048 bytes and drops the rest without a word."""


class PrivCmd(MemoryPrivCmd, Protocol):
    """The part of hypervisor.privcmd that the builder needs."""

    def set_memory_map(self, domid: DomId, entries: Sequence[tuple[int, int, int]]) -> None:
        """XENMEM_set_memory_map."""

    def hvm_param_set(self, domid: DomId, index: int, value: int) -> None:
        """HVMOP_set_param."""

    def vcpu_set_pvh_start(self, domid: DomId, entry: int, start_info: int) -> None:
        """XEN_DOMCTL_sethvmcontext of vCPU 0: flat 32-bit protected mode, paging off, EIP at ``entry``, EBX at
        ``start_info``; it is up after it."""


@dataclass(frozen=True, slots=True)
class BuiltPvhDomain:
    """What the toolstack needs of a built guest."""

    store_gfn: Gfn
    console_gfn: Gfn
    layout: PvhLayout


async def build(
    privcmd: PrivCmd,
    domid: DomId,
    image: PvhImage,
    ramdisk: bytes | None,
    cmdline: str,
    nr_pages: int,
    *,
    vcpus: int,
    store_port: EvtchnPort,
    console_port: EvtchnPort,
) -> BuiltPvhDomain:
    """Populate the empty domain ``domid`` with ``nr_pages`` frames and make vCPU 0 ready to run ``image``.

    ``vcpus`` is the number of vCPUs the domain has, online or not. Raises ImageError when it does not fit, ConfigError
    for a command line that is too long, XenError for what the hypervisor refuses (ENOMEM among it). Nothing is touched
    before image, ramdisk and command line are known to fit.
    """
    encoded = cmdline.encode(errors="surrogateescape")
    if len(encoded) >= MAX_CMDLINE or b"\0" in encoded:
        raise ConfigError(f"kernel command line has {len(encoded)} bytes; a PVH guest takes {MAX_CMDLINE - 1}")
    tables = acpi.build_tables(pvh_layout.TABLES_BASE, vcpus)
    layout = pvh_layout.plan(
        image,
        nr_pages=nr_pages,
        ramdisk_bytes=len(ramdisk or b""),
        cmdline_bytes=len(encoded),
        acpi_bytes=len(tables.tables),
    )
    frames = _Frames()
    for area in layout.areas:
        frames.add(area, await populate(privcmd, domid, area))
    privcmd.set_memory_map(domid, layout.memory_map)
    guest = GuestMemory(privcmd, domid, frames.split)

    for segment in image.elf.segments:
        await guest.write_at(segment.paddr, segment.data)
        await guest.zero(segment.paddr + len(segment.data), segment.end)
    if ramdisk and layout.ramdisk is not None:
        await guest.write_at(layout.ramdisk, ramdisk)
    await guest.write_at(layout.start_info, pvh_layout.start_info(layout, encoded))
    await guest.write_at(layout.tables, tables.tables)
    await guest.write_at(layout.rsdp, tables.rsdp)
    await guest.zero(layout.special.pfn << PAGE_SHIFT, layout.special.end << PAGE_SHIFT)

    for param, value in (
        (HvmParam.STORE_PFN, layout.xenstore),
        (HvmParam.STORE_EVTCHN, store_port),
        (HvmParam.CONSOLE_PFN, layout.console),
        (HvmParam.CONSOLE_EVTCHN, console_port),
    ):
        privcmd.hvm_param_set(domid, param, value)
    privcmd.vcpu_set_pvh_start(domid, image.parms.entry, layout.start_info)
    return BuiltPvhDomain(layout.xenstore, layout.console, layout)


class _Frames:
    """Which of the guest's frames are neighbours in the machine too, and so can be mapped as one piece."""

    def __init__(self) -> None:
        self._runs: list[Area] = []

    def add(self, area: Area, machine_runs: Sequence[range]) -> None:
        first = area.pfn
        for run in machine_runs:
            self._runs.append(Area(first, len(run)))
            first += len(run)

    def split(self, area: Area) -> Iterator[tuple[int, range]]:
        """(first gfn, gfns) of each contiguous piece of ``area``."""
        for run in self._runs:
            low, high = max(run.pfn, area.pfn), min(run.end, area.end)
            if low < high:
                yield low, range(low, high)
