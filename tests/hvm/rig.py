# SPDX-License-Identifier: GPL-2.0-only
"""A real hypervisor with a small PVH guest in long mode, driven a trap at a time: the test is the engine.

Guest-physical memory: frames 0 to 63; 0 to 3 are L4 to L1 of an identity map of the first 2 MiB of linear addresses
(frames 16 and up: 0 to 15 are not mapped, so that a null pointer faults).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pyxen.abi.xen import DomId
from pyxen.hypervisor.domain import Domain
from pyxen.hypervisor.hypervisor import Hypervisor
from pyxen.hypervisor.lifecycle import domain_kill
from pyxen.hypervisor.privcmd import PrivCmd
from pyxen.hypervisor.vcpu import Vcpu
from pyxen.hypervisor.x86.hvm.context import pvh_start
from pyxen.hypervisor.x86.hvm.traps import HvmTraps
from pyxen.hypervisor.x86.hvm.vcpu import HvmVcpu
from pyxen.machine.clock import VirtualClock
from pyxen.machine.cpu.base import RAX
from pyxen.machine.memory import Memory
from pyxen.machine.topology import Topology
from tests.hvm.scripted_hvm import HvmScriptedCpu

PAGES = 64
AT = 0x20000
"""A linear address that is mapped and free for arguments."""
P, RW, US = 1, 2, 4
M64 = (1 << 64) - 1


class Guest:
    """One PVH domain."""

    def __init__(self, machine: Machine, vcpus: int = 2, pages: int = PAGES) -> None:
        self.machine = machine
        self.hv = machine.hv
        self.domid: DomId = machine.privcmd.domain_create(bytes(range(16)), max_vcpus=vcpus, kind="pvh")
        self.domain: Domain = self.hv.domains[self.domid]
        machine.privcmd.max_mem(self.domid, 8192)
        machine.privcmd.populate_physmap(self.domid, range(pages))
        for level in range(3):
            self.store(level, 0, (level + 1) << 12 | P | RW | US)
        for pfn in range(16, min(pages, 512)):
            self.store(3, pfn, pfn << 12 | P | RW | US)

    @property
    def p2m(self):  # type: ignore[no-untyped-def]
        return self.domain.hvm.p2m

    def vcpu(self, number: int = 0) -> Vcpu:
        return self.domain.vcpus[number]

    @property
    def hvm(self) -> HvmVcpu:
        return self.vcpu().hvm

    @property
    def traps(self) -> HvmTraps:
        return self.hvm.traps

    def mfn(self, gfn: int) -> int:
        mfn = self.p2m.gfn_to_mfn(gfn)
        assert mfn is not None
        return int(mfn)

    def store(self, gfn: int, index: int, value: int) -> None:
        self.hv.memory.q[(self.mfn(gfn) << 9) + index] = value

    def word(self, gfn: int, index: int) -> int:
        return int(self.hv.memory.q[(self.mfn(gfn) << 9) + index])

    def put(self, address: int, data: bytes) -> None:
        self.hv.memory.write((self.mfn(address >> 12) << 12) + (address & 0xFFF), data)

    def get(self, address: int, size: int) -> bytes:
        return self.hv.memory.read((self.mfn(address >> 12) << 12) + (address & 0xFFF), size)

    def boot(self, *, long_mode: bool = True, number: int = 0) -> Guest:
        registers = pvh_start(0x10000, 0x11000)
        if long_mode:
            registers.cr0, registers.cr4, registers.efer, registers.cr3 = 0x80010011, 0x20, 0xD01, 0
            registers.segments[1].attributes = 0xA09B
        self.machine.privcmd.vcpu_set_hvm_context(self.domid, number, registers)
        self.load(number)
        return self

    def load(self, number: int = 0) -> None:
        """Be the engine that runs a vCPU."""
        cpu, vcpu = self.machine.cpu, self.vcpu(number)
        assert vcpu.context is not None
        cpu.load(vcpu.context)
        cpu.traps = vcpu.hvm.traps
        self.domain.evtchn.home_thread = threading.get_ident()
        vcpu.cpu = cpu
        vcpu.hvm.before_entry(cpu)

    def call(self, number: int, *arguments: int, rip: int = 0x10100) -> int:
        """A hypercall, with all its continuations; RAX as a signed number."""
        gpr = self.machine.cpu.gpr
        for index, value in zip((7, 6, 2, 10, 8, 9), arguments, strict=False):
            gpr[index] = value & M64
        gpr[RAX] = number & M64
        for _ in range(100_000):
            if self.machine.cpu.traps.hypercall(rip + 3) != rip:  # type: ignore[attr-defined]
                break
        value = gpr[RAX]
        return value - (1 << 64) if value >> 63 else value

    def op(self, number: int, command: int, data: bytes, *rest: int) -> tuple[int, bytes]:
        """A hypercall (command, pointer): the result, and the structure after it."""
        self.put(AT, data)
        result = self.call(number, command, AT, *rest)
        return result, self.get(AT, len(data))

    def journal(self, kind: str) -> list[tuple[Any, ...]]:
        return [entry for entry in self.machine.cpu.journal if entry[0] == kind]

    @property
    def flags(self) -> int:
        return self.machine.cpu.flags

    @flags.setter
    def flags(self, value: int) -> None:
        self.machine.cpu.flags = value


class Machine:
    """The host: some MiB, one scripted engine, time that stands still."""

    def __init__(self, megabytes: int = 32) -> None:
        self.memory = Memory(megabytes << 20)
        self.clock = VirtualClock()
        self.cpu = HvmScriptedCpu(self.memory, self.clock)
        topology = Topology.parse("nodes=1,sockets=1,cores=1,threads=1")
        self.hv = Hypervisor(self.memory, self.clock, topology, [self.cpu], verbose=True)
        self.privcmd = PrivCmd(self.hv)
        self.baseline = self.hv.allocator.free_frames

    def guest(self, vcpus: int = 2, **how: Any) -> Guest:
        return Guest(self, vcpus).boot(**how)

    def destroy(self, domain: Domain) -> None:
        for _ in range(10_000):
            if domain_kill(domain):
                return
        raise AssertionError("the domain does not die")

    def log(self) -> str:
        return self.privcmd.console_ring()

    def close(self) -> None:
        self.hv.stop()
        self.memory.close()


@contextmanager
def machine(megabytes: int = 32) -> Iterator[Machine]:
    """A host that is closed afterwards."""
    host = Machine(megabytes)
    try:
        yield host
    finally:
        host.close()
