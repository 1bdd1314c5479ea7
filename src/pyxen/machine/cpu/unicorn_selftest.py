# SPDX-License-Identifier: GPL-2.0-only
"""Start-up check that this Unicorn is the one :mod:`unicorn_internals` describes.

Values are planted through Unicorn's public API and must turn up at our offsets; the sticky stop must stop. About ten
milliseconds.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

from pyxen.errors import EngineError
from pyxen.machine.cpu import unicorn_internals as ui
from pyxen.machine.cpu.base import GPR_NAMES

_SENTINEL = 0x5a5a_0000_1234_0000


class Probe(NamedTuple):
    """A throw-away engine and the windows into it."""

    uc: Any
    state: ui.State


def _engine(lib: ui.Library) -> Probe:
    unicorn = lib.unicorn
    x86 = unicorn.x86_const
    try:
        uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
        uc.ctl_set_cpu_model(x86.UC_CPU_X86_EPYC)
        uc.mem_map(0, 0x1000)
        uc.reg_read(x86.UC_X86_REG_RAX)
    except unicorn.UcError as error:
        raise EngineError(f"the Unicorn engine does not start: {error}") from error
    return Probe(uc, ui.State(lib, uc._uch.value))


def check_layout(lib: ui.Library) -> Probe:
    """Before anything is patched. Raises EngineError if a field is not where it should be."""
    probe = uc, state = _engine(lib)
    _check_registers(state, uc, lib.unicorn.x86_const)
    if int.from_bytes(ctypes.string_at(state.env + ui.UC_POINTER, 8), "little") != state.uc:
        raise ui.unknown_build("env.uc is elsewhere")
    if int.from_bytes(ctypes.string_at(state.cpu + ui.CPU_UC, 8), "little") != state.uc:
        raise ui.unknown_build("cpu.uc is elsewhere")
    return probe


def _check_registers(state: ui.State, uc: Any, x86: Any) -> None:
    probes = [(name.upper(), ui.GPR + 8 * index, 8) for index, name in enumerate(GPR_NAMES)]
    probes += [(f"DR{n}", ui.DR + 8 * n, 8) for n in range(4)]
    probes += [("FS_BASE", ui.SEGS + 4 * ui.SEG_SIZE + 8, 8), ("GS_BASE", ui.SEGS + 5 * ui.SEG_SIZE + 8, 8),
               ("CR2", ui.CR2, 8), ("FPCW", ui.FPUC, 2), ("MXCSR", ui.MXCSR, 4), ("XMM1", ui.XMM + ui.XMM_SIZE, 16)]
    for number, (name, offset, size) in enumerate(probes):
        value = {2: 0x0a5b, 4: 0x1fa5}.get(size, _SENTINEL + number)
        if size == 16:
            value |= (_SENTINEL ^ 0xffff) << 64
        uc.reg_write(getattr(x86, f"UC_X86_REG_{name}"), value)
        found = int.from_bytes(state.env8[offset:offset + size], "little")
        if found != value:
            raise ui.unknown_build(f"{name} is not at env+{offset:#x}")
    uc.reg_write(x86.UC_X86_REG_GDTR, (0, _SENTINEL, 0xfed, 0))
    if state.env64[(ui.GDT + 8) >> 3] != _SENTINEL or state.env32[(ui.GDT + 16) >> 2] != 0xfed:
        raise ui.unknown_build("GDTR is elsewhere")
    if state.old_exception[0] != -1 or state.env64[ui.CR0 >> 3] != uc.reg_read(x86.UC_X86_REG_CR0):
        raise ui.unknown_build("old_exception or CR0 is elsewhere")
    uc.reg_write(x86.UC_X86_REG_EFLAGS, 0x246)
    if state.env64[ui.EFLAGS >> 3] & 0x246 != 0x246:
        raise ui.unknown_build("EFLAGS is elsewhere")


def check_patches(lib: ui.Library) -> None:
    """After patching. Raises EngineError if a pending stop does not stop."""
    uc, state = _engine(lib)
    uc.mem_write(0, b"\x48\xff\xc0\xf4")                   # inc rax; hlt
    state.gpr[0] = 5
    state.interrupt_request[0] = ui.INTERRUPT_HALT
    for expected in (5, 6):
        if lib.emu_start(uc._uch, 0, 0xffff, 0, 0) or state.gpr[0] != expected or state.interrupt_request[0]:
            raise ui.unknown_build("a pending stop does not stop a run before its first instruction")
