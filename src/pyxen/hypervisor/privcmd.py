# SPDX-License-Identifier: GPL-2.0-only
"""The hypervisor's only face to dom0's software: toolstack, xenstored, back ends.

Everything here acts as domain 0, passes XSM, and reaches the mechanisms through the same functions as a guest's
hypercall.  :meth:`PrivCmd.hypercall` takes a number and ABI bytes (what ``/dev/xen/privcmd`` takes from libxenctrl);
the other methods
are typed forms of what is used often.  All may be called from any thread; what takes long is ``async`` and yields.

Errors: XenError with Xen's errno.
"""

from __future__ import annotations

import asyncio
import errno
import struct
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pyxen.abi.domctl import Domctl
from pyxen.abi.sysctl import Sysctl
from pyxen.abi.xen import MASK64, DomId, EvtchnPort, Gfn, GrantRef, Hypercall, VcpuId
from pyxen.errors import GuestAccessError, InternalError, XenError
from pyxen.hypervisor import domctl, keyhandler, lifecycle
from pyxen.hypervisor.domain import Domain, Dying
from pyxen.hypervisor.foreign_map import Mapping
from pyxen.hypervisor.grant_map import BackendMapping, map_for_backend
from pyxen.hypervisor.hypercall import Preempted, call
from pyxen.hypervisor.hypercall_table import build_table
from pyxen.hypervisor.privcmd_hvm import HvmControl, populate
from pyxen.hypervisor.privcmd_sched import CpuTopology, NodeInfo, PoolInfo, SchedulerCalls
from pyxen.hypervisor.sysctl import hardware_caps
from pyxen.hypervisor.vcpu import PauseFlag, Vcpu
from pyxen.machine.cpu.base import HvmRegisters, Segment

if TYPE_CHECKING:
    from pyxen.hypervisor.hypervisor import Hypervisor
    from pyxen.hypervisor.x86.pv.domain import PvMode
    from pyxen.machine.cpu.base import Registers

_BUFFERS_AT = 0x10000
_OVERHEAD_KB = 1024


class Dom0Caller:
    """A hypercall's caller that is a process of dom0: its address space is the buffers it passed."""

    def __init__(self, domain: Domain, buffers: Sequence[bytearray] = ()) -> None:
        self.domain = domain
        self.vcpu: Vcpu | None = None
        self.preempt_at = 0
        self._buffers: list[tuple[int, bytearray]] = []
        at = _BUFFERS_AT
        for buffer in buffers:
            self._buffers.append((at, buffer))
            at += (len(buffer) + 0x1FFF) & ~0xFFF  # a hole after each, so that overruns fault

    def address(self, index: int) -> int:
        """Guest handle of buffer ``index``."""
        return self._buffers[index][0]

    def _find(self, address: int, size: int) -> tuple[bytearray, int]:
        for at, buffer in self._buffers:
            if at <= address and address + size <= at + len(buffer):
                return buffer, address - at
        raise GuestAccessError(address)

    def read(self, address: int, size: int) -> bytes:
        """Copy out of the buffers."""
        buffer, offset = self._find(address, size)
        return bytes(buffer[offset : offset + size])

    def write(self, address: int, data: bytes) -> None:
        """Copy into the buffers."""
        buffer, offset = self._find(address, len(data))
        buffer[offset : offset + len(data)] = data

    def read_u32(self, address: int) -> int:
        """A 32-bit word."""
        return int.from_bytes(self.read(address, 4), "little")

    def read_u64(self, address: int) -> int:
        """A 64-bit word."""
        return int.from_bytes(self.read(address, 8), "little")

    def write_u32(self, address: int, value: int) -> None:
        """Store a 32-bit word."""
        self.write(address, value.to_bytes(4, "little"))

    def write_u64(self, address: int, value: int) -> None:
        """Store a 64-bit word."""
        self.write(address, value.to_bytes(8, "little"))


