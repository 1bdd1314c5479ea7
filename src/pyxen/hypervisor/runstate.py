# SPDX-License-Identifier: GPL-2.0-only
"""Run states: where a vCPU's time goes, and the copy a guest may keep of it (Xen: vcpu_runstate_change in
xen/common/schedule.c, update_runstate_area in xen/arch/x86/domain.c).
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

from pyxen.abi.sched import TRC_SCHED_RUNSTATE_CHANGE
from pyxen.abi.vcpu import RUNSTATE_INFO, XEN_RUNSTATE_UPDATE
from pyxen.abi.xen import VmAssist
from pyxen.errors import GuestAccessError

if TYPE_CHECKING:
    from pyxen.hypervisor.vcpu import RunState, Vcpu

_U64: Final = struct.Struct("<Q")
_STATE_ENTRY_TIME: Final = 8
_UPDATE_FLAG: Final = 1 << VmAssist.RUNSTATE_UPDATE_FLAG


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

    With VMASST_TYPE_runstate_update_flag the top bit of state_entry_time is set while it changes, so that other vCPUs
    of the guest can tell. The times are those at the last change of state: the guest adds the time since, for the
    running state.
    """
    address = vcpu.runstate_guest_va
    if address is None:
        return
    entry = vcpu.runstate_since_ns
    flagged = vcpu.domain.vm_assist & _UPDATE_FLAG
    if flagged:
        entry |= XEN_RUNSTATE_UPDATE
        copy_to_kernel(vcpu, address + _STATE_ENTRY_TIME, _U64.pack(entry))
    copy_to_kernel(vcpu, address, RUNSTATE_INFO.pack(int(vcpu.runstate), entry, *vcpu.runstate_time_ns))
    if flagged:
        copy_to_kernel(vcpu, address + _STATE_ENTRY_TIME, _U64.pack(entry & ~XEN_RUNSTATE_UPDATE))
