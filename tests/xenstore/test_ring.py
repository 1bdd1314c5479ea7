# SPDX-License-Identifier: GPL-2.0-only
"""A guest's ring: requests and answers through 1024 bytes each way, and guests that lie."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyxen.abi.io.xs_wire import (
    RING_CONNECTION,
    RING_ERROR,
    RING_REQ_CONS,
    RING_REQ_PROD,
    RING_RSP_CONS,
    RING_RSP_PROD,
    RING_SERVER_FEATURES,
    SOCKMSG,
    XENSTORE_PAYLOAD_MAX,
    XENSTORE_RECONNECT,
    XENSTORE_RING_SIZE,
    RingError,
    XsType,
)
from pyxen.errors import XenError
from pyxen.xenstore.daemon import XenstoreDaemon
from tests.xenstore.peers import FakePrivcmd, Guest, Peer


def on_ring(work: Callable[[XenstoreDaemon, Guest, Peer], Awaitable[None]]) -> None:
    """Run ``work`` with a daemon, guest 5 that owns its home, and dom0."""

    async def main() -> None:
        daemon = XenstoreDaemon(None)
        await daemon.start()
        dom0 = Peer(daemon.service)
        dom0.ask(XsType.MKDIR, b"/local/domain/5\0")
        dom0.ask(XsType.SET_PERMS, b"/local/domain/5\0n5\0")
        await work(daemon, Guest(daemon, 5), dom0)
        await daemon.stop()

    asyncio.run(asyncio.wait_for(main(), 20))


def test_requests_and_answers_wrap_around_the_ring() -> None:
    async def work(daemon: XenstoreDaemon, guest: Guest, dom0: Peer) -> None:
        for i in range(120):
            value = bytes([i]) * (i * 8 % 900)
            assert await guest.ask(XsType.WRITE, b"x\0" + value) == b"OK\0"
            assert await guest.ask(XsType.READ, b"x\0") == value
        assert guest.word(RING_REQ_CONS) > 10 * XENSTORE_RING_SIZE
        assert guest.signals >= 240

    on_ring(work)


def test_indices_wrap_at_32_bits() -> None:
    async def work(daemon: XenstoreDaemon, guest: Guest, dom0: Peer) -> None:
        for offset in (RING_REQ_CONS, RING_REQ_PROD, RING_RSP_CONS, RING_RSP_PROD):
            guest.set_word(offset, 0xFFFFFFF0)
        assert await guest.ask(XsType.WRITE, b"x\0value") == b"OK\0"
        assert await guest.ask(XsType.READ, b"x\0") == b"value"
        assert guest.word(RING_REQ_CONS) < 100

    on_ring(work)


def test_an_answer_longer_than_the_ring_comes_in_parts() -> None:
    async def work(daemon: XenstoreDaemon, guest: Guest, dom0: Peer) -> None:
        dom0.ask(XsType.WRITE, b"/big\0" + bytes(range(256)) * 15)
        dom0.ask(XsType.SET_PERMS, b"/big\0r0\0")
        assert await guest.ask(XsType.READ, b"/big\0") == bytes(range(256)) * 15

    on_ring(work)


def test_the_largest_request_fits_through() -> None:
    async def work(daemon: XenstoreDaemon, guest: Guest, dom0: Peer) -> None:
        payload = b"x\0" + bytes(XENSTORE_PAYLOAD_MAX - 2)
        assert await guest.ask(XsType.WRITE, payload) == "ENOSPC"
        assert await guest.ask(XsType.WRITE, b"x\0v") == b"OK\0"

    on_ring(work)


@pytest.mark.parametrize(
    ("offset", "value", "error"),
    [
        (RING_REQ_PROD, 1025, RingError.RINGIDX),
        (RING_REQ_PROD, 0xFFFFFFFF, RingError.RINGIDX),
        (RING_REQ_CONS, 1, RingError.RINGIDX),
    ],
)
def test_absurd_request_indices_end_the_conversation(offset: int, value: int, error: RingError) -> None:
    async def work(daemon: XenstoreDaemon, guest: Guest, dom0: Peer) -> None:
        guest.set_word(offset, value)
        guest.connection.wake()
        await asyncio.sleep(0)
        assert guest.word(RING_ERROR) == error
        # The domain stays introduced, and nobody listens to it.
        assert dom0.ask(XsType.IS_DOMAIN_INTRODUCED, b"5\0") == b"T\0"
        guest.set_word(RING_REQ_CONS, 0)
        guest.set_word(RING_REQ_PROD, 0)
        with pytest.raises(AssertionError, match="no message came"):
            await guest.ask(XsType.READ, b"x\0")

    on_ring(work)


def test_absurd_response_indices_end_the_conversation() -> None:
    async def work(daemon: XenstoreDaemon, guest: Guest, dom0: Peer) -> None:
        guest.set_word(RING_RSP_CONS, 5)
        await guest.put(SOCKMSG.pack(XsType.READ, 1, 0, 2) + b"x\0")
        assert guest.word(RING_ERROR) == RingError.RINGIDX
        assert guest.word(RING_RSP_PROD) == 0

    on_ring(work)


def test_a_message_longer_than_the_protocol_allows_ends_the_conversation() -> None:
    async def work(daemon: XenstoreDaemon, guest: Guest, dom0: Peer) -> None:
        dom0.ask(XsType.SET_PERMS, b"/\0r0\0")
        await guest.ask(XsType.WATCH, b"/x\0t\0")
        await guest.put(SOCKMSG.pack(XsType.READ, 1, 0, XENSTORE_PAYLOAD_MAX + 1))
        assert guest.word(RING_ERROR) == RingError.PROTO
        assert guest.connection.watches == {}
        prod = guest.word(RING_RSP_PROD)
        dom0.ask(XsType.WRITE, b"/x\0")
        await asyncio.sleep(0)
        assert guest.word(RING_RSP_PROD) == prod

    on_ring(work)


def test_reconnecting_starts_over() -> None:
    async def work(daemon: XenstoreDaemon, guest: Guest, dom0: Peer) -> None:
        assert guest.word(RING_SERVER_FEATURES) & 1
        await guest.ask(XsType.WATCH, b"x\0t\0")
        tx = await guest.ask(XsType.TRANSACTION_START, b"\0")
        assert tx == b"1\0"
        await guest.put(SOCKMSG.pack(XsType.READ, 1, 0, 30) + b"half a mess")
        guest.set_word(RING_REQ_PROD, 5000)
        guest.connection.wake()
        await asyncio.sleep(0)
        assert guest.word(RING_ERROR) == RingError.RINGIDX
        guest.set_word(RING_CONNECTION, XENSTORE_RECONNECT)
        guest.connection.wake()
        await asyncio.sleep(0)
        assert [guest.word(o) for o in (RING_CONNECTION, RING_ERROR, RING_REQ_CONS, RING_RSP_PROD)] == [0, 0, 0, 0]
        guest.data = b""
        assert guest.connection.watches == {}
        assert await guest.ask(XsType.READ, b"x\0", tx=1) == "ENOENT"
        assert await guest.ask(XsType.WRITE, b"x\0v") == b"OK\0"

    on_ring(work)


def test_a_guest_that_takes_no_answers_is_not_served_beyond_its_quota() -> None:
    async def work(daemon: XenstoreDaemon, guest: Guest, dom0: Peer) -> None:
        dom0.ask(XsType.WRITE, b"/big\0" + bytes(4000))
        dom0.ask(XsType.SET_PERMS, b"/big\0r0\0")
        request = SOCKMSG.pack(XsType.READ, 1, 0, 5) + b"/big\0"
        with pytest.raises(AssertionError, match="does not read this ring"):
            await guest.put(request * 200)
        served = guest.word(RING_REQ_CONS) // len(request)
        assert served < 20 + 2 * XENSTORE_RING_SIZE // len(request)
        # It takes them at last, and everything is answered.
        answers = 0
        for _ in range(served):
            assert (await guest.message())[3] == bytes(4000)
            answers += 1
        assert answers == served

    on_ring(work)


def test_news_it_has_not_taken_is_queued_once_and_bounded() -> None:
    async def work(daemon: XenstoreDaemon, guest: Guest, dom0: Peer) -> None:
        dom0.ask(XsType.SET_PERMS, b"/\0r0\0")
        await guest.ask(XsType.WATCH, b"/\0" + b"t" * 900 + b"\0")
        for _ in range(5000):
            dom0.ask(XsType.WRITE, b"/same\0")
        for i in range(3000):
            dom0.ask(XsType.WRITE, b"/news/%d\0" % i)
        queued = sum(len(message) for message in guest.connection._out)
        assert queued < 400_000
        # It was not told of everything, but what it was told comes whole, and it is served again.
        seen: list[bytes] = []
        while len(seen) < 250:
            message = await guest.message()
            if message[3].startswith(b"/news") or message[3].startswith(b"/same"):
                seen.append(message[3])
        assert len(set(seen)) == len(seen)
        assert await guest.ask(XsType.READ, b"x\0") == "ENOENT"

    on_ring(work)


def test_one_guest_does_not_keep_the_loop_from_the_others() -> None:
    async def work(daemon: XenstoreDaemon, guest: Guest, dom0: Peer) -> None:
        other = Guest(daemon, 6)
        flood = (SOCKMSG.pack(XsType.GET_DOMAIN_PATH, 1, 0, 2) + b"5\0") * 56
        busy = asyncio.create_task(guest.put(flood))
        assert await other.ask(XsType.GET_DOMAIN_PATH, b"6\0") == b"/local/domain/6\0"
        for _ in range(56):
            assert (await guest.message())[3] == b"/local/domain/5\0"
        await busy

    on_ring(work)


@given(st.binary(max_size=4096), st.integers(0, 0xFFFFFFFF), st.integers(0, 0xFFFFFFFF))
@settings(max_examples=60, deadline=None)
def test_whatever_is_in_the_page_the_daemon_lives(junk: bytes, prod: int, cons: int) -> None:
    async def work(daemon: XenstoreDaemon, guest: Guest, dom0: Peer) -> None:
        guest.memory[:len(junk)] = junk
        guest.set_word(RING_REQ_PROD, prod)
        guest.set_word(RING_RSP_CONS, cons)
        for _ in range(3):
            guest.connection.wake()
            await asyncio.sleep(0)
        assert dom0.ask(XsType.READ, b"/tool\0") == b""
        assert list(daemon.service.store.check()) == []

    on_ring(work)


def test_introduce_maps_and_binds_and_release_gives_back() -> None:
    async def main() -> None:
        privcmd = FakePrivcmd()
        privcmd.add(5)
        daemon = XenstoreDaemon(privcmd)
        await daemon.start()
        dom0 = Peer(daemon.service)
        dom0.ask(XsType.WATCH, b"@releaseDomain\0r\0")
        dom0.events()
        assert dom0.ask(XsType.INTRODUCE, b"5\0" b"1234\0" b"7\0") == b"OK\0"
        (mapping,), (port,) = privcmd.mappings, privcmd.ports
        page = privcmd.pages[5]
        request = SOCKMSG.pack(XsType.GET_DOMAIN_PATH, 1, 0, 2) + b"5\0"
        page[:len(request)] = request
        page[RING_REQ_PROD:RING_REQ_PROD + 4] = len(request).to_bytes(4, "little")
        await asyncio.get_running_loop().run_in_executor(None, port.callback)
        await asyncio.sleep(0)
        assert page[1024 + 16:1024 + 32] == b"/local/domain/5\0"
        assert port.notified
        assert mapping.writes >= 2
        # Introduced again (the guest was resumed elsewhere): the old page and port are given back.
        assert dom0.ask(XsType.INTRODUCE, b"5\0" b"1235\0" b"7\0") == b"OK\0"
        assert (mapping.closed, port.closed) == (True, True)
        for wrong in (b"5\0", b"7\0" b"1\0" b"0\0", b"32752\0" b"1\0" b"1\0", b"-1\0" b"1\0" b"1\0"):
            assert dom0.ask(XsType.INTRODUCE, wrong) == "EINVAL"
        privcmd.states[5].shutdown = True
        assert privcmd.virq is not None
        for expected in ([b"@releaseDomain\0r\0"], []):
            await asyncio.get_running_loop().run_in_executor(None, privcmd.virq.callback)
            await asyncio.sleep(0)
            assert dom0.events() == expected
        assert dom0.ask(XsType.RESUME, b"5\0") == b"OK\0"
        daemon.reap()
        assert dom0.events() == [b"@releaseDomain\0r\0"]
        privcmd.states[5].dying = True
        daemon.reap()
        assert dom0.events() == [b"@releaseDomain\0r\0"]
        assert (privcmd.mappings[1].closed, privcmd.ports[1].closed) == (True, True)
        # A port that cannot be bound leaves nothing mapped.
        privcmd.add(6)
        privcmd.bind_error = XenError(22)
        assert dom0.ask(XsType.INTRODUCE, b"6\0" b"1\0" b"1\0") == "EINVAL"
        assert privcmd.mappings[2].closed
        assert not daemon.is_introduced(6)
        await daemon.stop()
        assert privcmd.virq.closed

    asyncio.run(asyncio.wait_for(main(), 20))
