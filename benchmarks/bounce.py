#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""A guest that rewrites its own code is bounced between two engines, ten thousand times; it must never execute old
code.

Prints how long a move takes, as a multiple of a context switch between two guests on one engine measured in the same
run.

    benchmarks/bounce.py [--moves N] [--runs N]
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

import pyxen

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from pyxen.hypervisor import schedule_homes  # noqa: E402
from pyxen.machine.cpu.base import RBX  # noqa: E402
from tests.host.small_guests import config, write_kernel  # noqa: E402 (the guests of the tests: no compiler needed)

schedule_homes.HOME_TURN_NS = 20_000  # else a domain stays for 5 ms where it runs


async def bounce(kernel: Path, moves: int) -> tuple[float, int]:
    """CPU seconds of all moves, and how far the guest counted. Raises RuntimeError when it crashed."""
    async with pyxen.Host(memory="128M", cpus=2, max_engines=2) as host:
        domain = await host.create(config(kernel, "selfmod", 'on_crash = "preserve"'))
        inner = host.hypervisor.domains[domain.domid]
        start, moved, at = time.process_time(), 0, inner.home
        while moved < moves:
            host.hypervisor.scheduler.claim(inner, 1 - inner.home)
            for _ in range(100):
                if inner.home != at:
                    moved, at = moved + 1, inner.home
                    break
                await asyncio.sleep(0)
            if inner.is_shutting_down:
                raise RuntimeError(f"the guest executed old code after {moved} moves\n{host.dmesg()}")
        spent = time.process_time() - start
        return spent, (await domain.registers()).gpr[RBX]


def main() -> int:
    parser = argparse.ArgumentParser(description="bounce a self-modifying guest between two engines")
    parser.add_argument("--moves", type=int, default=10_000)
    parser.add_argument("--runs", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="pyxen-bounce-") as folder:
        kernel = write_kernel(Path(folder) / "selfmod", then="selfmod")
        for _ in range(arguments.runs):
            try:
                spent, count = asyncio.run(bounce(kernel, arguments.moves))
            except RuntimeError as error:
                print(error)
                return 1
            each = spent / arguments.moves * 1e6
            print(f"{arguments.moves} moves, the guest counted to {count}: right ({each:.0f} us CPU a move)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
