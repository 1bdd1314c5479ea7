# SPDX-License-Identifier: GPL-2.0-only
"""Doubles of what the toolstack stands on: each counts what it was given, so that a test can ask what is left."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from pyxen.abi.xen import DomId
from pyxen.errors import XenError
from pyxen.toolstack import store_entries
from pyxen.toolstack.config import FEATURES
from pyxen.toolstack.domains import DomainRecord, DomainTable, EventLog
from pyxen.toolstack.operations import Operations
from pyxen.toolstack.services import BuiltRings, Services


@dataclass
class FakeDomain:
    handle: bytes
    pages: int = 0
    ports: int = 0
    pauses: int = 1
    dying: bool = False
    shutdown: bool = False
    shutdown_code: int = -1
    domid: int = 0
    kind: str = "pv"
    memory_map: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def tot_pages(self) -> int:
        return self.pages


@dataclass
class PhysInfo:
    free_kb: int


class FakePrivCmd:
    """Domains as page counts. ``fail_at`` names a call that raises."""

    def __init__(self, free_pages: int = 65536) -> None:
        self.free_pages = free_pages
        self.domains: dict[int, FakeDomain] = {}
        self.next_domid = 1
        self.fail_at: str | None = None
        self.calls: list[str] = []

    def _call(self, name: str) -> None:
        self.calls.append(name)
        if self.fail_at == name:
            raise XenError(errno.EINVAL, f"{name} refused")

    def _domain(self, domid: int) -> FakeDomain:
        if domid not in self.domains:
            raise XenError(errno.ESRCH)
        return self.domains[domid]

    def domain_create(
        self, handle: bytes, *, max_vcpus: int, kind: str = "pv", pv_mode: str = "exact"
    ) -> DomId:
        self._call("domain_create")
        domid = self.next_domid
        self.next_domid += 1
        self.domains[domid] = FakeDomain(handle, domid=domid, kind=kind)
        return DomId(domid)

    async def domain_destroy(self, domid: int) -> None:
        self._call("domain_destroy")
        domain = self._domain(domid)
        domain.dying = True
        while domain.pages:
            give_back = min(domain.pages, 4096)
            domain.pages -= give_back
            self.free_pages += give_back
            await asyncio.sleep(0)
        self.domains.pop(domid, None)

    def domain_info(self, domid: int) -> FakeDomain | None:
        return self.domains.get(domid)

    def physinfo(self) -> PhysInfo:
        return PhysInfo(self.free_pages * 4)

    def max_mem(self, domid: int, kb: int) -> None:
        self._call("max_mem")
        self._domain(domid)

    def set_memory_map(self, domid: int, entries: Sequence[tuple[int, int, int]]) -> None:
        self._call("set_memory_map")
        self._domain(domid).memory_map = list(entries)

    def sched_credit_set(self, domid: int, *, weight: int, cap: int) -> None:
        self._call("sched_credit_set")

    def evtchn_alloc_unbound(self, domid: int, remote: int) -> int:
        self._call("evtchn_alloc_unbound")
        domain = self._domain(domid)
        domain.ports += 1
        return domain.ports

    def domain_overhead_kb(self, memory_kb: int, max_vcpus: int) -> int:
        return 1024 + 8 * max_vcpus

    def domain_pause_for_destroy(self, domid: int) -> None:
        self._domain(domid).dying = True

    def domain_pause(self, domid: int) -> None:
        self._domain(domid).pauses += 1

    def domain_unpause(self, domid: int) -> None:
        self._call("domain_unpause")
        self._domain(domid).pauses -= 1

    def domain_set_handle(self, domid: int, handle: bytes) -> None:
        self._domain(domid).handle = handle

    def domain_shutdown(self, domid: int, code: int) -> None:
        domain = self._domain(domid)
        domain.shutdown, domain.shutdown_code = True, code

    async def build(
        self,
        _privcmd: object,
        record: DomainRecord,
        kernel: object,
        ramdisk: bytes | None,
        store_port: int,
        console_port: int,
    ) -> BuiltRings:
        """The builder's part: populate in chunks, with a look at the loop after each."""
        self._call("build")
        domain = self._domain(record.domid)
        left = record.config.memory_mb * 256
        while left:
            chunk = min(left, 4096)
            if chunk > self.free_pages:
                raise XenError(errno.ENOMEM)
            self.free_pages -= chunk
            domain.pages += chunk
            left -= chunk
            await asyncio.sleep(0)
        return BuiltRings(0x1001, 0x1002)


