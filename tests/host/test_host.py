# SPDX-License-Identifier: GPL-2.0-only
"""A whole host with small guests on the real engine."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import threading
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

import pyxen
from pyxen.errors import ConfigError, HostError, XenError
from pyxen.host import Host, parse_size
from pyxen.machine.cpu.base import RIP
from pyxen.toolstack.domains import Phase, UnknownDomain
from tests.host import leftovers
from tests.host.small_guests import CRASH, ENTRY, POWEROFF, REBOOT, config, write_kernel
from tests.toolstack.test_operations import CancelAt

pytestmark = [pytest.mark.timeout(60), pytest.mark.engine]


def run(main: Callable[[Host], Awaitable[Any]], **options: Any) -> Any:
    async def wrapper() -> Any:
        async with Host("64M", minimum_life_s=0, **options) as host:
            return await main(host)

    return asyncio.run(wrapper())


@pytest.mark.parametrize("pv_mode", ["exact", "fast"])
def test_a_guest_prints_and_powers_off(tmp_path: Path, pv_mode: str) -> None:
    kernel = write_kernel(tmp_path / "k", b"hello from below\n")

    async def main(host: Host) -> None:
        before = leftovers.of_host(host)
        domain = await host.create(config(kernel), pv_mode=pv_mode)
        assert (domain.domid, domain.name) == (1, "small")
        console = domain.console
        assert await console.read_to_end() == b"hello from below\n"
        assert await domain.wait() == "poweroff"
        await domain.wait_gone()
        assert (host.rundir / "log" / "guest-small.log").read_bytes() == b"hello from below\n"
        assert leftovers.of_host(host) == before
        events = [(e.event, e.detail.get("reason")) for e in host.events.since(0, 1)]
        assert events == [("created", None), ("shutdown", "poweroff"), ("destroyed", None)]

    run(main, pv_mode="exact")


def test_starting_and_closing_leaves_nothing(tmp_path: Path) -> None:
    async def main() -> Path:
        async with pyxen.Host("64M") as host:
            await host.create(config(write_kernel(tmp_path / "k", then="spin")))
            await host.create(config(write_kernel(tmp_path / "k", then="block"), "two"))
            return host.rundir

    asyncio.run(main())  # what is made once for the whole process is made here
    gc.collect()
    before = leftovers.of_process()
    rundir = asyncio.run(main())
    gc.collect()
    assert leftovers.of_process() == before
    assert not [t for t in threading.enumerate() if t.name.startswith(leftovers.WORKERS)]
    assert not rundir.exists()


def test_a_start_that_fails_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "xenstored").mkdir(mode=0o777)
    (tmp_path / "xenstored").chmod(0o777)
    gc.collect()
    before = leftovers.of_process()

    async def main() -> None:
        with pytest.raises(HostError, match="not a private directory"):
            await Host("64M", rundir=tmp_path).start()

    asyncio.run(main())
    gc.collect()
    assert leftovers.of_process() == before


def test_run_directories_that_others_could_enter_are_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o755)
    (tmp_path / "link").symlink_to(tmp_path)
    (tmp_path / "file").write_text("")

    async def main() -> None:
        for name in ("open", "link", "file", "not/there"):
            with pytest.raises(HostError, match="run directory"):
                await Host("64M", rundir=tmp_path / name).start()
        async with Host("64M", rundir=tmp_path / "new") as host:
            assert host.rundir.stat().st_mode & 0o777 == 0o700
        assert (tmp_path / "new").exists()  # the caller's, not ours to remove

    asyncio.run(main())


def test_create_cancelled_at_each_await_leaves_nothing_in_the_host(tmp_path: Path) -> None:
    kernel = write_kernel(tmp_path / "k", then="block")

    async def main(host: Host) -> None:
        first = await host.create(config(kernel, "first"))  # folders and log files that stay
        await first.destroy()
        before = leftovers.of_host(host)
        k = 1
        while True:
            driver = CancelAt(host.create(config(kernel), paused=False), k)
            domain = None
            with contextlib.suppress(asyncio.CancelledError):
                domain = await asyncio.ensure_future(_await(driver))
            if domain is not None:
                break
            assert leftovers.of_host(host) == before, f"left behind by a cancel at await {k}"
            k += 1
        assert k > 4
        await domain.destroy()
        assert leftovers.of_host(host) == before

    run(main)


async def _await(work: Awaitable[Any]) -> Any:
    return await work


def test_destroy_cancelled_at_each_await_can_be_run_again(tmp_path: Path) -> None:
    kernel = write_kernel(tmp_path / "k", then="block")

    async def main(host: Host) -> None:
        first = await host.create(config(kernel, "first"))
        await first.destroy()
        before = leftovers.of_host(host)
        k = 1
        while True:
            domain = await host.create(config(kernel))
            await domain.console.expect("hello", 10)
            done = False
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.ensure_future(_await(CancelAt(domain.destroy(), k)))
                done = True
            if not done:
                assert domain.phase is Phase.DYING
                await domain.destroy()
            assert leftovers.of_host(host) == before, k
            if done:
                break
            k += 1
        assert k > 1

    run(main)


def test_reboot_makes_a_successor_and_the_log_goes_on(tmp_path: Path) -> None:
    kernel = write_kernel(tmp_path / "k", b"round\n", REBOOT)

    async def main(host: Host) -> None:
        first = await host.create(config(kernel))
        assert await first.wait() == "reboot"
        write_kernel(kernel, b"over\n", POWEROFF)
        second = await asyncio.wait_for(first.successor(), 20)
        assert second.domid > first.domid
        assert first.phase is Phase.GONE
        last = second
        with contextlib.suppress(HostError):
            while True:  # how often it got round before the kernel changed is not ours to say
                last = await asyncio.wait_for(last.successor(), 20)
        await last.wait_gone()
        log = (host.rundir / "log" / "guest-small.log").read_bytes()
        assert log.startswith(b"round\n")
        assert log.endswith(b"round\nover\n")

    run(main)


@pytest.mark.parametrize("then", ["ud2", CRASH])
def test_a_crash_is_told_and_hurts_nobody_else(tmp_path: Path, then: str | int) -> None:
    victim = write_kernel(tmp_path / "v", b"I am fine\n", "block")
    kernel = write_kernel(tmp_path / "k", b"oops\n", then)

    async def main(host: Host) -> None:
        bystander = await host.create(config(victim, "bystander"))
        domain = await host.create(config(kernel, "one", 'on_crash = "preserve"'))
        assert await domain.wait() == "crash"
        registers = await domain.registers()  # also: its vCPU is off the engine when this returns
        row = host.row("one")
        assert (row["shutdown_reason"], row["state"]) == ("crash", "---sc-")
        assert ENTRY <= registers.gpr[RIP] < ENTRY + 0x1000
        assert (await domain.read_memory(ENTRY, 3)).hex() == "4889f3"
        with pytest.raises(XenError):
            await domain.read_memory(0x1000, 8)
        if then == "ud2":
            assert "d2" in host.dmesg()
            assert row["crash_reason"]
        assert await bystander.console.expect("fine", 10)
        assert bystander.phase is Phase.LIVE
        await domain.destroy()
        with pytest.raises(UnknownDomain):
            host.domain("one")

    run(main)


def test_pause_counts_stop_the_guest(tmp_path: Path) -> None:
    kernel = write_kernel(tmp_path / "k", then="spin")

    async def main(host: Host) -> None:
        domain = await host.create(config(kernel), paused=True)
        assert host.row(domain.domid)["state"] == "--p---"
        await asyncio.sleep(0.05)
        assert await domain.console.read_available() == b""
        await domain.unpause()
        await domain.console.expect("hello", 10)
        await domain.pause()
        await domain.pause()
        await domain.unpause()
        used = host.row(domain.domid)["cpu_time_ns"]
        await asyncio.sleep(0.05)
        assert host.row(domain.domid)["cpu_time_ns"] == used
        await domain.unpause()
        await asyncio.sleep(0.05)
        assert host.row(domain.domid)["cpu_time_ns"] != used
        with pytest.raises(XenError):
            await domain.unpause()

    run(main)


def test_two_readers_and_the_socket_see_all_of_it(tmp_path: Path) -> None:
    kernel = write_kernel(tmp_path / "k", b"for everyone\n", "block")

    async def main(host: Host) -> None:
        domain = await host.create(config(kernel))
        await domain.console.expect("everyone", 10)
        reader, writer = await asyncio.open_unix_connection(domain.console_path)
        assert await asyncio.wait_for(reader.readline(), 10) == b"for everyone\n"  # the history
        assert os.stat(domain.console_path).st_mode & 0o777 == 0o600
        writer.write(b"typed")
        await writer.drain()
        await asyncio.sleep(0.1)  # typing that nobody has read yet would reset the connection
        await domain.destroy()
        assert await asyncio.wait_for(reader.read(), 10) == b""
        writer.close()
        assert not domain.console_path.exists()

    run(main)


def test_xenstore_is_at_hand(tmp_path: Path) -> None:
    kernel = write_kernel(tmp_path / "k", then="block")

    async def main(host: Host) -> None:
        domain = await host.create(config(kernel))
        assert await domain.xenstore.read("name") == "small"
        assert await domain.xenstore.read("memory/target") == "8192"
        assert await domain.xenstore.client.read("/local/domain/0/name") == "Domain-0"
        await domain.shutdown()
        assert await domain.xenstore.read("control/shutdown") == "poweroff"
        await domain.console.expect("hello", 10)
        ring = await domain.read_frame(int(await domain.xenstore.read("console/ring-ref")))
        assert ring[1024:1030] == b"hello\n"
        await domain.rename("other")
        assert await domain.xenstore.read("name") == "other"
        assert domain.counters["hypercalls"] >= 0
        await domain.destroy()
        assert await domain.xenstore.get("name") is None
        with pytest.raises(HostError):
            _ = host._handle(domain._record).console

    run(main)


def test_many_cycles_return_every_frame_and_descriptor(tmp_path: Path) -> None:
    kernel = write_kernel(tmp_path / "k")

    async def main(host: Host) -> None:
        before: Any = None
        for cycle in range(100):
            domain = await host.create(config(kernel))
            await domain.console.read_to_end()
            await domain.wait_gone()
            if cycle == 0:
                before = leftovers.of_host(host)
        assert leftovers.of_host(host) == before
        assert domain.domid == 100  # ids are not used again at once

    run(main)


def test_not_enough_memory_and_what_fits(tmp_path: Path) -> None:
    kernel = write_kernel(tmp_path / "k", then="block")

    async def main(host: Host) -> None:
        before = leftovers.of_host(host)
        with pytest.raises(HostError, match=r"(\d+) KiB are missing"):
            await host.create(config(kernel, "one", "memory = 1024"))
        assert leftovers.of_host(host) == before
        free = host.privcmd.physinfo().free_kb
        overhead = host.privcmd.domain_overhead_kb(8192, 1)
        fits = (free - overhead) // 1024
        domain = await host.create(config(kernel, "one", f"memory = {fits}"))
        await domain.console.expect("hello", 10)

    run(main)


def test_destroying_leaves_the_event_loop_free(tmp_path: Path) -> None:
    kernel = write_kernel(tmp_path / "k", then="spin")

    async def main(host: Host) -> None:
        loop = asyncio.get_running_loop()
        longest = 0.0

        async def beat() -> None:
            nonlocal longest
            last = loop.time()
            while True:
                await asyncio.sleep(0)
                longest, last = max(longest, loop.time() - last), loop.time()

        domain = await host.create(config(kernel, "one", "memory = 48"))
        await domain.console.expect("hello", 10)
        heart = asyncio.ensure_future(beat())
        await domain.destroy()
        heart.cancel()
        assert longest < 0.1  # a few ms on a quiet machine

    run(main)


@pytest.mark.parametrize(
    "options",
    [
        {"memory": "lots"},
        {"memory": "1M"},
        {"memory": "9999T"},
        {"cpus": 0},
        {"cpus": 2, "topology": "1:1:4:1"},
        {"topology": "nodes=0"},
        {"pv_mode": "quick"},
        {"engine": "bochs"},
    ],
)
def test_machines_that_cannot_be_made(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Host(**options)


def test_sizes() -> None:
    assert [parse_size(s) for s in ("2G", "512M", "512MiB", "4096", 77, "1k")] == [
        2 << 30,
        512 << 20,
        512 << 20,
        4096,
        77,
        1024,
    ]


def test_config_from_a_file_and_relative_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_kernel(tmp_path / "k")
    (tmp_path / "vm.cfg").write_text('name = "x"\nkernel = "k"\nmemory = 8\nmisspelt = 1\n')

    async def main(host: Host) -> None:
        monkeypatch.chdir(tmp_path)
        domain = await host.create("vm.cfg", extra=['name="y"'])
        assert domain.name == "y"
        assert any("misspelt" in warning for warning in domain.warnings)
        await domain.wait_gone()
        with pytest.raises(ConfigError, match="No such file"):
            await host.create(Path("nothere.cfg"))

    run(main)


def test_info_says_what_the_machine_is() -> None:
    async def main(host: Host) -> None:
        info = host.info(numa=True)
        oracle = Path("/work/shared/oracle/state/xl-info.raw")
        if oracle.exists():
            keys = [line.partition(":")[0].strip() for line in oracle.read_text().splitlines()]
            ours = [key for key in info if key not in ("cpu_topology", "numa_info")]
            assert ours == [key for key in keys if key != "build_id"]
        assert info["nr_cpus"] == "4"
        assert info["cores_per_socket"] == "2"
        assert [node["memsize_mb"] for node in info["numa_info"]] == [32, 32]  # type: ignore[attr-defined]
        assert [cpu["node"] for cpu in info["cpu_topology"]] == [0, 0, 1, 1]  # type: ignore[attr-defined]
        assert [row["name"] for row in host.rows()] == ["Domain-0"]

    run(main, topology="nodes=2,sockets=2,cores=2")
