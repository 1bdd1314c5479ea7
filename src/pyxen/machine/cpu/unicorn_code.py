# SPDX-License-Identifier: GPL-2.0-only
"""Writing machine code into this process: a page near the Unicorn library, and just enough of an assembler.

Instructions are written as hex with their meaning beside them; the assembler only fills in distances. Everything is
applied once
per process, before the first engine exists.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from ctypes import c_int, c_long, c_size_t, c_void_p

from pyxen.errors import EngineError

_PAGE = 4096
_MAP_FIXED_NOREPLACE = 0x100000
_STEP = 16 << 20
_REACH = (2 << 30) - (64 << 20)

_OPERAND_SIZE = {"b": 1, "d": 4, "q": 8}
# "b" and "d" are hex digits too, but a byte of hex has two of them.

JE, JNE, JAE, JLE, JMP = "74", "75", "73", "7e", "eb"
JA, JB, JBE, JS, JNS = "77", "72", "76", "78", "79"


def jump(source: int, target: int) -> bytes:
    """``jmp rel32``."""
    return b"\xe9" + struct.pack("<i", target - (source + 5))


class Code:
    """Code that will run at ``address``."""

    def __init__(self, address: int) -> None:
        self.address = address
        self._bytes = bytearray()
        self._labels: dict[str, int] = {}
        self._branches: list[tuple[int, int, str]] = []

    def raw(self, text: str, *operands: int) -> None:
        """Words of hex; ``b``, ``d`` and ``q`` stand for the operands, in order, as 8, 32 and 64 bits."""
        values = iter(operands)
        for word in text.split():
            if word in _OPERAND_SIZE:
                size = _OPERAND_SIZE[word]
                self._bytes += (next(values) & (1 << 8 * size) - 1).to_bytes(size, "little")
            else:
                self._bytes += bytes.fromhex(word)

    def branch(self, opcode: str, label: str) -> None:
        """A short jump to ``label``."""
        self._bytes += bytes.fromhex(opcode) + b"\0"
        self._branches.append((len(self._bytes), 1, label))

    def far(self, opcode: str, label: str) -> None:
        """As :meth:`branch`, to any distance."""
        number = bytes.fromhex(opcode)[0]
        self._bytes += (b"\xe9" if opcode == JMP else bytes((0x0f, number + 0x10))) + bytes(4)
        self._branches.append((len(self._bytes), 4, label))

    def label(self, name: str) -> None:
        """Here."""
        self._labels[name] = len(self._bytes)

    def jump(self, target: int) -> None:
        """To an address in reach of 32 bits."""
        self._bytes += jump(self.address + len(self._bytes), target)

    def finish(self) -> bytes:
        """The code with all distances filled in."""
        for end, size, label in self._branches:
            self._bytes[end - size:end] = (self._labels[label] - end).to_bytes(size, "little", signed=True)
        return bytes(self._bytes)


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
                if abs(address - near) < _REACH:
                    self.address = int(address)
                    self.next = self.address
                    self.end = self.address + size
                    return
        raise EngineError("no room for engine corrections near the Unicorn library")

    def place(self, code: Code) -> None:
        """Keep what :meth:`begin` began."""
        content = code.finish()
        if code.address + len(content) > self.end:
            raise EngineError("engine corrections do not fit their page")
        ctypes.memmove(code.address, content, len(content))
        self.next = code.address + len(content)

    def begin(self) -> Code:
        """Code for the next :meth:`place`."""
        return Code(self.next + 15 & ~15)

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
