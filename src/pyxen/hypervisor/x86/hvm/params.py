# SPDX-License-Identifier: GPL-2.0-only
"""HVM parameters: who may read and set which (Xen: hvm_allow_set_param, hvm_set_param and their counterparts in
xen/arch/x86/hvm/hvm.c, as later Xens have them)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from pyxen.abi.hvm.params import HVM_NR_PARAMS, TIMER_MODE_LAST, HvmParam
from pyxen.abi.xen import MASK64
from pyxen.errors import XenError

if TYPE_CHECKING:
    from pyxen.hypervisor.domain import Domain

_GUEST_SETS: Final = frozenset((
    HvmParam.CALLBACK_IRQ, HvmParam.VM86_TSS, HvmParam.VM86_TSS_SIZED, HvmParam.ACPI_IOPORTS_LOCATION,
    HvmParam.VM_GENERATION_ID_ADDR, HvmParam.STORE_EVTCHN, HvmParam.CONSOLE_EVTCHN, HvmParam.X87_FIP_WIDTH,
))
_GUEST_GETS: Final = _GUEST_SETS | {HvmParam.STORE_PFN, HvmParam.CONSOLE_PFN, HvmParam.ALTP2M}
_ONCE: Final = frozenset((
    HvmParam.VIRIDIAN, HvmParam.IOREQ_SERVER_PFN, HvmParam.NR_IOREQ_SERVER_PAGES, HvmParam.ALTP2M, HvmParam.MCA_CAP,
))
_NOT_HERE: Final = frozenset((
    HvmParam.IOREQ_PFN, HvmParam.BUFIOREQ_PFN, HvmParam.BUFIOREQ_EVTCHN, HvmParam.DM_DOMAIN, HvmParam.IOREQ_SERVER_PFN,
    HvmParam.NR_IOREQ_SERVER_PAGES, HvmParam.VIRIDIAN, HvmParam.NESTEDHVM, HvmParam.ALTP2M, HvmParam.MCA_CAP,
    HvmParam.ACPI_S_STATE, HvmParam.HPET_ENABLED, HvmParam.PAGING_RING_PFN, HvmParam.MONITOR_RING_PFN,
    HvmParam.SHARING_RING_PFN,
))
"""Of what a PVH domain here has not: device models, Viridian, nested virtualisation, views, rings. Zero is fine."""


def _check(domain: Domain, index: int) -> None:
    if not domain.is_hvm or not 0 <= index < HVM_NR_PARAMS:
        raise XenError(errno.EINVAL)


def set_param(domain: Domain, current: Domain, index: int, value: int) -> None:
    """HVMOP_set_param by ``current``. XenError: EINVAL, EPERM (not the guest's to set), EEXIST (set before), ENODEV
    (of a device it has not), EOPNOTSUPP (of a feature that is not here)."""
    _check(domain, index)
    current.hypervisor.xsm.hvm_param(current, domain)
    if index not in _GUEST_SETS and domain is current:
        raise XenError(errno.EPERM)
    value &= MASK64
    hvm = domain.hvm
    old = hvm.params[index]
    if index in _ONCE and old and value != old:
        raise XenError(errno.EEXIST)
    if index in _NOT_HERE and value:
        raise XenError(errno.EOPNOTSUPP)
    if index == HvmParam.CALLBACK_IRQ:
        hvm.set_callback_via(value)
    elif index == HvmParam.TIMER_MODE and value > TIMER_MODE_LAST:
        raise XenError(errno.EINVAL)
    elif index == HvmParam.ACPI_IOPORTS_LOCATION:
        if value > 1:
            raise XenError(errno.EINVAL)
        if value != 1:
            raise XenError(errno.ENODEV)  # the PM block of a PVH guest stands at the newer address
    elif (index == HvmParam.TRIPLE_FAULT_REASON and value > 5) or (
            index == HvmParam.X87_FIP_WIDTH and value not in (0, 4, 8)):
        raise XenError(errno.EINVAL)
    hvm.params[index] = value


def get_param(domain: Domain, current: Domain, index: int) -> int:
    """HVMOP_get_param by ``current``. XenError: EINVAL, EPERM."""
    _check(domain, index)
    current.hypervisor.xsm.hvm_param(current, domain)
    if index not in _GUEST_GETS and domain is current:
        raise XenError(errno.EPERM)
    return domain.hvm.params[index]
