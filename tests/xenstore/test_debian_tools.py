# SPDX-License-Identifier: GPL-2.0-only
"""Debian's own xenstore-* programs against our socket (``XENSTORED_PATH``); outputs as with the C daemon."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from pyxen.xenstore.sync_client import SyncClient

pytestmark = pytest.mark.skipif(shutil.which("xenstore-ls") is None, reason="package xenstore-utils is not installed")


class Tools:
    """Runs the programs."""

    def __init__(self, path: Path) -> None:
        self.environment = {**os.environ, "XENSTORED_PATH": str(path)}

    def __call__(self, *command: str) -> tuple[int, str, str]:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=20)
        return done.returncode, done.stdout, done.stderr

    def out(self, *command: str) -> str:
        """Output of a command that must work."""
        code, out, error = self(*command)
        assert (code, error) == (0, ""), command
        return out


@pytest.fixture
def tools(xenstored_socket: Path) -> Tools:
    return Tools(xenstored_socket)


def test_write_read_list_and_remove(tools: Tools) -> None:
    tools.out("xenstore-write", "/tool/a", "1", "/tool/b", "2")
    assert tools.out("xenstore-ls", "-fp", "/") == (
        '/tool = ""   (n0)\n/tool/xenstored = ""   (n0)\n/tool/a = "1"   (n0)\n/tool/b = "2"   (n0)\n')
    assert tools.out("xenstore-ls") == 'tool = ""\n xenstored = ""\n a = "1"\n b = "2"\n'
    assert tools.out("xenstore-read", "-p", "/tool/a", "/tool/b") == "/tool/a: 1\n/tool/b: 2\n"
    tools.out("xenstore-chmod", "/tool/a", "n0", "r1")
    assert '/tool/a = "1"   (n0,r1)\n' in tools.out("xenstore-ls", "-fp")
    assert tools("xenstore-exists", "/nope")[0] == 1
    assert tools("xenstore-exists", "/tool/a")[0] == 0
    tools.out("xenstore-rm", "/tool/a")
    assert tools.out("xenstore-list", "-p", "/tool") == "/tool/xenstored\n/tool/b\n"
    assert tools.out("xenstore-read", "-s", "/tool/b") == "2\n"


def test_errors(tools: Tools) -> None:
    assert tools("xenstore-read", "/nope") == (1, "", "xenstore-read: couldn't read path /nope\n")
    assert tools("xenstore-write", "/tool/bad//path", "x")[0] == 1
    assert tools("xenstore-rm", "/") == (1, "", "xenstore-rm: could not remove path /\n")
    code, _, error = tools("xenstore-chmod", "/nope", "r0")
    assert (code, error.rstrip().rsplit(": ", 1)[-1]) == (1, "No such file or directory")


def test_a_directory_too_long_for_one_message(tools: Tools, xenstored_socket: Path) -> None:
    with SyncClient(xenstored_socket) as client:
        for i in range(500):
            client.write(f"/dir/{i:030d}", "")
    assert tools.out("xenstore-list", "/dir").split() == [f"{i:030d}" for i in range(500)]


def test_watch(tools: Tools, xenstored_socket: Path) -> None:
    watcher = subprocess.Popen(["xenstore-watch", "-n", "4", "/oracle"], env=tools.environment, stdout=subprocess.PIPE,
                               text=True)
    assert watcher.stdout is not None
    assert watcher.stdout.readline() == "/oracle\n"
    with SyncClient(xenstored_socket) as client:
        client.write("/oracle/a", "1")
        client.rm("/oracle/a")
        client.set_perms("/oracle", ["r0", "r3"])
    assert watcher.communicate(timeout=10)[0] == "/oracle/a\n/oracle/a\n/oracle\n"
    assert watcher.returncode == 0


def test_control(tools: Tools) -> None:
    program = next(iter(sorted(Path("/usr/lib").glob("xen-*/bin/xenstore-control"))), None)
    if program is None:
        pytest.skip("package xen-utils is not installed")
    assert tools.out(str(program), "check") == "OK\n"
    assert "watches          :      128 Watches per domain\n" in tools.out(str(program), "quota")


def test_programs_race_in_transactions(tools: Tools, xenstored_socket: Path) -> None:
    # xenstore-write does each call in one transaction and repeats it on EAGAIN.
    writers = [
        subprocess.Popen(["xenstore-write", *(word for i in range(20) for word in (f"/race/{w}/{i}", str(i)))],
                         env=tools.environment)
        for w in range(6)
    ]
    deadline = time.monotonic() + 20
    assert [writer.wait(max(0.1, deadline - time.monotonic())) for writer in writers] == [0] * 6
    with SyncClient(xenstored_socket) as client:
        assert sorted(client.ls("/race")) == [str(w) for w in range(6)]
        assert all(client.read(f"/race/{w}/19") == "19" for w in range(6))
