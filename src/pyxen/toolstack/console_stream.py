# SPDX-License-Identifier: GPL-2.0-only
"""A console as a program reads it: lines, waiting for a text, typing."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from typing import Final

from pyxen.errors import HostError

LIMIT_BYTES: Final = 4 << 20
"""How much output may wait for a text that does not come; beyond it the oldest goes."""
_TAIL_BYTES: Final = 400
_TYPING_PAUSE_S: Final = 0.02


class ConsoleStream:
    """Output of one console in order, and its input; for one reader at a time, on the event loop's thread.

    Reading consumes: :meth:`expect` returns all output up to and including the match, and the next read goes on after
    it.  ``output`` yields what the guest prints and ends with the console; ``write`` takes input and says how many
    bytes
    there was room for.
    """

    def __init__(self, output: AsyncIterator[bytes], write: Callable[[bytes], int]) -> None:
        self._output = output
        self._write = write
        self._buffer = bytearray()
        self.closed = False
        """Everything the console said has been taken from it, and no more will come: its domain is gone."""

    async def write(self, data: bytes | str) -> None:
        """Type, as fast as the guest takes it. Raises HostError when the console is known to be closed."""
        data = data.encode() if isinstance(data, str) else data
        # The guest takes input when it likes and tells nobody but the ring: there is no event to wait for.
        while not self.closed and (data := data[self._write(data) :]):  # noqa: ASYNC110
            await asyncio.sleep(_TYPING_PAUSE_S)
        if self.closed:
            raise HostError("the console is closed: its domain is gone")

    async def expect(self, pattern: bytes | str | re.Pattern[bytes], timeout: float | None = 60.0) -> bytes:
        """Wait for ``pattern`` (a text, or a compiled bytes expression); all output up to its end.

        Raises TimeoutError after ``timeout`` seconds and HostError when the console closes first; both show the last
        output.
        """
        if isinstance(pattern, str):
            pattern = pattern.encode()
        expression = re.compile(re.escape(pattern)) if isinstance(pattern, bytes) else pattern
        try:
            async with asyncio.timeout(timeout):
                while (match := expression.search(self._buffer)) is None:
                    if not await self._more():
                        raise HostError(f"the console closed before {expression.pattern!r} came; {self._tail()}")
        except TimeoutError:
            text = f"no {expression.pattern!r} on the console within {timeout} s; {self._tail()}"
            raise TimeoutError(text) from None
        return self._take(match.end())

    async def readline(self) -> bytes:
        """The next line with its line feed; after the console has closed the rest without one, and then b""."""
        while (end := self._buffer.find(b"\n")) < 0:
            if not await self._more():
                return self._take(len(self._buffer))
        return self._take(end + 1)

    async def read_to_end(self) -> bytes:
        """Everything until the console closes."""
        while await self._more():
            pass
        return self._take(len(self._buffer))

    async def read_available(self) -> bytes:
        """What has come and was not read yet; does not wait for more."""
        try:
            async with asyncio.timeout(0):
                await self._more()
        except TimeoutError:
            pass
        return self._take(len(self._buffer))

    def __aiter__(self) -> ConsoleStream:
        return self

    async def __anext__(self) -> bytes:
        line = await self.readline()
        if not line:
            raise StopAsyncIteration
        return line

    async def _more(self) -> bool:
        if self.closed:
            return False
        try:
            self._buffer += await anext(self._output)
        except StopAsyncIteration:
            self.closed = True
            return False
        excess = len(self._buffer) - LIMIT_BYTES
        if excess > 0:
            del self._buffer[:excess]
        return True

    def _take(self, size: int) -> bytes:
        data = bytes(self._buffer[:size])
        del self._buffer[:size]
        return data

    def _tail(self) -> str:
        if not self._buffer:
            return "nothing was said"
        return f"the last output was {bytes(self._buffer[-_TAIL_BYTES:])!r}"
