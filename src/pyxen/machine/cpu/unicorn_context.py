# SPDX-License-Identifier: GPL-2.0-only
"""The saved state of a vCPU on the Unicorn x86-64 engine.

It is a byte image of the guest's part of CPUX86State with RFLAGS complete in ``eflags``, where the engine looks for
them when a run begins. Inside a run some are in ``cc_src``, ``cc_op`` and ``df``: a context that is saved in a hook is
put together, one that is loaded there is spread out. An image taken without that loses CF and its friends.
"""

from __future__ import annotations

import ctypes
import struct
from typing import TYPE_CHECKING

from pyxen.errors import InternalError
from pyxen.machine.cpu import unicorn_internals as ui
from pyxen.machine.cpu.base import Registers

if TYPE_CHECKING:
    from pyxen.machine.cpu.unicorn_tlb import ContextTlb
    from pyxen.machine.cpu.unicorn_x86 import UnicornX86

_U64 = (1 << 64) - 1
_FXSAVE_SIZE = 512
MXCSR_MASK = 0xffff

_XMM_IN_FXSAVE = 160
_ST_IN_FXSAVE = 32


LONG_MODE_FLAGS = 0x3d7fd7
"""Every flag that is defined but VM, which long mode does not have."""


class UnicornContext:
    """State of one vCPU. ``dr`` holds DR0-DR7; the image's copy of DR7 is always disabled, since enabled breakpoints
    are pointers."""

    __slots__ = ("buffer", "dr7", "engine", "fpu_changed", "tlb", "view", "view32", "view64")
    flags = LONG_MODE_FLAGS
    """The bits of RFLAGS that it can have."""

    def __init__(self, image: bytes) -> None:
        self.buffer = ctypes.create_string_buffer(image, ui.CONTEXT_SIZE)
        self.view = memoryview(self.buffer).cast("B")
        self.view32 = self.view.cast("I")
        self.view64 = self.view.cast("Q")
        self.engine: UnicornX86 | None = None
        self.dr7 = 0x400
        self.fpu_changed = False
        self.tlb: ContextTlb | None = None
        """Its translations on the engine that loaded it last."""

    def __del__(self) -> None:
        tlb = self.tlb
        if tlb is not None:
            tlb.engine.retire(tlb)

    def forget_translations(self) -> None:
        """What a translation depends on was changed from outside."""
        if self.tlb is not None:
            self.tlb.stale = True

    def get(self) -> Registers:
        """Decode the saved state. Raises InternalError while an engine holds it."""
        self._must_be_idle()
        v64, v32 = self.view64, self.view32
        segments = [ui.SEGS + ui.SEG_SIZE * n for n in range(6)]
        return Registers(
            gpr=v64[:17].tolist(),
            flags=v64[ui.EFLAGS >> 3] & 0xffffffff,
            selectors=[v32[offset >> 2] & 0xffff for offset in segments],
            bases=[v64[(offset + 8) >> 3] for offset in segments],
            cr2=v64[ui.CR2 >> 3],
            cr3=v64[ui.CR3 >> 3],
            fxsave=self._fxsave(),
        )

    def put(self, registers: Registers) -> None:
        """Replace the saved state; hidden parts of segments stay, but for the bases of FS and GS. Raises
        InternalError while an engine holds it."""
        self._must_be_idle()
        shape = tuple(map(len, (registers.gpr, registers.selectors, registers.bases, registers.fxsave)))
        if shape != (17, 6, 6, _FXSAVE_SIZE):
            raise InternalError("register file of the wrong shape")
        self.forget_translations()
        v64, v32 = self.view64, self.view32
        for n, value in enumerate(registers.gpr):
            v64[n] = value & _U64
        settle_flags(v64, v32, registers.flags)
        for n, selector in enumerate(registers.selectors):
            v32[(ui.SEGS + ui.SEG_SIZE * n) >> 2] = selector & 0xffff
        for n in (4, 5):
            v64[(ui.SEGS + ui.SEG_SIZE * n + 8) >> 3] = registers.bases[n] & _U64
        v64[ui.CR2 >> 3] = registers.cr2 & _U64
        v64[ui.CR3 >> 3] = registers.cr3 & _U64
        self._set_fxsave(registers.fxsave)

    def _must_be_idle(self) -> None:
        if self.engine is not None:
            raise InternalError("the context is loaded on a CPU: its registers are there")

    # FXSAVE image: Intel SDM volume 1, 10.5.1 (64-bit form, REX.W=1)
    def _fxsave(self) -> bytes:
        view = self.view
        top = self.view32[ui.FPSTT >> 2] & 7
        (status, control) = struct.unpack_from("<HH", view, ui.FPUS)
        empty = view[ui.FPTAGS:ui.FPTAGS + 8]
        tags = sum(1 << n for n in range(8) if not empty[n])
        (opcode,) = struct.unpack_from("<H", view, ui.FPOP)
        image = bytearray(_FXSAVE_SIZE)
        struct.pack_into("<HHBxHQQII", image, 0, control, (status & ~0x3800) | top << 11, tags, opcode,
                         self.view64[ui.FPIP >> 3], self.view64[ui.FPDP >> 3], self.view32[ui.MXCSR >> 2], MXCSR_MASK)
        for n in range(8):
            source = ui.FPREGS + 16 * ((top + n) & 7)
            image[_ST_IN_FXSAVE + 16 * n:_ST_IN_FXSAVE + 16 * n + 10] = view[source:source + 10]
        for n in range(16):
            source = ui.XMM + ui.XMM_SIZE * n
            image[_XMM_IN_FXSAVE + 16 * n:_XMM_IN_FXSAVE + 16 * n + 16] = view[source:source + 16]
        return bytes(image)

    def _set_fxsave(self, image: bytes) -> None:
        view = self.view
        control, status, tags, opcode, rip, rdp, mxcsr = struct.unpack_from("<HHBxHQQI", image, 0)
        top = status >> 11 & 7
        self.view32[ui.FPSTT >> 2] = top
        struct.pack_into("<HH", view, ui.FPUS, status & ~0x3800, control)
        for n in range(8):
            view[ui.FPTAGS + n] = not tags >> n & 1
            target = ui.FPREGS + 16 * ((top + n) & 7)
            view[target:target + 10] = image[_ST_IN_FXSAVE + 16 * n:_ST_IN_FXSAVE + 16 * n + 10]
        struct.pack_into("<H", view, ui.FPOP, opcode)
        self.view64[ui.FPIP >> 3], self.view64[ui.FPDP >> 3] = rip, rdp
        # A reserved bit set would be #GP in FXRSTOR; a context is loaded from files, where it can only be dropped.
        self.view32[ui.MXCSR >> 2] = mxcsr & MXCSR_MASK
        for n in range(16):
            target = ui.XMM + ui.XMM_SIZE * n
            view[target:target + 16] = image[_XMM_IN_FXSAVE + 16 * n:_XMM_IN_FXSAVE + 16 * n + 16]
        # The engine derives rounding and exception state from the control words: it must see them written.
        self.fpu_changed = True


_EFLAGS, _CC_SRC, _CC_OP, _DF = ui.EFLAGS >> 3, ui.CC_SRC >> 3, ui.CC_OP >> 2, ui.DF >> 2
_IN_CC, _CC_OP_EFLAGS = ui.FLAGS_IN_CC, ui.CC_OP_EFLAGS


def settle_flags(v64: memoryview, v32: memoryview, flags: int, defined: int = LONG_MODE_FLAGS) -> None:
    """Write the ``defined`` ones of RFLAGS in both of the engine's forms."""
    flags = flags & defined | 2
    v64[_EFLAGS] = flags
    v64[_CC_SRC] = flags & _IN_CC
    v32[_CC_OP] = _CC_OP_EFLAGS
    v32[_DF] = 0xffffffff if flags & 0x400 else 1
