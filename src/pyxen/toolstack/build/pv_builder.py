# SPDX-License-Identifier: GPL-2.0-only
"""Build an x86-64 PV guest: memory, kernel, start-of-day pages, vCPU 0 (Xen: tools/libxc/xc_dom_boot.c, xc_dom_x86.c).

The plan is pv_layout's, the contents are pv_pages'; here they meet the hypervisor, through privcmd alone. The page
tables are written as plain data and become page tables when the root is pinned: the hypervisor validates every entry,
so a mistake here is an error there and never a hole.

:func:`build` yields to the event loop after every few MiB. Cancelling it leaves a domain that the caller destroys; it
holds nothing else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, Protocol

from pyxen.abi.arch_x86 import GuestContext, Vgcf
from pyxen.abi.xen import (
    MAX_GUEST_CMDLINE,
    MAX_LEGACY_VCPUS,
    MMUEXT_OP,
    PAGE_SHIFT,
    PAGE_SIZE,
    VCPU_INFO_SIZE,
    VI_UPCALL_MASK,
    DomId,
    EvtchnPort,
    Gfn,
    Mfn,
    MmuextCmd,
    VcpuId,
)
from pyxen.errors import ConfigError
from pyxen.toolstack.build.kernel import KernelImage
from pyxen.toolstack.build.pv_layout import Area, Layout, plan
from pyxen.toolstack.build.pv_pages import FrameMap, hypercall_page, page_tables, start_info

_CHUNK_PAGES: Final = 1024  # 4 MiB: about a millisecond of copying
_POPULATE_PAGES: Final = 4096

# xen/include/public/arch-x86/xen-x86_64.h
_FLAT_KERNEL_CS: Final = 0xE033
_FLAT_KERNEL_SS: Final = 0xE02B
_DR6_DEFAULT: Final = 0xFFFF0FF0
_DR7_DEFAULT: Final = 0x400
_RFLAGS_IF: Final = 1 << 9
_RSP: Final = 4  # hardware encoding order
_RSI: Final = 6


class ForeignMapping(Protocol):
    """Frames of another domain, mapped."""

    view: memoryview

    def written(self) -> None:
        """Tell the engines that the frames changed."""

    def close(self) -> None: ...


class DomainInfo(Protocol):
    """The part of XEN_DOMCTL_getdomaininfo that the builder needs."""

    @property
    def shared_info_mfn(self) -> int: ...


class PrivCmd(Protocol):
    """The part of hypervisor.privcmd that the builder needs."""

    def populate_physmap(self, domid: DomId, pfns: range) -> Sequence[range]:
        """Give the domain a frame for each pfn and enter it in the M2P; machine frames as runs, in pfn order."""

    def foreign_map(self, domid: DomId, gfn: Gfn, count: int = 1, writable: bool = True) -> ForeignMapping: ...

    def domain_info(self, domid: DomId) -> DomainInfo | None: ...

    async def mmuext_op(self, domid: DomId, ops: bytes) -> None:
        """HYPERVISOR_mmuext_op on another domain's tables."""

    def vcpu_set_context(self, domid: DomId, vcpu: VcpuId, context: bytes) -> None: ...


@dataclass(frozen=True, slots=True)
class BuiltDomain:
    """What the toolstack needs of a built guest. For a PV guest a gfn is a machine frame."""

    store_gfn: Gfn
    console_gfn: Gfn
    start_info_mfn: Mfn
    shared_info_mfn: Mfn
    l4_mfn: Mfn
    layout: Layout
    frames: FrameMap


async def build(
    privcmd: PrivCmd,
    domid: DomId,
    image: KernelImage,
    ramdisk: bytes | None,
    cmdline: str,
    nr_pages: int,
    *,
    store_port: EvtchnPort,
    console_port: EvtchnPort,
) -> BuiltDomain:
    """Populate the empty domain ``domid`` with ``nr_pages`` frames and make vCPU 0 ready to run ``image``.

    Raises ImageError when it does not fit, ConfigError for a command line that is too long, XenError for what the
    hypervisor refuses (ENOMEM among it). Nothing is touched before image, ramdisk and command line are known to fit.
    """
    encoded = cmdline.encode()
    if len(encoded) >= MAX_GUEST_CMDLINE or b"\0" in encoded:
        raise ConfigError(f"kernel command line has {len(encoded)} bytes; a PV guest takes {MAX_GUEST_CMDLINE - 1}")
    layout = plan(image, nr_pages=nr_pages, ramdisk_bytes=len(ramdisk or b""))
    info = privcmd.domain_info(domid)
    if info is None:
        raise ConfigError(f"domain {domid} is gone")
    frames = FrameMap(await _populate(privcmd, domid, nr_pages))
    guest = _GuestMemory(privcmd, domid, frames)

    await _load_kernel(guest, image)
    if ramdisk and layout.ramdisk is not None:
        await guest.write(layout.ramdisk.pfn, ramdisk)
    await guest.write(layout.p2m.pfn, frames.p2m_list())
    for pfn, contents in page_tables(frames, layout):
        await guest.write(pfn, contents)
    for pfn in (layout.xenstore, layout.console, layout.boot_stack):
        await guest.write(pfn, bytes(PAGE_SIZE))
    shared_info_mfn = Mfn(info.shared_info_mfn)
    start = start_info(
        layout,
        frames,
        shared_info_mfn=shared_info_mfn,
        store_port=store_port,
        console_port=console_port,
        ramdisk_bytes=len(ramdisk or b""),
        ramdisk_by_pfn=image.parms.mod_start_pfn,
        cmdline=encoded,
    )
    await guest.write(layout.start_info, start.ljust(PAGE_SIZE, b"\0"))
    _mask_upcalls(privcmd, domid, shared_info_mfn)

    l4_mfn = Mfn(frames.mfn(layout.page_tables.pfn))
    await privcmd.mmuext_op(domid, MMUEXT_OP.pack(MmuextCmd.PIN_L4_TABLE, l4_mfn, 0))
    privcmd.vcpu_set_context(domid, VcpuId(0), _boot_context(layout, image.parms.entry, l4_mfn).pack())
    return BuiltDomain(
        store_gfn=Gfn(frames.mfn(layout.xenstore)),
        console_gfn=Gfn(frames.mfn(layout.console)),
        start_info_mfn=Mfn(frames.mfn(layout.start_info)),
        shared_info_mfn=shared_info_mfn,
        l4_mfn=l4_mfn,
        layout=layout,
        frames=frames,
    )


