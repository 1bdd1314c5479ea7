# SPDX-License-Identifier: GPL-2.0-only
"""HYPERVISOR_hvm_op (Xen: do_hvm_op in xen/arch/x86/hvm/hvm.c)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from pyxen.abi.hvm import hvm_op as abi
from pyxen.abi.hvm.hvm_op import HvmMem, HvmOp
from pyxen.abi.xen import DomId
from pyxen.errors import XenError
from pyxen.hypervisor.x86.hvm import params
from pyxen.hypervisor.x86.hvm.p2m_types import RAM, READONLY

if TYPE_CHECKING:
    from pyxen.hypervisor.domain import Domain
    from pyxen.hypervisor.hypercall import Caller


def do_hvm_op(caller: Caller, op: int, arg: int) -> int:
    """HVMOP_*. XenError: ENOSYS for what a guest without device model cannot ask, EINVAL, EPERM, ESRCH, EFAULT."""
    current = caller.domain
    if op == HvmOp.SET_PARAM:
        domid, _pad, index, value = abi.HVM_PARAM.unpack(caller.read(arg, abi.HVM_PARAM.size))
        params.set_param(_domain(caller, domid), current, index, value)
    elif op == HvmOp.GET_PARAM:
        domid, pad, index, _ = abi.HVM_PARAM.unpack(caller.read(arg, abi.HVM_PARAM.size))
        value = params.get_param(_domain(caller, domid), current, index)
        caller.write(arg, abi.HVM_PARAM.pack(domid, pad, index, value))
    elif op == HvmOp.FLUSH_TLBS:
        _flush_tlbs(caller, arg)
    elif op == HvmOp.PAGETABLE_DYING:
        domid, _gpa = abi.PAGETABLE_DYING.unpack(caller.read(arg, abi.PAGETABLE_DYING.size))
        if not _domain(caller, domid).is_hvm:
            raise XenError(errno.EINVAL)  # for shadow paging only: nothing to do
    elif op == HvmOp.GET_TIME:
        caller.write(arg, abi.GET_TIME.pack(current.hypervisor.clock.now_ns()))
    elif op == HvmOp.GET_MEM_TYPE:
        domid, _, pfn = abi.GET_MEM_TYPE.unpack(caller.read(arg, abi.GET_MEM_TYPE.size))
        caller.write(arg, abi.GET_MEM_TYPE.pack(domid, _mem_type(caller, domid, pfn), pfn))
    elif op == HvmOp.SET_EVTCHN_UPCALL_VECTOR:
        vcpu_id, vector = abi.EVTCHN_UPCALL_VECTOR.unpack(caller.read(arg, abi.EVTCHN_UPCALL_VECTOR.size))
        _set_evtchn_upcall_vector(current, vcpu_id, vector)
    else:
        raise XenError(errno.ENOSYS)
    return 0


def _domain(caller: Caller, domid: int) -> Domain:
    return caller.domain.hypervisor.domain(DomId(domid), caller.domain)


def _flush_tlbs(caller: Caller, arg: int) -> None:
    """hvmop_flush_tlb_all(): each vCPU of the caller flushes before its next instruction. One that is not running
    does so when it is loaded."""
    if not caller.domain.is_hvm:
        raise XenError(errno.EINVAL)
    if arg:
        raise XenError(errno.EINVAL)
    caller.domain.hypervisor.flush_domain(caller.domain)


def _mem_type(caller: Caller, domid: int, pfn: int) -> int:
    domain = _domain(caller, domid)
    caller.domain.hypervisor.xsm.hvm_param(caller.domain, domain)
    if not domain.is_hvm:
        raise XenError(errno.EINVAL)
    with domain.hvm.p2m.lock:
        _mfn, kind, _ = domain.hvm.p2m.get_entry(pfn)
    if kind in READONLY:
        return HvmMem.RAM_RO
    return HvmMem.RAM_RW if kind in RAM else HvmMem.MMIO_DM


def _set_evtchn_upcall_vector(domain: Domain, vcpu_id: int, vector: int) -> None:
    """hvmop_set_evtchn_upcall_vector(). ENOENT for no such vCPU, EINVAL for a vector of the CPU's own."""
    if not domain.is_hvm or vector < 0x10:
        raise XenError(errno.EINVAL)
    if vcpu_id >= len(domain.vcpus):
        raise XenError(errno.ENOENT)
    hvm = domain.vcpus[vcpu_id].hvm
    hvm.upcall_vector = vector
    at = hvm.vcpu.info_maddr
    if at and hvm.bytes[at]:
        hvm.assert_evtchn_irq()
