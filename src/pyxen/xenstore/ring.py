# SPDX-License-Identifier: GPL-2.0-only
"""A guest's connection: the ring page that it shares with the daemon, and an event channel.

The page stays the guest's to scribble on while we work, so that each pass reads the indices once, checks them, copies
the bytes out and looks only at the copy.  A guest that breaks the protocol finds the reason in the page's ``error``
field and is not listened to until it is introduced again or reconnects.

``page`` is the 4096 bytes of struct xenstore_domain_interface, ``notify()`` signals the guest, ``written()`` is called
after the daemon wrote to the page.  All methods run on the event loop's thread except :meth:`RingConnection.wake`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

from pyxen.abi.io.xs_wire import (
    RING_CONNECTION,
    RING_ERROR,
    RING_REQ,
    RING_REQ_CONS,
    RING_REQ_PROD,
    RING_RSP,
    RING_RSP_CONS,
    RING_RSP_PROD,
    RING_SERVER_FEATURES,
    SOCKMSG,
    XENSTORE_CONNECTED,
    XENSTORE_PAYLOAD_MAX,
    XENSTORE_RECONNECT,
    XENSTORE_RING_SIZE,
    RingError,
    ServerFeature,
    XsType,
)
from pyxen.xenstore.connection import Connection
from pyxen.xenstore.quota import RING_EVENTS_MAX_BYTES
from pyxen.xenstore.service import Service

_HEADER_BYTES: Final = SOCKMSG.size
_MASK32: Final = 0xFFFFFFFF
_REQUESTS_PER_PASS: Final = 32
"""Then the others get their turn; the rest of a guest's requests wait for the next round of the loop."""
_WATCH_EVENT: Final = int(XsType.WATCH_EVENT)


def _nothing() -> None:
    pass


