# SPDX-License-Identifier: GPL-2.0-only
"""The hypervisor: one object that owns machine memory's bookkeeping, the domains, and the mechanisms between them."""

from __future__ import annotations

import errno
import threading
from typing import TYPE_CHECKING

from pyxen.abi.xen import DOMID_FIRST_RESERVED, DOMID_IO, DOMID_SELF, DOMID_XEN, DomId
from pyxen.errors import XenError
from pyxen.hypervisor.conlog import ConsoleLog
from pyxen.hypervisor.domain import Domain, ShutdownCode
from pyxen.hypervisor.event_channel import EventChannels
from pyxen.hypervisor.frames import FrameTable
from pyxen.hypervisor.grant_table import GrantTable
from pyxen.hypervisor.hypercall_table import build_table
from pyxen.hypervisor.lock import TicketLock
from pyxen.hypervisor.pcpu import Pcpu
from pyxen.hypervisor.schedule import Schedule
from pyxen.hypervisor.trace import Trace
from pyxen.hypervisor.version import COMPILE_DATE, COMPILER, EXTRA, MAJOR, MINOR
from pyxen.hypervisor.virq import GlobalVirqs
from pyxen.hypervisor.x86.pv.slots import XenSlots
from pyxen.hypervisor.x86.pv.validate import PageTables
from pyxen.hypervisor.xsm import Xsm
from pyxen.machine.frame_allocator import FrameAllocator

if TYPE_CHECKING:
    from pyxen.machine.clock import Clock
    from pyxen.machine.cpu.base import Context, Cpu
    from pyxen.machine.memory import Memory
    from pyxen.machine.topology import Topology


