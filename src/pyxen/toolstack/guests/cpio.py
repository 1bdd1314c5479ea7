# SPDX-License-Identifier: GPL-2.0-only
"""A writer of cpio archives in the "newc" format (Linux: Documentation/driver-api/early-userspace/buffer-format.rst).

An initramfs needs device nodes, which an ordinary user cannot make on disk but can very well write into an archive.
The same input gives the same bytes: no times, no owners, numbered inodes.
"""

from __future__ import annotations

import stat
from typing import Final

_MAGIC: Final = b"070701"
_TRAILER: Final = "TRAILER!!!"
_MAX_NAME: Final = 4096


class CpioWriter:
    """Collects entries; :meth:`finish` gives the archive.

    Paths are relative to the root, and directories come before their content (ValueError otherwise).
    """

    def __init__(self) -> None:
        self._out = bytearray()
        self._inode = 0
        self._directories = {""}
        self._names: set[str] = set()

    def directory(self, path: str, mode: int = 0o755) -> None:
        """Add a directory with permission bits ``mode``."""
        self._entry(path, stat.S_IFDIR | mode, nlink=2)

    def file(self, path: str, data: bytes, mode: int = 0o644) -> None:
        """Add a regular file (less than 4 GiB, the format's limit)."""
        self._entry(path, stat.S_IFREG | mode, data)

    def symlink(self, path: str, target: str) -> None:
        """Add a symbolic link at ``path``."""
        self._entry(path, stat.S_IFLNK | 0o777, target.encode())

    def device(self, path: str, major: int, minor: int, mode: int = 0o600) -> None:
        """Add a character device."""
        self._entry(path, stat.S_IFCHR | mode, device=(major, minor))

    def finish(self) -> bytes:
        """The archive, padded to 512 bytes. The writer is done with."""
        self._raw(_TRAILER, 0, b"", 1, (0, 0))
        self._out += bytes(-len(self._out) % 512)
        return bytes(self._out)

    def _entry(
        self, path: str, mode: int, data: bytes = b"", *, nlink: int = 1, device: tuple[int, int] = (0, 0)
    ) -> None:
        parent = path.rpartition("/")[0]
        if path in self._names or parent not in self._directories or path.startswith("/") or len(path) >= _MAX_NAME:
            raise ValueError(f"cpio entry {path!r} is double, absolute, too long or comes before its directory")
        if stat.S_ISDIR(mode):
            self._directories.add(path)
        self._names.add(path)
        self._inode += 1
        self._raw(path, mode, data, nlink, device)

    def _raw(self, path: str, mode: int, data: bytes, nlink: int, device: tuple[int, int]) -> None:
        name = path.encode() + b"\0"
        # ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
        fields = (self._inode, mode, 0, 0, nlink, 0, len(data), 0, 0, *device, len(name), 0)
        self._out += _MAGIC + b"".join(b"%08X" % value for value in fields) + name
        self._out += bytes(-len(self._out) % 4)
        self._out += data
        self._out += bytes(-len(self._out) % 4)