class RingConnection(Connection):
    """One introduced domain.  ``release()`` is called once by :meth:`close` (unmap the page, unbind the port)."""

    def __init__(self, service: Service, loop: asyncio.AbstractEventLoop, domid: int, page: memoryview,
                 notify: Callable[[], None], *, written: Callable[[], None] = _nothing,
                 release: Callable[[], None] = _nothing) -> None:
        super().__init__(domid, privileged=False)
        self._service = service
        self._loop = loop
        self._page = page
        # Through a view of u32, an index is read and written by one machine access: the guest's CPU is another thread.
        self._words = page.cast("I")
        self._notify = notify
        self._written = written
        self._release = release
        self._in = b""
        self._out: deque[bytes] = deque()
        self._out_done = 0
        self._event_bytes = 0
        self._queued_events: set[bytes] = set()
        self._lost_event = False
        self._broken = False
        self._woken = False
        self._serving = False
        self.closed = False
        self._words[RING_SERVER_FEATURES // 4] = ServerFeature.RECONNECTION | ServerFeature.ERROR
        self._words[RING_ERROR // 4] = RingError.NONE
        if self._words[RING_CONNECTION // 4] == XENSTORE_RECONNECT:
            self._reconnect()
        self._written()

    def wake(self) -> None:
        """The guest has signalled; may be called from any thread."""
        if not self._woken:
            # A guest that signals all day must not fill the loop's queue.
            self._woken = True
            self._loop.call_soon_threadsafe(self.on_event)

    def send(self, message_type: int, req_id: int, tx_id: int, payload: bytes) -> None:
        self._out.append(SOCKMSG.pack(message_type, req_id, tx_id, len(payload)) + payload)
        self._flush_later()

    def send_event(self, payload: bytes) -> None:
        if payload in self._queued_events:
            # It has yet to take the same news from its ring (XSA-326).
            return
        if self._event_bytes + len(payload) > RING_EVENTS_MAX_BYTES or self._broken:
            if not self._lost_event:
                self._lost_event = True
                self._service.log.warning("domain %d does not take its watch events: further ones are lost", self.domid)
            return
        self._queued_events.add(payload)
        self._event_bytes += len(payload)
        self._out.append(SOCKMSG.pack(_WATCH_EVENT, 0, 0, len(payload)) + payload)
        self._flush_later()

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._out.clear()
            self._words.release()
            self._release()

    def on_event(self) -> None:
        """Take requests out of the ring, serve them and put what is queued into it, as far as there is room."""
        self._woken = False
        if self.closed:
            return
        if self._words[RING_CONNECTION // 4] == XENSTORE_RECONNECT:
            self._reconnect()
        if self._broken:
            return
        self._serving = True
        moved = self._take_requests()
        self._serving = False
        if self.closed:
            return
        moved |= self._put_output()
        if moved:
            self._written()
            self._notify()

    def _flush_later(self) -> None:
        if not self._serving and not self._woken:
            self._woken = True
            self._loop.call_soon(self.on_event)

    # --- requests ------------------------------------------------------------------------------------------------

    def _take_requests(self) -> bool:
        moved = False
        for _ in range(_REQUESTS_PER_PASS):
            if self._replies_queued() >= self._service.quota.outstanding:
                # The guest's next signal comes when it has taken an answer.
                return moved
            message = self._whole_message()
            while message is None and not self._broken:
                taken = self._read_ring()
                if not taken:
                    return moved
                moved = True
                message = self._whole_message()
            if message is None:
                return moved
            message_type, req_id, tx_id, _ = SOCKMSG.unpack_from(message)
            self._service.handle(self, message_type, req_id, tx_id, message[_HEADER_BYTES:])
            if self.closed:
                return moved
        if not self._woken:
            self._woken = True
            self._loop.call_soon(self.on_event)
        return moved

    def _whole_message(self) -> bytes | None:
        data = self._in
        if len(data) < _HEADER_BYTES:
            return None
        length = SOCKMSG.unpack_from(data)[3]
        if length > XENSTORE_PAYLOAD_MAX:
            self._break(RingError.PROTO, f"sent a message of {length} bytes")
            return None
        end = _HEADER_BYTES + length
        if len(data) < end:
            return None
        self._in = data[end:]
        return data[:end]

    def _read_ring(self) -> int:
        """Move what the request ring holds into our buffer; the number of bytes."""
        words = self._words
        cons = words[RING_REQ_CONS // 4]
        available = (words[RING_REQ_PROD // 4] - cons) & _MASK32
        if available > XENSTORE_RING_SIZE:
            self._break(RingError.RINGIDX, f"has {available} bytes in a request ring of {XENSTORE_RING_SIZE}")
            return 0
        if not available:
            return 0
        start = cons % XENSTORE_RING_SIZE
        first = min(available, XENSTORE_RING_SIZE - start)
        page = self._page
        self._in += page[RING_REQ + start:RING_REQ + start + first]
        self._in += page[RING_REQ:RING_REQ + available - first]
        words[RING_REQ_CONS // 4] = (cons + available) & _MASK32
        return available

    # --- answers -------------------------------------------------------------------------------------------------

    def _replies_queued(self) -> int:
        return len(self._out) - len(self._queued_events)

    def _put_output(self) -> bool:
        out = self._out
        if not out or self._broken:
            return False
        words = self._words
        prod = words[RING_RSP_PROD // 4]
        used = (prod - words[RING_RSP_CONS // 4]) & _MASK32
        if used > XENSTORE_RING_SIZE:
            self._break(RingError.RINGIDX, f"has {used} bytes in a response ring of {XENSTORE_RING_SIZE}")
            return True
        room = XENSTORE_RING_SIZE - used
        batch = bytearray()
        while out and room:
            message = out[0]
            part = message[self._out_done:self._out_done + room]
            batch += part
            room -= len(part)
            self._out_done += len(part)
            if self._out_done == len(message):
                self._sent(out.popleft())
        if not batch:
            return False
        start = prod % XENSTORE_RING_SIZE
        first = min(len(batch), XENSTORE_RING_SIZE - start)
        self._page[RING_RSP + start:RING_RSP + start + first] = batch[:first]
        self._page[RING_RSP:RING_RSP + len(batch) - first] = batch[first:]
        # The guest may look as soon as the index has moved: the bytes are there by now.
        words[RING_RSP_PROD // 4] = (prod + len(batch)) & _MASK32
        return True

    def _sent(self, message: bytes) -> None:
        self._out_done = 0
        if SOCKMSG.unpack_from(message)[0] == _WATCH_EVENT:
            payload = message[_HEADER_BYTES:]
            self._queued_events.discard(payload)
            self._event_bytes -= len(payload)

    # --- trouble -------------------------------------------------------------------------------------------------

    def _break(self, error: RingError, story: str) -> None:
        self._broken = True
        self._words[RING_ERROR // 4] = error
        self._service.log.warning("domain %d %s: its xenstore ring is ignored from now on", self.domid, story)
        self._drop_state()
        self._written()

    def _reconnect(self) -> None:
        """The guest starts over (docs/misc/xenstore-ring.txt, "Connection state feature")."""
        self._drop_state()
        self._broken = False
        for offset in (RING_REQ_CONS, RING_REQ_PROD, RING_RSP_CONS, RING_RSP_PROD, RING_ERROR):
            self._words[offset // 4] = 0
        self._words[RING_CONNECTION // 4] = XENSTORE_CONNECTED
        self._written()
        self._notify()

    def _drop_state(self) -> None:
        self._service.forget(self)
        self._in = b""
        self._out.clear()
        self._out_done = 0
        self._queued_events.clear()
        self._event_bytes = 0
        self._lost_event = False