@dataclass(frozen=True, slots=True)
class DomainInfo:
    """XEN_DOMCTL_getdomaininfo. Frames are pages of 4 KiB; ``cpu_time_ns`` is of all vCPUs."""

    domid: DomId
    handle: bytes
    tot_pages: int
    max_pages: int
    shared_info_mfn: int
    cpu_time_ns: int
    online_vcpus: int
    max_vcpus: int
    dying: bool
    shutdown: bool
    shutdown_code: int
    paused: bool
    blocked: bool
    running: bool
    cpupool: int
    pv_mode: str
    """"exact" or "fast" of a PV domain, else ""."""
    kind: str
    """"pv" or "pvh"."""
    crash_reason: str
    counters: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class VcpuInfo:
    """XEN_DOMCTL_getvcpuinfo and affinities (None: all pCPUs)."""

    vcpu: VcpuId
    online: bool
    blocked: bool
    running: bool
    cpu_time_ns: int
    cpu: int
    hard_affinity: frozenset[int] | None
    soft_affinity: frozenset[int] | None


@dataclass(frozen=True, slots=True)
class PhysInfo:
    """XEN_SYSCTL_physinfo. Memory in KiB."""

    nr_cpus: int
    nr_nodes: int
    sockets: int
    cores_per_socket: int
    threads_per_core: int
    cpu_khz: int
    total_kb: int
    free_kb: int
    hw_caps: tuple[int, ...]


class LocalPort:
    """An event channel of domain 0 with a callback for its upcall."""

    def __init__(self, dom0: Domain, port: EvtchnPort) -> None:
        self._dom0 = dom0
        self.port = port
        self._open = True

    def notify(self) -> None:
        """EVTCHNOP_send; a remote end that is gone swallows it, and so does a port that was closed."""
        if not self._open:
            return  # the port may be somebody else's now
        try:
            self._dom0.evtchn.send(self.port)
        except XenError as error:
            if error.errno != errno.EINVAL:
                raise

    def close(self) -> None:
        """EVTCHNOP_close. Idempotent."""
        if self._open:
            self._open = False
            self._dom0.evtchn.close(self.port)


def _counters(domain: Domain) -> dict[str, int]:
    counts = {
        f"hypercall_{Hypercall(number).name.lower()}": count
        for number, count in enumerate(domain.hypercall_counts)
        if count and number in Hypercall._value2member_map_
    }
    counts["hypercalls"] = sum(domain.hypercall_counts)
    counts["events_sent"] = domain.evtchn.events_sent
    for vcpu in domain.vcpus:
        for name, count in vcpu.arch.counters().items():
            counts[name] = counts.get(name, 0) + count
    return counts


