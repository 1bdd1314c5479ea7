# SPDX-License-Identifier: GPL-2.0-only
"""A bare machine for engine tests: RAM, page tables, one recording trap handler. Needs no hypervisor."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

from pyxen.machine.clock import RealClock
from pyxen.machine.cpu.base import RAX, RIP, RSP, Cpu, Exit
from pyxen.machine.cpu.unicorn_x86 import UnicornX86
from pyxen.machine.memory import Memory

CLOCK = RealClock(calibration_ms=5)

P, W, U, NX = 1, 2, 4, 1 << 63
PWU = P | W | U

CODE, STACK_TOP, DATA, GDT = 0x1000, 0x9000, 0x10000, 0x18000
ROOT = 0x100000
"""Machine address of the first page-table page; tables of further address spaces follow at ROOT_STRIDE."""
ROOT_STRIDE = 0x10000


@dataclass
class Trap:
    kind: str
    rip: int
    vector: int | None = None
    error_code: int | None = None
    software: bool = False
    cr2: int = 0


class Recorder:
    """Records traps. A SYSCALL with EAX = 0 stops, as does every exception; ``on_syscall`` and ``on_exception``
    replace that."""

    def __init__(self, cpu: Cpu) -> None:
        self.cpu = cpu
        self.traps: list[Trap] = []
        self.on_syscall: Callable[[int], int] | None = None
        self.on_exception: Callable[[Trap], int] | None = None
        self.on_cpuid: Callable[[int], int] | None = None

    def syscall(self, next_rip: int) -> int:
        if self.on_syscall is not None:
            return self.on_syscall(next_rip)
        self.traps.append(Trap("syscall", next_rip))
        if self.cpu.gpr[RAX] & 0xffffffff == 0:
            self.cpu.stop()
        return next_rip

    def exception(self, vector: int, error_code: int | None, rip: int, software: bool) -> int:
        trap = Trap("exception", rip, vector, error_code, software, self.cpu.cr2)
        self.traps.append(trap)
        if self.on_exception is not None:
            return self.on_exception(trap)
        self.cpu.stop()
        return rip

    def stop(self, next_rip: int) -> int:
        """For ``on_syscall``: leave run() behind the SYSCALL, whatever EAX is."""
        self.cpu.stop()
        return next_rip

    def stop_at_code(self, _next_rip: int) -> int:
        """For ``on_syscall``: leave run() and start over next time."""
        return self.stop(CODE)

    def cpuid(self, rip: int) -> int:
        self.traps.append(Trap("cpuid", rip))
        return self.on_cpuid(rip) if self.on_cpuid is not None else rip + 2


class Machine:
    """32 MiB of RAM and one or more engines. Virtual 0..2 MiB is mapped to the same machine addresses, RWX and user."""

    def __init__(self, engines: int = 1) -> None:
        self.memory = Memory(32 << 20)
        self.cpus = [UnicornX86(self.memory, CLOCK, index) for index in range(engines)]
        self.cpu = self.cpus[0]
        self.recorders = [Recorder(cpu) for cpu in self.cpus]
        self.recorder = self.recorders[0]
        for cpu, recorder in zip(self.cpus, self.recorders, strict=True):
            cpu.traps = recorder
        self.build_space(0)

    def build_space(self, number: int, flags: int = PWU) -> int:
        """A fresh address space; returns its root. It maps virtual 0..2 MiB one to one."""
        root = ROOT + number * ROOT_STRIDE
        self.memory.zero(root >> 12, 4)
        for level in range(3):
            self.memory.q[(root + level * 0x1000) >> 3] = root + (level + 1) * 0x1000 | PWU
        for page in range(512):
            self.memory.q[(root + 0x3000 >> 3) + page] = page << 12 | flags
        return root

    def set_pte(self, va: int, entry: int, space: int = 0) -> None:
        """Overwrite the L1 entry of ``va`` (< 2 MiB); flushes nothing."""
        self.memory.q[(ROOT + space * ROOT_STRIDE + 0x3000 >> 3) + (va >> 12)] = entry

    def start(self, code: bytes, *, at: int = CODE, cpl: int = 3, cpu: int = 0, space: int = 0,
              **registers: int) -> None:
        """Put ``code`` into memory and load a context that will run it."""
        self.put_code(at, code)
        engine = self.cpus[cpu]
        engine.load(engine.new_context(cpl=cpl))
        engine.set_cr3(ROOT + space * ROOT_STRIDE)
        engine.gpr[RIP] = at
        engine.gpr[RSP] = STACK_TOP
        names = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", *(f"r{n}" for n in range(8, 16)), "rip")
        for name, value in registers.items():
            engine.gpr[names.index(name)] = value

    def put_code(self, at: int, code: bytes) -> None:
        """Host write of code, announced."""
        self.memory.write(at, code)
        self.memory.written(at >> 12)

    def close(self) -> None:
        for cpu in self.cpus:
            cpu.close()
        self.memory.close()


class Kicker(threading.Thread):
    """Kicks an engine from another thread, every ``period_s``, until told to end."""

    def __init__(self, cpu: Cpu, period_s: float) -> None:
        super().__init__(daemon=True)
        self.cpu, self.period_s, self.kicks, self._end = cpu, period_s, 0, threading.Event()

    def run(self) -> None:
        while not self._end.wait(self.period_s):
            self.cpu.kick()
            self.kicks += 1

    def __enter__(self) -> Kicker:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self.join()


def run_to_stop(cpu: Cpu, limit: int = 1_000_000) -> int:
    """Run until a handler stops; returns how many kicks interrupted that."""
    for kicks in range(limit):
        exit_ = cpu.run(None)
        if exit_ is Exit.STOP:
            return kicks
        assert exit_ is Exit.KICK, cpu.error
    raise AssertionError("the guest does not finish")
