# SPDX-License-Identifier: GPL-2.0-only
"""The API over its real socket: answers, refusals, long polls, and clients that hang up."""

from __future__ import annotations

import asyncio
import json
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from pyxen.api import requests, server
from pyxen.api.routes import Routes
from pyxen.api.server import ApiServer, listen_unix
from pyxen.host import Host
from tests.host import leftovers
from tests.host.small_guests import config, write_kernel

pytestmark = [pytest.mark.timeout(60), pytest.mark.engine]


class Api:
    """A client of one host."""

    def __init__(self, host: Host, path: Path) -> None:
        self.host = host
        self.path = path

    async def raw(self, request: bytes, *, then_leave: bool = False) -> bytes:
        reader, writer = await asyncio.open_unix_connection(self.path)
        try:
            writer.write(request)
            if then_leave:
                writer.write_eof()
            return await asyncio.wait_for(reader.read(), 20)
        finally:
            writer.close()

    async def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        data = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
        answer = await self.raw(head.encode() + data)
        headers, _, content = answer.partition(b"\r\n\r\n")
        kind = headers.lower()
        return int(headers.split()[1]), json.loads(content) if b"application/json" in kind else content.decode()

    async def create(self, text: str, **more: Any) -> Any:
        status, answer = await self.call("POST", "/domains", {"config_text": text, **more})
        assert status == 201, answer
        return answer


@asynccontextmanager
async def serving() -> AsyncIterator[Api]:
    async with Host("64M", minimum_life_s=0) as host:
        path = host.rundir / "api.sock"
        api_server = ApiServer(Routes(host).application(), path)
        await api_server.start()
        try:
            yield Api(host, path)
        finally:
            await api_server.close()
        assert not path.exists()


async def settles(host: Host, before: dict[str, Any]) -> None:
    """The host is as before within a moment: a connection's last callbacks may be still to come."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + 5
    while leftovers.of_host(host) != before and loop.time() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    assert leftovers.of_host(host) == before


def run(main: Callable[[Api], Awaitable[None]]) -> None:
    async def wrapper() -> None:
        async with serving() as api:
            await main(api)

    asyncio.run(wrapper())


ROW = {"domid", "name", "uuid", "memory_kb", "max_memory_kb", "vcpus", "online_vcpus", "cpu_time_ns", "state", "paused"}
ROW |= {"shutdown_reason", "ssid", "cpupool", "type", "created", "counters"}


def test_a_domain_s_life(tmp_path: Path) -> None:
    kernel = write_kernel(tmp_path / "k", then="block")

    async def main(api: Api) -> None:
        status, version = await api.call("GET", "/version")
        assert (status, version["xen"], version["pid"]) == (200, "4.6.0", os.getpid())
        created = await api.create(config(kernel, "one", "whatever = 1"), paused=True, pv_mode="fast")
        assert (created["domid"], created["name"]) == (1, "one")
        assert "whatever" in created["warnings"][0]
        assert stat.S_ISSOCK(os.stat(created["console"]).st_mode)
        _, rows = await api.call("GET", "/domains")
        assert [(row["domid"], row["name"], row["state"]) for row in rows] == [
            (0, "Domain-0", "r-----"),
            (1, "one", "--p---"),
        ]
        assert set(rows[1]) >= ROW
        assert (rows[1]["memory_kb"], rows[1]["paused"], rows[1]["pv_mode"]) == (8192, True, "fast")
        for which in ("1", "one"):
            _, row = await api.call("GET", f"/domains/{which}")
            assert row["config"]["c_info"]["name"] == "one"
        assert (await api.call("POST", "/domains/one/unpause", {}))[0] == 200
        _, vcpus = await api.call("GET", "/domains/1/vcpus")
        assert [(vcpu["vcpu"], vcpu["hard_affinity"]) for vcpu in vcpus] == [(0, None)]
        assert (await api.call("POST", "/domains/1/sched-credit", {"weight": 512, "cap": 50}))[1]["weight"] == 512
        assert (await api.call("GET", "/domains/1/sched-credit"))[1] == {"weight": 512, "cap": 50}
        assert (await api.call("GET", "/sched-credit"))[1]["tslice_ms"] == 30
        assert (await api.call("POST", "/domains/1/rename", {"name": "two"}))[0] == 200
        assert [row["name"] for row in (await api.call("GET", "/uptime"))[1]] == ["Domain-0", "two"]
        assert (await api.call("POST", "/domains/two/shutdown", {"force": False}))[0] == 200
        assert await api.host.domain("two").xenstore.read("control/shutdown") == "poweroff"
        assert (await api.call("POST", "/domains/two/crash", {}))[0] == 200
        _, events = await api.call("GET", "/domains/1/events?since=0")
        assert [event["event"] for event in events][:2] == ["created", "unpaused"]
        async with asyncio.timeout(10):
            while (await api.call("GET", "/domains/1"))[0] != 404:  # noqa: ASYNC110 (on_crash destroys it)
                await asyncio.sleep(0.01)

    run(main)


def test_events_of_a_domain_that_is_gone_are_still_told(tmp_path: Path) -> None:
    kernel = write_kernel(tmp_path / "k")

    async def main(api: Api) -> None:
        domain = await api.create(config(kernel))
        seen: list[str] = []
        since = 0
        while "destroyed" not in seen:  # long polls
            status, events = await api.call("GET", f"/domains/{domain['domid']}/events?since={since}&timeout=5")
            assert status == 200
            assert events
            since = events[-1]["seq"]
            seen += [event["event"] for event in events]
        assert seen == ["created", "shutdown", "destroyed"]
        assert (await api.call("GET", f"/domains/1/events?since={since}&timeout=0.01")) == (200, [])
        status, answer = await api.call("GET", "/domains/small/events")
        assert (status, answer["error"]) == (404, "small is an invalid domain identifier (rc=-6)")

    run(main)


def test_a_domain_in_its_last_moment_is_not_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hypervisor has forgotten it and the toolstack not yet: whoever asks hears that it is gone, not an errno."""
    kernel = write_kernel(tmp_path / "k", then="block")
    answers: list[tuple[int, Any]] = []

    async def main(api: Api) -> None:
        await api.create(config(kernel))
        destroy = api.host.privcmd.domain_destroy

        async def destroy_and_ask(domid: int) -> None:
            await destroy(domid)
            for question in ("/domains/small", "/domains/1/vcpus", "/domains/1/sched-credit"):
                answers.append(await api.call("GET", question))

        monkeypatch.setattr(api.host.privcmd, "domain_destroy", destroy_and_ask)
        assert (await api.call("DELETE", "/domains/small"))[0] == 200

    run(main)
    assert [status for status, _ in answers] == [404] * 3
    assert all("is an invalid domain identifier (rc=-6)" in answer["error"] for _, answer in answers)


