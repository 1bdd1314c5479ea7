# SPDX-License-Identifier: GPL-2.0-only
"""Xen's part of a guest's address space, tried by guest code on the real engine: readable in part, never writable."""

from __future__ import annotations

import pytest

from pyxen.hypervisor.hypervisor import Hypervisor
from pyxen.hypervisor.privcmd import PrivCmd
from pyxen.hypervisor.x86.pv.domain import PvMode
from pyxen.hypervisor.x86.pv.slots import gdt_va
from pyxen.machine.clock import RealClock
from pyxen.machine.cpu.unicorn_x86 import UnicornX86
from pyxen.machine.memory import Memory
from pyxen.machine.topology import Topology
from tests.hypervisor.rig import DATA_PFN, Machine, va

M2P = 0xFFFF800000000000


class RealMachine(Machine):
    """The rig's host with the Unicorn engine."""

    def __init__(self) -> None:
        self.memory = Memory(16 << 20)
        real = RealClock()
        self.clock = real  # type: ignore[assignment]
        self.cpu = UnicornX86(self.memory, real)  # type: ignore[assignment]
        topology = Topology.parse("nodes=1,sockets=1,cores=1,threads=1")
        self.hv = Hypervisor(self.memory, real, topology, [self.cpu])
        self.privcmd = PrivCmd(self.hv)


@pytest.mark.engine
@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize(("area", "readable"), [("m2p", True), ("gdt", None), ("nothing", False)])
@pytest.mark.parametrize("user", [False, True])
def test_nobody_writes_xens_slots(mode: PvMode, area: str, readable: bool | None, user: bool) -> None:
    host = RealMachine()
    try:
        guest = host.guest(mode)
        target = {"m2p": M2P + 8 * guest.mfns[30], "gdt": gdt_va(0), "nothing": M2P + (15 << 39)}[area]
        mfn = {"m2p": guest.hv.frames.m2p.frames[guest.mfns[30] >> 9], "gdt": guest.mfns[8], "nothing": 0}[area]
        before = host.memory.read(mfn << 12, 4096)
        faults: list[tuple[int, int | None, int]] = []

        def exception(vector: int, error: int | None, rip: int, software: bool) -> int:
            faults.append((vector, error, host.cpu.cr2))
            host.cpu.stop()
            return rip

        load, store = b"\x48\x8b\x03", b"\x48\x89\x03"  # mov (%rbx),%rax; mov %rax,(%rbx)
        code_at = va(40) if user else va(DATA_PFN)
        if user:
            guest.user()
        guest.pv.traps.exception = exception  # type: ignore[method-assign, assignment]
        for code in (store, load, b"\xf0\x0f\xb1\x03"):
            faults.clear()
            guest.regs(rbx=target, rax=0)
            guest.put(code_at, code + b"\x0f\x0b")
            host.memory.written(guest.mfns[40 if user else DATA_PFN])
            host.cpu.gpr[16] = code_at
            host.cpu.run(host.clock.now_ns() + 5_000_000_000)
            assert len(faults) == 1
            if code == load and faults[0][0] == 6:
                assert readable or (readable is None and mode == "fast" and not user)
                if area == "m2p":
                    assert host.cpu.gpr[0] == 30
            else:
                assert faults[0][0] == 14
                assert faults[0][2] == target
                assert code != load or not readable
        assert host.memory.read(mfn << 12, 4096) == before
    finally:
        host.close()
