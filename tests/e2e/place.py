# SPDX-License-Identifier: GPL-2.0-only
"""A host as a person has it: a run directory, the commands ``xl`` and ``pyxen``, and what can be seen from outside."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from pyxen.xenstore.sync_client import SyncClient

SOURCE = str(Path(__file__).resolve().parents[2] / "src")
PATIENCE_S = 60.0


def command(name: str) -> list[str]:
    """``xl`` or ``pyxen`` of this source tree."""
    module = {"xl": "pyxen.cli.xl", "pyxen": "pyxen.cli.main"}[name]
    return [sys.executable, "-c", f"import sys; from {module} import main; sys.exit(main())"]


def process_gone(pid: int) -> bool:
    """Whether the process has ended (a dead child that nobody collected counts)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def wait_until(what: Any, patience_s: float = PATIENCE_S) -> None:
    """Wait until ``what()`` is true; fails the test when it never is."""
    deadline = time.monotonic() + patience_s
    while not what():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


class Place:
    """A run directory of a test's own."""

    def __init__(self, rundir: Path) -> None:
        self.rundir = rundir
        self.env = {**os.environ, "PYXEN_RUNDIR": str(rundir), "PYTHONPATH": SOURCE}

    # --- commands ---------------------------------------------------------------------------------

    def run(self, name: str, *args: str, code: int | None = 0, **options: Any) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [*command(name), *args], env=self.env, capture_output=True, text=True, errors="surrogateescape",
            timeout=PATIENCE_S, stdin=subprocess.DEVNULL, **options
        )  # fmt: skip
        assert "Traceback" not in done.stderr, done.stderr
        if code is not None:
            assert done.returncode == code, (name, args, done.returncode, done.stdout, done.stderr)
        return done

    def xl(self, *args: str, code: int | None = 0, **options: Any) -> subprocess.CompletedProcess[str]:
        return self.run("xl", *args, code=code, **options)

    def pyxen(self, *args: str, code: int | None = 0, **options: Any) -> subprocess.CompletedProcess[str]:
        return self.run("pyxen", *args, code=code, **options)

    def terminal(self, *args: str) -> Terminal:
        """``xl args`` on a terminal of its own."""
        return Terminal([*command("xl"), *args], self.env)

    def names(self) -> list[str]:
        """The domains of ``xl list``, domain 0 included."""
        return [line.split()[0] for line in self.xl("list").stdout.splitlines()[1:]]

    def state(self, name: str) -> str:
        return self.xl("list", name).stdout.splitlines()[1].split()[4]

    # --- seen from outside ------------------------------------------------------------------------

    def pid(self) -> int:
        return int((self.rundir / "host.lock").read_text())

    def api(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """GET (or, with a body, POST) of the host's API; the answer's JSON, whatever its status."""
        data = b"" if body is None else json.dumps(body).encode()
        head = f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(self.rundir / "api.sock"))
            client.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
            answer = b""
            while chunk := client.recv(65536):
                answer += chunk
        return json.loads(answer.partition(b"\r\n\r\n")[2])

    def store(self) -> SyncClient:
        """xenstored, as any program of this user reaches it."""
        return SyncClient(self.rundir / "xenstored" / "socket", timeout_s=20)

    def tree(self, top: str = "/") -> dict[str, tuple[str, tuple[str, ...]]]:
        """Every node of xenstore below ``top``: value and permissions."""
        found: dict[str, tuple[str, tuple[str, ...]]] = {}
        with self.store() as store:
            todo = [top]
            while todo:
                path = todo.pop()
                found[path] = (store.read(path), tuple(store.get_perms(path)))
                todo += [f"{path.rstrip('/')}/{name}" for name in store.ls(path)]
        return found

    def leftovers(self) -> dict[str, Any]:
        """Everything a domain could have left in the host, seen from outside."""
        return {
            "pid": self.pid(),
            "free KiB": self.free_kib(),
            "domains": [row["domid"] for row in self.api("/domains")],
            "store": self.tree(),
            "files": sorted(str(p) for p in self.rundir.rglob("*") if not p.is_dir() and p.parent.name != "log"),
            "descriptors": self.descriptors(),
        }

    def descriptors(self) -> dict[str, int]:
        """What the host's process has open, once the connections of whoever asked last are closed."""
        last: dict[str, int] = {}
        while True:
            found: dict[str, int] = {}
            for fd in Path(f"/proc/{self.pid()}/fd").iterdir():
                try:
                    kind = os.readlink(fd).split(":")[0]
                except FileNotFoundError:
                    continue
                found[kind] = found.get(kind, 0) + 1
            if found == last:
                return found
            last = found
            time.sleep(0.03)

    def free_kib(self) -> int:
        """Free memory to the frame: the host says it when a domain is too large."""
        text = 'name = "too-large"\nkernel = "/none"\nmemory = 4000000'
        answer = self.api("/domains", {"config_text": text, "config_path": "x", "cwd": "/"})
        match = re.search(r"([0-9]+) KiB are free", answer["error"])
        assert match is not None, answer
        return int(match[1])

    def settled(self, before: dict[str, Any]) -> None:
        """All is as it was, within a moment: the connection that asked may still be open in the host."""
        deadline = time.monotonic() + 10
        while (now := self.leftovers()) != before:
            if time.monotonic() > deadline:
                different = {key: (before[key], now[key]) for key in before if now[key] != before[key]}
                raise AssertionError(f"left behind (before, now): {different}")
            time.sleep(0.05)

    def close(self) -> None:
        """Stop the host, if there is one; a graceful end is part of every test."""
        if not (self.rundir / "host.lock").exists() or not (text := (self.rundir / "host.lock").read_text()):
            return
        pid = int(text)
        self.pyxen("host", "stop")
        assert process_gone(pid)
        log = (self.rundir / "host.log").read_text()
        assert "Traceback" not in log, log
        assert not (self.rundir / "api.sock").exists()


