# SPDX-License-Identifier: GPL-2.0-only
"""ELF64 as a kernel loader needs it: load segments, notes and one section by name (Xen: xen/common/libelf/).

Every offset and size comes from a file that may lie, so each is checked against the file before it is used and every
loop is bounded. Symbol tables and the like are other modules' business (pyelftools).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntFlag
from itertools import pairwise
from typing import Final

from pyxen.errors import ImageError

_EHDR: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR: Final = struct.Struct("<IIQQQQQQ")
_SHDR: Final = struct.Struct("<IIQQQQIIQQ")
_NHDR: Final = struct.Struct("<III")

_ELFCLASS64: Final = 2
_ELFDATA2LSB: Final = 1
_ET_EXEC: Final = 2
_ET_DYN: Final = 3
EM_X86_64: Final = 62
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
    """A parsed ELF64 file. ``segments`` are the non-empty PT_LOADs in ascending ``paddr`` order, not overlapping."""

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


def parse_elf(image: bytes, machine: int = EM_X86_64) -> Elf:
    """Parse an executable. Raises ImageError when it is not a little-endian ELF64 one for ``machine``, or lies."""
    view = memoryview(image)
    if len(image) < _EHDR.size:
        raise ImageError("kernel is truncated: it ends inside its ELF header")
    (ident, kind, e_machine, _version, entry, phoff, shoff, _flags, _ehsize,
     phentsize, phnum, shentsize, shnum, shstrndx) = _EHDR.unpack_from(view)  # fmt: skip
    if ident[:4] != b"\x7fELF":
        raise ImageError("kernel is not an ELF file")
    if ident[4] != _ELFCLASS64:
        raise ImageError("kernel is a 32-bit ELF file; only 64-bit PV kernels are supported")
    if ident[5] != _ELFDATA2LSB:
        raise ImageError("kernel is a big-endian ELF file")
    if kind not in (_ET_EXEC, _ET_DYN):
        raise ImageError(f"kernel is not an executable (ELF type {kind})")
    if e_machine != machine:
        raise ImageError(f"kernel is for another processor (ELF machine {e_machine}, not {machine})")
    headers = list(_table(view, "program", phoff, phnum, phentsize, _PHDR))
    segments = _load_segments(view, headers)
    segment_notes: list[Note] = []
    for p_type, _, offset, _, _, filesz, _, _ in headers:
        if p_type == _PT_NOTE:
            _append_notes(segment_notes, _slice(view, offset, filesz, "note segment"))
    section_notes, xen_guest = _sections(view, shoff, shnum, shentsize, shstrndx)
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
    view: memoryview, shoff: int, shnum: int, shentsize: int, shstrndx: int
) -> tuple[list[Note], str | None]:
    """Notes in sections and the ``__xen_guest`` string; a file without a section table (stripped) has neither."""
    if shoff == 0:
        return [], None
    headers = list(_table(view, "section", shoff, shnum, shentsize, _SHDR))
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
