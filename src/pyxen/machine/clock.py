# SPDX-License-Identifier: GPL-2.0-only
"""Time. Nothing else in pyxen asks the host for it.

A guest computes its own time from RDTSC and the calibration that the hypervisor publishes (``vcpu_time_info``), and the
engine's RDTSC *is* the host's TSC. So the real clock counts in the same TSC with the same calibration: guest and
hypervisor then agree to the nanosecond, however imprecise the one-time calibration was. When they used two clocks,
an error of 0.03 % was enough
to make guests see their timers fire early and arm them again, thousands of times a second.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import time
from collections.abc import Callable
from typing import NamedTuple, Protocol

from pyxen.errors import InternalError

_NS = 1_000_000_000


class TscCalibration(NamedTuple):
    """``system_ns = ((tsc - tsc0) << shift) * mul >> 32`` (a negative shift shifts right), as in Xen's
    vcpu_time_info."""

    mul: int
    shift: int
    tsc0: int

    def to_ns(self, tsc: int) -> int:
        """Nanoseconds since ``tsc0``, rounded exactly as a guest rounds."""
        delta = tsc - self.tsc0
        return ((delta << self.shift if self.shift >= 0 else delta >> -self.shift) * self.mul) >> 32

    @property
    def hz(self) -> int:
        """Frequency of the TSC."""
        return (_NS << 32) // self.mul >> self.shift if self.shift >= 0 else ((_NS << 32) << -self.shift) // self.mul


class Clock(Protocol):
    """What the machine calls time."""

    def now_ns(self) -> int:
        """Monotonic nanoseconds since the host started ("system time" in Xen)."""
        ...

    def wallclock_ns(self) -> int:
        """Nanoseconds since 1970 UTC."""
        ...

    def tsc_calibration(self) -> TscCalibration:
        """How a guest gets :meth:`now_ns` from the TSC."""
        ...

    def read_tsc(self) -> int:
        """The TSC that belongs to :meth:`tsc_calibration`."""
        ...

    def sleep_ns(self, deadline_ns: int) -> int | None:
        """How long a host thread should sleep for ``deadline_ns`` to come (≤ 0: it is past); None: only
        :meth:`subscribe` tells."""
        ...

    def subscribe(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` after time moved in a way that no sleep can foresee (virtual clocks)."""
        ...


def calibration_for(hz: int, tsc0: int) -> TscCalibration:
    """The multiplier with the most bits that Xen's format allows (Xen: x86/time.c set_time_scale)."""
    if hz <= 0:
        raise InternalError(f"TSC frequency of {hz} Hz")
    shift = 0
    scaled = (_NS << 64) // hz
    while scaled >= 1 << 64:
        scaled >>= 1
        shift += 1
    while scaled < 1 << 63:
        scaled <<= 1
        shift -= 1
    return TscCalibration(scaled >> 32, shift, tsc0)


