# SPDX-License-Identifier: GPL-2.0-only
"""Corrections to Unicorn's code that have no other place than its code.

Each patch replaces the first instructions of an exported function by a jump to a few hand-assembled instructions,
which end with
the replaced ones and a jump back. The bytes to be replaced are compared first; a function that looks different is an
unknown build
(EngineError). Patches are applied once per process, before the first engine exists, and keep no state of their own:
all state they touch
hangs off their arguments, so any number of engines may run in any number of threads.

* ``helper_syscall`` tells its hook nothing about the length of the instruction (SYSCALL may carry prefixes), and
  adds it to RIP after the hook.
  Without the length a user program could make its kernel start one byte after its entry point. The patch leaves it in
  ``exception_next_eip``, which only INT n uses.
* ``helper_in*/out*``: Unicorn dropped the privilege check of port I/O. The patch restores #GP(0) for code outside of
  ring 0 (PV guests never
  have IOPL or an I/O bitmap of their own in hardware: Xen emulates both) and leaves guests under nested paging alone.
* ``helper_raise_interrupt`` (INT n) reports the instruction's length where its error code, always 0, would be: RIP
  has moved on when the hook runs.
* ``x86_cpu_exec_interrupt``: a stop that sticks. Every other way to stop a run is undone when a run starts, so a
  kick at that moment would be
  lost. Here the HALT bit of ``interrupt_request``, which nothing else clears, leaves the loop before the next block.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from ctypes import c_int, c_long, c_size_t, c_void_p
from dataclasses import dataclass
from typing import NamedTuple

from pyxen.errors import EngineError
from pyxen.machine.cpu import unicorn_internals as ui

_PAGE = 4096
_MAP_FIXED_NOREPLACE = 0x100000
_STEP = 16 << 20
_REACH = 1 << 30

_GP_VECTOR = 13


@dataclass(frozen=True)
class Patch:
    """``moved``: the instructions at the entry of ``symbol`` that the jump overwrites, in hex, position independent,
    ≥ 5 bytes."""

    symbol: str
    moved: str
    stub: bytes


class _Exchange(NamedTuple):
    symbol: str
    before: str
    after: str


# mov r8d, edx; sub rsp, 8; xor ecx, ecx -> mov ecx, edx; mov edx, 1
_INT_LENGTH = _Exchange("helper_raise_interrupt_x86_64",
                        before="4189d0 4883ec08 31c9 ba01000000",
                        after="4189d0 4883ec08 89d1 ba01000000")


def _jump(source: int, target: int) -> bytes:
    return b"\xe9" + struct.pack("<i", target - (source + 5))


def _u32(value: int) -> bytes:
    return struct.pack("<I", value)


def _io_stub(raise_exception_err_ra: int) -> bytes:
    refuse = (bytes.fromhex("488b0c24")                     # mov rcx, [rsp]: the helper's return address
              + b"\xbe" + _u32(_GP_VECTOR)                  # mov esi, 13
              + bytes.fromhex("31d2")                       # xor edx, edx: error code
              + b"\x48\xb8" + struct.pack("<Q", raise_exception_err_ra)
              + bytes.fromhex("ffe0"))                      # mov rax, …; jmp rax
    guest = (b"\xf7\x87" + _u32(ui.HFLAGS) + _u32(ui.HF_GUEST)
             + b"\x75" + bytes((len(refuse),)))             # test dword [rdi+hflags], HF_GUEST; jnz original
    return (b"\xf6\x87" + _u32(ui.HFLAGS) + bytes((ui.HF_CPL,))
            + b"\x74" + bytes((len(guest) + len(refuse),))  # test byte [rdi+hflags], 3; jz original
            + guest + refuse)


def _sticky_stop_stub(lib: ui.Library) -> bytes:
    stop = (b"\x83\x67" + bytes((ui.CPU_INTERRUPT_REQUEST, 0xff & ~ui.INTERRUPT_HALT))  # and dword [rdi+…], ~HALT
            + b"\xc6\x47" + bytes((lib.cpu_exit_request, 1))                            # mov byte [rdi+…], 1
            + b"\x48\x8b\x87" + _u32(ui.CPU_UC)                                         # mov rax, [rdi+uc]
            + b"\xc6\x80" + _u32(lib.uc_stop_request) + b"\1"                           # mov byte [rax+…], 1
            + bytes.fromhex("31c0 c3"))                                                 # xor eax, eax; ret
    return (b"\x40\xf6\xc6" + bytes((ui.INTERRUPT_HALT,))                              # test sil, HALT
            + b"\x74" + bytes((len(stop),)) + stop)                                     # jz original


def _syscall_stub() -> bytes:
    return b"\x89\xf0\x48\x89\x87" + _u32(ui.EXCEPTION_NEXT_EIP)                       # mov eax, esi; mov [rdi+…], rax


def patches(lib: ui.Library) -> list[Patch]:
    """All corrections that are stubs, for this library."""
    load_uc = "488bbf" + _u32(ui.UC_POINTER).hex()           # mov rdi, [rdi+uc]
    io_stub = _io_stub(lib.address("raise_exception_err_ra_x86_64"))
    result = [
        Patch("helper_syscall_x86_64", "41574989ff", _syscall_stub()),                     # push r15; mov r15, rdi
        Patch("x86_cpu_exec_interrupt_x86_64", "4154554889fd", _sticky_stop_stub(lib)),   # push r12, rbp; mov rbp, rdi
    ]
    for size in "bwl":
        result.append(Patch(f"helper_out{size}_x86_64", load_uc, io_stub))
        result.append(Patch(f"helper_in{size}_x86_64", "4883ec08" + load_uc, io_stub))     # sub rsp, 8 first
    return result


class CodePage:
    """Executable memory that a 32-bit jump from the library reaches."""

    def __init__(self, near: int, size: int = _PAGE) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.argtypes = (c_void_p, c_size_t, c_int, c_int, c_int, c_long)
        libc.mmap.restype = c_void_p
        self._mprotect = libc.mprotect
        self._mprotect.argtypes = (c_void_p, c_size_t, c_int)
        failed = ctypes.c_void_p(-1).value
        near &= -_PAGE
        for distance in range(_STEP, _REACH, _STEP):
            for hint in (near - distance, near + distance):
                address = libc.mmap(hint, size, mmap.PROT_READ | mmap.PROT_WRITE,
                                    mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_FIXED_NOREPLACE, -1, 0)
                if address in (None, failed):
                    continue
                if abs(address - near) < 2 * _REACH - size:
                    self.address = int(address)
                    self.next = self.address
                    self.end = self.address + size
                    return
        raise EngineError("no room for engine corrections near the Unicorn library")

    def place(self, code: bytes) -> int:
        """Append code, 16-byte aligned; returns its address."""
        address = self.reserve()
        if address + len(code) > self.end:
            raise EngineError("engine corrections do not fit their page")
        ctypes.memmove(address, code, len(code))
        self.next = address + len(code)
        return address

    def reserve(self) -> int:
        """Where the next :meth:`place` will put its code."""
        return self.next + 15 & ~15

    def seal(self) -> None:
        """Make the page executable and read-only."""
        if self._mprotect(self.address, self.end - self.address, mmap.PROT_READ | mmap.PROT_EXEC):
            raise EngineError("the host forbids executable memory for engine corrections")

    def overwrite(self, address: int, code: bytes) -> None:
        """Replace library code. Nothing may be executing it."""
        start = address & -_PAGE
        size = (address + len(code) - start + _PAGE - 1) & -_PAGE
        if self._mprotect(start, size, mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC):
            raise EngineError("the host forbids corrections to the Unicorn library's code",
                              hint="a security policy denies mprotect() on library text (SELinux: execmod)")
        ctypes.memmove(address, code, len(code))
        self._mprotect(start, size, mmap.PROT_READ | mmap.PROT_EXEC)


def install(lib: ui.Library) -> None:
    """Apply every patch. Raises EngineError, before anything is changed, if one does not fit."""
    wanted = patches(lib)
    for patch in wanted:
        ui.match(lib.code(patch.symbol, 16), patch.moved, patch.symbol)
    int_length = lib.address(_INT_LENGTH.symbol)
    ui.match(lib.code(_INT_LENGTH.symbol, 16), _INT_LENGTH.before, _INT_LENGTH.symbol)
    page = CodePage(lib.address("helper_syscall_x86_64"))
    entries = [(int_length, bytes.fromhex(_INT_LENGTH.after))]
    for patch in wanted:
        entry = lib.address(patch.symbol)
        moved = bytes.fromhex(patch.moved)
        start = page.reserve()
        body = patch.stub + moved
        page.place(body + _jump(start + len(body), entry + len(moved)))
        entries.append((entry, _jump(entry, start).ljust(len(moved), b"\x90")))
    page.seal()
    for address, code in entries:
        page.overwrite(address, code)
