# SPDX-License-Identifier: GPL-2.0-only
"""Read members of a Debian package (deb(5)): an ar archive whose ``data.tar.*`` holds the files.

Members are read by name into memory; nothing is unpacked to disk, so no path in an archive can lead anywhere.
"""

from __future__ import annotations

import io
import lzma
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Final

from pyxen.errors import ImageError

_AR_MAGIC: Final = b"!<arch>\n"
_AR_HEADER: Final = 60
_MAX_MEMBER: Final = 256 << 20


def read_members(package: Path, wanted: Callable[[str], bool]) -> dict[str, bytes]:
    """Regular files of ``package`` whose path (``boot/vmlinuz-…``) is ``wanted``.

    Raises ImageError for a damaged package.
    """
    try:
        name, data = _data_archive(package.read_bytes())
        if name.endswith(".zst"):
            import zstandard

            data = zstandard.ZstdDecompressor().stream_reader(data).read()
        found: dict[str, bytes] = {}
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:*") as archive:
            for member in archive:
                path = member.name.removeprefix("./")
                if not member.isfile() or not wanted(path):
                    continue
                if member.size > _MAX_MEMBER:
                    raise ImageError(f"{package.name}: {path} is absurdly large ({member.size} bytes)")
                stream = archive.extractfile(member)
                assert stream is not None  # isfile()
                found[path] = stream.read()
        return found
    except (tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError, ValueError) as error:
        raise ImageError(f"{package.name} is not a sound Debian package: {error}") from None


def _data_archive(raw: bytes) -> tuple[str, bytes]:
    """-> (name, contents) of the ar member data.tar*. Raises ValueError."""
    if not raw.startswith(_AR_MAGIC):
        raise ValueError("no ar archive")
    position = len(_AR_MAGIC)
    while position + _AR_HEADER <= len(raw):
        header = raw[position : position + _AR_HEADER]
        if header[58:60] != b"`\n":
            raise ValueError(f"bad ar header at byte {position}")
        name = header[:16].decode("ascii", "replace").rstrip(" /")
        size = int(header[48:58])
        position += _AR_HEADER
        if not 0 <= size <= len(raw) - position:
            raise ValueError("truncated")
        if name.startswith("data.tar"):
            return name, raw[position : position + size]
        position += size + (size & 1)
    raise ValueError("no data.tar inside")
