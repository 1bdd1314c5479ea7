# SPDX-License-Identifier: GPL-2.0-only
"""The seam between the hypervisor's common part and a kind of guest (Xen: the ``arch_*`` functions of
xen/arch/x86/domain.c, which ask ``is_hvm_domain``).

A PV domain has :class:`~pyxen.hypervisor.x86.pv.domain.PvDomain` and its vCPUs
:class:`~pyxen.hypervisor.x86.pv.vcpu.PvVcpu`; PVH (and later HVM) domains have ``x86/hvm``'s. Common code uses only
what is here; what belongs to one kind is reached by ``domain.pv``, ``vcpu.pv``, ``domain.hvm``, ``vcpu.hvm``, by code
that knows what it has before it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable

    from pyxen.hypervisor.domain import Domain
    from pyxen.hypervisor.log_dirty import LogDirty
    from pyxen.hypervisor.vcpu import Vcpu
    from pyxen.machine.cpu.base import Cpu, Traps


class ArchVcpu(Protocol):
    """One vCPU's architecture. It is also the *caller* of its hypercalls (hypervisor.hypercall.Caller)."""

    vcpu: Vcpu
    domain: Domain
    preempt_at: int

    @property
    def traps(self) -> Traps:
        """What the engine calls while this vCPU is loaded."""
        ...

    def before_entry(self, cpu: Cpu) -> None:
        """Last stop before the engine runs this vCPU, with its context loaded: flushes, posted events, injections.
        Raises GuestFault."""
        ...

    def flush_tlb(self) -> None:
        """Forget every translation of this vCPU, here now and in the engine before the next guest instruction. Any
        thread."""
        ...

    def upcall_deliverable(self) -> bool:
        """hvm_local_events_need_delivery(), or its PV counterpart: whether guest memory alone says that an upcall (or
        interrupt) is due now. Exact on the engine's thread."""
        ...

    def set_guest_context(self, data: bytes) -> None:
        """VCPUOP_initialise, XEN_DOMCTL_setvcpucontext: struct vcpu_guest_context (5168 bytes). XenError(EINVAL);
        hypercall.Preempted: part of the work is done, call again with the same data."""
        ...

    def get_guest_context(self) -> bytes:
        """XEN_DOMCTL_getvcpucontext. ENODATA for a vCPU that was never initialised."""
        ...

    def copy_to_kernel(self, address: int, data: bytes) -> None:
        """Write to an area that the guest's kernel registered by virtual address. Raises GuestAccessError."""
        ...

    def read(self, address: int, size: int) -> bytes: ...

    def write(self, address: int, data: bytes) -> None: ...

    def read_as_kernel(self, address: int, size: int) -> bytes:
        """Like ``read``, whatever mode the vCPU is in."""
        ...

    def mode_name(self) -> str:
        """"kernel" or "user", for the crash log."""
        ...

    def counters(self) -> dict[str, int]:
        """What this vCPU did so far: "exception_14", "system_calls", "emulated", …"""
        ...

    def destroy(self) -> None:
        """Give back what it holds, but for page tables and memory. The domain is dying; idempotent."""
        ...


class ArchDomain(Protocol):
    """A domain's architecture."""

    memory_map: list[tuple[int, int, int]]
    """E820 entries (address, size, type) set by the toolstack (XENMEM_set_memory_map)."""

    @property
    def kind(self) -> str:
        """"pv", "pvh" or "hvm"."""
        ...

    def new_vcpu(self, vcpu: Vcpu) -> ArchVcpu:
        """Make the architecture's part of a vCPU that is being created (vcpu_initialise); sets ``vcpu.pv`` or
        ``vcpu.hvm``."""
        ...

    def resize(self, max_vcpus: int) -> None:
        """Another number of vCPUs, before the domain has any. XenError(ENOMEM): nothing changed."""
        ...

    def relinquish_memory(self) -> bool:
        """A slice of giving a dying domain's memory back; True when nothing is left to do."""
        ...

    # paging_log_dirty_init(): how this kind of guest notices writes. The domain is paused.

    def log_dirty_start(self) -> None:
        """Notice writes from here on, and tell ``domain.log_dirty``. XenError(ENOMEM)."""
        ...

    def log_dirty_stop(self) -> None:
        """No more. XenError(ENOMEM)."""
        ...

    def log_dirty_collect(self, log: LogDirty) -> None:
        """Tell ``log`` what it has not been told yet."""
        ...

    def log_dirty_clean(self, runs: Iterable[tuple[int, int]]) -> None:
        """Notice the next write to these (first gfn, count) again."""
        ...

    def release(self) -> None:
        """Free what the hypervisor itself keeps for the domain; it has no memory left."""
        ...
