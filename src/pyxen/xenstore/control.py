# SPDX-License-Identifier: GPL-2.0-only
"""XS_CONTROL: commands for the daemon itself (``xenstore-control``)."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from pyxen.errors import XenError
from pyxen.xenstore.quota import QUOTA_TEXT

if TYPE_CHECKING:
    from pyxen.xenstore.connection import Connection
    from pyxen.xenstore.service import Service

_OK: Final = b"OK\0"
_MAX_LOGGED: Final = 512

Command = Callable[["Service", list[bytes]], bytes]


def control(service: Service, conn: Connection, req_id: int, tx_id: int, payload: bytes) -> bytes:
    """Run one command.  XenError(EACCES) for a guest, XenError(EINVAL) for a command or arguments unknown."""
    if not conn.privileged:
        raise XenError(errno.EACCES)
    name, *arguments = payload.split(b"\0")[:-1] or [b""]
    command = _COMMANDS.get(name)
    if command is None:
        raise XenError(errno.EINVAL)
    return command[1](service, arguments)


def _check(service: Service, arguments: list[bytes]) -> bytes:
    if arguments:
        raise XenError(errno.EINVAL)
    for complaint in service.store.check():
        service.log.error("check: %s", complaint)
    return _OK


def _log(service: Service, arguments: list[bytes]) -> bytes:
    if arguments not in ([b"on"], [b"off"]):
        raise XenError(errno.EINVAL)
    service.log_requests = arguments == [b"on"]
    return _OK


def _print(service: Service, arguments: list[bytes]) -> bytes:
    if len(arguments) != 1:
        raise XenError(errno.EINVAL)
    service.log.info("control: %s", printable(arguments[0]))
    return _OK


def _quota(service: Service, arguments: list[bytes]) -> bytes:
    if not arguments:
        lines = ["Quota settings:"]
        lines += [f"{name:<17}: {getattr(service.quota, attribute):8} {text}" for name, attribute, text in QUOTA_TEXT]
        return "\n".join([*lines, ""]).encode() + b"\0"
    if arguments[0] == b"set":
        return _set_quota(service, arguments[1:])
    if len(arguments) != 1 or not arguments[0].isdigit() or len(arguments[0]) > 5:
        raise XenError(errno.EINVAL)
    domid = int(arguments[0])
    usage = service.domains.usage(domid)
    lines = [f"Domain {domid}:", *(f"{name:<16}: {value:8}" for name, value in usage.items()), ""]
    return "\n".join(lines).encode() + b"\0"


def _set_quota(service: Service, arguments: list[bytes]) -> bytes:
    attributes = {name.encode(): attribute for name, attribute, _ in QUOTA_TEXT}
    if len(arguments) != 2 or arguments[0] not in attributes or not arguments[1].isdigit() or len(arguments[1]) > 9:
        raise XenError(errno.EINVAL)
    setattr(service.quota, attributes[arguments[0]], int(arguments[1]))
    return _OK


def _help(service: Service, arguments: list[bytes]) -> bytes:
    if arguments:
        raise XenError(errno.EINVAL)
    return b"".join(b"%s\t%s\n" % (name, usage) for name, (usage, _) in _COMMANDS.items()) + b"\0"


_COMMANDS: Final[dict[bytes, tuple[bytes, Command]]] = {
    b"check": (b"", _check),
    b"log": (b"on|off", _log),
    b"print": (b"<string>", _print),
    b"quota": (b"[set <name> <val>|<domid>]", _quota),
    b"help": (b"", _help),
}


def printable(text: bytes) -> str:
    """A client's bytes as one bounded line for the log."""
    shown = text[:_MAX_LOGGED].decode("ascii", "backslashreplace")
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in shown)
