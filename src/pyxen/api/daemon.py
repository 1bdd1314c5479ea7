# SPDX-License-Identifier: GPL-2.0-only
"""The host's process: ``python -m pyxen.api.daemon``. ``pyxen host start`` starts it; it is not run by hand.

One host per run directory: the process holds an exclusive ``flock`` on ``host.lock`` for its whole life, taken before
anything is touched. The kernel drops the lock when the process dies in whatever way, so a killed host is never in
the way of the
next one, which then removes the sockets that were left behind.

The parent learns how the start went through the file descriptor ``--report``: one line, ``ok`` or an error (and its
hint), and then its end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import gc
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pyxen.errors import HostError, PyxenError

if TYPE_CHECKING:
    from pyxen.api.routes import Routes
    from pyxen.host import Host

LOCK_NAME: Final = "host.lock"
LOG_NAME: Final = "host.log"

log = logging.getLogger("pyxen.host")


class AlreadyRunning(HostError):
    """Another process is the host of this run directory."""


def take_lock(rundir: Path) -> int:
    """The descriptor that holds the run directory's lock; our process id is written into the file. Raises
    AlreadyRunning."""
    fd = os.open(rundir / LOCK_NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise AlreadyRunning(f"a host is running in {rundir} already") from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()}\n".encode(), 0)
    return fd


def remove_stale(rundir: Path) -> None:
    """Remove what a host that was killed left behind. Only for the holder of the lock."""
    for path in (rundir / "api.sock", rundir / "xenstored" / "socket", *(rundir / "console").glob("*")):
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def arguments() -> argparse.ArgumentParser:
    """The daemon's command line (internal: ``pyxen host start`` writes it)."""
    parser = argparse.ArgumentParser(prog="pyxen.api.daemon")
    parser.add_argument("--rundir", required=True)
    parser.add_argument("--memory", default="2G")
    parser.add_argument("--cpus", type=int)
    parser.add_argument("--topology")
    parser.add_argument("--pv-mode")
    parser.add_argument("--idle-exit", type=float)
    parser.add_argument("--report", type=int, default=-1)
    parser.add_argument("--verbose", action="store_true")
    return parser


class Report:
    """Tells the parent how the start went, once."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def send(self, line: str, hint: str | None = None) -> None:
        if self._fd >= 0:
            text = " ".join(line.split()) + "\n" + ((" ".join(hint.split()) + "\n") if hint else "")
            with contextlib.suppress(OSError):
                os.write(self._fd, text.encode("utf-8", "replace"))
            os.close(self._fd)
            self._fd = -1


def main(argv: Sequence[str] | None = None) -> int:
    """Run a host until it is told to stop; the exit code."""
    options = arguments().parse_args(argv)
    report = Report(options.report)
    rundir = Path(options.rundir)
    logging.basicConfig(
        level=logging.INFO,
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    os.umask(0o077)
    lock = -1
    try:
        lock = take_lock(rundir)
        remove_stale(rundir)
        return asyncio.run(_serve(options, rundir, report))
    except PyxenError as error:
        if not isinstance(error, AlreadyRunning):
            log.error("%s", error)
        report.send(f"error: {error}", error.hint)
        return 1
    except Exception as error:
        log.exception("the host died")
        report.send(f"error: {type(error).__name__}: {error}", f"the log is {rundir / LOG_NAME}")
        return 1
    finally:
        if lock >= 0:
            # The file stays: removing it would let two processes hold locks on two files of one name.
            os.ftruncate(lock, 0)
            os.close(lock)


async def _serve(options: argparse.Namespace, rundir: Path, report: Report) -> int:
    from pyxen.api.routes import Routes
    from pyxen.api.server import ApiServer
    from pyxen.host import Host

    host = Host(options.memory, options.cpus, options.topology, rundir, options.pv_mode, verbose=options.verbose)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        loop.add_signal_handler(number, host.request_stop)
    async with host:
        routes = Routes(host)
        server = ApiServer(routes.application(), rundir / "api.sock")
        try:
            await server.start()
            log.info("the host is up: %s, pid %d", host.version(), os.getpid())
            report.send("ok")
            # What lives as long as the host need not be looked at again: a full collection would hold up a guest
            # for 20 ms.
            gc.collect()
            gc.freeze()
            await _until_stopped(host, routes, options.idle_exit)
            log.info("the host stops")
        finally:
            await server.close()
    return 0


async def _until_stopped(host: Host, routes: Routes, idle_exit_s: float | None) -> None:
    """Wait for a request to stop, or (if asked for) for ``idle_exit_s`` without a domain and without a request."""
    while not host.stop_requested.is_set():
        left = idle_exit_s
        if idle_exit_s is not None and not len(host.table):
            left = routes.last_request + idle_exit_s - asyncio.get_running_loop().time()
            if left <= 0:
                log.info("no domain and no request for %.0f s", idle_exit_s)
                return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(host.stop_requested.wait(), left)


if __name__ == "__main__":
    sys.exit(main())
