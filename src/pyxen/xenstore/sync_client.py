# SPDX-License-Identifier: GPL-2.0-only
"""A blocking client over the unix socket, for programs without an event loop."""

from __future__ import annotations

import errno
import socket
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from pyxen.abi.io.xs_wire import SOCKMSG, XENSTORE_PAYLOAD_MAX, XsType
from pyxen.errors import HostError, XenError
from pyxen.xenstore.encoding import (
    MAX_ATTEMPTS,
    PartialListing,
    Text,
    check_size,
    error_of,
    permission_strings,
    split,
    strings,
    to_bytes,
    to_str,
)

T = TypeVar("T")


class SyncTransaction:
    """Requests about nodes under one transaction id (0: none); see ``client.Operations`` for what each does."""

    def __init__(self, client: SyncClient, ident: int) -> None:
        self._client = client
        self._ident = ident

    def request(self, message_type: XsType, payload: bytes) -> bytes:
        """Send one request; the reply's payload.  XenError as the daemon says."""
        return self._client.exchange(message_type, payload, self._ident)

    def read_bytes(self, path: Text) -> bytes:
        """A node's value.  XenError(ENOENT) if it is absent."""
        return self.request(XsType.READ, strings(path))

    def read(self, path: Text) -> str:
        """A node's value as text."""
        return to_str(self.read_bytes(path))

    def get(self, path: Text, default: str | None = None) -> str | None:
        """A node's value, or ``default`` if it is absent."""
        try:
            return self.read(path)
        except XenError as error:
            if error.errno != errno.ENOENT:
                raise
            return default

    def write(self, path: Text, value: Text) -> None:
        """Set a value, creating what is missing."""
        self.request(XsType.WRITE, check_size(strings(path) + to_bytes(value)))

    def mkdir(self, path: Text) -> None:
        """Create a node unless it exists."""
        self.request(XsType.MKDIR, strings(path))

    def rm(self, path: Text) -> None:
        """Remove a node and all below it."""
        self.request(XsType.RM, strings(path))

    def ls(self, path: Text) -> list[str]:
        """Names of the children."""
        try:
            return split(self.request(XsType.DIRECTORY, strings(path)))
        except XenError as error:
            if error.errno != errno.E2BIG:
                raise
        listing = PartialListing()
        while True:
            names = listing.add(self.request(XsType.DIRECTORY_PART, strings(path, str(listing.offset))))
            if names is not None:
                return names

    def exists(self, path: Text) -> bool:
        """Whether there is such a node."""
        return self.get(path) is not None

    def get_perms(self, path: Text) -> list[str]:
        """The permission list."""
        return split(self.request(XsType.GET_PERMS, strings(path)))

    def set_perms(self, path: Text, perms: Sequence[str]) -> None:
        """Replace the permission list."""
        self.request(XsType.SET_PERMS, permission_strings(path, perms))


class SyncClient(SyncTransaction):
    """A connection to the xenstored at ``path``.  HostError when there is none; ``timeout_s`` bounds each wait."""

    def __init__(self, path: str | Path, *, timeout_s: float | None = None) -> None:
        super().__init__(self, 0)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._socket.settimeout(timeout_s)
        try:
            self._socket.connect(str(path))
        except OSError as error:
            self._socket.close()
            raise HostError(f"no xenstored at {path}: {error.strerror or error}") from error
        self._data = b""
        self._last_id = 0
        self._events: deque[tuple[str, str]] = deque()

    def close(self) -> None:
        """Disconnect."""
        self._socket.close()

    def __enter__(self) -> SyncClient:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self.close()

    @contextmanager
    def transaction(self) -> Iterator[SyncTransaction]:
        """Commit at the end of the block, abort if it raises.  XenError(EAGAIN): it met a conflict, do it all again."""
        ident = int(self.exchange(XsType.TRANSACTION_START, b"\0").rstrip(b"\0"))
        try:
            yield SyncTransaction(self, ident)
        except BaseException:
            # A transaction or connection that is gone already is as good as aborted: the reason we are here is told.
            with suppress(XenError, HostError):
                self.exchange(XsType.TRANSACTION_END, b"F\0", ident)
            raise
        self.exchange(XsType.TRANSACTION_END, b"T\0", ident)

    def run_transaction(self, work: Callable[[SyncTransaction], T]) -> T:
        """Run ``work`` in a transaction, again as long as it meets conflicts; its result."""
        for attempt in range(MAX_ATTEMPTS):
            try:
                with self.transaction() as transaction:
                    result = work(transaction)
            except XenError as error:
                if error.errno != errno.EAGAIN or attempt + 1 == MAX_ATTEMPTS:
                    raise
            else:
                return result
        raise XenError(errno.EAGAIN)

    def watch(self, path: Text, token: Text) -> None:
        """Register a watch; :meth:`next_event` brings its events, the first at once."""
        self.request(XsType.WATCH, strings(path, token))

    def unwatch(self, path: Text, token: Text) -> None:
        """Unregister a watch."""
        self.request(XsType.UNWATCH, strings(path, token))

    def next_event(self) -> tuple[str, str]:
        """Wait for a watch event: (path, token).  TimeoutError after ``timeout_s``."""
        while not self._events:
            self._take(*self._message())
        return self._events.popleft()

    def exchange(self, message_type: XsType, payload: bytes, tx_id: int = 0) -> bytes:
        """Send one request and wait for its reply."""
        self._last_id = (self._last_id + 1) & 0xFFFFFFFF
        try:
            self._socket.sendall(SOCKMSG.pack(message_type, self._last_id, tx_id, len(payload)) + payload)
        except TimeoutError:
            raise
        except OSError as error:
            raise HostError("xenstored has closed the connection") from error
        while True:
            reply_type, req_id, reply = self._message()
            if self._take(reply_type, req_id, reply) or req_id != self._last_id:
                continue
            if reply_type == XsType.ERROR:
                raise error_of(reply)
            return reply

    def _take(self, message_type: int, req_id: int, payload: bytes) -> bool:
        if message_type != XsType.WATCH_EVENT:
            return False
        path, token, *_ = [*split(payload), "", ""]
        self._events.append((path, token))
        return True

    def _message(self) -> tuple[int, int, bytes]:
        self._fill(SOCKMSG.size)
        message_type, req_id, _, length = SOCKMSG.unpack_from(self._data)
        if length > XENSTORE_PAYLOAD_MAX:
            raise HostError("what answers at this socket does not speak xenstore's protocol")
        self._fill(SOCKMSG.size + length)
        payload = self._data[SOCKMSG.size:SOCKMSG.size + length]
        self._data = self._data[SOCKMSG.size + length:]
        return message_type, req_id, payload

    def _fill(self, size: int) -> None:
        while len(self._data) < size:
            try:
                received = self._socket.recv(65536)
            except TimeoutError:
                raise
            except OSError as error:
                raise HostError("xenstored has closed the connection") from error
            if not received:
                raise HostError("xenstored has closed the connection")
            self._data += received
