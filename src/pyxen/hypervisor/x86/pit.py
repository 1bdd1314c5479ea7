# SPDX-License-Identifier: GPL-2.0-only
"""A virtual 8254 timer and the speaker port that gates its channel 2 (Xen: xen/arch/x86/hvm/i8254.c).

A PV guest gets it for one purpose, calibrating its clocks (pv_pit_handler): ports 0x42, 0x43 and 0x61.  Counters run by
the host's clock; no interrupt comes of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

PIT_HZ: Final = 1193182
SPEAKER_PORT: Final = 0x61
CHANNEL2_PORT: Final = 0x42
CONTROL_PORT: Final = 0x43
PORTS: Final = frozenset((CHANNEL2_PORT, CONTROL_PORT, SPEAKER_PORT))

_LOW, _HIGH, _WORD = 1, 2, 3


class _Channel:
    """One counter. ``count`` is the reload value, 1..65536."""

    def __init__(self) -> None:
        self.count = 65536
        self.mode = 3
        self.bcd = False
        self.gate = False
        self.access = _WORD
        self.loaded_ns = 0
        self.status: int | None = None
        """Latched by a read-back command: the next read returns it."""
        self.latched: list[int] = []
        """Bytes of a latched count (two at most), which reads return before the running one."""
        self.write_low: int | None = None
        self.read_high = False

    def ticks(self, now_ns: int) -> int:
        return (now_ns - self.loaded_ns) * PIT_HZ // 1_000_000_000

    def value(self, now_ns: int) -> int:
        ticks = self.ticks(now_ns)
        if self.mode in (0, 1, 4, 5):
            value = (self.count - ticks) & 0xFFFF
        elif self.mode == 3:
            value = self.count - 2 * ticks % self.count
        else:
            value = self.count - ticks % self.count
        if self.bcd:
            value = int(str(value % 10000), 16)
        return value & 0xFFFF

    def out(self, now_ns: int) -> bool:
        ticks = self.ticks(now_ns)
        if self.mode == 0:
            return ticks >= self.count
        if self.mode == 1:
            return ticks >= self.count
        if self.mode == 2:
            return ticks % self.count != self.count - 1
        if self.mode == 3:
            return ticks % self.count < (self.count + 1) >> 1
        return ticks != self.count

    def load(self, value: int, now_ns: int) -> None:
        if self.bcd:
            value = int(f"{value:04x}", 10) if f"{value:04x}".isdecimal() else value % 10000
        self.count = value or (10000 if self.bcd else 65536)
        self.loaded_ns = now_ns


class Pit:
    """Three channels and the speaker port; times from ``now_ns``."""

    def __init__(self, now_ns: Callable[[], int]) -> None:
        self._now = now_ns
        self._channels = [_Channel(), _Channel(), _Channel()]
        self._channels[0].gate = self._channels[1].gate = True
        self._speaker = False
        self._refresh = False

    def read(self, port: int) -> int:
        """A byte from one of :data:`PORTS`."""
        now = self._now()
        if port == SPEAKER_PORT:
            channel = self._channels[2]
            self._refresh = not self._refresh
            return self._speaker << 1 | channel.gate | channel.out(now) << 5 | self._refresh << 4
        if port == CONTROL_PORT:
            return 0  # write-only
        channel = self._channels[port & 3]
        if channel.status is not None:
            status, channel.status = channel.status, None
            return status
        if channel.latched:
            return channel.latched.pop(0)
        value = channel.value(now)
        if channel.access == _LOW:
            return value & 0xFF
        if channel.access == _HIGH:
            return value >> 8
        channel.read_high = not channel.read_high
        return value & 0xFF if channel.read_high else value >> 8

    def write(self, port: int, data: int) -> None:
        """A byte to one of :data:`PORTS`."""
        now = self._now()
        data &= 0xFF
        if port == SPEAKER_PORT:
            self._speaker = bool(data & 2)
            channel = self._channels[2]
            if data & 1 and not channel.gate and channel.mode in (1, 2, 3, 5):
                channel.loaded_ns = now  # a rising gate restarts these modes
            channel.gate = bool(data & 1)
        elif port == CONTROL_PORT:
            self._control(data, now)
        else:
            channel = self._channels[port & 3]
            if channel.access == _LOW:
                channel.load(data, now)
            elif channel.access == _HIGH:
                channel.load(data << 8, now)
            elif channel.write_low is None:
                channel.write_low = data
            else:
                channel.load(data << 8 | channel.write_low, now)
                channel.write_low = None

    def _control(self, data: int, now: int) -> None:
        select = data >> 6
        if select == 3:  # read-back
            for number, channel in enumerate(self._channels):
                if data & 2 << number:
                    if not data & 0x10 and channel.status is None:
                        channel.status = channel.out(now) << 7 | channel.access << 4 | channel.mode << 1 | channel.bcd
                    if not data & 0x20:
                        self._latch(channel, now)
            return
        channel = self._channels[select]
        access = data >> 4 & 3
        if access == 0:
            self._latch(channel, now)
            return
        channel.access = access
        channel.mode = (data >> 1 & 7) if (data >> 1 & 7) < 6 else (data >> 1 & 3)
        channel.bcd = bool(data & 1)
        channel.write_low = None
        channel.read_high = False
        channel.latched.clear()
        channel.status = None

    @staticmethod
    def _latch(channel: _Channel, now: int) -> None:
        if channel.latched:
            return  # the first latch holds until it is read
        value = channel.value(now)
        if channel.access & _LOW:
            channel.latched.append(value & 0xFF)
        if channel.access & _HIGH:
            channel.latched.append(value >> 8)