def test_host_wide_calls() -> None:
    async def main(api: Api) -> None:
        assert list((await api.call("GET", "/info"))[1])[:3] == ["host", "release", "version"]
        assert "numa_info" in (await api.call("GET", "/info?numa=1"))[1]
        assert (await api.call("POST", "/debug-keys", {"keys": "q"}))[0] == 200
        _, text = await api.call("GET", "/dmesg?clear=1")
        assert "(XEN) 'q' pressed" in text
        assert (await api.call("GET", "/dmesg"))[1] == ""
        assert (await api.call("POST", "/host/stop"))[0] == 200
        await asyncio.wait_for(api.host.stop_requested.wait(), 5)

    run(main)


BAD: list[tuple[str, str, Any, int, str]] = [
    ("GET", "/nothing", None, 404, "Not Found"),
    ("PUT", "/domains", None, 405, "Method Not Allowed"),
    ("GET", "/domains/none", None, 404, "none is an invalid domain identifier"),
    ("GET", "/domains/77777", None, 404, "invalid domain identifier"),
    ("GET", "/domains/%00", None, 404, "invalid domain identifier"),
    ("DELETE", "/domains/0", None, 409, "Domain-0 is the host itself"),
    ("POST", "/domains/Domain-0/pause", {}, 409, "Domain-0"),
    ("POST", "/domains/1/explode", {}, 404, "no such action"),
    ("POST", "/domains", b"{", 400, "not JSON"),
    ("POST", "/domains", b"[" * 100_000, 400, "not JSON"),
    ("POST", "/domains", [1], 400, "not a JSON object"),
    ("POST", "/domains", {}, 400, "config_text is missing"),
    ("POST", "/domains", {"config_text": 7}, 400, "a text is expected"),
    ("POST", "/domains", {"config_text": "a=1", "paused": "yes"}, 400, "true or false"),
    ("POST", "/domains", {"config_text": "a=1", "extra": "x"}, 400, "list"),
    ("POST", "/domains", {"config_text": "a=1", "nonsense": 1}, 400, "unknown member"),
    ("POST", "/domains", {"config_text": "a=1" * 400_000}, 413, "longer than"),
    ("POST", "/domains", {"config_text": "name = 'x'\nkernel = 'y'", "pv_mode": "?"}, 400, "pv_mode"),
    ("POST", "/domains", {"config_text": "name = 'x'\nkernel = '/nothing'"}, 400, "No such file"),
    ("POST", "/domains", {"config_text": "name = 'x'\nkernel = '/nothing\\0'"}, 400, ""),
    ("POST", "/domains", {"config_text": "???"}, 400, ""),
    ("POST", "/debug-keys", {"keys": "q" * 100}, 413, "longer"),
    ("GET", "/domains/0/events?since=-1", None, 400, "since="),
    ("GET", "/domains/0/events?since=nan", None, 400, "since="),
    ("GET", "/domains/0/events?since=abc", None, 400, "since="),
    ("POST", "/domains/0/sched-credit", {"weight": 0}, 409, "Domain-0 is not scheduled"),
    ("POST", "/domains/0/sched-credit", {"weight": True}, 400, "weight"),
    ("POST", "/domains/0/sched-credit", {"cap": 1 << 40}, 400, "cap"),
    ("POST", "/sched-credit", {"tslice_ms": 0}, 409, "Time slice out of range, valid range is from 1 to 1000"),
    ("POST", "/sched-credit", {"ratelimit_us": 99}, 409, "Ratelimit out of range, valid range is from 100 to 500000"),
    ("POST", "/sched-credit", {"tslice_ms": 1, "ratelimit_us": 5000}, 409, "Ratelimit cannot be greater"),
    ("POST", "/sched-credit", {"migration_delay_us": 5}, 400, "migration delay"),
    ("POST", "/sched-credit", {"pool": "none"}, 404, "unknown cpupool 'none'"),
    ("GET", "/sched-credit?pool=9", None, 404, "unknown cpupool '9'"),
    ("POST", "/cpupools", {}, 400, "name is missing"),
    ("POST", "/cpupools", {"name": ""}, 400, "invalid cpupool name"),
    ("POST", "/cpupools", {"name": "7"}, 400, "invalid cpupool name"),
    ("POST", "/cpupools", {"name": "a/b"}, 400, "invalid cpupool name"),
    ("POST", "/cpupools", {"name": "a\nb"}, 400, "invalid cpupool name"),
    ("POST", "/cpupools", {"name": "\ud800"}, 400, "invalid cpupool name"),
    ("POST", "/cpupools", {"name": "x" * 300}, 400, "invalid cpupool name"),
    ("POST", "/cpupools", {"name": "Pool-0"}, 400, "already exists"),
    ("POST", "/cpupools", {"name": "p", "sched": "best"}, 400, "Unknown scheduler"),
    ("POST", "/cpupools", {"name": "p", "sched": "credit2"}, 409, "scheduler credit2 is not in this hypervisor"),
    ("POST", "/cpupools", {"name": "p", "cpus": ["1"]}, 400, "cpus: a list"),
    ("POST", "/cpupools", {"name": "p", "cpus": [True]}, 400, "cpus: a list"),
    ("POST", "/cpupools", {"name": "p", "cpus": [-1]}, 400, "cpus: a list"),
    ("POST", "/cpupools", {"name": "p", "cpus": [0] * 10_000}, 400, "cpus: a list"),
    ("POST", "/cpupools", {"name": "p", "cpus": [0]}, 409, "cpu 0 cannot be moved to the cpupool: it is in use"),
    ("POST", "/cpupools", {"name": "p", "cpus": [99]}, 409, "there is no such CPU"),
    ("DELETE", "/cpupools/0", None, 409, "the first cpupool cannot be destroyed"),
    ("DELETE", "/cpupools/none", None, 404, "unknown cpupool 'none'"),
    ("POST", "/cpupools/0/rename", {"name": "1"}, 400, "invalid cpupool name"),
    ("POST", "/cpupools/4294967295/cpu-add", {"cpus": [0]}, 404, "unknown cpupool"),
    ("POST", "/cpupools/0/cpu-add", {"cpus": [0], "more": 1}, 400, "unknown member"),
    ("POST", "/domains/0/vcpus", {"count": 1}, 409, "Domain-0"),
    ("POST", "/domains/0/affinity", {"hard": "0"}, 409, "Domain-0"),
    ("POST", "/domains/none/vcpus", {"count": 1}, 404, "none is an invalid domain identifier"),
]


