# SPDX-License-Identifier: GPL-2.0-only
"""HYPERVISOR_sched_op (Xen: do_sched_op, do_poll, domain_watchdog in xen/common/schedule.c)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from pyxen.abi.sched import (
    NR_DOMAIN_WATCHDOG_TIMERS,
    POLL_MAX_PORTS,
    SCHED_POLL,
    SCHED_REMOTE_SHUTDOWN,
    SCHED_SHUTDOWN,
    SCHED_WATCHDOG,
    TRC_SCHED_SHUTDOWN_CODE,
    SchedOp,
)
from pyxen.abi.xen import DOMID_FIRST_RESERVED, VI_UPCALL_MASK, DomId
from pyxen.errors import XenError
from pyxen.hypervisor.domain import Dying, ShutdownCode
from pyxen.hypervisor.timer import Timer

if TYPE_CHECKING:
    from pyxen.hypervisor.domain import Domain
    from pyxen.hypervisor.hypercall import Caller
    from pyxen.hypervisor.vcpu import Vcpu

NS_PER_S: Final = 1_000_000_000


def do_sched_op(caller: Caller, cmd: int, arg: int) -> int:
    """SCHEDOP_*. Raises XenError: ENOSYS for what 4.6 does not know, EFAULT, and those of the operations."""
    domain = caller.domain
    scheduler = domain.hypervisor.scheduler
    if cmd == SchedOp.BLOCK:
        _block_enable_events(_vcpu(caller))
    elif cmd == SchedOp.YIELD:
        scheduler.vcpu_yield(_vcpu(caller))
    elif cmd == SchedOp.POLL:
        ports, count, timeout = SCHED_POLL.unpack(caller.read(arg, SCHED_POLL.size))
        do_poll(caller, ports, count, timeout)
    elif cmd == SchedOp.SHUTDOWN:
        (reason,) = SCHED_SHUTDOWN.unpack(caller.read(arg, SCHED_SHUTDOWN.size))
        scheduler.domain_shutdown(domain, reason & 0xFF)
    elif cmd == SchedOp.SHUTDOWN_CODE:
        (reason,) = SCHED_SHUTDOWN.unpack(caller.read(arg, SCHED_SHUTDOWN.size))
        trace = domain.hypervisor.trace
        if trace.enabled:
            trace.event(TRC_SCHED_SHUTDOWN_CODE, caller.vcpu, domain.domid, 0, reason)
        with domain.shutdown_lock:
            if domain.shutdown_code == -1:
                domain.shutdown_code = reason & 0xFF
    elif cmd == SchedOp.REMOTE_SHUTDOWN:
        domid, reason = SCHED_REMOTE_SHUTDOWN.unpack(caller.read(arg, SCHED_REMOTE_SHUTDOWN.size))
        if domid >= DOMID_FIRST_RESERVED:  # rcu_lock_domain_by_id: DOMID_SELF and its like name nobody
            raise XenError(errno.ESRCH)
        target = domain.hypervisor.domain(DomId(domid))
        domain.hypervisor.xsm.schedop_shutdown(domain, target)
        scheduler.domain_shutdown(target, reason & 0xFF)
    elif cmd == SchedOp.WATCHDOG:
        timer_id, timeout = SCHED_WATCHDOG.unpack(caller.read(arg, SCHED_WATCHDOG.size))
        return domain_watchdog(domain, timer_id, timeout)
    else:  # SCHEDOP_pin_override is later than 4.6
        raise XenError(errno.ENOSYS)
    return 0


def do_sched_op_compat(caller: Caller, cmd: int, arg: int) -> int:
    """The first sched_op: yield, block, and shutdown with the reason itself as argument. Raises XenError(ENOSYS)."""
    if cmd == SchedOp.SHUTDOWN:
        caller.domain.hypervisor.scheduler.domain_shutdown(caller.domain, arg & 0xFF)
        return 0
    if cmd in (SchedOp.YIELD, SchedOp.BLOCK):
        return do_sched_op(caller, cmd, 0)
    raise XenError(errno.ENOSYS)


def _vcpu(caller: Caller) -> Vcpu:
    """The calling vCPU; dom0's software has none, and cannot wait in here."""
    if caller.vcpu is None:
        raise XenError(errno.EINVAL)
    return caller.vcpu


