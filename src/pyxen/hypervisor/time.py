# SPDX-License-Identifier: GPL-2.0-only
"""What a guest sees of time, and its timers (Xen: xen/arch/x86/time.c, timer operations of xen/common/schedule.c and
domain.c).

System time is the machine clock. A guest reads it without asking: ``vcpu_time_info`` says how to make it of the TSC.
Xen refreshes that each second because it calibrates all the time; our clock has one calibration, so it is written
when a vcpu_info is made or moved and whenever the calibration changes.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING, Final

from pyxen.abi.xen import (
    PAGE_SHIFT,
    SHARED_WC_NSEC,
    SHARED_WC_SEC,
    SHARED_WC_SEC_HI,
    SHARED_WC_VERSION,
    VCPU_TIME_INFO,
    VI_TIME,
    Virq,
)
from pyxen.errors import XenError
from pyxen.hypervisor.runstate import copy_to_kernel

if TYPE_CHECKING:
    from pyxen.hypervisor.domain import Domain
    from pyxen.hypervisor.hypercall import Caller
    from pyxen.hypervisor.vcpu import Vcpu

NS_PER_S: Final = 1_000_000_000
FAR_TIMEOUT_NS: Final = 1 << 50
"""do_set_timer_op: about 13 days. What lies beyond is a wrapped number."""
FAR_TIMER_NS: Final = 100_000_000

_BODY: Final = struct.Struct("<QQIbB2x")
_U32: Final = struct.Struct("<I")
_TIMER: Final = int(Virq.TIMER)


def update_vcpu_system_time(vcpu: Vcpu) -> None:
    """Write vcpu_time_info, and the second copy if the guest registered one (force_update_vcpu_system_time).

    The version is odd while the rest changes. ``flags`` stays 0: in 4.6's structure it is padding.
    On the pCPU's thread of the vCPU, or while it is not running.
    """
    hypervisor = vcpu.domain.hypervisor
    mul, shift, tsc0 = hypervisor.tsc
    body = _BODY.pack(tsc0, 0, mul, shift, 0)
    version = 0
    if vcpu.info_maddr:
        memory = hypervisor.memory
        at = vcpu.info_maddr + VI_TIME
        version = memory.d[at >> 2] + 1 | 1
        memory.d[at >> 2] = version & 0xFFFFFFFF
        memory.write(at + 8, body)
        version = version + 1 & 0xFFFFFFFF
        memory.d[at >> 2] = version
    address = vcpu.time_guest_va
    if address is not None:
        copy_to_kernel(vcpu, address, _U32.pack(version | 1))
        copy_to_kernel(vcpu, address + 8, body)
        copy_to_kernel(vcpu, address, _U32.pack(version))


def update_domain_wallclock(domain: Domain) -> None:
    """Write shared_info's wall clock: the Unix time at which system time was 0, plus the domain's own offset."""
    if not domain.shared_info_mfn:
        return
    hypervisor = domain.hypervisor
    clock = hypervisor.clock
    boot_ns = clock.wallclock_ns() - clock.now_ns() + domain.time_offset_s * NS_PER_S
    seconds, ns = divmod(max(boot_ns, 0), NS_PER_S)
    d = hypervisor.memory.d
    base = domain.shared_info_mfn << PAGE_SHIFT
    version = d[base + SHARED_WC_VERSION >> 2] + 1 | 1
    d[base + SHARED_WC_VERSION >> 2] = version & 0xFFFFFFFF
    d[base + SHARED_WC_SEC >> 2] = seconds & 0xFFFFFFFF
    d[base + SHARED_WC_NSEC >> 2] = ns
    d[base + SHARED_WC_SEC_HI >> 2] = seconds >> 32 & 0xFFFFFFFF
    d[base + SHARED_WC_VERSION >> 2] = version + 1 & 0xFFFFFFFF


def send_timer_event(vcpu: Vcpu) -> None:
    """VIRQ_TIMER to a vCPU, if it bound it."""
    vcpu.domain.evtchn.raise_virq(vcpu, _TIMER)


def vcpu_periodic_timer_work(vcpu: Vcpu) -> None:
    """Tick if a period has passed, and arm the timer for the next one. For a vCPU that is (about to be) running.

    Ticks that fell due while it was descheduled are one tick: guests count time by the clock, not by ticks.
    """
    period = vcpu.periodic_period_ns
    if not period:
        return
    scheduler = vcpu.domain.hypervisor.scheduler
    now = scheduler.now_ns()
    due = vcpu.periodic_last_ns + period
    if now >= due:
        send_timer_event(vcpu)
        vcpu.periodic_last_ns = now
        due = now + period
    scheduler.timers(vcpu.processor).set(vcpu.periodic_timer, due)


def do_set_timer_op(caller: Caller, timeout: int) -> int:
    """HYPERVISOR_set_timer_op: VIRQ_TIMER at absolute system time ``timeout`` (s64 ns); 0 stops the timer.

    A time that is negative or more than 2^50 ns ahead comes from a wrapped counter: an old guest has nothing to do
    then, a newer one has work at once. Like Xen we call back in 100 ms, which serves both.
    """
    vcpu = caller.vcpu
    if vcpu is None:
        raise XenError(errno.EINVAL)
    if not timeout:
        vcpu.singleshot_timer.stop()
        return 0
    scheduler = vcpu.domain.hypervisor.scheduler
    now = scheduler.now_ns()
    if timeout >= 1 << 63 or timeout < 0 or timeout - now >= FAR_TIMEOUT_NS:
        timeout = now + FAR_TIMER_NS
    scheduler.timers(vcpu.processor).set(vcpu.singleshot_timer, timeout)
    return 0


assert VCPU_TIME_INFO.size == _BODY.size + 8
