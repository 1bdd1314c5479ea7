# SPDX-License-Identifier: GPL-2.0-only
"""``struct pv_domain``: what makes a domain a PV one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pyxen.hypervisor.x86.cpuid import CpuidPolicy
from pyxen.hypervisor.x86.pit import Pit
from pyxen.hypervisor.x86.pv import log_dirty
from pyxen.hypervisor.x86.pv.mm import relinquish_memory
from pyxen.hypervisor.x86.pv.slots import PerDomain
from pyxen.hypervisor.x86.pv.traps import PvTraps
from pyxen.hypervisor.x86.pv.vcpu import PvVcpu

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pyxen.hypervisor.domain import Domain
    from pyxen.hypervisor.log_dirty import LogDirty
    from pyxen.hypervisor.vcpu import Vcpu
    from pyxen.hypervisor.x86.pv.slots import XenSlots

PvMode = Literal["exact", "fast"]


class PvDomain:
    """PV state of a domain.

    ``mode`` is how the guest kernel runs: ``exact`` at CPL 3 with a page-table root each for kernel and user, as Xen
    on x86-64;
    ``fast`` at CPL 1, where a switch between kernel and user needs no new root.
    """

    def __init__(self, domain: Domain, slots: XenSlots, mode: PvMode) -> None:
        self.domain = domain
        self.mode: PvMode = mode
        self._slots = slots
        self.area = PerDomain(slots, mode, max(domain.max_vcpus, 1))
        self.cpuid = CpuidPolicy()
        self.pit = Pit(domain.hypervisor.clock.now_ns)
        self.memory_map: list[tuple[int, int, int]] = []
        """E820 entries (address, size, type) set by the toolstack (XENMEM_set_memory_map)."""

    def install_xen_slots(self, l4_mfn: int, domain: Domain | None = None) -> None:
        """Put Xen's sixteen entries into a validated L4."""
        self.area.install(l4_mfn)

    def resize(self, max_vcpus: int) -> None:
        """Room for another number of vCPUs; before the domain has any page table. XenError(ENOMEM): nothing changed."""
        area = PerDomain(self._slots, self.mode, max_vcpus)
        self.area.release()
        self.area = area

    @property
    def kind(self) -> str:
        """See :class:`~pyxen.hypervisor.arch.ArchDomain`."""
        return "pv"

    def new_vcpu(self, vcpu: Vcpu) -> PvVcpu:
        """vcpu_initialise()."""
        pv = vcpu.pv = PvVcpu(vcpu)
        pv.traps = PvTraps(pv, self.domain.hypervisor.hypercalls)
        return pv

    def relinquish_memory(self) -> bool:
        """See :mod:`~pyxen.hypervisor.x86.pv.mm_relinquish`."""
        return relinquish_memory(self.domain)

    def log_dirty_start(self) -> None:
        """See :mod:`~pyxen.hypervisor.x86.pv.log_dirty`."""
        log_dirty.start(self.domain)

    def log_dirty_stop(self) -> None:
        """Engines mark no more."""
        log_dirty.stop(self.domain)

    def log_dirty_collect(self, log: LogDirty) -> None:
        """What engines marked, and page tables."""
        log_dirty.collect(self.domain, log)

    def log_dirty_clean(self, runs: Iterable[tuple[int, int]]) -> None:
        """Whatever was cleaned: new translations mark again."""
        self.domain.hypervisor.flush_domain(self.domain)

    def release(self) -> None:
        """Free the per-domain area; the domain has no page tables left."""
        log_dirty.stop(self.domain)
        self.area.release()