def _block_enable_events(vcpu: Vcpu) -> None:
    """vcpu_block_enable_events(): unmask events and block, in one step, or a guest could sleep through an event."""
    hypervisor = vcpu.domain.hypervisor
    if vcpu.info_maddr:
        hypervisor.memory.b[vcpu.info_maddr + VI_UPCALL_MASK] = 0
    hypervisor.scheduler.vcpu_block(vcpu)


def do_poll(caller: Caller, ports: int, count: int, timeout_ns: int) -> None:
    """SCHEDOP_poll: wait until one of ``count`` ports (u32 each, at guest address ``ports``) is pending, masked or
    not, or an event can be delivered, or absolute system time ``timeout_ns`` (0: never) has come.

    Raises XenError: EINVAL for more than 128 ports or a port that does not exist, EFAULT. The ports are looked at one
    by one: a pending one hides what is wrong with those after it.
    """
    vcpu = _vcpu(caller)
    if count > POLL_MAX_PORTS:
        raise XenError(errno.EINVAL)
    domain = vcpu.domain
    scheduler = domain.hypervisor.scheduler
    # For no ports at all 4.6 waits as for several: any poller's event ends it.
    scheduler.begin_wait(vcpu, -1)
    waiting = False
    port = 0
    try:
        if not domain.evtchn.local_events_need_delivery(vcpu):
            for i in range(count):
                port = caller.read_u32(ports + 4 * i)
                if not domain.evtchn.port_is_valid(port):
                    raise XenError(errno.EINVAL)
                if domain.evtchn.is_pending(port):
                    break
            else:
                waiting = True
    finally:
        if not waiting:
            scheduler.vcpu_unblock(vcpu)
    if not waiting:
        return
    if count == 1:
        with vcpu.pause_lock:
            if vcpu.poll_port:  # no event has ended the wait yet
                vcpu.poll_port = port
    if timeout_ns:
        scheduler.timers(vcpu.processor).set(vcpu.poll_timer, timeout_ns)
    scheduler.wait_begun(vcpu)


def domain_watchdog(domain: Domain, timer_id: int, timeout_s: int) -> int:
    """SCHEDOP_watchdog: with id 0 start one of two timers and return its id (1 or 2), else set it again, or stop it
    (timeout 0).

    Raises XenError: EINVAL for an id that is not in use, ENOSPC when both are.
    """
    if timer_id > NR_DOMAIN_WATCHDOG_TIMERS:
        raise XenError(errno.EINVAL)
    scheduler = domain.hypervisor.scheduler
    queue = scheduler.timers(0)
    deadline = scheduler.now_ns() + timeout_s * NS_PER_S
    with domain.watchdog_lock:
        timers = domain.watchdogs
        if not timers:
            timers += [None] * NR_DOMAIN_WATCHDOG_TIMERS
        if not timer_id:
            for index, timer in enumerate(timers):
                if timer is None:
                    fresh = timers[index] = Timer(lambda _now: _watchdog_expired(domain))
                    queue.set(fresh, deadline)
                    return index + 1
            raise XenError(errno.ENOSPC)
        timer = timers[timer_id - 1]
        if timer is None:
            raise XenError(errno.EINVAL)
        if timeout_s:
            queue.set(timer, deadline)
        else:
            timer.stop()
            timers[timer_id - 1] = None
    return 0


def _watchdog_expired(domain: Domain) -> None:
    if domain.is_shutting_down or domain.dying is not Dying.ALIVE:
        return
    hypervisor = domain.hypervisor
    hypervisor.log.printk(f"Watchdog timer fired for domain {domain.domid}")
    hypervisor.scheduler.domain_shutdown(domain, ShutdownCode.WATCHDOG)
