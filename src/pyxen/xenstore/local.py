# SPDX-License-Identifier: GPL-2.0-only
"""A client in the daemon's own process: requests are calls, answers and events come back as calls."""

from __future__ import annotations

from pyxen.errors import HostError
from pyxen.xenstore.channel import Lost, Receive
from pyxen.xenstore.connection import Connection
from pyxen.xenstore.service import Service


class LocalChannel(Connection):
    """Both ends of an in-process connection that acts for domain 0; ``open_channels`` is the daemon's list of them."""

    def __init__(self, service: Service, open_channels: set[LocalChannel]) -> None:
        super().__init__(0, privileged=True)
        self._service = service
        self._open_channels = open_channels
        self._receive: Receive | None = None
        self._lost: Lost | None = None
        open_channels.add(self)

    def attach(self, receive: Receive, lost: Lost) -> None:
        """Who gets the messages."""
        self._receive = receive
        self._lost = lost

    def submit(self, message_type: int, req_id: int, tx_id: int, payload: bytes) -> None:
        """Serve one request; the answer has arrived when this returns."""
        if self._receive is None:
            raise HostError("this xenstore client is closed")
        self._service.handle(self, message_type, req_id, tx_id, payload)

    def send(self, message_type: int, req_id: int, tx_id: int, payload: bytes) -> None:
        if self._receive is not None:
            self._receive(message_type, req_id, payload)

    def close(self) -> None:
        if self._receive is None:
            return
        self._receive = None
        self._open_channels.discard(self)
        self._service.forget(self)
        if self._lost is not None:
            self._lost()
