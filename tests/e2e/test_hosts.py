# SPDX-License-Identifier: GPL-2.0-only
"""Hosts as processes, with guests in them, through the commands: first starts, killed hosts, neighbours, strangers."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.place import SOURCE, Place, command, process_gone, wait_until
from tests.host.small_guests import config, write_kernel

pytestmark = [pytest.mark.guest, pytest.mark.engine, pytest.mark.timeout(120)]

NOBODY = 65534


def guest(tmp_path: Path, name: str, then: str | int, *lines: str) -> str:
    file = tmp_path / f"{name}.cfg"
    file.write_text(config(write_kernel(tmp_path / f"{name}.elf", then=then), name, *lines) + "\n")
    return str(file)


def test_two_first_commands_at_once_give_one_host(place: Place, tmp_path: Path) -> None:
    """Two creates and a list with no host running: one host, both guests in it."""
    files = [guest(tmp_path, name, "block") for name in ("one", "two")]
    argvs = [["create", "-q", files[0]], ["create", "-q", files[1]], ["list"]]
    processes = [
        subprocess.Popen([*command("xl"), *argv], env=place.env, stdout=-1, stderr=-1, text=True)
        for argv in argvs
    ]
    said = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], said
    assert sorted(place.names()) == ["Domain-0", "one", "two"]
    assert (place.rundir / "host.log").read_text().count("the host is up") == 1


def test_a_killed_host_with_a_running_guest(place: Place, tmp_path: Path) -> None:
    file = guest(tmp_path, "vm", "spin")
    terminal = place.terminal("create", "-c", file)
    try:
        terminal.expect("hello")
        pid = place.pid()
        os.kill(pid, signal.SIGKILL)
        terminal.wait()
        assert b"Traceback" not in terminal.text
        assert terminal.modes() == terminal.before
    finally:
        terminal.close()
    wait_until(lambda: process_gone(pid))
    place.xl("create", "-q", file)  # cleans up and starts
    assert place.names() == ["Domain-0", "vm"]
    assert place.xl("domid", "vm").stdout == "1\n"
    assert place.pid() != pid
    assert sorted(os.listdir(place.rundir / "console")) == ["1"]
    place.xl("destroy", "vm")
    assert (place.rundir / "log" / "guest-vm.log").read_bytes().count(b"hello\n") == 2


def test_two_run_directories_are_two_hosts(place: Place, tmp_path: Path) -> None:
    other = Place(tmp_path / "other")
    try:
        place.pyxen("host", "start", "--memory", "64M", "--cpus", "2")
        other.pyxen("host", "start", "--memory", "96M", "--topology", "nodes=2,sockets=2,cores=2,threads=1")
        place.xl("create", "-q", guest(tmp_path, "vm", "block"))
        other.xl("create", "-q", guest(tmp_path, "vm", "block"))
        place.xl("rename", "vm", "here")
        assert (place.names(), other.names()) == (["Domain-0", "here"], ["Domain-0", "vm"])
        infos = [dict(line.split(":", 1) for line in p.xl("info").stdout.splitlines()) for p in (place, other)]
        shown = [
            [info[key.ljust(23)].strip() for key in ("nr_cpus", "nr_nodes", "cores_per_socket", "total_memory")]
            for info in infos
        ]
        assert shown == [["2", "1", "2", "64"], ["4", "2", "2", "96"]]
    finally:
        other.close()
    assert place.names() == ["Domain-0", "here"]


def test_two_busy_guests_on_two_modelled_cpus_both_get_on(place: Place, tmp_path: Path) -> None:
    place.pyxen("host", "start", "--memory", "64M", "--cpus", "2")
    for name in ("one", "two"):
        place.xl("create", "-q", guest(tmp_path, name, "spin"))

    def used() -> list[float]:
        return [row["cpu_time_ns"] / 1e9 for row in place.api("/domains") if row["domid"]]

    before = used()
    wait_until(lambda: all(now - then > 0.3 for now, then in zip(used(), before, strict=True)))
    assert all(state in ("r-----", "------") for state in (place.state("one"), place.state("two")))


@pytest.mark.parametrize("how", ["stop", "SIGTERM", "SIGINT"])
def test_the_end_of_a_host_with_busy_guests(place: Place, tmp_path: Path, debian: Path, how: str) -> None:
    """One guest spins, one waits, and Debian is in the middle of its boot."""
    place.xl("create", "-q", guest(tmp_path, "spins", "spin"))
    place.xl("create", "-q", guest(tmp_path, "waits", "block"))
    place.xl("create", "-q", str(debian))
    wait_until(lambda: b"Linux version" in (place.rundir / "log" / "guest-debian.log").read_bytes())
    pid = place.pid()
    started = time.monotonic()
    if how == "stop":
        place.pyxen("host", "stop")
    else:
        os.kill(pid, getattr(signal, how))
        wait_until(lambda: process_gone(pid), 20)
    assert time.monotonic() - started < 15
    left = {path.name for path in place.rundir.rglob("*") if not path.is_dir()}
    assert left == {"host.lock", "host.log", "guest-spins.log", "guest-waits.log", "guest-debian.log"}
    log = (place.rundir / "host.log").read_text()
    assert "Traceback" not in log
    assert "could not be removed" not in log


def test_stop_while_a_domain_is_being_built(place: Place, tmp_path: Path) -> None:
    place.pyxen("host", "start", "--memory", "2G")
    file = guest(tmp_path, "large", "block", "memory = 1800")
    creating = subprocess.Popen([*command("xl"), "create", "-q", file], env=place.env, stderr=-1, text=True)
    time.sleep(0.15)
    pid = place.pid()
    place.pyxen("host", "stop")
    assert process_gone(pid)
    said = creating.communicate(timeout=30)[1]
    assert "Traceback" not in said
    assert len(said.splitlines()) <= 2, said
    assert os.listdir(place.rundir / "console") == []


REACH = """
import socket, sys
from pathlib import Path
for path in sys.argv[1:]:
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(path)
            client.sendall(b"GET /version HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n")
            client.settimeout(5)
            answer = client.recv(100)
        except OSError as error:
            answer = b""
        print("reached" if answer else "refused")
