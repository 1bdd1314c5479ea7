# SPDX-License-Identifier: GPL-2.0-only
"""Clients of xenstored: :class:`Client` for asyncio and :class:`SyncClient` (blocking; see ``sync_client``).

    client = await Client.open(rundir / "xenstored/socket")         # or daemon.connect() in the daemon's process
    async with client.transaction() as t:
        await t.write("device/vbd/51712/state", "4")                # relative to /local/domain/0
    async with client.watch("/local/domain/3/control") as events:
        async for path, token in events:
            ...

Errors the daemon reports are XenError with its errno; a connection that is gone is HostError.
"""

from __future__ import annotations

import asyncio
import errno
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from pyxen.abi.io.xs_wire import XsType
from pyxen.errors import HostError, XenError
from pyxen.xenstore.channel import Channel, StreamChannel
from pyxen.xenstore.encoding import (
    MAX_ATTEMPTS,
    PartialListing,
    Text,
    check_size,
    error_of,
    permission_strings,
    split,
    strings,
    to_bytes,
    to_str,
)
from pyxen.xenstore.sync_client import SyncClient, SyncTransaction

__all__ = ["Client", "SyncClient", "SyncTransaction", "Transaction", "Watch"]

T = TypeVar("T")


class Operations(ABC):
    """What can be asked about nodes, in a transaction or outside of one."""

    @abstractmethod
    async def request(self, message_type: XsType, payload: bytes) -> bytes:
        """Send one request; the reply's payload.  XenError as the daemon says."""

    async def read_bytes(self, path: Text) -> bytes:
        """A node's value.  XenError(ENOENT) if it is absent."""
        return await self.request(XsType.READ, strings(path))

    async def read(self, path: Text) -> str:
        """A node's value as text (see ``encoding``)."""
        return to_str(await self.read_bytes(path))

    async def get(self, path: Text, default: str | None = None) -> str | None:
        """A node's value, or ``default`` if it is absent."""
        try:
            return await self.read(path)
        except XenError as error:
            if error.errno != errno.ENOENT:
                raise
            return default

    async def write(self, path: Text, value: Text) -> None:
        """Set a value; the node, and what is missing above it, is created."""
        await self.request(XsType.WRITE, check_size(strings(path) + to_bytes(value)))

    async def mkdir(self, path: Text) -> None:
        """Create a node with an empty value unless it exists."""
        await self.request(XsType.MKDIR, strings(path))

    async def rm(self, path: Text) -> None:
        """Remove a node and all below it; an absent one is no error if its parent exists."""
        await self.request(XsType.RM, strings(path))

    async def ls(self, path: Text) -> list[str]:
        """Names of the children, in the order of their creation; any number of them."""
        try:
            return split(await self.request(XsType.DIRECTORY, strings(path)))
        except XenError as error:
            if error.errno != errno.E2BIG:
                raise
        listing = PartialListing()
        while True:
            part = await self.request(XsType.DIRECTORY_PART, strings(path, str(listing.offset)))
            names = listing.add(part)
            if names is not None:
                return names

    async def exists(self, path: Text) -> bool:
        """Whether there is such a node."""
        return await self.get(path) is not None

    async def get_perms(self, path: Text) -> list[str]:
        """The permission list, such as ``["n0", "r5"]``."""
        return split(await self.request(XsType.GET_PERMS, strings(path)))

    async def set_perms(self, path: Text, perms: Sequence[str]) -> None:
        """Replace the permission list; the first entry names the owner."""
        await self.request(XsType.SET_PERMS, permission_strings(path, perms))


class Transaction(Operations):
    """Requests that take effect together, or not at all."""

    def __init__(self, client: Client, ident: int) -> None:
        self._client = client
        self._ident = ident

    async def request(self, message_type: XsType, payload: bytes) -> bytes:
        return await self._client.request(message_type, payload, self._ident)


