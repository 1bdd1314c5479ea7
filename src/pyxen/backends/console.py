# SPDX-License-Identifier: GPL-2.0-only
"""The PV console's back end: what xenconsoled does (tools/console/daemon/io.c) for one domain.

The guest's output is drained whenever it signals, whether anybody listens or not: it goes to the log file, to a
history of the last 64 KiB and to every attached reader.  Nobody can hold the guest up: a reader that does not keep up
loses the oldest bytes of its own buffer.  Input waits in a bounded queue for room in the guest's ring.

The page stays the guest's to scribble on; its indices are read once a pass and checked.  A guest that claims more
output than the ring holds is not read from until it says something else, as in xenconsoled.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Final

from pyxen.abi.io.console import IN, IN_CONS, IN_PROD, IN_SIZE, OUT, OUT_CONS, OUT_PROD, OUT_SIZE
from pyxen.errors import HostError

HISTORY_BYTES: Final = 64 * 1024
READER_BYTES: Final = 256 * 1024
"""A reader's buffer; what does not fit pushes out its oldest bytes."""
INPUT_BYTES: Final = 64 * 1024
"""Input waiting for the guest; what does not fit is refused."""
LOG_BYTES: Final = 16 * 1024 * 1024
"""A log file larger than this is renamed to NAME.log.1 and begun anew."""
_MASK32: Final = 0xFFFFFFFF
_log: Final = logging.getLogger("pyxen.console")


def _nothing() -> None:
    pass


class _Tail:
    """The last ``limit`` bytes of what was added."""

    __slots__ = ("_chunks", "_limit", "size")

    def __init__(self, limit: int) -> None:
        self._chunks: deque[bytes] = deque()
        self._limit = limit
        self.size = 0

    def add(self, data: bytes) -> None:
        self._chunks.append(data)
        self.size += len(data)
        while self.size > self._limit:
            excess = self.size - self._limit
            oldest = self._chunks.popleft()
            if len(oldest) > excess:
                self._chunks.appendleft(oldest[excess:])
            self.size -= min(excess, len(oldest))

    def take(self) -> bytes:
        data = self.peek()
        self._chunks.clear()
        self.size = 0
        return data

    def peek(self) -> bytes:
        return b"".join(self._chunks)


