# SPDX-License-Identifier: GPL-2.0-only
"""A host for tests of the command line: the API over a unix socket (docs/api.md), answering what a test says."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import unquote


@dataclass
class Answer:
    """One response: JSON unless ``text`` is set."""

    body: Any = None
    status: int = 200
    text: str | None = None
    chunked: bool = False


@dataclass
class Refusal(Exception):
    message: str
    hint: str | None = None
    status: int = 400
    exit: int = 1


Handler = Callable[[dict[str, Any]], Any]


@dataclass
class FakeHost:
    """``routes`` maps "METHOD /path" (without the query) to a handler; ``requests`` is what was asked."""

    run_dir: Path
    routes: dict[str, Any] = field(default_factory=dict)
    requests: list[tuple[str, dict[str, Any]]] = field(default_factory=list)

    @contextlib.contextmanager
    def running(self) -> Iterator[FakeHost]:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        path = self.run_dir / "api.sock"
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        listener.listen(8)
        thread = threading.Thread(target=self._serve, args=(listener,), daemon=True)
        thread.start()
        try:
            yield self
        finally:
            # Wakes the thread out of accept(); closing alone does not.
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()
            thread.join(5)

    def _serve(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        stream = connection.makefile("rb")
        method, target, _ = stream.readline().decode().split(" ")
        length = 0
        while (line := stream.readline().decode().strip()) != "":
            name, _, value = line.partition(": ")
            if name.lower() == "content-length":
                length = int(value)
        body = json.loads(stream.read(length)) if length else {}
        path, _, query = target.partition("?")
        self.requests.append((f"{method} {unquote(target)}", body))
        for item in query.split("&"):
            if item:
                body["?" + item.partition("=")[0]] = item.partition("=")[2]
        try:
            route = self.routes.get(f"{method} {unquote(path)}", Refusal("404: Not Found", status=404))
            if isinstance(route, Exception):
                raise route
            answer = route(body) if callable(route) else route
            if not isinstance(answer, Answer):
                answer = Answer(answer)
        except Refusal as refusal:
            told = {"error": refusal.message, "hint": refusal.hint, "exit": refusal.exit}
            answer = Answer(told, refusal.status)
        connection.sendall(_encode(answer))


def _encode(answer: Answer) -> bytes:
    kind = "application/json" if answer.text is None else "text/plain; charset=utf-8"
    content = (json.dumps(answer.body) if answer.text is None else answer.text).encode()
    head = f"HTTP/1.1 {answer.status} Whatever\r\nContent-Type: {kind}\r\n"
    if not answer.chunked:
        return f"{head}content-length: {len(content)}\r\n\r\n".encode() + content
    pieces = [content[i : i + 7] for i in range(0, len(content), 7)]
    chunks = b"".join(b"%x;ext=1\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    return f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + chunks + b"0\r\n\r\n"


def console_socket(run_dir: Path, domid: int) -> socket.socket:
    """A listening console of ``domid``."""
    folder = run_dir / "console"
    folder.mkdir(exist_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(os.fspath(folder / str(domid)))
    listener.listen(2)
    return listener
