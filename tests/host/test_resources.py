# SPDX-License-Identifier: GPL-2.0-only
"""What a running domain may be given, on a real host: vCPUs, affinity, memory, cpupools, triggers; by Python and by the
API."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from pyxen.api.routes import Routes
from pyxen.api.server import ApiServer
from pyxen.errors import ConfigError, HostError, PyxenError
from pyxen.host import Host
from pyxen.toolstack import placement
from pyxen.toolstack.config import parse
from pyxen.toolstack.domains import Phase
from tests.host import leftovers
from tests.host.small_guests import REBOOT, config, write_kernel
from tests.host.test_api import Api

pytestmark = [pytest.mark.timeout(60), pytest.mark.engine]


def run(main: Callable[[Host], Awaitable[None]]) -> None:
    """On a machine of two nodes, four pCPUs, one engine."""

    async def wrapper() -> None:
        host = Host("64M", topology="nodes=2,sockets=2,cores=2", minimum_life_s=0, max_engines=1)
        async with host:
            await main(host)

    asyncio.run(wrapper())


async def refused(kind: type[PyxenError], words: str, work: Awaitable[object]) -> None:
    with pytest.raises(kind) as caught:
        await work
    assert words in str(caught.value)


def test_vcpus_are_asked_for_through_xenstore(tmp_path: Path) -> None:
    kernel = write_kernel(tmp_path / "k", then="block")

    async def main(host: Host) -> None:
        domain = await host.create(config(kernel, "one", "vcpus = 1", "maxvcpus = 3"))

        async def shown() -> list[str]:
            return [await domain.xenstore.read(f"cpu/{n}/availability") for n in range(3)]

        assert await shown() == ["online", "offline", "offline"]
        await domain.set_vcpus(3)
        assert await shown() == ["online", "online", "online"]
        assert host.row("one")["config"]["b_info"]["avail_vcpus"] == [0, 1, 2]  # type: ignore[index]
        await domain.set_vcpus(2)
        assert await shown() == ["online", "online", "offline"]
        assert await domain.xenstore.get("cpu/3/availability") is None
        assert host.privcmd.domain_info(domain.domid).online_vcpus == 1  # type: ignore[union-attr]  # it is a rude guest
        await refused(HostError, "Requested 4 VCPUs, however maxcpus is 3!", domain.set_vcpus(4))
        await refused(HostError, "at least one vCPU", domain.set_vcpus(0))
        assert await shown() == ["online", "online", "offline"]

    run(main)


def test_what_was_asked_for_is_what_a_reboot_starts_with(tmp_path: Path) -> None:
    kernel = write_kernel(tmp_path / "k", b"round\n", REBOOT)

    async def main(host: Host) -> None:
        lines = ["maxvcpus = 2", "maxmem = 12", "cpu_weight = 100"]
        first = await host.create(config(kernel, "one", *lines), paused=True)
        await first.set_vcpus(2)
        await first.set_memory(10 * 1024)
        await first.set_scheduling(weight=300, cap=150)
        write_kernel(kernel, b"over\n", "block")
        await first.unpause()
        second = await asyncio.wait_for(first.successor(), 20)
        assert await second.xenstore.read("cpu/1/availability") == "online"
        assert await second.xenstore.read("memory/target") == "10240"
        assert await second.xenstore.read("memory/static-max") == "12288"
        assert host.sched_credit(second.domid) == {"weight": 300, "cap": 150}

    run(main)


def test_pinning(tmp_path: Path) -> None:
    kernel = write_kernel(tmp_path / "k", then="block")

    async def main(host: Host) -> None:
        domain = await host.create(config(kernel, "one", "vcpus = 2"))

        def shown(vcpu: int) -> tuple[object, object, object]:
            row = host.vcpus("one")[vcpu]
            return row["hard_affinity"], row["soft_affinity"], row["cpu"]

        assert shown(0)[:2] == (None, None)
        (pinned,) = await domain.pin(0, "1-3,^2", "node:1")
        assert (pinned.vcpu, pinned.hard, pinned.soft) == (0, (1, 3), (3,))
        assert shown(0) == ([1, 3], [2, 3], 3)
        await domain.pin(0, soft="0")
        assert shown(0)[:2] == ([1, 3], [0])
        await domain.pin(hard=[2])
        assert (shown(0)[0], shown(1)[0], shown(0)[2]) == ([2], [2], 2)
        await domain.pin(hard="all", soft="all")
        assert shown(0)[:2] == shown(1)[:2] == (None, None)
        await domain.pin(1, "0,77")
        await refused(ConfigError, "vcpu hard affinity map is empty", domain.pin(0, "99"))
        await refused(ConfigError, "vcpu soft affinity map is empty", domain.pin(0, "0", "1,^1"))
        await refused(ConfigError, "Invalid pcpu range: 3-1.", domain.pin(0, "3-1"))
        await refused(ConfigError, "neither hard nor soft", domain.pin(0))
        await refused(HostError, "has no vCPU 2: it has 2", domain.pin(2, "0"))
        await refused(HostError, "has no vCPU -1", domain.pin(-1, "0"))
        assert [shown(n)[:2] for n in (0, 1)] == [(None, None), ([0], None)]

    run(main)


def test_memory(tmp_path: Path) -> None:
    kernel = write_kernel(tmp_path / "k", then="block")

    async def main(host: Host) -> None:
        domain = await host.create(config(kernel, "one", "maxmem = 16"))
        xenstore = domain.xenstore

        def limits() -> tuple[int, int]:
            info = host.privcmd.domain_info(domain.domid)
            assert info is not None
            return info.tot_pages, info.max_pages

        assert limits() == (2048, 17 * 256)
        await domain.set_memory(5 * 1024)
        assert await xenstore.read("memory/target") == "5120"
        assert await xenstore.read("memory/static-max") == "16384"
        assert await xenstore.read(f"/vm/{host.row('one')['uuid']}/memory") == "5"
        # It has no balloon driver: it keeps its memory, and gets no more.
        assert limits() == (2048, 6 * 256)
        with pytest.raises(PyxenError):
            host.privcmd.populate_physmap(domain.domid, [5000])
        await domain.set_max_memory(6 * 1024)  # below what it has, not below its target
        assert limits() == (2048, 7 * 256)
        build = host.row("one")["config"]["b_info"]  # type: ignore[index]
        assert (build["target_memkb"], build["max_memkb"]) == (5120, 6144)
        dynamic = "memory_dynamic_max must be less than or equal to memory_static_max"
        await refused(HostError, dynamic, domain.set_memory(16385))
        await refused(HostError, dynamic, domain.set_memory(-1))
        static = "memory_static_max must be greater than or or equal to memory_dynamic_max"
        await refused(HostError, static, domain.set_max_memory(5119))
        await refused(HostError, "more than any machine has", domain.set_max_memory(1 << 60))
        assert limits() == (2048, 7 * 256)
        await domain.set_memory(16384)
        assert limits() == (2048, 17 * 256)

    run(main)


def test_signals(tmp_path: Path) -> None:
    kernel = write_kernel(tmp_path / "k", then="block")

    async def main(host: Host) -> None:
        domain = await host.create(config(kernel, "one", "vcpus = 2"), paused=True)
        await domain.trigger("nmi", 1)
        vcpus = host.hypervisor.domains[domain.domid].vcpus
        assert [vcpu.nmi_pending for vcpu in vcpus] == [False, True]
        await refused(HostError, "has no vCPU 2", domain.trigger("nmi", 2))
        await refused(HostError, "'reset' failed: Xen does not implement it", domain.trigger("reset"))
        await refused(HostError, "'power' failed: it needs an HVM guest", domain.trigger("power"))
        await refused(HostError, "'s3resume' failed: it needs an HVM guest", domain.trigger("s3resume"))
        await refused(ConfigError, 'Invalid trigger "boo"', domain.trigger("boo"))
        await domain.sysrq("h")
        assert await domain.xenstore.read("control/sysrq") == "h"
        for wrong in ("", "hh", "\0", "é"):
            await refused(ConfigError, "Invalid sysrq.", domain.sysrq(wrong))

    run(main)


def test_a_domain_that_is_gone_gets_nothing_and_no_nodes_come_back(tmp_path: Path) -> None:
    kernel = write_kernel(tmp_path / "k", then="block")

    async def main(host: Host) -> None:
        before = leftovers.of_host(host)
        domain = await host.create(config(kernel, "one", "vcpus = 2"))

        def changes() -> list[Awaitable[object]]:
            return [domain.set_vcpus(1), domain.pin(0, "0"), domain.set_memory(1024), domain.set_max_memory(1 << 20),
                    domain.sysrq("h")]  # fmt: skip

        await domain._record.lock.acquire()
        work = [asyncio.ensure_future(one) for one in (domain.destroy(), *changes())]  # they wait behind the teardown
        await asyncio.sleep(0)
        domain._record.lock.release()
        first, *others = await asyncio.gather(*work, return_exceptions=True)
        assert first is None
        assert [type(other) for other in others] == [HostError] * 5
        for change in changes():
            await refused(HostError, "is gone", change)
        assert domain.phase is Phase.GONE
        assert leftovers.of_host(host) == before

    run(main)


# --- cpupools -------------------------------------------------------------------------------------------


def test_a_cpupool_s_life(tmp_path: Path) -> None:
    kernel = write_kernel(tmp_path / "k", then="spin")

    async def main(host: Host) -> None:
        before = leftovers.of_host(host)
        pools = host.cpupools
        assert [pool.to_json() for pool in await pools.pools()] == [
            {"poolid": 0, "name": "Pool-0", "sched": "credit", "cpus": [0, 1, 2, 3], "n_dom": 1}
        ]
        assert host.info()["free_cpus"] == "0"
        assert await pools.remove_cpus(0, [2, 3, 9]) == {9: "there is no such CPU"}
        assert (pools.free_cpus(), host.info()["free_cpus"]) == ([2, 3], "2")
        poolid = await pools.create("fast", cpus=[3])
        store = host.store.client
        assert await store.read(f"/local/pool/{poolid}/name") == "fast"
        assert len(await store.read(f"/local/pool/{poolid}/uuid")) == 36
        assert await pools.find("fast") == await pools.find(str(poolid)) == poolid
        domain = await host.create(config(kernel, "one"))
        await domain.console.expect("hello", 10)
        await domain.move_to_pool("fast")
        assert (host.row("one")["cpupool"], host.row("one")["cpupool_id"]) == ("fast", poolid)
        assert host.vcpus("one")[0]["cpu"] == 3
        await refused(HostError, "none of these CPUs is in the domain's cpupool", domain.pin(0, "0-2"))
        assert await pools.remove_cpus(poolid, [3]) == {3: "it is in use"}
        await refused(HostError, "there are 1 domains in the cpupool", pools.destroy(poolid))
        assert await pools.add_cpus(poolid, [2, 3]) == {3: "it is in use"}
        await pools.rename(poolid, "faster")
        assert host.row("one")["cpupool"] == "faster"
        await pools.rename(poolid, "faster")
        await refused(ConfigError, "already exists", pools.rename(poolid, "Pool-0"))
        used = host.row("one")["cpu_time_ns"]
        await asyncio.sleep(0.1)
        assert host.row("one")["cpu_time_ns"] != used  # it runs there
        await domain.move_to_pool(0)
        await pools.destroy(poolid)
        assert pools.free_cpus() == [2, 3]
        await refused(HostError, "unknown cpupool 'faster'", pools.find("faster"))
        await refused(HostError, "unknown cpupool", pools.destroy(poolid))
        assert await pools.add_cpus(0, [2, 3]) == {}
        await domain.destroy()
        assert leftovers.of_host(host) == before

    run(main)


def test_a_cpupool_that_cannot_be_made_leaves_nothing() -> None:
    async def main(host: Host) -> None:
        await host.cpupools.remove_cpus(0, [3])
        before = leftovers.of_host(host)
        for cpus in ([3, 0], [3, 4]):
            await refused(HostError, "cannot be moved to the cpupool", host.cpupools.create("p", cpus=cpus))
            assert leftovers.of_host(host) == before
        empty = await host.cpupools.create("empty")
        await refused(HostError, "it stays in the first cpupool", host.cpupools.move_domain(empty, 0))

    run(main)


def test_numa_split() -> None:
    async def main(host: Host) -> None:
        await host.cpupools.numa_split()
        shown = [(pool.name, pool.cpus, pool.n_dom) for pool in await host.cpupools.pools()]
        assert shown == [("Pool-node0", (0, 1), 1), ("Pool-node1", (2, 3), 0)]
        assert host.rows()[0]["cpupool"] == "Pool-node0"
        await refused(HostError, "splitting not possible, already cpupools in use", host.cpupools.numa_split())

    run(main)


# --- at creation ----------------------------------------------------------------------------------------


def test_placement_of_a_new_domain(tmp_path: Path) -> None:
    kernel = write_kernel(tmp_path / "k", then="block")

    def parsed(*lines: str) -> Any:
        return parse(config(kernel, "one", "vcpus = 3", *lines), "test.cfg")

    async def main(host: Host) -> None:
        await host.cpupools.remove_cpus(0, [3])
        await host.cpupools.create("fast", cpus=[3])
        domain = await host.create(config(kernel, "one", "vcpus = 3"), paused=True)
        services = host.operations.services

        async def place(*lines: str) -> list[tuple[object, object]]:
            await placement.apply(services, parsed(*lines), domain.domid)
            return [(row["hard_affinity"], row["soft_affinity"]) for row in host.vcpus("one")]

        assert await place() == [(None, None)] * 3
        assert await place("cpus = 'all,^0'", "cpus_soft = 'node:1'") == [([1, 2, 3], [2, 3])] * 3
        assert await place("cpus = ['0', '1-2']") == [([0], [2, 3]), ([1, 2], [2, 3]), ([1, 2, 3], [2, 3])]
        assert host.row("one")["cpupool"] == "Pool-0"
        await place("pool = 'fast'", "cpus = '2-3'")
        assert host.row("one")["cpupool"] == "fast"
        assert host.vcpus("one")[0]["cpu"] == 3
        for words, *lines in (
            ("Illegal pool specified", "pool = 'none'"),
            ("vcpu hard affinity map is empty", "cpus = '77'"),
            ("vcpu soft affinity map is empty", "cpus_soft = ['0', '77']"),
        ):
            await refused(ConfigError, words, placement.apply(services, parsed(*lines), domain.domid))
        apart = placement.apply(services, parsed("cpus='0'"), domain.domid)
        await refused(HostError, "setting affinity failed on vcpu `0'", apart)

    run(main)


def test_created_where_its_configuration_says(tmp_path: Path) -> None:
    kernel = write_kernel(tmp_path / "k", then="block")

    async def main(host: Host) -> None:
        await host.cpupools.remove_cpus(0, [2, 3])
        await host.cpupools.create("fast", cpus=[2, 3])
        lines = ["vcpus = 2", 'pool = "fast"', 'cpus = ["3", "all"]', 'cpus_soft = "node:1"']
        lines += ["cpu_weight = 77", "cap = 120"]
        domain = await host.create(config(kernel, "one", *lines))
        await domain.console.expect("hello", 10)
        assert host.row("one")["cpupool"] == "fast"
        rows = host.vcpus("one")
        assert [(row["hard_affinity"], row["soft_affinity"]) for row in rows] == [([3], [2, 3]), (None, [2, 3])]
        assert rows[0]["cpu"] == 3
        assert host.sched_credit(domain.domid) == {"weight": 77, "cap": 120}
        build: Any = host.row("one")["config"]
        assert build["c_info"]["pool_name"] == "fast"
        assert build["b_info"]["vcpu_hard_affinity"] == [[3], [0, 1, 2, 3]]
        before = leftovers.of_host(host)
        for kind, words, *wrong in (
            (ConfigError, "Illegal pool specified", "pool = 'none'"),
            (ConfigError, "vcpu hard affinity map is empty", "cpus = '77'"),
            (HostError, "setting affinity failed on vcpu `0'", "cpus = '3'"),
        ):
            await refused(kind, words, host.create(config(kernel, "two", *wrong)))
            assert leftovers.of_host(host) == before

    run(main)


# --- the API --------------------------------------------------------------------------------------------


def test_by_the_api(tmp_path: Path) -> None:
    kernel = write_kernel(tmp_path / "k", then="block")

    async def main(host: Host) -> None:
        path = host.rundir / "api.sock"
        server = ApiServer(Routes(host).application(), path)
        await server.start()
        api = Api(host, path)

        async def post(where: str, body: Any) -> Any:
            status, answer = await api.call("POST", where, body)
            assert status in (200, 201), answer
            return answer

        try:
            await api.create(config(kernel, "one", "vcpus = 2", "maxmem = 16"))
            await post("/domains/one/vcpus", {"count": 1})
            assert await post("/domains/1/affinity", {"vcpu": 1, "hard": "0-1", "soft": None}) == [
                {"vcpu": 1, "hard": [0, 1], "soft": [0, 1]}
            ]
            assert len(await post("/domains/1/affinity", {"soft": "3"})) == 2
            await post("/domains/one/memory-target", {"kb": 6144})
            await post("/domains/one/memory-max", {"kb": 8192})
            await post("/domains/one/trigger", {"trigger": "nmi"})
            await post("/domains/one/sysrq", {"letter": "s"})
            assert await post("/sched-credit", {"tslice_ms": 5, "ratelimit_us": 0}) == {
                "tslice_ms": 5, "ratelimit_us": 0, "migration_delay_us": 0
            }  # fmt: skip
            assert await post("/cpupools/0/cpu-remove", {"cpus": [3]}) == {"failed": {}}
            assert await post("/cpupools", {"name": "a b%ü", "cpus": [3]}) == {"poolid": 1}
            await post("/cpupools/a%20b%25%C3%BC/rename", {"name": "p"})
            await post("/domains/one/cpupool", {"pool": "p"})
            _, shown = await api.call("GET", "/cpupools")
            assert shown["free_cpus"] == []
            assert [(pool["name"], pool["cpus"], pool["n_dom"]) for pool in shown["pools"]] == [
                ("Pool-0", [0, 1, 2], 1), ("p", [3], 1)
            ]  # fmt: skip
            assert (await api.call("GET", "/sched-credit?pool=p"))[1]["tslice_ms"] == 5
            assert await post("/cpupools/p/cpu-add", {"cpus": [0]}) == {"failed": {"0": "it is in use"}}
            await post("/domains/one/cpupool", {"pool": "0"})
            assert (await api.call("DELETE", "/cpupools/p"))[0] == 200
            for where, body, status, words in (
                ("/domains/1/vcpus", {}, 400, "count is missing"),
                ("/domains/1/vcpus", {"count": 0}, 400, "count: a whole number"),
                ("/domains/1/vcpus", {"count": 3}, 409, "maxcpus is 2!"),
                ("/domains/1/affinity", {}, 400, "neither hard nor soft"),
                ("/domains/1/affinity", {"vcpu": 2, "hard": "0"}, 409, "has no vCPU 2"),
                ("/domains/1/affinity", {"hard": [0]}, 400, "hard: a text"),
                ("/domains/1/affinity", {"hard": "0," * 5000}, 400, "more than 4096 items"),
                ("/domains/1/affinity", {"hard": "0" * 70_000}, 413, "longer than"),
                ("/domains/1/memory-target", {"kb": 1.5}, 400, "kb: a whole number"),
                ("/domains/1/memory-target", {"kb": 1 << 40}, 409, "memory_dynamic_max must be"),
                ("/domains/1/memory-max", {"kb": 1}, 409, "memory_static_max must be"),
                ("/domains/1/trigger", {"trigger": "nmi", "vcpu": 7}, 409, "has no vCPU 7"),
                ("/domains/1/trigger", {}, 400, "trigger is missing"),
                ("/domains/1/sysrq", {"letter": "no"}, 400, "Invalid sysrq."),
                ("/domains/1/cpupool", {"pool": "none"}, 404, "unknown cpupool 'none'"),
                ("/domains/1/cpupool", {"pool": "\ud800"}, 404, "unknown cpupool '?'"),
                ("/domains/1/trigger", {"trigger": "\ud800"}, 400, 'Invalid trigger "?"'),
                ("/domains/1/affinity", {"hard": "\udc80"}, 400, "Invalid pcpu range"),
                ("/domains/1/sched-credit", {"weight": 65536}, 409, "Cpu weight out of range"),
                ("/domains/1/sched-credit", {"cap": 201}, 409, "Cpu cap out of range, valid range is from 0 to 200"),
            ):
                got, answer = await api.call("POST", where, body)
                assert got == status, (where, body, answer)
                assert words in answer["error"], (where, body, answer)
        finally:
            await server.close()

    run(main)
