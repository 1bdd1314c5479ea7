# SPDX-License-Identifier: GPL-2.0-only
"""Cpupools: names, and the steps of creating, emptying and splitting them (libxl: ``libxl_cpupool.c``, xl's
``main_cpupoolnumasplit``).

The hypervisor knows pools by number; their names are nodes of xenstore (``/local/pool/N/name``), as on every Xen host.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import uuid as _uuid
from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

from pyxen.abi.domctl import (
    SCHEDULER_ARINC653,
    SCHEDULER_CREDIT,
    SCHEDULER_CREDIT2,
    SCHEDULER_RTDS,
    SCHEDULER_SEDF,
)
from pyxen.errors import ConfigError, HostError, XenError
from pyxen.toolstack.services import Services, in_thread, to_the_end
from pyxen.toolstack.store_entries import Node, only_dom0, publish

if TYPE_CHECKING:
    from pyxen.hypervisor.privcmd import PoolInfo

log = logging.getLogger("pyxen.toolstack")

T = TypeVar("T")

POOL_0_NAME: Final = "Pool-0"
MAX_NAME_BYTES: Final = 255
SCHEDULERS: Final = {
    "sedf": SCHEDULER_SEDF,
    "credit": SCHEDULER_CREDIT,
    "credit2": SCHEDULER_CREDIT2,
    "arinc653": SCHEDULER_ARINC653,
    "rtds": SCHEDULER_RTDS,
}
"""libxl_scheduler_from_string()."""


class UnknownPool(HostError):
    """There is no cpupool of that name or number."""


@dataclass(frozen=True, slots=True)
class Pool:
    """``libxl_cpupoolinfo``."""

    poolid: int
    name: str
    sched: str
    cpus: tuple[int, ...]
    n_dom: int

    def to_json(self) -> dict[str, object]:
        return {
            "poolid": self.poolid, "name": self.name, "sched": self.sched, "cpus": list(self.cpus), "n_dom": self.n_dom
        }  # fmt: skip


def scheduler_name(sched_id: int) -> str:
    """libxl_scheduler_to_string()."""
    return next((name for name, number in SCHEDULERS.items() if number == sched_id), "unknown")


async def pool_name(services: Services, poolid: int) -> str:
    """libxl_cpupoolid_to_name()."""
    value = await services.store.read(f"/local/pool/{poolid}/name")
    if value is None:
        return POOL_0_NAME if poolid == 0 else f"(cpupool {poolid})"
    return value.decode("utf-8", "replace")


async def find_pool(services: Services, which: str) -> int:
    """libxl_cpupool_qualifier_to_cpupoolid(): digits are a pool's number, anything else its name. Raises
    UnknownPool."""
    pools = services.privcmd.cpupool_list()
    if which.isascii() and which.isdigit() and len(which) < 10:
        if any(pool.poolid == int(which) for pool in pools):
            return int(which)
    else:
        for pool in pools:
            if await pool_name(services, pool.poolid) == which:
                return pool.poolid
    raise UnknownPool(f"unknown cpupool '{which}'")


class Cpupools:
    """The host's cpupools. All of it runs on the event loop's thread; one change at a time."""

    def __init__(self, services: Services) -> None:
        self._services = services
        self._lock = asyncio.Lock()
        self.names: dict[int, str] = {0: POOL_0_NAME}
        """The names as they were last seen, for those who cannot wait for xenstore."""

    async def pools(self) -> list[Pool]:
        """Every pool, by number."""
        pools = [await self._pool(info) for info in self._services.privcmd.cpupool_list()]
        self.names = {pool.poolid: pool.name for pool in pools}
        return pools

    async def find(self, which: str) -> int:
        """A pool's number. Raises UnknownPool."""
        return await find_pool(self._services, which)

    def free_cpus(self) -> list[int]:
        """pCPUs of no pool."""
        return sorted(self._services.privcmd.cpupool_free_cpus())

    async def create(self, name: str, *, sched: str = "credit", cpus: Collection[int] = ()) -> int:
        """A new pool of free pCPUs; its number. Raises ConfigError, HostError; nothing is left of it then."""
        check_pool_name(name)
        if sched not in SCHEDULERS:
            raise ConfigError("Unknown scheduler", hint=f"this version has credit; Xen 4.6 has {', '.join(SCHEDULERS)}")
        async with self._lock:
            await self._check_new_name(name)
            return await to_the_end(self._create(name, sched, sorted(set(cpus))))

    async def _create(self, name: str, sched: str, cpus: list[int]) -> int:
        privcmd = self._services.privcmd
        try:
            poolid = privcmd.cpupool_create(SCHEDULERS[sched])
        except XenError as error:
            if error.errno != errno.ENOENT:
                raise
            raise HostError(f"scheduler {sched} is not in this hypervisor", hint='sched = "credit" is') from None
        try:
            for cpu in cpus:
                await self._call(partial(privcmd.cpupool_add_cpu, poolid, cpu))
        except XenError as error:
            await self._empty_and_destroy(poolid)
            raise HostError(f"cpu {cpu} cannot be moved to the cpupool: {_reason(error)}") from None
        nodes = {"": "", "/uuid": str(_uuid.uuid4()), "/name": name}
        await publish(
            self._services.store, [Node(f"/local/pool/{poolid}{p}", v, only_dom0()) for p, v in nodes.items()]
        )
        self.names[poolid] = name
        return poolid

    async def destroy(self, poolid: int) -> None:
        """Free the pCPUs of a pool without domains, and the pool. Raises HostError."""
        async with self._lock:
            info = self._info(poolid)
            if poolid == 0:
                raise HostError("the first cpupool cannot be destroyed: Domain-0 is in it")
            if info.n_dom:
                raise HostError(f"there are {info.n_dom} domains in the cpupool", hint="xl cpupool-migrate moves them")
            await to_the_end(self._destroy(poolid))

    async def _destroy(self, poolid: int) -> None:
        try:
            await self._empty_and_destroy(poolid)
        except XenError as error:
            raise HostError(f"the cpupool cannot be destroyed: {_reason(error)}") from None
        await self._services.store.remove([f"/local/pool/{poolid}"])
        self.names.pop(poolid, None)

    async def _empty_and_destroy(self, poolid: int) -> None:
        privcmd = self._services.privcmd
        for cpu in sorted(privcmd.cpupool_info(poolid).cpus):
            await self._call(partial(privcmd.cpupool_remove_cpu, poolid, cpu))
        privcmd.cpupool_destroy(poolid)

    async def rename(self, poolid: int, name: str) -> None:
        """Another name. Raises ConfigError, UnknownPool."""
        check_pool_name(name)
        async with self._lock:
            self._info(poolid)
            if name != await pool_name(self._services, poolid):
                await self._check_new_name(name)
                await to_the_end(self._write_name(poolid, name))

    async def _write_name(self, poolid: int, name: str) -> None:
        await publish(self._services.store, [Node(f"/local/pool/{poolid}/name", name, only_dom0())])
        self.names[poolid] = name

    async def add_cpus(self, poolid: int, cpus: Collection[int]) -> dict[int, str]:
        """Free pCPUs join a pool, as far as they can: those that could not, and why."""
        return await self._each(poolid, cpus, self._services.privcmd.cpupool_add_cpu)

    async def remove_cpus(self, poolid: int, cpus: Collection[int]) -> dict[int, str]:
        """pCPUs leave a pool and are free, as far as they can: those that could not, and why."""
        return await self._each(poolid, cpus, self._services.privcmd.cpupool_remove_cpu)

    async def _each(
        self, poolid: int, cpus: Collection[int], change: Callable[[int, int | None], None]
    ) -> dict[int, str]:
        async with self._lock:
            self._info(poolid)
            failed: dict[int, str] = {}
            for cpu in sorted(set(cpus)):
                try:
                    await self._call(partial(change, poolid, cpu))
                except XenError as error:
                    failed[cpu] = _reason(error)
            return failed

    async def move_domain(self, poolid: int, domid: int) -> None:
        """A domain changes pools. Raises HostError."""
        async with self._lock:
            await move_domain(self._services, poolid, domid)

    async def numa_split(self) -> None:
        """One pool a NUMA node, Pool-0 keeping the first (``xl cpupool-numa-split``). Raises HostError."""
        async with self._lock:
            await to_the_end(self._numa_split())

    async def _numa_split(self) -> None:
        privcmd = self._services.privcmd
        if len(privcmd.cpupool_list()) > 1:
            raise HostError("splitting not possible, already cpupools in use")
        places = privcmd.cpu_topology()
        nodes: dict[int, list[int]] = {}
        for place in places:
            nodes.setdefault(place.node, []).append(place.cpu)
        first = places[0].node
        free = privcmd.cpupool_free_cpus()
        try:
            # First add, then remove: Pool-0 is never without a pCPU.
            for cpu in nodes[first]:
                if cpu in free:
                    await self._call(partial(privcmd.cpupool_add_cpu, 0, cpu))
            await self._write_name(0, f"Pool-node{first}")
            for node, cpus in nodes.items():
                if node != first:
                    for cpu in cpus:
                        await self._call(partial(privcmd.cpupool_remove_cpu, 0, cpu))
                    await self._create(f"Pool-node{node}", "credit", cpus)
        except XenError as error:
            raise HostError(f"error on splitting Pool-0: {_reason(error)}") from None

    # --- helpers ----------------------------------------------------------------------------------

    async def _call(self, work: Callable[[], T]) -> T:
        """A control call that may have to wait for vCPUs to move."""
        return await in_thread(self._services.executor, work)

    def _info(self, poolid: int) -> PoolInfo:
        try:
            return self._services.privcmd.cpupool_info(poolid)
        except XenError as error:
            if error.errno != errno.ENOENT:
                raise
            raise UnknownPool(f"unknown cpupool '{poolid}'") from None

    async def _pool(self, info: PoolInfo) -> Pool:
        name = await pool_name(self._services, info.poolid)
        return Pool(info.poolid, name, scheduler_name(info.sched_id), tuple(sorted(info.cpus)), info.n_dom)

    async def _check_new_name(self, name: str) -> None:
        for info in self._services.privcmd.cpupool_list():
            if await pool_name(self._services, info.poolid) == name:
                raise ConfigError(f'Pool name "{name}" already exists')


