# SPDX-License-Identifier: GPL-2.0-only
"""CPU pools (Xen: xen/common/cpupool.c): each pCPU belongs to one pool or to none, each domain to one pool.

A pool's domains run on its pCPUs only, and its credit is handed out for itself. All pools have the credit scheduler,
the one there is; its parameters are the host's. Names are the toolstack's business (xenstore).
"""

from __future__ import annotations

import errno
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from pyxen.errors import XenError

if TYPE_CHECKING:
    from pyxen.hypervisor.domain import Domain
    from pyxen.hypervisor.hypervisor import Hypervisor

SCHED_CREDIT: Final = 5
"""XEN_SCHEDULER_CREDIT (public/domctl.h)."""
MAX_POOLID: Final = 0xFFFF_FFFE


@dataclass(eq=False)
class CpuPool:
    """``struct cpupool``."""

    poolid: int
    sched_id: int = SCHED_CREDIT
    cpus: frozenset[int] = frozenset()
    domains: set[Domain] = field(default_factory=set)

    @property
    def n_dom(self) -> int:
        """How many domains are in it; those that are dying count, as in Xen."""
        return len(self.domains)


class CpuPools:
    """All pools. Pool 0 has all pCPUs at first, and domain 0 for ever.

    ``_lock`` guards membership; it is taken before any run queue's lock and never by a trap handler.
    """

    def __init__(self, hypervisor: Hypervisor, nr_cpus: int) -> None:
        self._hypervisor = hypervisor
        self._lock = threading.RLock()
        self._pools = {0: CpuPool(0, cpus=frozenset(range(nr_cpus)))}
        self.free_cpus: frozenset[int] = frozenset()
        self._lists: dict[int, list[int]] = {0: list(range(nr_cpus))}

    def cpus_of(self, poolid: int) -> list[int]:
        """The pCPUs of a pool, ascending; empty for a pool that is not there."""
        return self._lists.get(poolid, [])

    def _set_cpus(self, pool: CpuPool, cpus: frozenset[int]) -> None:
        pool.cpus = cpus
        self._lists[pool.poolid] = sorted(cpus)

    def get(self, poolid: int) -> CpuPool:
        """XenError(ENOENT)."""
        pool = self._pools.get(poolid)
        if pool is None:
            raise XenError(errno.ENOENT)
        return pool

    def list(self) -> list[CpuPool]:
        """All pools, by id."""
        return [pool for _, pool in sorted(self._pools.copy().items())]

    def create(self, sched_id: int, poolid: int | None = None) -> CpuPool:
        """XEN_SYSCTL_CPUPOOL_OP_CREATE: an empty pool; ``poolid`` None: the lowest free id.

        XenError: EINVAL (no such scheduler, or an id out of range), EEXIST.
        """
        if sched_id != SCHED_CREDIT:
            raise XenError(errno.EINVAL)
        with self._lock:
            if poolid is None:
                poolid = next(number for number in range(len(self._pools) + 1) if number not in self._pools)
            if not 0 <= poolid <= MAX_POOLID:
                raise XenError(errno.EINVAL)
            if poolid in self._pools:
                raise XenError(errno.EEXIST)
            pool = self._pools[poolid] = CpuPool(poolid)
            self._lists[poolid] = []
            return pool

    def destroy(self, poolid: int) -> None:
        """XEN_SYSCTL_CPUPOOL_OP_DESTROY. XenError: ENOENT; EBUSY while it has domains or pCPUs, and for pool 0."""
        with self._lock:
            pool = self.get(poolid)
            if not poolid or pool.domains or pool.cpus:
                raise XenError(errno.EBUSY)
            del self._pools[poolid]
            del self._lists[poolid]

    def add_cpu(self, pool: CpuPool, cpu: int | None = None) -> int:
        """XEN_SYSCTL_CPUPOOL_OP_ADDCPU: a free pCPU (None: the lowest). Returns which.

        XenError: ENODEV (none is free), EINVAL (no such pCPU), EBUSY (it is in another pool).
        """
        with self._lock:
            if cpu is None:
                if not self.free_cpus:
                    raise XenError(errno.ENODEV)
                cpu = min(self.free_cpus)
            if not 0 <= cpu < self._hypervisor.topology.nr_cpus:
                raise XenError(errno.EINVAL)
            if cpu not in self.free_cpus:
                raise XenError(errno.EBUSY)
            self.free_cpus -= {cpu}
            self._set_cpus(pool, pool.cpus | {cpu})
            return cpu

    def remove_cpu(self, pool: CpuPool, cpu: int | None = None) -> int:
        """XEN_SYSCTL_CPUPOOL_OP_RMCPU: its vCPUs go to the others (None: the highest goes). Returns which.

        XenError: EINVAL (not of this pool), EBUSY (the last one of a pool with domains, or pool 0's last). Not from a
        trap handler.
        """
        with self._lock:
            if cpu is None:
                cpu = max(pool.cpus, default=-1)
            if cpu not in pool.cpus:
                raise XenError(errno.EINVAL)
            if len(pool.cpus) == 1 and (pool.domains or not pool.poolid):
                raise XenError(errno.EBUSY)
            self._set_cpus(pool, pool.cpus - {cpu})
            self.free_cpus |= {cpu}
            domains = list(pool.domains)
        for domain in domains:
            self._replace(domain)
        return cpu

    def admit(self, domain: Domain, poolid: int = 0) -> None:
        """cpupool_add_domain(): a domain that is being created, before it has vCPUs. XenError: ENOENT, ENODEV (no
        pCPU)."""
        with self._lock:
            pool = self.get(poolid)
            if not pool.cpus:
                raise XenError(errno.ENODEV)
            pool.domains.add(domain)
            domain.cpupool = poolid

    def remove_domain(self, domain: Domain) -> None:
        """cpupool_rm_domain(): it is gone."""
        with self._lock:
            pool = self._pools.get(domain.cpupool)
            if pool is not None:
                pool.domains.discard(domain)

    def move_domain(self, pool: CpuPool, domain: Domain) -> None:
        """XEN_SYSCTL_CPUPOOL_OP_MOVEDOMAIN. Affinities that the new pool knows nothing of are dropped (reset to all).

        XenError: EINVAL (domain 0), ENODEV (no pCPU there). Not from a trap handler.
        """
        with self._lock:
            if domain.is_privileged:
                raise XenError(errno.EINVAL)
            if domain.cpupool == pool.poolid:
                return
            if not pool.cpus:
                raise XenError(errno.ENODEV)
            self._pools[domain.cpupool].domains.discard(domain)
            pool.domains.add(domain)
            domain.cpupool = pool.poolid
            for vcpu in domain.vcpus:
                if vcpu.hard_affinity is not None and not vcpu.hard_affinity & pool.cpus:
                    vcpu.hard_affinity = None
        self._replace(domain)

    def _replace(self, domain: Domain) -> None:
        for vcpu in domain.vcpus:
            self._hypervisor.scheduler.replace(vcpu)
