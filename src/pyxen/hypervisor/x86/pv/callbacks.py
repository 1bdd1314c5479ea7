# SPDX-License-Identifier: GPL-2.0-only
"""Where a PV guest says how it wants to be entered, and its few registers of the vCPU
(Xen: xen/arch/x86/pv/callback.c, traps.c, mm.c: set_trap_table, set_callbacks, callback_op, stack_switch,
set_segment_base, debugreg)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from pyxen.abi import arch_x86 as arch
from pyxen.errors import XenError
from pyxen.hypervisor.x86.msr import canonical
from pyxen.hypervisor.x86.pv import emulate
from pyxen.hypervisor.x86.pv.descriptors import FLAT_KERNEL_CS, segment_attributes, segment_base
from pyxen.hypervisor.x86.pv.iret import SegmentFault, find_descriptor
from pyxen.machine.cpu.base import Seg

if TYPE_CHECKING:
    from pyxen.hypervisor.x86.pv.vcpu import PvVcpu
    from pyxen.machine.cpu.base import Cpu


_INT: Final = 0xFFFFFFFF
"""Mask of arguments that are an ``int`` in C."""
_MUST_STAY: Final = frozenset((
    arch.CALLBACKTYPE_EVENT, arch.CALLBACKTYPE_FAILSAFE, arch.CALLBACKTYPE_SYSCALL, arch.CALLBACKTYPE_SYSENTER,
    arch.CALLBACKTYPE_SYSCALL32,
))


def _cpu(pv: PvVcpu) -> Cpu:
    cpu = pv.live_cpu
    if cpu is None:
        raise XenError(errno.EINVAL)
    return cpu


def do_set_trap_table(pv: PvVcpu, traps: int) -> int:
    """HYPERVISOR_set_trap_table: entries up to one with address 0; a null handle clears the table."""
    if not traps:
        pv.trap_table = [None] * 256
        return 0
    for _ in range(257):
        vector, flags, cs, address = arch.TRAP_INFO.unpack(pv.read(traps, arch.TRAP_INFO.size))
        if not address:
            return 0
        if not canonical(address):
            raise XenError(errno.EINVAL)
        pv.trap_table[vector] = (flags, cs | 3, address)
        traps += arch.TRAP_INFO.size
    raise XenError(errno.EINVAL)


def do_set_callbacks(pv: PvVcpu, event: int, failsafe: int, syscall: int) -> int:
    """HYPERVISOR_set_callbacks (64-bit form: event, failsafe and syscall addresses)."""
    if not (canonical(event) and canonical(failsafe) and canonical(syscall)):
        raise XenError(errno.EINVAL)
    register_callback(pv, arch.CALLBACKTYPE_EVENT, 0, event)
    register_callback(pv, arch.CALLBACKTYPE_FAILSAFE, 0, failsafe)
    register_callback(pv, arch.CALLBACKTYPE_SYSCALL, 0, syscall)
    return 0


def register_callback(pv: PvVcpu, kind: int, flags: int, address: int) -> None:
    """CALLBACKOP_register. EINVAL for an address that is not canonical, ENOSYS for a type that is not known."""
    masks = bool(flags & arch.CALLBACKF_MASK_EVENTS)
    if not canonical(address):
        raise XenError(errno.EINVAL)
    if kind == arch.CALLBACKTYPE_EVENT:
        pv.event_callback = address
    elif kind == arch.CALLBACKTYPE_FAILSAFE:
        pv.failsafe_callback, pv.failsafe_masks_events = address, masks
    elif kind == arch.CALLBACKTYPE_SYSCALL:
        pv.syscall_callback, pv.syscall_masks_events = address, masks
    elif kind == arch.CALLBACKTYPE_SYSCALL32:
        pv.syscall32_callback = address
    elif kind == arch.CALLBACKTYPE_SYSENTER:
        pv.sysenter_callback, pv.sysenter_masks_events = address, masks
    elif kind == arch.CALLBACKTYPE_NMI:
        # register_guest_nmi_callback(): an entry of the trap table that masks events
        pv.trap_table[2] = (4, FLAT_KERNEL_CS, address) if address else None
    else:
        raise XenError(errno.ENOSYS)


def do_callback_op(pv: PvVcpu, command: int, arg: int) -> int:
    """HYPERVISOR_callback_op: register, and unregister (only NMI can be; the others must stay)."""
    command &= _INT
    if command == arch.CALLBACKOP_REGISTER:
        kind, flags, address = arch.CALLBACK_REGISTER.unpack(pv.read(arg, arch.CALLBACK_REGISTER.size))
        register_callback(pv, kind, flags, address)
        return 0
    if command == arch.CALLBACKOP_UNREGISTER:
        (kind,) = arch.CALLBACK_UNREGISTER.unpack(pv.read(arg, arch.CALLBACK_UNREGISTER.size))
        if kind == arch.CALLBACKTYPE_NMI:
            pv.trap_table[2] = None
            return 0
        if kind in _MUST_STAY:
            raise XenError(errno.EINVAL)
    raise XenError(errno.ENOSYS)


def do_nmi_op(pv: PvVcpu, command: int, arg: int) -> int:
    """HYPERVISOR_nmi_op: XENNMI_register_callback (0) on vCPU 0, XENNMI_unregister_callback (1)."""
    command &= _INT
    if command == 0:
        if pv.vcpu.vcpu_id != 0:
            raise XenError(errno.EINVAL)
        address = pv.read_u64(arg)
        register_callback(pv, arch.CALLBACKTYPE_NMI, 0, address)
        return 0
    if command == 1:
        pv.trap_table[2] = None
        return 0
    raise XenError(errno.ENOSYS)


def do_stack_switch(pv: PvVcpu, ss: int, sp: int) -> int:
    """HYPERVISOR_stack_switch: kernel stack for entries from user mode."""
    pv.kernel_ss = (ss | 3) & 0xFFFF
    pv.kernel_sp = sp
    return 0


def do_fpu_taskswitch(pv: PvVcpu, on: int) -> int:
    """HYPERVISOR_fpu_taskswitch: set or clear the guest's CR0.TS."""
    on &= _INT
    if bool(on) != pv.cr0_ts:
        emulate.set_task_switched(pv, _cpu(pv), bool(on))
    return 0


