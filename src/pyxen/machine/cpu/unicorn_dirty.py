# SPDX-License-Identifier: GPL-2.0-only
"""Which stores must look for translated code, decided as QEMU does: by the page they hit. And which pages were hit.

QEMU marks the TLB entries of a page "not dirty" when the page gets its first translation, under all its virtual
addresses, and
lets stores run at full speed again once the page holds none. Unicorn replaced that by two approximations:
translating marks only
the *virtual* address it was translated at, and a store stays slow for ever if its page may be executed. So a guest
that writes code through a
second mapping (a JIT with separate views, a kernel patching through its direct map) executed stale translations, and
any guest that does not use NX was slow.

The patches restore the original rule:

* ``tlb_protect_code`` (a page gets its first translation): mark every TLB entry of that page;
* ``tlb_reset_dirty_by_vaddr``: nothing, the above has done it;
* ``notdirty_write`` (a store hit a marked entry, and translations in its range are gone): unmark if the page holds
  no translation. QEMU unmarks what has that virtual address in *every* part of the TLB; with two address spaces in it
  (``unicorn_spaces``) that may be another page, so we unmark the one entry.

Every entry that a store may use is marked when it is filled (``tlb_set_page_with_attrs`` in this build asks nobody),
whoever fills it: generated code, helpers, probes, a return from the victim TLB keeps the mark. So after a flush the
first store to each page comes through ``notdirty_write``, before it is done. That is log-dirty for guests that have no
nested table to protect: if the engine has a *dirty map* (a byte for each frame, ``unicorn_hvm.DIRTY_MAP`` in its
block), the frame's byte becomes 1 there, without leaving generated code. The page walker's own stores (accessed and
dirty bits) go another way and are not seen.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

from pyxen.machine.cpu import unicorn_hvm
from pyxen.machine.cpu import unicorn_internals as ui
from pyxen.machine.cpu.unicorn_code import JAE, JE, JLE, JMP, JNE, Code, CodePage, jump

_TARGET_PAGE = 0x1000
_CODE_GENERATION = 0xe4c  # unicorn_tlb.CODE_GENERATION, in the engine's block

# uc_struct: the radix tree of PageDesc (translate-all.c), and the list of RAM blocks
_UC_L1_MAP, _UC_L1_SIZE, _UC_L1_SHIFT, _UC_L2_LEVELS = 0x2e0, 0x2f0, 0x2f4, 0x2f8
_MEMORY_REGION_PERMS = 0x88

# notdirty_write: cmp qword [rbp+addr_write], -1; je; mov rax, [r15+uc]; mov eax, [rax+snapshot_level];
# cmp [r9+priority], eax; jl; then the test to be replaced: cmp qword [rbp+addr_code], -1; je; and the way out. (RAM has
# priority 0 and the snapshot level is 0, so every store to it comes as far as that test.)
_NOTDIRTY_HEAD = "48837d08ff 7413 498b87DDDD 8b80DDDD 4139415c 7c07"
_NOTDIRTY_TEST = "48837d10ff 74BB"
_NOTDIRTY_LEAVE = "4883c428 5b 5d 415c 415d 415e 415f c3"
_NOTDIRTY_SAVE = bytes.fromhex("4c895c2410")      # mov [rsp+16], r11: the RAM address, while translations are removed
_SEARCH = 0x1000
_TLB_NOTDIRTY = 1 << 10

# tlb_set_page_with_attrs: test byte [rsp+prot], PAGE_WRITE; je; mov rsi, [rsp+section]; or r9, TLB_NOTDIRTY;
# cmp byte [rsi+readonly], 0; je. The mark depends on nothing else.
_ALWAYS_MARKED = "f644242c02 0f84DDDD 488b742410 4981c900040000 807e3000 0f84DDDD"


def _protect_code(lib: ui.Library, code: Code) -> None:
    """tlb_protect_code(uc, ram_addr) -> tlb_reset_dirty(cpu, host address, page size)."""
    code.raw("80bf d 00", lib.uc_no_exit_request)              # cmp byte [rdi+no_exit_request], 0
    code.branch(JE, "original")
    code.raw("488b87 d", ui.UC_RAM_BLOCKS)                     # mov rax, [rdi+ram_list.blocks]: we map one, at 0
    code.raw("480370 b", ui.RAM_BLOCK_HOST)                    # add rsi, [rax+host]
    code.raw("4881e6 d", -_TARGET_PAGE)                        # and rsi, -4096
    code.raw("488bbf d", lib.uc_cpu)                           # mov rdi, [rdi+cpu]
    code.raw("488b87 d 4885c0", lib.cpu_env + ui.MTRR_DEFTYPE)  # mov rax, [rdi+env.mtrr_deftype]; test rax, rax
    code.branch(JE, "mark")
    code.raw("ff80 d", _CODE_GENERATION)                       # inc dword [rax+CODE_GENERATION]
    code.label("mark")
    code.raw("ba d", _TARGET_PAGE)                             # mov edx, 4096
    code.raw("48b8 q ffe0", lib.address("tlb_reset_dirty_x86_64"))
    code.label("original")


def _no_reset_by_vaddr(lib: ui.Library, code: Code) -> None:
    code.raw("488b87 d", ui.CPU_UC)                            # mov rax, [rdi+uc]
    code.raw("80b8 d 00", lib.uc_no_exit_request)              # cmp byte [rax+no_exit_request], 0
    code.branch(JE, "original")
    code.raw("c3")
    code.label("original")


PATCHES: tuple[tuple[str, str, Callable[[ui.Library, Code], None]], ...] = (
    ("tlb_protect_code_x86_64", "4889f7ba01000000", _protect_code),                # mov rdi, rsi; mov edx, 1
    ("tlb_reset_dirty_by_vaddr_x86_64", "4989f94989f0", _no_reset_by_vaddr),       # mov r9, rdi; mov r8, rsi
)


def _find_page(code: Code, absent: str) -> None:
    """rdi = uc, rax = page number -> flags of ``cmp PageDesc.first_tb, 0``, or to ``absent``. Clobbers rax, rcx,
    rdx, rsi, r8."""
    code.raw("8b8f d 4889c2 48d3ea", _UC_L1_SHIFT)             # mov ecx, [rdi+…]; mov rdx, rax; shr rdx, cl
    code.raw("8bb7 d ffce 4821f2", _UC_L1_SIZE)                # mov esi, [rdi+…]; dec esi; and rdx, rsi
    code.raw("4c8b87 d 4d8d04d0", _UC_L1_MAP)                  # mov r8, [rdi+…]; lea r8, [r8+rdx*8]
    code.raw("8b8f d 8d0c89 01c9 85c9", _UC_L2_LEVELS)         # mov ecx, [rdi+…] * 10; test ecx, ecx
    code.branch(JLE, "leaf")
    code.label("level")
    code.raw("4d8b00 4d85c0")                                  # mov r8, [r8]; test r8, r8
    code.branch(JE, absent)
    code.raw("4889c2 48d3ea 81e2 d 4d8d04d0", 0x3ff)           # rdx = rax >> cl & 0x3ff; lea r8, [r8+rdx*8]
    code.raw("83e90a")                                         # sub ecx, 10
    code.branch(JNE, "level")
    code.label("leaf")
    code.raw("4d8b00 4d85c0")
    code.branch(JE, absent)
    code.raw("25 d 488d0440 49833cc000", 0x3ff)                # cmp qword [r8+(rax & 0x3ff)*24], 0: first_tb


def prepare_next_code(page: CodePage) -> Callable[[int, int, int], int]:
    """``next_code(uc, first page, end page)``: the first of these pages that holds a translation, or -1.

    It only reads, and the nodes of the tree never move: it may be called from any thread, while the engine runs. Where
    the tree has no node, all pages of it are passed over in one step.
    """
    code = page.begin()
    code.raw("4989f1 4989d2")                                  # mov r9, rsi; mov r10, rdx
    code.label("page")
    code.raw("4d39d1")                                         # cmp r9, r10
    code.branch(JAE, "none")
    code.raw("4c89c8")                                         # mov rax, r9
    _find_page(code, absent="absent")
    code.branch(JNE, "found")
    code.label("next")
    code.raw("49ffc1")                                         # inc r9
    code.branch(JMP, "page")
    code.label("absent")
    code.raw("4981c9 d", 0x3ff)                                # or r9, 0x3ff: a leaf is 1024 pages
    code.branch(JMP, "next")
    code.label("found")
    code.raw("4c89c8 c3")                                      # mov rax, r9; ret
    code.label("none")
    code.raw("48c7c0 d c3", -1)                                # mov rax, -1; ret
    page.place(code)
    function: Callable[[int, int, int], int] = ctypes.PYFUNCTYPE(
        ctypes.c_int64, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_uint64)(code.address)
    return function


def prepare_notdirty_write(lib: ui.Library, page: CodePage) -> tuple[int, bytes]:
    """Place the new test; returns (address, code) to overwrite. Raises EngineError for an unknown build."""
    start = lib.address("tlb_set_dirty_x86_64")
    content = lib.code("tlb_set_dirty_x86_64", _SEARCH)
    head = len(bytes.fromhex(_NOTDIRTY_HEAD.replace("DDDD", "00000000")))
    found = ui.pattern(_NOTDIRTY_HEAD + _NOTDIRTY_TEST + _NOTDIRTY_LEAVE).search(content)
    if found is None or _NOTDIRTY_SAVE not in content[found.start():found.end() + 64]:
        raise ui.unknown_build("notdirty_write is different")
    entry = start + found.start() + head
    leave = entry + len(bytes.fromhex(_NOTDIRTY_TEST.replace("BB", "00")))
    set_dirty = leave + found.group(3)[0]
    if ui.pattern(_ALWAYS_MARKED).search(lib.code("tlb_set_page_with_attrs_x86_64", _SEARCH)) is None:
        raise ui.unknown_build("the TLB does not mark what it is filled with")
    code = page.begin()
    # r15 = cpu, rbp = the TLB entry, r9 = the memory region, [rsp+16] = RAM address if the region is executable
    code.raw("498bbf d", ui.CPU_UC)                            # mov rdi, [r15+uc]
    code.raw("80bf d 00", lib.uc_no_exit_request)              # cmp byte [rdi+no_exit_request], 0
    code.far(JE, "original")
    code.raw("41f681 d 04", _MEMORY_REGION_PERMS)              # test byte [r9+perms], UC_PROT_EXEC: RAM is, always
    code.far(JE, "unmark")
    code.raw("488b442410 48c1e80c")                            # mov rax, [rsp+16]; shr rax, 12
    code.raw("498b8f d 4885c9", lib.cpu_env + ui.MTRR_DEFTYPE)  # mov rcx, [r15+…]: the block; test rcx, rcx
    code.branch(JE, "no map")
    code.raw("488b89 d 4885c9", unicorn_hvm.DIRTY_MAP)         # mov rcx, [rcx+dirty map]; test rcx, rcx
    code.branch(JE, "no map")
    code.raw("c6040101")                                       # mov byte [rcx+rax], 1
    code.label("no map")
    _find_page(code, absent="unmark")
    code.branch(JE, "unmark")
    code.jump(leave)
    code.label("unmark")
    code.raw("816508 d", ~_TLB_NOTDIRTY)                       # and dword [rbp+addr_write], ~TLB_NOTDIRTY
    code.jump(leave)
    code.label("original")
    code.raw("48837d10ff")                                     # cmp qword [rbp+addr_code], -1
    code.branch(JE, "set dirty")
    code.jump(leave)
    code.label("set dirty")
    code.jump(set_dirty)
    page.place(code)
    return entry, jump(entry, code.address).ljust(leave - entry, b"\x90")