class Terminal:
    """A command on a pseudo-terminal, and what a person sees and types there."""

    def __init__(self, argv: list[str], env: dict[str, str]) -> None:
        self.master, self.slave = pty.openpty()
        self.before = self.modes()
        self.process = subprocess.Popen(argv, env=env, stdin=self.slave, stdout=self.slave, stderr=self.slave)
        self.text = b""
        self._read = 0

    def modes(self) -> list[Any]:
        """termios of the terminal."""
        import termios

        return termios.tcgetattr(self.slave)

    def type(self, text: str | bytes) -> None:
        os.write(self.master, text.encode() if isinstance(text, str) else text)

    def expect(self, wanted: str, patience_s: float = PATIENCE_S) -> str:
        """Wait for a text after what was expected before; what came up to its end."""
        deadline = time.monotonic() + patience_s
        while (at := self.text.find(wanted.encode(), self._read)) < 0:
            left = deadline - time.monotonic()
            assert left > 0, f"no {wanted!r} in {self.text[self._read:][-1500:]!r}"
            if select.select([self.master], [], [], min(left, 1.0))[0]:
                self.text += os.read(self.master, 65536)
            elif self.process.poll() is not None:
                raise AssertionError(f"it ended before {wanted!r} came: {self.text[self._read:][-1500:]!r}")
        end = at + len(wanted)
        said, self._read = self.text[self._read : end], end
        return said.decode(errors="replace")

    def wait(self, patience_s: float = PATIENCE_S) -> int:
        """The exit code; what it says on its way is read meanwhile."""
        deadline = time.monotonic() + patience_s
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"it does not end: {self.text[-1500:]!r}"
            if select.select([self.master], [], [], 0.05)[0]:
                self.text += os.read(self.master, 65536)
        while select.select([self.master], [], [], 0)[0]:
            self.text += os.read(self.master, 65536)
        return self.process.returncode

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)
        os.close(self.slave)
