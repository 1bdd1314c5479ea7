# SPDX-License-Identifier: GPL-2.0-only
"""PV guests of a few dozen bytes: they print, and then end in the way that is asked for.

Written as machine code so that these tests need no compiler. At entry RSI is start_info; the xenstore and console pages
follow it (that is how our builder lays out a guest).
"""

from __future__ import annotations

import struct
from pathlib import Path

from pyxen.abi.elfnote import XenElfNote
from tests.build.make_elf import VIRT_BASE, Load, number, xen_kernel

POWEROFF, REBOOT, SUSPEND, CRASH = range(4)
ENTRY = VIRT_BASE + 0x100000

_EVENT_CHANNEL_OP, _SCHED_OP = 32, 29
_SEND, _SHUTDOWN, _POLL = 4, 2, 3
_CONSOLE_EVTCHN = 80
"""Offset of console.domU.evtchn in struct start_info."""


class Code:
    """Machine code in the making, with data behind it that is addressed relative to RIP."""

    def __init__(self) -> None:
        self.code = bytearray()
        self._fixups: list[tuple[int, bytes]] = []

    def emit(self, text: str) -> None:
        self.code += bytes.fromhex(text)

    def rip_relative(self, opcode: str, data: bytes) -> None:
        """``opcode`` with a 32-bit displacement that reaches a copy of ``data``."""
        self.emit(opcode)
        self._fixups.append((len(self.code), data))
        self.code += bytes(4)

    def hypercall(self, number: int, command: int) -> None:
        """``syscall`` with RDI = ``command``; RSI holds the argument."""
        self.code += b"\xb8" + struct.pack("<I", number) + b"\xbf" + struct.pack("<I", command)
        self.emit("0f05")

    def link(self) -> bytes:
        end = len(self.code)
        tail = bytearray()
        for at, data in self._fixups:
            struct.pack_into("<i", self.code, at, end + len(tail) - (at + 4))
            tail += data
        return bytes(self.code + tail)


def printing(text: bytes, then: str | int) -> bytes:
    """A guest that writes ``text`` (up to 2 KiB) to its console and then shuts down with a reason (a number), or
    does ``block``, ``spin``, ``count`` (in RBX, for ever), ``selfmod`` (count by rewriting
    an instruction, and look whether the new one is executed; ``ud2`` if not) or ``ud2``."""
    code = Code()
    code.emit("4889f3")  # mov rbx, rsi
    code.emit("488dab00200000")  # lea rbp, [rbx+0x2000]: the console page
    code.rip_relative("488d35", text)  # lea rsi, [text]
    code.emit("488dbd00040000")  # lea rdi, [rbp+1024]: out
    code.code += b"\xb9" + struct.pack("<I", len(text))  # mov ecx, len
    code.emit("f3a4")  # rep movsb
    code.code += b"\xc7\x85" + struct.pack("<II", 3084, len(text))  # mov dword [rbp+out_prod], len
    code.emit("8b4350")  # mov eax, [rbx+80]: the console's port
    code.emit("50")  # push rax
    code.emit("4889e6")  # mov rsi, rsp
    code.hypercall(_EVENT_CHANNEL_OP, _SEND)
    if isinstance(then, int):
        code.rip_relative("488d35", struct.pack("<I", then))
        code.hypercall(_SCHED_OP, _SHUTDOWN)
    elif then == "count":
        code.emit("31db48ffc3ebfb")  # xor ebx, ebx; 1: inc rbx; jmp 1b
    elif then == "selfmod":
        # xor ebx, ebx; 1: inc rbx; mov [2f+1], ebx; jmp 2f; 2: mov eax, 0; cmp eax, ebx; jne 3f; jmp 1b; 3: ud2
        code.emit("31db 48ffc3 891d03000000 eb00 b800000000 39d8 7502 ebea 0f0b")
    elif then == "ud2":
        code.emit("0f0b")
    elif then == "block":
        # Not SCHEDOP_block: that unmasks events, and the first one crashes a guest that has no callback for them.
        start = len(code.code)
        code.rip_relative("488d35", bytes(24))  # struct sched_poll: no ports, no timeout
        code.hypercall(_SCHED_OP, _POLL)
        code.code += b"\xeb" + struct.pack("<b", start - len(code.code) - 2)
    code.emit("ebfe")  # jmp $
    return code.link()


def write_kernel(path: Path, text: bytes = b"hello\n", then: str | int = POWEROFF) -> Path:
    """A kernel file of :func:`printing`."""
    path.write_bytes(xen_kernel(number(XenElfNote.VIRT_BASE, VIRT_BASE), loads=[Load(0x100000, printing(text, then))]))
    return path


def config(kernel: Path, name: str = "small", *lines: str) -> str:
    """A configuration of such a guest: 8 MiB."""
    return "\n".join([f'name = "{name}"', f'kernel = "{kernel}"', "memory = 8", *lines])
