# SPDX-License-Identifier: GPL-2.0-only
"""``struct vcpu``: a virtual CPU (Xen: xen/include/xen/sched.h)."""

from __future__ import annotations

import threading
from enum import IntEnum, IntFlag
from typing import TYPE_CHECKING

from pyxen.abi.xen import NR_VIRQS, VcpuId

if TYPE_CHECKING:
    from pyxen.hypervisor.arch import ArchVcpu
    from pyxen.hypervisor.domain import Domain
    from pyxen.hypervisor.timer import Timer
    from pyxen.hypervisor.x86.hvm.vcpu import HvmVcpu
    from pyxen.hypervisor.x86.pv.vcpu import PvVcpu
    from pyxen.machine.cpu.base import Context, Cpu


class PauseFlag(IntFlag):
    """``VPF_*``: reasons in the vCPU itself for not being runnable."""

    BLOCKED = 1
    """Waiting for an event (SCHEDOP_block)."""
    DOWN = 2
    """Not brought up (VCPUOP_up)."""
    BLOCKED_IN_XEN = 4
    POLLING = 8
    """SCHEDOP_poll."""


class RunState(IntEnum):
    """``RUNSTATE_*`` (xen/include/public/vcpu.h)."""

    RUNNING = 0
    RUNNABLE = 1
    BLOCKED = 2
    OFFLINE = 3


class Vcpu:
    """One vCPU.

    ``cpu`` is the engine that has its context loaded *and* is executing it (None otherwise); only that engine's thread
    touches live registers.
    """

    def __init__(self, domain: Domain, vcpu_id: VcpuId) -> None:
        self.domain = domain
        self.vcpu_id = vcpu_id
        self.pause_lock = threading.Lock()
        """Leaf; guards pause_flags, pause_count and poll_port (Xen: atomic bit operations)."""
        self.pause_flags = int(PauseFlag.DOWN)
        """PauseFlag bits, as a plain int: IntFlag arithmetic costs a microsecond, and each event looks at them."""
        self.pause_count = 0
        self.paused_for_shutdown = False
        self.is_initialised = False
        self.paused_for_shutdown = False
        self.cpu: Cpu | None = None
        self.context: Context | None = None
        # Events
        self.info_maddr = 0
        """Machine address of this vCPU's vcpu_info (in shared_info until VCPUOP_register_vcpu_info)."""
        self.info_mfn: int | None = None
        self.virq_to_evtchn = [0] * NR_VIRQS
        self.poll_port = 0
        """While POLLING: the one port polled for, -1 for several; else 0."""
        self.nmi_pending = False
        # Run state (under the scheduler's lock)
        self.runstate = RunState.OFFLINE
        self.runstate_since_ns = 0
        self.runstate_time_ns = [0, 0, 0, 0]
        self.runstate_guest_va: int | None = None
        self.time_guest_va: int | None = None
        """VCPUOP_register_vcpu_time_memory_area: a second copy of vcpu_time_info."""
        # Timers
        self.singleshot_timer: Timer  # the three are made by Schedule.vcpu_init()
        self.periodic_timer: Timer
        self.poll_timer: Timer
        self.periodic_period_ns = 0
        self.periodic_last_ns = 0
        # Scheduler's
        self.sched_data: object = None
        self.processor = 0
        self.hard_affinity: frozenset[int] | None = None
        self.soft_affinity: frozenset[int] | None = None
        self.is_running = False
        self.is_urgent = False
        # Architecture
        self.arch: ArchVcpu
        """``pv`` or ``hvm``, whichever there is."""
        self.pv: PvVcpu
        self.hvm: HvmVcpu

    @property
    def runnable(self) -> bool:
        """vcpu_runnable(): nothing in the vCPU or its domain keeps it from running."""
        return not (self.pause_flags or self.pause_count or self.domain.pause_count)

    def __repr__(self) -> str:
        return f"d{self.domain.domid}v{self.vcpu_id}"
