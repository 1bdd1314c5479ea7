# SPDX-License-Identifier: GPL-2.0-only
"""What becomes of domains that end by themselves."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from pyxen.toolstack.config import parse
from pyxen.toolstack.domains import EventLog, Phase
from pyxen.toolstack.lifecycle import Lifecycle
from tests.build.make_elf import xen_kernel
from tests.toolstack.doubles import Bench

pytestmark = pytest.mark.timeout(30)

POWEROFF, REBOOT, SUSPEND, CRASH, WATCHDOG = range(5)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    (tmp_path / "kernel").write_bytes(xen_kernel())
    return Bench(tmp_path)


@asynccontextmanager
async def running(bench: Bench, minimum_life_s: float = 0.0) -> AsyncIterator[Lifecycle]:
    lifecycle = Lifecycle(bench.operations, minimum_life_s=minimum_life_s)
    lifecycle.start()
    try:
        yield lifecycle
    finally:
        await lifecycle.close()
    assert bench.registry.callback is None


def config(folder: Path, *lines: str) -> Any:
    return parse("\n".join([f'kernel = "{folder}/kernel"', 'name = "one"', "memory = 16", *lines]), "test.cfg")


def end(bench: Bench, domid: int, code: int) -> None:
    bench.privcmd.domain_shutdown(domid, code)
    assert bench.registry.callback is not None
    bench.registry.callback()


async def event(bench: Bench, name: str) -> dict[str, object]:
    """Wait for the first event of that name."""
    seq = 0
    while events := await bench.events.wait(seq, timeout_s=5):
        for found in events:
            if found.event == name:
                return found.to_json()
            seq = found.seq
    raise AssertionError(f"no {name!r} event in time: {bench.events.since(0)}")


def run(main: Callable[[], Awaitable[None]]) -> None:
    async def wrapper() -> None:
        await main()

    asyncio.run(wrapper())


@pytest.mark.parametrize(
    ("code", "reason"), [(POWEROFF, "poweroff"), (CRASH, "crash"), (WATCHDOG, "watchdog"), (77, "unknown-77")]
)
def test_by_default_an_ended_domain_is_destroyed(bench: Bench, tmp_path: Path, code: int, reason: str) -> None:
    before = bench.snapshot()

    async def main() -> None:
        async with running(bench):
            record = await bench.operations.create(config(tmp_path))
            end(bench, 1, code)
            assert record.phase is Phase.ENDED
            said = await event(bench, "shutdown")
            assert (said["reason"], said["action"], said["domid"]) == (reason, "destroy", 1)
            await event(bench, "destroyed")

    run(main)
    assert bench.snapshot() == before


def test_reboot_makes_a_new_domain_of_the_same_config(bench: Bench, tmp_path: Path) -> None:
    async def main() -> None:
        async with running(bench):
            first = await bench.operations.create(config(tmp_path), pv_mode="fast")
            end(bench, 1, REBOOT)
            said = await event(bench, "restarted")
            assert (said["domid"], said["new_domid"], said["name"]) == (1, 2, "one")
            second = bench.table.find("one")
            assert (second.domid, second.uuid, second.pv_mode) == (2, first.uuid, "fast")
            assert first.phase is Phase.GONE
            assert bench.privcmd.domains[2].pauses == 0
            assert list(bench.privcmd.domains) == [2]

    run(main)


def test_a_guest_that_crashes_at_once_is_not_restarted_at_once(bench: Bench, tmp_path: Path) -> None:
    async def main() -> None:
        async with running(bench, minimum_life_s=0.3):
            loop = asyncio.get_running_loop()
            await bench.operations.create(config(tmp_path, 'on_crash = "restart"'))
            began = loop.time()
            end(bench, 1, CRASH)
            await event(bench, "restarted")
            assert loop.time() - began > 0.25
            bench.now += 100  # the second one lives long enough
            began = loop.time()
            end(bench, 2, CRASH)
            while 3 not in bench.privcmd.domains:  # noqa: ASYNC110 (the double has no event for it)
                await asyncio.sleep(0.001)
            assert loop.time() - began < 0.25

    run(main)


def test_preserve_keeps_the_domain_for_inspection(bench: Bench, tmp_path: Path) -> None:
    before = bench.snapshot()

    async def main() -> None:
        async with running(bench):
            record = await bench.operations.create(config(tmp_path, 'on_crash = "preserve"'))
            end(bench, 1, CRASH)
            await event(bench, "preserved")
            assert record.phase is Phase.ENDED
            assert bench.privcmd.domains[1].pages
            end(bench, 1, CRASH)  # told again: nothing new
            assert [e.event for e in bench.events.since(0)].count("shutdown") == 1
            await bench.operations.destroy(record)

    run(main)
    assert bench.snapshot() == before


def test_rename_restart_keeps_both(bench: Bench, tmp_path: Path) -> None:
    async def main() -> None:
        async with running(bench):
            first = await bench.operations.create(config(tmp_path, 'on_reboot = "rename-restart"'))
            uuid = first.uuid
            for _ in range(2):  # twice within a minute: the names must still differ
                end(bench, bench.table.find("one").domid, REBOOT)
                seq = bench.events.seq
                while not any(e.event == "restarted" and e.seq > seq for e in bench.events.since(0)):
                    await bench.events.wait(bench.events.seq, timeout_s=5)
            names = [record.name for record in bench.table]
            assert names[2] == "one"
            assert names[0].startswith("one-") and names[1].startswith("one-") and names[0] != names[1]
            assert bench.table.find("one").uuid == uuid
            assert first.uuid != uuid
            assert bench.privcmd.domains[1].handle == first.uuid.bytes
            assert bench.store.nodes["/local/domain/1/vm"][0].decode() == f"/vm/{first.uuid}"
            assert bench.store.nodes["/local/domain/1/name"][0].decode() == names[0]
            assert bench.store.nodes[f"/vm/{uuid}/name"][0] == b"one"

    run(main)


def test_suspended_domains_are_left_alone(bench: Bench, tmp_path: Path) -> None:
    async def main() -> None:
        async with running(bench):
            await bench.operations.create(config(tmp_path))
            end(bench, 1, SUSPEND)
            assert (await event(bench, "shutdown"))["action"] == "preserve"
            await event(bench, "preserved")
            assert 1 in bench.privcmd.domains

    run(main)


def test_a_restart_that_fails_is_told(bench: Bench, tmp_path: Path) -> None:
    before = bench.snapshot()

    async def main() -> None:
        async with running(bench):
            await bench.operations.create(config(tmp_path))
            (tmp_path / "kernel").unlink()
            end(bench, 1, REBOOT)
            said = await event(bench, "action-failed")
            assert said["action"] == "restart"
            assert "No such file" in str(said["error"])

    run(main)
    assert bench.snapshot() == before


def test_shutdown_asks_through_xenstore_and_only_running_domains(bench: Bench, tmp_path: Path) -> None:
    async def main() -> None:
        async with running(bench):
            record = await bench.operations.create(config(tmp_path, 'on_poweroff = "preserve"'))
            await bench.operations.request_shutdown(record, "reboot")
            assert bench.store.nodes["/local/domain/1/control/shutdown"] == (b"reboot", ("n1",))
            end(bench, 1, POWEROFF)
            with pytest.raises(Exception, match="not running"):
                await bench.operations.request_shutdown(record)

    run(main)


def test_event_log_is_bounded_and_waits() -> None:
    async def main() -> None:
        log = EventLog(limit=3)
        for n in range(10):
            log.add(n % 2, "paused", n=n)  # type: ignore[arg-type]
        assert [e.seq for e in log.since(0)] == [8, 9, 10]
        assert [e.seq for e in log.since(0, domid=1)] == [8, 10]
        assert log.since(10) == []
        waiter = asyncio.ensure_future(log.wait(10, domid=1))
        await asyncio.sleep(0)
        log.add(0, "paused")  # type: ignore[arg-type]
        await asyncio.sleep(0.01)
        assert not waiter.done()
        log.add(1, "unpaused")  # type: ignore[arg-type]
        assert [e.seq for e in await waiter] == [12]
        assert await log.wait(12, timeout_s=0.01) == []

    run(main)
