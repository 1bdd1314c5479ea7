# SPDX-License-Identifier: GPL-2.0-only
"""xenstored as the toolstack uses it: dom0's connection, and the daemon's management of guests.

Implements ``store_entries.Store`` and ``services.Registry`` over a daemon in this process, whose client answers without
suspending.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import Callable, Iterator, Sequence

from pyxen.errors import HostError, XenError
from pyxen.xenstore.client import Client, Transaction
from pyxen.xenstore.daemon import XenstoreDaemon


class Dom0Store:
    """Domain 0's connection to the xenstored of this host."""

    def __init__(self, daemon: XenstoreDaemon) -> None:
        self._daemon = daemon
        self.client: Client = daemon.connect()
        self._watchers: set[asyncio.Task[None]] = set()

    async def publish(self, nodes: Sequence[tuple[str, bytes, Sequence[str]]]) -> None:
        """Write nodes with their permissions in one transaction."""

        async def work(transaction: Transaction) -> None:
            for path, value, permissions in nodes:
                await transaction.write(path, value)
                await transaction.set_perms(path, permissions)

        await self.client.run_transaction(work)

    async def read(self, path: str) -> bytes | None:
        """The node's value; None when it does not exist."""
        try:
            return await self.client.read_bytes(path)
        except XenError as error:
            if error.errno != errno.ENOENT:
                raise
            return None

    async def write(self, path: str, value: bytes) -> None:
        """Set a node's value; its permissions stay."""
        await self.client.write(path, value)

    async def remove(self, paths: Sequence[str], prune: Sequence[str] = ()) -> None:
        """Remove subtrees, and then those of ``prune`` that are empty, in one transaction."""

        async def work(transaction: Transaction) -> None:
            for path in paths:
                with _absent_is_fine():
                    await transaction.rm(path)
            for path in prune:
                with _absent_is_fine():
                    if not await transaction.ls(path):
                        await transaction.rm(path)

        await self.client.run_transaction(work)

    def introduce(self, domid: int, gfn: int, port: int) -> None:
        """Serve the guest's ring in frame ``gfn``; ``port`` is the guest's end of the event channel."""
        self._daemon.introduce(domid, gfn, port)

    def release(self, domid: int) -> None:
        """Forget the guest. Raises XenError(ENOENT) when it was never introduced."""
        self._daemon.release(domid)

    def watch_releases(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call back whenever ``@releaseDomain`` fires; returns how to stop."""

        async def follow() -> None:
            with contextlib.suppress(HostError):  # the daemon stops
                async with self.client.watch("@releaseDomain") as events:
                    async for _ in events:
                        callback()

        task = asyncio.ensure_future(follow())
        self._watchers.add(task)
        task.add_done_callback(self._watchers.discard)

        def stop() -> None:
            task.cancel()

        return stop

    async def close(self) -> None:
        """Disconnect."""
        watchers = list(self._watchers)
        for task in watchers:
            task.cancel()
        if watchers:
            await asyncio.wait(watchers)
        self.client.close()


@contextlib.contextmanager
def _absent_is_fine() -> Iterator[None]:
    try:
        yield
    except XenError as error:
        if error.errno != errno.ENOENT:
            raise
