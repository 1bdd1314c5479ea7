# SPDX-License-Identifier: GPL-2.0-only
"""The host's HTTP API: how ``xl`` (another process) reaches the host (docs/api.md).

HTTP/1.1 with JSON on a unix socket of mode 0600; besides that mode, each connection's peer must have our own uid
(``SO_PEERCRED``), so that a socket that ended up in a shared folder still serves nobody else.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final, cast

import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

log = logging.getLogger("pyxen.api")

BACKLOG: Final = 128
STOP_GRACE_S: Final = 2
_UCRED: Final = struct.Struct("iII")


def listen_unix(path: Path) -> socket.socket:
    """A listening stream socket at ``path``, mode 0600 from its first moment. The caller has made sure that no
    other host owns ``path``."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
    try:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()
        # fchmod before bind sets the mode the file is born with; there is no moment at which it is wider.
        os.fchmod(sock.fileno(), 0o600)
        sock.bind(str(path))
        sock.listen(BACKLOG)
    except BaseException:
        sock.close()
        raise
    return sock


def peer_uid(sock: socket.socket) -> int:
    """The uid of the process at the other end of a connected unix socket (unix(7), SO_PEERCRED)."""
    _pid, uid, _gid = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return int(uid)


class _OwnerOnly(H11Protocol):
    """HTTP/1.1, for connections of our own uid."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        stream = cast(asyncio.Transport, transport)  # of a stream socket, always
        uid = peer_uid(cast(socket.socket, stream.get_extra_info("socket")))
        if uid != os.geteuid():
            log.warning("refused a connection from uid %d", uid)
            stream.abort()
            return
        super().connection_made(stream)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.transport is not None:  # else it was refused, and uvicorn never heard of it
            super().connection_lost(exc)


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: signals are the daemon's business, and a library user's own."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class ApiServer:
    """Serves ``app`` on a unix socket until :meth:`close`."""

    def __init__(self, app: Starlette, path: Path) -> None:
        self.path = path
        self._socket = listen_unix(path)
        self._inode = path.stat().st_ino
        config = uvicorn.Config(
            app,
            http=_OwnerOnly,
            ws="none",
            lifespan="off",
            loop="none",
            interface="asgi3",
            log_config=None,
            access_log=False,
            server_header=False,
            date_header=False,
            timeout_graceful_shutdown=STOP_GRACE_S,
        )
        self._server = _Server(config)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Begin to serve; returns once requests are answered."""
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]), name="pyxen api")
        while not self._server.started:
            if self._task.done():
                self._task.result()
                raise RuntimeError("the API server stopped before it began")
            await asyncio.sleep(0.002)

    async def close(self) -> None:
        """Answer what is being answered (for a short while), then stop; the socket's file goes too."""
        if self._task is not None:
            self._server.should_exit = True
            await self._task
            self._task = None
        self._socket.close()
        with contextlib.suppress(FileNotFoundError):
            if self.path.stat().st_ino == self._inode:
                self.path.unlink()
