#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""What it costs that a domain's vCPUs take turns on one engine: the same work by two busy vCPUs at once over one after
the other, in CPU time, in one Linux guest.

The work is a loop in the guest's shell, so guest code is spread over some megabytes, and what a switch costs it in
caches is in the figure. Rounds alternate; the median of their ratios counts.

    benchmarks/rotate.py [--rounds N] [--kinds pvh,exact,fast] [--loops N]
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
import time
from pathlib import Path

import pyxen
from pyxen.toolstack.config.paths import guest_dir

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT_S = 300


async def measure(kind: str, rounds: int, loops: int) -> None:
    """Print one line."""
    config = ROOT / "examples" / ("debian-pvh.cfg" if kind == "pvh" else "debian-pv.cfg")
    extra = ["vcpus=2", 'extra="console=hvc0 quiet"'] + ([] if kind == "pvh" else [f'pv_mode="{kind}"'])
    work = f"(i=0; while [ $i -lt {loops} ]; do i=$((i+1)); done)"
    scripts = {"apart": f"{work}; {work}", "at once": f"{work} & {work} & wait"}
    ratios: list[float] = []
    with tempfile.TemporaryDirectory(prefix="pyxen-bench-") as folder:
        async with pyxen.Host(memory="1G", cpus=1, rundir=Path(folder)) as host:
            domain = await host.create(config, extra=extra)
            console = domain.console
            await console.expect(b"/ #", timeout=TIMEOUT_S)
            for _ in range(rounds):
                spent = {}
                for name, script in scripts.items():
                    begin = time.process_time()
                    # The marker is in two parts, or the echo of the command would be taken for it.
                    await console.write(f"{script}; echo do''ne-it\n".encode())
                    await console.expect(b"done-it", timeout=TIMEOUT_S)
                    spent[name] = time.process_time() - begin
                ratios.append(spent["at once"] / spent["apart"])
            await domain.destroy()
    print(f"{kind:<6} at once / apart {statistics.median(ratios):5.2f}   (median of {rounds} rounds)", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="vCPUs that take turns: what it costs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kinds", default="pvh,exact,fast")
    parser.add_argument("--loops", type=int, default=20_000, help="length of the work (%(default)s)")
    arguments = parser.parse_args()
    if not (guest_dir("debian") / "vmlinuz").is_file():
        sys.exit("no guest to boot; run: pyxen guest fetch debian")
    for kind in arguments.kinds.split(","):
        asyncio.run(measure(kind, arguments.rounds, arguments.loops))
    return 0


if __name__ == "__main__":
    sys.exit(main())
