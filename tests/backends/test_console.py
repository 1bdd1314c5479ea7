# SPDX-License-Identifier: GPL-2.0-only
"""The PV console back end: ring, history, readers, log and socket, against a guest that is a page in memory."""

from __future__ import annotations

import asyncio
import stat
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyxen.abi.io.console import (
    IN,
    IN_CONS,
    IN_PROD,
    IN_SIZE,
    INTERFACE_SIZE,
    OUT,
    OUT_CONS,
    OUT_PROD,
    OUT_SIZE,
)
from pyxen.backends.console import HISTORY_BYTES, INPUT_BYTES, LOG_BYTES, READER_BYTES, ConsoleBackend
from pyxen.backends.console_socket import ConsoleSocket
from pyxen.errors import HostError


class Guest:
    """The other end of the ring."""

    def __init__(self, log_path: Path | None = None, start: int = 0, log_limit_bytes: int = LOG_BYTES) -> None:
        self.page = bytearray(4096)
        self.signals = 0
        for offset in (IN_CONS, IN_PROD, OUT_CONS, OUT_PROD):
            self.set(offset, start)
        self.backend = ConsoleBackend(memoryview(self.page), self._signal, "g", log_path,
                                      log_limit_bytes=log_limit_bytes)

    def _signal(self) -> None:
        self.signals += 1

    def get(self, offset: int) -> int:
        value: int = struct.unpack_from("<I", self.page, offset)[0]
        return value

    def set(self, offset: int, value: int) -> None:
        struct.pack_into("<I", self.page, offset, value & 0xFFFFFFFF)

    def print(self, data: bytes) -> None:
        """Write to the ring, signalling when it is full and at the end."""
        while data:
            prod = self.get(OUT_PROD)
            room = OUT_SIZE - ((prod - self.get(OUT_CONS)) & 0xFFFFFFFF)
            assert room, "the back end does not drain"
            for byte in data[:room]:
                self.page[OUT + prod % OUT_SIZE] = byte
                prod += 1
            self.set(OUT_PROD, prod)
            data = data[room:]
            self.backend.on_event()

    def read(self) -> bytes:
        """Take all input there is, signalling that there is room."""
        cons, prod = self.get(IN_CONS), self.get(IN_PROD)
        count = (prod - cons) & 0xFFFFFFFF
        assert count <= IN_SIZE
        data = bytes(self.page[IN + (cons + i) % IN_SIZE] for i in range(count))
        self.set(IN_CONS, prod)
        self.backend.on_event()
        return data


def test_output_reaches_history_log_and_every_reader(tmp_path: Path) -> None:
    guest = Guest(tmp_path / "log" / "guest-g.log")
    guest.print(b"before\n")

    async def main() -> None:
        first, second = guest.backend.attach(), guest.backend.attach()
        assert await anext(first) == b"before\n"
        guest.print(b"after\n")
        assert await anext(first) == b"after\n"
        assert await anext(second) == b"before\nafter\n"
        second.detach()
        guest.print(b"more")
        assert await anext(first) == b"more"
        with pytest.raises(StopAsyncIteration):
            await anext(second)

    asyncio.run(main())
    assert (tmp_path / "log" / "guest-g.log").read_bytes() == b"before\nafter\nmore"
    assert guest.signals >= 3


@given(start=st.integers(0, 0xFFFFFFFF), lines=st.lists(st.binary(min_size=1, max_size=5000), max_size=6))
@settings(max_examples=40, deadline=None)
def test_every_byte_arrives_wherever_the_indices_wrap(start: int, lines: list[bytes]) -> None:
    guest = Guest(start=start)
    for line in lines:
        guest.print(line)
    assert guest.backend.history == b"".join(lines)[-HISTORY_BYTES:]
    typed = b"".join(lines)
    accepted = guest.backend.write(typed)
    assert accepted == min(len(typed), INPUT_BYTES)
    received = b""
    while data := guest.read():
        received += data
    assert received == typed


def test_history_keeps_the_last_64_kib() -> None:
    guest = Guest()
    text = bytes(i % 251 for i in range(200_000))
    guest.print(text)
    assert guest.backend.history == text[-HISTORY_BYTES:]


@pytest.mark.parametrize("claimed", [OUT_SIZE + 1, 0x7FFFFFFF, 0xFFFFFFFF])
def test_absurd_output_index_is_not_believed(claimed: int) -> None:
    guest = Guest()
    guest.set(OUT_PROD, claimed)
    guest.backend.on_event()
    assert guest.backend.history == b""
    assert guest.get(OUT_CONS) == 0
    assert guest.signals == 0
    guest.set(OUT_PROD, 0)
    guest.print(b"sane again")
    assert guest.backend.history == b"sane again"


@pytest.mark.parametrize("cons", [5, 0x80000000])
def test_absurd_input_index_gets_no_input(cons: int) -> None:
    guest = Guest()
    guest.set(IN_CONS, cons)
    before = bytes(guest.page[:IN_SIZE])
    assert guest.backend.write(b"ls\n") == 3
    assert bytes(guest.page[:IN_SIZE]) == before
    assert guest.get(IN_PROD) == 0
    guest.set(IN_CONS, 0)
    guest.backend.on_event()
    assert guest.read() == b"ls\n"


