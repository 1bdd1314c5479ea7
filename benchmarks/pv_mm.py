#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""What PV memory management costs: nanoseconds for each L1 update and each validated page table.

Both are also printed as a ratio to one turn of a trivial Python loop in the same run, which depends less on
the machine. Run from the top of the repository: ``PYTHONPATH=src:. python benchmarks/pv_mm.py``.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from pyxen.abi.xen import DOMID_SELF
from pyxen.hypervisor.x86.pv import mm
from tests.mm.rig import RW, Caller, P, Rig

ROUNDS = 5
TABLES = 64


def loop() -> None:
    """The measure: a turn is an addition and a bit test."""
    total = 0
    for i in range(100_000):
        if i & 1:
            total += i


def best(work: Callable[[], object], count: int) -> float:
    """Least CPU nanoseconds for one of ``count``, over ROUNDS."""
    times = []
    for _ in range(ROUNDS):
        begin = time.thread_time_ns()
        work()
        times.append(time.thread_time_ns() - begin)
    return min(times) / count


def updates(rig: Rig, callers: tuple[Caller, Caller], repeat: int, batch: int) -> Callable[[], None]:
    """``repeat`` times, map and unmap ``batch`` frames."""

    def work() -> None:
        for _ in range(repeat):
            for caller in callers:
                if rig.call(mm.do_mmu_update, caller, Caller.BASE, batch, 0, DOMID_SELF):
                    raise SystemExit("an update was refused")

    return work


def main() -> None:
    turn = best(loop, 100_000)

    def report(name: str, ns: float) -> None:
        print(f"{name:44} {ns:9.0f} ns   {ns / turn:8.1f} turns")

    print(f"{'one turn of a trivial loop':44} {turn:9.1f} ns")
    for mode in ("fast", "exact"):
        rig = Rig(2048)
        d = rig.add(1, mode)
        frames = rig.alloc(d, 512)
        l1, *tables = rig.alloc(d, TABLES + 1)
        assert rig.pin(d, 1, l1) == 0
        for batch in (1, 32, 512):
            up, down = (
                b"".join(
                    (l1 << 12 | i << 3).to_bytes(8, "little") + (value(frames[i])).to_bytes(8, "little")
                    for i in range(batch)
                )
                for value in (lambda m: m << 12 | P | RW | 4, lambda m: 0)
            )
            callers = (Caller(d, up), Caller(d, down))
            repeat = max(1, 2048 // batch)

            work = updates(rig, callers, repeat, batch)
            report(f"{mode}: L1 update, {batch} in a request", best(work, 2 * repeat * batch))
        contents = {
            "empty": b"",
            "sparse (8 entries)": b"".join((m << 12 | P | RW).to_bytes(8, "little") + bytes(504) for m in frames[:8]),
            "full (512 entries)": b"".join((m << 12 | P | RW).to_bytes(8, "little") for m in frames),
        }
        for name, data in contents.items():
            for table in tables:
                rig.memory.write(table << 12, bytes(4096))
                rig.memory.write(table << 12, data)
            taken = [0, 0]
            for _ in range(ROUNDS):
                begin = time.thread_time_ns()
                for table in tables:
                    rig.frames.get_page_and_type(table, d, 1 << 44)  # type: ignore[arg-type]
                middle = time.thread_time_ns()
                for table in tables:
                    rig.frames.put_page_and_type(table)
                end = time.thread_time_ns()
                taken = [
                    min(old or new, new) for old, new in zip(taken, (middle - begin, end - middle), strict=True)
                ]
            report(f"{mode}: validate a level 1 table, {name}", taken[0] / TABLES)
            report(f"{mode}: and let it go", taken[1] / TABLES)


if __name__ == "__main__":
    main()
