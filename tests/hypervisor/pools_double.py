# SPDX-License-Identifier: GPL-2.0-only
"""Cpupools and affinity as the scheduler will have them, for tests of what stands on them until it has."""

from __future__ import annotations

import errno
from dataclasses import dataclass, field
from typing import Any

from pyxen.errors import XenError


@dataclass
class Pool:
    poolid: int
    sched_id: int = 5
    cpus: frozenset[int] = frozenset()
    n_dom: int = 0


@dataclass
class Pools:
    hv: Any
    pools: dict[int, Pool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pools[0] = Pool(0, 5, frozenset(range(self.hv.topology.nr_cpus)), 1)

    @property
    def free_cpus(self) -> frozenset[int]:
        taken = frozenset[int]().union(*(pool.cpus for pool in self.pools.values()))
        return frozenset(range(self.hv.topology.nr_cpus)) - taken

    def create(self, sched_id: int, poolid: int | None) -> Pool:
        if sched_id != 5:
            raise XenError(errno.ENOENT)
        number = max(self.pools) + 1 if poolid is None else poolid
        if number in self.pools:
            raise XenError(errno.EEXIST)
        self.pools[number] = Pool(number, sched_id)
        return self.pools[number]

    def _domains(self, pool: Pool) -> int:
        return sum(d.cpupool == pool.poolid for d in self.hv.domains.values())

    def get(self, poolid: int) -> Pool:
        if poolid not in self.pools:
            raise XenError(errno.ENOENT)
        pool = self.pools[poolid]
        pool.n_dom = self._domains(pool)
        return pool

    def list(self) -> list[Pool]:
        return [self.get(poolid) for poolid in self.pools]

    def destroy(self, poolid: int) -> None:
        pool = self.get(poolid)
        if pool.cpus or pool.n_dom:
            raise XenError(errno.EBUSY)
        del self.pools[poolid]

    def add_cpu(self, pool: Pool, cpu: int | None) -> None:
        assert cpu is not None
        pool.cpus |= {cpu}

    def remove_cpu(self, pool: Pool, cpu: int | None) -> None:
        assert cpu is not None
        if pool.cpus == {cpu} and self._domains(pool):
            raise XenError(errno.EBUSY)
        pool.cpus -= {cpu}

    def move_domain(self, pool: Pool, domain: Any) -> None:
        domain.cpupool = pool.poolid


def install(hv: Any) -> None:
    """Give a hypervisor the double, if it has not the real thing."""
    if hasattr(hv, "cpupools"):
        return
    hv.cpupools = Pools(hv)

    def vcpu_set_affinity(vcpu: Any, hard: frozenset[int] | None, soft: frozenset[int] | None) -> None:
        vcpu.hard_affinity, vcpu.soft_affinity = hard, soft

    hv.scheduler.vcpu_set_affinity = vcpu_set_affinity
    hv.scheduler.idle_time = lambda cpu: 1000 + cpu
