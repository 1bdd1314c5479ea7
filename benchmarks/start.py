#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""From nothing running to the guest's first user line: ``xl create -c`` against ``qemu-system-x86_64 -accel tcg``.

Wall time from the command to the line, with no host running before (the first ``xl`` starts it), over QEMU's for the
same kernel and initramfs; runs are interleaved, so that a busy minute of the machine hits both. Beside it where the
time goes: until the host answers, until the domain is built.

    benchmarks/start.py [--runs N] [--check]
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from pyxen.toolstack.config.paths import guest_dir
from pyxen.toolstack.guests.initramfs import FIRST_USER_LINE

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
LIMIT_S = 6.0
MEMORY_MB = 256
TIMEOUT_S = 120
STAGES = ("host answers", "domain built", "first user line")


def until_line(command: list[str], env: dict[str, str], rundir: Path | None) -> dict[str, float]:
    """Run ``command`` until the guest's first user line; seconds to each stage that could be seen."""
    seen: dict[str, float] = {}
    output = b""
    started = time.monotonic()
    with subprocess.Popen(
        command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        while STAGES[2] not in seen:
            now = time.monotonic() - started
            if rundir is not None and STAGES[0] not in seen and (rundir / "api.sock").exists():
                seen[STAGES[0]] = now
            if rundir is not None and STAGES[1] not in seen and (rundir / "console" / "1").exists():
                seen[STAGES[1]] = now
            chunk = process.stdout.read()
            if chunk == b"" or now > TIMEOUT_S:
                process.kill()
                assert process.stderr is not None
                said = (output + process.stderr.read())[-2000:].decode(errors="replace")
                sys.exit(f"{command[0]}: no first user line\n{said}")
            if not chunk:
                time.sleep(0.002)
                continue
            output += chunk
            if FIRST_USER_LINE.encode() in output:
                seen[STAGES[2]] = now
        process.kill()
    return seen


def run_qemu(guest: Path) -> dict[str, float]:
    return until_line(
        ["qemu-system-x86_64", "-accel", "tcg", "-m", str(MEMORY_MB), "-smp", "1", "-nodefaults", "-no-reboot",
         "-display", "none", "-serial", "stdio", "-kernel", str(guest / "vmlinuz"), "-initrd",
         str(guest / "initramfs.img"), "-append", "console=ttyS0 quiet"],
        dict(os.environ), None,
    )  # fmt: skip


def run_pyxen(mode: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory(prefix="pyxen-start-") as folder:
        rundir = Path(folder) / "run"
        env = {**os.environ, "PYXEN_RUNDIR": str(rundir)}
        try:
            return until_line(
                [str(BIN / "xl"), "create", "-c", str(ROOT / "examples/debian-pv.cfg"), f"memory={MEMORY_MB}",
                 'extra="console=hvc0 quiet"', f'pv_mode="{mode}"'],
                env, rundir,
            )  # fmt: skip
        finally:
            subprocess.run([str(BIN / "pyxen"), "host", "stop"], env=env, stdout=subprocess.DEVNULL, check=False)


def main() -> int:
    parser = argparse.ArgumentParser(description="from nothing running to the guest's first user line")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--check", action="store_true", help=f"exit 1 when it takes more than {LIMIT_S:.0f} s")
    arguments = parser.parse_args()
    if shutil.which("qemu-system-x86_64") is None:
        sys.exit("qemu-system-x86_64 is not installed (Debian: qemu-system-x86)")
    guest = guest_dir("debian")
    if not (guest / "vmlinuz").is_file():
        sys.exit("no guest to boot; run: pyxen guest fetch debian")
    results: dict[str, list[dict[str, float]]] = {"qemu": [], "exact": [], "fast": []}
    for number in range(1, arguments.runs + 1):
        for name, runs in results.items():
            runs.append(run_qemu(guest) if name == "qemu" else run_pyxen(name))
            print(f"run {number}: {name:<6}" + "".join(f"  {k} {v:.2f} s" for k, v in runs[-1].items()), flush=True)
    middle = {name: statistics.median(run[STAGES[2]] for run in runs) for name, runs in results.items()}
    print(f"\n{'':<8}{'first user line':>17}{'ratio':>8}{'limit':>9}   (medians of {arguments.runs})")
    slow = False
    for name, seconds in middle.items():
        slow |= name != "qemu" and seconds > LIMIT_S
        limit = "" if name == "qemu" else f"{LIMIT_S:.1f} s"
        print(f"{name:<8}{seconds:15.2f} s{seconds / middle['qemu']:8.2f}{limit:>9}")
    return 1 if slow and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
