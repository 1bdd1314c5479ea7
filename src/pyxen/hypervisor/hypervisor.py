# SPDX-License-Identifier: GPL-2.0-only
"""The hypervisor: one object that owns machine memory's bookkeeping, the domains, and the mechanisms between them."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from pyxen.abi.xen import DOMID_FIRST_RESERVED, DOMID_IO, DOMID_SELF, DOMID_XEN, NR_HYPERCALLS, DomId, Virq
from pyxen.errors import XenError
from pyxen.hypervisor.conlog import ConsoleLog
from pyxen.hypervisor.cpupool import CpuPools
from pyxen.hypervisor.dirty_map import DirtyMap
from pyxen.hypervisor.domain import Domain, Dying, ShutdownCode
from pyxen.hypervisor.event_channel import EventChannels
from pyxen.hypervisor.frames import FrameTable
from pyxen.hypervisor.grant_table import GrantTable
from pyxen.hypervisor.hypercall_table import build_hvm_table, build_table
from pyxen.hypervisor.lock import TicketLock
from pyxen.hypervisor.pcpu import Pcpu
from pyxen.hypervisor.rendezvous import Rendezvous
from pyxen.hypervisor.schedule import Schedule
from pyxen.hypervisor.trace import Trace
from pyxen.hypervisor.version import COMPILE_DATE, COMPILER, EXTRA, MAJOR, MINOR
from pyxen.hypervisor.virq import GlobalVirqs
from pyxen.hypervisor.x86.pv.slots import XenSlots
from pyxen.hypervisor.x86.pv.validate import PageTables
from pyxen.hypervisor.xsm import Xsm
from pyxen.machine.cpu.base import GPR_NAMES, RIP, HvmCpu, Seg
from pyxen.machine.frame_allocator import FrameAllocator

if TYPE_CHECKING:
    from pyxen.hypervisor.vcpu import Vcpu
    from pyxen.machine.clock import Clock
    from pyxen.machine.cpu.base import Context, Cpu, HvmContext
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
        self.frames = FrameTable(memory, self.allocator, self.flush_domain, self.after_flush)
        PageTables(self.frames)
        self.xen_slots = XenSlots(memory, self.allocator, self.frames.m2p.frames)
        self.global_virqs = GlobalVirqs(self)
        self.hypercalls = build_table()
        self.hvm_hypercalls = build_hvm_table()
        self.enosys_seen: set[tuple[int, int]] = set()
        self.rendezvous = Rendezvous()
        self.dirty_map = DirtyMap(memory.nr_frames, engines)
        self.scheduler = Schedule(self)
        self.pcpus = [Pcpu(self, engine) for engine in engines]
        for pcpu in self.pcpus:
            self.scheduler.add_cpu(pcpu)
        self.scheduler.share_cpus(topology.nr_cpus)
        self.cpupools = self.scheduler.cpupools = CpuPools(self, max(topology.nr_cpus, len(engines)))
        self.dom_xen = self._special(DOMID_XEN)
        self.dom_io = self._special(DOMID_IO)
        self.dom0 = self._special(DomId(0), privileged=True)
        self.domains[DomId(0)] = self.dom0
        self.cpupools.admit(self.dom0)
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

    def new_hvm_context(self, nested_root: int) -> HvmContext:
        """The same for a vCPU under nested paging; there are only domains that want one if the engines can."""
        cpu = self.pcpus[0].cpu
        assert isinstance(cpu, HvmCpu)
        return cpu.new_hvm_context(nested_root)

    # --- domains ----------------------------------------------------------------------------------------

    def new_domid(self, wanted: int = 0) -> DomId:
        """The next free domain id: counting up from 1, around at DOMID_FIRST_RESERVED, as Xen's; or ``wanted``, if
        that is an id and free (else EINVAL)."""
        self.reap()
        with self.domain_list:
            if 0 < wanted < DOMID_FIRST_RESERVED:
                if wanted in self.domains:
                    raise XenError(errno.EINVAL)
                return DomId(wanted)
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

    def flush_domain(self, domain: Domain) -> bool:
        """Drop every cached translation of a domain before a frame of it is used otherwise.

        False if an engine on another thread is executing it: it has been told, and flushes before it enters again or
        returns from a trap handler, but may execute a few more instructions until then (see :meth:`after_flush`).
        """
        for vcpu in domain.vcpus:
            vcpu.arch.flush_tlb()
        return not self.rendezvous.is_inside_elsewhere(domain)

    def after_flush(self, domains: list[Domain], function: Callable[[], None]) -> None:
        """Call ``function`` once none of ``domains``, which :meth:`flush_domain` has just told, can use an old
        translation any more: on a pCPU's thread, outside of guests and trap handlers."""
        waiting = {domain.home for domain in domains if 0 <= domain.home < len(self.pcpus)}
        if not waiting:
            function()
            return
        lock = threading.Lock()

        def arrived(index: int) -> None:
            with lock:
                waiting.discard(index)
                last = not waiting
            if last:
                function()

        for index in sorted(waiting):
            self.pcpus[index].post(partial(arrived, index))

    def crash(self, domain: Domain, reason: str, rip: int | None = None) -> None:
        """domain_crash: the domain shuts down with SHUTDOWN_crash, the log says why; nobody else notices.

        One line with the reason, then, on the thread of its engine, its registers; a trap handler passes ``rip``.
        """
        if domain.is_shutting_down and domain.shutdown_code == ShutdownCode.CRASH:
            return
        reason = " ".join(reason.split())
        domain.crash_reason = reason
        self.log.printk(f"domain_crash called for d{domain.domid}: {reason}")
        for vcpu in domain.vcpus:
            cpu = vcpu.cpu
            live = cpu is not None and cpu.loaded is vcpu.context
            if cpu is not None and live and domain.evtchn.home_thread == threading.get_ident():
                self._dump(vcpu, cpu, rip)
        self.scheduler.domain_shutdown(domain, ShutdownCode.CRASH)

    def _dump(self, vcpu: Vcpu, cpu: Cpu, rip: int | None) -> None:
        gpr, printk = cpu.gpr, self.log.printk
        printk(f"Domain {vcpu.domain.domid} (vcpu#{vcpu.vcpu_id}) crashed on cpu#{vcpu.processor}:")
        printk(f"rip: {gpr[RIP] if rip is None else rip:016x}  flags: {cpu.flags:08x}  cr2: {cpu.cr2:016x}"
               f"  cs: {cpu.selector(Seg.CS):04x}  ss: {cpu.selector(Seg.SS):04x}"
               f"  mode: {vcpu.arch.mode_name()}")
        for first in range(0, RIP, 4):
            printk("  ".join(f"{GPR_NAMES[i]:>3}: {gpr[i]:016x}" for i in range(first, first + 4)))

    def send_global_virq(self, virq: int) -> None:
        """send_global_virq()."""
        self.global_virqs.send(virq)

    def note_enosys(self, domain: Domain, number: int) -> None:
        """With a verbose log, say once a domain which hypercall it tried that is not here (every Linux tries
        xenpmu_op)."""
        key = (domain.domid, min(number, NR_HYPERCALLS))
        if self.log.verbose and key not in self.enosys_seen and len(self.enosys_seen) < 4096:
            self.enosys_seen.add(key)
            self.log.guest_printk(domain.domid, f"d{domain.domid}: hypercall {number} is not implemented (ENOSYS)")

    def reap(self) -> None:
        """complete_domain_destroy() of every dead domain that nobody refers to any more.

        Until then it stays on the list, a zombie: frames of it that others have mapped still carry its id.
        """
        for domain in list(self.domains.values()):
            if domain.dying is Dying.DEAD and not self.frames.pages_held(domain):
                self._forget(domain)

    def _forget(self, domain: Domain) -> None:
        with self.domain_list:
            if self.domains.get(domain.domid) is not domain:
                return  # another thread was first
            del self.domains[domain.domid]
            self.frames.forget(domain)
        self.log.forget(domain.domid)
        for pcpu in self.pcpus:
            pcpu.code.forget(domain)
        self.cpupools.remove_domain(domain)
        self.enosys_seen = {key for key in self.enosys_seen.copy() if key[0] != domain.domid}
        self.log.printk(f"d{domain.domid} destroyed", debug=True)
        self.send_global_virq(Virq.DOM_EXC)
