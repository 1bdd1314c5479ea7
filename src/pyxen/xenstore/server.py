# SPDX-License-Identifier: GPL-2.0-only
"""The unix socket that dom0's programs talk to.

Requests are served in the event loop's reader callback, without a task each: receive, answer every whole message
that came, send.  Nobody can make the daemon hold more than a few KiB of requests: what is not a whole message is at
most one message long, and a client that does not take its answers is not read from (quota.OUTPUT_PAUSE_BYTES).  Events
reach such a client all the same until it is closed (quota.OUTPUT_MAX_BYTES).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
import struct
from pathlib import Path
from typing import Final

from pyxen.abi.io.xs_wire import SOCKMSG, XENSTORE_PAYLOAD_MAX
from pyxen.errors import HostError
from pyxen.xenstore.connection import Connection
from pyxen.xenstore.quota import MAX_SOCKET_CONNECTIONS, OUTPUT_MAX_BYTES, OUTPUT_PAUSE_BYTES
from pyxen.xenstore.service import Service

_RECEIVE_BYTES: Final = 8192
_HEADER_BYTES: Final = SOCKMSG.size
_ACCEPT_PAUSE_S: Final = 0.5
_UCRED: Final = struct.Struct("iII")


class SocketConnection(Connection):
    """One accepted socket; it acts for domain 0."""

    def __init__(self, server: SocketServer, sock: socket.socket) -> None:
        super().__init__(0, privileged=True)
        self._server = server
        self._service = server.service
        self._loop = server.loop
        self._socket = sock
        self._fd = sock.fileno()
        self._in = b""
        self._out = bytearray()
        self._serving = False
        self._writing = False
        self._paused = False
        self._flush_due = False
        self.closed = False
        self._loop.add_reader(self._fd, self._on_readable)

    def send(self, message_type: int, req_id: int, tx_id: int, payload: bytes) -> None:
        out = self._out
        out += SOCKMSG.pack(message_type, req_id, tx_id, len(payload))
        out += payload
        if self._serving or self._writing or self._flush_due:
            if len(out) > OUTPUT_MAX_BYTES:
                self._service.log.warning("a client that reads nothing has %d bytes waiting: closed", len(out))
                self.close()
            return
        self._flush_due = True
        self._loop.call_soon(self._flush)

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._fd)
        if self._writing:
            self._loop.remove_writer(self._fd)
        self._out = bytearray()
        self._in = b""
        self._service.forget(self)
        self._server.connections.discard(self)
        self._socket.close()

    def _on_readable(self) -> None:
        try:
            data = self._socket.recv(_RECEIVE_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self.close()
            return
        if not data:
            self.close()
            return
        self._in = self._in + data if self._in else data
        self._serve()

    def _serve(self) -> None:
        data = self._in
        end = len(data)
        start = 0
        handle = self._service.handle
        self._serving = True
        while end - start >= _HEADER_BYTES:
            message_type, req_id, tx_id, length = SOCKMSG.unpack_from(data, start)
            if length > XENSTORE_PAYLOAD_MAX:
                # There is no way to find the next message after this one.
                self.close()
                break
            body = start + _HEADER_BYTES
            if end - body < length:
                break
            start = body + length
            handle(self, message_type, req_id, tx_id, data[body:start])
            if len(self._out) > OUTPUT_PAUSE_BYTES:
                break
        self._serving = False
        if self.closed:
            return
        self._in = data[start:]
        self._flush()

    def _flush(self) -> None:
        self._flush_due = False
        out = self._out
        if self.closed or not out:
            return
        try:
            sent = self._socket.send(out)
        except (BlockingIOError, InterruptedError):
            sent = 0
        except OSError:
            self.close()
            return
        if sent == len(out):
            out.clear()
        else:
            del out[:sent]
        self._set_writing(bool(out))
        self._set_paused(len(out) > OUTPUT_PAUSE_BYTES)

    def _set_writing(self, wanted: bool) -> None:
        if wanted != self._writing:
            self._writing = wanted
            if wanted:
                self._loop.add_writer(self._fd, self._flush)
            else:
                self._loop.remove_writer(self._fd)

    def _set_paused(self, wanted: bool) -> None:
        if wanted == self._paused:
            if not wanted and len(self._in) >= _HEADER_BYTES and self._has_whole_message():
                self._loop.call_soon(self._serve_rest)
            return
        self._paused = wanted
        if wanted:
            self._loop.remove_reader(self._fd)
        else:
            self._loop.add_reader(self._fd, self._on_readable)
            self._loop.call_soon(self._serve_rest)

    def _has_whole_message(self) -> bool:
        length: int = SOCKMSG.unpack_from(self._in)[3]
        return len(self._in) - _HEADER_BYTES >= length

    def _serve_rest(self) -> None:
        if not self.closed and not self._paused and len(self._in) >= _HEADER_BYTES:
            self._serve()


class SocketServer:
    """Listens at ``path`` (mode 0600, in a directory that only its owner may enter) for this user's programs."""

    def __init__(self, service: Service, loop: asyncio.AbstractEventLoop, path: Path) -> None:
        self.service = service
        self.loop = loop
        self.path = path
        self.connections: set[SocketConnection] = set()
        self._listener = listen_private(path)
        loop.add_reader(self._listener.fileno(), self._on_connect)

    def close(self) -> None:
        """Close every connection and remove the socket."""
        self.loop.remove_reader(self._listener.fileno())
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()
        for connection in list(self.connections):
            connection.close()

    def _on_connect(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            # Out of descriptors: the waiting client keeps the listener readable, so come back later, not at once.
            self.service.log.warning("xenstored cannot accept a client: %s", error)
            listener = self._listener.fileno()
            self.loop.remove_reader(listener)
            self.loop.call_later(_ACCEPT_PAUSE_S, self._accept_again)
            return
        if len(self.connections) >= MAX_SOCKET_CONNECTIONS or not _is_own_user(sock):
            sock.close()
            return
        sock.setblocking(False)
        self.connections.add(SocketConnection(self, sock))

    def _accept_again(self) -> None:
        if self._listener.fileno() >= 0:
            self.loop.add_reader(self._listener.fileno(), self._on_connect)


def listen_private(path: Path) -> socket.socket:
    """A non-blocking listening socket at ``path``, mode 0600, its directory made with mode 0700 when absent.

    HostError when the directory is another's or open to others, or when somebody listens there already.
    """
    directory = path.parent
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.stat()
    if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
        raise HostError(f"{directory} is not a private directory of this user", hint=f"chmod 700 {directory}")
    _remove_stale_socket(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        listener.bind(str(path))
        # Nobody can connect before listen(), so that the mode is right from the first connection.
        path.chmod(0o600)
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise HostError(f"cannot listen on {path}: {error}", hint="PYXEN_RUNDIR names the directory to use") from error
    return listener


def _remove_stale_socket(path: Path) -> None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise HostError(f"{path} exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except OSError as error:
            if error.errno == errno.ECONNREFUSED:
                path.unlink()
                return
    raise HostError(f"somebody serves {path} already")


def _is_own_user(sock: socket.socket) -> bool:
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    uid = int(_UCRED.unpack(credentials)[1])
    return uid in (os.geteuid(), 0)