class MemoryStore:
    """A xenstore of plain dictionaries; every operation suspends before and after it has taken effect."""

    def __init__(self) -> None:
        self.nodes: dict[str, tuple[bytes, tuple[str, ...]]] = {}
        self.fail_at: str | None = None

    async def publish(self, nodes: Sequence[tuple[str, bytes, Sequence[str]]]) -> None:
        await asyncio.sleep(0)
        if self.fail_at is not None and any(self.fail_at in path for path, _, _ in nodes):
            raise XenError(errno.ENOSPC, "the store is full")
        for path, value, permissions in nodes:
            parts = path.split("/")
            for depth in range(2, len(parts)):
                self.nodes.setdefault("/".join(parts[:depth]), (b"", ("n0",)))
            self.nodes[path] = value, tuple(permissions)
        await asyncio.sleep(0)

    async def read(self, path: str) -> bytes | None:
        await asyncio.sleep(0)
        node = self.nodes.get(path)
        return None if node is None else node[0]

    async def write(self, path: str, value: bytes) -> None:
        await asyncio.sleep(0)
        self.nodes[path] = value, self.nodes[path][1]

    async def remove(self, paths: Sequence[str], prune: Sequence[str] = ()) -> None:
        await asyncio.sleep(0)
        for path in paths:
            for node in [node for node in self.nodes if node == path or node.startswith(path + "/")]:
                del self.nodes[node]
        for path in prune:
            if not any(node.startswith(path + "/") for node in self.nodes):
                self.nodes.pop(path, None)
        await asyncio.sleep(0)


class FakeRegistry:
    def __init__(self) -> None:
        self.introduced: dict[int, tuple[int, int]] = {}
        self.callback: Callable[[], None] | None = None

    def introduce(self, domid: int, gfn: int, port: int) -> None:
        self.introduced[domid] = gfn, port

    def release(self, domid: int) -> None:
        if self.introduced.pop(domid, None) is None:
            raise XenError(errno.ENOENT)

    def watch_releases(self, callback: Callable[[], None]) -> Callable[[], None]:
        self.callback = callback
        return self._unwatch

    def _unwatch(self) -> None:
        self.callback = None


@dataclass
class FakeConsole:
    owner: FakeConsoles
    path: Path
    domid: int

    async def close(self) -> None:
        await asyncio.sleep(0)
        self.owner.open_ones.discard(self.domid)


@dataclass
class FakeConsoles:
    folder: Path
    open_ones: set[int] = field(default_factory=set)

    def socket_path(self, domid: DomId) -> Path:
        return self.folder / str(domid)

    async def open(self, record: DomainRecord, ring_gfn: int, port: int) -> FakeConsole:
        await asyncio.sleep(0)
        self.open_ones.add(record.domid)
        return FakeConsole(self, self.socket_path(record.domid), record.domid)


class Bench:
    """A toolstack over doubles."""

    def __init__(self, folder: Path, free_pages: int = 65536) -> None:
        self.privcmd = FakePrivCmd(free_pages)
        self.store = MemoryStore()
        asyncio.run(store_entries.publish(self.store, store_entries.dom0_nodes(0)))
        self.registry = FakeRegistry()
        self.consoles = FakeConsoles(folder)
        self.table = DomainTable()
        self.events = EventLog()
        self.now = 1_000_000.0
        self.executor = ThreadPoolExecutor(1)
        services = Services(
            self.privcmd,  # type: ignore[arg-type]
            self.store,
            self.registry,
            self.consoles,
            self.privcmd.build,  # type: ignore[arg-type]
            lambda: self.now,
            self.executor,
        )
        self.operations = Operations(services, self.table, self.events, features=FEATURES)

    def snapshot(self) -> dict[str, object]:
        """Everything a domain could have left behind."""
        return {
            "domains": {d: (x.pages, x.ports) for d, x in self.privcmd.domains.items()},
            "free": self.privcmd.free_pages,
            "store": dict(self.store.nodes),
            "introduced": dict(self.registry.introduced),
            "consoles": set(self.consoles.open_ones),
            "records": [r.domid for r in self.table],
            "claims": dict(self.operations._claims),
            "reserved": set(self.table._reserved),
        }