"""


def as_nobody(*argv: str, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups", *argv], capture_output=True,
        text=True, env=env, timeout=60, cwd="/",
    )  # fmt: skip


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A folder that every user can reach, with a run directory in it (/tmp has such; pytest's folders do not)."""
    if os.geteuid() != 0 or shutil.which("setpriv") is None:
        pytest.skip("only root can be somebody else")
    with tempfile.TemporaryDirectory(prefix="pyxen-e2e-") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def test_another_user_reaches_nothing(open_place: Path, tmp_path: Path) -> None:
    place = Place(open_place / "run")
    try:
        place.pyxen("host", "start", "--memory", "64M")
        place.xl("create", "-q", guest(tmp_path, "vm", "block"))
        paths = [str(place.rundir / name) for name in ("api.sock", "xenstored/socket", "console/1")]
        python = shutil.which("python3", path="/usr/bin:/bin") or sys.executable
        assert as_nobody(python, "-c", REACH, *paths).stdout.split() == ["refused"] * 3
        # Even where the folder's mode does not protect them, the API refuses other users.
        for path in (place.rundir, place.rundir / "xenstored", place.rundir / "console"):
            path.chmod(0o755)
        for socket in paths:
            os.chmod(socket, 0o666)
        assert as_nobody(python, "-c", REACH, paths[0]).stdout.split() == ["refused"]
        ours = subprocess.run([python, "-c", REACH, paths[0]], check=True, capture_output=True, text=True)
        assert ours.stdout.split() == ["reached"]
        assert place.api("/domains")[1]["name"] == "vm"
    finally:
        place.rundir.chmod(0o700)
        place.close()


@pytest.mark.parametrize("fault", ["mode", "owner", "link", "file"])
def test_run_directories_that_are_refused(open_place: Path, fault: str) -> None:
    rundir = open_place / "run"
    if fault == "file":
        rundir.write_text("")
    elif fault == "link":
        (open_place / "real").mkdir(mode=0o700)
        rundir.symlink_to(open_place / "real")
    else:
        rundir.mkdir(mode=0o700)
        if fault == "mode":
            rundir.chmod(0o755)
        else:
            os.chown(rundir, NOBODY, NOBODY)
    place = Place(rundir)
    for name, *args in (("xl", "list"), ("pyxen", "host", "start"), ("pyxen", "host", "stop")):
        done = place.run(name, *args, code=1)
        first, hint = done.stderr.splitlines()
        assert first.startswith(f"run directory {rundir} ")
        assert hint.startswith("hint: ")
    found = [path for path in open_place.rglob("*") if path.name not in ("run", "real")]
    assert not found


def test_default_run_directories_of_two_users_are_two() -> None:
    """Without PYXEN_RUNDIR and a login session: /tmp/pyxen-UID, and each is closed to the other (see above)."""
    if os.geteuid() != 0:
        pytest.skip("only root can be somebody else")
    env = {key: value for key, value in os.environ.items() if key not in ("PYXEN_RUNDIR", "XDG_RUNTIME_DIR")}
    env["PYTHONPATH"] = SOURCE
    for uid in (0, NOBODY):
        ask = f"import os; from pyxen.cli.rundir import run_dir; os.setuid({uid}); print(run_dir())"
        done = subprocess.run([sys.executable, "-c", ask], env=env, capture_output=True, text=True, check=True)
        assert done.stdout == f"/tmp/pyxen-{uid}\n"
