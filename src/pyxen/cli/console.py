# SPDX-License-Identifier: GPL-2.0-only
"""``xl console``: a terminal (or a pipe) joined to a guest's console.

On a terminal everything typed goes to the guest, in raw mode, but for Ctrl-] which leaves.  The end of a piped standard
input does not end the session: what the guest says next may be why it was started.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import sys

from pyxen.cli import rundir
from pyxen.cli.client import Client
from pyxen.cli.getopt import UsageError, getopt
from pyxen.cli.report import Failure
from pyxen.cli.xl import Context, need

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from types import FrameType
    from typing import Any

ESCAPE = b"\x1d"
"""Ctrl-], as in xenconsole."""

CLOSED, LEFT = "closed", "left"
_CHUNK_BYTES = 16 << 10


def console(args: list[str], context: Context) -> int:
    """``xl console``."""
    options, operands = getopt(args, "n:t:", {"type": "t", "num": "n"})
    need(operands, 1, "console")
    for letter, value in options:
        if letter == "t" and value not in ("pv", "serial", "vuart"):
            raise Failure("console type supported are: pv, serial, vuart")
        if letter == "t" and value != "pv":
            raise Failure(f"console type {value} is not supported by this version of pyxen")
        if letter == "n" and not (value.isascii() and value.isdigit()):
            raise UsageError(f"option `n' needs a number, not '{value}'.")
        if letter == "n" and int(value[:9]) != 0:
            raise Failure(f"console {value} does not exist", hint="a PV domain has one console, number 0")
    client = Client()
    row = client.domain(operands[0])
    attach(client.run_dir, row["domid"])
    return 0


class NoConsole(Failure):
    """There is no console to attach to."""


def attach(run_dir: str, domid: int, connected: Callable[[], None] | None = None) -> str:
    """Join standard input and output to the console of ``domid``: until the domain is gone (CLOSED) or Ctrl-] (LEFT).

    ``connected`` is called when nothing that the guest says from now on can be missed. Raises NoConsole.
    """
    path = rundir.console_socket(run_dir, domid)
    sys.stdout.flush()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as guest:
        try:
            guest.connect(path)
        except OSError as error:
            raise NoConsole(f"Unable to attach console of domain {domid}: {error.strerror}") from None
        if connected is not None:
            connected()
        guest.setblocking(False)
        with _RawTerminal(0):
            return pump(guest, 0, 1)


def pump(guest: socket.socket, stdin: int, stdout: int) -> str:
    """Copy both ways until the console closes (CLOSED) or, on a terminal, Ctrl-] is typed (LEFT).

    Typed text is read only as fast as the guest takes it, so that memory stays bounded.
    """
    interactive = os.isatty(stdin)
    reading = True
    unsent = b""
    poll = select.poll()
    while True:
        poll.register(guest, select.POLLIN | (select.POLLOUT if unsent else 0))
        if reading and not unsent:
            poll.register(stdin, select.POLLIN)
        ready = dict(poll.poll())
        if reading and not unsent:
            poll.unregister(stdin)
            if stdin in ready:
                typed = _read(stdin)
                reading = bool(typed)
                if interactive and ESCAPE in typed:
                    _send(guest, typed.partition(ESCAPE)[0])
                    return LEFT
                unsent = typed
        if (events := ready.get(guest.fileno(), 0)) & (select.POLLIN | select.POLLHUP | select.POLLERR):
            said = _receive(guest)
            if said == b"":
                return CLOSED
            if said and not _write(stdout, said):
                return LEFT
        if unsent and (events & select.POLLOUT or stdin in ready):
            sent = _send(guest, unsent)
            if sent is None:
                unsent, reading = b"", False  # the guest is gone; its last words may still be coming
            else:
                unsent = unsent[sent:]


def _read(fd: int) -> bytes:
    try:
        return os.read(fd, _CHUNK_BYTES)
    except BlockingIOError:
        return b""
    except OSError as error:
        if error.errno != errno.EIO:  # a terminal that hung up
            raise
        return b""


def _receive(guest: socket.socket) -> bytes | None:
    """What came; nothing (None) or the end (empty)."""
    try:
        return guest.recv(_CHUNK_BYTES)
    except BlockingIOError:
        return None
    except ConnectionResetError:
        return b""


def _send(guest: socket.socket, data: bytes) -> int | None:
    try:
        return guest.send(data) if data else 0
    except BlockingIOError:
        return 0
    except (BrokenPipeError, ConnectionResetError):
        return None


def _write(fd: int, data: bytes) -> bool:
    """Write all of it; False when nobody reads any more."""
    while data:
        try:
            data = data[os.write(fd, data) :]
        except BlockingIOError:
            waiting = select.poll()
            waiting.register(fd, select.POLLOUT)
            waiting.poll()
        except BrokenPipeError:
            return False
    return True


class _RawTerminal:
    """Puts a terminal into raw mode and restores it, also when a signal ends us.  No terminal: does nothing."""

    _SIGNALS = (signal.SIGTERM, signal.SIGHUP)

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._before: list[Any] | None = None
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> None:
        if not os.isatty(self._fd):
            return
        import termios
        import tty

        self._before = termios.tcgetattr(self._fd)
        for number in self._SIGNALS:
            self._handlers[number] = signal.signal(number, self._ended)
        tty.setraw(self._fd, termios.TCSAFLUSH)

    def __exit__(self, *error: object) -> None:
        if self._before is None:
            return
        import termios

        termios.tcsetattr(self._fd, termios.TCSAFLUSH, self._before)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    @staticmethod
    def _ended(number: int, frame: FrameType | None) -> None:
        sys.exit(128 + number)
