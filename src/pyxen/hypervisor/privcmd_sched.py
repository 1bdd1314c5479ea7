# SPDX-License-Identifier: GPL-2.0-only
"""privcmd's typed calls about where and when vCPUs run: affinity, cpupools, the scheduler's parameters, the machine's
shape (:class:`~pyxen.hypervisor.privcmd.PrivCmd` inherits them)."""

from __future__ import annotations

import errno
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyxen.abi.domctl import SCHEDULER_CREDIT, Domctl
from pyxen.abi.sysctl import Sysctl
from pyxen.errors import XenError
from pyxen.hypervisor import cpupool_op, domctl
from pyxen.hypervisor.privcmd_base import Control

if TYPE_CHECKING:
    from pyxen.hypervisor.cpupool import CpuPool
    from pyxen.hypervisor.hypervisor import Hypervisor


@dataclass(frozen=True, slots=True)
class PoolInfo:
    """XEN_SYSCTL_CPUPOOL_OP_INFO."""

    poolid: int
    sched_id: int
    cpus: frozenset[int]
    n_dom: int


@dataclass(frozen=True, slots=True)
class CpuTopology:
    """XEN_SYSCTL_cputopoinfo: where a pCPU sits, in machine-wide numbers."""

    cpu: int
    core: int
    socket: int
    node: int


@dataclass(frozen=True, slots=True)
class NodeInfo:
    """XEN_SYSCTL_numainfo: a NUMA node's memory in KiB and its distance to each node (ACPI SLIT)."""

    node: int
    total_kb: int
    free_kb: int
    distances: tuple[int, ...]


