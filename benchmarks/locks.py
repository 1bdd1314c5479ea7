#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""How long the hypervisor's locks are held while a 4 GiB guest is built, boots Linux, powers off and is destroyed.

Hold times are CPU time of the holder's thread (a machine that is busy with something else does not count against
us), taken at each
outermost release of every TicketLock.  Prints the distribution and the worst holders; the limit is a millisecond.

    benchmarks/locks.py [--memory MIB] [--runs N]       (one run a mode whatever N is)
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import sys
import time
from collections import Counter

import pyxen
from pyxen.hypervisor.lock import TicketLock
from pyxen.toolstack.config.paths import guest_dir

LIMIT_MS = 1.0
holds: list[tuple[float, str, str]] = []
_started: dict[int, float] = {}
_acquire, _release = TicketLock.acquire, TicketLock.release


def acquire(lock: TicketLock) -> None:
    _acquire(lock)
    if not lock.nested():
        _started[id(lock)] = time.thread_time()


def release(lock: TicketLock) -> None:
    if not lock.nested():
        held = time.thread_time() - _started.pop(id(lock), time.thread_time())
        where = ""
        if held > LIMIT_MS / 4000:
            names = []
            frame = sys._getframe(1)
            while frame is not None and len(names) < 5:
                names.append(frame.f_code.co_name)
                frame = frame.f_back  # type: ignore[assignment]
            where = " < ".join(names)
        holds.append((held * 1000, lock.guards, where))
    _release(lock)


async def life(mode: str, memory: int) -> None:
    files = guest_dir("debian")
    async with pyxen.Host(memory=(memory + 512) << 20, pv_mode=mode) as host:
        gc.collect()
        gc.freeze()  # as the daemon does
        domain = await host.create(
            f'name="big"\nmemory={memory}\nkernel="{files / "vmlinuz"}"\nramdisk="{files / "initramfs.img"}"\n'
            'extra="console=hvc0 pyxen.mode=poweroff"\n'
        )
        async with asyncio.timeout(120):
            print(f"{mode}: {await domain.wait()}", end=", ", flush=True)
            await domain.wait_gone()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", type=int, default=4096, help="MiB of the guest")
    parser.add_argument("--runs", type=int, default=1)
    arguments = parser.parse_args()
    TicketLock.acquire, TicketLock.release = acquire, release  # type: ignore[method-assign]
    good = True
    for mode in ("exact", "fast"):
        holds.clear()
        asyncio.run(life(mode, arguments.memory))
        times = sorted(held for held, _guards, _where in holds)
        quantiles = "  ".join(f"{q}: {times[min(int(len(times) * p), len(times) - 1)]:.3f} ms"
                              for q, p in (("median", 0.5), ("99 %", 0.99), ("99.99 %", 0.9999), ("max", 1.0)))
        over = [hold for hold in holds if hold[0] > LIMIT_MS]
        print(f"{len(times)} holds  {quantiles}  over {LIMIT_MS} ms: {len(over)} ({len(over) / len(times):.5%})")
        for (guards, where), count in Counter((guards, where) for _held, guards, where in over).most_common(8):
            worst = max(held for held, g, w in over if (g, w) == (guards, where))
            print(f"    {count} x, at most {worst:.2f} ms: {guards}: {where}")
        good &= times[min(int(len(times) * 0.9999), len(times) - 1)] <= LIMIT_MS
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
