# SPDX-License-Identifier: GPL-2.0-only
"""Endpoints about where and when vCPUs run, and about the size of domains (docs/api.md)."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from pyxen.api.requests import BadRequest, Fields, read_fields

if TYPE_CHECKING:
    from pyxen.host import DomainHandle, Host

_MAX_CPU: Final = 1 << 20
_MAX_NUMBER: Final = 2**31 - 1
_MAX_KB: Final = 1 << 50
_MAX_CPU_LIST: Final = 64 << 10


class PlacementRoutes:
    """The endpoints of one host."""

    def __init__(self, host: Host) -> None:
        self.host = host

    def table(self) -> list[tuple[str, str, Callable[[Request], Coroutine[Any, Any, Response]]]]:
        """(method, path, endpoint)."""
        return [
            ("GET", "/sched-credit", self.sched_credit_pool),
            ("POST", "/sched-credit", self.sched_credit_pool),
            ("GET", "/domains/{which}/sched-credit", self.sched_credit),
            ("POST", "/domains/{which}/sched-credit", self.sched_credit),
            ("GET", "/cpupools", self.list_pools),
            ("POST", "/cpupools", self.create_pool),
            ("POST", "/cpupools/numa-split", self.numa_split),
            ("DELETE", "/cpupools/{pool}", self.destroy_pool),
            ("POST", "/cpupools/{pool}/rename", self.rename_pool),
            ("POST", "/cpupools/{pool}/cpu-add", self.change_cpus),
            ("POST", "/cpupools/{pool}/cpu-remove", self.change_cpus),
        ]

    def actions(self) -> dict[str, Callable[[DomainHandle, Fields], Coroutine[Any, Any, object]]]:
        """What can be done to a domain: the last part of ``POST /domains/ID/…``."""
        return {
            "vcpus": self._set_vcpus,
            "affinity": self._pin,
            "memory-target": self._set_memory,
            "memory-max": self._set_max_memory,
            "cpupool": self._move_to_pool,
            "trigger": self._trigger,
            "sysrq": self._sysrq,
        }

    # --- scheduling -------------------------------------------------------------------------------

    async def sched_credit_pool(self, request: Request) -> Response:
        if request.method == "GET":
            which = request.query_params.get("pool", "0")
            return JSONResponse(self.host.sched_credit_pool(await self.host.cpupools.find(which)))
        fields = await read_fields(request)
        which = fields.text("pool", "0", 255) or "0"
        tslice_ms = fields.number("tslice_ms", -_MAX_NUMBER, _MAX_NUMBER)
        ratelimit_us = fields.number("ratelimit_us", -_MAX_NUMBER, _MAX_NUMBER)
        if fields.number("migration_delay_us", -_MAX_NUMBER, _MAX_NUMBER):
            raise BadRequest("a migration delay is not supported: it came after Xen 4.6")
        fields.finish()
        poolid = await self.host.cpupools.find(which)
        self.host.set_sched_credit_pool(poolid, tslice_ms=tslice_ms, ratelimit_us=ratelimit_us)
        return JSONResponse(self.host.sched_credit_pool(poolid))

    async def sched_credit(self, request: Request) -> Response:
        domid = self.host.domid_of(request.path_params["which"])
        if request.method == "POST":
            fields = await read_fields(request)
            weight = fields.number("weight", -_MAX_NUMBER, _MAX_NUMBER)
            cap = fields.number("cap", -_MAX_NUMBER, _MAX_NUMBER)
            fields.finish()
            self.host.set_sched_credit(domid, weight, cap)
        return JSONResponse(self.host.sched_credit(domid))

    # --- cpupools ---------------------------------------------------------------------------------

    async def list_pools(self, _request: Request) -> Response:
        pools = await self.host.cpupools.pools()
        return JSONResponse(
            {"pools": [pool.to_json() for pool in pools], "free_cpus": self.host.cpupools.free_cpus()}
        )

    async def create_pool(self, request: Request) -> Response:
        fields = await read_fields(request)
        name = fields.required_text("name", 1024)
        sched = fields.text("sched", "credit", 64) or "credit"
        cpus = fields.numbers("cpus", 0, _MAX_CPU)
        fields.finish()
        return JSONResponse({"poolid": await self.host.cpupools.create(name, sched=sched, cpus=cpus)}, 201)

    async def destroy_pool(self, request: Request) -> Response:
        await self.host.cpupools.destroy(await self._pool(request))
        return JSONResponse({})

    async def rename_pool(self, request: Request) -> Response:
        fields = await read_fields(request)
        name = fields.required_text("name", 1024)
        fields.finish()
        await self.host.cpupools.rename(await self._pool(request), name)
        return JSONResponse({})

    async def change_cpus(self, request: Request) -> Response:
        fields = await read_fields(request)
        cpus = fields.numbers("cpus", 0, _MAX_CPU)
        fields.finish()
        pools = self.host.cpupools
        change = pools.add_cpus if request.url.path.endswith("add") else pools.remove_cpus
        failed = await change(await self._pool(request), cpus)
        return JSONResponse({"failed": {str(cpu): why for cpu, why in failed.items()}})

    async def numa_split(self, request: Request) -> Response:
        (await read_fields(request)).finish()
        await self.host.cpupools.numa_split()
        return JSONResponse({})

    async def _pool(self, request: Request) -> int:
        return await self.host.cpupools.find(request.path_params["pool"])

    # --- domains ----------------------------------------------------------------------------------

    @staticmethod
    async def _set_vcpus(domain: DomainHandle, fields: Fields) -> None:
        count = fields.required_number("count", 1, _MAX_NUMBER)
        fields.finish()
        await domain.set_vcpus(count)

    @staticmethod
    async def _pin(domain: DomainHandle, fields: Fields) -> object:
        vcpu = fields.number("vcpu", 0, _MAX_NUMBER)
        hard, soft = fields.text("hard", None, _MAX_CPU_LIST), fields.text("soft", None, _MAX_CPU_LIST)
        fields.finish()
        pinned = await domain.pin(vcpu, hard, soft)
        return [{"vcpu": one.vcpu, "hard": list(one.hard), "soft": list(one.soft)} for one in pinned]

    @staticmethod
    async def _set_memory(domain: DomainHandle, fields: Fields) -> None:
        kb = fields.required_number("kb", 0, _MAX_KB)
        fields.finish()
        await domain.set_memory(kb)

    @staticmethod
    async def _set_max_memory(domain: DomainHandle, fields: Fields) -> None:
        kb = fields.required_number("kb", 0, _MAX_KB)
        fields.finish()
        await domain.set_max_memory(kb)

    @staticmethod
    async def _move_to_pool(domain: DomainHandle, fields: Fields) -> None:
        pool = fields.required_text("pool", 1024)
        fields.finish()
        await domain.move_to_pool(pool)

    @staticmethod
    async def _trigger(domain: DomainHandle, fields: Fields) -> None:
        name = fields.required_text("trigger", 64)
        vcpu = fields.number("vcpu", 0, _MAX_NUMBER) or 0
        fields.finish()
        await domain.trigger(name, vcpu)

    @staticmethod
    async def _sysrq(domain: DomainHandle, fields: Fields) -> None:
        letter = fields.required_text("letter", 64)
        fields.finish()
        await domain.sysrq(letter)
