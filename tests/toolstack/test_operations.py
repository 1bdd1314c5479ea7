# SPDX-License-Identifier: GPL-2.0-only
"""Create and destroy, cancelled and failing at every point where they can be."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Generator
from pathlib import Path
from typing import Any

import pytest

from pyxen.errors import ConfigError, HostError, ImageError, PyxenError
from pyxen.toolstack.config import parse
from pyxen.toolstack.domains import DomainRecord, Phase, UnknownDomain
from pyxen.toolstack.services import to_the_end
from tests.build.make_elf import pvh_kernel, xen_kernel
from tests.toolstack.doubles import Bench


class CancelAt:
    """Awaits ``work`` and cancels the task at its ``k``-th suspension (1-based); ``suspensions`` counts them."""

    def __init__(self, work: Awaitable[Any], k: int) -> None:
        self.work, self.k, self.suspensions = work, k, 0

    def __await__(self) -> Generator[Any, Any, Any]:
        inner = self.work.__await__()
        thrown: BaseException | None = None
        while True:
            try:
                future = next(inner) if thrown is None else inner.throw(thrown)
            except StopIteration as end:
                return end.value
            self.suspensions += 1
            if self.suspensions == self.k:
                task = asyncio.current_task()
                assert task is not None
                task.cancel()
            thrown = None
            try:
                yield future
            except asyncio.CancelledError as error:
                thrown = error


pytestmark = pytest.mark.timeout(30)


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    (tmp_path / "kernel").write_bytes(xen_kernel())
    (tmp_path / "ramdisk").write_bytes(b"r" * 10000)
    return Bench(tmp_path)


def config(folder: Path, name: str = "one", *lines: str) -> Any:
    text = "\n".join(
        [f'name = "{name}"', f'kernel = "{folder}/kernel"', f'ramdisk = "{folder}/ramdisk"', "memory = 64", *lines]
    )
    return parse(text, "test.cfg")


def test_create_makes_a_domain_that_xenstore_describes_as_libxl_does(bench: Bench, tmp_path: Path) -> None:
    record = asyncio.run(bench.operations.create(config(tmp_path, "one", 'cmdline = "console=hvc0"', "maxmem = 80")))
    assert (record.domid, record.phase) == (1, Phase.LIVE)
    assert bench.privcmd.domains[1].memory_map == [(0, 80 << 20, 1)]  # what a balloon may grow to
    nodes = bench.store.nodes
    home = "/local/domain/1"
    assert nodes[f"{home}/name"] == (b"one", ("n0", "r1"))
    assert nodes[f"{home}/memory/target"] == (b"65536", ("n0", "r1"))
    assert nodes[f"{home}/store/ring-ref"] == (str(0x1001).encode(), ("n0", "r1"))
    assert nodes[f"{home}/console/ring-ref"][0] == str(0x1002).encode()
    assert nodes[f"{home}/console/backend-id"] == (b"0", ("n1", "r0"))
    assert nodes[f"{home}/control/shutdown"] == (b"", ("n1",))
    assert nodes[f"{home}/vm"][0] == f"/vm/{record.uuid}".encode()
    assert nodes["/local/domain/0/backend/console/1/0/frontend"] == (b"/local/domain/1/console", ("n0", "r1"))
    assert nodes["/libxl/1/device/console/0/backend"] == (b"/local/domain/0/backend/console/1/0", ("n0",))
    assert nodes[f"/vm/{record.uuid}/image/cmdline"] == (b"console=hvc0", ("n0", "r1"))
    assert bench.privcmd.domains[1].pauses == 0
    assert bench.registry.introduced == {1: (0x1001, 1)}


@pytest.mark.parametrize(
    ("kind", "domid", "uuid"),
    [("pv", 3, "507644cf-a9b1-40ed-8c62-27c244f5c977"), ("pvh", 5, "4f65319e-1fac-46d6-a8a1-6f5c9919f30c")],
)
def test_nodes_have_the_paths_and_permissions_of_a_real_host(
    bench: Bench, tmp_path: Path, kind: str, domid: int, uuid: str
) -> None:
    """Everything libxl wrote for the oracle's domains, but for their disks, vifs and what their kernels wrote."""
    oracle = Path("/work/shared/oracle/state/xenstore-ls-fp.txt")
    if not oracle.exists():
        pytest.skip("the oracle's outputs are not on this machine")
    bench.privcmd.next_domid = domid
    (tmp_path / "kernel").write_bytes(pvh_kernel() if kind == "pvh" else xen_kernel())
    record = asyncio.run(bench.operations.create(config(tmp_path, kind, 'cmdline = "x"', f'type = "{kind}"')))
    ours = {path.replace(str(record.uuid), "UUID"): permissions for path, (_, permissions) in bench.store.nodes.items()}
    for line in oracle.read_text().splitlines():
        path, _, rest = line.partition(" = ")
        path = path.replace(uuid, "UUID")
        homes = tuple(
            f"{home}/" for home in (f"/local/domain/{domid}", f"/libxl/{domid}", "/vm/UUID",
                                    f"/local/domain/0/backend/console/{domid}")
        )  # fmt: skip
        if "/vbd" in path or "/vif" in path or not path.startswith(homes):
            continue
        permissions = tuple(rest.rpartition("(")[2].rstrip(")").split(","))
        # oxenstored gives a directory nobody wrote by itself its parent's permissions; our double does not model that.
        if rest.startswith('""') and path not in ours:
            pytest.fail(f"{path} is missing")
        assert path in ours, path
        if rest.startswith('""') and path.endswith(("/device", "/device/console")):
            continue
        assert ours[path] == permissions, path
    if kind == "pvh":
        assert bench.store.nodes[f"/libxl/{domid}/type"][0] == b"pvh"
        assert not [path for path in ours if "/image" in path]


