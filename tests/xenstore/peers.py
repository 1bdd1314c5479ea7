# SPDX-License-Identifier: GPL-2.0-only
"""The other ends of the daemon, without a hypervisor: a guest on its ring, a raw in-process client, a fake privcmd."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from dataclasses import dataclass

from pyxen.abi.io.xs_wire import (
    RING_REQ_CONS,
    RING_REQ_PROD,
    RING_RSP,
    RING_RSP_CONS,
    RING_RSP_PROD,
    SOCKMSG,
    XENSTORE_RING_SIZE,
    XsType,
)
from pyxen.xenstore.connection import Connection
from pyxen.xenstore.daemon import XenstoreDaemon
from pyxen.xenstore.service import Service

Message = tuple[int, int, int, bytes]


def errors_name(message: Message) -> str:
    """``ENOENT`` of an ERROR reply, else the payload's text."""
    return message[3].rstrip(b"\0").decode()


class Peer(Connection):
    """A connection that keeps what it is sent: any domain's, without a ring."""

    def __init__(self, service: Service, domid: int = 0) -> None:
        super().__init__(domid, privileged=domid == 0)
        self.service = service
        self.messages: list[Message] = []
        self.closed = False

    def send(self, message_type: int, req_id: int, tx_id: int, payload: bytes) -> None:
        self.messages.append((message_type, req_id, tx_id, payload))

    def close(self) -> None:
        self.closed = True

    def ask(self, kind: XsType | int, payload: bytes, tx: int = 0) -> bytes | str:
        """The reply's payload, or the name of the error."""
        self.service.handle(self, kind, 7, tx, payload)
        reply = next(m for m in reversed(self.messages) if m[0] != XsType.WATCH_EVENT)
        assert reply[1] == 7
        assert reply[2] == tx
        self.messages.remove(reply)
        if reply[0] == XsType.ERROR:
            return errors_name(reply)
        assert reply[0] == kind
        return reply[3]

    def events(self) -> list[bytes]:
        """Payloads of the events that have come, and forget them."""
        events = [m[3] for m in self.messages]
        self.messages.clear()
        return events

    def start(self) -> int:
        """A new transaction's id."""
        reply = self.ask(XsType.TRANSACTION_START, b"\0")
        assert isinstance(reply, bytes), reply
        return int(reply[:-1])


class Guest:
    """A guest's xenbus driver on a page of its own."""

    def __init__(self, daemon: XenstoreDaemon, domid: int) -> None:
        self.memory = bytearray(4096)
        self.domid = domid
        self.signals = 0
        self.data = b""
        self.connection = daemon.introduce_ring(domid, memoryview(self.memory), self._on_signal)

    def _on_signal(self) -> None:
        self.signals += 1

    def word(self, offset: int) -> int:
        """A u32 of the page."""
        value: int = struct.unpack_from("<I", self.memory, offset)[0]
        return value

    def set_word(self, offset: int, value: int) -> None:
        """Write a u32 of the page."""
        struct.pack_into("<I", self.memory, offset, value & 0xFFFFFFFF)

    async def put(self, data: bytes) -> None:
        """Write bytes to the request ring as there is room, signalling each time."""
        for _ in range(10_000):
            prod, cons = self.word(RING_REQ_PROD), self.word(RING_REQ_CONS)
            room = XENSTORE_RING_SIZE - ((prod - cons) & 0xFFFFFFFF)
            for byte in data[:room]:
                self.memory[prod % XENSTORE_RING_SIZE] = byte
                prod += 1
            data = data[room:]
            self.set_word(RING_REQ_PROD, prod)
            self.connection.wake()
            await asyncio.sleep(0)
            if not data:
                return
        raise AssertionError("the daemon does not read this ring")

    def take(self) -> None:
        """Move what is in the response ring into ``data``."""
        prod, cons = self.word(RING_RSP_PROD), self.word(RING_RSP_CONS)
        for _ in range((prod - cons) & 0xFFFFFFFF):
            self.data += self.memory[RING_RSP + cons % XENSTORE_RING_SIZE:][:1]
            cons += 1
        self.set_word(RING_RSP_CONS, cons)
        self.connection.wake()

    async def message(self) -> Message:
        """The next message from the daemon."""
        for _ in range(200):
            if len(self.data) >= SOCKMSG.size:
                kind, req_id, tx_id, length = SOCKMSG.unpack_from(self.data)
                if len(self.data) >= SOCKMSG.size + length:
                    body = self.data[SOCKMSG.size:SOCKMSG.size + length]
                    self.data = self.data[SOCKMSG.size + length:]
                    return kind, req_id, tx_id, body
            self.take()
            await asyncio.sleep(0)
        raise AssertionError("no message came")

    async def ask(self, kind: XsType | int, payload: bytes, tx: int = 0) -> bytes | str:
        """The reply's payload, or the name of the error; events in between are dropped."""
        await self.put(SOCKMSG.pack(kind, 5, tx, len(payload)) + payload)
        while (reply := await self.message())[0] == XsType.WATCH_EVENT:
            pass
        return errors_name(reply) if reply[0] == XsType.ERROR else reply[3]


@dataclass
class FakeState:
    """What the fake hypervisor says of a domain."""

    shutdown: bool = False
    dying: bool = False


class FakeMapping:
    """A mapped page; counts ``written`` and remembers ``close``."""

    def __init__(self, page: bytearray) -> None:
        self.view = memoryview(page)
        self.writes = 0
        self.closed = False

    def written(self) -> None:
        self.writes += 1

    def close(self) -> None:
        self.closed = True
        self.view.release()


class FakePort:
    """A bound port; counts ``notify`` and remembers ``close``."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback = callback
        self.notified = 0
        self.closed = False

    def notify(self) -> None:
        self.notified += 1

    def close(self) -> None:
        self.closed = True


class FakePrivcmd:
    """The face of a hypervisor whose domains are pages in ``pages`` (by domid) and states in ``states``."""

    def __init__(self) -> None:
        self.pages: dict[int, bytearray] = {}
        self.states: dict[int, FakeState] = {}
        self.mappings: list[FakeMapping] = []
        self.ports: list[FakePort] = []
        self.virq: FakePort | None = None
        self.bind_error: Exception | None = None

    def add(self, domid: int) -> None:
        """A new domain."""
        self.pages[domid] = bytearray(4096)
        self.states[domid] = FakeState()

    def foreign_map(self, domid: int, gfn: int) -> FakeMapping:
        mapping = FakeMapping(self.pages[domid])
        self.mappings.append(mapping)
        return mapping

    def evtchn_bind_interdomain(self, remote_domid: int, remote_port: int, callback: Callable[[], None]) -> FakePort:
        if self.bind_error is not None:
            raise self.bind_error
        self.ports.append(FakePort(callback))
        return self.ports[-1]

    def bind_virq(self, virq: int, callback: Callable[[], None]) -> FakePort:
        self.virq = FakePort(callback)
        return self.virq

    def domain_info(self, domid: int) -> FakeState | None:
        return self.states.get(domid)
