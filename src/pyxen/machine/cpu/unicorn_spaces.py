# SPDX-License-Identifier: GPL-2.0-only
"""Two address spaces that keep their translations: what PCID is to hardware.

A PV guest in exact mode has two page-table roots, one for its kernel and one for its user programs, and changes
between them at
every system call. Flushing the TLB each time costs far more than the system call: every page has to be walked again.

The engine's TLB has three parts, by privilege: "user" (1), which is all that exact mode uses, "kernel" (2), and
"kernel with SMAP"
(0), which nobody uses as long as CR4.SMAP is off. :func:`prepare` makes a function that exchanges parts 0 and 1; the
part put aside
is still found by everything that flushes or marks TLB entries, since all those walk over all parts. The engine's
cache of
translated blocks by virtual address is told apart by a bit of ``hflags`` that has no other meaning
(:data:`HF_SECOND_SPACE`).

What reads memory with kernel privilege on a guest's behalf (the stack of IRET, descriptor tables) fills part 2,
which belongs to
no space: the function reports that, and the caller flushes it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from pyxen.machine.cpu import unicorn_internals as ui
from pyxen.machine.cpu.unicorn_code import JNE, Code, CodePage

HF_SECOND_SPACE = 1 << 27
USER_PART = 1 << 1
KERNEL_PART = 1 << 2

# CPUTLB, which ends 0x10 before env: CPUTLBCommon, CPUTLBDesc[3], CPUTLBDescFast[3]
_COMMON = -0x890            # uint16_t dirty: which parts have entries
_DESC = -0x870
_DESC_SIZE = 0x2b8
_FAST = -0x40               # 16 bytes each

# tlb_flush_by_mmuidx: movzx esi, si; jmp tlb_flush_by_mmuidx_async_work, which knows all of these numbers
_FLUSH = "0fb7f6 e9DDDD"
_FLUSH_FACTS = (
    "4c8ba728010000",            # mov r12, [rdi+env_ptr]
    "498dac2470f7ffff",          # lea rbp, [r12-0x890]
    "0585000000",                # add eax, 0x85: DescFast[n] is at 0x850 + 16 * n
    "4c69f1b8020000",            # imul r14, rcx, 0x2b8
    "4a8d7c3520",                # lea rdi, [rbp+r14+0x20]: Desc[n]
)


def fits(lib: ui.Library) -> bool:
    """Whether this build's TLB has the layout above."""
    name = "tlb_flush_by_mmuidx_x86_64"
    found = ui.pattern(_FLUSH).match(lib.code(name, 16))
    if found is None:
        return False
    work = lib.address(name) + found.end() + int.from_bytes(found.group(1), "little", signed=True)
    code = ui.peek(work, 0x100)
    return all(bytes.fromhex(fact) in code for fact in _FLUSH_FACTS)


def assemble(code: Code) -> None:
    """``uint64_t exchange(CPUX86State *env, uint64_t cr3)``: exchange parts 0 and 1, set CR3, return which parts
    have entries."""
    code.raw("4889b7 d", ui.CR3)                               # mov [rdi+cr3], rsi
    code.raw("488d87 d 488d97 d", _DESC, _DESC + _DESC_SIZE)   # lea rax, [rdi+…]; lea rdx, [rdi+…]
    code.raw("b9 d", _DESC_SIZE // 8)                          # mov ecx, …
    code.label("word")
    code.raw("4c8b00 4c8b0a 4c8908 4c8902")                    # exchange [rax] and [rdx]
    code.raw("4883c008 4883c208 ffc9")                         # add rax, 8; add rdx, 8; dec ecx
    code.branch(JNE, "word")
    code.raw("0f1047 b 0f104f b", _FAST, _FAST + 16)           # movups xmm0, [rdi+…]; movups xmm1, [rdi+…]
    code.raw("0f114f b 0f1147 b", _FAST, _FAST + 16)           # movups [rdi+…], xmm1; movups [rdi+…], xmm0
    code.raw("0fb787 d", _COMMON)                              # movzx eax, word [rdi+dirty]
    code.raw("66838f d 03 c3", _COMMON)                        # or word [rdi+dirty], 3: both, whichever it was; ret


def prepare(lib: ui.Library, page: CodePage) -> Callable[[Any, int], int] | None:
    """The exchange function, once the page is sealed; None where the layout is another (then every change of space
    flushes)."""
    if not fits(lib):
        return None
    code = page.begin()
    assemble(code)
    page.place(code)
    function: Callable[[Any, int], int] = ctypes.PYFUNCTYPE(
        ctypes.c_uint64, ctypes.c_void_p, ctypes.c_uint64)(code.address)
    return function