def test_bad_requests_get_one_line_and_change_nothing() -> None:
    async def main(api: Api) -> None:
        before = leftovers.of_host(api.host)
        for method, path, body, status, words in BAD:
            got, answer = await api.call(method, path, body)
            assert got == status, (method, path, answer)
            assert words in answer["error"], (method, path, answer)
            assert "\n" not in answer["error"]
            assert answer["exit"] == 1
            assert "hint" in answer
        await settles(api.host, before)

    run(main)


def test_what_is_no_http_does_not_disturb(caplog: pytest.LogCaptureFixture) -> None:
    async def main(api: Api) -> None:
        for noise in (
            b"\0" * 1000,
            b"GET / HTTP/9.9\r\n\r\n",
            b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n",
            os.urandom(500) + b"\n\n",
        ):
            answer = await api.raw(noise, then_leave=True)
            assert answer == b"" or answer.startswith(b"HTTP/1.1 4")
        head = b"POST /domains HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: 99999999\r\n\r\n"
        answer = await api.raw(head + b"{" + b" " * (requests.MAX_BODY_BYTES + 100_000))
        assert b" 413 " in answer
        assert (await api.call("GET", "/version"))[0] == 200

    run(main)


def test_a_bug_of_ours_is_one_line_and_a_traceback_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    async def main(api: Api) -> None:
        def broken() -> None:
            raise ZeroDivisionError("first line\nsecond line")

        api.host.uptime = broken  # type: ignore[method-assign, assignment]
        status, answer = await api.call("GET", "/uptime")
        assert status == 500
        assert answer["error"] == "internal error in the host: ZeroDivisionError: first line second line"
        assert "Traceback" not in json.dumps(answer)

    run(main)
    assert "ZeroDivisionError" in caplog.text
    assert "Traceback" in caplog.text


