# SPDX-License-Identifier: GPL-2.0-only
"""Kernel payload compressions (Linux: usr/Makefile's ``cmd_*_with_size`` and lib/decompress_*.c).

A payload names its own size and ratio, so it can lie: every decompressor here stops at ``limit`` bytes of output and
at the end of its input, and turns each library's own errors into one :class:`ImageError` line. The
functions are pure and slow (up to seconds for xz): call them in a thread.
"""

from __future__ import annotations

import bz2
import lzma
import struct
import zlib
from collections.abc import Callable
from typing import Final

from pyxen.errors import ImageError

MAX_KERNEL_BYTES: Final = 512 << 20
"""No kernel is larger than this once unpacked."""

_LZ4_LEGACY_MAGIC: Final = 0x184C2102
_LZ4_LEGACY_BLOCK: Final = 8 << 20
_LZOP_MAGIC: Final = b"\x89LZO\0\r\n\x1a\n"
_LZOP_MAX_BLOCK: Final = 1 << 20  # lzop writes 256 KiB; the bound is what one lying block can cost us
_LZMA_MEMORY: Final = 256 << 20


def _bounded(out: bytes, limit: int) -> bytes:
    _check_bound(len(out), limit)
    return out


def _check_bound(size: int, limit: int) -> None:
    if size > limit:
        raise ImageError(f"compressed kernel unpacks to more than {limit} bytes")


def _gzip(data: bytes, limit: int) -> bytes:
    stream = zlib.decompressobj(wbits=31)
    out = _bounded(stream.decompress(data, limit + 1), limit)
    if not stream.eof:
        raise ImageError("gzip kernel payload is truncated")
    return out


def _bzip2(data: bytes, limit: int) -> bytes:
    stream = bz2.BZ2Decompressor()
    out = _bounded(stream.decompress(data, limit + 1), limit)
    if not stream.eof:
        raise ImageError("bzip2 kernel payload is truncated")
    return out


def _xz(data: bytes, limit: int) -> bytes:
    return _lzma_stream(lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_LZMA_MEMORY), data, limit, "xz")


def _lzma(data: bytes, limit: int) -> bytes:
    return _lzma_stream(lzma.LZMADecompressor(lzma.FORMAT_ALONE, memlimit=_LZMA_MEMORY), data, limit, "lzma")


def _lzma_stream(stream: lzma.LZMADecompressor, data: bytes, limit: int, name: str) -> bytes:
    out = _bounded(stream.decompress(data, limit + 1), limit)
    if not stream.eof:
        raise ImageError(f"{name} kernel payload is truncated")
    return out


def _zstd(data: bytes, limit: int) -> bytes:
    import zstandard

    try:
        # Linux compresses with "zstd -22 --ultra": a window of 128 MiB.
        reader = zstandard.ZstdDecompressor(max_window_size=1 << 27).stream_reader(data)
        return _bounded(reader.read(limit + 1), limit)
    except zstandard.ZstdError as error:
        raise ImageError(f"zstd kernel payload is damaged: {error}") from None


def _lz4(data: bytes, limit: int) -> bytes:
    """The legacy frame: a magic, then blocks (u32 size, data) of 8 MiB unpacked each."""
    import lz4.block

    out = bytearray()
    position = 4
    while len(data) - position >= 4:
        (size,) = struct.unpack_from("<I", data, position)
        position += 4
        if size == _LZ4_LEGACY_MAGIC:  # frames may be concatenated
            continue
        if size == 0:
            break
        if size > len(data) - position:
            raise ImageError("lz4 kernel payload is truncated")
        try:
            out += lz4.block.decompress(
                data[position : position + size], uncompressed_size=min(_LZ4_LEGACY_BLOCK, limit - len(out) + 1)
            )
        except lz4.block.LZ4BlockError:
            raise ImageError(f"lz4 kernel payload is damaged or too large at byte {position}") from None
        _check_bound(len(out), limit)
        position += size
    return bytes(out)


