#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""What the inlined exit check at block starts is worth: guest loops with and without ``unicorn_blockcheck``.

Patches last for a process, so each side runs in processes of its own, interleaved. Prints the ratio of guest speed,
patched ÷ unpatched.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

ROUNDS = 3
# 1: inc rax; jmp 1b        1: call 2f; inc rax; jmp 1b; 2: ret
LOOPS = {"two-instruction block": "48ffc0ebfb", "call and return": "e80500000048ffc0ebf6c3"}


def measure(patched: bool) -> dict[str, float]:
    """Million iterations per CPU second of each loop."""
    from pyxen.machine.cpu import unicorn_blockcheck

    if not patched:
        unicorn_blockcheck.prepare = lambda *_: None
    from pyxen.machine.clock import RealClock
    from pyxen.machine.cpu.base import RAX, RIP, RSP
    from pyxen.machine.cpu.unicorn_x86 import UnicornX86
    from pyxen.machine.memory import Memory

    memory, clock = Memory(4 << 20), RealClock(calibration_ms=2)
    for level in range(3):
        memory.q[0x100000 + level * 0x1000 >> 3] = 0x101000 + level * 0x1000 | 7
    for page in range(512):
        memory.q[(0x103000 >> 3) + page] = page << 12 | 7
    cpu = UnicornX86(memory, clock)
    result = {}
    for name, code in LOOPS.items():
        memory.write(0x1000, bytes.fromhex(code))
        memory.written(1)
        cpu.load(cpu.new_context())
        cpu.set_cr3(0x100000)
        cpu.gpr[RIP], cpu.gpr[RSP] = 0x1000, 0x8000
        started = time.thread_time()
        cpu.run(clock.now_ns() + 200_000_000)
        result[name] = cpu.gpr[RAX] / (time.thread_time() - started) / 1e6
        cpu.unload()
    return result


def main() -> None:
    """Run both sides in turn and print the ratios."""
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1] == "patched")))
        return
    runs: dict[str, list[dict[str, float]]] = {"plain": [], "patched": []}
    for _ in range(ROUNDS):
        for side, results in runs.items():
            out = subprocess.run([sys.executable, __file__, side], check=True, capture_output=True, text=True).stdout
            results.append(json.loads(out))
    for name in LOOPS:
        plain, patched = (statistics.median(run[name] for run in runs[side]) for side in ("plain", "patched"))
        print(f"{name}: {patched / plain:.2f} ({plain:.0f} -> {patched:.0f} M/s)")


if __name__ == "__main__":
    main()
