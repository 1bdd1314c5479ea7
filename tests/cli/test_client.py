# SPDX-License-Identifier: GPL-2.0-only
"""The API's client: answers of every shape, hosts that are not there, and what ``xl`` makes of it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from pyxen.cli import client as client_module
from pyxen.cli.client import Client, quote
from pyxen.errors import HostError
from tests.cli.conftest import Xl
from tests.cli.fake_host import Answer, FakeHost

XL = [sys.executable, "-c", "import sys; from pyxen.cli.xl import main; sys.exit(main())"]


def environment() -> dict[str, str]:
    """For a process of its own: this one's modules, and the run directory that the test has set."""
    assert os.environ["PYXEN_RUNDIR"]
    # Unbuffered, Python itself does not notice a write that was cut short.
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return {**inherited, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def answer_with(run_dir: Path, raw: bytes) -> threading.Thread:
    """A server that reads one request and answers ``raw``."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(run_dir / "api.sock"))
    listener.listen(1)

    def serve() -> None:
        with listener, listener.accept()[0] as connection:
            connection.recv(65536)
            connection.sendall(raw)

    thread = threading.Thread(target=serve)
    thread.start()
    return thread


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-Le",
        b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\n[1]",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n[1]",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n[1]",
        b"HTTP/1.1 abc OK\r\n\r\n",
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{]",
        b"x" * 200_000,
    ],
)
def test_what_is_no_answer_is_one_line(run_dir: Path, raw: bytes) -> None:
    thread = answer_with(run_dir, raw)
    with pytest.raises(HostError, match=r"^the host") as caught:
        Client(start_host=False).get("/version")
    thread.join(5)
    assert "\n" not in str(caught.value) and str(run_dir) in (caught.value.hint or "")


def test_answers_without_length_and_in_chunks(run_dir: Path, host: FakeHost) -> None:
    host.routes["GET /chunks"] = Answer([1, {"a": "é" * 100}], chunked=True)
    assert Client().get("/chunks") == [1, {"a": "é" * 100}]
    host.routes["GET /text"] = Answer(text="plain")
    assert Client().get("/text") == "plain"


def test_answer_that_ends_with_the_connection(run_dir: Path) -> None:
    thread = answer_with(run_dir, b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n[2]")
    assert Client(start_host=False).get("/x") == [2]
    thread.join(5)


def test_quote() -> None:
    assert quote("a-b_c.d~9") == "a-b_c.d~9"
    assert quote("a/b ?é\udcff") == "a%2Fb%20%3F%C3%A9%FF"


def test_host_is_started_when_none_runs(run_dir: Path, monkeypatch: pytest.MonkeyPatch, xl: Xl) -> None:
    fake = FakeHost(run_dir, {"GET /domains": []})
    serving = fake.running()
    started = []

    def start() -> None:
        started.append(True)
        serving.__enter__()

    monkeypatch.setattr(client_module, "start_host", start)
    # A host that was killed leaves its socket behind; nobody listens there.
    stale = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    stale.bind(str(run_dir / "api.sock"))
    stale.close()
    try:
        assert xl("list").code == 0
        assert xl("list").code == 0
    finally:
        serving.__exit__(None, None, None)
    assert started == [True]


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        (
            "echo 'no engine' >&2; echo 'hint: install it' >&2; exit 3",
            "cannot start the host: no engine\nhint: install it\n",
        ),
        ("exit 7", "cannot start the host: exit code 7\nhint: run: pyxen host start\n"),
        ("sleep 100 & exit 0", "no host is running\nhint: run: pyxen host start\n"),
    ],
)
def test_host_that_cannot_start(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch, xl: Xl, tmp_path: Path, script: str, expected: str
) -> None:
    fake_python = tmp_path / "python"
    fake_python.write_text(f'#!/bin/sh\n[ "$*" = "-m pyxen host start" ] || exit 99\n{script}\n')
    fake_python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(fake_python))
    run = xl("list")
    assert (run.code, run.err) == (1, expected)


def test_unsafe_run_directory_is_one_line(run_dir: Path, xl: Xl) -> None:
    run_dir.chmod(0o755)
    run = xl("list")
    assert run.code == 1 and run.err.count("\n") == 2
    assert run.err.startswith(f"run directory {run_dir} is open to other users (mode 0755, must be 0700)\nhint: ")


def test_no_traceback_for_what_we_did_not_foresee(host: FakeHost, xl: Xl, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYXEN_DEBUG", raising=False)
    host.routes["GET /domains"] = [{"unexpected": 1}]
    run = xl("list")
    assert run.code == 1
    assert run.err.splitlines()[0] == "xl: internal error: KeyError: 'cpu_time_ns'"


def test_interrupt_is_130(monkeypatch: pytest.MonkeyPatch, run_dir: Path, xl: Xl) -> None:
    def interrupted(self: Client) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Client, "__init__", interrupted)
    run = xl("list")
    assert (run.code, run.out, run.err) == (130, "", "")


def test_reader_that_leaves_early_is_no_error(run_dir: Path) -> None:
    fake = FakeHost(run_dir, {"GET /dmesg": Answer(text="(XEN) line\n" * 100_000)})
    with fake.running(), subprocess.Popen([*XL, "dmesg"], stdout=-1, stderr=-1, env=environment()) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.read(11) == b"(XEN) line\n"
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


def test_list_imports_little(run_dir: Path, host: FakeHost) -> None:
    """What made the difference when it was measured: none of these on the path of ``xl list``."""
    code = "import sys; from pyxen.cli.xl import main; main(['list']); print(*sys.modules, file=sys.stderr)"
    run = subprocess.run(
        [sys.executable, "-S", "-c", code], capture_output=True, text=True, env=environment(), check=True
    )
    loaded = set(run.stderr.split())
    heavy = {
        "argparse",
        "http.client",
        "dataclasses",
        "typing",
        "subprocess",
        "importlib.metadata",
        "asyncio",
        "inspect",
    }
    heavy |= {"pathlib", "tempfile", "urllib", "logging", "unicorn", "pyxen.host", "pyxen.toolstack", "pyxen.cli.usage"}
    assert not heavy & loaded
    assert {name for name in loaded if name.startswith("pyxen")} == {
        "pyxen",
        "pyxen.errors",
        *("pyxen.cli" + name for name in ("", ".xl", ".getopt", ".report", ".domains", ".client", ".rundir")),
    }
