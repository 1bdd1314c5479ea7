#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""Rate of nested faults: a write-protected page, the exit to Python, the grant and the resumed store.

That is the price of log-dirty, of lazy population and of a vm_event's first half. Rates are per second of CPU time;
the ratio is against a bare hypercall of the same guest in the same run, so that it says something on a busy machine.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from pyxen.machine.clock import RealClock
from pyxen.machine.cpu.base import RAX, RCX, RIP, RSI, NoTraps
from pyxen.machine.cpu.unicorn_x86 import UnicornX86
from pyxen.machine.memory import Memory

PAGES = 512
ROOT, GUEST, CODE = 0x100000, 0x400000, 0x1000
P, W, U = 1, 2, 4
# 1: mov [esi],eax; add esi,0x1000; dec ecx; jnz 1b; vmcall; jmp 1b   (32-bit, no paging)
STORES = bytes.fromhex("8906 81c600100000 49 75f5 0f01c1 ebf0")
# 1: vmcall; jmp 1b
HYPERCALLS = bytes.fromhex("0f01c1 ebfb")


class Handler(NoTraps):
    """Grants what is written to, protects all again at each hypercall, stops after ``rounds`` of those."""

    def __init__(self, cpu: UnicornX86, memory: Memory) -> None:
        self.cpu = cpu
        self.table = memory.q[ROOT + 0x3000 >> 3:(ROOT + 0x3000 >> 3) + 512]
        self.protected = [GUEST + (page << 12) | P | U for page in range(512)]
        self.faults = self.rounds = self.calls = 0

    def nested_fault(self, gpa: int, error_code: int, rip: int) -> int:
        """Grant the write."""
        if error_code != 1 << 32 | 7:
            raise AssertionError(f"nested fault {error_code:#x} at {gpa:#x}")
        self.faults += 1
        self.table[gpa >> 12] |= W
        return rip

    def hypercall(self, next_rip: int) -> int:
        """End of a round."""
        self.calls += 1
        if self.rounds == self.calls:
            self.cpu.stop()
        return next_rip

    def protect(self) -> None:
        """Everything but the page with the code."""
        for page in range(2, 512):
            self.table[page] = self.protected[page]
        self.cpu.flush_tlb()
        self.cpu.gpr[RSI], self.cpu.gpr[RCX], self.cpu.gpr[RAX] = 0x2000, PAGES - 2, 1


class FaultHandler(Handler):
    """A hypercall protects all pages again."""

    def hypercall(self, next_rip: int) -> int:
        """End of a round, and the next one."""
        self.protect()
        return super().hypercall(next_rip)


def measure(memory: Memory, code: bytes, kind: type[Handler], rounds: int) -> tuple[Handler, float]:
    """CPU seconds of ``rounds`` hypercalls of ``code``."""
    cpu = UnicornX86(memory, RealClock(calibration_ms=1))
    handler = kind(cpu, memory)
    handler.rounds = rounds
    cpu.traps = handler
    for level in range(3):
        memory.q[ROOT + level * 0x1000 >> 3] = ROOT + (level + 1) * 0x1000 | P | W | U
    for page in range(512):
        handler.table[page] = handler.protected[page] | W
    memory.write(GUEST + CODE, code)
    cpu.load(cpu.new_hvm_context(ROOT))
    cpu.gpr[RIP] = CODE
    handler.protect()
    started = time.thread_time()
    cpu.run(None)
    spent = time.thread_time() - started
    if handler.calls != rounds:
        raise AssertionError(f"the run ended after {handler.calls} hypercalls: {cpu.error}")
    cpu.close()
    return handler, spent


def main() -> None:
    """Print rates and their ratio, best of ``--runs``."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--runs", type=int, default=3)
    runs = parser.parse_args().runs
    memory = Memory(16 << 20)
    faults = hypercalls = 0.0
    for _ in range(runs):
        handler, spent = measure(memory, STORES, FaultHandler, 60)
        faults = max(faults, handler.faults / spent)
        handler, spent = measure(memory, HYPERCALLS, Handler, 100_000)
        hypercalls = max(hypercalls, handler.calls / spent)
    print(f"nested fault, grant, resume {faults / 1e3:7.0f} k/s")
    print(f"hypercall                   {hypercalls / 1e3:7.0f} k/s")
    print(f"ratio fault / hypercall     {faults / hypercalls:7.2f}")


if __name__ == "__main__":
    main()
