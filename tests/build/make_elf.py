# SPDX-License-Identifier: GPL-2.0-only
"""Build small ELF kernels and bzImages in memory, good and bad ones."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from pyxen.abi.elfnote import XenElfNote

EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
PHDR = struct.Struct("<IIQQQQQQ")
SHDR = struct.Struct("<IIQQQQIIQQ")
EHDR32 = struct.Struct("<16sHHIIIIIHHHHHH")
PHDR32 = struct.Struct("<8I")
SHDR32 = struct.Struct("<10I")
VIRT_BASE = 0xFFFFFFFF80000000


@dataclass
class Load:
    paddr: int
    data: bytes
    flags: int = 7
    size: int | None = None


def number(kind: int, value: int) -> bytes:
    return note(kind, struct.pack("<Q", value))


def text(kind: int, value: str) -> bytes:
    return note(kind, value.encode() + b"\0")


def note(kind: int, desc: bytes, name: bytes = b"Xen\0") -> bytes:
    body = struct.pack("<III", len(name), len(desc), kind) + name.ljust(len(name) + 3 & ~3, b"\0")
    return body + desc.ljust(len(desc) + 3 & ~3, b"\0")


def xen_notes(entry: int, *more: bytes) -> bytes:
    """What every Xen kernel says, and ``more``."""
    return b"".join(
        (
            number(XenElfNote.ENTRY, entry),
            number(XenElfNote.VIRT_BASE, VIRT_BASE),
            text(XenElfNote.XEN_VERSION, "xen-3.0"),
            text(XenElfNote.LOADER, "generic"),
            *more,
        )
    )


@dataclass
class Kernel:
    """A kernel file in the making; ``build()`` gives its bytes."""

    loads: list[Load] = field(default_factory=lambda: [Load(0x100000, bytes(range(256)) * 32)])
    notes: bytes = b""
    notes_in_section: bool = False
    xen_guest: str | None = None
    entry: int = 0x100000
    machine: int = 62
    kind: int = 2
    bits: int = 64

    def build(self) -> bytes:
        ehdr_form, phdr_form, shdr_form = (EHDR, PHDR, SHDR) if self.bits == 64 else (EHDR32, PHDR32, SHDR32)
        segments: list[tuple[int, ...]] = []
        blobs = b""
        phnum = len(self.loads) + (1 if self.notes and not self.notes_in_section else 0)
        base = ehdr_form.size + phdr_form.size * phnum
        for load in self.loads:
            size = len(load.data) if load.size is None else load.size
            offset = base + len(blobs)
            segments.append((1, load.flags, offset, load.paddr + VIRT_BASE & (1 << self.bits) - 1, load.paddr,
                             len(load.data), size, 4096))  # fmt: skip
            blobs += load.data
        note_offset = base + len(blobs)
        blobs += self.notes
        if self.notes and not self.notes_in_section:
            segments.append((4, 4, note_offset, 0, 0, len(self.notes), len(self.notes), 4))
        sections: list[tuple[int, ...]] = [(0,) * 10]
        names = b"\0.shstrtab\0.notes\0__xen_guest\0"
        if self.notes and self.notes_in_section:
            sections.append((names.index(b".notes"), 7, 0, 0, note_offset, len(self.notes), 0, 0, 4, 0))
        if self.xen_guest is not None:
            raw = self.xen_guest.encode() + b"\0"
            sections.append((names.index(b"__xen_guest"), 1, 0, 0, base + len(blobs), len(raw), 0, 0, 1, 0))
            blobs += raw
        sections.append((names.index(b".shstrtab"), 3, 0, 0, base + len(blobs), len(names), 0, 0, 1, 0))
        blobs += names
        ident = b"\x7fELF" + bytes((self.bits // 32, 1, 1))
        ehdr = ehdr_form.pack(ident.ljust(16, b"\0"), self.kind, self.machine, 1, self.entry, ehdr_form.size,
                              base + len(blobs), 0, ehdr_form.size, phdr_form.size, phnum, shdr_form.size,
                              len(sections), len(sections) - 1)
        if self.bits == 32:  # the flags come later there
            segments = [(s[0], *s[2:7], s[1], s[7]) for s in segments]
        return (
            ehdr
            + b"".join(phdr_form.pack(*segment) for segment in segments)
            + blobs
            + b"".join(shdr_form.pack(*section) for section in sections)
        )


def xen_kernel(*more: bytes, loads: list[Load] | None = None) -> bytes:
    """A good kernel whose entry is the start of its first segment."""
    kernel = Kernel() if loads is None else Kernel(loads=loads)
    kernel.notes = xen_notes(kernel.loads[0].paddr + VIRT_BASE, *more)
    return kernel.build()


def pvh_kernel(*more: bytes, loads: list[Load] | None = None, bits: int = 64, entry: int | None = None) -> bytes:
    """A kernel with nothing but PHYS32_ENTRY, the start of its first segment unless ``entry`` says otherwise."""
    kernel = Kernel(bits=bits, machine=62 if bits == 64 else 3)
    if loads is not None:
        kernel.loads = loads
    at = kernel.loads[0].paddr if entry is None else entry
    kernel.notes = note(XenElfNote.PHYS32_ENTRY, at.to_bytes(bits // 8, "little")) + b"".join(more)
    return kernel.build()


def bzimage(payload: bytes, *, protocol: int = 0x20C, setup_sects: int = 3, gap: int = 32) -> bytes:
    """Wrap a compressed ``payload`` (size trailer included) as arch/x86/boot does."""
    head = bytearray((setup_sects + 1) * 512)
    head[0x1F1] = setup_sects
    head[0x1FE:0x200] = b"\x55\xaa"
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x206, protocol)
    struct.pack_into("<II", head, 0x248, gap, len(payload))
    return bytes(head) + bytes(gap) + payload + bytes(64)
