# SPDX-License-Identifier: GPL-2.0-only
"""A small writer of AML, ACPI's byte code (ACPI 5.0, chapter 20): what the tables of a PVH guest need, no more.

Every function returns the bytes of one term; terms are concatenated. Names are written as in ASL (``\\_SB.PR00``).
"""

from __future__ import annotations

import re
import struct
from typing import Final

_SEGMENT: Final = re.compile(r"[A-Z_][A-Z0-9_]{0,3}")
_MAX_PACKAGE_BYTES: Final = (1 << 28) - 1


def name_string(name: str) -> bytes:
    """A path: an optional ``\\``, then segments of up to four characters. Raises ValueError for what is none."""
    rooted = name.startswith("\\")
    segments = name[rooted:].split(".")
    if not all(_SEGMENT.fullmatch(segment) for segment in segments) or len(segments) > 255:
        raise ValueError(f"{name!r} is not an ACPI name")
    path = b"".join(segment.ljust(4, "_").encode() for segment in segments)
    prefix = {1: b"", 2: b"\x2e"}.get(len(segments), bytes((0x2F, len(segments))))
    return b"\\" * rooted + prefix + path


def integer(value: int) -> bytes:
    """The shortest constant of ``value`` (0 to 2^64 - 1; ValueError otherwise)."""
    if value in (0, 1):
        return bytes((value,))
    for opcode, layout in ((0x0A, "<B"), (0x0B, "<H"), (0x0C, "<I"), (0x0E, "<Q")):
        if 0 <= value < 1 << 8 * struct.calcsize(layout):
            return bytes((opcode,)) + struct.pack(layout, value)
    raise ValueError(f"{value} does not fit into 64 bits")


def string(text: str) -> bytes:
    """An ASCII string."""
    return b"\x0d" + text.encode("ascii") + b"\0"


def package(*elements: bytes) -> bytes:
    """``Package () {…}`` of at most 255 elements."""
    return b"\x12" + _sized(bytes((len(elements),)) + b"".join(elements))


def define(name: str, value: bytes) -> bytes:
    """``Name (name, value)``."""
    return b"\x08" + name_string(name) + value


def scope(name: str, *terms: bytes) -> bytes:
    """``Scope (name) {…}``."""
    return b"\x10" + _sized(name_string(name) + b"".join(terms))


def device(name: str, *terms: bytes) -> bytes:
    """``Device (name) {…}``."""
    return b"\x5b\x82" + _sized(name_string(name) + b"".join(terms))


def _sized(body: bytes) -> bytes:
    """``body`` behind its PkgLength, which counts its own one to four bytes."""
    if len(body) + 1 < 64:
        return bytes((len(body) + 1,)) + body
    extra = next(n for n in (1, 2, 3) if len(body) + 1 + n < 1 << 4 + 8 * n or n == 3)
    length = len(body) + 1 + extra
    if length > _MAX_PACKAGE_BYTES:
        raise ValueError("AML package is too long")
    return bytes((extra << 6 | length & 15,)) + (length >> 4).to_bytes(extra, "little") + body
