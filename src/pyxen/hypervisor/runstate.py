# SPDX-License-Identifier: GPL-2.0-only
"""Run states: where a vCPU's time goes, and the copy a guest may keep of it (Xen: vcpu_runstate_change in
xen/common/schedule.c, update_runstate_area in xen/arch/x86/domain.c).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyxen.abi.sched import TRC_SCHED_RUNSTATE_CHANGE
from pyxen.abi.vcpu import RUNSTATE_INFO
from pyxen.errors import GuestAccessError

if TYPE_CHECKING:
    from pyxen.hypervisor.vcpu import RunState, Vcpu


def runstate_change(vcpu: Vcpu, state: RunState, now_ns: int) -> None:
    """vcpu_runstate_change(). With the run queue lock of the vCPU held."""
    old = vcpu.runstate
    if old == state:
        return
    trace = vcpu.domain.hypervisor.trace
    if trace.enabled:
        trace.event(TRC_SCHED_RUNSTATE_CHANGE | old << 8 | state << 4, vcpu, vcpu.vcpu_id, vcpu.domain.domid)
    passed = now_ns - vcpu.runstate_since_ns
    if passed > 0:
        vcpu.runstate_time_ns[old] += passed
        vcpu.runstate_since_ns = now_ns
    vcpu.runstate = state


def runstate_snapshot(vcpu: Vcpu, now_ns: int) -> tuple[int, int, list[int]]:
    """vcpu_runstate_get(): state, when it was entered, and the times of all four up to ``now_ns``.

    With the run queue lock held.
    """
    times = list(vcpu.runstate_time_ns)
    passed = now_ns - vcpu.runstate_since_ns
    if passed > 0:
        times[vcpu.runstate] += passed
    return int(vcpu.runstate), vcpu.runstate_since_ns, times


def copy_to_kernel(vcpu: Vcpu, address: int, data: bytes) -> None:
    """Write to an area that the guest's kernel registered by virtual address; a bad address is the guest's loss, as
    in Xen.

    Only where nobody executes the vCPU. Xen puts the write off when the vCPU was preempted in user mode, whose tables
    do not map the area; here the kernel's tables are at hand.
    """
    try:
        vcpu.arch.copy_to_kernel(address, data)
    except GuestAccessError:
        pass


def update_runstate_area(vcpu: Vcpu) -> None:
    """Refresh the guest's copy. On the thread of the vCPU's pCPU, between two runs.

    With VMASST_TYPE_runstate_update_flag Xen sets the top bit of state_entry_time while the rest changes, so that
    other vCPUs of the guest can tell. Here all of them are executed by this thread, so nobody sees it change: one
    store, with the bit clear. The times are those at the last change of state: the guest adds the time since, for the
    running state.
    """
    address = vcpu.runstate_guest_va
    if address is not None:
        copy_to_kernel(vcpu, address, RUNSTATE_INFO.pack(
            vcpu.runstate, vcpu.runstate_since_ns, *vcpu.runstate_time_ns))
