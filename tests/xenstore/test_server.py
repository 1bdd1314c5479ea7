# SPDX-License-Identifier: GPL-2.0-only
"""The unix socket, and clients that mean no good: half messages, floods, readers that never read."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import socket
import stat
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyxen.abi.io.xs_wire import SOCKMSG, XENSTORE_PAYLOAD_MAX, XsType
from pyxen.errors import HostError, XenError
from pyxen.xenstore.quota import OUTPUT_MAX_BYTES, OUTPUT_PAUSE_BYTES
from pyxen.xenstore.server import listen_private
from pyxen.xenstore.sync_client import SyncClient
from tests.xenstore.conftest import ServedDaemon


def raw(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(5)
    sock.connect(str(path))
    return sock


def message(kind: int, payload: bytes, tx: int = 0) -> bytes:
    return SOCKMSG.pack(kind, 1, tx, len(payload)) + payload


def receive(sock: socket.socket, count: int) -> list[tuple[int, bytes]]:
    data = b""
    found: list[tuple[int, bytes]] = []
    while len(found) < count:
        chunk = sock.recv(65536)
        assert chunk, "closed"
        data += chunk
        while len(data) >= 16 and len(data) >= 16 + SOCKMSG.unpack_from(data)[3]:
            kind, _, _, length = SOCKMSG.unpack_from(data)
            found.append((kind, data[16:16 + length]))
            data = data[16 + length:]
    return found


def test_socket_is_private(xenstored_socket: Path) -> None:
    assert stat.S_IMODE(xenstored_socket.stat().st_mode) == 0o600
    assert stat.S_IMODE(xenstored_socket.parent.stat().st_mode) == 0o700


def test_a_directory_open_to_others_or_a_live_socket_is_refused(served: ServedDaemon, tmp_path: Path) -> None:
    with pytest.raises(HostError, match="already"):
        listen_private(served.path)
    assert SyncClient(served.path).exists("/tool")
    (tmp_path / "open").mkdir(mode=0o755)
    with pytest.raises(HostError, match="not a private directory"):
        listen_private(tmp_path / "open" / "socket")
    (tmp_path / "private").mkdir(mode=0o700)
    (tmp_path / "private" / "file").write_text("mine")
    with pytest.raises(HostError, match="not a socket"):
        listen_private(tmp_path / "private" / "file")
    with pytest.raises(HostError, match="cannot listen"):
        listen_private(tmp_path / ("x" * 120))


def test_a_socket_left_by_a_killed_daemon_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "d" / "socket"
    first = listen_private(path)
    first.close()
    assert path.exists()
    second = listen_private(path)
    raw(path).close()
    second.close()


def test_a_message_may_come_byte_by_byte_and_many_at_once(xenstored_socket: Path) -> None:
    sock = raw(xenstored_socket)
    for byte in message(XsType.WRITE, b"/a\0value"):
        sock.sendall(bytes([byte]))
    assert receive(sock, 1) == [(XsType.WRITE, b"OK\0")]
    sock.sendall(message(XsType.READ, b"/a\0") * 1000)
    assert receive(sock, 1000) == [(XsType.READ, b"value")] * 1000


def outputs(served: ServedDaemon) -> list[int]:
    """Bytes waiting for each client."""
    server = served.daemon._server
    assert server is not None
    return [len(connection._out) for connection in list(server.connections)]


def test_a_pipelining_client_that_reads_late_gets_every_answer(served: ServedDaemon) -> None:
    with SyncClient(served.path) as client:
        client.write("/big", b"z" * 4000)
        sock = raw(served.path)
        # 8 MiB of answers asked for at once; the daemon stops reading long before it holds them all.
        requests = message(XsType.READ, b"/big\0") * 2000
        sock.sendall(requests)
        for _ in range(50):
            assert client.read("/tool") == ""
            assert max(outputs(served)) <= OUTPUT_PAUSE_BYTES + XENSTORE_PAYLOAD_MAX + 16
        assert receive(sock, 2000) == [(XsType.READ, b"z" * 4000)] * 2000


def test_a_watcher_that_never_reads_is_closed_in_the_end(served: ServedDaemon) -> None:
    stuck = raw(served.path)
    stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    # Many watches on one node make one small write into much output for this client.
    for i in range(200):
        stuck.sendall(message(XsType.WATCH, b"/w\0" + b"%03d" % i + b"t" * 3000 + b"\0"))
        receive(stuck, 2)
    largest = 0
    with SyncClient(served.path, timeout_s=10) as client:
        for _ in range(30):
            client.write("/w", "x")
            largest = max([largest, *outputs(served)])
        assert client.read("/w") == "x"
    assert largest <= OUTPUT_MAX_BYTES + XENSTORE_PAYLOAD_MAX + 16
    assert largest > OUTPUT_MAX_BYTES // 2
    with contextlib.suppress(ConnectionResetError):
        while stuck.recv(1 << 20):
            pass
    assert not served.daemon.service.watches.count()


def test_thousands_of_watches_leave_with_their_client(served: ServedDaemon) -> None:
    sock = raw(served.path)
    for start in range(0, 5000, 100):
        sock.sendall(b"".join(message(XsType.WATCH, b"/n/%d\0t\0" % i) for i in range(start, start + 100)))
        receive(sock, 200)
    assert served.daemon.service.watches.count() == 5000
    with SyncClient(served.path) as client:
        client.write("/n/77", "x")
        assert receive(sock, 1) == [(XsType.WATCH_EVENT, b"/n/77\0t\0")]
        sock.close()
        for _ in range(100):
            client.read("/n")
            if not served.daemon.service.watches.count():
                break
            time.sleep(0.01)
        assert not served.daemon.service.watches.count()


def test_a_client_that_dies_mid_transaction_leaves_no_trace(xenstored_socket: Path) -> None:
    sock = raw(xenstored_socket)
    sock.sendall(message(XsType.TRANSACTION_START, b"\0"))
    tx = int(receive(sock, 1)[0][1][:-1])
    sock.sendall(message(XsType.WRITE, b"/half\0done", tx) + message(XsType.WRITE, b"/ha")[:10])
    receive(sock, 1)
    sock.close()
    with SyncClient(xenstored_socket) as client:
        assert not client.exists("/half")


def test_more_clients_than_there_is_room_for_are_turned_away(
        served: ServedDaemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyxen.xenstore.server.MAX_SOCKET_CONNECTIONS", 3)
    clients = [SyncClient(served.path) for _ in range(3)]
    assert all(client.exists("/tool") for client in clients)
    with pytest.raises(HostError):
        SyncClient(served.path).read("/tool")
    clients[0].close()
    deadline = time.monotonic() + 5
    while True:
        try:
            assert SyncClient(served.path).exists("/tool")
            break
        except HostError:
            assert time.monotonic() < deadline


_REQUEST = st.one_of(
    st.binary(max_size=64),
    st.builds(message, st.integers(0, 40), st.binary(max_size=80), st.integers(0, 3)),
    st.builds(
        message,
        st.sampled_from([int(kind) for kind in XsType]),
        st.lists(st.sampled_from([b"/a", b"/a/b", b"rel", b"@x", b"n0", b"T", b"", b"1", b"/", b"r99"]), max_size=4)
        .map(lambda parts: b"\0".join([*parts, b""])),
        st.integers(0, 2),
    ),
    st.builds(lambda length: SOCKMSG.pack(2, 1, 0, length), st.integers(0, 0xFFFFFFFF)),
)


@given(st.lists(_REQUEST, max_size=12))
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_client_sends_the_others_are_served(served: ServedDaemon, requests: list[bytes]) -> None:
    sock = raw(served.path)
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        for request in requests:
            sock.sendall(request)
    sock.close()
    with SyncClient(served.path, timeout_s=5) as client:
        client.write("/alive", "yes")
        assert client.read("/alive") == "yes"
    assert list(served.daemon.service.store.check()) == []


def test_our_own_bug_in_a_request_is_eio_for_its_sender_only(
        served: ServedDaemon, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("boom")

    with SyncClient(served.path) as client:
        client.write("/x", "1")
        monkeypatch.setattr(served.daemon.service.store, "set_value", broken)
        with pytest.raises(XenError) as error:
            client.write("/x", "2")
        assert error.value.errno == errno.EIO
        assert client.read("/x") == "1"
    assert "boom" in caplog.text


def test_random_order_of_closing_and_writing(served: ServedDaemon) -> None:
    chance = random.Random(7)
    clients: list[socket.socket] = []
    for _ in range(300):
        if not clients or chance.random() < 0.3:
            clients.append(raw(served.path))
            clients[-1].sendall(message(XsType.WATCH, b"/shared\0t\0"))
        sock = chance.choice(clients)
        if chance.random() < 0.3:
            clients.remove(sock)
            sock.close()
        else:
            sock.sendall(message(XsType.WRITE, b"/shared\0" + os.urandom(4)))
    for sock in clients:
        sock.close()
    with SyncClient(served.path, timeout_s=5) as client:
        assert len(client.read_bytes("/shared")) == 4
