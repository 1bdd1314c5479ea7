# SPDX-License-Identifier: GPL-2.0-only
"""A host for code that has no event loop: it lives on one of its own, in a thread."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import threading
from collections.abc import Coroutine, Sequence
from types import TracebackType
from typing import Any, TypeVar

from pyxen.host import DomainHandle, Host
from pyxen.toolstack.config import DomainConfig

T = TypeVar("T")

DEFAULT_TIMEOUT_S = 120.0


class BlockingHost:
    """A context manager around :class:`pyxen.Host`; takes its arguments.

    with BlockingHost("256M") as host:
        domain = host.create('name = "vm"\\nkernel = "./unikernel"\\nmemory = 16')
        host.run(domain.console.expect(b"ready"))
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.host = Host(*arguments, **options)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._serve, name="pyxen-host", daemon=True)

    def __enter__(self) -> BlockingHost:
        self._thread.start()
        try:
            self.run(self.host.start())
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.run(self.host.close())
        finally:
            self._end()

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float | None = DEFAULT_TIMEOUT_S) -> T:
        """The result of a coroutine of the host, its domains or their consoles.

        Raises what it raises, and TimeoutError after ``timeout_s``; it is cancelled then, and has been when we return.
        """
        future = asyncio.run_coroutine_threadsafe(_within(work, timeout_s), self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            concurrent.futures.wait([future], timeout=10)
            raise

    def create(
        self,
        config: DomainConfig | str | os.PathLike[str],
        *,
        paused: bool = False,
        extra: Sequence[str] = (),
        pv_mode: str | None = None,
    ) -> DomainHandle:
        """As :meth:`pyxen.Host.create`."""
        return self.run(self.host.create(config, paused=paused, extra=extra, pv_mode=pv_mode))

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        self._loop.run_forever()

    def _end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _within(work: Coroutine[Any, Any, T], timeout_s: float | None) -> T:
    async with asyncio.timeout(timeout_s):
        return await work
