# SPDX-License-Identifier: GPL-2.0-only
"""``pyxen host start|status|stop``: this user's host.

Starting is safe to do twice at once: the host's process takes a lock, the one that does not get it is told so, and both
``start`` commands end when the one host answers.
"""

from __future__ import annotations

import os
import sys

from pyxen.cli import rundir
from pyxen.cli.client import ApiError, Client
from pyxen.cli.getopt import HelpRequested, UsageError, getopt
from pyxen.cli.report import Failure
from pyxen.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

START_PATIENCE_S = 30.0
STOP_PATIENCE_S = 60.0
_LOG_NAME = "host.log"
_LOG_LIMIT_BYTES = 8 << 20

_USAGE = """Usage: pyxen host start [options]    start this user's host in the background
       pyxen host status             say whether it runs
       pyxen host stop               destroy its domains and stop it

Options of start:
 -m, --memory SIZE       machine memory, like 2G (the default) or 512M
 -c, --cpus N            machine CPUs (default: as many as this computer has); domains run in parallel
                         on as many of them as this computer has (at least 4), the others are modelled
 -t, --topology SHAPE    nodes=1,sockets=1,cores=2,threads=1 or 1:1:2:1
 -M, --pv-mode MODE      exact (the default) or fast, for domains that do not say
 -F, --foreground        stay in the foreground, log to the terminal
 -i, --idle-exit SECONDS stop when there was no domain and no request for so long (default: never)
 -v, --verbose           keep the hypervisor's debug lines
"""
_LONG = {
    "memory": "m",
    "cpus": "c",
    "topology": "t",
    "pv-mode": "M",
    "foreground": "F",
    "idle-exit": "i",
    "verbose": "v",
}


def main(argv: list[str]) -> int:
    """Run a sub-command; the exit code."""
    command, *args = argv or [""]
    commands = {"start": start, "status": status, "stop": stop}
    if command in ("-h", "--help", "help"):
        print(_USAGE, end="")
        return 0
    if command not in commands:
        print(_USAGE, end="", file=sys.stderr)
        return 2
    try:
        return commands[command](args)
    except HelpRequested:
        print(_USAGE, end="")
        return 0
    except UsageError as error:
        print(f"pyxen host {command}: {error}", file=sys.stderr)
        print("hint: run: pyxen host help", file=sys.stderr)
        return 2


def start(args: list[str]) -> int:
    """``pyxen host start``."""
    options, operands = getopt(args, "m:c:t:M:Fi:v", _LONG)
    given = dict(options)
    if operands:
        raise UsageError(f"there is no operand '{operands[0]}' of pyxen host start.")
    folder = rundir.ensure_run_dir()
    flags = ["--rundir", folder, *_daemon_flags(given)]
    if "F" in given:
        from pyxen.api import daemon

        return daemon.main(flags)
    return _start_in_background(folder, flags)


def _daemon_flags(given: dict[str, str]) -> list[str]:
    flags = []
    for letter, name in (("m", "--memory"), ("t", "--topology"), ("M", "--pv-mode")):
        if letter in given:
            flags.append(f"{name}={given[letter]}")
    if "c" in given:
        if not (given["c"].isascii() and given["c"].isdigit() and 1 <= int(given["c"][:6]) <= 4096):
            raise UsageError(f"option `cpus' needs a number from 1 to 4096, not '{given['c'][:40]}'.")
        flags.append(f"--cpus={given['c']}")
    if "i" in given:
        try:
            seconds = float(given["i"])
        except ValueError:
            seconds = -1
        if not 0 < seconds < 1e9:
            raise UsageError(f"option `idle-exit' needs a number of seconds, not '{given['i'][:40]}'.")
        flags.append(f"--idle-exit={seconds}")
    if "v" in given:
        flags.append("--verbose")
    return flags


def _start_in_background(folder: str, flags: list[str]) -> int:
    import subprocess
    import time

    if (running := _version(folder)) is not None:
        print(f"the host runs already (pid {running['pid']})", file=sys.stderr)
        return 0
    reader, writer = os.pipe()
    with open(reader, "rb") as report, _open_log(folder) as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "pyxen.api.daemon", f"--report={writer}", *flags],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd="/",
            pass_fds=(writer,),
            start_new_session=True,
            env={**os.environ, "PYTHONPATH": _python_path()},
        )
        os.close(writer)
        said = report.read(8192).decode(errors="replace").splitlines()
    if said and said[0] == "ok":
        process.returncode = 0  # it is nobody's child to wait for: it outlives us
        return 0
    # It did not become the host. If that is because another is starting at this moment, that one will do.
    process.wait()
    deadline = time.monotonic() + START_PATIENCE_S
    while said and "already" in said[0] and time.monotonic() < deadline:
        if _version(folder) is not None:
            return 0
        time.sleep(0.02)
    reason = said[0].removeprefix("error: ") if said else f"its process ended with code {process.returncode}"
    raise HostError(reason, hint=said[1] if len(said) > 1 else f"its log is {folder}/{_LOG_NAME}")


def _python_path() -> str:
    """PYTHONPATH for the daemon: the place this package was found at, which need not be where an installed one is."""
    here = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    before = os.environ.get("PYTHONPATH", "")
    return f"{here}{os.pathsep}{before}" if before else here


def _open_log(folder: str) -> Any:
    path = f"{folder}/{_LOG_NAME}"
    try:
        if os.stat(path).st_size > _LOG_LIMIT_BYTES:
            os.replace(path, path + ".1")
    except FileNotFoundError:
        pass
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    return open(fd, "ab", buffering=0)


def _version(folder: str) -> dict[str, Any] | None:
    """What the running host says of itself; None when there is none that answers."""
    if not os.path.exists(rundir.api_socket(folder)):
        return None
    try:
        answer: dict[str, Any] = Client(start_host=False).get("/version")
    except ApiError:
        raise
    except HostError:
        return None
    return answer


def status(args: list[str]) -> int:
    """``pyxen host status``: exit code 0 when a host runs, 3 when none does (as init scripts have it)."""
    if getopt(args, "")[1]:
        raise UsageError("pyxen host status takes no operand.")
    folder = rundir.ensure_run_dir()
    version = _version(folder)
    if version is None:
        print(f"no host is running in {folder}")
        return 3
    client = Client(start_host=False)
    info = client.get("/info")
    guests = len(client.get("/domains")) - 1
    print(f"the host runs: pid {version['pid']}, pyxen {version['pyxen']} (Xen {version['xen']}), in {folder}")
    print(
        f"memory {info['total_memory']} MiB, {info['free_memory']} MiB free; {info['nr_cpus']} CPUs; {guests} domains"
    )
    return 0


def stop(args: list[str]) -> int:
    """``pyxen host stop``: destroys its domains; returns when its process has ended."""
    import select

    if getopt(args, "")[1]:
        raise UsageError("pyxen host stop takes no operand.")
    folder = rundir.ensure_run_dir()
    version = _version(folder)
    if version is None:
        print(f"no host is running in {folder}", file=sys.stderr)
        return 0
    try:
        # Of the process, not of its number: ready when it ends, also where nobody collects dead children.
        process = os.pidfd_open(version["pid"])
    except ProcessLookupError:
        return 0
    try:
        Client(start_host=False).post("/host/stop")
        poll = select.poll()
        poll.register(process, select.POLLIN)
        if not poll.poll(STOP_PATIENCE_S * 1000):
            raise Failure("the host does not stop", hint=f"its log is {folder}/{_LOG_NAME}")
    finally:
        os.close(process)
    return 0
