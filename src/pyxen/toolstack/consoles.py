# SPDX-License-Identifier: GPL-2.0-only
"""Consoles of guests, put together: the ring's frame and event channel, the back end, the socket, the log.

Readers are connections to ``console/DOMID`` of the run directory (``xl console``) and :class:`ConsoleStream` in this
process. What a guest said is in ``log/guest-NAME.log``, over reboots.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pyxen.abi.xen import DomId
from pyxen.backends.console import ConsoleBackend
from pyxen.backends.console_socket import ConsoleSocket
from pyxen.toolstack.console_stream import ConsoleStream
from pyxen.toolstack.services import to_the_end

if TYPE_CHECKING:
    from pyxen.hypervisor.privcmd import LocalPort, Mapping, PrivCmd
    from pyxen.toolstack.domains import DomainRecord

__all__ = ["ConsoleStream", "Consoles", "DomainConsole"]


class DomainConsole:
    """One domain's console, served until :meth:`close`."""

    def __init__(self, backend: ConsoleBackend, sock: ConsoleSocket, mapping: Mapping, port: LocalPort) -> None:
        self.path = sock.path
        self._backend = backend
        self._socket = sock
        self._mapping = mapping
        self._port = port

    def stream(self) -> ConsoleStream:
        """A reader in this process; the history comes first."""
        return ConsoleStream(self._backend.attach(), self._backend.write)

    async def serve(self) -> None:
        """Open the socket to readers."""
        await self._socket.start()

    async def close(self) -> None:
        """Take the guest's last words, let go of its frame and port, give readers their rest, remove the socket.

        Idempotent; cancelled, it can be called again.
        """
        if not self._backend.closed:
            self._backend.close()
            self._port.close()
            self._mapping.close()
        await self._socket.close()


class Consoles:
    """Makes consoles for the domains of one run directory."""

    def __init__(self, privcmd: PrivCmd, rundir: Path) -> None:
        self._privcmd = privcmd
        self._rundir = rundir

    def socket_path(self, domid: DomId) -> Path:
        """Where the console of ``domid`` is, or would be."""
        return self._rundir / "console" / str(domid)

    def log_path(self, name: str) -> Path:
        """The log of the domain called ``name``."""
        return self._rundir / "log" / f"guest-{name}.log"

    async def open(self, record: DomainRecord, ring_gfn: int, port: int) -> DomainConsole:
        """Serve the ring in frame ``ring_gfn``; ``port`` is the guest's end. Failing or cancelled, nothing is left
        open."""
        mapping = self._privcmd.foreign_map(record.domid, ring_gfn)
        signal = _Signal()
        try:
            local = self._privcmd.evtchn_bind_interdomain(record.domid, port, signal.raise_)
        except BaseException:
            mapping.close()
            raise
        try:
            backend = ConsoleBackend(
                mapping.view, local.notify, record.name, self.log_path(record.name), written=mapping.written
            )
        except BaseException:
            local.close()
            mapping.close()
            raise
        console = DomainConsole(backend, ConsoleSocket(self.socket_path(record.domid), backend), mapping, local)
        signal.handler = backend.on_event
        try:
            await console.serve()
        except BaseException:
            await to_the_end(console.close())
            raise
        signal.raise_()  # the guest may have printed before we listened
        return console


class _Signal:
    """Carries a guest's signal from the thread it comes on to the event loop, at most one at a time."""

    def __init__(self) -> None:
        self.handler: Callable[[], None] | None = None
        self._loop = asyncio.get_running_loop()
        self._raised = False

    def raise_(self) -> None:
        if not self._raised:
            # A guest that signals all day must not fill the loop's queue.
            self._raised = True
            try:
                self._loop.call_soon_threadsafe(self._handle)
            except RuntimeError:
                pass  # the loop has been closed: the host is on its way out

    def _handle(self) -> None:
        self._raised = False
        if self.handler is not None:
            self.handler()
