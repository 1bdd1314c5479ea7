#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""Two domains of four vCPUs under load for a minute, on whatever engines the host has.

Each vCPU computes what it knows the result of, vCPU 0 plays ping-pong by IPI with the others, takes them down and
brings them up again, all at once (guests/src/smpload.c). Printed for each domain: errors (there must be none), work
done, the round trip of an IPI idle and under load, and how often a vCPU was taken down and came back. With --kind both
there is one PV and one PVH domain.

    benchmarks/smp.py [--seconds N] [--cpus N] [--vcpus N] [--domains N] [--kind pv|pvh|both] [--pv-mode exact|fast]
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
from pathlib import Path

import pyxen

ROOT = Path(__file__).resolve().parents[1]
GUESTS = ROOT / "guests"
END_S = 60.0
"""Longer than the slowest end of a load takes."""


def config(name: str, kind: str, vcpus: int, seconds: int) -> str:
    kernel = GUESTS / "build" / ("smpload" if kind == "pv" else "smpload.pvh")
    return "\n".join([
        f'name = "{name}"', f'type = "{kind}"', f'kernel = "{kernel}"', "memory = 32", f"vcpus = {vcpus}",
        f'extra = "seconds={seconds}"', 'on_poweroff = "destroy"', 'on_crash = "destroy"',
    ])


async def watch(domain: pyxen.DomainHandle, seconds: int) -> tuple[str, list[str]]:
    """Run a domain to its end: why it ended, and its console."""
    output = asyncio.ensure_future(domain.console.read_to_end())
    await asyncio.sleep(0)
    await domain.unpause()
    try:
        async with asyncio.timeout(seconds + END_S):
            reason = await domain.wait()
            await domain.wait_gone()
    except TimeoutError:
        reason = "it did not end"
        await domain.destroy()
    return reason, (await output).decode(errors="replace").splitlines()


def report(name: str, reason: str, lines: list[str], vcpus: int) -> bool:
    """Print one domain's figures; whether all is as it must be."""
    found = next((line for line in lines if line.startswith("RESULT ")), None)
    if found is None or reason != "poweroff":
        print(f"{name:<12} ended with {reason}:", *lines[-10:], sep="\n    ")
        return False
    values = dict(word.split("=", 1) for word in found.split()[1:])
    work = [int(n) for n in values["work"].split(",")]
    print(f"{name:<12}{values['errors']:>7}{sum(work):>9}{min(work):>7}{int(values['idle_median_ns']) / 1000:>12.1f}"
          f"{int(values['median_ns']) / 1000:>12.1f}{int(values['p99_ns']) / 1000:>12.1f}{values['cycles']:>9}")
    for line in lines:
        if line.startswith(("ERROR", "FAIL")):
            print(f"    {line}")
    return values["errors"] == "0" and all(work) and (vcpus == 1 or int(values["cycles"]) > 0)


async def run(arguments: argparse.Namespace) -> bool:
    kinds = ["pv", "pvh"] if arguments.kind == "both" else [arguments.kind]
    async with pyxen.Host(memory="512M", cpus=arguments.cpus, pv_mode=arguments.pv_mode) as host:
        names = [f"{kinds[n % len(kinds)]}{n}" for n in range(arguments.domains)]
        domains = [
            await host.create(config(name, kinds[n % len(kinds)], arguments.vcpus, arguments.seconds), paused=True)
            for n, name in enumerate(names)
        ]
        ends = await asyncio.gather(*(watch(domain, arguments.seconds) for domain in domains))
        print(f"{'domain':<12}{'errors':>7}{'work':>9}{'least':>7}{'idle µs':>12}{'loaded µs':>12}{'p99 µs':>12}"
              f"{'cycles':>9}")
        good = [report(name, *end, arguments.vcpus) for name, end in zip(names, ends, strict=True)]
        dmesg = host.dmesg()
        if "internal error" in dmesg or "Traceback" in dmesg:
            print(dmesg)
            return False
        return all(good)


def main() -> int:
    parser = argparse.ArgumentParser(description="domains with many vCPUs under load")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--cpus", type=int, default=2, help="pCPUs of the host")
    parser.add_argument("--vcpus", type=int, default=4)
    parser.add_argument("--domains", type=int, default=2)
    parser.add_argument("--kind", choices=("pv", "pvh", "both"), default="pv")
    parser.add_argument("--pv-mode", choices=("exact", "fast"), default="exact")
    arguments = parser.parse_args()
    subprocess.run(["make", "--no-print-directory", "-C", str(GUESTS)], check=True)
    good = asyncio.run(run(arguments))
    print("\nall results right" if good else "\nSOMETHING WENT WRONG")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
