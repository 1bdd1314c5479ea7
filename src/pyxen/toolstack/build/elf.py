# SPDX-License-Identifier: GPL-2.0-only
"""ELF as a kernel loader needs it: load segments, notes and one section by name (Xen: xen/common/libelf/).

Every offset and size comes from a file that may lie, so each is checked against the file before it is used and every
loop is bounded. Symbol tables and the like are other modules' business (pyelftools).
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from enum import IntFlag
from itertools import pairwise
from typing import Final

from pyxen.errors import ImageError


@dataclass(frozen=True, slots=True)
class _Format:
    """One ELF class: its headers, and where in a program header the flags are (the other fields keep their order)."""

    ehdr: struct.Struct
    phdr: struct.Struct
    shdr: struct.Struct
    flags_at: int


_ELFCLASS32: Final = 1
_ELFCLASS64: Final = 2
_FORMATS: Final = {
    _ELFCLASS32: _Format(struct.Struct("<16sHHIIIIIHHHHHH"), struct.Struct("<8I"), struct.Struct("<10I"), 6),
    _ELFCLASS64: _Format(
        struct.Struct("<16sHHIQQQIHHHHHH"), struct.Struct("<IIQQQQQQ"), struct.Struct("<IIQQQQIIQQ"), 1
    ),
}
_NHDR: Final = struct.Struct("<III")

_ELFDATA2LSB: Final = 1
_ET_EXEC: Final = 2
_ET_DYN: Final = 3
EM_386: Final = 3
EM_X86_64: Final = 62
_CLASS_OF: Final = {EM_386: _ELFCLASS32, EM_X86_64: _ELFCLASS64}
_PT_LOAD: Final = 1
_PT_NOTE: Final = 4
_SHT_NOTE: Final = 7
_SHT_NOBITS: Final = 8

_MAX_NOTES: Final = 1024
"""Of one file; Linux has 22."""


class SegmentFlags(IntFlag):
    """``PF_*``."""

    EXECUTE = 1
    WRITE = 2
    READ = 4


@dataclass(frozen=True, slots=True)
class Segment:
    """A PT_LOAD segment: ``data`` goes to ``paddr``, zeroes follow up to ``size`` bytes."""

    paddr: int
    vaddr: int
    size: int
    flags: SegmentFlags
    data: memoryview

    @property
    def end(self) -> int:
        return self.paddr + self.size


@dataclass(frozen=True, slots=True)
class Note:
    """One note. ``name`` is without its terminating NUL."""

    name: bytes
    type: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Elf:
    """A parsed ELF file. ``segments`` are the non-empty PT_LOADs in ascending ``paddr`` order, not overlapping."""

    entry: int
    segments: tuple[Segment, ...]
    segment_notes: tuple[Note, ...]
    section_notes: tuple[Note, ...]
    xen_guest: str | None
    """Contents of the legacy ``__xen_guest`` section."""

    @property
    def start(self) -> int:
        """Lowest pseudo-physical address."""
        return self.segments[0].paddr

    @property
    def end(self) -> int:
        """First pseudo-physical address after the image."""
        return self.segments[-1].end


def parse_elf(image: bytes, machines: Collection[int] = (EM_X86_64,)) -> Elf:
    """Parse an executable for one of ``machines``: EM_X86_64 means ELF64, EM_386 ELF32.

    Raises ImageError when it is none, is not little-endian, or lies.
    """
    view = memoryview(image)
    form = _FORMATS.get(image[4] if len(image) > 4 else 0, _FORMATS[_ELFCLASS64])
    if image[:4] != b"\x7fELF" and len(image) >= form.ehdr.size:
        raise ImageError("kernel is not an ELF file")
    if len(image) < form.ehdr.size:
        raise ImageError("kernel is truncated: it ends inside its ELF header")
    (ident, kind, e_machine, _version, entry, phoff, shoff, _flags, _ehsize,
     phentsize, phnum, shentsize, shnum, shstrndx) = form.ehdr.unpack_from(view)  # fmt: skip
    if ident[4] == _ELFCLASS32 and EM_386 not in machines:
        raise ImageError(
            "kernel is a 32-bit ELF file; only 64-bit PV kernels are supported",
            hint='type = "pvh" starts 32-bit kernels that have a PHYS32_ENTRY note',
        )
    if ident[5] != _ELFDATA2LSB:
        raise ImageError("kernel is a big-endian ELF file")
    if kind not in (_ET_EXEC, _ET_DYN):
        raise ImageError(f"kernel is not an executable (ELF type {kind})")
    if e_machine not in machines or _CLASS_OF.get(e_machine) != ident[4]:
        wanted = " or ".join(str(machine) for machine in machines)
        raise ImageError(
            f"kernel is for another processor (ELF class {ident[4]}, machine {e_machine}, not machine {wanted})"
        )
    headers = list(_program_headers(view, phoff, phnum, phentsize, form))
    segments = _load_segments(view, headers)
    segment_notes: list[Note] = []
    for p_type, _, offset, _, _, filesz, _, _ in headers:
        if p_type == _PT_NOTE:
            _append_notes(segment_notes, _slice(view, offset, filesz, "note segment"))
    section_notes, xen_guest = _sections(view, shoff, shnum, shentsize, shstrndx, form.shdr)
    return Elf(entry, segments, tuple(segment_notes), tuple(section_notes), xen_guest)


def _append_notes(notes: list[Note], data: memoryview) -> None:
    """Add the notes of one segment or section; ends quietly at padding too short for a header."""
    position = 0
    while len(data) - position >= _NHDR.size:
        namesz, descsz, kind = _NHDR.unpack_from(data, position)
        position += _NHDR.size
        desc = position + (namesz + 3 & ~3)
        if desc + descsz > len(data):
            raise ImageError("kernel has a note that leaves its segment")
        if len(notes) == _MAX_NOTES:
            raise ImageError(f"kernel has more than {_MAX_NOTES} notes")
        name = bytes(data[position : position + namesz]).rstrip(b"\0")
        notes.append(Note(name, kind, bytes(data[desc : desc + descsz])))
        position = desc + (descsz + 3 & ~3)


def _slice(view: memoryview, offset: int, size: int, what: str) -> memoryview:
    if offset + size > len(view):
        raise ImageError(
            f"kernel is truncated: its {what} is bytes {offset:#x} to {offset + size:#x}, the file has {len(view):#x}"
        )
    return view[offset : offset + size]


def _table(
    view: memoryview, what: str, offset: int, count: int, entry_size: int, layout: struct.Struct
) -> Iterator[tuple[int, ...]]:
    """Rows of the program or section header table; ``count`` is at most 65535 by its type."""
    if count == 0:
        return
    if entry_size < layout.size:
        raise ImageError(f"kernel's ELF {what} headers are {entry_size} bytes each, not {layout.size}")
    table = _slice(view, offset, count * entry_size, f"{what} header table")
    for i in range(count):
        yield layout.unpack_from(table, i * entry_size)


def _program_headers(
    view: memoryview, offset: int, count: int, entry_size: int, form: _Format
) -> Iterator[tuple[int, ...]]:
    """Program headers with their fields in ELF64's order: type, flags, offset, vaddr, paddr, filesz, memsz, align."""
    for row in _table(view, "program", offset, count, entry_size, form.phdr):
        rest = row[1 : form.flags_at] + row[form.flags_at + 1 :]
        yield row[0], row[form.flags_at], *rest


