# SPDX-License-Identifier: GPL-2.0-only
"""How a client reaches a daemon: the seam between ``client.Client`` and what carries its messages."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from pyxen.abi.io.xs_wire import SOCKMSG, XENSTORE_PAYLOAD_MAX
from pyxen.errors import HostError

Receive = Callable[[int, int, bytes], None]
"""(message type, req_id, payload) of each message from the daemon."""
Lost = Callable[[], None]
"""The connection is gone."""


class Channel(Protocol):
    """A connection to a daemon, seen by its client."""

    def attach(self, receive: Receive, lost: Lost) -> None:
        """Who gets the messages; called once, before anything is submitted."""

    def submit(self, message_type: int, req_id: int, tx_id: int, payload: bytes) -> None:
        """Send one request.  HostError when the connection is gone."""

    def close(self) -> None:
        """Close; ``lost`` is called."""


class StreamChannel(asyncio.Protocol):
    """A channel over a unix socket."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._data = b""
        self._receive: Receive | None = None
        self._lost: Lost | None = None

    @classmethod
    async def open(cls, path: str | Path) -> StreamChannel:
        """Connect.  HostError when nobody serves ``path``."""
        try:
            _, channel = await asyncio.get_running_loop().create_unix_connection(cls, str(path))
        except OSError as error:
            raise HostError(f"no xenstored at {path}: {error.strerror or error}") from error
        return channel

    def attach(self, receive: Receive, lost: Lost) -> None:
        self._receive = receive
        self._lost = lost

    def submit(self, message_type: int, req_id: int, tx_id: int, payload: bytes) -> None:
        if self._transport is None:
            raise HostError("xenstored has closed the connection")
        self._transport.write(SOCKMSG.pack(message_type, req_id, tx_id, len(payload)) + payload)

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
        self.connection_lost(None)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self._lost is not None:
            lost, self._lost = self._lost, None
            lost()

    def data_received(self, data: bytes) -> None:
        data = self._data + data if self._data else data
        start = 0
        while len(data) - start >= SOCKMSG.size:
            message_type, req_id, _, length = SOCKMSG.unpack_from(data, start)
            if length > XENSTORE_PAYLOAD_MAX:
                self.close()
                return
            end = start + SOCKMSG.size + length
            if end > len(data):
                break
            if self._receive is not None:
                self._receive(message_type, req_id, data[start + SOCKMSG.size:end])
            start = end
        self._data = data[start:]