class Hypervisor:
    """Everything below dom0's software. ``engines`` are the machine's CPUs; start() starts their threads.

    ``domain_list`` guards ``domains`` and domain ids; it is the outermost lock.
    """

    def __init__(
        self, memory: Memory, clock: Clock, topology: Topology, engines: list[Cpu], *, xsm: Xsm | None = None,
        verbose: bool = False,
    ) -> None:
        self.memory = memory
        self.clock = clock
        self.topology = topology
        self.tsc = clock.tsc_calibration()
        self.log = ConsoleLog(clock.now_ns, verbose=verbose)
        self.trace = Trace(clock)
        self.xsm = xsm or Xsm()
        self.domain_list = TicketLock("the list of domains and domain ids")
        self.domains: dict[DomId, Domain] = {}
        self._next_domid = 1
        self.allocator = FrameAllocator(memory, first_mfn=16)
        self.frames = FrameTable(memory, self.allocator, self.flush_domain)
        PageTables(self.frames)
        self.xen_slots = XenSlots(memory, self.allocator, self.frames.m2p.frames)
        self.global_virqs = GlobalVirqs(self)
        self.hypercalls = build_table()
        self.enosys_seen: set[tuple[int, int]] = set()
        self.scheduler = Schedule(self)
        self.pcpus = [Pcpu(self, engine) for engine in engines]
        for pcpu in self.pcpus:
            self.scheduler.add_cpu(pcpu)
        self.dom_xen = self._special(DOMID_XEN)
        self.dom_io = self._special(DOMID_IO)
        self.dom0 = self._special(DomId(0), privileged=True)
        self.domains[DomId(0)] = self.dom0
        self.reserved_frames = memory.nr_frames - self.allocator.free_frames
        self.log.printk(f"Xen version {MAJOR}.{MINOR}{EXTRA} ({COMPILER}) {COMPILE_DATE}")
        self.log.printk(f"System RAM: {memory.size_bytes >> 20}MB ({memory.size_bytes >> 10}kB)")
        self.log.printk("Using scheduler: SMP Credit Scheduler (credit)")
        self.log.printk(f"Brought up {len(engines)} CPUs on {topology.nr_cpus} modelled")

    def _special(self, domid: DomId, *, privileged: bool = False) -> Domain:
        domain = Domain(self, domid, max_vcpus=1, handle=bytes(16), privileged=privileged)
        domain.evtchn = EventChannels(domain)
        domain.grant_table = GrantTable(domain)
        domain.max_pages = self.memory.nr_frames
        return domain

    # --- threads --------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the engines' threads."""
        for pcpu in self.pcpus:
            pcpu.start()

    def stop(self) -> None:
        """Stop the engines' threads and close the engines. Domains should be gone."""
        for pcpu in self.pcpus:
            pcpu.shutdown()

    def new_context(self) -> Context:
        """A fresh context for a vCPU (any engine of the host can load it)."""
        return self.pcpus[0].cpu.new_context()

    # --- domains ----------------------------------------------------------------------------------------

    def new_domid(self) -> DomId:
        """The next free domain id: counting up from 1, around at DOMID_FIRST_RESERVED, as Xen's."""
        with self.domain_list:
            for _ in range(DOMID_FIRST_RESERVED):
                domid = DomId(self._next_domid)
                self._next_domid = domid + 1 if domid + 1 < DOMID_FIRST_RESERVED else 1
                if domid not in self.domains:
                    return domid
        raise XenError(errno.ENOMEM)

    def domain(self, domid: int, caller: Domain | None = None) -> Domain:
        """rcu_lock_domain_by_any_id: DOMID_SELF means ``caller``. Raises XenError(ESRCH)."""
        if caller is not None and domid in (DOMID_SELF, caller.domid):
            return caller
        found = self.domains.get(DomId(domid))
        if found is None:
            raise XenError(errno.ESRCH)
        return found

    def flush_domain(self, domain: Domain) -> None:
        """Drop every cached translation of a domain before a frame of it is used otherwise."""
        for vcpu in domain.vcpus:
            vcpu.pv.flush_tlb()

    def crash(self, domain: Domain, reason: str) -> None:
        """domain_crash: the domain shuts down with SHUTDOWN_crash, the log says why; nobody else notices."""
        if domain.is_shutting_down and domain.shutdown_code == ShutdownCode.CRASH:
            return
        domain.crash_reason = reason
        self.log.printk(f"domain_crash called for d{domain.domid}: {reason}")
        for vcpu in domain.vcpus:
            cpu = vcpu.cpu
            if cpu is not None and self.pcpus[vcpu.processor].ident == threading.get_ident():
                gpr = cpu.gpr
                self.log.printk(f"Domain {domain.domid} (vcpu#{vcpu.vcpu_id}) crashed on cpu#{vcpu.processor}:")
                names = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi")
                self.log.printk("  ".join(f"{n}: {gpr[i]:016x}" for i, n in enumerate(names[:4])))
                self.log.printk("  ".join(f"{n}: {gpr[i + 4]:016x}" for i, n in enumerate(names[4:])))
                self.log.printk(f"rip: {gpr[16]:016x}  cr2: {cpu.cr2:016x}  flags: {cpu.flags:08x}")
        self.scheduler.domain_shutdown(domain, ShutdownCode.CRASH)

    def send_global_virq(self, virq: int) -> None:
        """send_global_virq()."""
        self.global_virqs.send(virq)

    def note_enosys(self, domain: Domain, number: int) -> None:
        """Say once a domain which hypercall it tried that is not here."""
        key = (domain.domid, number)
        if key not in self.enosys_seen and len(self.enosys_seen) < 4096:
            self.enosys_seen.add(key)
            self.log.guest_printk(domain.domid, f"d{domain.domid}: hypercall {number} is not implemented (ENOSYS)")

    def forget(self, domain: Domain) -> None:
        """A domain is dead and holds nothing: take it off the list."""
        with self.domain_list:
            self.domains.pop(domain.domid, None)
        self.log.forget(domain.domid)
        self.enosys_seen = {key for key in self.enosys_seen if key[0] != domain.domid}