def test_input_is_bounded_and_waits_for_room() -> None:
    guest = Guest()
    typed = bytes(i % 256 for i in range(INPUT_BYTES + 5000))
    accepted = guest.backend.write(typed)
    # What was queued and what the ring took at once.
    assert accepted == INPUT_BYTES
    assert guest.backend.write(typed[accepted:]) == IN_SIZE
    received = b""
    while data := guest.read():
        received += data
    assert received == typed[:accepted + IN_SIZE]


def test_a_slow_reader_loses_its_oldest_bytes_and_nobody_else_any() -> None:
    guest = Guest()
    text = bytes(i % 253 for i in range(2 * READER_BYTES))

    async def main() -> None:
        slow = guest.backend.attach()
        quick = guest.backend.attach()
        got = b""
        for start in range(0, len(text), 4096):
            guest.print(text[start:start + 4096])
            got += await anext(quick)
        assert got == text
        assert await anext(slow) == text[-READER_BYTES:]

    asyncio.run(main())


def test_close_takes_the_last_words_and_ends_the_readers(tmp_path: Path) -> None:
    guest = Guest(tmp_path / "g.log")
    guest.page[OUT:OUT + 4] = b"bye\n"
    guest.set(OUT_PROD, 4)

    async def main() -> list[bytes]:
        reader = guest.backend.attach()
        guest.backend.close()
        assert guest.backend.write(b"x") == 0
        late = guest.backend.attach()
        assert [data async for data in late] == [b"bye\n"]
        return [data async for data in reader]

    assert asyncio.run(main()) == [b"bye\n"]
    assert (tmp_path / "g.log").read_bytes() == b"bye\n"
    guest.backend.on_event()
    guest.backend.close()


def test_log_is_rotated_at_its_limit_and_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "guest-g.log"
    path.touch(mode=0o600)
    path.write_bytes(b"earlier boot\n")
    guest = Guest(path, log_limit_bytes=4096)
    for i in range(1000):
        guest.print(b"line %06d\n" % i)
    assert path.stat().st_size < 4096
    rotated = path.with_name("guest-g.log.1")
    assert 4096 <= rotated.stat().st_size < 4096 + OUT_SIZE
    assert (rotated.read_bytes() + path.read_bytes()).endswith(b"line 000998\nline 000999\n")
    guest.backend.close()
    again = Guest(path)
    again.print(b"next boot\n")
    assert path.read_bytes().endswith(b"line 000999\nnext boot\n")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_log_that_cannot_be_opened_is_an_error_for_the_person(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(HostError, match="console log"):
        ConsoleBackend(memoryview(bytearray(4096)), lambda: None, "g", tmp_path / "file" / "x.log")


def test_a_full_disk_costs_the_log_only() -> None:
    guest = Guest(Path("/dev/full"))
    guest.print(b"hello")
    guest.print(b" world")
    assert guest.backend.history == b"hello world"


def test_interface_fits_the_header() -> None:
    assert (IN, OUT, IN_CONS, OUT_PROD + 4) == (0, 1024, 3072, INTERFACE_SIZE)


def test_socket_serves_several_clients(tmp_path: Path) -> None:
    async def main() -> None:
        guest = Guest()
        guest.print(b"boot\n")
        path = tmp_path / "console" / "1"
        server = ConsoleSocket(path, guest.backend)
        await server.start()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        (one_in, one_out), (two_in, two_out) = [await asyncio.open_unix_connection(str(path)) for _ in range(2)]
        assert await one_in.readexactly(5) == b"boot\n"
        assert await two_in.readexactly(5) == b"boot\n"
        one_out.write(b"root\n")
        await one_out.drain()
        received = b""
        while len(received) < 5:
            await asyncio.sleep(0.001)
            received += guest.read()
        assert received == b"root\n"
        guest.print(b"# ")
        assert await one_in.readexactly(2) == b"# "
        assert await two_in.readexactly(2) == b"# "
        one_out.close()
        await asyncio.sleep(0.01)
        guest.print(b"still here")
        assert await two_in.readexactly(10) == b"still here"
        two_out.write(bytes(3000))
        await two_out.drain()
        received = b""
        while len(received) < 3000:
            await asyncio.sleep(0.001)
            received += guest.read()
        guest.print(b"last")
        guest.backend.close()
        await server.close()
        assert await two_in.read() == b"last"
        assert not path.exists()

    asyncio.run(asyncio.wait_for(main(), 20))


def test_a_client_that_never_reads_holds_up_nobody(tmp_path: Path) -> None:
    async def main() -> None:
        guest = Guest()
        path = tmp_path / "c"
        server = ConsoleSocket(path, guest.backend)
        await server.start()
        _, stuck = await asyncio.open_unix_connection(str(path), limit=1)
        good_in, good = await asyncio.open_unix_connection(str(path))
        await asyncio.sleep(0.01)
        total = 0
        for _ in range(300):
            guest.print(bytes(OUT_SIZE))
            total += len(await good_in.readexactly(OUT_SIZE))
        assert total == 300 * OUT_SIZE
        stuck.close()
        good.close()
        await server.close()

    asyncio.run(asyncio.wait_for(main(), 20))
