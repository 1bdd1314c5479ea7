# SPDX-License-Identifier: GPL-2.0-only
"""``pyxen host start|status|stop`` as processes: locks, leftovers of killed hosts, errors."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.host.small_guests import config, write_kernel

pytestmark = [pytest.mark.timeout(120), pytest.mark.engine]

SOURCE = str(Path(__file__).resolve().parents[2] / "src")
SMALL = ["--memory", "64M"]


class Place:
    """A run directory of this test's own, and commands in it."""

    def __init__(self, rundir: Path) -> None:
        self.rundir = rundir
        self.env = {**os.environ, "PYXEN_RUNDIR": str(rundir), "PYTHONPATH": SOURCE}

    def host(self, *args: str, code: int | None = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "pyxen", "host", *args], env=self.env, capture_output=True, text=True
        )
        if code is not None:
            assert done.returncode == code, (args, done.stdout, done.stderr)
        return done

    def xl(self, *args: str) -> subprocess.CompletedProcess[str]:
        run_xl = "import sys; from pyxen.cli.xl import main; sys.exit(main())"
        return subprocess.run([sys.executable, "-c", run_xl, *args], env=self.env, capture_output=True, text=True)

    def pid(self) -> int:
        return int((self.rundir / "host.lock").read_text())

    def answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as client:
            try:
                client.connect(str(self.rundir / "api.sock"))
            except OSError:
                return False
        return True


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path / "run")
    yield place
    with contextlib.suppress(FileNotFoundError, ValueError, ProcessLookupError):
        os.kill(place.pid(), signal.SIGKILL)


def gone(pid: int) -> bool:
    """Whether the process has ended (a dead child that nobody collected counts)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_gone(pid: int) -> None:
    deadline = time.monotonic() + 20
    while not gone(pid):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_start_status_stop(place: Place, tmp_path: Path) -> None:
    assert "no host is running" in place.host("status", code=3).stdout
    place.host("start", *SMALL, "--topology", "1:1:2:1")
    assert place.answers()
    said = place.host("status").stdout
    assert "memory 64 MiB" in said
    assert "2 CPUs; 0 domains" in said
    pid = place.pid()
    assert "runs already" in place.host("start").stderr
    assert place.pid() == pid
    for path in (place.rundir, place.rundir / "xenstored"):
        assert path.stat().st_mode & 0o777 == 0o700
    for path in (place.rundir / "api.sock", place.rundir / "xenstored" / "socket", place.rundir / "host.log"):
        assert path.stat().st_mode & 0o777 == 0o600
    (tmp_path / "vm.cfg").write_text(config(write_kernel(tmp_path / "k", then="spin")))
    assert place.xl("create", str(tmp_path / "vm.cfg")).returncode == 0
    assert "small" in place.xl("list").stdout
    place.host("stop")
    assert gone(pid)
    left = sorted(str(path.relative_to(place.rundir)) for path in place.rundir.rglob("*") if not path.is_dir())
    assert left == ["host.lock", "host.log", "log/guest-small.log"]
    place.host("stop")  # nothing runs: no error
    assert "Traceback" not in (place.rundir / "host.log").read_text()


def test_two_starts_at_once_make_one_host(place: Place) -> None:
    command = [sys.executable, "-m", "pyxen", "host", "start", *SMALL]
    both = [subprocess.Popen(command, env=place.env, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate(timeout=60)[1] for process in both]
    assert [process.returncode for process in both] == [0, 0, 0], said
    log = (place.rundir / "host.log").read_text()
    assert log.count("the host is up") == 1
    place.host("stop")


def test_a_killed_host_is_not_in_the_way(place: Place, tmp_path: Path) -> None:
    place.host("start", *SMALL)
    (tmp_path / "vm.cfg").write_text(config(write_kernel(tmp_path / "k", then="block")))
    assert place.xl("create", str(tmp_path / "vm.cfg")).returncode == 0
    pid = place.pid()
    os.kill(pid, signal.SIGKILL)
    wait_gone(pid)
    assert (place.rundir / "console" / "1").exists()
    assert "no host is running" in place.host("status", code=3).stdout
    rows = place.xl("list")  # the next xl starts a host by itself
    assert rows.returncode == 0, rows.stderr
    assert "Domain-0" in rows.stdout
    assert "small" not in rows.stdout
    assert place.pid() != pid
    assert not (place.rundir / "console" / "1").exists()
    place.host("stop")


def test_sigterm_is_a_graceful_stop(place: Place, tmp_path: Path) -> None:
    place.host("start", *SMALL)
    (tmp_path / "vm.cfg").write_text(config(write_kernel(tmp_path / "k", then="spin")))
    assert place.xl("create", str(tmp_path / "vm.cfg")).returncode == 0
    pid = place.pid()
    os.kill(pid, signal.SIGTERM)
    wait_gone(pid)
    assert not (place.rundir / "api.sock").exists()
    assert "the host stops" in (place.rundir / "host.log").read_text()


def test_idle_exit(place: Place, tmp_path: Path) -> None:
    place.host("start", *SMALL, "--idle-exit", "2")  # longer than xl create takes to begin, on a busy machine
    (tmp_path / "vm.cfg").write_text(config(write_kernel(tmp_path / "k", then="block")))
    assert place.xl("create", str(tmp_path / "vm.cfg")).returncode == 0
    pid = place.pid()
    time.sleep(2.5)
    assert not gone(pid)  # a domain is not idleness
    assert place.xl("destroy", "small").returncode == 0
    wait_gone(pid)


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        (["--memory", "much"], 1, "is not a size"),
        (["--memory", "1M"], 1, "cannot be made"),
        (["--topology", "1:2"], 1, "topology"),
        (["--cpus", "2", "--topology", "1:1:4:1"], 1, "topology"),
        (["--pv-mode", "quick"], 1, "pv_mode"),
        (["--cpus", "x"], 2, "cpus"),
        (["--idle-exit", "-1"], 2, "idle-exit"),
        (["--nonsense"], 2, "nonsense"),
        (["something"], 2, "something"),
    ],
)
def test_a_start_that_cannot_be_says_why_in_a_line(place: Place, options: list[str], code: int, words: str) -> None:
    done = place.host("start", *options, code=code)
    lines = done.stderr.splitlines()
    assert words in lines[0]
    assert len(lines) <= 2
    assert "Traceback" not in done.stderr
    assert not place.answers()


def test_a_host_that_dies_while_starting_is_reported(place: Place) -> None:
    place.rundir.mkdir(mode=0o700)
    (place.rundir / "xenstored").write_text("in the way")
    done = place.host("start", *SMALL, code=1)
    assert len(done.stderr.splitlines()) == 2
    assert "hint:" in done.stderr
    assert not place.answers()


def test_in_the_foreground(place: Place) -> None:
    command = [sys.executable, "-m", "pyxen", "host", "start", "--foreground", *SMALL]
    process = subprocess.Popen(command, env=place.env, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert "the host is up" in process.stderr.readline()
    assert place.answers()
    process.send_signal(signal.SIGINT)
    _, rest = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "Traceback" not in rest
