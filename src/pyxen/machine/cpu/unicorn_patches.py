# SPDX-License-Identifier: GPL-2.0-only
"""Corrections to Unicorn's code that have no other place than its code.

Each patch replaces the first instructions of a function by a jump to a few hand-assembled instructions, which end
with the
replaced ones and a jump back. The bytes to be replaced are compared first; a function that looks different is an
unknown build
(EngineError). Patches keep no state of their own: all state they touch hangs off their arguments, so any number of
engines may
run in any number of threads. Engines that are not ours (``no_exit_request`` clear) behave as before.

* ``helper_syscall`` tells its hook nothing about the length of the instruction (SYSCALL may carry prefixes), and
  adds it to
  RIP after the hook. Without the length a user program could make its kernel start one byte after its entry point.
  The patch
  leaves it in ``exception_next_eip``, which only INT n uses.
* ``helper_raise_interrupt`` (INT n) reports the instruction's length where its error code, always 0, would be: RIP
  has moved on
  when the hook runs.
* ``helper_rdpmc`` has its test of CR4.PCE the wrong way round: #GP outside of ring 0 without PCE, as hardware has it.
* ``helper_in*/out*``: Unicorn dropped the privilege check of port I/O. The patch restores #GP(0) for code outside of
  ring 0 (PV
  guests never have IOPL or an I/O bitmap of their own in hardware: Xen emulates both) and the whole check for guests
  under nested paging.
* ``x86_cpu_exec_interrupt``: a stop that sticks. Every other way to stop a run is undone when a run starts, so a
  kick at that
  moment would be lost. Here the HALT bit of ``interrupt_request``, which nothing else uses, leaves the loop before
  the next block.
* ``cpu_exec`` reads ``interrupt_request`` and then clears ``icount_decr``. A kick between the two (rare from another
  thread, less so from a signal) would wait for the next exit, perhaps for ever. QEMU's comment asks for the other
  order, which the compiler may not keep; the patch restores it.

``unicorn_dirty``, ``unicorn_hvm``, ``unicorn_blockcheck``, ``unicorn_spaces`` and ``unicorn_tlb`` hold the larger ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from pyxen.machine.cpu import unicorn_blockcheck, unicorn_dirty, unicorn_hvm, unicorn_spaces, unicorn_tlb
from pyxen.machine.cpu import unicorn_internals as ui
from pyxen.machine.cpu.unicorn_code import JE, JNE, Code, CodePage, jump

_PAGE_SIZE = 0x4000


class _Patch(NamedTuple):
    """``moved``: the instructions (hex) at the entry of ``symbol`` that the jump overwrites: position independent, ≥
    5 bytes."""

    symbol: str
    moved: str
    stub: Callable[[ui.Library, Code], None]


class _Exchange(NamedTuple):
    symbol: str
    before: str
    after: str


# mov eax, [rbx+interrupt_request]; xor ecx, ecx; mov rdx, [rbx+…]; mov [rbx+icount_decr.high], cx; test eax, eax
_READ_THEN_CLEAR = "8b431c 31c9 488b93DDDD 66898bDDDD 85c0"
_EXEC_SIZE = 0x400

_EXCHANGES = (
    # mov r8d, edx; sub rsp, 8; xor ecx, ecx -> mov ecx, edx; mov edx, 1
    _Exchange("helper_raise_interrupt_x86_64",
              before="4189d0 4883ec08 31c9 ba01000000",
              after="4189d0 4883ec08 89d1 ba01000000"),
    # push rbp; mov rbp, rdi; test byte [rdi+cr4+1], PCE; je -> nop; test byte [rdi+hflags], CPL
    _Exchange("helper_rdpmc_x86_64",
              before="55 4889fd f687c901000001 7409 f687b000000003",
              after="55 4889fd f687c901000001 9090 f687b000000003"),
)


def _port_io(size: str) -> Callable[[ui.Library, Code], None]:
    def check(lib: ui.Library, code: Code) -> None:
        code.raw("488b87 d", ui.UC_POINTER)                    # mov rax, [rdi+uc]
        code.raw("80b8 d 00", lib.uc_no_exit_request)          # cmp byte [rax+no_exit_request], 0
        code.branch(JE, "original")
        code.raw("f687 d b", ui.HFLAGS2, ui.HF2_NPT)           # test byte [rdi+hflags2], NPT
        code.branch(JNE, "nested")
        code.raw("f687 d b", ui.HFLAGS, ui.HF_CPL)             # test byte [rdi+hflags], CPL
        code.branch(JE, "original")
        code.jump(lib.hvm.protection)
        code.label("nested")
        unicorn_hvm.check_port(lib, code, size)
        code.label("original")

    return check


def _sticky_stop(lib: ui.Library, code: Code) -> None:
    code.raw("40f6c6 b", ui.INTERRUPT_HALT)                    # test sil, HALT
    code.branch(JE, "go on")
    code.raw("8367 b b", ui.CPU_INTERRUPT_REQUEST, ~ui.INTERRUPT_HALT)  # and dword [rdi+interrupt_request], ~HALT
    code.raw("c647 b 01", lib.cpu_exit_request)                # mov byte [rdi+exit_request], 1
    code.raw("488b87 d", ui.CPU_UC)                            # mov rax, [rdi+uc]
    code.raw("c680 d 01", lib.uc_stop_request)                 # mov byte [rax+stop_request], 1
    code.raw("31c0 c3")                                        # return false
    code.label("go on")
    unicorn_hvm.deliver_event(lib, code)


def _syscall(lib: ui.Library, code: Code) -> None:
    unicorn_hvm.syscall(lib, code)
    code.raw("89f0 488987 d", ui.EXCEPTION_NEXT_EIP)           # mov eax, esi; mov [rdi+exception_next_eip], rax


def _patches() -> list[_Patch]:
    load_uc = "488bbf" + ui.UC_POINTER.to_bytes(4, "little").hex()                   # mov rdi, [rdi+uc]
    result = [
        _Patch("helper_syscall_x86_64", "41574989ff", _syscall),              # push r15; mov r15, rdi
        _Patch("x86_cpu_exec_interrupt_x86_64", "4154554889fd", _sticky_stop),       # push r12, rbp; mov rbp, rdi
        *(_Patch(*patch) for patch in unicorn_dirty.PATCHES + unicorn_hvm.PATCHES),
    ]
    for size in "bwl":
        result.append(_Patch(f"helper_out{size}_x86_64", load_uc, _port_io(size)))
        result.append(_Patch(f"helper_in{size}_x86_64", "4883ec08" + load_uc, _port_io(size)))  # sub rsp, 8 first
    return result


def _clear_then_read(lib: ui.Library) -> tuple[int, bytes]:
    """What to write where, for ``cpu_exec`` to clear before it reads."""
    code = lib.code("cpu_exec_x86_64", _EXEC_SIZE)
    found = ui.pattern(_READ_THEN_CLEAR).search(code)
    if found is None or int.from_bytes(found.group(2), "little") != lib.cpu_icount + 2:
        raise ui.unknown_build("cpu_exec clears its exit request in another way")
    load = bytes.fromhex("488b93") + found.group(1)
    clear = bytes.fromhex("66898b") + found.group(2)
    return (lib.address("cpu_exec_x86_64") + found.start(),
            bytes.fromhex("31c9") + clear + load + bytes.fromhex("8b431c"))


def install(lib: ui.Library, uc_pointer: int) -> None:
    """Apply every patch, and the optional ones (``unicorn_blockcheck``, ``_spaces``, ``_tlb``) if they fit.

    ``uc_pointer``: any idle engine. Raises EngineError, before anything is changed, if a needed one does not fit.
    """
    wanted = _patches()
    for patch in wanted:
        ui.match(lib.code(patch.symbol, 16), patch.moved, patch.symbol)
    for exchange in _EXCHANGES:
        ui.match(lib.code(exchange.symbol, 32), exchange.before, exchange.symbol)
    clear_then_read = _clear_then_read(lib)
    page = CodePage(lib.address("helper_syscall_x86_64"), _PAGE_SIZE)
    lib.hvm = unicorn_hvm.place(lib, page)
    entries = [(lib.address(exchange.symbol), bytes.fromhex(exchange.after)) for exchange in _EXCHANGES]
    entries.append(clear_then_read)
    for patch in wanted:
        entry = lib.address(patch.symbol)
        moved = bytes.fromhex(patch.moved)
        code = page.begin()
        patch.stub(lib, code)
        code.raw(patch.moved)
        code.jump(entry + len(moved))
        page.place(code)
        entries.append((entry, jump(entry, code.address).ljust(len(moved), b"\x90")))
    entries += unicorn_hvm.prepare(lib, page)
    next_code = unicorn_dirty.prepare_next_code(page)
    entries.append(unicorn_dirty.prepare_notdirty_write(lib, page))
    block_check = unicorn_blockcheck.prepare(lib, uc_pointer, page)
    if block_check is not None:
        entries.append(block_check)
    exchange_spaces = unicorn_spaces.prepare(lib, page)
    exchange_tlb = unicorn_tlb.prepare(lib, page)
    page.seal()
    for address, content in entries:
        page.overwrite(address, content)
    lib.next_code = next_code
    lib.block_check = block_check is not None
    lib.exchange_spaces = exchange_spaces
    lib.exchange_tlb = exchange_tlb
