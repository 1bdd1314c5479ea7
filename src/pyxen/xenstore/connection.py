# SPDX-License-Identifier: GPL-2.0-only
"""One client of the daemon, whatever carries its bytes: a socket, a guest's ring or a function call."""

from __future__ import annotations

from abc import ABC, abstractmethod

from pyxen.abi.io.xs_wire import XsType
from pyxen.xenstore.transaction import Transaction
from pyxen.xenstore.watch import Watch

_WATCH_EVENT = int(XsType.WATCH_EVENT)


class Connection(ABC):
    """What the request handlers know of a client.  ``privileged``: it acts for domain 0."""

    def __init__(self, domid: int, *, privileged: bool) -> None:
        self.domid = domid
        self.privileged = privileged
        self.target: int | None = None
        """The domain this one may stand in for (SET_TARGET)."""
        self.home = b"/local/domain/%d/" % domid
        self.transactions: dict[int, Transaction] = {}
        self.next_transaction = 1
        self.watches: dict[tuple[bytes, bytes], Watch] = {}
        """By absolute path and token."""

    @abstractmethod
    def send(self, message_type: int, req_id: int, tx_id: int, payload: bytes) -> None:
        """Queue one message to the client, after all that were queued before."""

    def send_event(self, payload: bytes) -> None:
        """Queue one watch event."""
        self.send(_WATCH_EVENT, 0, 0, payload)

    @abstractmethod
    def close(self) -> None:
        """Give back whatever carries the bytes; nothing is sent any more."""
