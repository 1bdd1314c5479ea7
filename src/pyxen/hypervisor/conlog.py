# SPDX-License-Identifier: GPL-2.0-only
"""The hypervisor's console ring: what ``xl dmesg`` prints (Xen: xen/drivers/char/console.c)."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Final

from pyxen.hypervisor.lock import TicketLock

RING_BYTES: Final = 32 * 1024
_GUEST_LINE: Final = 256
_BURST: Final = 10
_REFILL_NS: Final = 100_000_000


class ConsoleLog:
    """A ring of text. Debug lines are kept only with ``verbose``; lines *about* guests are rate-limited one domain at a
    time, and lines *of* guests (HYPERVISOR_console_io) may fill one half of the ring: they never push the
    hypervisor's own out."""

    def __init__(self, now_ns: Callable[[], int], *, verbose: bool = False) -> None:
        self._lock = TicketLock("console ring")
        self._now = now_ns
        self._own = _Half()
        self._guests = _Half()
        self._end = 0
        """Bytes ever written: the position of the next one (XEN_SYSCTL_readconsole's index)."""
        self.verbose = verbose
        self.on_output: Callable[[], None] | None = None
        """Called after text was added (VIRQ_CON_RING)."""
        self._credit: dict[int, tuple[int, int, int]] = {}
        self._partial: dict[int, bytearray] = {}

    def printk(self, text: str, *, debug: bool = False) -> None:
        """Add lines, each with Xen's prefix. Control characters of guests never reach a terminal through here."""
        if debug and not self.verbose:
            return
        out = []
        for line in text.splitlines() or [""]:
            clean = "".join(c if c.isprintable() or c == "\t" else "?" for c in line)
            out.append(f"(XEN) {clean}\n".encode())
        self._append(b"".join(out))

    def guest_printk(self, domid: int, text: str, *, debug: bool = False) -> None:
        """A line about a guest's doing: at most ten, then one each 100 ms a domain, so that no guest can flush the
        ring."""
        if debug and not self.verbose:
            return
        now = self._now()
        with self._lock:
            credit, since, suppressed = self._credit.get(domid, (_BURST, now, 0))
            credit = min(_BURST, credit + (now - since) // _REFILL_NS)
            if credit <= 0:
                self._credit[domid] = (0, since, suppressed + 1)
                return
            self._credit[domid] = (credit - 1, now, 0)
        if suppressed:
            self.printk(f"d{domid}: {suppressed} messages suppressed")
        self.printk(text)

    def guest_write(self, domid: int, data: bytes) -> None:
        """CONSOLEIO_write: collect a domain's bytes into lines ``(dN) text``."""
        partial = self._partial.setdefault(domid, bytearray())
        for byte in data:
            if byte == 0x0A or len(partial) >= _GUEST_LINE:
                line = partial.decode("latin-1")
                partial.clear()
                clean = "".join(c if 32 <= ord(c) < 127 or c == "\t" else "?" for c in line)
                self._append(f"(d{domid}) {clean}\n".encode(), self._guests)
                if byte == 0x0A:
                    continue
            if byte != 0x0D:
                partial.append(byte)

    def forget(self, domid: int) -> None:
        """A domain is gone: print what it left unfinished, drop its accounts."""
        rest = self._partial.pop(domid, None)
        if rest:
            clean = bytes(c if 32 <= c < 127 else 63 for c in rest)
            self._append(f"(d{domid}) ".encode() + clean + b"\n", self._guests)
        self._credit.pop(domid, None)

    def _append(self, data: bytes, half: _Half | None = None) -> None:
        with self._lock:
            (self._own if half is None else half).append(self._end, data)
            self._end += len(data)
        if self.on_output is not None:
            self.on_output()

    def read(self, *, clear: bool = False) -> bytes:
        """The ring's text; with ``clear`` the ring is empty afterwards."""
        return self.read_from(0, clear=clear)[0]

    def read_from(self, index: int, limit: int | None = None, *, clear: bool = False) -> tuple[bytes, int]:
        """At most ``limit`` bytes of what was written at position ``index`` or later and is still there, and the
        position after them."""
        with self._lock:
            records = sorted([*self._own.records, *self._guests.records])
            if clear:
                self._own.clear()
                self._guests.clear()
            end = self._end
        parts = [(max(at, index), data[max(index - at, 0) :]) for at, data in records if at + len(data) > index]
        text = b"".join(data for _, data in parts)
        if limit is None or len(text) <= limit:
            return text, end
        left = limit
        for at, data in parts:
            if left < len(data):
                return text[:limit], at + left
            left -= len(data)
        return text[:limit], end


class _Half:
    """Records (position, text) of half a ring."""

    def __init__(self) -> None:
        self.records: deque[tuple[int, bytes]] = deque()
        self._size = 0

    def append(self, at: int, data: bytes) -> None:
        self.records.append((at, data))
        self._size += len(data)
        while self._size > RING_BYTES // 2:
            self._size -= len(self.records.popleft()[1])

    def clear(self) -> None:
        self.records.clear()
        self._size = 0
