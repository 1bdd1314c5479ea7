# SPDX-License-Identifier: GPL-2.0-only
"""What the scheduler sees of a hypervisor, and a modelled pCPU that runs workloads in virtual time.

No engine, no threads: a second of virtual time takes milliseconds.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from pyxen.abi.xen import DomId, VcpuId
from pyxen.errors import GuestAccessError, XenError
from pyxen.hypervisor.domain import Domain
from pyxen.hypervisor.rendezvous import Rendezvous
from pyxen.hypervisor.sched.credit import CreditScheduler
from pyxen.hypervisor.schedule import Schedule
from pyxen.hypervisor.timer import TimerQueue
from pyxen.hypervisor.vcpu import Vcpu
from pyxen.machine.clock import VirtualClock

MS = 1_000_000
US = 1_000
S = 1_000_000_000
FOREVER = 1 << 62
INFO = 0x1000
"""Machine address of the first vCPU's vcpu_info."""


class Memory:
    """One megabyte of RAM."""

    def __init__(self) -> None:
        self.b = memoryview(bytearray(1 << 20))
        self.d = self.b.cast("I")
        self.q = self.b.cast("Q")
        self.nr_frames = 256

    def add_listener(self, listener: Callable[[int, int], None]) -> None:
        pass

    def remove_listener(self, listener: Callable[[int, int], None]) -> None:
        pass

    def read(self, maddr: int, size: int) -> bytes:
        return bytes(self.b[maddr : maddr + size])

    def write(self, maddr: int, data: bytes) -> None:
        self.b[maddr : maddr + len(data)] = data


class Trace:
    enabled = False


class Log:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def printk(self, text: str) -> None:
        self.lines.append(text)


class Events:
    """EventChannels, as far as the scheduler uses it: VIRQs are counted, ports are pending when a test says so."""

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        self.home_thread: int | None = None
        self.virqs: list[tuple[int, int]] = []
        self.pending: set[int] = set()
        self.valid = range(1, 64)

    def raise_virq(self, vcpu: Vcpu, virq: int) -> None:
        self.virqs.append((vcpu.vcpu_id, virq))
        self.upcall(vcpu)

    def upcall(self, vcpu: Vcpu) -> None:
        vcpu.domain.hypervisor.memory.b[vcpu.info_maddr] = 1
        vcpu.domain.hypervisor.scheduler.vcpu_unblock(vcpu)

    def local_events_need_delivery(self, vcpu: Vcpu) -> bool:
        b = vcpu.domain.hypervisor.memory.b
        return bool(b[vcpu.info_maddr]) and not b[vcpu.info_maddr + 1]

    def port_is_valid(self, port: int) -> bool:
        return port in self.valid

    def is_pending(self, port: int) -> bool:
        return port in self.pending


class Pv:
    """PvVcpu, as far as the scheduler uses it: one writable window of guest addresses onto machine memory."""

    BASE = 0xFFFF888000000000

    def __init__(self, vcpu: Vcpu) -> None:
        self.vcpu = vcpu
        self.domain = vcpu.domain
        self.kernel_mode = True
        self.preempt_at = 0
        self.traps: Any = None
        self.before: Callable[[Any], None] | None = None
        self.flushes = 0

    def flush_tlb(self) -> None:
        self.flushes += 1

    def _at(self, address: int, size: int) -> int:
        offset = address - self.BASE
        if not self.kernel_mode or not 0 <= offset <= (1 << 19) - size:
            raise GuestAccessError(address)
        return offset + (1 << 19)

    def read(self, address: int, size: int) -> bytes:
        return self.domain.hypervisor.memory.read(self._at(address, size), size)

    def write(self, address: int, data: bytes) -> None:
        self.domain.hypervisor.memory.write(self._at(address, len(data)), data)

    def read_u32(self, address: int) -> int:
        return int.from_bytes(self.read(address, 4), "little")

    def copy_to_kernel(self, address: int, data: bytes) -> None:
        kernel_mode, self.kernel_mode = self.kernel_mode, True
        try:
            self.write(address, data)
        finally:
            self.kernel_mode = kernel_mode

    def before_entry(self, cpu: Any) -> None:
        if self.before is not None:
            self.before(cpu)


class Frames:
    """Nobody's code is anywhere."""

    nr_frames = 256

    def next_owned(self, domid: int, start: int, stop: int | None = None) -> int:
        return -1


class Xsm:
    def __init__(self) -> None:
        self.refuse = False

    def schedop_shutdown(self, current: Domain, target: Domain) -> None:
        if self.refuse:
            raise XenError(1)


class Hypervisor:
    def __init__(self, clock: Any, scheduler: CreditScheduler | None = None) -> None:
        self.clock = clock
        self.memory = Memory()
        self.trace = Trace()
        self.log = Log()
        self.xsm = Xsm()
        self.tsc = clock.tsc_calibration()
        self.domains: dict[int, Domain] = {}
        self.global_virqs: list[int] = []
        self.crashes: list[tuple[int, str]] = []
        self.credit = scheduler or CreditScheduler()
        self.scheduler = Schedule(self, self.credit)  # type: ignore[arg-type]
        self.rendezvous = Rendezvous()
        self.frames = Frames()

    def send_global_virq(self, virq: int) -> None:
        self.global_virqs.append(virq)

    def crash(self, domain: Domain, reason: str) -> None:
        self.crashes.append((domain.domid, reason))
        self.scheduler.domain_shutdown(domain, 3)

    def domain(self, domid: int) -> Domain:
        try:
            return self.domains[domid]
        except KeyError:
            raise XenError(3) from None

    def new_domain(
        self, *, vcpus: int = 1, weight: int | None = None, cap: int | None = None, up: bool = True
    ) -> Domain:
        domid = DomId(len(self.domains) + 1)
        domain = Domain(self, domid, max_vcpus=vcpus, handle=bytes(16))  # type: ignore[arg-type]
        self.domains[domid] = domain
        domain.evtchn = Events(domain)  # type: ignore[assignment]
        self.scheduler.domain_init(domain)
        for i in range(vcpus):
            vcpu = Vcpu(domain, VcpuId(i))
            vcpu.info_maddr = INFO + 64 * ((domid * 8 + i) % 2048)
            vcpu.arch = vcpu.pv = Pv(vcpu)  # type: ignore[assignment]
            domain.vcpus.append(vcpu)
            self.scheduler.vcpu_init(vcpu)
            vcpu.periodic_period_ns = 0
        if weight is not None or cap is not None:
            self.credit.adjust(domain, weight, cap)
        if up:
            for vcpu in domain.vcpus:
                vcpu.is_initialised = True
                self.scheduler.vcpu_up(vcpu)
        return domain


