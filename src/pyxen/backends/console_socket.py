# SPDX-License-Identifier: GPL-2.0-only
"""A console on a unix socket: a raw byte stream both ways for any number of clients (``xl console``).

A client gets the history first, then what the guest prints.  What it sends is input, taken no faster than the guest
reads it.  The socket is its owner's alone (mode 0600).
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path
from typing import Final

from pyxen.backends.console import ConsoleBackend, ConsoleReader
from pyxen.errors import HostError

MAX_CLIENTS: Final = 64
_CHUNK_BYTES: Final = 4096
_INPUT_RETRY_S: Final = 0.05


class ConsoleSocket:
    """Serves ``backend`` at ``path``; use :meth:`start` and :meth:`close`."""

    def __init__(self, path: Path, backend: ConsoleBackend) -> None:
        self.path = path
        self._backend = backend
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen.  A stale socket file is replaced; HostError when the socket cannot be had."""
        try:
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self.path.is_socket():
                self.path.unlink()
            self._server = await asyncio.start_unix_server(self._on_client, self.path, start_serving=False)
            # Nobody can connect before it listens, so that the mode is right from the first connection.
            self.path.chmod(0o600)
            await self._server.start_serving()
        except OSError as error:
            await self.close()
            raise HostError(f"cannot listen on {self.path}: {error.strerror or error}") from error

    async def close(self) -> None:
        """End every client, those that still have output to get after they got it, and remove the socket."""
        if self._server is not None:
            self._server.close()
            self._server = None
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()
        if self._clients:
            if self._backend.closed:
                await asyncio.wait(self._clients, timeout=1)
            for task in self._clients:
                task.cancel()
            await asyncio.gather(*self._clients, return_exceptions=True)

    async def _on_client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        if task is None or len(self._clients) >= MAX_CLIENTS:
            writer.close()
            return
        self._clients.add(task)
        output = self._backend.attach()
        typing = asyncio.create_task(self._take_input(reader, output))
        try:
            async for data in output:
                writer.write(data)
                await writer.drain()
            writer.close()
            await writer.wait_closed()
        except (ConnectionError, asyncio.CancelledError):
            # The client left, or did not take its rest in time: what it has not read is nobody's any more.
            writer.transport.abort()
        finally:
            output.detach()
            typing.cancel()
            self._clients.discard(task)

    async def _take_input(self, reader: asyncio.StreamReader, output: ConsoleReader) -> None:
        try:
            while data := await reader.read(_CHUNK_BYTES):
                while data := data[self._backend.write(data):]:
                    if self._backend.closed:
                        return
                    await asyncio.sleep(_INPUT_RETRY_S)
        except ConnectionError:
            pass
        # End of input is the client's goodbye: xl console closes its side to leave.
        output.detach()
