# SPDX-License-Identifier: GPL-2.0-only
"""xenstored: the service and everything through which it is reached.

It lives on one event loop.  ``XenstoreDaemon(privcmd)`` serves guests too; ``XenstoreDaemon(None)`` the socket and
in-process clients only.
"""

from __future__ import annotations

import asyncio
import errno
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from pyxen.abi.xen import DomId, EvtchnPort, Gfn, Virq
from pyxen.errors import XenError
from pyxen.xenstore.client import Client
from pyxen.xenstore.connection import Connection
from pyxen.xenstore.domains import DomainState
from pyxen.xenstore.local import LocalChannel
from pyxen.xenstore.ring import RingConnection
from pyxen.xenstore.server import SocketServer
from pyxen.xenstore.service import Service


class PageMapping(Protocol):
    """privcmd's mapping of a guest's frame."""

    @property
    def view(self) -> memoryview:
        """Its bytes."""

    def written(self) -> None:
        """To be called after writing."""

    def close(self) -> None:
        """Unmap."""


class Port(Protocol):
    """privcmd's handle of a bound event channel."""

    def notify(self) -> None:
        """Signal the other end."""

    def close(self) -> None:
        """Unbind."""


class HypervisorFace(Protocol):
    """What xenstored asks of privcmd."""

    def foreign_map(self, domid: DomId, gfn: Gfn) -> PageMapping:
        """Map one writable frame."""

    def evtchn_bind_interdomain(self, remote_domid: DomId, remote_port: EvtchnPort,
                                callback: Callable[[], None]) -> Port:
        """Bind to a guest's port; ``callback`` comes on another thread."""

    def bind_virq(self, virq: Virq, callback: Callable[[], None]) -> Port:
        """Bind a virtual interrupt of dom0; ``callback`` comes on another thread."""

    def domain_info(self, domid: DomId) -> DomainState | None:
        """The state of a domain, None when there is none."""


class XenstoreDaemon:
    """The host's registry.  Methods are for the event loop's thread."""

    def __init__(self, privcmd: HypervisorFace | None = None, *, log: logging.Logger | None = None) -> None:
        self.service = Service(self._connect_guest, self._domain_state if privcmd is not None else None, log=log)
        self._privcmd = privcmd
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server: SocketServer | None = None
        self._virq: Port | None = None
        self._local: set[LocalChannel] = set()
        self._reap_due = False

    async def start(self, socket_path: str | Path | None = None) -> None:
        """Serve from now on; ``socket_path`` None: no socket.  HostError when the socket cannot be had."""
        self._loop = asyncio.get_running_loop()
        if socket_path is not None:
            self._server = SocketServer(self.service, self._loop, Path(socket_path))
        if self._privcmd is not None:
            self._virq = self._privcmd.bind_virq(Virq.DOM_EXC, self._on_dom_exc)

    async def stop(self) -> None:
        """Close every connection.  The tree stays as it is, for whoever asks the object."""
        if self._virq is not None:
            self._virq.close()
            self._virq = None
        if self._server is not None:
            self._server.close()
            self._server = None
        for channel in list(self._local):
            channel.close()
        self.service.domains.close()

    def connect(self) -> Client:
        """A client for this process, acting as domain 0."""
        channel = LocalChannel(self.service, self._local)
        return Client(channel)

    def introduce(self, domid: int, gfn: int, port: int) -> None:
        """Talk to a guest over its ring page and port.  XenError(EINVAL) for numbers none can have."""
        self.service.domains.introduce(domid, gfn, port)

    def introduce_ring(self, domid: int, page: memoryview, notify: Callable[[], None]) -> RingConnection:
        """Talk to a peer whose page is at hand (tests, other hypervisors); call ``wake()`` when it signals."""
        connection = RingConnection(self.service, self._running_loop(), domid, page, notify)
        self.service.domains.adopt(domid, connection)
        return connection

    def release(self, domid: int) -> None:
        """A domain is gone.  XenError(ENOENT) for one never introduced."""
        self.service.domains.release(domid)

    def is_introduced(self, domid: int) -> bool:
        """Whether ``domid`` has been introduced and not released."""
        return self.service.domains.is_introduced(domid)

    def socket_clients(self) -> int:
        """Number of programs connected to the socket."""
        return len(self._server.connections) if self._server is not None else 0

    def reap(self) -> None:
        """Look which domains have shut down or gone, and tell (what VIRQ_DOM_EXC makes the daemon do)."""
        self._reap_due = False
        self.service.domains.reap()

    def _domain_state(self, domid: int) -> DomainState | None:
        return self._privcmd.domain_info(DomId(domid)) if self._privcmd is not None else None

    def _on_dom_exc(self) -> None:
        loop = self._loop
        if loop is not None and not self._reap_due:
            self._reap_due = True
            try:
                loop.call_soon_threadsafe(self.reap)
            except RuntimeError:
                # The loop has been closed: the host is on its way out.
                self._reap_due = False

    def _connect_guest(self, domid: int, gfn: int, port: int) -> Connection:
        if self._privcmd is None:
            raise XenError(errno.EINVAL, "this xenstored has no hypervisor to reach guests through")
        mapping = self._privcmd.foreign_map(DomId(domid), Gfn(gfn))
        bound: list[Port] = []

        def notify() -> None:
            for each in bound:
                each.notify()

        def release() -> None:
            for each in bound:
                each.close()
            mapping.close()

        connection = RingConnection(self.service, self._running_loop(), domid, mapping.view, notify,
                                    written=mapping.written, release=release)
        try:
            bound.append(self._privcmd.evtchn_bind_interdomain(DomId(domid), EvtchnPort(port), connection.wake))
        except BaseException:
            connection.close()
            raise
        # Requests may have been waiting since before we were bound.
        connection.wake()
        return connection

    def _running_loop(self) -> asyncio.AbstractEventLoop:
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        return self._loop
