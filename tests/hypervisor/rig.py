# SPDX-License-Identifier: GPL-2.0-only
"""A real hypervisor with a small PV guest, driven a trap at a time: no threads run, the test is the engine.

The guest's memory (pfn -> what): 0-3 its kernel's L4..L1, 4-7 its user's, 8 GDT, 9 LDT, the others data. Kernel tables
map every frame from 8 on at ``va(pfn)``, GDT and LDT read-only; user tables map frames 40 to 47 only.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pyxen.abi.arch_x86 import IRET_CONTEXT, GuestContext, Vgcf
from pyxen.abi.xen import MMUEXT_OP, DomId, Hypercall
from pyxen.hypervisor.domain import Domain
from pyxen.hypervisor.hypervisor import Hypervisor
from pyxen.hypervisor.lifecycle import domain_kill
from pyxen.hypervisor.privcmd import PrivCmd
from pyxen.hypervisor.vcpu import Vcpu
from pyxen.hypervisor.x86.pv.domain import PvMode
from pyxen.hypervisor.x86.pv.vcpu import PvVcpu
from pyxen.machine.clock import VirtualClock
from pyxen.machine.cpu.base import RAX, RIP, RSP, Seg
from pyxen.machine.cpu.scripted import ScriptedCpu
from pyxen.machine.memory import Memory
from pyxen.machine.topology import Topology

VA_BASE = 0x400000
PAGES = 64
GDT_PFN, LDT_PFN, DATA_PFN, STACK_PFN, USER_PFN = 8, 9, 10, 20, 40
P, RW, USER, AD = 1, 2, 4, 0x60
CODE64, CODE32, DATA = 0x00AFFB000000FFFF, 0x00CFFB000000FFFF, 0x00CFF3000000FFFF
CODE64_SEL, DATA_SEL, CODE32_SEL = 0x33, 0x2B, 0x23
EVENT, FAILSAFE, SYSCALL = 0x401000, 0x402000, 0x403000
M64 = (1 << 64) - 1


def va(pfn: int) -> int:
    """Where the kernel sees a frame."""
    return VA_BASE + (pfn << 12)


class Guest:
    """One PV domain whose vCPU 0 is loaded on the engine."""

    def __init__(self, machine: Machine, mode: PvMode, vcpus: int = 2) -> None:
        self.machine = machine
        self.hv = machine.hv
        self.domid: DomId = machine.privcmd.domain_create(bytes(range(16)), max_vcpus=vcpus, pv_mode=mode)
        self.domain: Domain = self.hv.domains[self.domid]
        machine.privcmd.max_mem(self.domid, 4096)
        runs = machine.privcmd.populate_physmap(self.domid, range(PAGES))
        self.mfns = [mfn for run in runs for mfn in run]
        for first, pfns in ((0, range(8, PAGES)), (4, range(USER_PFN, USER_PFN + 8))):
            for level in range(3):
                index = (VA_BASE >> (39 - 9 * level)) & 511
                self.store(first + level, index, self.mfns[first + level + 1] << 12 | P | RW | USER | AD)
            for pfn in pfns:
                writable = 0 if pfn in (GDT_PFN, LDT_PFN) else RW
                self.store(first + 3, (va(pfn) >> 12) & 511, self.mfns[pfn] << 12 | P | writable | USER | AD)
        for selector, descriptor in ((CODE64_SEL, CODE64), (DATA_SEL, DATA), (CODE32_SEL, CODE32)):
            self.store(GDT_PFN, selector >> 3, descriptor)
            self.store(LDT_PFN, selector >> 3, descriptor)
        self.hv.memory.b[(self.domain.shared_info_mfn << 12) + 1] = 1

    @property
    def vcpu(self) -> Vcpu:
        return self.domain.vcpus[0]

    @property
    def pv(self) -> PvVcpu:
        return self.vcpu.pv

    def store(self, pfn: int, index: int, value: int) -> None:
        self.hv.memory.q[(self.mfns[pfn] << 9) + index] = value

    def context(self, **fields: Any) -> GuestContext:
        """As the builder makes it."""
        c = GuestContext(flags=Vgcf.IN_KERNEL | Vgcf.ONLINE)
        c.rip, c.gpr[RSP], c.rflags = va(DATA_PFN), va(STACK_PFN + 1), 0x200
        c.cs, c.ss, c.kernel_ss, c.kernel_sp = 0xE033, 0xE02B, 0xE02B, va(STACK_PFN + 1)
        c.ctrlreg[3], c.ctrlreg[1] = self.mfns[0] << 12, self.mfns[4] << 12
        c.gdt_frames[0], c.gdt_ents = self.mfns[GDT_PFN], 512
        c.event_callback, c.failsafe_callback, c.syscall_callback = EVENT, FAILSAFE, SYSCALL
        for name, value in fields.items():
            setattr(c, name, value)
        return c

    def set_context(self, **fields: Any) -> None:
        self.machine.privcmd.vcpu_set_context(self.domid, 0, self.context(**fields).pack())

    def load(self) -> None:
        """Be the engine that runs vCPU 0."""
        cpu, vcpu = self.machine.cpu, self.vcpu
        assert vcpu.context is not None
        cpu.load(vcpu.context)
        cpu.traps = vcpu.pv.traps
        self.domain.evtchn.home_thread = threading.get_ident()
        vcpu.cpu = cpu
        vcpu.pv.before_entry(cpu)

    def boot(self, **fields: Any) -> Guest:
        self.set_context(**fields)
        self.load()
        return self

    # --- what a guest does --------------------------------------------------------------------------

    def regs(self, **registers: int) -> None:
        order = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11")
        for name, value in registers.items():
            self.machine.cpu.gpr[order.index(name)] = value & M64

    def call(self, number: int, *arguments: int, rip: int = 0x400100) -> int:
        """A hypercall, with all of its continuations; RAX as a signed number."""
        for name, value in zip(("rdi", "rsi", "rdx", "r10", "r8", "r9"), arguments, strict=False):
            self.regs(**{name: value})
        gpr = self.machine.cpu.gpr
        gpr[RAX] = number & M64
        for _ in range(100_000):
            self.rip = self.pv.traps.syscall(rip + 2)
            if self.rip != rip:
                break
        value = gpr[RAX]
        return value - (1 << 64) if value >> 63 else value

    def fault(self, vector: int, error: int | None = None, rip: int = 0x400100, *, soft: bool = False) -> int:
        return self.pv.traps.exception(vector, error, rip, soft)

    def execute(self, code: bytes, rip: int = 0) -> int:
        """The #GP(0) of a privileged instruction; where the guest goes on, relative to the instruction (-1: in its own
        #GP handler)."""
        rip = rip or va(DATA_PFN)
        if self.pv.kernel_mode:
            self.put(rip, code.ljust(16, b"\x90"))
        else:
            self.put_pfn(USER_PFN, 0, code.ljust(16, b"\x90"))
            rip = va(USER_PFN)
        to = self.pv.traps.exception(13, 0, rip, False)
        return -1 if to == self.handlers.get(13) else to - rip

    def user(self, cs: int = CODE64_SEL, ss: int = DATA_SEL, **fields: int) -> int:
        """HYPERVISOR_iret to user mode."""
        return self.iret(cs=cs, ss=ss, rip=va(USER_PFN), rsp=va(USER_PFN + 1), **fields)

    def iret(self, rax: int = 0, r11: int = 0, rcx: int = 0, flags: int = 0, rip: int = 0, cs: int = 0xE030,
             rflags: int = 0x202, rsp: int = 0, ss: int = 0xE02B) -> int:
        sp = va(STACK_PFN) + 256
        self.put(sp, IRET_CONTEXT.pack(rax, r11, rcx, flags, rip, cs, rflags, rsp or va(STACK_PFN + 1), ss))
        self.regs(rsp=sp, rax=Hypercall.IRET)
        return self.pv.traps.syscall(0x400102)

    def trap_table(self, **flags: int) -> None:
        """Handlers for the exceptions that tests cause: vector n at 0x500000 + 16 * n."""
        self.handlers = {n: 0x500000 + 16 * n for n in (1, 3, 4, 6, 7, 13, 14, 0x80)}
        for vector, address in self.handlers.items():
            self.pv.trap_table[vector] = (flags.get(f"v{vector}", 0), 0xE033, address)

    handlers: dict[int, int] = {}

    # --- memory ------------------------------------------------------------------------------------

    def put(self, address: int, data: bytes) -> None:
        self.hv.memory.write(self._maddr(address), data)

    def put_pfn(self, pfn: int, offset: int, data: bytes) -> None:
        self.hv.memory.write((self.mfns[pfn] << 12) + offset, data)

    def get(self, address: int, size: int) -> bytes:
        return self.hv.memory.read(self._maddr(address), size)

    def _maddr(self, address: int) -> int:
        return (self.mfns[(address - VA_BASE) >> 12] << 12) + (address & 0xFFF)

    def frame(self, words: int) -> tuple[int, ...]:
        """The top of the kernel stack."""
        return struct.unpack(f"<{words}Q", self.get(self.machine.cpu.gpr[RSP], 8 * words))

    @property
    def mask(self) -> int:
        return self.hv.memory.b[self.vcpu.info_maddr + 1]

    @mask.setter
    def mask(self, value: int) -> None:
        self.hv.memory.b[self.vcpu.info_maddr + 1] = value

    @property
    def pending(self) -> int:
        return self.hv.memory.b[self.vcpu.info_maddr]

    @pending.setter
    def pending(self, value: int) -> None:
        self.hv.memory.b[self.vcpu.info_maddr] = value

    def cs_ss(self) -> tuple[int, int]:
        return self.machine.cpu.selector(Seg.CS), self.machine.cpu.selector(Seg.SS)