def do_set_segment_base(pv: PvVcpu, which: int, base: int) -> int:
    """HYPERVISOR_set_segment_base. EINVAL for a base that is not canonical or an unknown ``which``.

    A user GS selector that cannot be loaded becomes the null selector, silently.
    """
    cpu = _cpu(pv)
    which &= _INT
    if which == arch.SEGBASE_GS_USER_SEL:
        selector = base & 0xFFFF
        pv.gs_base_user = 0
        if selector & 0xFFFC:
            try:
                pv.gs_base_user = _data_segment_base(pv, selector)
            except SegmentFault:
                selector = 0
        cpu.set_selector(Seg.GS, selector)
        return 0
    if not canonical(base):
        raise XenError(errno.EINVAL)
    if which == arch.SEGBASE_FS:
        cpu.fs_base = base
    elif which == arch.SEGBASE_GS_USER:
        pv.gs_base_user = base
    elif which == arch.SEGBASE_GS_KERNEL:
        cpu.gs_base = base
        pv.gs_base_kernel = base
    else:
        raise XenError(errno.EINVAL)
    return 0


def _data_segment_base(pv: PvVcpu, selector: int) -> int:
    descriptor = find_descriptor(pv, selector)
    attributes = segment_attributes(descriptor)
    if attributes & 0x9000 != 0x9000 or attributes & 0xA00 == 0x800:  # present, not a system one, not execute-only
        raise SegmentFault
    return segment_base(descriptor)


def do_set_debugreg(pv: PvVcpu, number: int, value: int) -> int:
    """HYPERVISOR_set_debugreg. EPERM for an address in Xen's range or a privileged bit, EINVAL for a register that is
    not there."""
    number &= _INT
    if number > 7:
        raise XenError(errno.EINVAL)
    if not emulate.set_debugreg(pv, number, value):
        raise XenError(errno.EPERM)
    return 0


def do_get_debugreg(pv: PvVcpu, number: int) -> int:
    """HYPERVISOR_get_debugreg: the value, or -EINVAL."""
    number &= _INT
    if number > 7:
        raise XenError(errno.EINVAL)
    return emulate.get_debugreg(pv, number)
