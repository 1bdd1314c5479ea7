# SPDX-License-Identifier: GPL-2.0-only
"""Build an x86-64 PV guest: memory, kernel, start-of-day pages, vCPU 0 (Xen: tools/libxc/xc_dom_boot.c, xc_dom_x86.c).

The plan is pv_layout's, the contents are pv_pages'; here they meet the hypervisor, through privcmd alone. The page
tables are written as plain data and become page tables when the root is pinned: the hypervisor validates every entry,
so a mistake here is an error there and never a hole.

:func:`build` yields to the event loop after every few MiB. Cancelling it leaves a domain that the caller destroys; it
holds nothing else.
"""

from __future__ import annotations

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
from pyxen.toolstack.build.guest_memory import Area, GuestMemory, MemoryPrivCmd, populate
from pyxen.toolstack.build.kernel import KernelImage
from pyxen.toolstack.build.pv_layout import Layout, plan
from pyxen.toolstack.build.pv_pages import FrameMap, hypercall_page, page_tables, start_info

# xen/include/public/arch-x86/xen-x86_64.h
_FLAT_KERNEL_CS: Final = 0xE033
_FLAT_KERNEL_SS: Final = 0xE02B
_DR6_DEFAULT: Final = 0xFFFF0FF0
_DR7_DEFAULT: Final = 0x400
_RFLAGS_IF: Final = 1 << 9
_RSP: Final = 4  # hardware encoding order
_RSI: Final = 6


class DomainInfo(Protocol):
    """The part of XEN_DOMCTL_getdomaininfo that the builder needs."""

    @property
    def shared_info_mfn(self) -> int: ...


class PrivCmd(MemoryPrivCmd, Protocol):
    """The part of hypervisor.privcmd that the builder needs."""

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
    frames = FrameMap(await populate(privcmd, domid, Area(0, nr_pages)))
    guest = GuestMemory(privcmd, domid, frames.split)

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


async def _load_kernel(guest: GuestMemory, image: KernelImage) -> None:
    """Copy the segments, clear the part of them that the file does not hold, fill the hypercall page."""
    for segment in image.segments:
        address = segment.paddr - image.parms.paddr_offset
        await guest.write_at(address, segment.data)
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
