# SPDX-License-Identifier: GPL-2.0-only
"""The domains the daemon talks to: who was introduced, who shut down, and what goes when one dies.

A domain's end is told twice, by ``@releaseDomain``: once when it has shut down (the toolstack looks why), once when
it is gone.  With it go its connection, the nodes it owned and the permissions it was given; its number may be
another domain's next.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Protocol

from pyxen.abi.xen import DOMID_FIRST_RESERVED
from pyxen.errors import XenError
from pyxen.xenstore.watch import INTRODUCE_DOMAIN, RELEASE_DOMAIN

if TYPE_CHECKING:
    from pyxen.xenstore.connection import Connection
    from pyxen.xenstore.service import Service


class DomainState(Protocol):
    """The part of privcmd's DomainInfo that matters here."""

    @property
    def shutdown(self) -> bool:
        """It has shut down (or crashed)."""

    @property
    def dying(self) -> bool:
        """It is being destroyed."""


class _Introduced:
    __slots__ = ("connection", "port", "shutdown")

    def __init__(self, connection: Connection, port: int) -> None:
        self.connection = connection
        self.port = port
        self.shutdown = False


class Domains:
    """Introduced domains, and those the tree knows; see :class:`Service` for ``connect`` and ``state``."""

    def __init__(self, service: Service, connect: Callable[[int, int, int], Connection],
                 state: Callable[[int], DomainState | None] | None) -> None:
        self._service = service
        self._connect = connect
        self._state = state
        self._introduced: dict[int, _Introduced] = {}

    def introduce(self, domid: int, gfn: int, port: int) -> None:
        """Open the ring (again, at its new place) of a domain.  XenError(EINVAL) for numbers none can have."""
        if not 0 <= domid < DOMID_FIRST_RESERVED or gfn < 0 or port <= 0:
            raise XenError(errno.EINVAL)
        if domid == 0:
            return
        known = self._introduced.get(domid)
        if known is not None:
            # A guest that starts over (kexec, resume): a fresh connection; it is no news to the others.
            self._drop_connection(known)
            del self._introduced[domid]
        self._introduced[domid] = _Introduced(self._connect(domid, gfn, port), port)
        if known is None:
            self._service.fire_special(INTRODUCE_DOMAIN)

    def adopt(self, domid: int, connection: Connection, port: int = 0) -> None:
        """Introduce a domain whose connection the caller has made."""
        if domid in self._introduced:
            raise XenError(errno.EEXIST)
        self._introduced[domid] = _Introduced(connection, port)
        self._service.fire_special(INTRODUCE_DOMAIN)

    def release(self, domid: int) -> None:
        """Forget a domain.  XenError(EINVAL) for dom0, XenError(ENOENT) for one never introduced."""
        known = self._guest(domid)
        del self._introduced[domid]
        self._drop_connection(known)
        self._service.remove_domain_nodes(domid)
        self._service.fire_special(RELEASE_DOMAIN)

    def resume(self, domid: int) -> None:
        """The domain runs again.  Errors as :meth:`release`."""
        self._guest(domid).shutdown = False

    def set_target(self, domid: int, target: int) -> None:
        """Let ``domid`` stand in for ``target``.  XenError(ENOENT) for one never introduced."""
        stub = self._guest(domid)
        if not self.is_introduced(target):
            raise XenError(errno.ENOENT)
        # Nobody becomes dom0 through this; the C daemon accepts the request and grants nothing by it either.
        stub.connection.target = target or None

    def is_introduced(self, domid: int) -> bool:
        """Whether the daemon listens to ``domid``; dom0 always counts."""
        return domid == 0 or domid in self._introduced

    def absent(self, domids: Iterable[int]) -> set[int]:
        """Those of ``domids`` that no domain has: what is granted to them must not wait for whoever is next."""
        state = self._state
        if state is None:
            return set()
        return {domid for domid in domids
                if domid and domid not in self._introduced and (domid >= DOMID_FIRST_RESERVED or state(domid) is None)}

    def reap(self) -> None:
        """After VIRQ_DOM_EXC: look how the domains are, and tell what is new."""
        if self._state is None:
            return
        for domid in self.absent(self._service.store.known_domains()):
            # Gone before it was introduced: nobody else needs to hear.
            self._service.remove_domain_nodes(domid)
        news = False
        for domid, known in list(self._introduced.items()):
            now = self._state(domid)
            if now is None or now.dying:
                self.release(domid)
            elif now.shutdown and not known.shutdown:
                known.shutdown = True
                news = True
        if news:
            self._service.fire_special(RELEASE_DOMAIN)

    def usage(self, domid: int) -> dict[str, int]:
        """What the domain uses, by quota name."""
        known = self._introduced.get(domid)
        return {
            "nodes": self._service.store.owned_count(domid),
            "watches": len(known.connection.watches) if known is not None else 0,
            "transactions": len(known.connection.transactions) if known is not None else 0,
        }

    def close(self) -> None:
        """Drop every connection; nothing is told or removed: the daemon stops, the domains go on."""
        for known in self._introduced.values():
            self._drop_connection(known)
        self._introduced.clear()

    def _guest(self, domid: int) -> _Introduced:
        if domid == 0:
            raise XenError(errno.EINVAL)
        known = self._introduced.get(domid)
        if known is None:
            raise XenError(errno.ENOENT)
        return known

    def _drop_connection(self, known: _Introduced) -> None:
        self._service.forget(known.connection)
        known.connection.close()