class ConsoleReader:
    """One listener: an async iterator of what the guest prints, history first; it ends when the console is closed."""

    def __init__(self, backend: ConsoleBackend, history: bytes) -> None:
        self._backend = backend
        self._buffer = _Tail(READER_BYTES)
        self._waiter: asyncio.Future[None] | None = None
        self._ended = False
        if history:
            self._buffer.add(history)

    def __aiter__(self) -> ConsoleReader:
        return self

    async def __anext__(self) -> bytes:
        while not self._buffer.size:
            if self._ended:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._buffer.take()

    def detach(self) -> None:
        """Stop listening."""
        self._backend.forget(self)
        self.end()

    def deliver(self, data: bytes) -> None:
        """The guest has printed (called by the backend)."""
        self._buffer.add(data)
        self._wake()

    def end(self) -> None:
        """Nothing more will come (called by the backend)."""
        self._ended = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class ConsoleBackend:
    """The console of domain ``name``; everything runs on one event loop's thread.

    ``view`` is the page with struct xencons_interface, ``notify()`` signals the guest, ``written()`` is called after
    the page was written to.  The owner calls :meth:`on_event` when the guest signals.
    """

    def __init__(self, view: memoryview, notify: Callable[[], None], name: str, log_path: Path | None = None, *,
                 written: Callable[[], None] = _nothing, log_limit_bytes: int = LOG_BYTES) -> None:
        self.name = name
        self._view = view
        # Through a view of u32, an index is one machine access: the guest's CPU is another thread.
        self._words = view[: len(view) & ~3].cast("I")
        self._notify = notify
        self._written = written
        self._history = _Tail(HISTORY_BYTES)
        self._input: deque[bytes] = deque()
        self._input_size = 0
        self._readers: set[ConsoleReader] = set()
        self._log = _LogFile(log_path, log_limit_bytes) if log_path is not None else None
        self.closed = False

    def on_event(self) -> None:
        """The guest has signalled: it printed, or it took input."""
        if self.closed:
            return
        moved = self._drain_output()
        moved |= self._fill_input()
        if moved:
            self._written()
            self._notify()

    def attach(self) -> ConsoleReader:
        """Listen: an async iterator of bytes."""
        reader = ConsoleReader(self, self._history.peek())
        if self.closed:
            reader.end()
        else:
            self._readers.add(reader)
        return reader

    def write(self, data: bytes) -> int:
        """Queue input for the guest; how many bytes there was room for."""
        if self.closed:
            return 0
        data = bytes(data[: INPUT_BYTES - self._input_size])
        if data:
            self._input.append(data)
            self._input_size += len(data)
        if self._fill_input():
            self._written()
            self._notify()
        return len(data)

    @property
    def history(self) -> bytes:
        """The last 64 KiB the guest printed."""
        return self._history.peek()

    def close(self) -> None:
        """Take what is left in the ring, end every reader and close the log; the page is the caller's to unmap."""
        if self.closed:
            return
        self._drain_output()
        self.closed = True
        for reader in self._readers:
            reader.end()
        self._readers.clear()
        self._input.clear()
        if self._log is not None:
            self._log.close()
        self._words.release()

    def forget(self, reader: ConsoleReader) -> None:
        """A reader has gone (called by it)."""
        self._readers.discard(reader)

    def _drain_output(self) -> bool:
        words = self._words
        cons = words[OUT_CONS // 4]
        prod = words[OUT_PROD // 4]
        size = (prod - cons) & _MASK32
        if not 0 < size <= OUT_SIZE:
            return False
        start = cons % OUT_SIZE
        first = min(size, OUT_SIZE - start)
        data = bytes(self._view[OUT + start:OUT + start + first]) + bytes(self._view[OUT:OUT + size - first])
        # The guest may reuse the room as soon as the index has moved: the bytes are ours by now.
        words[OUT_CONS // 4] = prod
        self._history.add(data)
        if self._log is not None:
            self._log.write(data)
        for reader in self._readers:
            reader.deliver(data)
        return True

    def _fill_input(self) -> bool:
        if not self._input:
            return False
        words = self._words
        prod = words[IN_PROD // 4]
        used = (prod - words[IN_CONS // 4]) & _MASK32
        # A guest whose indices make no sense gets no input until they do.
        room = IN_SIZE - used if used <= IN_SIZE else 0
        batch = b"".join(self._input)[:room] if room else b""
        if not batch:
            return False
        self._drop_input(len(batch))
        start = prod % IN_SIZE
        first = min(len(batch), IN_SIZE - start)
        self._view[IN + start:IN + start + first] = batch[:first]
        self._view[IN:IN + len(batch) - first] = batch[first:]
        # The guest may look as soon as the index has moved: the bytes are there by now.
        words[IN_PROD // 4] = (prod + len(batch)) & _MASK32
        return True

    def _drop_input(self, count: int) -> None:
        self._input_size -= count
        while count:
            oldest = self._input.popleft()
            if len(oldest) > count:
                self._input.appendleft(oldest[count:])
                return
            count -= len(oldest)


class _LogFile:
    """Appends to ``path`` as it comes, renamed to ``path``.1 when it has grown to ``limit`` bytes."""

    def __init__(self, path: Path, limit: int) -> None:
        self._path = path
        self._limit = limit
        self._file: BinaryIO | None = None
        self._open()

    def write(self, data: bytes) -> None:
        file = self._file
        if file is None:
            return
        try:
            file.write(data)
            if file.tell() >= self._limit:
                file.close()
                self._file = None
                self._path.replace(self._path.with_name(self._path.name + ".1"))
                self._open()
        except OSError as error:
            # A full disk costs the log, not the guest.
            _log.warning("console log %s is given up: %s", self._path, error)
            self.close()

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with contextlib.suppress(OSError):
                file.close()

    def _open(self) -> None:
        try:
            self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise HostError(f"cannot write the console log {self._path}: {error.strerror}") from error
        self._file = os.fdopen(descriptor, "ab", buffering=0)