async def move_domain(services: Services, poolid: int, domid: int) -> None:
    """XEN_SYSCTL_CPUPOOL_OP_MOVEDOMAIN, with words for what may be in the way. Raises HostError."""
    try:
        await in_thread(services.executor, lambda: services.privcmd.cpupool_move_domain(poolid, domid))
    except XenError as error:
        if error.errno == errno.ENOENT:
            raise HostError("the cpupool has no CPUs", hint="give it some: xl cpupool-cpu-add") from None
        if domid == 0:
            raise HostError("Domain-0 is the host itself: it stays in the first cpupool") from None
        raise HostError(f"the domain cannot be moved to the cpupool: {_reason(error)}") from None


def check_pool_name(name: str) -> None:
    """Raise ConfigError for a name that could not be found again or is no node's value."""
    if not name or not name.isprintable() or len(name.encode()) > MAX_NAME_BYTES:  # surrogates do not print
        raise ConfigError(f"invalid cpupool name {name[:80]!r}", hint=f"1 to {MAX_NAME_BYTES} printable bytes")
    if "/" in name:
        raise ConfigError(f"invalid cpupool name {name[:80]!r}", hint="without '/'")
    if name.isascii() and name.isdigit():
        raise ConfigError(f"invalid cpupool name '{name}'", hint="a name of digits only would be taken for a number")


def _reason(error: XenError) -> str:
    return {
        errno.EBUSY: "it is in use",
        errno.EINVAL: "there is no such CPU",
        errno.EADDRINUSE: "a vCPU is pinned to it",
        errno.EAGAIN: "try again",
        errno.ENODEV: "it is not there",
    }.get(error.errno, str(error))
