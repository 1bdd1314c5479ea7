# SPDX-License-Identifier: GPL-2.0-only
"""``xl console`` on terminals and pipes."""

from __future__ import annotations

import os
import pty
import select
import signal
import socket
import subprocess
import termios
import threading
import time
from pathlib import Path

import pytest

from pyxen.cli.console import CLOSED, LEFT, pump
from tests.cli.conftest import Xl
from tests.cli.fake_host import FakeHost, console_socket
from tests.cli.test_client import XL, environment


def read_until(fd: int, wanted: bytes, seconds: float = 20) -> bytes:
    data = b""
    end = time.monotonic() + seconds
    while wanted not in data and select.select([fd], [], [], max(0, end - time.monotonic()))[0]:
        data += os.read(fd, 4096)
    assert wanted in data
    return data


class Session:
    """``pump`` in a thread between a socket pair and two pipes."""

    def __init__(self, stdin: int | None = None) -> None:
        self.guest, ours = socket.socketpair()
        ours.setblocking(False)
        self._ours = ours
        read_end, self.keyboard = os.pipe() if stdin is None else (stdin, -1)
        self.screen, write_end = os.pipe()
        self.result = ""
        self._fds = [write_end] + ([read_end] if stdin is None else [])
        self._thread = threading.Thread(target=self._run, args=(read_end, write_end))
        self._thread.start()

    def _run(self, stdin: int, stdout: int) -> None:
        self.result = pump(self._ours, stdin, stdout)
        self._ours.close()

    def end(self) -> str:
        self._thread.join(20)
        assert not self._thread.is_alive()
        for fd in self._fds:
            os.close(fd)
        self.guest.close()
        return self.result


def test_both_ways_until_the_domain_is_gone() -> None:
    session = Session()
    session.guest.sendall(b"login: ")
    assert read_until(session.screen, b"login: ") == b"login: "
    os.write(session.keyboard, b"root\n\x1d")
    # A pipe has no escape character: all bytes are data.
    assert session.guest.recv(100) == b"root\n\x1d"
    session.guest.sendall(b"last words")
    session.guest.close()
    assert session.end() == CLOSED
    assert read_until(session.screen, b"last words")


def test_end_of_piped_input_is_not_the_end() -> None:
    session = Session()
    os.write(session.keyboard, b"poweroff\n")
    os.close(session.keyboard)
    assert session.guest.recv(100) == b"poweroff\n"
    time.sleep(0.1)
    session.guest.sendall(b"bye")
    assert read_until(session.screen, b"bye")
    session.guest.close()
    assert session.end() == CLOSED


def test_slow_guest_holds_typing_back_and_loses_nothing() -> None:
    session = Session()
    text = os.urandom(2 << 20)
    writer = threading.Thread(
        target=lambda: [os.write(session.keyboard, text[i : i + 4096]) for i in range(0, len(text), 4096)]
    )
    writer.start()
    time.sleep(0.2)
    assert writer.is_alive()  # held back
    received = b""
    while len(received) < len(text):
        received += session.guest.recv(65536)
    writer.join(20)
    assert received == text
    session.guest.close()
    assert session.end() == CLOSED


def test_escape_leaves_on_a_terminal() -> None:
    master, slave = pty.openpty()
    settings = termios.tcgetattr(slave)
    settings[3] &= ~(termios.ICANON | termios.ECHO)
    termios.tcsetattr(slave, termios.TCSANOW, settings)
    session = Session(slave)
    os.write(master, b"ls\x1dignored")
    assert session.guest.recv(100) == b"ls"
    assert session.end() == LEFT
    os.close(master)
    os.close(slave)


@pytest.mark.parametrize("ending", ["escape", "guest", "sigterm"])
def test_terminal_is_raw_meanwhile_and_restored(host: FakeHost, run_dir: Path, ending: str) -> None:
    master, slave = pty.openpty()
    before = termios.tcgetattr(slave)
    with console_socket(run_dir, 3) as listener:
        process = subprocess.Popen([*XL, "console", "pv"], stdin=slave, stdout=slave, stderr=slave, env=environment())
        guest = listener.accept()[0]
        guest.sendall(b"hello\r\n")
        assert read_until(master, b"hello\r\n") == b"hello\r\n"
        assert not termios.tcgetattr(slave)[3] & (termios.ICANON | termios.ECHO | termios.ISIG)
        os.write(master, b"\x03")
        assert guest.recv(10) == b"\x03"  # Ctrl-C is the guest's
        if ending == "escape":
            os.write(master, b"\x1d")
        elif ending == "guest":
            guest.close()
        else:
            process.send_signal(signal.SIGTERM)
        assert process.wait(20) == (128 + signal.SIGTERM if ending == "sigterm" else 0)
        guest.close()
    assert termios.tcgetattr(slave) == before
    assert not select.select([master], [], [], 0)[0]  # and nothing odd was printed
    os.close(master)
    os.close(slave)


def test_refusals(host: FakeHost, xl: Xl) -> None:
    assert xl("console", "nosuch").err == "nosuch is an invalid domain identifier (rc=-6)\n"
    run = xl("console", "pv")
    assert (run.code, run.err) == (1, "Unable to attach console of domain 3: No such file or directory\n")
    assert xl("console", "-t", "foo", "pv").err == "console type supported are: pv, serial, vuart\n"
    assert xl("console", "-t", "serial", "pv").err == "console type serial is not supported by this version of pyxen\n"
    assert xl("console", "-n", "1", "pv").err.startswith("console 1 does not exist\nhint: ")
    assert xl("console", "-n", "x", "pv").code == 2
    assert xl("console").code == 2
