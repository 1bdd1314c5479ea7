# SPDX-License-Identifier: GPL-2.0-only
"""From the bytes of a kernel file to something a domain builder can place (Xen: tools/libxc/xc_dom_*loader.c).

Accepted: an ELF kernel with Xen notes, plain or gzipped, and a bzImage that holds one, with any of the compressions
Linux knows. PV guests are 64-bit; a PVH guest starts in 32-bit mode whatever its kernel is.
"""

from __future__ import annotations

from dataclasses import dataclass

from pyxen.errors import ImageError
from pyxen.toolstack.build.bzimage import extract_kernel, is_bzimage
from pyxen.toolstack.build.decompress import compression, decompress
from pyxen.toolstack.build.elf import EM_386, EM_X86_64, Elf, Segment, parse_elf
from pyxen.toolstack.build.xen_notes import PvhParms, XenParms, pvh_parms, xen_parms


@dataclass(frozen=True, slots=True)
class KernelImage:
    """A kernel ready to be placed. It keeps the unpacked file alive: segments are views of it."""

    elf: Elf
    parms: XenParms

    @property
    def segments(self) -> tuple[Segment, ...]:
        """Load segments, ascending; their pseudo-physical place is ``paddr - parms.paddr_offset``."""
        return self.elf.segments

    @property
    def start(self) -> int:
        """Pseudo-physical address of the first byte."""
        return self.elf.start - self.parms.paddr_offset

    @property
    def end(self) -> int:
        """Pseudo-physical address after the last byte."""
        return self.elf.end - self.parms.paddr_offset


@dataclass(frozen=True, slots=True)
class PvhImage:
    """A kernel ready to be placed at its own physical addresses and started at ``parms.entry``."""

    elf: Elf
    parms: PvhParms


def load_kernel(data: bytes) -> KernelImage:
    """Unpack and parse a kernel file for a PV guest.

    Pure, and slow for large compressed kernels (LZ4 0.1 s, xz 2 s): call it with ``asyncio.to_thread``. Raises
    ImageError with one line for whatever is wrong with the file.
    """
    elf = parse_elf(_unpack(data))
    return KernelImage(elf, xen_parms(elf))


def load_pvh_kernel(data: bytes) -> PvhImage:
    """As :func:`load_kernel`, for a PVH guest: ELF32 will do as well, and PHYS32_ENTRY is needed."""
    elf = parse_elf(_unpack(data), (EM_X86_64, EM_386))
    return PvhImage(elf, pvh_parms(elf))


def _unpack(data: bytes) -> bytes:
    if not data:
        raise ImageError("kernel file is empty")
    if is_bzimage(data):
        image = extract_kernel(data)
    elif compression(data) == "gzip":
        image = decompress(data)
    else:
        image = data
    if image[:4] != b"\x7fELF":
        raise ImageError("kernel is neither a bzImage nor an ELF file")
    return image
