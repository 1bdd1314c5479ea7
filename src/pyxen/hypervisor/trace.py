# SPDX-License-Identifier: GPL-2.0-only
"""Trace points (xen/include/public/trace.h). Every mechanism calls :meth:`Trace.event` behind ``if trace.enabled``.

Records are kept as Xen writes them: a 32-bit word with event, extra-word count and cycle flag, an optional 64-bit
TSC, then the words.
The per-CPU buffers that xentrace maps come with the tracing issue; this is the one place that will feed them.
"""

from __future__ import annotations

import struct
from collections import deque
from contextlib import suppress
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pyxen.hypervisor.vcpu import Vcpu
    from pyxen.machine.clock import Clock

TRC_GEN: Final = 0x0001F000
TRC_SCHED: Final = 0x0002F000
TRC_DOM0OP: Final = 0x0004F000
TRC_HVM: Final = 0x0008F000
TRC_MEM: Final = 0x0010F000
TRC_PV: Final = 0x0020F000

TRC_SCHED_RUNSTATE_CHANGE: Final = 0x00021001
TRC_SCHED_CONTINUE_RUNNING: Final = 0x00021002
TRC_SCHED_DOM_ADD: Final = 0x00022801
TRC_SCHED_DOM_REM: Final = 0x00022802
TRC_SCHED_SLEEP: Final = 0x00022803
TRC_SCHED_WAKE: Final = 0x00022804
TRC_SCHED_YIELD: Final = 0x00022805
TRC_SCHED_BLOCK: Final = 0x00022806
TRC_SCHED_SHUTDOWN: Final = 0x00022807
TRC_SCHED_SWITCH: Final = 0x0002280A
TRC_MEM_PAGE_GRANT_MAP: Final = 0x00101001
TRC_MEM_PAGE_GRANT_UNMAP: Final = 0x00101002
TRC_PV_TRAP: Final = 0x00201003
TRC_PV_PAGE_FAULT: Final = 0x00201104
TRC_PV_FORCED_INVALID_OP: Final = 0x00201005
TRC_PV_EMULATE_PRIVOP: Final = 0x00201006
TRC_PV_PTWR_EMULATION: Final = 0x0020100B
TRC_PV_HYPERCALL_V2: Final = 0x0020100D

_CYCLES: Final = 1 << 31
_CLASS: Final = 0x0FFF0000
_SUBCLASS: Final = 0x0000F000


class Trace:
    """One bounded buffer of records; off until a mask is set."""

    def __init__(self, clock: Clock, capacity: int = 65536) -> None:
        self._clock = clock
        self.enabled = False
        self.mask = 0
        self.lost = 0
        self._records: deque[bytes] = deque(maxlen=capacity)
        self._capacity = capacity

    def set_mask(self, mask: int) -> None:
        """Record the events whose class and subclass are both in ``mask`` (TRC_*); 0 switches tracing off."""
        self.mask = mask
        self.enabled = bool(mask)

    def event(self, code: int, vcpu: Vcpu | None, *words: int) -> None:
        """Append a record; the oldest is lost, and counted, when the buffer is full."""
        wanted = code & self.mask
        if not (wanted & _CLASS and wanted & _SUBCLASS):
            return
        if len(self._records) >= self._capacity:
            self.lost += 1
        count = min(len(words), 7)
        header = code | count << 28 | _CYCLES
        tsc = self._clock.read_tsc()
        self._records.append(
            struct.pack(f"<IQ{count}I", header, tsc, *(word & 0xFFFFFFFF for word in words[:count]))
        )

    def drain(self) -> list[bytes]:
        """Take all records."""
        records = []
        with suppress(IndexError):  # others append meanwhile
            while True:
                records.append(self._records.popleft())
        return records
