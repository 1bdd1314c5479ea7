# SPDX-License-Identifier: GPL-2.0-only
"""What both clients share: text and bytes, request payloads, errors.

Values are bytes on the wire.  Where a client speaks ``str`` it is UTF-8 with ``surrogateescape``, so that whatever
somebody stored comes back the same when written again.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Final

from pyxen.abi.io.xs_wire import XENSTORE_PAYLOAD_MAX
from pyxen.errors import XenError

Text = str | bytes

MAX_ATTEMPTS: Final = 1000
"""After so many conflicts in a row a transaction is given up with EAGAIN."""


def to_bytes(text: Text) -> bytes:
    """The wire form of a value or path."""
    return text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")


def to_str(raw: bytes) -> str:
    """The reverse of :func:`to_bytes` for ``str``."""
    return raw.decode("utf-8", "surrogateescape")


def strings(*texts: Text) -> bytes:
    """A payload of strings, each ended by NUL.  XenError(EINVAL) for one with a NUL inside, or E2BIG."""
    raw = [to_bytes(text) for text in texts]
    if any(b"\0" in each for each in raw):
        raise XenError(errno.EINVAL, "a NUL cannot be part of a xenstore path or token")
    return check_size(b"\0".join([*raw, b""]))


def check_size(payload: bytes) -> bytes:
    """``payload``, or XenError(E2BIG) for one that no message can carry."""
    if len(payload) > XENSTORE_PAYLOAD_MAX:
        raise XenError(errno.E2BIG, f"a xenstore request carries {XENSTORE_PAYLOAD_MAX} bytes at most")
    return payload


def split(payload: bytes) -> list[str]:
    """The strings of a reply."""
    return [to_str(raw) for raw in payload.split(b"\0")[:-1]]


def error_of(payload: bytes) -> XenError:
    """The exception for an XS_ERROR reply."""
    number = getattr(errno, to_str(payload.rstrip(b"\0")), errno.EIO)
    return XenError(number if isinstance(number, int) else errno.EIO)


def permission_strings(path: Text, perms: Sequence[str]) -> bytes:
    """Payload of SET_PERMS: ``perms`` such as ``["n0", "r5"]``."""
    return strings(path, *perms)


class PartialListing:
    """Puts a listing together from DIRECTORY_PART replies, for one too long for a message."""

    def __init__(self) -> None:
        self._generation = b""
        self._listing = b""

    @property
    def offset(self) -> int:
        """Where the next part begins."""
        return len(self._listing)

    def add(self, payload: bytes) -> list[str] | None:
        """Take the next part; the names once they are all there.  Starts over if the node changed in between."""
        generation, _, part = payload.partition(b"\0")
        if self._listing and generation != self._generation:
            self._listing = b""
            return None
        self._generation = generation
        if part.endswith(b"\0\0") or part == b"\0":
            return split(self._listing + part[:-1])
        if not part:
            raise XenError(errno.EIO, "xenstored sent an empty part of a listing")
        self._listing += part
        return None