class Machine:
    """The host: 16 MiB, one scripted engine, time that stands still."""

    def __init__(
        self, megabytes: int = 16, *, verbose: bool = False, topology: str = "nodes=1,sockets=1,cores=1,threads=1"
    ) -> None:
        shape = Topology.parse(topology)
        self.memory = Memory(megabytes << 20, shape.nodes)
        self.clock = VirtualClock()
        self.cpu = ScriptedCpu(self.memory, self.clock)
        self.hv = Hypervisor(self.memory, self.clock, shape, [self.cpu], verbose=verbose)
        self.privcmd = PrivCmd(self.hv)
        self.baseline = self.hv.allocator.free_frames

    def guest(self, mode: PvMode = "exact", **fields: Any) -> Guest:
        guest = Guest(self, mode).boot(**fields)
        guest.trap_table()
        return guest

    def destroy(self, domain: Domain) -> None:
        for _ in range(10_000):
            if domain_kill(domain):
                return
        raise AssertionError("the domain does not die")

    def log(self) -> str:
        return self.privcmd.console_ring()

    def pin(self, guest: Guest, pfn: int, level: int) -> None:
        self.privcmd.hypercall(
            Hypercall.MMUEXT_OP, [bytearray(MMUEXT_OP.pack(level - 1, guest.mfns[pfn], 0)), 1, 0, guest.domid])

    def close(self) -> None:
        self.hv.stop()
        self.memory.close()


@contextmanager
def machine(topology: str = "nodes=1,sockets=1,cores=1,threads=1") -> Iterator[Machine]:
    """A host that is closed afterwards."""
    host = Machine(topology=topology)
    try:
        yield host
    finally:
        host.close()


__all__ = ["RIP", "Guest", "Machine", "machine", "va"]