class ModelPcpu:
    """A pCPU that executes "work": each vCPU runs for a while, then blocks for a while, as its workload says."""

    def __init__(self, hypervisor: Hypervisor, index: int = 0) -> None:
        self.hypervisor = hypervisor
        self.index = index
        self.timers = TimerQueue(hypervisor.clock)
        self.resched = False
        self.current: Vcpu | None = None
        self.work: dict[Vcpu, Iterator[tuple[int, int]]] = {}
        self.left: dict[Vcpu, int] = {}
        self.nap: dict[Vcpu, int] = {}
        self.wakes: list[tuple[int, int, Vcpu]] = []
        self.order = itertools.count()
        self.latency: dict[Vcpu, list[int]] = {}
        self.woken_at: dict[Vcpu, int] = {}
        self.switches = 0
        self.idle_ns = 0
        self.kicks = 0
        hypervisor.scheduler.add_cpu(self)

    def request_resched(self) -> None:
        self.resched = True

    def kick(self) -> None:
        self.kicks += 1

    def wait_descheduled(self, vcpu: Vcpu) -> None:
        if self.resched:
            self.reschedule()

    def release_domain(self, domain: Domain) -> None:
        assert self.current is None or self.current.domain is not domain

    def executed_ns(self) -> int:
        assert self.current is not None
        return self.hypervisor.clock.now_ns() - self.current.runstate_since_ns

    @property
    def thread_ident(self) -> int | None:
        return self.index

    def load(self, domain: Domain, work: Callable[[], Iterator[tuple[int, int]]]) -> None:
        """Give each vCPU of ``domain`` a workload: pairs (run ns, then block ns)."""
        for vcpu in domain.vcpus:
            self.work[vcpu] = work()
            self.left[vcpu], self.nap[vcpu] = next(self.work[vcpu])

    def reschedule(self) -> None:
        self.resched = False
        scheduler = self.hypervisor.scheduler
        executed = 0 if self.current is None else self.executed_ns()
        chosen = scheduler.rotate(self.index, self.hypervisor.clock.now_ns(), executed)
        if chosen is None:
            chosen = scheduler.schedule(self.index)
        if chosen is not self.current:
            self.switches += 1
            if self.current is not None:
                scheduler.context_saved(self.current)
            self.current = chosen
        scheduler.hand_over(self.index)
        if chosen is not None and chosen in self.woken_at:
            self.latency.setdefault(chosen, []).append(self.hypervisor.clock.now_ns() - self.woken_at.pop(chosen))

    def run_until(self, end_ns: int) -> None:
        clock: VirtualClock = self.hypervisor.clock
        scheduler = self.hypervisor.scheduler
        while True:
            now = clock.now_ns()
            while self.wakes and self.wakes[0][0] <= now:
                vcpu = heapq.heappop(self.wakes)[2]
                self.woken_at[vcpu] = now
                scheduler.vcpu_unblock(vcpu)
            self.timers.run_expired(now)
            if self.resched:
                self.reschedule()
                continue
            if now >= end_ns:
                return
            until = end_ns
            if self.wakes:
                until = min(until, self.wakes[0][0])
            deadline = self.timers.next_deadline()
            if deadline is not None:
                until = min(until, max(deadline, now + 1))
            vcpu_now = self.current
            if vcpu_now is None:
                clock.advance(until - now)
                continue
            step = min(until - now, self.left[vcpu_now])
            clock.advance(step)
            self.left[vcpu_now] -= step
            if not self.left[vcpu_now]:
                nap = self.nap[vcpu_now]
                self.left[vcpu_now], self.nap[vcpu_now] = next(self.work[vcpu_now])
                scheduler.begin_wait(vcpu_now)
                scheduler.wait_begun(vcpu_now)
                heapq.heappush(self.wakes, (clock.now_ns() + nap, next(self.order), vcpu_now))

    def run_for(self, ns: int) -> None:
        self.run_until(self.hypervisor.clock.now_ns() + ns)


def hog() -> Iterator[tuple[int, int]]:
    """Never blocks."""
    while True:
        yield FOREVER, 0


def burst(run_ns: int, block_ns: int) -> Callable[[], Iterator[tuple[int, int]]]:
    """Runs, blocks, runs, …"""
    return lambda: itertools.repeat((run_ns, block_ns))


def host(**parameters: int) -> tuple[Hypervisor, ModelPcpu]:
    """One modelled pCPU under the credit scheduler, at time 0."""
    hypervisor = Hypervisor(VirtualClock(), CreditScheduler(**parameters))
    return hypervisor, ModelPcpu(hypervisor)


def cpu_time(domain: Domain) -> int:
    """ns that all vCPUs of ``domain`` ran."""
    return sum(domain.hypervisor.scheduler.vcpu_cpu_time(vcpu) for vcpu in domain.vcpus)

