# SPDX-License-Identifier: GPL-2.0-only
"""Creating and destroying domains (Xen: xen/common/domain.c, xen/arch/x86/domain.c, domctl.c).

Destroying is incremental: :func:`domain_kill` does a slice of it and says whether it is done; whoever drives it can
stop between
slices and go on later.  From the first slice on the domain is *dying* and runs no more.
"""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING, Final, Literal, get_args

from pyxen.abi.xen import MAX_LEGACY_VCPUS, VCPU_INFO_SIZE, DomId, VcpuId, Virq
from pyxen.errors import XenError
from pyxen.hypervisor.domain import Domain, Dying
from pyxen.hypervisor.event_channel import EventChannels
from pyxen.hypervisor.grant_table import GrantTable
from pyxen.hypervisor.schedule import vcpu_down_at_creation
from pyxen.hypervisor.time import update_domain_wallclock, update_vcpu_system_time
from pyxen.hypervisor.vcpu import Vcpu
from pyxen.hypervisor.vcpu_info import unmap_vcpu_info
from pyxen.hypervisor.x86.hvm.domain import HvmDomain
from pyxen.hypervisor.x86.pv.domain import PvDomain, PvMode
from pyxen.machine.cpu.base import HvmCpu

if TYPE_CHECKING:
    from pyxen.hypervisor.arch import ArchDomain
    from pyxen.hypervisor.hypervisor import Hypervisor

Kind = Literal["pv", "pvh"]

MAX_VCPUS: Final = 128
"""Of a PV domain in this version; the ABI's own limit is 8192 with vcpu_info registered."""


def domain_create(hypervisor: Hypervisor, handle: bytes, max_vcpus: int, mode: PvMode, wanted: int = 0, *,
                  kind: Kind = "pv") -> Domain:
    """A new domain: paused by its controller, no memory, no vCPU. ENOMEM without frames, EINVAL for a wrong count,
    kind or mode, or when the domain id that is ``wanted`` is taken, EOPNOTSUPP for a kind that the engines cannot
    run."""
    if not 1 <= max_vcpus <= MAX_VCPUS or len(handle) != 16 or mode not in get_args(PvMode) or (
            kind not in get_args(Kind)):
        raise XenError(errno.EINVAL)
    if kind == "pvh" and not all(isinstance(pcpu.cpu, HvmCpu) for pcpu in hypervisor.pcpus):
        raise XenError(errno.EOPNOTSUPP, "this host's CPU engines cannot run guests under nested paging")
    domid = hypervisor.new_domid(wanted)
    domain = Domain(hypervisor, domid, max_vcpus=max_vcpus, handle=handle)
    domain.is_hvm = kind == "pvh"
    domain.controller_pause_count = domain.pause_count = 1
    domain.evtchn = EventChannels(domain)
    domain.grant_table = GrantTable(domain)
    try:
        domain.arch = _arch(domain, mode)
        try:
            domain.shared_info_mfn = hypervisor.frames.alloc_xenheap(domain)
        except XenError:
            domain.arch.release()
            raise
    except XenError:
        domain.grant_table.destroy()
        hypervisor.frames.forget(domain)
        raise
    hypervisor.frames.domains[domid] = domain
    hypervisor.cpupools.admit(domain)
    hypervisor.scheduler.domain_init(domain)
    update_domain_wallclock(domain)
    with hypervisor.domain_list:
        hypervisor.domains[domid] = domain
    return domain


def _arch(domain: Domain, mode: PvMode) -> ArchDomain:
    """arch_domain_create()."""
    if domain.is_hvm:
        domain.hvm = HvmDomain(domain)
        return domain.hvm
    domain.pv = PvDomain(domain, domain.hypervisor.xen_slots, mode)
    return domain.pv


def create_vcpus(domain: Domain) -> None:
    """XEN_DOMCTL_max_vcpus: allocate the domain's vCPUs, all of them down."""
    hypervisor = domain.hypervisor
    for vcpu_id in range(len(domain.vcpus), domain.max_vcpus):
        vcpu = Vcpu(domain, VcpuId(vcpu_id))
        vcpu.arch = domain.arch.new_vcpu(vcpu)
        if vcpu_id < MAX_LEGACY_VCPUS:
            vcpu.info_maddr = (domain.shared_info_mfn << 12) + vcpu_id * VCPU_INFO_SIZE
        domain.vcpus.append(vcpu)
        vcpu_down_at_creation(vcpu)
        hypervisor.scheduler.vcpu_init(vcpu)
        if vcpu.info_maddr:
            update_vcpu_system_time(vcpu)


def domain_begin_kill(domain: Domain) -> None:
    """First slice: nothing of the domain runs from here on, and every vCPU is off its engine."""
    hypervisor = domain.hypervisor
    # First stop it (synchronous: no engine is inside when this returns), then mark it: whoever sees it dying may take
    # it apart.
    hypervisor.scheduler.domain_pause(domain)
    with domain.lock:
        first = domain.dying is Dying.ALIVE
        if first:
            domain.dying = Dying.DYING
    if not first:
        hypervisor.scheduler.domain_unpause(domain)
        return
    for vcpu in domain.vcpus:
        hypervisor.scheduler.vcpu_stop_timers(vcpu)


def domain_kill(domain: Domain) -> bool:
    """One slice (about half a millisecond) of destroying ``domain``; True when it holds nothing any more."""
    if domain.dying is Dying.ALIVE:
        domain_begin_kill(domain)
        return False
    if not domain.teardown.acquire(blocking=False):
        return False  # another thread is at it; nobody waits here
    try:
        if domain.dying is Dying.DEAD:
            return True
        if not _relinquish(domain):
            return False
    finally:
        domain.teardown.release()
    domain.hypervisor.send_global_virq(Virq.DOM_EXC)
    domain.hypervisor.reap()
    return True


def _relinquish(domain: Domain) -> bool:
    if not domain.evtchn.destroy():
        return False
    if not domain.grant_table.release_mappings():
        return False
    for vcpu in domain.vcpus:
        vcpu.arch.destroy()
        if vcpu.info_mfn is not None:
            unmap_vcpu_info(vcpu)
    if not domain.arch.relinquish_memory():
        return False
    _finish(domain.hypervisor, domain)
    return True


def _finish(hypervisor: Hypervisor, domain: Domain) -> None:
    for vcpu in domain.vcpus:
        hypervisor.scheduler.vcpu_destroy(vcpu)
        vcpu.info_maddr = 0
    hypervisor.scheduler.domain_destroy(domain)
    domain.grant_table.destroy()
    hypervisor.frames.free_xenheap(domain.shared_info_mfn)
    domain.shared_info_mfn = 0
    domain.arch.release()
    hypervisor.global_virqs.forget(domain)
    domain.dying = Dying.DEAD


def find(hypervisor: Hypervisor, domid: int) -> Domain:
    """A domain a control operation may name: not the special ones. Raises XenError(ESRCH)."""
    domain = hypervisor.domains.get(DomId(domid))
    if domain is None:
        raise XenError(errno.ESRCH)
    return domain


def on_this_engine(domain: Domain) -> bool:
    """Whether the calling thread is the one that runs ``domain``."""
    return domain.evtchn.home_thread == threading.get_ident()
