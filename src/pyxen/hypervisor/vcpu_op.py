# SPDX-License-Identifier: GPL-2.0-only
"""HYPERVISOR_vcpu_op (Xen: do_vcpu_op in xen/common/domain.c, arch_do_vcpu_op in xen/arch/x86/domain.c)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from pyxen.abi.arch_x86 import GUEST_CONTEXT_SIZE, HYPERVISOR_VIRT_END, HYPERVISOR_VIRT_START
from pyxen.abi.vcpu import (
    REGISTER_AREA,
    REGISTER_VCPU_INFO,
    RUNSTATE_INFO,
    SET_PERIODIC_TIMER,
    SET_SINGLESHOT_TIMER,
    VCPU_SSHOTTMR_FUTURE,
    VcpuOp,
)
from pyxen.abi.xen import VCPU_TIME_INFO
from pyxen.errors import XenError
from pyxen.hypervisor.domain import ShutdownCode
from pyxen.hypervisor.hypercall import Preempted
from pyxen.hypervisor.time import update_vcpu_system_time, vcpu_periodic_timer_work
from pyxen.hypervisor.vcpu import PauseFlag
from pyxen.hypervisor.vcpu_info import map_vcpu_info

if TYPE_CHECKING:
    from pyxen.hypervisor.hypercall import Caller
    from pyxen.hypervisor.vcpu import Vcpu

PERIOD_MIN_NS: Final = 1_000_000
STIME_DELTA_MAX: Final = ((1 << 64) - 1) >> 2
_DOWN: Final = int(PauseFlag.DOWN)


def do_vcpu_op(caller: Caller, cmd: int, vcpu_id: int, arg: int) -> int:
    """VCPUOP_* on a vCPU of the caller's domain.

    Raises XenError: ENOENT (no such vCPU), ENOSYS, EFAULT, and those of the operations. May raise hypercall.Preempted
    (VCPUOP_initialise validates page tables).
    """
    vcpus = caller.domain.vcpus
    vcpu_id &= 0xFFFFFFFF
    if vcpu_id >= len(vcpus):
        raise XenError(errno.ENOENT)
    vcpu = vcpus[vcpu_id]
    scheduler = caller.domain.hypervisor.scheduler
    # The first two are the ones a running guest uses all the time.
    if cmd == VcpuOp.SET_SINGLESHOT_TIMER:
        _set_singleshot_timer(caller, vcpu, arg)
    elif cmd == VcpuOp.STOP_SINGLESHOT_TIMER:
        _own(caller, vcpu)
        vcpu.singleshot_timer.stop()
    elif cmd == VcpuOp.IS_UP:
        return int(not vcpu.pause_flags & _DOWN)
    elif cmd == VcpuOp.GET_RUNSTATE_INFO:
        caller.write(arg, _runstate_info(vcpu))
    elif cmd == VcpuOp.INITIALISE:
        _initialise(caller, vcpu, cmd, vcpu_id, arg)
    elif cmd == VcpuOp.UP:
        with caller.domain.lock:
            if not vcpu.is_initialised:
                raise XenError(errno.EINVAL)
            if vcpu.pause_flags & _DOWN:
                # The guest need not have flushed a vCPU that was down: it starts with nothing remembered.
                vcpu.arch.flush_tlb()
        scheduler.vcpu_up(vcpu)
    elif cmd == VcpuOp.DOWN:
        _down(vcpu)
    elif cmd == VcpuOp.REGISTER_RUNSTATE_MEMORY_AREA:
        vcpu.runstate_guest_va = _area(caller, arg, RUNSTATE_INFO.size)
        _show_runstate(caller, vcpu)
    elif cmd == VcpuOp.SET_PERIODIC_TIMER:
        (period,) = SET_PERIODIC_TIMER.unpack(caller.read(arg, SET_PERIODIC_TIMER.size))
        if not PERIOD_MIN_NS <= period <= STIME_DELTA_MAX:
            raise XenError(errno.EINVAL)
        _set_period(vcpu, period)
    elif cmd == VcpuOp.STOP_PERIODIC_TIMER:
        _set_period(vcpu, 0)
    elif cmd == VcpuOp.REGISTER_VCPU_INFO:
        mfn, offset, _reserved = REGISTER_VCPU_INFO.unpack(caller.read(arg, REGISTER_VCPU_INFO.size))
        with caller.domain.lock:
            map_vcpu_info(vcpu, mfn, offset, caller.vcpu)
            update_vcpu_system_time(vcpu)
    elif cmd == VcpuOp.SEND_NMI:
        if arg:
            raise XenError(errno.EINVAL)
        vcpu.nmi_pending = True
        scheduler.vcpu_kick(vcpu)
    elif cmd == VcpuOp.GET_PHYSID:
        # Only for domains whose vCPUs are pinned one to one to pCPUs at boot (dom0_vcpus_pin).
        raise XenError(errno.EINVAL)
    elif cmd == VcpuOp.REGISTER_VCPU_TIME_MEMORY_AREA:
        vcpu.time_guest_va = _area(caller, arg, VCPU_TIME_INFO.size)
        update_vcpu_system_time(vcpu)
    else:
        raise XenError(errno.ENOSYS)
    return 0


def _own(caller: Caller, vcpu: Vcpu) -> None:
    if vcpu is not caller.vcpu:
        raise XenError(errno.EINVAL)


def _set_singleshot_timer(caller: Caller, vcpu: Vcpu, arg: int) -> None:
    _own(caller, vcpu)
    timeout, flags = SET_SINGLESHOT_TIMER.unpack(caller.read(arg, SET_SINGLESHOT_TIMER.size))
    scheduler = caller.domain.hypervisor.scheduler
    if timeout >= 1 << 63:
        timeout -= 1 << 64  # s_time_t: long past
    if flags & VCPU_SSHOTTMR_FUTURE and timeout < scheduler.now_ns():
        raise XenError(errno.ETIME)
    scheduler.timers(vcpu.processor).set(vcpu.singleshot_timer, timeout)


def _set_period(vcpu: Vcpu, period_ns: int) -> None:
    """The timer is armed while the vCPU runs: now, or by the context switch that lets it run."""
    vcpu.periodic_period_ns = period_ns
    vcpu.periodic_timer.stop()
    if vcpu.is_running:
        vcpu_periodic_timer_work(vcpu)


def _initialise(caller: Caller, vcpu: Vcpu, cmd: int, vcpu_id: int, arg: int) -> None:
    """A slice of VCPUOP_initialise; each continuation reads the context again, as Xen's does."""
    if not vcpu.info_maddr:  # still Xen's dummy_vcpu_info: the guest must register one first
        raise XenError(errno.EINVAL)
    data = caller.read(arg, GUEST_CONTEXT_SIZE)
    with caller.domain.lock:  # against another that initialises the same vCPU; for half a millisecond at most
        if vcpu.is_initialised:
            raise XenError(errno.EEXIST)
        try:
            vcpu.arch.set_guest_context(data)
        except Preempted:
            raise Preempted((cmd, vcpu_id, arg)) from None
        vcpu.is_initialised = True


