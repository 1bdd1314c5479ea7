# SPDX-License-Identifier: GPL-2.0-only
"""HYPERVISOR_vcpu_op of a translated domain (Xen: hvm_vcpu_op of 4.7 and later, do_vcpu_op, arch_initialise_vcpu)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from pyxen.abi.hvm import hvm_vcpu
from pyxen.abi.vcpu import VcpuOp
from pyxen.errors import XenError
from pyxen.hypervisor.vcpu_op import do_vcpu_op
from pyxen.hypervisor.x86.hvm.context import initialise

if TYPE_CHECKING:
    from pyxen.hypervisor.hypercall import Caller
    from pyxen.hypervisor.vcpu import Vcpu

_HERE: Final = frozenset((
    VcpuOp.UP, VcpuOp.DOWN, VcpuOp.IS_UP, VcpuOp.GET_RUNSTATE_INFO, VcpuOp.REGISTER_RUNSTATE_MEMORY_AREA,
    VcpuOp.SET_PERIODIC_TIMER, VcpuOp.STOP_PERIODIC_TIMER, VcpuOp.SET_SINGLESHOT_TIMER, VcpuOp.STOP_SINGLESHOT_TIMER,
    VcpuOp.REGISTER_VCPU_INFO, VcpuOp.SEND_NMI, VcpuOp.REGISTER_VCPU_TIME_MEMORY_AREA,
))


def do_hvm_vcpu_op(caller: Caller, cmd: int, vcpu_id: int, arg: int) -> int:
    """VCPUOP_*. XenError: ENOSYS for those that such a guest has not (get_physid), ENOENT, and the operations'."""
    if cmd == VcpuOp.INITIALISE:
        vcpus = caller.domain.vcpus
        if not 0 <= vcpu_id & 0xFFFFFFFF < len(vcpus):
            raise XenError(errno.ENOENT)
        _initialise(caller, vcpus[vcpu_id & 0xFFFFFFFF], arg)
        return 0
    if cmd not in _HERE:
        raise XenError(errno.ENOSYS)
    return do_vcpu_op(caller, cmd, vcpu_id, arg)


def _initialise(caller: Caller, vcpu: Vcpu, arg: int) -> None:
    """EINVAL for a vCPU without vcpu_info or a context no CPU could have, EEXIST for one that is set up."""
    if not vcpu.info_maddr:
        raise XenError(errno.EINVAL)
    data = caller.read(arg, hvm_vcpu.SIZE)
    with caller.domain.lock:
        if vcpu.is_initialised:
            raise XenError(errno.EEXIST)
        initialise(vcpu, data)
        vcpu.is_initialised = True
