# SPDX-License-Identifier: GPL-2.0-only
"""Reading a console as a program does."""

from __future__ import annotations

import asyncio
import re

import pytest

from pyxen.backends.console import ConsoleBackend
from pyxen.errors import HostError
from pyxen.toolstack.console_stream import LIMIT_BYTES, ConsoleStream

pytestmark = pytest.mark.timeout(20)


class Source:
    """Output in pieces, as ConsoleReader gives it."""

    def __init__(self, *pieces: bytes) -> None:
        self.queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        for piece in pieces:
            self.queue.put_nowait(piece)

    def __aiter__(self) -> Source:
        return self

    async def __anext__(self) -> bytes:
        piece = await self.queue.get()
        if piece is None:
            raise StopAsyncIteration
        return piece


def all_of_it(data: bytes) -> int:
    return len(data)


def test_expect_consumes_through_the_match_wherever_chunks_end() -> None:
    async def main() -> None:
        source = Source()
        stream = ConsoleStream(source, all_of_it)
        waiting = asyncio.ensure_future(stream.expect(b"login: ", 5))
        for piece in (b"boot\r\nlog", b"in", b": root\r\n", b"$ "):
            await asyncio.sleep(0)
            source.queue.put_nowait(piece)
        assert await waiting == b"boot\r\nlogin: "
        assert await stream.expect(re.compile(rb"r(o+)t\r\n"), 5) == b"root\r\n"
        assert await stream.read_available() == b"$ "
        assert await stream.read_available() == b""

    asyncio.run(main())


def test_a_timeout_and_an_end_show_the_last_output() -> None:
    async def main() -> None:
        source = Source(b"Kernel panic")
        stream = ConsoleStream(source, all_of_it)
        with pytest.raises(TimeoutError, match=r"login.*Kernel panic"):
            await stream.expect("login", 0.01)
        waiting = asyncio.ensure_future(stream.expect("login", 5))
        await asyncio.sleep(0)
        source.queue.put_nowait(None)
        with pytest.raises(HostError, match=r"closed.*Kernel panic"):
            await waiting
        assert await stream.expect("Kernel", 5) == b"Kernel"  # what came before the end can still be read
        assert await stream.read_to_end() == b" panic"

    asyncio.run(main())


def test_lines_and_the_rest_without_one() -> None:
    async def main() -> None:
        source = Source(b"one\ntwo\nthr", b"ee")
        source.queue.put_nowait(None)
        stream = ConsoleStream(source, all_of_it)
        assert [line async for line in stream] == [b"one\n", b"two\n", b"three"]

    asyncio.run(main())


def test_typing_waits_for_room_and_ends_with_the_console() -> None:
    async def main() -> None:
        typed = bytearray()

        def slow(data: bytes) -> int:
            typed.extend(data[:2])
            return min(len(data), 2)

        source = Source()
        source.queue.put_nowait(None)
        stream = ConsoleStream(source, slow)
        await stream.write("ls -l\n")
        assert typed == b"ls -l\n"
        assert await stream.read_to_end() == b""
        with pytest.raises(HostError, match="gone"):
            await stream.write(b"ls\n")

    asyncio.run(main())


def test_memory_is_bounded_while_a_text_does_not_come() -> None:
    async def main() -> None:
        source = Source(*[b"x" * (LIMIT_BYTES // 2)] * 5, b"end")
        stream = ConsoleStream(source, all_of_it)
        assert len(await stream.expect("end", 5)) == LIMIT_BYTES

    asyncio.run(main())


def test_over_the_real_back_end() -> None:
    async def main() -> None:
        page = bytearray(4096)
        backend = ConsoleBackend(memoryview(page), lambda: None, "one")
        stream = ConsoleStream(backend.attach(), backend.write)
        page[1024:1029] = b"hello"
        page[3084:3088] = (5).to_bytes(4, "little")  # out_prod
        backend.on_event()
        await stream.write(b"echo\n")
        assert page[:5] == b"echo\n"
        backend.close()
        assert await stream.read_to_end() == b"hello"

    asyncio.run(main())
