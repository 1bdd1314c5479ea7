# SPDX-License-Identifier: GPL-2.0-only
"""Virtual interrupts: which are global, and raising them (Xen: send_guest_*_virq in xen/common/event_channel.c)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from pyxen.abi.xen import NR_VIRQS, Virq
from pyxen.errors import XenError

if TYPE_CHECKING:
    from pyxen.hypervisor.domain import Domain
    from pyxen.hypervisor.hypervisor import Hypervisor
    from pyxen.hypervisor.vcpu import Vcpu

_PER_VCPU = frozenset({Virq.TIMER, Virq.DEBUG, Virq.XENOPROF, Virq.XENPMU})


def virq_is_global(virq: int) -> bool:
    """virq_is_global(): bound on vCPU 0 only, movable with EVTCHNOP_bind_vcpu. VIRQ_ARCH_* are global on x86."""
    return virq not in _PER_VCPU


def send_guest_vcpu_virq(vcpu: Vcpu, virq: int) -> None:
    """Raise a per-vCPU VIRQ (any thread, without the run queue's lock)."""
    assert not virq_is_global(virq)
    vcpu.domain.evtchn.raise_virq(vcpu, virq)


def send_guest_global_virq(domain: Domain | None, virq: int) -> None:
    """Raise a global VIRQ of ``domain``, if there is one (any thread)."""
    assert virq_is_global(virq)
    if domain is not None:
        domain.evtchn.raise_global_virq(virq)


class GlobalVirqs:
    """``global_virq_handlers``: which domain gets each global VIRQ of the host; dom0 unless told otherwise."""

    def __init__(self, hypervisor: Hypervisor) -> None:
        self._hypervisor = hypervisor
        self._handlers: dict[int, Domain] = {}

    def set_handler(self, domain: Domain, virq: int) -> None:
        """XEN_DOMCTL_set_virq_handler. Raises XenError(EINVAL) for a VIRQ that is not global."""
        if not 0 <= virq < NR_VIRQS or not virq_is_global(virq):
            raise XenError(errno.EINVAL)
        self._handlers[virq] = domain

    def send(self, virq: int) -> None:
        """send_global_virq()."""
        send_guest_global_virq(self._handlers.get(virq, self._hypervisor.dom0), virq)

    def forget(self, domain: Domain) -> None:
        """clear_global_virq_handlers(): the domain dies; dom0 takes over."""
        for virq in [virq for virq, handler in self._handlers.items() if handler is domain]:
            del self._handlers[virq]
