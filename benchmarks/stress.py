#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""Many boots, preemption where nobody expects it, and many lives: all clean, and everything is given back.

* ``--boots`` boots of Debian's kernel in each PV mode, one after the other in one host: each reaches its workload's
  end and powers off; no crash in the hypervisor's log, no BUG, WARNING, Oops or call trace on the console.
* One boot in each mode that is kicked out of the guest every 200 µs: no instruction is lost or done twice by a
preemption.
* ``--cycles`` lives of small domains (one that prints and powers off, one that never runs): free frames, descriptors,
  threads and xenstore nodes are the same afterwards.

    benchmarks/stress.py [--boots N] [--cycles N] [--runs N]       (--runs is --boots: what `make bench` passes)
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyxen
from pyxen.errors import PyxenError
from pyxen.toolstack.config.paths import guest_dir
from pyxen.toolstack.guests.initramfs import FIRST_USER_LINE, WORKLOAD_DONE

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.host.small_guests import config, write_kernel  # noqa: E402 (the guests of the tests: no compiler needed)

DEBIAN = ROOT / "examples/debian-pv.cfg"
MODES = ("exact", "fast")
BOOT_S = 120.0
PREEMPT_EVERY_NS = 200_000
TROUBLE = re.compile(r"BUG|WARNING|Oops|Call Trace|soft lockup|rcu.*stall|not syncing|segfault|Error -[0-9]+")


@dataclass(frozen=True)
class Boot:
    """One boot: CPU and wall seconds to its end, and what was wrong with it."""

    cpu_s: float
    wall_s: float
    problems: list[str]


async def boot(host: pyxen.Host, mode: str) -> Boot:
    """Boot Debian with the benchmarks' workload until it is gone."""
    host.dmesg(clear=True)
    cpu, wall = time.process_time(), time.monotonic()
    problems: list[str] = []
    domain = await host.create(
        DEBIAN, pv_mode=mode, extra=['extra="console=hvc0 pyxen.mode=bench"', 'on_crash="destroy"'], paused=True
    )
    console = domain.console
    await domain.unpause()
    text = b""
    try:
        async with asyncio.timeout(BOOT_S):
            text = await console.read_to_end()
            reason = await domain.wait()
            await domain.wait_gone()
    except TimeoutError:
        reason = "none (it hangs)"
        problems.append(f"registers: {await domain.registers()}")
        await domain.destroy()
        text = await console.read_to_end()
    said = text.decode(errors="replace")
    problems += [f"{marker!r} did not come" for marker in (FIRST_USER_LINE, WORKLOAD_DONE) if marker not in said]
    problems += [f"console: {line.strip()}" for line in said.splitlines() if TROUBLE.search(line)]
    if reason != "poweroff":
        problems.append(f"it ended by {reason}")
    problems += [
        f"xl dmesg: {line}" for line in host.dmesg().splitlines() if "crash" in line or "internal error" in line
    ]
    return Boot(time.process_time() - cpu, time.monotonic() - wall, problems)


class Kicker(threading.Thread):
    """Kicks an engine every 200 µs from a thread that does nothing else."""

    def __init__(self, kick: Callable[[], None]) -> None:
        super().__init__(name="kicker", daemon=True)
        self._kick = kick
        self._stopped = False
        self.kicks = 0
        self.interval_us = 0.0

    def __enter__(self) -> Kicker:
        sys.setswitchinterval(50e-6)  # it must not wait for 5 ms to get at the interpreter
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        self.join()
        sys.setswitchinterval(0.005)

    def run(self) -> None:
        begin = following = time.perf_counter_ns()
        while not self._stopped:
            self._kick()
            self.kicks += 1
            following += PREEMPT_EVERY_NS
            left = following - time.perf_counter_ns() - 60_000  # what a sleep oversleeps
            if left > 0:
                time.sleep(left / 1e9)
        self.interval_us = (time.perf_counter_ns() - begin) / self.kicks / 1000


async def boots(count: int) -> bool:
    """``count`` boots of each mode and the preempted ones; whether all were clean."""
    clean = True
    async with pyxen.Host(memory="1G") as host:
        pcpu = host.hypervisor.pcpus[0]
        free = host.hypervisor.allocator.free_frames
        for number in range(1, count + 2):
            preempted = number > count
            for mode in MODES:
                entries = pcpu.entries
                with Kicker(pcpu.cpu.kick) if preempted else contextlib.nullcontext() as kicker:
                    result = await boot(host, mode)
                label = "preempted" if preempted else f"boot {number}"
                entered = pcpu.entries - entries
                verdict = "ok" if not result.problems else "FAILED"
                times = f"{result.cpu_s:6.2f} CPU s {result.wall_s:6.2f} s {entered:8d} entries"
                kicked = f", a kick every {kicker.interval_us:.0f} µs" if kicker is not None else ""
                print(f"{label:<10} {mode:<6} {times}{kicked}  {verdict}", flush=True)
                for problem in result.problems[:20]:
                    print(f"    {problem[:300]}")
                clean &= not result.problems
                if host.hypervisor.allocator.free_frames != free:
                    print(f"    {free - host.hypervisor.allocator.free_frames} frames are missing")
                    clean = False
    return clean


def snapshot(host: pyxen.Host) -> dict[str, int]:
    """What a domain could leave behind."""
    gc.collect()
    return {
        "free frames": host.hypervisor.allocator.free_frames,
        "domains": len(host.hypervisor.domains),
        "descriptors": len(os.listdir("/proc/self/fd")),
        # The host's pool makes a thread when it first needs it, and keeps it.
        "threads": sum(not thread.name.startswith("pyxen-work") for thread in threading.enumerate()),
        "xenstore nodes": len(host.xenstored.service.store.nodes),
    }


async def cycles(count: int) -> bool:
    """``count`` lives of a guest that ends by itself and of one that never runs; whether everything came back."""
    with tempfile.TemporaryDirectory(prefix="pyxen-stress-") as folder:
        kernel = write_kernel(Path(folder) / "kernel")
        async with pyxen.Host(memory="128M") as host:
            before: dict[str, int] = {}
            started = time.monotonic()
            for number in range(count + 1):
                running = await host.create(config(kernel, "runs"), pv_mode=MODES[number % 2])
                sleeping = await host.create(config(kernel, "never-runs"), paused=True)
                await running.wait_gone()
                await sleeping.destroy()
                if number == 0:  # what is made once for the whole host is made here
                    before = snapshot(host)
            after = snapshot(host)
            took = time.monotonic() - started
    print(f"\n{count} create/destroy cycles of two domains: {took / (count + 1) * 1e3:.1f} ms each")
    print(f"{'':<16}{'before':>10}{'after':>10}")
    for name, value in before.items():
        print(f"{name:<16}{value:>10}{after[name]:>10}{'' if value == after[name] else '   FAILED'}")
    return before == after


def main() -> int:
    parser = argparse.ArgumentParser(description="many boots and many lives")
    parser.add_argument("--boots", "--runs", type=int, default=10)
    parser.add_argument("--cycles", type=int, default=200)
    arguments = parser.parse_args()
    if not (guest_dir("debian") / "vmlinuz").is_file():
        sys.exit("no guest to boot; run: pyxen guest fetch debian")
    try:
        clean = asyncio.run(cycles(arguments.cycles))
        print(flush=True)
        clean &= asyncio.run(boots(arguments.boots))
    except PyxenError as error:
        sys.exit(str(error))
    print("\nall clean" if clean else "\nNOT CLEAN")
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