def _lzop(data: bytes, limit: int) -> bytes:
    """The file format of lzop(1), big-endian: a header, then blocks (unpacked size, packed size, checksums, data)."""
    import lzallright

    out = bytearray()
    try:
        position, flags = _lzop_header(data)
        while True:
            (unpacked,) = struct.unpack_from(">I", data, position)
            if unpacked == 0:
                return bytes(out)
            (packed,) = struct.unpack_from(">I", data, position + 4)
            position += 8
            adler = struct.unpack_from(">I", data, position)[0] if flags & 0x1 else None
            position += 4 * ((flags & 0x1 != 0) + (flags & 0x100 != 0))
            if packed < unpacked:
                position += 4 * ((flags & 0x2 != 0) + (flags & 0x200 != 0))
            if unpacked > _LZOP_MAX_BLOCK or packed > unpacked:
                raise ImageError(f"lzo kernel payload has an absurd block size at byte {position}")
            if packed > len(data) - position:
                raise ImageError("lzo kernel payload is truncated")
            block = data[position : position + packed]
            if packed < unpacked:
                block = lzallright.LZOCompressor.decompress(block, unpacked)
            if len(block) != unpacked or (adler is not None and zlib.adler32(block) != adler):
                raise ImageError(f"lzo kernel payload is damaged at byte {position}")
            out += block
            _check_bound(len(out), limit)
            position += packed
    except (struct.error, IndexError):
        raise ImageError("lzo kernel payload is truncated") from None
    except (lzallright.LZOError, lzallright.InputNotConsumed) as error:
        raise ImageError(f"lzo kernel payload is damaged: {error}") from None


def _lzop_header(data: bytes) -> tuple[int, int]:
    """-> (offset of the first block, flags)."""
    position = len(_LZOP_MAGIC)
    (version,) = struct.unpack_from(">H", data, position)
    modern = version >= 0x0940
    position += 4 + (2 if modern else 0)  # version, library version, version needed
    position += 2 if modern else 1  # method, level
    (flags,) = struct.unpack_from(">I", data, position)
    position += 4
    if flags & 0x800:  # filter
        position += 4
    position += 8 + (4 if modern else 0)  # mode, mtime
    position += 1 + data[position]  # name
    position += 4  # header checksum
    if flags & 0x40:  # extra field
        (length,) = struct.unpack_from(">I", data, position)
        position += 8 + length
    return position, flags


_FORMATS: Final[tuple[tuple[bytes, str, Callable[[bytes, int], bytes]], ...]] = (
    (b"\x1f\x8b", "gzip", _gzip),
    (b"BZh", "bzip2", _bzip2),
    (b"\xfd7zXZ\0", "xz", _xz),
    (b"\x5d\0\0", "lzma", _lzma),
    (_LZOP_MAGIC, "lzo", _lzop),
    (struct.pack("<I", _LZ4_LEGACY_MAGIC), "lz4", _lz4),
    (b"\x28\xb5\x2f\xfd", "zstd", _zstd),
)


def compression(data: bytes) -> str | None:
    """Name of the compression ``data`` starts with, or None."""
    for magic, name, _ in _FORMATS:
        if data.startswith(magic):
            return name
    return None


def decompress(data: bytes, limit: int = MAX_KERNEL_BYTES) -> bytes:
    """Unpack ``data``, at most ``limit`` bytes of it.

    Raises ImageError when the format is unknown, the data is damaged or truncated, or holds more than ``limit`` bytes.
    """
    for magic, name, function in _FORMATS:
        if data.startswith(magic):
            try:
                return function(data, limit)
            except (zlib.error, OSError, EOFError, lzma.LZMAError) as error:
                raise ImageError(f"{name} kernel payload is damaged: {error}") from None
    raise ImageError(f"kernel payload has an unknown compression (starts with {data[:6].hex(' ')})")
