#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""Linux to poweroff: CPU time of pyxen over that of ``qemu-system-x86_64 -accel tcg``, same kernel, same initramfs.

Contestants are the PV guest in both modes and the PVH guest; with one vCPU against qemu, and with ``--vcpus`` (4)
against themselves with one. So is qemu (which then has a thread for each vCPU): what the guest itself does more.

Runs are interleaved, so that a busy minute of the machine hits all contestants. CPU time is that of every process
involved, host daemon and ``xl`` included, from nothing running to nothing running; the wall time printed beside it is
from the command to the guest's first user line. The guest does a fixed piece of work (pyxen.mode=bench), then powers
off.

    benchmarks/boot.py [--runs N] [--vcpus N] [--kinds exact,fast,pvh] [--check]
"""

from __future__ import annotations

import argparse
import ctypes
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from pyxen.toolstack.config.paths import guest_dir
from pyxen.toolstack.guests.initramfs import FIRST_USER_LINE, WORKLOAD_DONE

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
MEMORY_MB = 256
TIMEOUT_S = 180
LIMITS = {"exact": 2.2, "fast": 1.8, "pvh": 1.5}
"""CPU time of one vCPU's boot over qemu's."""
SMP_LIMITS = dict.fromkeys(LIMITS, 1.3)
"""CPU time of a boot with several vCPUs over that with one."""
PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Run:
    """Seconds."""

    cpu: float
    first_line: float


def children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def reap() -> None:
    """Wait for every process we are left with: the host daemon is ours to reap, because we are its subreaper."""
    deadline = time.monotonic() + TIMEOUT_S
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            if time.monotonic() > deadline:
                sys.exit("a process of this run does not end")
            time.sleep(0.01)


def watch(command: list[str], env: dict[str, str]) -> float:
    """Run ``command`` to its end; seconds until the guest's first user line. Exits when the guest fails."""
    started = time.monotonic()
    first_line = None
    output = b""
    # xl's console leaves at the end of its input, so the pipe stays open until it leaves by itself.
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT) as process:  # fmt: skip
        assert process.stdout is not None
        os.set_blocking(process.stdout.fileno(), False)
        while True:
            chunk = process.stdout.read()
            if chunk == b"":
                break
            output += chunk or b""
            if first_line is None and FIRST_USER_LINE.encode() in output:
                first_line = time.monotonic() - started
            if time.monotonic() - started > TIMEOUT_S:
                process.terminate()
                break
            if chunk is None:
                time.sleep(0.01)
        process.stdin.close()  # type: ignore[union-attr]
    if first_line is None or WORKLOAD_DONE.encode() not in output or process.returncode:
        sys.exit(f"{command[0]} failed (exit status {process.returncode}):\n{output[-3000:].decode(errors='replace')}")
    return first_line


def run_qemu(guest: Path, vcpus: int) -> Run:
    before = children_cpu()
    first_line = watch(
        ["qemu-system-x86_64", "-accel", "tcg", "-m", str(MEMORY_MB), "-smp", str(vcpus), "-nodefaults", "-no-reboot",
         "-display", "none", "-serial", "stdio", "-kernel", str(guest / "vmlinuz"), "-initrd",
         str(guest / "initramfs.img"), "-append", "console=ttyS0 quiet pyxen.mode=bench"],
        dict(os.environ),
    )  # fmt: skip
    return Run(children_cpu() - before, first_line)


def run_pyxen(kind: str, vcpus: int) -> Run:
    config = "examples/debian-pvh.cfg" if kind == "pvh" else "examples/debian-pv.cfg"
    mode = [] if kind == "pvh" else [f'pv_mode="{kind}"']
    with tempfile.TemporaryDirectory(prefix="pyxen-bench-") as folder:
        env = {**os.environ, "PYXEN_RUNDIR": f"{folder}/run"}
        before = children_cpu()
        try:
            first_line = watch(
                [str(BIN / "xl"), "create", "-c", str(ROOT / config), f"memory={MEMORY_MB}", f"vcpus={vcpus}",
                 'extra="console=hvc0 quiet pyxen.mode=bench"', 'on_crash="destroy"', *mode],
                env,
            )  # fmt: skip
        finally:
            subprocess.run([str(BIN / "pyxen"), "host", "stop"], env=env, stdout=subprocess.DEVNULL, check=False)
            reap()
        return Run(children_cpu() - before, first_line)


def main() -> int:
    parser = argparse.ArgumentParser(description="Linux to poweroff: pyxen over qemu's TCG, in CPU time")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--vcpus", type=int, default=4, help="also with this many vCPUs (4; 1: not)")
    parser.add_argument("--kinds", default=",".join(LIMITS), help="which guests (%(default)s)")
    parser.add_argument("--check", action="store_true", help="exit 1 when a ratio is above its limit")
    arguments = parser.parse_args()
    kinds = arguments.kinds.split(",")
    if not set(kinds) <= set(LIMITS):
        parser.error(f"--kinds: {arguments.kinds} (there are {', '.join(LIMITS)})")
    if shutil.which("qemu-system-x86_64") is None:
        sys.exit("qemu-system-x86_64 is not installed (Debian: qemu-system-x86)")
    guest = guest_dir("debian")
    if not (guest / "vmlinuz").is_file():
        sys.exit("no guest to boot; run: pyxen guest fetch debian")
    # A host daemon outlives the command that started it; with this it becomes our child, and its CPU time ours to see.
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
        sys.exit("cannot become a subreaper")

    contestants: list[tuple[str, int]] = []
    for kind in ["qemu", *kinds]:
        contestants += [(kind, vcpus) for vcpus in dict.fromkeys((1, arguments.vcpus))]
    results: dict[tuple[str, int], list[Run]] = {contestant: [] for contestant in contestants}
    for number in range(arguments.runs):
        for (name, vcpus), runs in results.items():
            run = run_qemu(guest, vcpus) if name == "qemu" else run_pyxen(name, vcpus)
            runs.append(run)
            print(f"run {number + 1}: {_label(name, vcpus):<8} {run.cpu:6.2f} CPU s, "
                  f"first user line after {run.first_line:5.2f} s", flush=True)
    cpu = {contestant: statistics.median(run.cpu for run in runs) for contestant, runs in results.items()}
    print(f"\n{'':<10}{'CPU s':>8}{'ratio':>8}{'limit':>8}  {'of':<8}first line   (medians of {arguments.runs})")
    failed = False
    for (name, vcpus), runs in results.items():
        base, limits = ((name, 1), SMP_LIMITS) if vcpus > 1 else (("qemu", 1), LIMITS)
        limit = limits.get(name)
        ratio = cpu[name, vcpus] / cpu[base]
        failed |= limit is not None and ratio > limit
        shown = f"{limit:8.1f}" if limit is not None else f"{'':8}"
        first_line = statistics.median(run.first_line for run in runs)
        print(f"{_label(name, vcpus):<10}{cpu[name, vcpus]:8.2f}{ratio:8.2f}{shown}  {_label(*base):<8}"
              f"{first_line:8.2f} s")
    return 1 if failed and arguments.check else 0


def _label(name: str, vcpus: int) -> str:
    return name if vcpus == 1 else f"{name} x{vcpus}"


if __name__ == "__main__":
    sys.exit(main())