class SchedulerCalls(Control):
    """Part of PrivCmd."""

    # --- vCPUs -------------------------------------------------------------------------------------------

    def vcpu_set_affinity(
        self, domid: int, vcpu: int, hard: Collection[int] | None = None, soft: Collection[int] | None = None
    ) -> tuple[frozenset[int], frozenset[int]]:
        """XEN_DOMCTL_setvcpuaffinity: pCPUs where it may run, and where it should; None leaves one as it is.

        Returns the pCPUs that are left of each within the domain's pool. EINVAL when none is left of the hard ones.
        """
        return domctl.set_vcpu_affinity(
            self._target(domid, Domctl.SETVCPUAFFINITY),
            vcpu,
            hard=None if hard is None else frozenset(hard),
            soft=None if soft is None else frozenset(soft),
        )

    def vcpu_get_affinity(self, domid: int, vcpu: int) -> tuple[frozenset[int], frozenset[int]]:
        """XEN_DOMCTL_getvcpuaffinity: hard and soft, as they were set."""
        return domctl.get_vcpu_affinity(self._target(domid, Domctl.GETVCPUAFFINITY), vcpu)

    def send_trigger(self, domid: int, trigger: int, vcpu: int = 0) -> None:
        """XEN_DOMCTL_sendtrigger. ESRCH without such a vCPU, EINVAL or ENOSYS for what this guest cannot be sent."""
        domctl.send_trigger(self._target(domid, Domctl.SENDTRIGGER), trigger, vcpu)

    # --- cpupools ----------------------------------------------------------------------------------------

    def _pools(self) -> Hypervisor:
        self._hypervisor.xsm.sysctl(self._dom0, Sysctl.CPUPOOL_OP)
        return self._hypervisor

    def cpupool_create(self, sched_id: int = SCHEDULER_CREDIT, poolid: int | None = None) -> int:
        """A new pool without pCPUs; its id. EEXIST for an id that is taken, ENOENT for a scheduler that is not here."""
        return cpupool_op.create(self._pools(), sched_id, poolid)

    def cpupool_destroy(self, poolid: int) -> None:
        """EBUSY while it has pCPUs or domains. ENOENT."""
        self._pools().cpupools.destroy(poolid)

    def cpupool_info(self, poolid: int) -> PoolInfo:
        """One pool. ENOENT."""
        return _info(self._pools().cpupools.get(poolid))

    def cpupool_list(self) -> list[PoolInfo]:
        """All pools, by id."""
        return sorted((_info(pool) for pool in self._pools().cpupools.list()), key=lambda info: info.poolid)

    def cpupool_add_cpu(self, poolid: int, cpu: int | None = None) -> None:
        """A free pCPU (None: the first) joins a pool. EINVAL, EBUSY when it is not free, ENOENT."""
        cpupool_op.assign_cpu(self._pools(), poolid, cpu)

    def cpupool_remove_cpu(self, poolid: int, cpu: int | None = None) -> None:
        """A pCPU (None: the last) leaves a pool. EBUSY for the last one of a pool with domains. EINVAL, ENOENT."""
        cpupool_op.unassign_cpu(self._pools(), poolid, cpu)

    def cpupool_move_domain(self, poolid: int, domid: int) -> None:
        """A domain changes pools. ESRCH, ENOENT for a pool without pCPUs, EINVAL for domain 0."""
        cpupool_op.move_domain(self._pools(), poolid, domid)

    def cpupool_free_cpus(self) -> frozenset[int]:
        """pCPUs of no pool."""
        return self._pools().cpupools.free_cpus

    # --- the scheduler's parameters ----------------------------------------------------------------------

    def sched_credit_parameters(self, poolid: int = 0) -> tuple[int, int]:
        """(time slice in ms, rate limit in µs) of a pool. ESRCH."""
        self._hypervisor.xsm.sysctl(self._dom0, Sysctl.SCHEDULER_OP)
        found = cpupool_op.pool_scheduler(self._hypervisor, poolid).global_parameters()
        return found["tslice_ms"], found["ratelimit_us"]

    def sched_credit_set_parameters(self, poolid: int, *, tslice_ms: int, ratelimit_us: int) -> None:
        """Change them. ESRCH, EINVAL."""
        self._hypervisor.xsm.sysctl(self._dom0, Sysctl.SCHEDULER_OP)
        if tslice_ms < 0 or ratelimit_us < 0:
            raise XenError(errno.EINVAL)
        ops = cpupool_op.pool_scheduler(self._hypervisor, poolid)
        ops.set_global(tslice_ms=tslice_ms, ratelimit_us=ratelimit_us)

    # --- the machine -------------------------------------------------------------------------------------

    def cpu_idle_times(self) -> list[int]:
        """XEN_SYSCTL_getcpuinfo: ns that each pCPU was idle."""
        self._hypervisor.xsm.sysctl(self._dom0, Sysctl.GETCPUINFO)
        return [self._hypervisor.scheduler.idle_time(cpu) for cpu in range(self._hypervisor.topology.nr_cpus)]

    def cpu_topology(self) -> list[CpuTopology]:
        """XEN_SYSCTL_cputopoinfo."""
        self._hypervisor.xsm.sysctl(self._dom0, Sysctl.CPUTOPOINFO)
        topology = self._hypervisor.topology
        places = (topology.place(cpu) for cpu in range(topology.nr_cpus))
        return [CpuTopology(place.cpu, place.core, place.socket, place.node) for place in places]

    def numa_info(self) -> list[NodeInfo]:
        """XEN_SYSCTL_numainfo."""
        self._hypervisor.xsm.sysctl(self._dom0, Sysctl.NUMAINFO)
        nodes = range(self._hypervisor.topology.nodes)
        found = []
        for node in nodes:
            size, free = cpupool_op.node_memory(self._hypervisor, node)
            distances = tuple(cpupool_op.distance(node, other) for other in nodes)
            found.append(NodeInfo(node, size * 4, free * 4, distances))
        return found


def _info(pool: CpuPool) -> PoolInfo:
    return PoolInfo(pool.poolid, pool.sched_id, pool.cpus, pool.n_dom)
