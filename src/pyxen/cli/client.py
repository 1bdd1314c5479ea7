# SPDX-License-Identifier: GPL-2.0-only
"""The API's client: HTTP/1.1 and JSON over a unix socket, one connection a request (docs/api.md).

Written by hand because of what it costs: ``http.client`` alone takes longer to import than the whole of ``xl list`` may
take.  For the same reason ``subprocess`` is imported only when there is a host to start.
"""

from __future__ import annotations

import json
import os
import socket

from pyxen.cli import rundir
from pyxen.errors import HostError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

MAX_HEADER_BYTES = 64 << 10
MAX_BODY_BYTES = 64 << 20
_CHUNK_BYTES = 64 << 10
_UNRESERVED = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")


class ApiError(HostError):
    """The host refused: ``status`` is HTTP's, ``exit_code`` what the command should return."""

    def __init__(self, message: str, *, hint: str | None = None, status: int = 500, exit_code: int = 1) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.exit_code = exit_code


def quote(text: str) -> str:
    """``text`` as one segment of a path."""
    return "".join(chr(b) if b in _UNRESERVED else f"%{b:02X}" for b in os.fsencode(text))


class Client:
    """Speaks to the host of this user's run directory, and starts it if need be.

    Raises ApiError for what the host refused and HostError when there is no host to be had.
    """

    def __init__(self, *, start_host: bool = True) -> None:
        self.run_dir = rundir.ensure_run_dir()
        self._may_start = start_host

    def get(self, path: str) -> Any:
        return self.request("GET", path)

    def post(self, path: str, body: dict[str, Any] | None = None) -> Any:
        return self.request("POST", path, {} if body is None else body)

    def delete(self, path: str) -> Any:
        return self.request("DELETE", path)

    def domain(self, which: str) -> Any:
        """The domain called ``which`` (a name or an id). Raises ApiError (404) when there is none."""
        if not which or "/" in which:  # never a name, and no segment of a path
            raise ApiError(f"{which} is an invalid domain identifier (rc=-6)", status=404)
        return self.get(f"/domains/{quote(which)}")

    def request(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """Do one request: the decoded JSON of the answer, or its text when it is not JSON."""
        payload = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nHost: pyxen\r\nConnection: close\r\n"
        if body is not None:
            head += f"Content-Type: application/json\r\nContent-Length: {len(payload)}\r\n"
        with self._connect() as connection:
            try:
                connection.sendall(head.encode() + b"\r\n" + payload)
                # A host that refuses early (a body too large) may close before it has read everything.
            except (BrokenPipeError, ConnectionResetError):
                pass
            try:
                status, kind, content = _read_response(connection)
            except (OSError, ValueError) as error:
                reason = f": {error}" if isinstance(error, ValueError) else ""
                raise HostError(f"the host did not answer{reason}", hint=f"its log is in {self.run_dir}") from None
        answer: Any = content.decode(errors="replace")
        if kind.startswith("application/json"):
            try:
                answer = json.loads(content)
            except (ValueError, RecursionError):
                raise HostError("the host's answer is not JSON", hint=f"its log is in {self.run_dir}") from None
        if status >= 400:
            raise _refusal(status, answer)
        return answer

    def _connect(self) -> socket.socket:
        connection = self._try_connect()
        if connection is None and self._may_start:
            self._may_start = False
            start_host()
            connection = self._try_connect()
        if connection is None:
            raise HostError("no host is running", hint="run: pyxen host start")
        return connection

    def _try_connect(self) -> socket.socket | None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.connect(rundir.api_socket(self.run_dir))
        except (FileNotFoundError, ConnectionRefusedError):
            # Never started, or killed and its socket left behind.
            connection.close()
            return None
        except OSError as error:
            connection.close()
            path = rundir.api_socket(self.run_dir)
            raise HostError(f"cannot reach the host at {path}: {error.strerror}") from None
        return connection


def _refusal(status: int, answer: Any) -> ApiError:
    if not isinstance(answer, dict) or not isinstance(answer.get("error"), str):
        return ApiError(f"the host answered {status}", status=status)
    hint, code = answer.get("hint"), answer.get("exit")
    return ApiError(
        " ".join(answer["error"].split("\n")),
        hint=hint if isinstance(hint, str) else None,
        status=status,
        exit_code=code if isinstance(code, int) and 0 < code < 256 else 1,
    )


def _read_response(connection: socket.socket) -> tuple[int, str, bytes]:
    """Status, content type and body.  Raises ValueError for what is no HTTP response."""
    data = bytearray()
    while (end := data.find(b"\r\n\r\n")) < 0:
        if len(data) > MAX_HEADER_BYTES:
            raise ValueError("its header does not end")
        _receive(connection, data)
    lines = data[:end].decode("latin-1").split("\r\n")
    del data[: end + 4]
    words = lines[0].split(" ", 2)
    if len(words) < 2 or not words[0].startswith("HTTP/1.") or not (words[1].isdigit() and len(words[1]) == 3):
        raise ValueError("it does not speak HTTP")
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines[1:])}
    kind = headers.get("content-type", "").lower()
    if headers.get("transfer-encoding", "").lower() == "chunked":
        return int(words[1]), kind, _read_chunks(connection, data)
    length = headers.get("content-length")
    if length is None:
        try:
            while len(data) <= MAX_BODY_BYTES:
                _receive(connection, data)
        except EOFError:
            return int(words[1]), kind, bytes(data)
        raise ValueError("its answer is too long")
    if not (length.isascii() and length.isdigit() and len(length) < 12) or int(length) > MAX_BODY_BYTES:
        raise ValueError("its answer is too long")
    _receive_until(connection, data, int(length))
    return int(words[1]), kind, bytes(data[: int(length)])


