#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""The credit scheduler's promise: busy guests that share one engine get CPU time in proportion to their weights.

Single-vCPU guests that never stop computing run together; each one's share of the CPU time is compared with its share
of the weights, and must be within 5 % of it. A guest with a cap must get no more than that, though nobody else wants
the CPU.

    benchmarks/fairness.py [--seconds N] [--runs N]      (--runs: rounds per case, the median counts)
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import tempfile
from pathlib import Path

import pyxen

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.host.small_guests import config, write_kernel  # noqa: E402 (the guests of the tests: no compiler needed)

CASES: list[tuple[int, ...]] = [(256, 256), (256, 512), (256, 1024), (256, 256, 256), (256, 512, 1024)]
CAPS = [20, 50]
TOLERANCE = 0.05
SETTLE_S = 1.0
"""Credits are handed out every 30 ms; the first periods, with vCPUs that start boosted, are not measured."""


async def shares(kernel: Path, weights: tuple[int, ...], cap: int, seconds: float) -> list[float]:
    """CPU seconds a second of each guest, run together."""
    async with pyxen.Host(memory="128M", cpus=1) as host:
        lines = [(f"cpu_weight = {weight}", f"cap = {cap}") for weight in weights]
        domains = [await host.create(config(kernel, f"w{i}", *more)) for i, more in enumerate(lines)]
        await asyncio.sleep(SETTLE_S)
        clock = host.clock

        def used() -> list[int]:
            found = {row["domid"]: row["cpu_time_ns"] for row in host.rows()}
            return [int(str(found[domain.domid])) for domain in domains]

        start, before = clock.now_ns(), used()
        await asyncio.sleep(seconds)
        elapsed, after = clock.now_ns() - start, used()
        return [(b - a) / elapsed for a, b in zip(before, after, strict=True)]


def main() -> int:
    parser = argparse.ArgumentParser(description="CPU shares of busy guests against their weights and caps")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--runs", type=int, default=1)
    arguments = parser.parse_args()
    fair = True
    with tempfile.TemporaryDirectory(prefix="pyxen-fairness-") as folder:
        kernel = write_kernel(Path(folder) / "spin", then="spin")
        print(f"{'weights':<18}{'CPU':>6}   share (wanted, ratio) of each")
        for weights in CASES:
            rounds = [asyncio.run(shares(kernel, weights, 0, arguments.seconds)) for _ in range(arguments.runs)]
            used = [statistics.median(column) for column in zip(*rounds, strict=True)]
            cells = []
            for weight, cpu in zip(weights, used, strict=True):
                wanted, share = weight / sum(weights), cpu / sum(used)
                fair &= abs(share / wanted - 1) <= TOLERANCE
                cells.append(f"{share:.3f} ({wanted:.3f}, {share / wanted:.3f})")
            print(f"{' '.join(map(str, weights)):<18}{sum(used):6.1%}   {'   '.join(cells)}", flush=True)
        for cap in CAPS:
            rounds = [asyncio.run(shares(kernel, (256,), cap, arguments.seconds)) for _ in range(arguments.runs)]
            cpu = statistics.median(row[0] for row in rounds)
            fair &= abs(cpu / (cap / 100) - 1) <= TOLERANCE
            print(f"{f'cap {cap}':<18}{cpu:6.1%}   {cpu / (cap / 100):.3f} of its cap", flush=True)
    print("\nfair" if fair else f"\nNOT FAIR: a share is off by more than {TOLERANCE:.0%}")
    return 0 if fair else 1


if __name__ == "__main__":
    sys.exit(main())