class _HostTsc:
    """RDTSC of this host: a few instructions of machine code in a page of their own."""

    _READ = bytes.fromhex("0f31 48c1e220 4809d0".replace(" ", ""))     # rdtsc; shl rdx, 32; or rax, rdx
    _RET = b"\xc3"

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, mmap.PAGESIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS,
                               mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(self._page))
        self.read = self._function(self._READ + self._RET)

    def _function(self, code: bytes) -> Callable[[], int]:
        address = self._address + self._page.tell()
        self._page.write(code)
        # PYFUNCTYPE keeps the GIL: releasing it would cost more than the instructions.
        function: Callable[[], int] = ctypes.PYFUNCTYPE(ctypes.c_uint64)(address)
        return function

    def scaled(self, calibration: TscCalibration) -> Callable[[], int]:
        """The time (ns) by ``calibration``: what guests compute, in the same order, with the same 64 bits."""
        mul, shift, tsc0 = calibration
        code = self._READ
        code += b"\x48\xb9" + tsc0.to_bytes(8, "little") + b"\x48\x29\xc8"  # mov rcx, tsc0; sub rax, rcx
        code += bytes((0x48, 0xC1, 0xE0, shift) if shift >= 0 else (0x48, 0xC1, 0xE8, -shift))  # shl/shr rax, shift
        code += b"\xb9" + mul.to_bytes(4, "little") + b"\x48\xf7\xe1"  # mov ecx, mul; mul rcx
        return self._function(code + b"\x48\x0f\xac\xd0\x20" + self._RET)  # shrd rax, rdx, 32

    def pair(self) -> tuple[int, int]:
        """(TSC, monotonic ns) of the same moment: the tightest of several tries."""
        best: tuple[int, int, int] | None = None
        for _ in range(32):
            before = time.monotonic_ns()
            tsc = self.read()
            after = time.monotonic_ns()
            if best is None or after - before < best[0]:
                best = (after - before, tsc, (before + after) // 2)
        assert best is not None
        return best[1], best[2]


class _MonotonicTsc:
    """A stand-in where the host is no x86: one tick is a nanosecond."""

    read: Callable[[], int] = staticmethod(time.monotonic_ns)

    def scaled(self, calibration: TscCalibration) -> Callable[[], int]:
        return lambda: calibration.to_ns(time.monotonic_ns())

    def pair(self) -> tuple[int, int]:
        now = time.monotonic_ns()
        return now, now


class RealClock:
    """Time as it passes. ``calibration_ms``: how long construction may measure the TSC against the host's clock."""

    def __init__(self, calibration_ms: float = 20.0) -> None:
        self._tsc = _HostTsc() if platform.machine() in ("x86_64", "AMD64") else _MonotonicTsc()
        tsc0, ns0 = self._tsc.pair()
        time.sleep(calibration_ms / 1000)
        tsc1, ns1 = self._tsc.pair()
        hz = (tsc1 - tsc0) * _NS // max(ns1 - ns0, 1)
        self._calibration = calibration_for(hz, tsc0)
        self.now_ns = self._tsc.scaled(self._calibration)
        """Nanoseconds since construction. No method: it is called several times per hypercall."""

    def wallclock_ns(self) -> int:
        """The host's real-time clock."""
        return time.time_ns()

    def tsc_calibration(self) -> TscCalibration:
        """Constant for the life of the clock."""
        return self._calibration

    def read_tsc(self) -> int:
        """The host's TSC."""
        return self._tsc.read()

    def sleep_ns(self, deadline_ns: int) -> int | None:
        """Time left."""
        return deadline_ns - self.now_ns()

    def subscribe(self, callback: Callable[[], None]) -> None:
        """Real time never jumps: nothing to do."""


class VirtualClock:
    """Time that moves only when a test says so. The TSC runs at 1 GHz: one tick is a nanosecond."""

    def __init__(self, wallclock_ns: int = 1_450_000_000 * _NS) -> None:
        self._now = 0
        self._epoch = wallclock_ns
        self._callbacks: tuple[Callable[[], None], ...] = ()

    def now_ns(self) -> int:
        """Sum of all advances."""
        return self._now

    def wallclock_ns(self) -> int:
        """Starts at the constructor's value and moves along."""
        return self._epoch + self._now

    def tsc_calibration(self) -> TscCalibration:
        """1 GHz, from zero."""
        return calibration_for(_NS, 0)

    def read_tsc(self) -> int:
        """Same number as :meth:`now_ns`."""
        return self._now

    def sleep_ns(self, deadline_ns: int) -> int | None:
        """Past or unknown."""
        return 0 if deadline_ns <= self._now else None

    def subscribe(self, callback: Callable[[], None]) -> None:
        """Called after every :meth:`advance`."""
        self._callbacks = (*self._callbacks, callback)

    def advance(self, ns: int) -> None:
        """Let ``ns`` nanoseconds pass."""
        if ns < 0:
            raise InternalError("time cannot go back")
        self._now += ns
        for callback in self._callbacks:
            callback()
