# SPDX-License-Identifier: GPL-2.0-only
"""The hypervisor's console ring: what ``xl dmesg`` prints (Xen: xen/drivers/char/console.c)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from pyxen.hypervisor.lock import TicketLock

RING_BYTES: Final = 32 * 1024
_GUEST_LINE: Final = 256
_BURST: Final = 10
_REFILL_NS: Final = 100_000_000


class ConsoleLog:
    """A ring of text. Debug lines are kept only with ``verbose``; guests' lines are rate-limited one domain at a
    time."""

    def __init__(self, now_ns: Callable[[], int], *, verbose: bool = False) -> None:
        self._lock = TicketLock("console ring")
        self._now = now_ns
        self._ring = bytearray()
        self._lost = 0
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

    def guest_printk(self, domid: int, text: str) -> None:
        """A line about a guest's doing: at most ten, then one each 100 ms a domain, so that no guest can flush the
        ring."""
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
                self._append(f"(d{domid}) {clean}\n".encode())
                if byte == 0x0A:
                    continue
            if byte != 0x0D:
                partial.append(byte)

    def forget(self, domid: int) -> None:
        """A domain is gone: print what it left unfinished, drop its accounts."""
        rest = self._partial.pop(domid, None)
        if rest:
            self._append(f"(d{domid}) ".encode() + bytes(c if 32 <= c < 127 else 63 for c in rest) + b"\n")
        self._credit.pop(domid, None)

    def _append(self, data: bytes) -> None:
        with self._lock:
            self._ring += data
            excess = len(self._ring) - RING_BYTES
            if excess > 0:
                cut = self._ring.find(b"\n", excess - 1)
                cut = excess if cut < 0 else cut + 1
                self._lost += cut
                del self._ring[:cut]
        if self.on_output is not None:
            self.on_output()

    def read(self, *, clear: bool = False) -> bytes:
        """The ring's text; with ``clear`` the ring is empty afterwards."""
        with self._lock:
            data = bytes(self._ring)
            if clear:
                self._ring.clear()
            return data