def test_a_pvh_domain_needs_room_for_nested_page_tables(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "kernel").write_bytes(pvh_kernel())
    wanted = config(tmp_path, "one", 'type = "pvh"', "vcpus = 2")
    overhead = 1024 + 8 * 2 + 4 * (2 * 256 + 2 * 64)
    bench.privcmd.free_pages = (64 * 1024 + overhead) // 4 - 1
    with pytest.raises(HostError, match=f"{64 * 1024 + overhead} KiB are needed"):
        asyncio.run(bench.operations.create(wanted))
    bench.privcmd.free_pages += 1
    asyncio.run(bench.operations.create(wanted))


def test_a_pvh_domain_has_its_own_loader_and_kind_and_no_pv_mode(bench: Bench, tmp_path: Path) -> None:
    (tmp_path / "kernel").write_bytes(pvh_kernel())
    record = asyncio.run(bench.operations.create(config(tmp_path, "one", 'type = "pvh"', "vcpus = 4")))
    assert bench.privcmd.domains[record.domid].kind == "pvh"
    assert record.pv_mode is None
    with pytest.raises(ConfigError, match='this is type = "pvh"'):
        asyncio.run(bench.operations.create(config(tmp_path, "two", 'type = "pvh"'), pv_mode="fast"))
    with pytest.raises(ImageError, match="no Xen notes|wants the"):
        asyncio.run(bench.operations.create(config(tmp_path, "three")))
    (tmp_path / "kernel").write_bytes(xen_kernel())
    with pytest.raises(ImageError, match="no PHYS32_ENTRY"):
        asyncio.run(bench.operations.create(config(tmp_path, "four", 'type = "pvh"')))
    assert [record.name for record in bench.table] == ["one"]


def test_paused_stays_paused_and_destroy_returns_everything(bench: Bench, tmp_path: Path) -> None:
    before = bench.snapshot()

    async def main() -> None:
        record = await bench.operations.create(config(tmp_path), paused=True)
        assert bench.privcmd.domains[1].pauses == 1
        await bench.operations.destroy(record)
        await bench.operations.destroy(record)  # a second time is no error
        assert record.phase is Phase.GONE

    asyncio.run(main())
    assert bench.snapshot() == before
    assert [e.event for e in bench.events.since(0)] == ["created", "destroyed"]


