#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""What deadlines cost: timer signals against the alarm thread, in the same run.

* a slice: what 50 µs of a guest that only counts cost beyond the guest's own instructions, in CPU time of the
  *process*. The guest's pace is taken from slices of 5 ms just before.
* lateness: from the deadline to the guest's last instruction, while another thread keeps the GIL for 5 ms at a time.
* set_deadline to a later and to an earlier moment, in nanoseconds of CPU time.

The last line is a ratio: CPU time that a slice costs, alarm thread ÷ timer signals.

    benchmarks/deadlines.py [--runs N]
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import sys
import threading
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "src"))

from pyxen.machine.clock import RealClock
from pyxen.machine.cpu import unicorn_timer
from pyxen.machine.cpu.base import RAX, RBX, RIP, Exit
from pyxen.machine.cpu.unicorn_x86 import UnicornX86
from pyxen.machine.memory import Memory

SLICE_NS, LONG_NS, ROOT, COUNT, STAMP = 50_000, 5_000_000, 0x100000, 0x1000, 0x2000
# inc rax; jmp
COUNT_CODE = bytes.fromhex("48ffc0 ebfb")
# rdtsc; shl rdx, 32; or rax, rdx; mov rbx, rax; jmp
STAMP_CODE = bytes.fromhex("0f31 48c1e220 4809d0 4889c3 ebf2")


def start(cpu: UnicornX86, rip: int) -> None:
    """A fresh context at ``rip``."""
    cpu.unload()
    cpu.load(cpu.new_context())
    cpu.set_cr3(ROOT)
    cpu.gpr[RIP] = rip


def slices(cpu: UnicornX86, clock: RealClock, slice_ns: int, total_ns: int) -> tuple[int, int, int]:
    """The guest's iterations, CPU time of the process, and how many slices that took."""
    start(cpu, COUNT)
    runs = 0
    begin = time.process_time_ns()
    end = clock.now_ns() + total_ns
    while clock.now_ns() < end:
        assert cpu.run(clock.now_ns() + slice_ns) is Exit.KICK
        runs += 1
    return int(cpu.gpr[RAX]), time.process_time_ns() - begin, runs


def overhead_us(cpu: UnicornX86, clock: RealClock) -> float:
    """CPU time of one short slice that the guest did not get, by its progress in long ones."""
    work, spent, _ = slices(cpu, clock, LONG_NS, 20_000_000)
    per_iteration = spent / work
    work, spent, runs = slices(cpu, clock, SLICE_NS, 20_000_000)
    return (spent - work * per_iteration) / runs / 1000


def lateness_us(cpu: UnicornX86, clock: RealClock) -> float:
    """Median."""
    start(cpu, STAMP)
    stop = False
    sleep = ctypes.PyDLL(None).usleep

    def hold() -> None:
        while not stop:
            sleep(5000)

    hog = threading.Thread(target=hold, daemon=True)
    hog.start()
    late = []
    for _ in range(40):
        deadline = clock.now_ns() + 1_000_000
        cpu.run(deadline)
        late.append((clock.tsc_calibration().to_ns(cpu.gpr[RBX]) - deadline) / 1000)
    stop = True
    hog.join()
    return statistics.median(late)


def set_ns(cpu: UnicornX86, clock: RealClock, step_ns: int, count: int = 10_000) -> float:
    """CPU time of one set_deadline, each ``step_ns`` after the one before."""
    deadline = clock.now_ns() + 1_000_000_000_000
    cpu.set_deadline(deadline)
    begin = time.thread_time_ns()
    for _ in range(count):
        deadline += step_ns
        cpu.set_deadline(deadline)
    return (time.thread_time_ns() - begin) / count


def main() -> None:
    """Print everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    memory, clock = Memory(4 << 20), RealClock()
    for level in range(3):
        memory.q[ROOT + level * 0x1000 >> 3] = ROOT + (level + 1) * 0x1000 | 7
    for page in range(512):
        memory.q[(ROOT + 0x3000 >> 3) + page] = page << 12 | 7
    memory.write(COUNT, COUNT_CODE)
    memory.write(STAMP, STAMP_CODE)
    if unicorn_timer.native() is None:
        print("this host refuses timer signals: nothing to compare")
        return
    cpus = {"timer signals": UnicornX86(memory, clock), "alarm thread": UnicornX86(memory, clock, 1)}
    other = cpus["alarm thread"]
    other._deadline.cancel()
    other._deadline = other._alarm_deadline()
    costs: dict[str, list[float]] = {name: [] for name in cpus}
    # Short and in turn: whatever else the machine does hits both.
    for _ in range(20 * max(arguments.runs, 1)):
        for name, cpu in cpus.items():
            costs[name].append(overhead_us(cpu, clock))
    for name, cpu in cpus.items():
        print(f"{name}: {statistics.median(costs[name]):.1f} µs per slice of {SLICE_NS // 1000} µs; "
              f"{lateness_us(cpu, clock):.0f} µs late while the GIL is taken; set_deadline to later "
              f"{set_ns(cpu, clock, 1000):.0f} ns, to earlier {set_ns(cpu, clock, -1000):.0f} ns")
    ratio = statistics.median(costs["alarm thread"]) / statistics.median(costs["timer signals"])
    print(f"CPU time that a slice costs: alarm thread / timer signals = {ratio:.2f}")
    for cpu in cpus.values():
        cpu.close()
    memory.close()


if __name__ == "__main__":
    main()
