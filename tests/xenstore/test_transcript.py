# SPDX-License-Identifier: GPL-2.0-only
"""The answers of Xen's C xenstored (4.17, recorded from the real program) to its raw requests, byte for byte."""

from __future__ import annotations

import ast
import select
import socket
import struct
from pathlib import Path

from pyxen.abi.io.xs_wire import SOCKMSG

TRANSCRIPT = Path(__file__).parent / "data" / "c-xenstored.txt"


class Raw:
    """A client that speaks raw messages."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(5)
        self.socket.connect(str(path))

    def send(self, kind: int, tx: int, payload: bytes) -> None:
        self.socket.sendall(SOCKMSG.pack(kind, 99, tx, len(payload)) + payload)

    def receive(self) -> tuple[int, int, bytes]:
        """(type, transaction id, payload)."""
        kind, req_id, tx_id, length = SOCKMSG.unpack(self._exactly(SOCKMSG.size))
        assert req_id == (0 if kind == 15 else 99)
        return kind, tx_id, self._exactly(length)

    def pending(self) -> bool:
        return bool(select.select([self.socket], [], [], 0)[0])

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            chunk = self.socket.recv(size - len(data))
            assert chunk, "closed"
            data += chunk
        return data


def test_every_answer_is_the_c_daemons(xenstored_socket: Path) -> None:
    clients: dict[str, Raw] = {}
    requests = 0
    for number, line in enumerate(TRANSCRIPT.read_text().splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, kind, tx, literal = line.split(maxsplit=3)
        message = int(kind), int(tx), ast.literal_eval(literal)
        if line.startswith(" "):
            assert clients[name].receive() == message, f"line {number}"
            continue
        assert not any(client.pending() for client in clients.values()), f"before line {number}"
        requests += 1
        if name not in clients:
            clients[name] = Raw(xenstored_socket)
        clients[name].send(*message)
    assert requests == 199


def test_a_message_longer_than_the_protocol_allows_ends_the_connection(xenstored_socket: Path) -> None:
    client = Raw(xenstored_socket)
    client.socket.sendall(struct.pack("<4I", 2, 1, 0, 5000))
    assert client.socket.recv(100) == b""