def test_create_cancelled_at_each_await_leaves_nothing(bench: Bench, tmp_path: Path) -> None:
    before = bench.snapshot()
    k, cancelled = 1, 0
    while True:
        driver = CancelAt(bench.operations.create(config(tmp_path)), k)

        async def main(driver: CancelAt = driver) -> DomainRecord | None:
            task = asyncio.ensure_future(_await(driver))
            with contextlib.suppress(asyncio.CancelledError):
                done: DomainRecord = await task
                return done
            return None

        record = asyncio.run(main())
        if record is not None:
            assert driver.suspensions < k  # it got through without the k-th suspension: all of them have been tried
            break
        assert bench.snapshot() == before, f"left behind by a cancel at await {k}"
        cancelled += 1
        k += 1
    assert cancelled >= 8
    asyncio.run(bench.operations.destroy(record))
    assert bench.snapshot() == before
    # Each attempt got an id of its own: a domid is not used again at once.
    assert record.domid > 5


async def _await(work: Awaitable[Any]) -> Any:
    return await work


def test_create_cancelled_again_while_cleaning_up_still_leaves_nothing(bench: Bench, tmp_path: Path) -> None:
    before = bench.snapshot()

    async def main(first: int, second: int) -> None:
        inner = CancelAt(bench.operations.create(config(tmp_path)), first)
        task = asyncio.ensure_future(_await(CancelAt(inner, first + second)))
        with pytest.raises(asyncio.CancelledError):
            await task

    for first in (2, 4, 6, 9):
        for second in (1, 2, 3):
            asyncio.run(main(first, second))
            assert bench.snapshot() == before, (first, second)


STEPS = ["domain_create", "max_mem", "sched_credit_set", "evtchn_alloc_unbound", "build", "domain_unpause"]


@pytest.mark.parametrize("step", STEPS)
def test_a_step_that_fails_leaves_nothing_and_says_why(bench: Bench, tmp_path: Path, step: str) -> None:
    before = bench.snapshot()
    bench.privcmd.fail_at = step
    with pytest.raises(PyxenError, match=f"{step} refused"):
        asyncio.run(bench.operations.create(config(tmp_path)))
    assert bench.snapshot() == before


@pytest.mark.parametrize("node", ["/control", "/console"])
def test_a_store_that_refuses_leaves_nothing(bench: Bench, tmp_path: Path, node: str) -> None:
    before = bench.snapshot()
    bench.store.fail_at = node
    with pytest.raises(PyxenError, match="store is full"):
        asyncio.run(bench.operations.create(config(tmp_path)))
    assert bench.snapshot() == before


def test_destroy_cancelled_at_each_await_can_be_run_again(bench: Bench, tmp_path: Path) -> None:
    before = bench.snapshot()
    k = 1
    while True:
        record = asyncio.run(bench.operations.create(config(tmp_path)))
        driver = CancelAt(bench.operations.destroy(record), k)

        async def main(driver: CancelAt = driver) -> bool:
            task = asyncio.ensure_future(_await(driver))
            with contextlib.suppress(asyncio.CancelledError):
                await task
                return True
            return False

        if asyncio.run(main()):
            break
        assert record.phase is Phase.DYING
        asyncio.run(bench.operations.destroy(record))
        assert bench.snapshot() == before, k
        k += 1
    assert bench.snapshot() == before
    assert k > 5


def test_destroy_while_building_makes_the_create_give_up(bench: Bench, tmp_path: Path) -> None:
    before = bench.snapshot()

    async def main() -> None:
        create = asyncio.ensure_future(bench.operations.create(config(tmp_path)))
        while not len(bench.table) and not create.done():  # noqa: ASYNC110 (a moment in the middle of create)
            await asyncio.sleep(0)
        await bench.operations.destroy(bench.table.find("one"))
        with pytest.raises(HostError, match="destroyed while it was being built"):
            await create

    asyncio.run(main())
    assert bench.snapshot() == before