class Watch:
    """Events of one watch: an async context manager that registers it, and an async iterator of (path, token).

    The first event comes at once.  Events for one path that nobody took yet are one event.
    """

    def __init__(self, client: Client, path: Text, token: Text | None) -> None:
        self._client = client
        self._path = path
        self._token = to_bytes(token) if token is not None else client.new_token()
        self._pending: dict[bytes, None] = {}
        self._waiter: asyncio.Future[None] | None = None
        self._lost = False

    @property
    def key(self) -> tuple[bytes, bytes]:
        """Path as registered, and token."""
        return to_bytes(self._path), self._token

    async def __aenter__(self) -> Watch:
        await self._client.add_watch(self)
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        trace: TracebackType | None) -> None:
        await self._client.remove_watch(self)

    def __aiter__(self) -> Watch:
        return self

    async def __anext__(self) -> tuple[str, str]:
        while not self._pending:
            if self._lost:
                raise HostError("xenstored has closed the connection")
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        path = next(iter(self._pending))
        del self._pending[path]
        return to_str(path), to_str(self._token)

    def deliver(self, path: bytes) -> None:
        """An event has come (called by the client)."""
        self._pending[path] = None
        self._wake()

    def lose(self) -> None:
        """No more events will come (called by the client)."""
        self._lost = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Client(Operations):
    """A connection to xenstored for one event loop."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._pending: dict[int, asyncio.Future[bytes]] = {}
        self._last_id = 0
        self._last_token = 0
        self._watches: dict[tuple[bytes, bytes], Watch] = {}
        channel.attach(self._receive, self._on_lost)

    @classmethod
    async def open(cls, path: str | Path) -> Client:
        """Connect to the socket at ``path``.  HostError when nobody serves it."""
        return cls(await StreamChannel.open(path))

    def close(self) -> None:
        """Disconnect; pending requests and watches get HostError."""
        self._channel.close()

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None,
                        trace: TracebackType | None) -> None:
        self.close()

    async def request(self, message_type: XsType, payload: bytes, tx_id: int = 0) -> bytes:
        self._last_id = (self._last_id + 1) & 0xFFFFFFFF
        req_id = self._last_id
        future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._pending[req_id] = future
        try:
            self._channel.submit(message_type, req_id, tx_id, payload)
            return await future
        finally:
            self._pending.pop(req_id, None)

    # --- transactions and watches --------------------------------------------------------------------------------

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Transaction]:
        """Commit at the end of the block, abort if it raises.  XenError(EAGAIN): it met a conflict, do it all again."""
        ident = int((await self.request(XsType.TRANSACTION_START, b"\0")).rstrip(b"\0"))
        try:
            yield Transaction(self, ident)
        except BaseException:
            # A transaction or connection that is gone already is as good as aborted: the reason we are here is told.
            with suppress(XenError, HostError):
                await self.request(XsType.TRANSACTION_END, b"F\0", ident)
            raise
        await self.request(XsType.TRANSACTION_END, b"T\0", ident)

    async def run_transaction(self, work: Callable[[Transaction], Awaitable[T]]) -> T:
        """Run ``work`` in a transaction, again as long as it meets conflicts; its result."""
        for attempt in range(MAX_ATTEMPTS):
            try:
                async with self.transaction() as transaction:
                    result = await work(transaction)
            except XenError as error:
                if error.errno != errno.EAGAIN or attempt + 1 == MAX_ATTEMPTS:
                    raise
            else:
                return result
        raise XenError(errno.EAGAIN)

    def watch(self, path: Text, token: Text | None = None) -> Watch:
        """``async with client.watch(path) as events: async for path, token in events``."""
        return Watch(self, path, token)

    def new_token(self) -> bytes:
        """A token no other watch of this client has."""
        self._last_token += 1
        return b"pyxen:%d" % self._last_token

    async def add_watch(self, watch: Watch) -> None:
        """Register (``async with watch`` does it)."""
        if watch.key in self._watches:
            raise XenError(errno.EEXIST)
        self._watches[watch.key] = watch
        try:
            await self.request(XsType.WATCH, strings(*watch.key))
        except BaseException:
            self._watches.pop(watch.key, None)
            raise

    async def remove_watch(self, watch: Watch) -> None:
        """Unregister; a connection that is gone has done that already."""
        if self._watches.pop(watch.key, None) is not None:
            try:
                await self.request(XsType.UNWATCH, strings(*watch.key))
            except HostError:
                return

    # --- domains -------------------------------------------------------------------------------------------------

    async def introduce(self, domid: int, gfn: int, port: int) -> None:
        """Let the daemon talk to a guest: the frame of its ring page and its event channel port."""
        await self.request(XsType.INTRODUCE, strings(str(domid), str(gfn), str(port)))

    async def release(self, domid: int) -> None:
        """A domain is gone."""
        await self.request(XsType.RELEASE, strings(str(domid)))

    async def resume(self, domid: int) -> None:
        """A domain that had shut down runs again."""
        await self.request(XsType.RESUME, strings(str(domid)))

    async def set_target(self, domid: int, target: int) -> None:
        """Let ``domid`` act with ``target``'s permissions."""
        await self.request(XsType.SET_TARGET, strings(str(domid), str(target)))

    async def get_domain_path(self, domid: int) -> str:
        """``/local/domain/N``."""
        return split(await self.request(XsType.GET_DOMAIN_PATH, strings(str(domid))))[0]

    async def is_domain_introduced(self, domid: int) -> bool:
        """Whether the daemon talks to ``domid``."""
        return await self.request(XsType.IS_DOMAIN_INTRODUCED, strings(str(domid))) == b"T\0"

    async def control(self, command: str, *arguments: str) -> str:
        """Run a daemon command (``xenstore-control``); its output."""
        return to_str((await self.request(XsType.CONTROL, strings(command, *arguments))).rstrip(b"\0"))

    # --- from the channel ----------------------------------------------------------------------------------------

    def _receive(self, message_type: int, req_id: int, payload: bytes) -> None:
        if message_type == XsType.WATCH_EVENT:
            path, _, rest = payload.partition(b"\0")
            self._route_event(path, rest.rstrip(b"\0"))
            return
        future = self._pending.pop(req_id, None)
        if future is None or future.done():
            return
        if message_type == XsType.ERROR:
            future.set_exception(error_of(payload))
        else:
            future.set_result(payload)

    def _route_event(self, path: bytes, token: bytes) -> None:
        for (watched, own), watch in list(self._watches.items()):
            if own == token and covers(watched, path):
                watch.deliver(path)

    def _on_lost(self) -> None:
        for future in self._pending.values():
            if not future.done():
                future.set_exception(HostError("xenstored has closed the connection"))
        self._pending.clear()
        for watch in self._watches.values():
            watch.lose()
        self._watches.clear()


def covers(watched: bytes, path: bytes) -> bool:
    """Whether a watch on ``watched`` hears of ``path``."""
    return path == watched or watched == b"/" or path.startswith(watched + b"/")
