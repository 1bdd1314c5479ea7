# SPDX-License-Identifier: GPL-2.0-only
"""The machine-to-physical table (Xen: ``machine_to_phys_mapping``, xen/include/asm-x86/mm.h).

One 64-bit word for each machine frame, in machine frames of its own that every PV guest sees read-only at
``0xffff800000000000`` (MACH2PHYS_VIRT_START, xen/include/public/arch-x86/xen-x86_64.h).  What it says about a frame
is whatever the frame's owner last said; nothing in the hypervisor may rely on it.  Entries become INVALID_M2P_ENTRY
when a frame gets or loses its owner; those of frames that never had one read as zero, so that a large machine costs
nothing.
"""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Final

from pyxen.abi.xen import INVALID_M2P_ENTRY, MASK64, PAGE_SIZE
from pyxen.errors import HostError

if TYPE_CHECKING:
    from pyxen.machine.memory import FrameAllocator, Memory

_ENTRIES_PER_FRAME: Final = PAGE_SIZE // 8
_CHUNK: Final = 4096
_INVALID: Final = array("Q", [INVALID_M2P_ENTRY]) * _CHUNK


class MachineToPhys:
    """The table. ``frames`` are its machine frames in order, for whoever maps it."""

    def __init__(self, memory: Memory, allocator: FrameAllocator) -> None:
        """Take the table's frames from ``allocator``; they must be contiguous, which a machine that starts up can
        give.

        Raises HostError when it cannot.
        """
        self.nr_entries = memory.nr_frames
        count = -(-self.nr_entries // _ENTRIES_PER_FRAME)
        runs = allocator.alloc_many(count)
        if len(runs) != 1:
            raise HostError("no contiguous memory for the machine-to-physical table", hint="give the host more memory")
        self.frames: list[int] = list(runs[0])
        self._q = memory.q
        self._base = runs[0].start * _ENTRIES_PER_FRAME

    def _fill(self, first: int, count: int) -> None:
        q, at, end = self._q, self._base + first, self._base + first + count
        while at < end:
            size = min(_CHUNK, end - at)
            q[at : at + size] = memoryview(_INVALID)[:size]
            at += size

    def set(self, mfn: int, gpfn: int) -> None:
        """set_gpfn_from_mfn(). ``mfn`` must be a frame of this machine; ``gpfn`` is any 64-bit word."""
        self._q[self._base + mfn] = gpfn & MASK64

    def set_run(self, mfn: int, gpfns: array[int]) -> None:
        """Set consecutive entries from ``mfn`` on; ``gpfns`` is an ``array('Q')``."""
        at = self._base + mfn
        self._q[at : at + len(gpfns)] = memoryview(gpfns)

    def get(self, mfn: int) -> int:
        """get_gpfn_from_mfn()."""
        return int(self._q[self._base + mfn])

    def invalidate(self, mfn: int, count: int = 1) -> None:
        """Frames that are nobody's any more."""
        if count == 1:
            self._q[self._base + mfn] = INVALID_M2P_ENTRY
        else:
            self._fill(mfn, count)