def test_names_and_uuids_are_taken_once(bench: Bench, tmp_path: Path) -> None:
    uuid = 'uuid = "11111111-2222-3333-4444-555555555555"'

    async def main() -> None:
        first = asyncio.ensure_future(bench.operations.create(config(tmp_path, "same", uuid)))
        await asyncio.sleep(0)  # both at once: the second must not get in while the first loads its kernel
        with pytest.raises(ConfigError, match='domain with name "same" already exists'):
            await bench.operations.create(config(tmp_path, "same"))
        await first
        with pytest.raises(ConfigError, match="uuid .* is already that of domain 1"):
            await bench.operations.create(config(tmp_path, "other", uuid))
        with pytest.raises(ConfigError, match="already exists"):
            await bench.operations.create(config(tmp_path, "Domain-0"))
        await bench.operations.rename(bench.table.find(1), "renamed")
        assert bench.store.nodes["/local/domain/1/name"][0] == b"renamed"
        await bench.operations.create(config(tmp_path, "same"))
        with pytest.raises(ConfigError):
            await bench.operations.rename(bench.table.find("renamed"), "same")
        assert bench.table.find("renamed").domid == 1

    asyncio.run(main())


def test_not_enough_memory_says_how_much_is_missing(bench: Bench, tmp_path: Path) -> None:
    before = bench.snapshot()
    with pytest.raises(HostError) as caught:
        asyncio.run(bench.operations.create(config(tmp_path, "big", "memory = 1024")))
    needed, free, missing = (int(word) for word in str(caught.value).split() if word.isdigit())
    assert free == 65536 * 4
    assert needed >= 1024 * 1024
    assert missing == needed - free
    assert bench.snapshot() == before
    assert "domain_create" not in bench.privcmd.calls


def test_two_creates_at_once_do_not_count_on_the_same_memory(bench: Bench, tmp_path: Path) -> None:
    async def main() -> list[Any]:
        return await asyncio.gather(
            *(bench.operations.create(config(tmp_path, name, "memory = 160")) for name in "ab"), return_exceptions=True
        )

    good, bad = asyncio.run(main())
    assert isinstance(good, DomainRecord)
    assert isinstance(bad, HostError)
    assert "missing" in str(bad)


@pytest.mark.parametrize("line", ['on_crash = "coredump-restart"', 'on_poweroff = "soft-reset"'])
def test_actions_we_cannot_do_are_refused_by_name(bench: Bench, tmp_path: Path, line: str) -> None:
    with pytest.raises(ConfigError, match=line.split()[0]):
        asyncio.run(bench.operations.create(config(tmp_path, "one", line)))


def test_files_that_are_no_kernels(bench: Bench, tmp_path: Path) -> None:
    before = bench.snapshot()
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "noise").write_bytes(b"\x7fELF" + bytes(100))
    wrong = {"missing": "No such file", "fifo": "not a regular", ".": "not a regular|Is a directory", "noise": "ELF"}
    for name, words in wrong.items():
        with pytest.raises(ImageError, match=words):
            asyncio.run(bench.operations.create(config(tmp_path, "one", f'kernel = "{tmp_path}/{name}"')))
        assert bench.snapshot() == before


def test_digits_are_ids_and_everything_else_is_a_name(bench: Bench, tmp_path: Path) -> None:
    record = asyncio.run(bench.operations.create(config(tmp_path, "one2")))
    assert bench.table.find("1") is record
    assert bench.table.find("one2") is record
    for which in ("2", "", "one", "1" * 50, "１"):
        with pytest.raises(UnknownDomain):
            bench.table.find(which)


def test_to_the_end_finishes_before_it_raises() -> None:
    done: list[str] = []

    async def slow() -> None:
        await asyncio.sleep(0.01)
        done.append("slow")

    async def main() -> None:
        task = asyncio.ensure_future(to_the_end(slow()))
        for _ in range(3):
            await asyncio.sleep(0)
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert done == ["slow"]

    asyncio.run(main())