def _load_segments(view: memoryview, headers: list[tuple[int, ...]]) -> tuple[Segment, ...]:
    segments = []
    for p_type, flags, offset, vaddr, paddr, filesz, memsz, _align in headers:
        if p_type != _PT_LOAD or memsz == 0:
            continue
        if filesz > memsz:
            raise ImageError(f"kernel segment at {paddr:#x} has {filesz:#x} bytes in the file, {memsz:#x} in memory")
        if paddr + memsz > 1 << 64:
            raise ImageError(f"kernel segment at {paddr:#x} wraps around")
        data = _slice(view, offset, filesz, f"segment at {paddr:#x}")
        segments.append(Segment(paddr, vaddr, memsz, SegmentFlags(flags & 7), data))
    if not segments:
        raise ImageError("kernel has nothing to load: no PT_LOAD segment")
    segments.sort(key=lambda segment: segment.paddr)
    for below, above in pairwise(segments):
        if above.paddr < below.end:
            raise ImageError(f"kernel segments overlap at {above.paddr:#x}")
    return tuple(segments)


def _sections(
    view: memoryview, shoff: int, shnum: int, shentsize: int, shstrndx: int, layout: struct.Struct
) -> tuple[list[Note], str | None]:
    """Notes in sections and the ``__xen_guest`` string; a file without a section table (stripped) has neither."""
    if shoff == 0:
        return [], None
    headers = list(_table(view, "section", shoff, shnum, shentsize, layout))
    notes: list[Note] = []
    xen_guest = None
    names = memoryview(b"")
    if 0 < shstrndx < len(headers) and headers[shstrndx][1] != _SHT_NOBITS:
        names = _slice(view, headers[shstrndx][4], headers[shstrndx][5], "section name table")
    for name, kind, _, _, offset, size, *_ in headers:
        if kind == _SHT_NOTE:
            _append_notes(notes, _slice(view, offset, size, "note section"))
        elif kind != _SHT_NOBITS and bytes(names[name : name + 12]) == b"__xen_guest\0":
            text = bytes(_slice(view, offset, min(size, 65536), "__xen_guest section"))
            xen_guest = text.split(b"\0", 1)[0].decode("ascii", "replace")
    return notes, xen_guest
