# SPDX-License-Identifier: GPL-2.0-only
"""The daemon without its transports: state, and one entry point for a request."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from typing import Final

from pyxen.abi.io.xs_wire import ERROR_NAMES, XS_TYPE_COUNT, XsType
from pyxen.errors import XenError
from pyxen.xenstore.connection import Connection
from pyxen.xenstore.control import printable
from pyxen.xenstore.domains import Domains, DomainState
from pyxen.xenstore.permissions import DOM0_ONLY, Permissions
from pyxen.xenstore.quota import Quota
from pyxen.xenstore.requests import HANDLERS
from pyxen.xenstore.store import ROOT, Store
from pyxen.xenstore.watch import INTRODUCE_DOMAIN, RELEASE_DOMAIN, Watches

_ERROR: Final = int(XsType.ERROR)
_WIRE_ERRORS: Final = {getattr(errno, name): name.encode() + b"\0" for name in ERROR_NAMES}
_EINVAL: Final = _WIRE_ERRORS[errno.EINVAL]
_ENOENT: Final = _WIRE_ERRORS[errno.ENOENT]
_EIO: Final = _WIRE_ERRORS[errno.EIO]
_ENOSYS: Final = _WIRE_ERRORS[errno.ENOSYS]


class Service:
    """The store, its watches and the domains, served to connections on one thread.

    ``connect(domid, gfn, port)`` opens the ring of a domain being introduced, ``state(domid)`` is what the hypervisor
    says of a domain, None when there is none (without a hypervisor to ask, every domain is taken to live).
    """

    def __init__(self, connect: Callable[[int, int, int], Connection],
                 state: Callable[[int], DomainState | None] | None = None, *,
                 log: logging.Logger | None = None) -> None:
        self.log = log or logging.getLogger("pyxen.xenstore")
        self.log_requests = False
        self.quota = Quota()
        self.store = Store()
        self.watches = Watches(self.store.nodes)
        self.special: dict[bytes, Permissions] = {INTRODUCE_DOMAIN: DOM0_ONLY, RELEASE_DOMAIN: DOM0_ONLY}
        """Who but dom0 hears of domains coming and going."""
        self.domains = Domains(self, connect, state)
        self.store.create(b"/tool/xenstored", b"", 0)

    def handle(self, conn: Connection, message_type: int, req_id: int, tx_id: int, payload: bytes) -> None:
        """Serve one request: events it causes, and its reply, are queued on the connections they belong to."""
        if self.log_requests:
            self._log_request(conn, message_type, tx_id, payload)
        handler = HANDLERS[message_type] if message_type < XS_TYPE_COUNT else None
        if handler is None:
            conn.send(_ERROR, req_id, tx_id, _ENOSYS)
            return
        if tx_id and tx_id not in conn.transactions:
            # An argument that could never be right is told first, as the C daemon does.
            known = message_type != XsType.TRANSACTION_END or payload in (b"T\0", b"F\0")
            conn.send(_ERROR, req_id, tx_id, _ENOENT if known else _EINVAL)
            return
        try:
            reply = handler(self, conn, req_id, tx_id, payload)
        except XenError as error:
            conn.send(_ERROR, req_id, tx_id, _WIRE_ERRORS.get(error.errno, _EINVAL))
        except Exception:
            # Our bug must not take the host's registry down with it.
            self.log.exception("request %d of domain %d failed", message_type, conn.domid)
            conn.send(_ERROR, req_id, tx_id, _EIO)
        else:
            if reply is not None:
                conn.send(message_type, req_id, tx_id, reply)

    def forget(self, conn: Connection) -> None:
        """Drop the connection's watches and transactions."""
        self.watches.remove_all(conn.watches.values())
        conn.watches.clear()
        conn.transactions.clear()

    def fire_special(self, name: bytes) -> None:
        """Tell that a domain came (``@introduceDomain``) or went (``@releaseDomain``)."""
        self.watches.fire(name, (self.special[name],), exact=True)

    def fire_removed(self, removed: list[tuple[bytes, Permissions]]) -> None:
        """Tell of a removal: who watches a node below hears of that one, who watches above only of the topmost."""
        top = removed[-1][0]
        if len(removed) == 1:
            self.watches.fire(top, (removed[0][1],))
            return
        perms = dict(removed)
        for path, own in removed:
            above = perms.get(path[: path.rfind(b"/")])
            self.watches.fire(path, (own,) if above is None else (own, above), exact=path is not top)

    def remove_domain_nodes(self, domid: int) -> None:
        """Remove what a domain that is gone owned, and void what it was granted."""
        for path in self.store.owned_paths(domid):
            if path == ROOT:
                self.store.set_perms(ROOT, DOM0_ONLY)
            elif path in self.store.nodes:
                self.fire_removed(self.store.remove(path))
        self.store.revoke(domid)
        for name, perms in self.special.items():
            self.special[name] = perms.revoke({domid})

    def _log_request(self, conn: Connection, message_type: int, tx_id: int, payload: bytes) -> None:
        name = XsType(message_type).name if message_type in XsType._value2member_map_ else str(message_type)
        self.log.info("domain %d tx %d %s %s", conn.domid, tx_id, name, printable(payload))
