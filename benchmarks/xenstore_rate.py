# SPDX-License-Identifier: GPL-2.0-only
"""Operations per second of our xenstored over its socket, divided by those of Debian's C xenstored.

One C client asks both, in turns (one client, one request at a time: what the toolstack does). Then ours alone, empty
and with 100,000 nodes and 10,000 watches, which must cost the same.

    python benchmarks/xenstore_rate.py [--operations 10000] [--rounds 3]

Needs gcc; the C daemon is in Debian's package xen-utils (without it only our own rates are printed).
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HERE = Path(__file__).parent
OPERATIONS = ("write", "read", "transaction")


def serve(socket_path: str) -> None:
    """Run our daemon until killed."""
    from pyxen.xenstore.daemon import XenstoreDaemon

    async def main() -> None:
        await XenstoreDaemon(None).start(socket_path)
        await asyncio.Event().wait()

    asyncio.run(main())


def wait_for(path: Path, process: subprocess.Popen[bytes]) -> None:
    """Until a daemon has its socket."""
    deadline = time.monotonic() + 20
    while not path.exists():
        if process.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"{process.args!r} did not start")
        time.sleep(0.02)


@contextmanager
def running(command: list[str], socket_path: Path, environment: dict[str, str]) -> Iterator[Path]:
    """A daemon for the length of a block."""
    process = subprocess.Popen(command, env=environment)
    try:
        wait_for(socket_path, process)
        yield socket_path
    finally:
        process.terminate()
        process.wait(10)


@contextmanager
def ours(directory: Path) -> Iterator[Path]:
    """Our daemon."""
    source = str(HERE.parent / "src")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")])}
    path = directory / "ours" / "socket"
    with running([sys.executable, __file__, "--serve", str(path)], path, environment):
        yield path


@contextmanager
def c_daemon(directory: Path, program: Path) -> Iterator[Path]:
    """Debian's C xenstored, which needs a hypervisor to start and gets one of cardboard."""
    fake, run = directory / "fake", directory / "run"
    for each in (fake, run):
        each.mkdir()
    for name in ("xsd_port", "xenbus_port"):
        (fake / name).write_text("1")
    (fake / "xsd_kva").write_bytes(bytes(4096))
    environment = {
        **os.environ, "XS_FAKE": str(fake), "LD_PRELOAD": str(directory / "shim.so"), "XENSTORED_RUNDIR": str(run),
        "XENSTORED_ROOTDIR": str(run), "XENSTORED_PATH": str(run / "socket"),
    }
    with running([str(program), "--no-fork", "--pid-file", str(run / "pid")], run / "socket", environment) as path:
        yield path


def rates(client: Path, path: Path, operations: int) -> dict[str, float]:
    """One run of the client."""
    done = subprocess.run([client, path, str(operations)], stdout=subprocess.PIPE, text=True, check=True, timeout=300)
    return {name: float(rate) for name, rate in (line.split() for line in done.stdout.splitlines())}


def fill(path: Path, nodes: int, watches: int) -> list[object]:
    """Put nodes into the store and watches on some of them; what must be kept alive for the watches to stay."""
    from pyxen.xenstore.sync_client import SyncClient

    client = SyncClient(path)
    for i in range(nodes):
        client.write(f"/fill/{i // 1000}/{i % 1000}", "value")
    for i in range(watches):
        client.watch(f"/fill/{i // 1000}/{i % 1000}", "token")
        client.next_event()
    return [client]


def report(title: str, name_a: str, a: list[dict[str, float]], name_b: str, b: list[dict[str, float]]) -> None:
    """Medians and their ratio."""
    print(title)
    for operation in OPERATIONS:
        left, right = (statistics.median(run[operation] for run in runs) for runs in (a, b))
        print(f"  {operation:<12}{name_a} {left:8.0f}/s   {name_b} {right:8.0f}/s   ratio {left / right:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
        return
    sys.path.insert(0, str(HERE.parent / "src"))
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        client = directory / "client"
        subprocess.run(["gcc", "-O2", "-o", client, HERE / "xenstore_rate_client.c"], check=True)
        program = next(iter(sorted(Path("/usr/lib").glob("xen-*/bin/xenstored"))), None)
        with ours(directory) as path:
            if program is not None:
                subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", directory / "shim.so",
                                HERE / "xenstore_rate_shim.c", "-ldl"], check=True)
                with c_daemon(directory, program) as c_path:
                    pairs = [(rates(client, path, arguments.operations), rates(client, c_path, arguments.operations))
                             for _ in range(arguments.rounds)]
                report("ours / C xenstored", "ours", [a for a, _ in pairs], "C", [b for _, b in pairs])
            else:
                print("no C xenstored here (package xen-utils): our own rates only")
            empty = [rates(client, path, arguments.operations) for _ in range(arguments.rounds)]
            kept = fill(path, 100_000, 10_000)
            full = [rates(client, path, arguments.operations) for _ in range(arguments.rounds)]
            report("ours with 100,000 nodes and 10,000 watches / empty", "full", full, "empty", empty)
            del kept


if __name__ == "__main__":
    main()
