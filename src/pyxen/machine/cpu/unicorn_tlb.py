# SPDX-License-Identifier: GPL-2.0-only
"""A TLB for each context, as if each vCPU had a CPU of its own.

vCPUs of one domain take turns on an engine every 200 µs. If each switch flushes the TLB, a slice is spent on filling it
again: a miss of a guest under nested paging walks four levels of tables through four others.

The engine's TLB is a structure right before ``env`` that points to its tables; everything that looks into it, fills or
flushes it goes through that structure. So it can be exchanged as a whole: the structure of the context that leaves is
copied out, that of the one that enters is copied in, and no entry is touched. What is put aside misses nothing:

* flushes: whoever flushes a vCPU that is not loaded has it flush before its next instruction (ArchVcpu.flush_tlb);
  whoever sets its registers from outside marks its TLB stale (:attr:`ContextTlb.stale`);
* marks that make stores look for translated code (``unicorn_dirty``): a page that gets its first translation marks the
  entries of the TLB in use and counts in the engine's block (:data:`CODE_GENERATION`); a TLB that was put aside under
  another count is flushed.

With it goes the engine's cache of translated blocks by virtual address (``tb_jmp_cache``), which is flushed whenever
the TLB is. (Looking blocks up again after each switch was a tenth of a profile of a boot with four vCPUs. Where others
use the computer's caches, to copy this one costs as much: no difference was measured there.) Blocks that became invalid
meanwhile are marked so, and nobody takes them from there; their memory is used again only after the engine has thrown
all blocks away (``tb_flush``), which it counts: a cache that was put aside under another count comes back empty.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from pyxen.machine.cpu import unicorn_internals as ui
from pyxen.machine.cpu.unicorn_code import JNE, CodePage
from pyxen.machine.cpu.unicorn_spaces import fits

if TYPE_CHECKING:
    from pyxen.machine.cpu.unicorn_x86 import UnicornX86

Exchange = Callable[[int, int, int], None]

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


# tb_flush(cpu): rbp = cpu.uc; memset(cpu.tb_jmp_cache, 0, its size); rbx = uc.tcg_ctx; … ; tcg_ctx.tb_flush_count += 1
_TB_FLUSH = ("4157 ba DDDD 31f6 4156 4989fe 4155 4154 55 53 4883ec18 488baf DDDD 48897c2408 4881c7 DDDD 488b9d DDDD"
             " e8 DDDD ba DDDD 4889ef 488db3 DDDD")
_COUNTED = "488b80 DDDD 488b80 DDDD 8380 DDDD 01"     # rax = cpu.uc.tcg_ctx; add dword [rax+tb_flush_count], 1
# helper_lookup_tb_ptr: mov edi, [rax+cflags]; and edi, CF_HASH_MASK | CF_INVALID; cmp r8d, edi
_INVALID_IS_SEEN = "8b7818 81e7 DDDD 4139f8"
_CF_INVALID = 0x40000
_FLUSHES = _SIZE                                      # what a buffer holds: the TLB, the count, the cache of blocks
_JUMPS = _SIZE + 8
_JUMPS_SIZE = 0x8000
_NO_COUNT = (1 << 64) - 1                             # tb_flush_count has 32 bits


class _Layout(NamedTuple):
    """``jumps`` counts from CPUState, ``flushes`` from TCGContext."""

    jumps: int
    context: int
    flushes: int


def _layout(lib: ui.Library) -> _Layout | None:
    if not fits(lib):
        return None
    code = lib.code("tb_flush_x86_64", 0x110)
    start = ui.pattern(_TB_FLUSH).match(code)
    counted = ui.pattern(_COUNTED).search(code)
    seen = ui.pattern(_INVALID_IS_SEEN).search(lib.code("helper_lookup_tb_ptr_x86_64", 0x100))
    if start is None or counted is None or seen is None:
        return None
    size, uc, jumps, context, *_ = (int.from_bytes(group, "little") for group in start.groups())
    if [int.from_bytes(group, "little") for group in counted.groups()[:2]] != [uc, context] or uc != ui.CPU_UC:
        return None
    if not int.from_bytes(seen.group(1), "little") & _CF_INVALID or size != _JUMPS_SIZE:
        return None
    return _Layout(jumps, context, int.from_bytes(counted.group(3), "little"))


def prepare(lib: ui.Library, page: CodePage) -> Exchange | None:
    """``exchange(env, out, in)``: copy the TLB and the cache of blocks to the buffer ``out``, and make those of the
    buffer ``in`` the engine's. Callable once the page is sealed; None where the layout is another (then every change
    of context flushes)."""
    layout = _layout(lib)
    if layout is None:
        return None
    code = page.begin()
    code.raw("4989f8 4989d1")                                  # mov r8, rdi: env; mov r9, rdx: in
    code.raw("488b87 d 488b80 d", ui.UC_POINTER, layout.context)  # rax = env.uc.tcg_ctx
    code.raw("8b80 d", layout.flushes)                         # mov eax, [rax+tb_flush_count]
    code.raw("4889f7 498db0 d b9 d f348a5", _AT, _SIZE >> 3)   # rdi = out; rsi = TLB; rep movsq
    code.raw("488907 4883c708")                                # mov [rdi], rax; add rdi, 8
    code.raw("4d8d90 d 4c89d6 b9 d f348a5", layout.jumps - lib.cpu_env, _JUMPS_SIZE >> 3)  # r10 = rsi = cache …
    code.raw("4c89ce 498db8 d b9 d f348a5", _AT, _SIZE >> 3)   # rsi = in; rdi = TLB; rep movsq
    code.raw("488b16 4883c608 4c89d7 b9 d", _JUMPS_SIZE >> 3)  # mov rdx, [rsi]; add rsi, 8; rdi = cache
    code.raw("4839c2")                                         # cmp rdx, rax
    code.branch(JNE, "empty")
    code.raw("f348a5 c3")                                      # rep movsq; ret
    code.label("empty")
    code.raw("31c0 f348ab c3")                                 # xor eax, eax; rep stosq; ret
    page.place(code)
    function: Exchange = ctypes.PYFUNCTYPE(None, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64)(code.address)
    return function


class ContextTlb:
    """One context's TLB on one engine; in use while the engine's :attr:`UnicornX86.tlb` is this."""

    __slots__ = ("_buffer", "address", "engine", "filled", "generation", "roots", "slot", "stale")

    def __init__(self, engine: UnicornX86) -> None:
        self.engine = engine
        self._buffer = ctypes.create_string_buffer(_JUMPS + _JUMPS_SIZE)
        self.address = ctypes.addressof(self._buffer)
        ctypes.c_uint64.from_address(self.address + _FLUSHES).value = _NO_COUNT
        self.filled = False
        """It has tables; those of a new one are made when it is first used."""
        self.stale = True
        """To be flushed before it is used again."""
        self.generation = 0
        self.slot = 0
        self.roots = [-1, -1]

    def free(self, lib: ui.Library) -> None:
        """Give the tables back. It is put aside, and nobody will use it again."""
        if self.filled:
            self.filled = False
            words = (ctypes.c_uint64 * (_SIZE >> 3)).from_address(self.address)
            for index in _TABLES:
                lib.free(words[index])
