# SPDX-License-Identifier: GPL-2.0-only
"""HYPERVISOR_domctl: the versioned structures decoded (Xen 4.6: xen/common/domctl.c).

A guest's request is decoded and then refused by XSM, not by absence. dom0's software usually comes through the typed
functions
of privcmd, which act through the same functions.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Literal

from pyxen.abi import domctl as abi
from pyxen.abi.arch_x86 import GUEST_CONTEXT_SIZE, Vgcf
from pyxen.abi.domctl import Domctl, DomInf
from pyxen.errors import XenError
from pyxen.hypervisor.bitmap import from_xenctl_bitmap, to_xenctl_bitmap
from pyxen.hypervisor.domain import Domain, Dying
from pyxen.hypervisor.event_channel import MAX_EVTCHN_PORT
from pyxen.hypervisor.hypercall import Preempted
from pyxen.hypervisor.vcpu import PauseFlag, Vcpu
from pyxen.hypervisor.x86 import hypercall_page

_MAX_CONTROLLER_PAUSES = 255

if TYPE_CHECKING:
    from pyxen.hypervisor.hypercall import Caller
    from pyxen.hypervisor.hypervisor import Hypervisor


def getdomaininfo(domain: Domain) -> bytes:
    """struct xen_domctl_getdomaininfo of one domain."""
    flags = DomInf.HVM_GUEST if domain.is_hvm else DomInf(0)
    if domain.dying is not Dying.ALIVE:
        flags |= DomInf.DYING
    if domain.is_shut_down:
        flags |= DomInf.SHUTDOWN
    if domain.controller_pause_count > 0:
        flags |= DomInf.PAUSED
    online = [v for v in domain.vcpus if not v.pause_flags & PauseFlag.DOWN]
    if any(v.is_running for v in online):
        flags |= DomInf.RUNNING
    if online and all(v.pause_flags & PauseFlag.BLOCKED for v in online):
        flags |= DomInf.BLOCKED
    code = domain.shutdown_code & 0xFF if domain.is_shut_down else 0
    scheduler = domain.hypervisor.scheduler
    return abi.GETDOMAININFO.pack(
        domain.domid, flags | code << abi.DOMINF_SHUTDOWN_SHIFT, domain.tot_pages, domain.max_pages, 0, 0, 0,
        domain.shared_info_mfn, sum(scheduler.vcpu_cpu_time(v) for v in domain.vcpus), len(online),
        len(domain.vcpus) - 1 if domain.vcpus else abi.INVALID_MAX_VCPU_ID, 0, domain.handle, domain.cpupool,
    )


def _vcpu(domain: Domain, vcpu_id: int, *, missing: int = errno.ESRCH) -> Vcpu:
    if not 0 <= vcpu_id < domain.max_vcpus:
        raise XenError(errno.EINVAL)
    if vcpu_id >= len(domain.vcpus):
        raise XenError(missing)
    return domain.vcpus[vcpu_id]


def set_vcpu_context(domain: Domain, vcpu_id: int, data: bytes) -> None:
    """XEN_DOMCTL_setvcpucontext: the domain is paused meanwhile; VGCF_online says whether the vCPU is up after it."""
    vcpu = _vcpu(domain, vcpu_id)
    scheduler = domain.hypervisor.scheduler
    scheduler.domain_pause(domain)
    try:
        while not _set_context(vcpu, data):
            pass  # nobody is held up: the locks are let go of after each slice
        if int.from_bytes(data[512:520], "little") & Vgcf.ONLINE:
            scheduler.vcpu_up(vcpu)
        else:
            scheduler.vcpu_down(vcpu)
    finally:
        scheduler.domain_unpause(domain)


def _set_context(vcpu: Vcpu, data: bytes) -> bool:
    try:
        vcpu.arch.set_guest_context(data)
    except Preempted:
        return False
    return True


def get_vcpu_context(domain: Domain, vcpu_id: int) -> bytes:
    """XEN_DOMCTL_getvcpucontext: the vCPU is paused meanwhile. ENODATA for one that was never set up."""
    vcpu = _vcpu(domain, vcpu_id)
    scheduler = domain.hypervisor.scheduler
    scheduler.vcpu_pause(vcpu)
    try:
        return vcpu.arch.get_guest_context()
    finally:
        scheduler.vcpu_unpause(vcpu)


def set_vcpu_affinity(
    domain: Domain, vcpu_id: int, *, hard: frozenset[int] | None = None, soft: frozenset[int] | None = None
) -> tuple[frozenset[int], frozenset[int]]:
    """XEN_DOMCTL_setvcpuaffinity: where a vCPU may run and where it had better run; None leaves one as it is.

    Returns what comes of it: the hard affinity within the domain's pool, and the soft one within that. EINVAL when
    no pCPU of the pool is left, or when there is no such vCPU; nothing has changed then.
    """
    vcpu = _vcpu(domain, vcpu_id)
    hypervisor = domain.hypervisor
    everywhere = frozenset(range(hypervisor.topology.nr_cpus))
    online = hypervisor.cpupools.get(domain.cpupool).cpus
    wanted_hard = vcpu.hard_affinity if hard is None else hard & everywhere
    wanted_soft = vcpu.soft_affinity if soft is None else soft & everywhere
    if hard is not None and not hard & online:
        raise XenError(errno.EINVAL)
    # All of them is no affinity at all, also for pCPUs of other pools that the domain may come to.
    hypervisor.scheduler.vcpu_set_affinity(
        vcpu,
        None if wanted_hard == everywhere else wanted_hard,
        None if wanted_soft == everywhere else wanted_soft,
    )
    effective = online if wanted_hard is None else online & wanted_hard
    return effective, effective if wanted_soft is None else effective & wanted_soft


def get_vcpu_affinity(domain: Domain, vcpu_id: int) -> tuple[frozenset[int], frozenset[int]]:
    """XEN_DOMCTL_getvcpuaffinity: hard and soft, as they were set."""
    vcpu = _vcpu(domain, vcpu_id)
    everywhere = frozenset(range(domain.hypervisor.topology.nr_cpus))
    hard, soft = vcpu.hard_affinity, vcpu.soft_affinity
    return everywhere if hard is None else hard, everywhere if soft is None else soft


def _vcpu_affinity(caller: Caller, request: bytes, command: int, domain: Domain) -> None:
    limit = domain.hypervisor.topology.nr_cpus
    vcpu_id, flags, *maps = abi.VCPUAFFINITY.unpack_from(request, abi.UNION)
    wants_hard, wants_soft = bool(flags & abi.VCPUAFFINITY_HARD), bool(flags & abi.VCPUAFFINITY_SOFT)
    hard_map, soft_map = (maps[0], maps[1]), (maps[2], maps[3])
    _vcpu(domain, vcpu_id)
    if not flags or (wants_hard and not hard_map[0]) or (wants_soft and not soft_map[0]):
        raise XenError(errno.EINVAL)  # vcpuaffinity_params_invalid
    if command == Domctl.GETVCPUAFFINITY:
        hard, soft = get_vcpu_affinity(domain, vcpu_id)
    else:
        hard, soft = set_vcpu_affinity(
            domain,
            vcpu_id,
            hard=from_xenctl_bitmap(caller, *hard_map, limit) if wants_hard else None,
            soft=from_xenctl_bitmap(caller, *soft_map, limit) if wants_soft else None,
        )
    if wants_hard:
        to_xenctl_bitmap(caller, *hard_map, hard, limit)
    if wants_soft:
        to_xenctl_bitmap(caller, *soft_map, soft, limit)


def send_trigger(domain: Domain, trigger: int, vcpu_id: int) -> None:
    """XEN_DOMCTL_sendtrigger. ESRCH without such a vCPU; the buttons need an HVM guest's power management, which
    PV and PVH guests have not (EINVAL); reset and init are ENOSYS, in Xen too."""
    if not 0 <= vcpu_id < len(domain.vcpus):
        raise XenError(errno.ESRCH)
    if trigger == abi.SENDTRIGGER_NMI:
        vcpu = domain.vcpus[vcpu_id]
        if not vcpu.nmi_pending:
            vcpu.nmi_pending = True
            domain.hypervisor.scheduler.vcpu_kick(vcpu)
    elif trigger in (abi.SENDTRIGGER_POWER, abi.SENDTRIGGER_SLEEP):
        raise XenError(errno.EINVAL)
    else:
        raise XenError(errno.ENOSYS)


def set_max_mem(domain: Domain, kb: int) -> None:
    """XEN_DOMCTL_max_mem: may be below what the domain has; it then only cannot grow. EINVAL for a dying domain."""
    if domain.dying is not Dying.ALIVE:
        raise XenError(errno.EINVAL)
    domain.max_pages = kb >> 2
    if domain.is_hvm:
        domain.hvm.max_mem_changed()


def pause_by_controller(domain: Domain) -> None:
    """domain_pause_by_systemcontroller: counted, and the domain is not running when this returns. EUSERS past 255."""
    with domain.pause_lock:
        if domain.controller_pause_count >= _MAX_CONTROLLER_PAUSES:
            raise XenError(errno.EUSERS)
        domain.controller_pause_count += 1
    domain.hypervisor.scheduler.domain_pause(domain)


def unpause_by_controller(domain: Domain) -> None:
    """domain_unpause_by_systemcontroller. EINVAL if it is not paused."""
    with domain.pause_lock:
        if domain.controller_pause_count <= 0:
            raise XenError(errno.EINVAL)
        domain.controller_pause_count -= 1
    domain.hypervisor.scheduler.domain_unpause(domain)


def _create(hypervisor: Hypervisor, request: bytes, wanted: int) -> int:
    from pyxen.hypervisor.lifecycle import domain_create

    _ssidref, handle, flags = abi.CREATEDOMAIN.unpack_from(request, abi.UNION)
    if flags & ~(abi.CDF_HVM_GUEST | abi.CDF_HAP):
        raise XenError(errno.EINVAL)  # 4.6's own PVH among them: there is no more of it
    if bool(flags & abi.CDF_HAP) != bool(flags & abi.CDF_HVM_GUEST):
        raise XenError(errno.EINVAL)  # nor is there shadow paging
    kind: Literal["pv", "pvh"] = "pvh" if flags & abi.CDF_HVM_GUEST else "pv"
    return domain_create(hypervisor, handle, 1, "exact", wanted, kind=kind).domid


def do_domctl(caller: Caller, arg: int) -> int:
    """HYPERVISOR_domctl(op). EACCES for another interface version, ENOSYS for a command that is not here."""
    request = caller.read(arg, abi.SIZE)
    command, version, domid = abi.HEADER.unpack_from(request)
    if version != abi.INTERFACE_VERSION:
        raise XenError(errno.EACCES)
    current = caller.domain
    hypervisor = current.hypervisor
    if command in (Domctl.CREATEDOMAIN, Domctl.GETDOMAININFO):
        hypervisor.xsm.domctl(current, None, command)
        if command == Domctl.CREATEDOMAIN:
            created = _create(hypervisor, request, domid)
            caller.write(arg, abi.HEADER.pack(command, version, created))
            return 0
        later = [d for d in hypervisor.domains.copy().values() if d.domid >= domid]
        if not later:
            raise XenError(errno.ESRCH)
        found = min(later, key=lambda d: d.domid)
        caller.write(arg, abi.HEADER.pack(command, version, found.domid) + getdomaininfo(found))
        return 0
    domain = hypervisor.domain(domid, current)
    hypervisor.xsm.domctl(current, domain, command)
    if domain.is_privileged:
        raise XenError(errno.EINVAL)
    return _on_domain(caller, arg, request, command, domain)


def _on_domain(caller: Caller, arg: int, request: bytes, command: int, domain: Domain) -> int:
    from pyxen.hypervisor import lifecycle

    union = arg + abi.UNION
    if command == Domctl.DESTROYDOMAIN:
        if not lifecycle.domain_kill(domain):
            raise Preempted((arg,))
    elif command == Domctl.PAUSEDOMAIN:
        pause_by_controller(domain)
    elif command == Domctl.UNPAUSEDOMAIN:
        unpause_by_controller(domain)
    elif command == Domctl.MAX_MEM:
        set_max_mem(domain, abi.MAX_MEM.unpack_from(request, abi.UNION)[0])
    elif command == Domctl.MAX_VCPUS:
        (count,) = abi.MAX_VCPUS.unpack_from(request, abi.UNION)
        if not 1 <= count <= lifecycle.MAX_VCPUS or (domain.vcpus and count != len(domain.vcpus)):
            raise XenError(errno.EINVAL)
        if domain.vcpus:
            return 0
        if count != domain.max_vcpus:
            domain.arch.resize(count)
        domain.max_vcpus = count
        lifecycle.create_vcpus(domain)
    elif command == Domctl.SETVCPUCONTEXT:
        vcpu_id, handle = abi.VCPUCONTEXT.unpack_from(request, abi.UNION)
        set_vcpu_context(domain, vcpu_id, caller.read(handle, GUEST_CONTEXT_SIZE))
    elif command == Domctl.GETVCPUCONTEXT:
        vcpu_id, handle = abi.VCPUCONTEXT.unpack_from(request, abi.UNION)
        caller.write(handle, get_vcpu_context(domain, vcpu_id))
    elif command == Domctl.GETVCPUINFO:
        vcpu = _vcpu(domain, abi.GETVCPUINFO.unpack_from(request, abi.UNION)[0])
        flags = vcpu.pause_flags
        caller.write(union, abi.GETVCPUINFO.pack(
            vcpu.vcpu_id, not flags & PauseFlag.DOWN, bool(flags & PauseFlag.BLOCKED), vcpu.is_running,
            domain.hypervisor.scheduler.vcpu_cpu_time(vcpu), vcpu.processor))
    elif command in (Domctl.SETVCPUAFFINITY, Domctl.GETVCPUAFFINITY):
        _vcpu_affinity(caller, request, command, domain)
    elif command == Domctl.SENDTRIGGER:
        send_trigger(domain, *abi.SENDTRIGGER.unpack_from(request, abi.UNION))
    elif command == Domctl.SETDOMAINHANDLE:
        domain.handle = request[abi.UNION : abi.UNION + 16]
    elif command == Domctl.RESUMEDOMAIN:
        domain.hypervisor.scheduler.domain_resume(domain)
    elif command == Domctl.SCHEDULER_OP:
        scheduler_id, what, weight, cap = abi.SCHEDULER_OP.unpack_from(request, abi.UNION)
        if scheduler_id != abi.SCHEDULER_CREDIT or what not in (abi.SCHEDOP_PUTINFO, abi.SCHEDOP_GETINFO):
            raise XenError(errno.EINVAL)
        ops = domain.hypervisor.scheduler.ops
        if what == abi.SCHEDOP_PUTINFO:
            ops.adjust(domain, weight or None, None if cap == 0xFFFF else cap)
        weight, cap = ops.parameters(domain)
        caller.write(union, abi.SCHEDULER_OP.pack(scheduler_id, what, weight, cap))
    elif command == Domctl.SET_MAX_EVTCHN:
        domain.evtchn.max_port = min(int.from_bytes(request[abi.UNION : abi.UNION + 4], "little"), MAX_EVTCHN_PORT)
    elif command == Domctl.SHADOW_OP:
        return shadow_op(caller, union, request, domain)
    elif command == Domctl.HYPERCALL_INIT:
        hypercall_page.initialise(domain, abi.HYPERCALL_INIT.unpack_from(request, abi.UNION)[0])
    else:
        raise XenError(errno.ENOSYS)
    return 0


def shadow_op(caller: Caller, union: int, request: bytes, domain: Domain) -> int:
    """XEN_DOMCTL_shadow_op: log-dirty, and the size of the paging pool. XenError: EINVAL, ENOMEM, EFAULT."""
    from pyxen.hypervisor import log_dirty

    op, mode, mb, bitmap, pages, faults, dirty = abi.SHADOW_OP.unpack_from(request, abi.UNION)
    if op == abi.SHADOW_OP_ENABLE_LOGDIRTY or (op == abi.SHADOW_OP_ENABLE and mode == abi.SHADOW_ENABLE_LOG_DIRTY):
        log_dirty.enable(domain)
    elif op == abi.SHADOW_OP_OFF:
        log_dirty.disable(domain)
    elif op in (abi.SHADOW_OP_CLEAN, abi.SHADOW_OP_PEEK):
        pages = min(pages, log_dirty.MAX_PAGES)
        data, stats = (log_dirty.clean if op == abi.SHADOW_OP_CLEAN else log_dirty.peek)(domain, 0, pages)
        if bitmap:
            caller.write(bitmap, data)
        caller.write(union, abi.SHADOW_OP.pack(op, mode, mb, bitmap, pages, *stats))
    elif op in (abi.SHADOW_OP_GET_ALLOCATION, abi.SHADOW_OP_SET_ALLOCATION):
        if not domain.is_hvm:
            raise XenError(errno.EINVAL)
        if op == abi.SHADOW_OP_SET_ALLOCATION:
            domain.hvm.pool.set_limit(mb << 8)
        mb = domain.hvm.pool.limit + 255 >> 8
        caller.write(union, abi.SHADOW_OP.pack(op, mode, mb, bitmap, pages, faults, dirty))
    else:
        raise XenError(errno.EINVAL)
    return 0