def _read_chunks(connection: socket.socket, data: bytearray) -> bytes:
    body = bytearray()
    while True:
        while (end := data.find(b"\r\n")) < 0:
            if len(data) > MAX_HEADER_BYTES:
                raise ValueError("its chunks are malformed")
            _receive(connection, data)
        size = int(data[:end].partition(b";")[0][:16], 16)
        del data[: end + 2]
        if size == 0:
            return bytes(body)
        if size < 0 or len(body) + size > MAX_BODY_BYTES:
            raise ValueError("its answer is too long")
        _receive_until(connection, data, size + 2)
        body += data[:size]
        del data[: size + 2]


def _receive_until(connection: socket.socket, data: bytearray, size: int) -> None:
    while len(data) < size:
        _receive(connection, data)


def _receive(connection: socket.socket, data: bytearray) -> None:
    chunk = connection.recv(_CHUNK_BYTES)
    if not chunk:
        raise _Closed("it closed the connection")
    data += chunk


class _Closed(ValueError, EOFError):
    """The end of the stream: the end of an answer that has no length, and too early for any other."""


def start_host() -> None:
    """Start this user's host in the background; returns when it answers.  Raises HostError with its last words."""
    import subprocess
    import sys
    import tempfile

    # A file, not a pipe: the daemon keeps whatever standard error it was given.
    with tempfile.TemporaryFile() as said:
        try:
            code = subprocess.call(
                [sys.executable, "-m", "pyxen", "host", "start"],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=said,
            )
        except OSError as error:
            raise HostError(f"cannot start the host: {error.strerror}") from None
        if code == 0:
            return
        said.seek(0)
        lines = [line.strip() for line in said.read(64 << 10).decode(errors="replace").splitlines() if line.strip()]
    reason = lines[0] if lines else f"exit code {code}"
    hint = lines[1].removeprefix("hint: ") if len(lines) == 2 else "run: pyxen host start"
    raise HostError(f"cannot start the host: {reason[:300]}", hint=hint[:300])
