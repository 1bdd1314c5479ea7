#!/usr/bin/env python3
# SPDX-License-Identifier: GPL-2.0-only
"""``make demo``: fetch Debian's kernel, boot it as a PV and as a PVH guest, each with its console here until it powers
off, and print timings.

It uses only the two commands anybody has, ``pyxen`` and ``xl``, with a host of its own in a temporary run directory,
which is stopped at the end: a host that is running already is left alone.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from pyxen.toolstack.config.paths import guest_dir
from pyxen.toolstack.guests.initramfs import FIRST_USER_LINE

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
TIMEOUT_S = 120
KINDS = {"PV": "examples/debian-pv.cfg", "PVH": "examples/debian-pvh.cfg"}


def boot(env: dict[str, str], config: str) -> dict[str, float] | None:
    """Run the guest with its output on our terminal; seconds from the start to each event, None if it failed."""
    command = [str(BIN / "xl"), "create", "-c", str(ROOT / config),
               'extra="console=hvc0 pyxen.mode=poweroff"', 'on_crash="destroy"']  # fmt: skip
    started = time.monotonic()
    seen: dict[str, float] = {}
    tail = b""
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdin is not None
        guard = threading.Timer(TIMEOUT_S, process.terminate)
        guard.start()
        while chunk := os.read(process.stdout.fileno(), 4096):
            now = time.monotonic() - started
            sys.stdout.buffer.write(chunk)
            sys.stdout.buffer.flush()
            tail = (tail + chunk)[-8192:]
            if b"Linux version" in tail:
                seen.setdefault("kernel's first line", now)
            if FIRST_USER_LINE.encode() in tail:
                seen.setdefault("first user line", now)
        guard.cancel()
        process.stdin.close()
    seen["powered off"] = time.monotonic() - started
    if process.returncode or "first user line" not in seen:
        return None
    return seen


def main() -> int:
    started = time.monotonic()
    if not (guest_dir("debian") / "vmlinuz").is_file():
        subprocess.run([str(BIN / "pyxen"), "guest", "fetch", "debian"], check=True)
    fetched = time.monotonic() - started
    with tempfile.TemporaryDirectory(prefix="pyxen-demo-") as folder:
        env = {**os.environ, "PYXEN_RUNDIR": f"{folder}/run"}
        times = {}
        try:
            for kind, config in KINDS.items():
                print(f"==> xl create -c {config}", flush=True)
                seen = boot(env, config)
                if seen is None:
                    print(f"\nThe {kind} guest did not get to its end.", file=sys.stderr)
                    return 1
                times[kind] = seen
        finally:
            subprocess.run([str(BIN / "pyxen"), "host", "stop"], env=env, stdout=subprocess.DEVNULL, check=False)
    print(f"\n==> fetching the guest took {fetched:.1f} s; seconds from `xl create` (the first starts the host too):")
    print(f"    {'':<22}" + "".join(f"{kind:>8}" for kind in times))
    for event in next(iter(times.values())):
        print(f"    {event:<22}" + "".join(f"{seen[event]:8.2f}" for seen in times.values()))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
