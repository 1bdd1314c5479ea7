# SPDX-License-Identifier: GPL-2.0-only
"""A TLB for each context, as if each vCPU had a CPU of its own.

vCPUs of one domain take turns on an engine every 200 µs. If each switch flushes the TLB, a slice is spent on filling it
again: a miss of a guest under nested paging walks four levels of tables through four others.

The engine's TLB is a structure right before ``env`` that points to its tables; everything that looks into it, fills or
flushes it goes through that structure. So it can be exchanged as a whole: the structure of the context that leaves is
copied out, that of the one that enters is copied in, and no entry is touched. What is put aside misses nothing:

* flushes: whoever flushes a vCPU that is not loaded has it flush before its next instruction (ArchVcpu.flush_tlb);
whoever
  sets its registers from outside marks its TLB stale (:attr:`ContextTlb.stale`);
* marks that make stores look for translated code (``unicorn_dirty``): a page that gets its first translation marks the
  entries of the TLB in use and counts in the engine's block (:data:`CODE_GENERATION`); a TLB that was put aside under
  another count is flushed.

The engine's cache of translated blocks by virtual address has no context: it is cleared at each exchange.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from pyxen.machine.cpu import unicorn_internals as ui
from pyxen.machine.cpu.unicorn_spaces import fits

if TYPE_CHECKING:
    from pyxen.machine.cpu.unicorn_x86 import UnicornX86

CODE_GENERATION = 0xe4c
"""u32 in the engine's block (unicorn_hvm): how many pages have got a first translation."""

# CPUTLB ends 0x10 before env: CPUTLBCommon, CPUTLBDesc[3], CPUTLBDescFast[3] (see unicorn_spaces)
_AT = -0x890
_SIZE = 0x880
_DESC, _DESC_SIZE, _IOTLB = 0x20, 0x2b8, 0x2b0
_FAST, _FAST_SIZE, _TABLE = 0x850, 0x10, 0x8
_PARTS = 3
_TABLES = tuple(
    at >> 3 for part in range(_PARTS)
    for at in (_FAST + _FAST_SIZE * part + _TABLE, _DESC + _DESC_SIZE * part + _IOTLB)
)


class ContextTlb:
    """One context's TLB on one engine; in use while the engine's :attr:`UnicornX86.tlb` is this."""

    __slots__ = ("buffer", "engine", "filled", "generation", "roots", "slot", "stale")

    def __init__(self, engine: UnicornX86) -> None:
        self.engine = engine
        self.buffer = ctypes.create_string_buffer(_SIZE)
        self.filled = False
        """It has tables; those of a new one are made when it is first used."""
        self.stale = True
        """To be flushed before it is used again."""
        self.generation = 0
        self.slot = 0
        self.roots = [-1, -1]

    def put_aside(self, env: int) -> None:
        """Another one is to be in use."""
        ctypes.memmove(self.buffer, env + _AT, _SIZE)

    def use(self, lib: ui.Library, cpu: ctypes.c_void_p, env: int) -> None:
        """Be in use, in the place of one that has been put aside."""
        if self.filled:
            ctypes.memmove(env + _AT, self.buffer, _SIZE)
        else:
            lib.tlb_init(cpu)
            self.filled = True
        lib.tlb_flush_by_mmuidx(cpu, 0)  # of no part: only the cache of blocks by virtual address

    def free(self, lib: ui.Library) -> None:
        """Give the tables back. It is put aside, and nobody will use it again."""
        if self.filled:
            self.filled = False
            words = (ctypes.c_uint64 * (_SIZE >> 3)).from_buffer(self.buffer)
            for index in _TABLES:
                lib.free(words[index])


def supported(lib: ui.Library) -> bool:
    """Whether this build's TLB has the layout above."""
    return fits(lib)
