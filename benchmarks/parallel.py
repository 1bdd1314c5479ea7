#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""A host uses its cores: two busy single-vCPU guests on two pCPUs do at least 1.8 times the work of one pCPU.

Each guest counts in a register; the sum of both counts a second is the work. One and two pCPUs take turns, so that a
noisy machine hits both. What the machine itself can do at this moment is printed beside it: two processes that count
against one.

    benchmarks/parallel.py [--seconds N] [--runs N]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pyxen

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pyxen.machine.cpu.base import RBX  # noqa: E402
from tests.host.small_guests import config, write_kernel  # noqa: E402 (the guests of the tests: no compiler needed)

LEAST = 1.8
GUESTS = 2
SETTLE_S = 0.5
_COUNT = "import time\nn=0\nend=time.monotonic()+{seconds}\nwhile time.monotonic()<end: n+=1\nprint(n)"


async def work(kernel: Path, cpus: int, seconds: float) -> float:
    """Millions of loops a second of both guests together."""
    async with pyxen.Host(memory="128M", cpus=cpus, max_engines=cpus) as host:
        domains = [await host.create(config(kernel, f"busy{i}")) for i in range(GUESTS)]
        await asyncio.sleep(SETTLE_S)
        before, start = [(await domain.registers()).gpr[RBX] for domain in domains], time.perf_counter()
        await asyncio.sleep(seconds)
        after, end = [(await domain.registers()).gpr[RBX] for domain in domains], time.perf_counter()
        return sum(b - a for a, b in zip(before, after, strict=True)) / (end - start) / 1e6


def machine(seconds: float) -> float:
    """How much more two processes do than one, here and now."""

    def counted(processes: int) -> int:
        command = [sys.executable, "-c", _COUNT.format(seconds=seconds)]
        running = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(processes)]
        return sum(int(process.communicate()[0]) for process in running)

    return counted(2) / counted(1)


def main() -> int:
    parser = argparse.ArgumentParser(description="the work of two busy guests on two pCPUs over that on one")
    parser.add_argument("--seconds", type=float, default=4.0)
    parser.add_argument("--runs", type=int, default=3)
    arguments = parser.parse_args()
    if (os.cpu_count() or 1) < 2:
        print("this computer has one core: nothing to measure")
        return 0
    ratios = []
    with tempfile.TemporaryDirectory(prefix="pyxen-parallel-") as folder:
        kernel = write_kernel(Path(folder) / "count", then="count")
        for _ in range(arguments.runs):
            one, two = (asyncio.run(work(kernel, cpus, arguments.seconds)) for cpus in (1, 2))
            ratios.append(two / one)
            print(f"1 pCPU: {one:7.1f} M loops/s   2 pCPUs: {two:7.1f} M loops/s   ratio {two / one:.2f}"
                  f"   (two processes over one: {machine(1.0):.2f})", flush=True)
    median = statistics.median(ratios)
    print(f"\nratio {median:.2f} (at least {LEAST})")
    return 0 if median >= LEAST else 1


if __name__ == "__main__":
    sys.exit(main())
