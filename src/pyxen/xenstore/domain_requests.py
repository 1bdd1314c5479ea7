# SPDX-License-Identifier: GPL-2.0-only
"""The requests about domains.  Arguments are decimal strings, read as C's ``atoi`` reads them."""

from __future__ import annotations

import errno
import re
from typing import TYPE_CHECKING, Final

from pyxen.errors import XenError

if TYPE_CHECKING:
    from pyxen.xenstore.connection import Connection
    from pyxen.xenstore.service import Service

_OK: Final = b"OK\0"
_NUMBER: Final = re.compile(rb"[ \t]*([+-]?\d{1,18})")


def leading_int(text: bytes) -> int:
    """The number ``text`` begins with, else 0 (C's ``atoi``; digits past the 18th are cut off, none is that large)."""
    match = _NUMBER.match(text)
    return int(match[1]) if match is not None else 0


def _arguments(payload: bytes, count: int) -> list[bytes]:
    strings = payload.split(b"\0")[:-1]
    if len(strings) != count:
        raise XenError(errno.EINVAL)
    return strings


def _privileged(conn: Connection) -> None:
    if not conn.privileged:
        raise XenError(errno.EACCES)


def introduce(service: Service, conn: Connection, req_id: int, tx_id: int, payload: bytes) -> bytes:
    """domid, gfn of its ring page, its event channel port: start listening to a guest."""
    _privileged(conn)
    strings = payload.split(b"\0")[:-1]
    if len(strings) < 3:
        raise XenError(errno.EINVAL)
    domid, gfn, port = (leading_int(text) for text in strings[:3])
    service.domains.introduce(domid, gfn, port)
    return _OK


def release(service: Service, conn: Connection, req_id: int, tx_id: int, payload: bytes) -> bytes:
    """The toolstack says that a domain is gone."""
    (text,) = _arguments(payload, 1)
    _privileged(conn)
    service.domains.release(leading_int(text))
    return _OK


def resume(service: Service, conn: Connection, req_id: int, tx_id: int, payload: bytes) -> bytes:
    """A domain that had shut down (to be saved) runs again: its next shutdown is news."""
    (text,) = _arguments(payload, 1)
    _privileged(conn)
    service.domains.resume(leading_int(text))
    return _OK


def set_target(service: Service, conn: Connection, req_id: int, tx_id: int, payload: bytes) -> bytes:
    """domid, target: the first (a stub domain) may do what the second may."""
    domid, target = _arguments(payload, 2)
    _privileged(conn)
    service.domains.set_target(leading_int(domid), leading_int(target))
    return _OK


def is_domain_introduced(service: Service, conn: Connection, req_id: int, tx_id: int, payload: bytes) -> bytes:
    (text,) = _arguments(payload, 1)
    _privileged(conn)
    return b"T\0" if service.domains.is_introduced(leading_int(text)) else b"F\0"


def get_domain_path(service: Service, conn: Connection, req_id: int, tx_id: int, payload: bytes) -> bytes:
    """The home of a domain, whether there is such a domain or not."""
    (text,) = _arguments(payload, 1)
    return b"/local/domain/%d\0" % (leading_int(text) & 0xFFFFFFFF)
