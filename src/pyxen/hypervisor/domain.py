# SPDX-License-Identifier: GPL-2.0-only
"""``struct domain``: what the hypervisor knows of a virtual machine (Xen: xen/include/xen/sched.h,
xen/common/domain.c).

Life cycle (flags as in Xen): created paused (one controller pause) -> running -> shut down (``shutdown_code`` set,
vCPUs
paused, VIRQ_DOM_EXC sent to dom0) -> dying -> dead.
"""

from __future__ import annotations

import threading
from enum import IntEnum
from typing import TYPE_CHECKING

from pyxen.abi.xen import DomId
from pyxen.hypervisor.lock import TicketLock

if TYPE_CHECKING:
    from pyxen.hypervisor.arch import ArchDomain
    from pyxen.hypervisor.event_channel import EventChannels
    from pyxen.hypervisor.foreign_map import Mapping
    from pyxen.hypervisor.grant_table import GrantTable
    from pyxen.hypervisor.hypervisor import Hypervisor
    from pyxen.hypervisor.log_dirty import LogDirty
    from pyxen.hypervisor.rendezvous import Inside
    from pyxen.hypervisor.timer import Timer
    from pyxen.hypervisor.vcpu import Vcpu
    from pyxen.hypervisor.x86.hvm.domain import HvmDomain
    from pyxen.hypervisor.x86.pv.domain import PvDomain


class Dying(IntEnum):
    """``enum domain_dying``."""

    ALIVE = 0
    DYING = 1
    DEAD = 2


class ShutdownCode(IntEnum):
    """``SHUTDOWN_*`` (xen/include/public/sched.h)."""

    POWEROFF = 0
    REBOOT = 1
    SUSPEND = 2
    CRASH = 3
    WATCHDOG = 4
    SOFT_RESET = 5


class Domain:
    """One domain. ``lock`` guards life cycle and vcpu list; page state is under ``page_lock``."""

    def __init__(
        self, hypervisor: Hypervisor, domid: DomId, *, max_vcpus: int, handle: bytes, privileged: bool = False
    ) -> None:
        self.hypervisor = hypervisor
        self.domid = domid
        self.handle = handle
        self.is_privileged = privileged
        self.max_vcpus = max_vcpus
        self.is_hvm = False
        """is_hvm_domain(): PVH domains too. Set by create."""
        self.vcpus: list[Vcpu] = []
        self.lock = TicketLock("domain life cycle")
        self.teardown = threading.Lock()
        """Held by whoever does a slice of domain_kill(); only ever tried, never waited for."""
        self.page_lock = TicketLock("page counts, types and owners of this domain's frames")
        # Life cycle
        self.pause_lock = threading.Lock()
        """Leaf; guards pause_count (Xen: atomic_t)."""
        self.pause_count = 0
        self.controller_pause_count = 0
        self.shutdown_lock = threading.Lock()
        """Leaf; guards is_shutting_down and shutdown_code (a domain may crash with any lock held)."""
        self.is_shutting_down = False
        self.is_shut_down = False
        self.shutdown_code: int = -1
        self.dying = Dying.ALIVE
        self.crash_reason = ""
        # Memory accounting (frames)
        self.tot_pages = 0
        self.max_pages = 0
        self.outstanding_refs = 0
        self.shared_info_mfn = 0
        self.vm_assist = 0
        # Mechanisms (set by create)
        self.evtchn: EventChannels
        self.grant_table: GrantTable
        self.arch: ArchDomain
        """``pv`` or ``hvm``, whichever there is."""
        self.pv: PvDomain
        self.hvm: HvmDomain
        self.log_dirty: LogDirty | None = None
        """While the frames that are written are remembered (log_dirty.py)."""
        self.mappings_lock = threading.Lock()
        """Leaf; guards writable_mappings."""
        self.writable_mappings: set[Mapping] = set()
        """Foreign mappings through which dom0's software may write at any time."""
        # Scheduler's private data and its parameters
        self.sched_data: object = None
        self.watchdogs: list[Timer | None] = []
        """SCHEDOP_watchdog: one entry per timer, None when it is not in use. Under watchdog_lock."""
        self.watchdog_lock = threading.Lock()
        self.time_offset_s = 0
        """XEN_DOMCTL_settimeoffset: added to the wall clock."""
        self.cpupool = 0
        self.home = -1
        """Index of the engine that executes its vCPUs (see :mod:`~pyxen.hypervisor.schedule`); -1 before it has any.
        Changed by the home's own thread only, after evtchn.home_thread."""
        self.leaving = -1
        """The engine it is being handed over to; -1 when it stays. Under the run queue lock of its home."""
        self.home_since_ns = 0
        self.inside: Inside | None = None
        """The pCPU that is executing its code. ``inside`` and ``held`` are under the rendezvous' lock."""
        self.held = 0
        """How many threads keep its code from running for a moment (see :mod:`~pyxen.hypervisor.rendezvous`)."""
        # Counters
        self.hypercall_counts = [0] * 64
        self.counters: dict[str, int] = {}

    @property
    def is_paused(self) -> bool:
        return self.pause_count > 0

    def __repr__(self) -> str:
        return f"d{self.domid}"
