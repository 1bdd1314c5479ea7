# SPDX-License-Identifier: GPL-2.0-only
"""Our clients, async over the socket and in the process, and blocking."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from pyxen.abi.io.xs_wire import XsType
from pyxen.errors import HostError, XenError
from pyxen.xenstore.client import Client, SyncClient, SyncTransaction, Transaction
from pyxen.xenstore.daemon import XenstoreDaemon


@pytest.fixture(params=["socket", "in-process"])
def with_client(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., None]:
    """Runs a coroutine function with (daemon, client)."""

    def run(work: Callable[[XenstoreDaemon, Client], Awaitable[None]]) -> None:
        async def main() -> None:
            daemon = XenstoreDaemon(None)
            path = tmp_path / "run" / "socket"
            await daemon.start(path)
            client = await Client.open(path) if request.param == "socket" else daemon.connect()
            async with client:
                await work(daemon, client)
            await daemon.stop()
            assert daemon.socket_clients() == 0
            assert not path.exists()

        asyncio.run(asyncio.wait_for(main(), 20))

    return run


def test_nodes(with_client: Callable[..., None]) -> None:
    async def work(daemon: XenstoreDaemon, client: Client) -> None:
        await client.write("/a/b", "värde")
        await client.write("/a/raw", b"\xff\0\xfe")
        assert await client.read("/a/b") == "värde"
        assert await client.read_bytes("/a/raw") == b"\xff\0\xfe"
        await client.write("/a/copy", await client.read("/a/raw"))
        assert await client.read_bytes("/a/copy") == b"\xff\0\xfe"
        await client.mkdir("/a/dir")
        assert await client.ls("/a") == ["b", "raw", "copy", "dir"]
        assert await client.get("/a/none") is None
        assert await client.get("/a/none", "dflt") == "dflt"
        assert (await client.exists("/a/dir"), await client.exists("/a/none")) == (True, False)
        await client.set_perms("/a/b", ["n0", "r5", "b6"])
        assert await client.get_perms("/a/b") == ["n0", "r5", "b6"]
        await client.rm("/a")
        with pytest.raises(XenError) as error:
            await client.read("/a/b")
        assert error.value.errno == errno.ENOENT
        with pytest.raises(XenError) as error:
            await client.write("/a\0b", "x")
        assert error.value.errno == errno.EINVAL
        with pytest.raises(XenError) as error:
            await client.write("/a", "x" * 5000)
        assert error.value.errno == errno.E2BIG
        assert await client.get_domain_path(7) == "/local/domain/7"
        assert await client.is_domain_introduced(7) is False
        assert await client.control("check") == "OK"

    with_client(work)


def test_a_long_listing_comes_whole_though_it_changes(with_client: Callable[..., None]) -> None:
    async def work(daemon: XenstoreDaemon, client: Client) -> None:
        names = [f"name-{i:030d}" for i in range(500)]
        for name in names:
            await client.write(f"/long/{name}", "")
        assert await client.ls("/long") == names
        original = client.request
        parts = 0

        async def disturb(message_type: XsType, payload: bytes, tx_id: int = 0) -> bytes:
            nonlocal parts
            parts += 1
            if parts == 4:
                await original(XsType.RM, b"/long/" + names[0].encode() + b"\0")
            return await original(message_type, payload, tx_id)

        client.request = disturb  # type: ignore[method-assign]
        assert await client.ls("/long") == names[1:]

    with_client(work)


def test_transactions(with_client: Callable[..., None]) -> None:
    async def work(daemon: XenstoreDaemon, client: Client) -> None:
        async with client.transaction() as t:
            await t.write("/x", "1")
            assert await client.exists("/x") is False
        assert await client.read("/x") == "1"
        with pytest.raises(ZeroDivisionError):
            async with client.transaction() as t:
                await t.write("/x", "2")
                raise ZeroDivisionError
        assert await client.read("/x") == "1"
        with pytest.raises(XenError) as error:
            async with client.transaction() as t:
                await t.write("/x", "3")
                await client.write("/x", "other")
        assert error.value.errno == errno.EAGAIN

        attempts = 0

        async def increment(t: Transaction) -> int:
            nonlocal attempts
            attempts += 1
            value = len(await t.read("/x"))
            if attempts < 3:
                await client.write("/x", "y" * attempts)
            await t.write("/x", "z" * (value + 1))
            return value

        assert await client.run_transaction(increment) == 2
        assert (attempts, await client.read("/x")) == (3, "zzz")

    with_client(work)


def test_watches(with_client: Callable[..., None]) -> None:
    async def work(daemon: XenstoreDaemon, client: Client) -> None:
        async with client.watch("/w") as events, client.watch("/w/deep", "mine") as deep:
            assert await anext(events) == ("/w", "pyxen:1")
            assert await anext(deep) == ("/w/deep", "mine")
            await client.write("/w/deep/er", "1")
            await client.write("/w/deep/er", "2")
            await client.write("/w/other", "2")
            await asyncio.sleep(0)
            assert await anext(events) == ("/w/deep/er", "pyxen:1")
            assert await anext(events) == ("/w/other", "pyxen:1")
            assert await anext(deep) == ("/w/deep/er", "mine")

            async def later() -> None:
                await asyncio.sleep(0.01)
                await client.rm("/w")

            task = asyncio.create_task(later())
            found = []
            async for path, token in deep:
                found.append((path, token))
                break
            assert found == [("/w/deep", "mine")]
            await task
        assert daemon.service.watches.count() == 0
        with pytest.raises(XenError) as error:
            async with client.watch("/w", "t"), client.watch("/w", "t"):
                pass
        assert error.value.errno == errno.EEXIST

    with_client(work)


def test_a_cancelled_wait_loses_no_event(with_client: Callable[..., None]) -> None:
    async def work(daemon: XenstoreDaemon, client: Client) -> None:
        async with client.watch("/w") as events:
            await anext(events)
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(anext(events), 0.01)
            await client.write("/w", "x")
            assert (await asyncio.wait_for(anext(events), 1))[0] == "/w"

    with_client(work)


def test_a_daemon_that_stops_is_a_host_error(with_client: Callable[..., None]) -> None:
    async def work(daemon: XenstoreDaemon, client: Client) -> None:
        async with client.watch("/w") as events:
            await anext(events)
            waiting = asyncio.ensure_future(anext(events))
            await asyncio.sleep(0)
            await daemon.stop()
            with pytest.raises(HostError):
                await waiting
            with pytest.raises(HostError):
                await client.read("/tool")

    with_client(work)


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="no xenstored"):
        asyncio.run(Client.open(tmp_path / "none"))
    with pytest.raises(HostError, match="no xenstored"):
        SyncClient(tmp_path / "none")


def test_blocking_client(xenstored_socket: Path) -> None:
    with SyncClient(xenstored_socket, timeout_s=5) as client, SyncClient(xenstored_socket) as other:
        client.write("/a/b", "värde")
        assert (client.read("/a/b"), client.read_bytes("/a/b")) == ("värde", "värde".encode())
        assert (client.get("/none"), client.exists("/a"), client.exists("/none")) == (None, True, False)
        client.mkdir("/a/dir")
        assert client.ls("/a") == ["b", "dir"]
        client.set_perms("/a/b", ["n0", "r5"])
        assert client.get_perms("/a/b") == ["n0", "r5"]
        client.watch("/a", "tok")
        assert client.next_event() == ("/a", "tok")
        other.write("/a/b", "2")
        client.write("/a/c", "3")
        assert [client.next_event(), client.next_event()] == [("/a/b", "tok"), ("/a/c", "tok")]
        client.unwatch("/a", "tok")
        client.rm("/a/c")
        for i in range(300):
            client.write(f"/long/{i:040d}", "")
        assert len(client.ls("/long")) == 300
        attempts = 0

        def work(t: SyncTransaction) -> str:
            nonlocal attempts
            attempts += 1
            value = t.read("/a/b")
            if attempts == 1:
                other.write("/a/b", "raced")
            t.write("/a/b", value + "!")
            return value

        assert client.run_transaction(work) == "raced"
        assert client.read("/a/b") == "raced!"
        with pytest.raises(ZeroDivisionError), client.transaction() as t:
            t.write("/a/b", "no")
            raise ZeroDivisionError
        assert client.read("/a/b") == "raced!"


def test_blocking_client_times_out(xenstored_socket: Path) -> None:
    with SyncClient(xenstored_socket, timeout_s=0.05) as client, pytest.raises(TimeoutError):
        client.next_event()