class PrivCmd(HvmControl, SchedulerCalls):
    """See the module's text."""

    def __init__(self, hypervisor: Hypervisor) -> None:
        super().__init__(hypervisor)
        self._table = build_table(guest=False)

    # --- raw -------------------------------------------------------------------------------------------

    def hypercall(self, number: int, arguments: Sequence[int | bytearray]) -> int:
        """Make a hypercall as domain 0. A ``bytearray`` argument is passed as a handle to it and may be written.

        Returns the result (not negative); raises XenError for -errno. Continuations are followed.
        """
        for result in self._slices(number, arguments):
            if result is not None:
                return result
        raise InternalError("a hypercall ended without a result")

    async def hypercall_in_slices(self, number: int, arguments: Sequence[int | bytearray]) -> int:
        """:meth:`hypercall`, with the event loop free between its continuations (half a millisecond each)."""
        for result in self._slices(number, arguments):
            if result is not None:
                return result
            await asyncio.sleep(0)
        raise InternalError("a hypercall ended without a result")

    def _slices(self, number: int, arguments: Sequence[int | bytearray]) -> Iterator[int | None]:
        buffers = [a for a in arguments if isinstance(a, bytearray)]
        caller = Dom0Caller(self._dom0, buffers)
        addresses = iter(range(len(buffers)))
        words = tuple(caller.address(next(addresses)) if isinstance(a, bytearray) else a for a in arguments)
        words += (0,) * (6 - len(words))
        while True:
            try:
                result = call(caller, self._table, number, words)
            except Preempted as more:
                words = (*more.arguments, *words[len(more.arguments) :])
                yield None
                continue
            if result < 0:
                raise XenError(-result)
            yield result

    # --- domains -----------------------------------------------------------------------------------------

    def domain_create(self, handle: bytes, *, max_vcpus: int = 1, kind: lifecycle.Kind = "pv",
                      pv_mode: PvMode = "exact") -> DomId:
        """A new domain with its vCPUs (down) and no memory, paused once by its controller. ``pv_mode`` is of PV
        domains. EOPNOTSUPP for a PVH domain on engines without nested paging."""
        self._hypervisor.xsm.domctl(self._dom0, None, Domctl.CREATEDOMAIN)
        domain = lifecycle.domain_create(self._hypervisor, handle, max_vcpus, pv_mode, kind=kind)
        lifecycle.create_vcpus(domain)
        return domain.domid

    def domain_pause_for_destroy(self, domid: int) -> None:
        """Mark the domain dying; nothing of it runs when this returns."""
        domain = self._target(domid, Domctl.DESTROYDOMAIN)
        lifecycle.domain_begin_kill(domain)

    async def domain_destroy(self, domid: int) -> None:
        """Destroy in slices of half a millisecond. Cancelled, it can be called again and goes on. ESRCH if it is
        gone."""
        domain = self._target(domid, Domctl.DESTROYDOMAIN)
        done = False
        while not done:
            done = lifecycle.domain_kill(domain)
            await asyncio.sleep(0)  # each slice is short: let others in between

    def domain_pause(self, domid: int) -> None:
        """XEN_DOMCTL_pausedomain; counted."""
        domctl.pause_by_controller(self._target(domid, Domctl.PAUSEDOMAIN))

    def domain_unpause(self, domid: int) -> None:
        """XEN_DOMCTL_unpausedomain. EINVAL if it is not paused."""
        domctl.unpause_by_controller(self._target(domid, Domctl.UNPAUSEDOMAIN))

    def domain_shutdown(self, domid: int, code: int) -> None:
        """SCHEDOP_remote_shutdown: the domain stops where it is, with this reason."""
        domain = lifecycle.find(self._hypervisor, domid)
        self._hypervisor.xsm.schedop_shutdown(self._dom0, domain)
        if domain.is_privileged:
            raise XenError(errno.EINVAL)
        self._hypervisor.scheduler.domain_shutdown(domain, code)

    def domain_set_handle(self, domid: int, handle: bytes) -> None:
        """XEN_DOMCTL_setdomainhandle: 16 bytes."""
        if len(handle) != 16:
            raise XenError(errno.EINVAL)
        self._target(domid, Domctl.SETDOMAINHANDLE).handle = handle

    def domain_info(self, domid: int) -> DomainInfo | None:
        """State of one domain; None if there is none with this id."""
        self._hypervisor.reap()
        domain = self._hypervisor.domains.get(DomId(domid))
        if domain is None:
            return None
        scheduler = self._hypervisor.scheduler
        online = [v for v in domain.vcpus if not v.pause_flags & PauseFlag.DOWN]
        return DomainInfo(
            domid=domain.domid, handle=domain.handle, tot_pages=domain.tot_pages, max_pages=domain.max_pages,
            shared_info_mfn=domain.shared_info_mfn, cpu_time_ns=sum(scheduler.vcpu_cpu_time(v) for v in domain.vcpus),
            online_vcpus=len(online), max_vcpus=domain.max_vcpus, dying=domain.dying is not Dying.ALIVE,
            shutdown=domain.is_shut_down, shutdown_code=domain.shutdown_code if domain.is_shut_down else -1,
            paused=domain.controller_pause_count > 0,
            blocked=bool(online) and all(v.pause_flags & PauseFlag.BLOCKED for v in online),
            running=any(v.is_running for v in online), cpupool=domain.cpupool,
            pv_mode="" if domain.is_privileged or domain.is_hvm else domain.pv.mode,
            kind="pv" if domain.is_privileged else domain.arch.kind,
            crash_reason=domain.crash_reason, counters=_counters(domain),
        )

    def domain_list(self) -> list[DomainInfo]:
        """All domains, domain 0 first."""
        self._hypervisor.reap()
        found = (self.domain_info(domid) for domid in sorted(self._hypervisor.domains.copy()))
        return [info for info in found if info is not None]

    def counters(self, domid: int) -> dict[str, int]:
        """What a domain did so far: hypercalls by name, exceptions, system calls, emulated instructions, events."""
        return _counters(lifecycle.find(self._hypervisor, domid))

    def vcpu_info(self, domid: int) -> list[VcpuInfo]:
        """Every vCPU of a domain. ESRCH."""
        domain = lifecycle.find(self._hypervisor, domid)
        scheduler = self._hypervisor.scheduler
        return [
            VcpuInfo(
                v.vcpu_id, not v.pause_flags & PauseFlag.DOWN, bool(v.pause_flags & PauseFlag.BLOCKED), v.is_running,
                scheduler.vcpu_cpu_time(v), v.processor, v.hard_affinity, v.soft_affinity,
            )
            for v in domain.vcpus
        ]

    def vcpu_set_context(self, domid: int, vcpu: int, context: bytes) -> None:
        """XEN_DOMCTL_setvcpucontext: struct vcpu_guest_context (5168 bytes)."""
        domctl.set_vcpu_context(self._target(domid, Domctl.SETVCPUCONTEXT), vcpu, context)

    def vcpu_get_context(self, domid: int, vcpu: int = 0) -> bytes:
        """XEN_DOMCTL_getvcpucontext: struct vcpu_guest_context."""
        return domctl.get_vcpu_context(self._target(domid, Domctl.GETVCPUCONTEXT), vcpu)

    def vcpu_registers(self, domid: int, vcpu: int = 0) -> Registers:
        """Registers of a vCPU, which is paused for the moment of reading. ENODATA if it was never set up."""
        domain = self._target(domid, Domctl.GETVCPUCONTEXT)
        if not 0 <= vcpu < len(domain.vcpus):
            raise XenError(errno.EINVAL)
        target = domain.vcpus[vcpu]
        scheduler = self._hypervisor.scheduler
        scheduler.vcpu_pause(target)
        try:
            if target.context is None:
                raise XenError(errno.ENODATA)
            return target.context.get()
        finally:
            scheduler.vcpu_unpause(target)

    def read_guest(self, domid: int, va: int, size: int, vcpu: int = 0) -> bytes:
        """Memory at a linear address, by the tables a vCPU has loaded or, where they show nothing, by its kernel's:
        which of the two are loaded is a matter of chance. EFAULT where nothing is mapped."""
        domain = self._target(domid, Domctl.GETVCPUCONTEXT)
        if not 0 <= vcpu < len(domain.vcpus):
            raise XenError(errno.EINVAL)
        target = domain.vcpus[vcpu]
        scheduler = self._hypervisor.scheduler
        scheduler.vcpu_pause(target)
        try:
            try:
                return target.arch.read(va, size)
            except GuestAccessError:
                return target.arch.read_as_kernel(va, size)
        finally:
            scheduler.vcpu_unpause(target)

    # --- memory -------------------------------------------------------------------------------------------

    def max_mem(self, domid: int, kb: int) -> None:
        """XEN_DOMCTL_max_mem, in KiB."""
        domctl.set_max_mem(self._target(domid, Domctl.MAX_MEM), kb)

    def domain_overhead_kb(self, memory_kb: int, max_vcpus: int) -> int:
        """What the hypervisor needs beside a domain's own memory: shared info, grant frames, per-domain tables."""
        del memory_kb  # frames' own bookkeeping is paid for by the host
        return _OVERHEAD_KB + 8 * max_vcpus

    def populate_physmap(self, domid: int, pfns: Sequence[int]) -> list[range]:
        """XENMEM_populate_physmap in bulk: frames as contiguous runs, in the order of ``pfns``. ENOMEM: all or
        nothing. Those of a translated domain are entered in its p2m, by superpages where both sides are aligned (the
        paging pool running out is ENOMEM, too: the frames are then the domain's, without a place)."""
        domain = lifecycle.find(self._hypervisor, domid)
        self._hypervisor.xsm.memory_adjust_reservation(self._dom0, domain)
        frames = self._hypervisor.frames
        if domain.is_hvm:
            return populate(domain, pfns)
        runs = frames.alloc_domheap_many(domain, len(pfns))
        done = 0
        for run in runs:
            frames.m2p.set_run(run.start, array("Q", pfns[done : done + len(run)]))
            done += len(run)
        if domain.log_dirty is not None:
            domain.log_dirty.mark_many(pfns)
        return runs

    def set_memory_map(self, domid: int, entries: Sequence[tuple[int, int, int]]) -> None:
        """XENMEM_set_memory_map: E820 entries (address, size, type)."""
        domain = lifecycle.find(self._hypervisor, domid)
        self._hypervisor.xsm.domain_memory_map(self._dom0, domain)
        domain.arch.memory_map = list(entries)

    async def mmuext_op(self, domid: int, operations: bytes) -> None:
        """HYPERVISOR_mmuext_op on another domain's tables: an array of struct mmuext_op. In slices: pinning a
        guest's first root validates every page table it has."""
        count = len(operations) // 24
        await self.hypercall_in_slices(Hypercall.MMUEXT_OP, [bytearray(operations), count, 0, domid])

    def gnttab_map(self, domid: int, refs: Sequence[GrantRef], writable: bool = True) -> list[BackendMapping]:
        """GNTTABOP_map_grant_ref as a back end does; all or nothing."""
        domain = lifecycle.find(self._hypervisor, domid)
        return map_for_backend(self._dom0, domain, refs, readonly=not writable)

    # --- events --------------------------------------------------------------------------------------------

    def evtchn_alloc_unbound(self, domid: int, remote_domid: int = 0) -> EvtchnPort:
        """EVTCHNOP_alloc_unbound in ``domid`` for ``remote_domid``; the port in ``domid``."""
        domain = lifecycle.find(self._hypervisor, domid)
        return domain.evtchn.alloc_unbound(DomId(remote_domid), self._dom0)

    def evtchn_bind_interdomain(self, remote_domid: int, remote_port: int, callback: Callable[[], None]) -> LocalPort:
        """Bind to a domain's unbound port. ``callback`` runs on the thread that notifies: it hands over and returns."""
        remote = lifecycle.find(self._hypervisor, remote_domid)
        port = self._dom0.evtchn.bind_interdomain(remote, remote_port)
        self._dom0.evtchn.bind_consumer(port, lambda _port: callback())
        return LocalPort(self._dom0, port)

    def bind_virq(self, virq: int, callback: Callable[[], None]) -> LocalPort:
        """Bind a global VIRQ of the host."""
        port = self._dom0.evtchn.bind_virq(virq, 0)
        self._dom0.evtchn.bind_consumer(port, lambda _port: callback())
        return LocalPort(self._dom0, port)

    # --- scheduler -------------------------------------------------------------------------------------------

    def sched_credit_set(self, domid: int, *, weight: int | None = None, cap: int | None = None) -> None:
        """Credit parameters. EINVAL out of range."""
        self._hypervisor.scheduler.ops.adjust(self._target(domid, Domctl.SCHEDULER_OP), weight, cap)

    def sched_credit_get(self, domid: int) -> tuple[int, int]:
        """(weight, cap)."""
        return self._hypervisor.scheduler.ops.parameters(self._target(domid, Domctl.SCHEDULER_OP))

    # --- host ------------------------------------------------------------------------------------------------

    def physinfo(self) -> PhysInfo:
        """XEN_SYSCTL_physinfo."""
        hypervisor = self._hypervisor
        hypervisor.xsm.sysctl(self._dom0, Sysctl.PHYSINFO)
        topology = hypervisor.topology
        return PhysInfo(
            nr_cpus=topology.nr_cpus, nr_nodes=topology.nodes, sockets=topology.sockets,
            cores_per_socket=topology.cores, threads_per_core=topology.threads, cpu_khz=hypervisor.tsc.hz // 1000,
            total_kb=hypervisor.memory.nr_frames * 4, free_kb=hypervisor.allocator.free_frames * 4,
            hw_caps=hardware_caps(),
        )

    def console_ring(self, *, clear: bool = False) -> str:
        """XEN_SYSCTL_readconsole: the text ``xl dmesg`` prints."""
        self._hypervisor.xsm.readconsole(self._dom0, clear)
        return self._hypervisor.log.read(clear=clear).decode("utf-8", "replace")

    def debug_keys(self, keys: str) -> None:
        """XEN_SYSCTL_debug_keys."""
        self._hypervisor.xsm.sysctl(self._dom0, Sysctl.DEBUG_KEYS)
        for key in keys:
            keyhandler.handle(self._hypervisor, key)

    def domain_memory_word(self, domid: int, offset: int) -> int:
        """A 64-bit word of a domain's shared_info."""
        domain = lifecycle.find(self._hypervisor, domid)
        if not 0 <= offset <= 4088 or not domain.shared_info_mfn:
            raise XenError(errno.EINVAL)
        (value,) = struct.unpack_from("<Q", self._hypervisor.memory.b, (domain.shared_info_mfn << 12) + offset)
        return int(value) & MASK64


__all__ = [
    "CpuTopology", "Dom0Caller", "DomainInfo", "Gfn", "HvmRegisters", "LocalPort", "Mapping", "NodeInfo", "PhysInfo",
    "PoolInfo", "PrivCmd", "Segment", "VcpuInfo",
]