async def _populate(privcmd: PrivCmd, domid: DomId, nr_pages: int) -> list[range]:
    runs: list[range] = []
    for first in range(0, nr_pages, _POPULATE_PAGES):
        for run in privcmd.populate_physmap(domid, range(first, min(first + _POPULATE_PAGES, nr_pages))):
            if runs and runs[-1].stop == run.start:
                runs[-1] = range(runs[-1].start, run.stop)
            else:
                runs.append(run)
        await asyncio.sleep(0)
    return runs


class _GuestMemory:
    """Writes by pfn."""

    def __init__(self, privcmd: PrivCmd, domid: DomId, frames: FrameMap) -> None:
        self._privcmd = privcmd
        self._domid = domid
        self._frames = frames

    async def write(self, pfn: int, data: bytes | memoryview, offset: int = 0) -> None:
        """Write ``data`` from byte ``offset`` (below a page) of frame ``pfn`` on; the rest of its pages stays."""
        source = memoryview(data)
        area = Area(pfn, offset + len(source) + PAGE_SIZE - 1 >> PAGE_SHIFT)
        done = 0
        for first, run in self._pieces(area):
            skip = offset if first == pfn else 0
            size = min((len(run) << PAGE_SHIFT) - skip, len(source) - done)
            with self._mapped(run) as view:
                view[skip : skip + size] = source[done : done + size]
            done += size
            await asyncio.sleep(0)

    async def zero(self, start: int, end: int) -> None:
        """Clear pseudo-physical bytes [start, end)."""
        while start < end:
            size = min(end - start, (_CHUNK_PAGES << PAGE_SHIFT) - (start & PAGE_SIZE - 1))
            await self.write(start >> PAGE_SHIFT, bytes(size), start & PAGE_SIZE - 1)
            start += size

    def _pieces(self, area: Area) -> Iterator[tuple[int, range]]:
        for first, run in self._frames.split(area):
            for i in range(0, len(run), _CHUNK_PAGES):
                yield first + i, run[i : i + _CHUNK_PAGES]

    @contextmanager
    def _mapped(self, run: range) -> Iterator[memoryview]:
        mapping = self._privcmd.foreign_map(self._domid, Gfn(run[0]), len(run))
        try:
            yield mapping.view
            mapping.written()
        finally:
            mapping.close()


async def _load_kernel(guest: _GuestMemory, image: KernelImage) -> None:
    """Copy the segments, clear the part of them that the file does not hold, fill the hypercall page."""
    for segment in image.segments:
        address = segment.paddr - image.parms.paddr_offset
        await guest.write(address >> PAGE_SHIFT, segment.data, address & PAGE_SIZE - 1)
        await guest.zero(address + len(segment.data), address + segment.size)
    if image.parms.hypercall_page is not None:
        await guest.write(image.parms.hypercall_page - image.parms.virt_base >> PAGE_SHIFT, hypercall_page())


def _mask_upcalls(privcmd: PrivCmd, domid: DomId, shared_info_mfn: Mfn) -> None:
    """Every vCPU starts with its events masked; the guest opens them when it has set its callbacks."""
    mapping = privcmd.foreign_map(domid, Gfn(shared_info_mfn), 1)
    try:
        for vcpu in range(MAX_LEGACY_VCPUS):
            mapping.view[vcpu * VCPU_INFO_SIZE + VI_UPCALL_MASK] = 1
        mapping.written()
    finally:
        mapping.close()


def _boot_context(layout: Layout, entry: int, l4_mfn: Mfn) -> GuestContext:
    """vCPU 0 at the kernel's entry: RSI = start_info, RSP = top of the boot stack, flat kernel segments."""
    context = GuestContext(flags=Vgcf.IN_KERNEL | Vgcf.ONLINE)
    context.rip = entry
    context.gpr[_RSP] = layout.va(layout.boot_stack + 1)
    context.gpr[_RSI] = layout.va(layout.start_info)
    context.rflags = _RFLAGS_IF
    context.cs, context.ss = _FLAT_KERNEL_CS, _FLAT_KERNEL_SS
    context.kernel_ss, context.kernel_sp = context.ss, context.gpr[_RSP]
    context.ctrlreg[3] = l4_mfn << PAGE_SHIFT
    context.debugreg[6], context.debugreg[7] = _DR6_DEFAULT, _DR7_DEFAULT
    return context