def _down(vcpu: Vcpu) -> None:
    """VCPUOP_down. A domain whose last vCPU goes down has ended: it is powered off (Xen 4.7; before, it lay there for
    ever)."""
    domain = vcpu.domain
    scheduler = domain.hypervisor.scheduler
    with domain.lock:  # two vCPUs that take each other down: one of them is the last
        last = all(other is vcpu or other.pause_flags & _DOWN for other in domain.vcpus)
        if not last:
            scheduler.vcpu_down(vcpu)
    if last:
        scheduler.domain_shutdown(domain, ShutdownCode.POWEROFF)


def _area(caller: Caller, arg: int, size: int) -> int:
    """The address in a registration, outside Xen's own part of the address space. Raises XenError(EFAULT).

    It need not be mapped now: it is the guest's loss.
    """
    (address,) = REGISTER_AREA.unpack(caller.read(arg, REGISTER_AREA.size))
    if address + size > 1 << 64 or (address < HYPERVISOR_VIRT_END and address + size > HYPERVISOR_VIRT_START):
        raise XenError(errno.EFAULT)
    return int(address)


def _runstate_info(vcpu: Vcpu) -> bytes:
    state, since, times = vcpu.domain.hypervisor.scheduler.runstate(vcpu)
    return RUNSTATE_INFO.pack(state, since, *times)


def _show_runstate(caller: Caller, vcpu: Vcpu) -> None:
    """Fill a fresh area once; from now on each context switch does. A bad address is the guest's loss."""
    try:
        assert vcpu.runstate_guest_va is not None
        caller.write(vcpu.runstate_guest_va, _runstate_info(vcpu))
    except XenError:
        pass
