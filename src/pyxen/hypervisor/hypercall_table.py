# SPDX-License-Identifier: GPL-2.0-only
"""Which hypercall number calls what, and with how many arguments (Xen: hypercall_args_table in
xen/arch/x86/x86_64/entry.S)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pyxen.abi.xen import NR_HYPERCALLS, Hypercall
from pyxen.hypervisor.domctl import do_domctl
from pyxen.hypervisor.event_channel_op import do_event_channel_op, do_event_channel_op_compat
from pyxen.hypervisor.grant_table import do_grant_table_op
from pyxen.hypervisor.hypercall import Entry, Handler
from pyxen.hypervisor.memory_op import do_memory_op
from pyxen.hypervisor.misc_op import do_console_io, do_physdev_op, do_vm_assist, make_multicall
from pyxen.hypervisor.schedule import do_sched_op, do_sched_op_compat
from pyxen.hypervisor.sysctl import do_sysctl
from pyxen.hypervisor.time import do_set_timer_op
from pyxen.hypervisor.vcpu_op import do_vcpu_op
from pyxen.hypervisor.version import do_xen_version
from pyxen.hypervisor.x86.hvm.hvm_op import do_hvm_op
from pyxen.hypervisor.x86.hvm.vcpu_op import do_hvm_vcpu_op
from pyxen.hypervisor.x86.pv import callbacks, gdt
from pyxen.hypervisor.x86.pv.mm import (
    do_mmu_update,
    do_mmuext_op,
    do_update_va_mapping,
    do_update_va_mapping_otherdomain,
)

if TYPE_CHECKING:
    Table = list[Entry | None]

_COMMON: tuple[tuple[Hypercall, Handler, int], ...] = (
    (Hypercall.MMU_UPDATE, do_mmu_update, 4),
    (Hypercall.SCHED_OP_COMPAT, do_sched_op_compat, 2),
    (Hypercall.MEMORY_OP, do_memory_op, 2),
    (Hypercall.EVENT_CHANNEL_OP_COMPAT, do_event_channel_op_compat, 1),
    (Hypercall.XEN_VERSION, do_xen_version, 2),
    (Hypercall.CONSOLE_IO, do_console_io, 3),
    (Hypercall.GRANT_TABLE_OP, do_grant_table_op, 3),
    (Hypercall.VM_ASSIST, do_vm_assist, 2),
    (Hypercall.UPDATE_VA_MAPPING_OTHERDOMAIN, do_update_va_mapping_otherdomain, 4),
    (Hypercall.VCPU_OP, do_vcpu_op, 3),
    (Hypercall.MMUEXT_OP, do_mmuext_op, 4),
    (Hypercall.SCHED_OP, do_sched_op, 2),
    (Hypercall.EVENT_CHANNEL_OP, do_event_channel_op, 2),
    (Hypercall.HVM_OP, do_hvm_op, 2),
    (Hypercall.DOMCTL, do_domctl, 1),
    (Hypercall.SYSCTL, do_sysctl, 1),
)
_GUEST: tuple[tuple[Hypercall, Handler, int], ...] = (
    (Hypercall.SET_TRAP_TABLE, callbacks.do_set_trap_table, 1),
    (Hypercall.SET_GDT, gdt.do_set_gdt, 2),
    (Hypercall.STACK_SWITCH, callbacks.do_stack_switch, 2),
    (Hypercall.SET_CALLBACKS, callbacks.do_set_callbacks, 3),
    (Hypercall.FPU_TASKSWITCH, callbacks.do_fpu_taskswitch, 1),
    (Hypercall.SET_DEBUGREG, callbacks.do_set_debugreg, 2),
    (Hypercall.GET_DEBUGREG, callbacks.do_get_debugreg, 1),
    (Hypercall.UPDATE_DESCRIPTOR, gdt.do_update_descriptor, 2),
    (Hypercall.UPDATE_VA_MAPPING, do_update_va_mapping, 3),
    (Hypercall.SET_TIMER_OP, do_set_timer_op, 1),
    (Hypercall.SET_SEGMENT_BASE, callbacks.do_set_segment_base, 2),
    (Hypercall.NMI_OP, callbacks.do_nmi_op, 2),
    (Hypercall.CALLBACK_OP, callbacks.do_callback_op, 2),
    (Hypercall.PHYSDEV_OP, do_physdev_op, 2),
)
_HVM: tuple[tuple[Hypercall, Handler, int], ...] = (
    (Hypercall.MEMORY_OP, do_memory_op, 2),
    (Hypercall.SET_TIMER_OP, do_set_timer_op, 1),
    (Hypercall.XEN_VERSION, do_xen_version, 2),
    (Hypercall.CONSOLE_IO, do_console_io, 3),
    (Hypercall.GRANT_TABLE_OP, do_grant_table_op, 3),
    (Hypercall.VM_ASSIST, do_vm_assist, 2),
    (Hypercall.VCPU_OP, do_hvm_vcpu_op, 3),
    (Hypercall.SCHED_OP, do_sched_op, 2),
    (Hypercall.EVENT_CHANNEL_OP, do_event_channel_op, 2),
    (Hypercall.HVM_OP, do_hvm_op, 2),
    (Hypercall.DOMCTL, do_domctl, 1),
    (Hypercall.SYSCTL, do_sysctl, 1),
)
"""hvm_hypercall_table, with what later Xens added for PVH."""


def build_hvm_table() -> Table:
    """The table of a translated guest's hypercalls."""
    table: Table = [None] * NR_HYPERCALLS
    for number, handler, nr_args in _HVM:
        table[number] = Entry(number.name.lower(), handler, nr_args)
    table[Hypercall.MULTICALL] = Entry("multicall", make_multicall(table), 2)
    return table


def build_table(*, guest: bool = True) -> Table:
    """The table of a PV guest's hypercalls or, without ``guest``, of those that make sense without a running vCPU
    (dom0's software).

    HYPERVISOR_iret is not here: it has no result, and the entry code does it (x86/pv/iret.py).
    """
    table: Table = [None] * NR_HYPERCALLS
    for number, handler, nr_args in _COMMON + (_GUEST if guest else ()):
        table[number] = Entry(number.name.lower(), handler, nr_args)
    table[Hypercall.MULTICALL] = Entry("multicall", make_multicall(table), 2)
    return table
