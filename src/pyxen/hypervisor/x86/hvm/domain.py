# SPDX-License-Identifier: GPL-2.0-only
"""``struct hvm_domain``: what makes a domain a translated one (Xen: hvm_domain_initialise in
xen/arch/x86/hvm/hvm.c, with XEN_X86_EMU_LAPIC as its only emulated device: PVH)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pyxen.abi.hvm.params import CALLBACK_TYPE_SHIFT, CALLBACK_TYPE_VECTOR, HVM_NR_PARAMS, HvmParam
from pyxen.errors import XenError
from pyxen.hypervisor.frames import OWNER_SCAN
from pyxen.hypervisor.frames_types import budget_from_now
from pyxen.hypervisor.x86.hvm.cpuid import HvmCpuidPolicy
from pyxen.hypervisor.x86.hvm.io import PlatformIo
from pyxen.hypervisor.x86.hvm.p2m import P2m
from pyxen.hypervisor.x86.hvm.p2m_types import P2mType
from pyxen.hypervisor.x86.hvm.paging_pool import PagingPool, default_allowance
from pyxen.hypervisor.x86.hvm.traps import HvmTraps
from pyxen.hypervisor.x86.hvm.vcpu import HvmVcpu
from pyxen.machine.cpu.base import HvmCpu

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pyxen.hypervisor.domain import Domain
    from pyxen.hypervisor.log_dirty import LogDirty
    from pyxen.hypervisor.vcpu import Vcpu

APIC_DEFAULT_PHYS_BASE: Final = 0xFEE00000
LAPIC_PAGE: Final = 0
"""Page of the MMIO window that is the local APIC of the vCPU that touches it."""
NULL_PAGE: Final = 1
"""Page of the window where nothing is: reads are all ones."""
_BUDGET_NS: Final = 150_000
_CHECK_EVERY: Final = 64


class HvmDomain:
    """The domain's part; see :class:`~pyxen.hypervisor.arch.ArchDomain`."""

    kind = "pvh"

    def __init__(self, domain: Domain) -> None:
        """XenError(ENOMEM)."""
        self.domain = domain
        hypervisor = domain.hypervisor
        self.pool = PagingPool(hypervisor.frames)
        self.p2m = P2m(domain, self.pool)
        self.cpuid = HvmCpuidPolicy(hypervisor.tsc)
        self.memory_map: list[tuple[int, int, int]] = []
        """E820 entries (address, size, type) set by the toolstack (XENMEM_set_memory_map)."""
        self.params = [0] * HVM_NR_PARAMS
        self.params[HvmParam.ACPI_IOPORTS_LOCATION] = 1
        self.callback_vector = 0
        """Vector of event-channel upcalls to any vCPU (HVM_PARAM_CALLBACK_TYPE_VECTOR); 0 for none."""
        self.io = PlatformIo(domain)
        self._teardown = 0
        self._next_mfn = 0
        cpu = hypervisor.pcpus[0].cpu
        assert isinstance(cpu, HvmCpu)
        try:
            self.p2m.set_mmio(APIC_DEFAULT_PHYS_BASE >> 12, cpu.mmio_base + (LAPIC_PAGE << 12))
        except XenError:
            self.pool.release(self.pool.used)
            raise
        self.p2m.max_mapped_gfn = 0  # devices are not memory
        self.p2m.null_page = cpu.mmio_base + (NULL_PAGE << 12)

    def set_callback_via(self, value: int) -> None:
        """hvm_set_callback_via(): only vectors exist without an interrupt controller; anything else delivers
        nothing."""
        is_vector = value >> CALLBACK_TYPE_SHIFT == CALLBACK_TYPE_VECTOR
        vector = value & 0xFF
        self.callback_vector = vector if is_vector and vector >= 16 else 0
        for vcpu in self.domain.vcpus:
            vcpu.hvm.event_state_changed()

    def max_mem_changed(self) -> None:
        """The paging pool follows the domain's size until the toolstack sets it."""
        if not self.pool.is_set:
            domain = self.domain
            self.pool.limit = max(self.pool.limit, default_allowance(domain.max_pages, domain.max_vcpus))

    def new_vcpu(self, vcpu: Vcpu) -> HvmVcpu:
        """hvm_vcpu_initialise()."""
        hvm = vcpu.hvm = HvmVcpu(vcpu, self.p2m)
        hvm.traps = HvmTraps(hvm, self.domain.hypervisor.hvm_hypercalls)
        vcpu.periodic_period_ns = 0  # only PV guests start with a tick
        return hvm

    def resize(self, max_vcpus: int) -> None:
        """Nothing here is sized by their number."""

    def relinquish_memory(self) -> bool:
        """hap_teardown() and relinquish_memory(): foreign references, the owner's references, the tables."""
        frames = self.domain.hypervisor.frames
        frames.lock.acquire()
        try:
            frames.start_budget(budget_from_now(_BUDGET_NS))
            if self._teardown == 0:
                self.p2m.put_foreign()
                self._teardown = 1
            if self._teardown == 1:
                if not self._drop_owner_refs():
                    return False
                self._teardown = 2
            return self.pool.release(256)
        finally:
            frames.release()

    def _drop_owner_refs(self) -> bool:
        frames, domid = self.domain.hypervisor.frames, self.domain.domid
        check, start = _CHECK_EVERY, self._next_mfn
        while start < frames.nr_frames:
            mfn = frames.next_owned(domid, start, start + OWNER_SCAN)
            if mfn < 0:
                start += OWNER_SCAN
                if frames.preempt():
                    self._next_mfn = start
                    return False
                continue
            frames.get(mfn, domid)
            frames.drop_owner_refs(mfn)
            frames.put(mfn)
            start = mfn + 1
            check -= 1
            if not check:
                if frames.preempt():
                    self._next_mfn = start
                    return False
                check = _CHECK_EVERY
        return True

    def log_dirty_start(self) -> None:
        """hap_enable_log_dirty(): write-protect everything."""
        self.p2m.change_type_range(0, self.p2m.max_mapped_gfn + 1, {P2mType.RAM_RW: P2mType.RAM_LOGDIRTY})

    def log_dirty_stop(self) -> None:
        """hap_disable_log_dirty()."""
        self.p2m.change_type_range(0, self.p2m.max_mapped_gfn + 1, {P2mType.RAM_LOGDIRTY: P2mType.RAM_RW})

    def log_dirty_collect(self, log: LogDirty) -> None:
        """Faults tell the log at once."""

    def log_dirty_clean(self, runs: Iterable[tuple[int, int]]) -> None:
        """hap_clean_dirty_bitmap(), of these frames only."""
        for first, count in runs:
            self.p2m.protect(first, count)
        self.p2m.flush()

    def release(self) -> None:
        """The last tables, of a domain that could not be created or has no memory left."""
        self.pool.release(self.pool.used)
