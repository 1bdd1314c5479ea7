# SPDX-License-Identifier: GPL-2.0-only
"""XEN_SYSCTL_cpupool_op and the rest of what sysctl knows of scheduling (Xen: ``cpupool_do_sysctl`` in
xen/common/cpupool.c, ``sched_adjust_global`` in xen/common/schedule.c): structures decoded, mechanisms called.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from pyxen.abi import sysctl as abi
from pyxen.abi.domctl import SCHEDULER_CREDIT
from pyxen.abi.sysctl import CpupoolOp
from pyxen.abi.xen import DomId
from pyxen.errors import XenError
from pyxen.hypervisor.bitmap import to_xenctl_bitmap

if TYPE_CHECKING:
    from pyxen.hypervisor.cpupool import CpuPool
    from pyxen.hypervisor.hypercall import Caller
    from pyxen.hypervisor.hypervisor import Hypervisor
    from pyxen.hypervisor.sched.base import Scheduler

_ANY = abi.CPUPOOL_PAR_ANY


def pool_at_or_after(hypervisor: Hypervisor, poolid: int) -> CpuPool:
    """cpupool_get_next_by_id(): the pool with the lowest id that is not below ``poolid``. XenError(ENOENT)."""
    found = [pool for pool in hypervisor.cpupools.list() if pool.poolid >= poolid]
    if not found:
        raise XenError(errno.ENOENT)
    return min(found, key=lambda pool: pool.poolid)


def create(hypervisor: Hypervisor, sched_id: int, poolid: int | None) -> int:
    """XEN_SYSCTL_CPUPOOL_OP_CREATE: a pool without pCPUs; its id. ENOENT (scheduler_alloc) for a scheduler that is not
    here, EEXIST."""
    if sched_id != SCHEDULER_CREDIT:
        raise XenError(errno.ENOENT)
    return hypervisor.cpupools.create(sched_id, poolid).poolid


def assign_cpu(hypervisor: Hypervisor, poolid: int, cpu: int | None) -> None:
    """XEN_SYSCTL_CPUPOOL_OP_ADDCPU: a free pCPU (None: the first free one) joins a pool. EINVAL, EBUSY, ENOENT."""
    free = hypervisor.cpupools.free_cpus
    if cpu is None:
        cpu = min(free, default=_ANY)
    if not 0 <= cpu < hypervisor.topology.nr_cpus:
        raise XenError(errno.EINVAL)
    if cpu not in free:
        raise XenError(errno.EBUSY)
    hypervisor.cpupools.add_cpu(hypervisor.cpupools.get(poolid), cpu)


def unassign_cpu(hypervisor: Hypervisor, poolid: int, cpu: int | None) -> None:
    """XEN_SYSCTL_CPUPOOL_OP_RMCPU: a pCPU (None: the last one) leaves a pool and is free; no error when it was not
    there. ENOENT, EINVAL, EBUSY."""
    pool = hypervisor.cpupools.get(poolid)
    if cpu is None:
        cpu = max(pool.cpus, default=_ANY)
    if not 0 <= cpu < hypervisor.topology.nr_cpus:
        raise XenError(errno.EINVAL)
    if cpu in pool.cpus:
        hypervisor.cpupools.remove_cpu(pool, cpu)


def move_domain(hypervisor: Hypervisor, poolid: int, domid: int) -> None:
    """XEN_SYSCTL_CPUPOOL_OP_MOVEDOMAIN. ESRCH, EINVAL for domain 0, ENOENT for a pool that is not there or empty."""
    domain = hypervisor.domains.get(DomId(domid))
    if domain is None:
        raise XenError(errno.ESRCH)
    if domain.is_privileged:
        raise XenError(errno.EINVAL)  # it is the caller (rcu_lock_remote_domain_by_id), and runs on no pCPU of ours
    if domain.cpupool == poolid:
        return
    pool = hypervisor.cpupools.get(poolid)
    if not pool.cpus:
        raise XenError(errno.ENOENT)
    hypervisor.cpupools.move_domain(pool, domain)


def cpupool_op(caller: Caller, union: int, request: bytes) -> None:
    """XEN_SYSCTL_cpupool_op; ``union`` is where the answer goes, ``request`` the whole sysctl. Raises XenError."""
    hypervisor = caller.domain.hypervisor
    op, poolid, sched_id, domid, cpu, n_dom, handle, nr_bits = abi.CPUPOOL_OP.unpack_from(request, abi.UNION)
    one_cpu = None if cpu == _ANY else cpu
    limit = hypervisor.topology.nr_cpus
    if op == CpupoolOp.CREATE:
        poolid = create(hypervisor, sched_id, None if poolid == _ANY else poolid)
    elif op == CpupoolOp.DESTROY:
        hypervisor.cpupools.destroy(poolid)
    elif op == CpupoolOp.INFO:
        pool = pool_at_or_after(hypervisor, poolid)
        poolid, sched_id, n_dom = pool.poolid, pool.sched_id, pool.n_dom
        to_xenctl_bitmap(caller, handle, nr_bits, pool.cpus, limit)
    elif op == CpupoolOp.ADDCPU:
        assign_cpu(hypervisor, poolid, one_cpu)
    elif op == CpupoolOp.RMCPU:
        unassign_cpu(hypervisor, poolid, one_cpu)
    elif op == CpupoolOp.MOVEDOMAIN:
        move_domain(hypervisor, poolid, domid)
    elif op == CpupoolOp.FREEINFO:
        to_xenctl_bitmap(caller, handle, nr_bits, hypervisor.cpupools.free_cpus, limit)
    else:
        raise XenError(errno.ENOSYS)
    caller.write(union, abi.CPUPOOL_OP.pack(op, poolid, sched_id, domid, cpu, n_dom, handle, nr_bits))


# --- parameters of a pool's scheduler -----------------------------------------------------------------------


def pool_scheduler(hypervisor: Hypervisor, poolid: int) -> Scheduler:
    """The policy that runs a pool. ESRCH (sched_adjust_global) when there is no such pool."""
    try:
        hypervisor.cpupools.get(poolid)
    except XenError:
        raise XenError(errno.ESRCH) from None
    return hypervisor.scheduler.ops


def scheduler_op(caller: Caller, union: int, request: bytes) -> None:
    """XEN_SYSCTL_scheduler_op: time slice and rate limit. ESRCH, EINVAL."""
    poolid, sched_id, command, tslice_ms, ratelimit_us = abi.SCHEDULER_OP.unpack_from(request, abi.UNION)
    if command not in (abi.SCHEDOP_PUTINFO, abi.SCHEDOP_GETINFO):
        raise XenError(errno.EINVAL)
    ops = pool_scheduler(caller.domain.hypervisor, poolid)
    if sched_id != SCHEDULER_CREDIT:
        raise XenError(errno.EINVAL)
    if command == abi.SCHEDOP_PUTINFO:
        ops.set_global(tslice_ms=tslice_ms, ratelimit_us=ratelimit_us)
    now = ops.global_parameters()
    caller.write(union, abi.SCHEDULER_OP.pack(poolid, sched_id, command, now["tslice_ms"], now["ratelimit_us"]))


# --- pCPUs and nodes ----------------------------------------------------------------------------------------


def getcpuinfo(caller: Caller, union: int, request: bytes) -> None:
    """XEN_SYSCTL_getcpuinfo: ns that each pCPU was idle."""
    hypervisor = caller.domain.hypervisor
    limit, handle, _ = abi.GETCPUINFO.unpack_from(request, abi.UNION)
    count = min(limit, hypervisor.topology.nr_cpus)
    idle = hypervisor.scheduler.idle_time
    if count:
        caller.write(handle, b"".join(abi.CPUINFO.pack(idle(cpu)) for cpu in range(count)))
    caller.write(union, abi.GETCPUINFO.pack(limit, handle, count))


def cputopoinfo(caller: Caller, union: int, request: bytes) -> None:
    """XEN_SYSCTL_cputopoinfo: core, socket and node of each pCPU; without a buffer, how many there are."""
    topology = caller.domain.hypervisor.topology
    limit, handle = abi.CPUTOPOINFO.unpack_from(request, abi.UNION)
    count = topology.nr_cpus
    if handle:
        count = min(count, limit)
        places = [topology.place(cpu) for cpu in range(count)]
        caller.write(handle, b"".join(abi.CPUTOPO.pack(place.core, place.socket, place.node) for place in places))
    caller.write(union, abi.CPUTOPOINFO.pack(count, handle))


def distance(node: int, other: int) -> int:
    """__node_distance(): ACPI SLIT's 10 of a node to itself, and 20 to any other."""
    return 10 if node == other else 20


def node_memory(hypervisor: Hypervisor, node: int) -> tuple[int, int]:
    """Frames of a node, and how many of them are free."""
    return len(hypervisor.memory.node_range(node)), hypervisor.allocator.free_frames_of_node(node)


def numainfo(caller: Caller, union: int, request: bytes) -> None:
    """XEN_SYSCTL_numainfo: memory (bytes) and distances of nodes; without buffers, how many nodes there are."""
    hypervisor = caller.domain.hypervisor
    limit, meminfo, distances = abi.NUMAINFO.unpack_from(request, abi.UNION)
    count = hypervisor.topology.nodes
    if meminfo or distances:
        count = min(count, limit)
        if meminfo:
            frames = [node_memory(hypervisor, node) for node in range(count)]
            caller.write(meminfo, b"".join(abi.MEMINFO.pack(size << 12, free << 12) for size, free in frames))
        if distances:
            rows = [distance(a, b).to_bytes(4, "little") for a in range(count) for b in range(count)]
            caller.write(distances, b"".join(rows))
    caller.write(union, abi.NUMAINFO.pack(count, meminfo, distances))