def test_hanging_up_cancels_a_create(tmp_path: Path) -> None:
    kernel = write_kernel(tmp_path / "k", then="block")

    async def main(api: Api) -> None:
        before = leftovers.of_host(api.host)
        reached = asyncio.Event()
        ordinary = api.host.operations.services.build

        async def slow(*args: Any) -> Any:
            await ordinary(*args)
            reached.set()
            await asyncio.sleep(60)

        api.host.operations.services.build = slow  # type: ignore[assignment]
        body = json.dumps({"config_text": config(kernel)}).encode()
        _, writer = await asyncio.open_unix_connection(api.path)
        writer.write(b"POST /domains HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
        await asyncio.wait_for(reached.wait(), 10)
        assert len(api.host.table) == 1
        writer.close()
        await writer.wait_closed()
        await settles(api.host, before)

    run(main)


def test_other_users_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main(api: Api) -> None:
        assert stat.S_IMODE(os.stat(api.path).st_mode) == 0o600
        monkeypatch.setattr(server, "peer_uid", lambda sock: os.geteuid() + 1)
        with pytest.raises((ConnectionError, IndexError)):
            await api.call("GET", "/version")
        monkeypatch.undo()
        assert (await api.call("GET", "/version"))[0] == 200

    run(main)


def test_peer_uid_is_the_kernel_s_word(tmp_path: Path) -> None:
    import socket

    listener = listen_unix(tmp_path / "s")
    with listener, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "s"))
        accepted, _ = listener.accept()
        with accepted:
            assert server.peer_uid(accepted) == os.geteuid()


def test_stopping_answers_long_polls_at_once(tmp_path: Path) -> None:
    kernel = write_kernel(tmp_path / "k", then="block")

    async def main(api: Api) -> None:
        domain = await api.create(config(kernel))
        waiting = asyncio.ensure_future(api.call("GET", f"/domains/{domain['domid']}/events?since=100"))
        await asyncio.sleep(0.05)
        assert (await api.call("POST", "/host/stop"))[0] == 200
        assert await asyncio.wait_for(waiting, 5) == (200, [])

    run(main)
