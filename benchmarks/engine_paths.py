#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""Costs of the engine's paths in nanoseconds of CPU time, and what the two address spaces save.

The last line is a ratio: a guest that touches PAGES pages in each of two address spaces, changed by ``set_cr3`` ÷ by
``switch_space``. That is the shape of an exact-mode guest's system calls.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from pyxen.machine.clock import RealClock
from pyxen.machine.cpu.base import RCX, RIP, RSI, Exit, NoTraps
from pyxen.machine.cpu.unicorn_x86 import UnicornX86
from pyxen.machine.memory import Memory

PAGES = 40
CODE, DATA, ROOTS = 0x1000, 0x40000, (0x100000, 0x110000)
# syscall; jmp -4
SYSCALL_LOOP = bytes.fromhex("0f05ebfc")
# 1: mov rax,[rsi]; add rsi,4096; dec rcx; jnz 1b; syscall
TOUCH = bytes.fromhex("488b06 4881c600100000 48ffc9 75f1 0f05")


class Handler(NoTraps):
    """Calls one function per SYSCALL."""

    def __init__(self) -> None:
        self.handler: Callable[[int], int] = lambda next_rip: next_rip

    def syscall(self, next_rip: int) -> int:
        """Forward to ``handler``."""
        return self.handler(next_rip)


def nanoseconds(what: Callable[[], object], count: int = 20_000) -> float:
    """CPU time of one call."""
    started = time.thread_time_ns()
    for _ in range(count):
        what()
    return (time.thread_time_ns() - started) / count


def in_guest(cpu: UnicornX86, code: bytes, count: int, handler: Callable[[int], int]) -> float:
    """CPU time of one SYSCALL of ``code``, handler included."""
    left = count

    def syscall(next_rip: int) -> int:
        nonlocal left
        left -= 1
        if not left:
            cpu.stop()
        return handler(next_rip)

    assert isinstance(cpu.traps, Handler)
    cpu.traps.handler = syscall
    cpu._memory.write(CODE, code)
    cpu._memory.written(CODE >> 12)
    cpu.unload()
    cpu.load(cpu.new_context())
    cpu.set_cr3(ROOTS[0])
    cpu.gpr[RIP], cpu.gpr[RSI], cpu.gpr[RCX] = CODE, DATA, PAGES
    started = time.thread_time_ns()
    assert cpu.run(None) is Exit.STOP
    return (time.thread_time_ns() - started) / count


def main() -> None:
    """Print everything."""
    memory, clock = Memory(4 << 20), RealClock()
    for root in ROOTS:
        for level in range(3):
            memory.q[root + level * 0x1000 >> 3] = root + (level + 1) * 0x1000 | 7
        for page in range(512):
            memory.q[(root + 0x3000 >> 3) + page] = page << 12 | 7
    cpu = UnicornX86(memory, clock)
    cpu.traps = Handler()
    print(f"syscall to a handler and back  {in_guest(cpu, SYSCALL_LOOP, 100_000, lambda rip: rip):7.0f} ns")
    one, two = cpu.new_context(), cpu.new_context()

    def kicked_run() -> None:
        cpu.kick()
        cpu.run(None)

    def load_both() -> None:
        cpu.load(one)
        cpu.load(two)

    def both_spaces() -> None:
        cpu.switch_space(1, ROOTS[1])
        cpu.switch_space(0, ROOTS[0])

    print(f"run() that ends at once        {nanoseconds(kicked_run):7.0f} ns")
    print(f"load of another context        {nanoseconds(load_both) / 2:7.0f} ns")
    print(f"set_cr3                        {nanoseconds(lambda: cpu.set_cr3(ROOTS[0])):7.0f} ns")
    print(f"switch_space                   {nanoseconds(both_spaces) / 2:7.0f} ns")
    print(f"flush_tlb_page                 {nanoseconds(lambda: cpu.flush_tlb_page(DATA)):7.0f} ns")
    print(f"invalidate, no code there      {nanoseconds(lambda: cpu.invalidate(0x300000, 4096)):7.0f} ns")
    print(f"flags                          {nanoseconds(lambda: cpu.flags):7.0f} ns")
    print(f"set_deadline to a later time   {nanoseconds(lambda: cpu.set_deadline(1 << 60)):7.0f} ns")
    print(f"clock.now_ns                   {nanoseconds(clock.now_ns):7.0f} ns")

    slot = 0

    def toggle(change: Callable[[int], None]) -> Callable[[int], int]:
        def handler(_next_rip: int) -> int:
            nonlocal slot
            slot ^= 1
            change(slot)
            cpu.gpr[RSI], cpu.gpr[RCX] = DATA, PAGES
            return CODE
        return handler

    flushing = in_guest(cpu, TOUCH, 20_000, toggle(lambda s: cpu.set_cr3(ROOTS[s])))
    slot = 0
    keeping = in_guest(cpu, TOUCH, 20_000, toggle(lambda s: cpu.switch_space(s, ROOTS[s])))
    print(f"two spaces of {PAGES} pages: {flushing:.0f} ns by set_cr3, {keeping:.0f} ns by switch_space: ratio "
          f"{flushing / keeping:.2f}")
    cpu.close()
    memory.close()


if __name__ == "__main__":
    main()
