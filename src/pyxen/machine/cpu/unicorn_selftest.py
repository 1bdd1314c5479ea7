# SPDX-License-Identifier: GPL-2.0-only
"""Start-up check that this Unicorn is the one :mod:`unicorn_internals` describes.

Values are planted through Unicorn's public API and must turn up at our offsets; the sticky stop must stop; a guest
under nested paging must take its exception itself, once, although its stack is granted only when that is needed.
About twenty milliseconds.
"""

from __future__ import annotations

import ctypes
import struct
from typing import Any, NamedTuple

from pyxen.errors import EngineError
from pyxen.machine.cpu import unicorn_hvm as hvm
from pyxen.machine.cpu import unicorn_internals as ui
from pyxen.machine.cpu.base import GPR_NAMES
from pyxen.machine.cpu.unicorn_hvm_context import MSR_OFFSETS, UnicornHvmContext

_SENTINEL = 0x5a5a_0000_1234_0000
_MTRR_DEFTYPE = 0x2ff


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
    for number, offset in (*MSR_OFFSETS.items(), (_MTRR_DEFTYPE, ui.MTRR_DEFTYPE)):
        uc.reg_write(x86.UC_X86_REG_MSR, (number, 0x4321))
        if int.from_bytes(ctypes.string_at(state.env + offset, 2), "little") != 0x4321:
            raise ui.unknown_build(f"MSR {number:#x} is not at env+{offset:#x}")
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
    _check_nested(lib)


def _check_nested(lib: ui.Library) -> None:
    """UD2 in flat mode whose stack page is missing in the nested tables; the handler makes a hypercall."""
    uc, state = _engine(lib)
    uc.mem_map(0x1000, 0xf000)
    state.no_exit_request[0] = 1
    page = 0x1000
    code, handler, idt, gdt, stack, block, root = (page * n for n in (1, 2, 3, 4, 6, 8, 9))
    uc.mem_write(code, bytes.fromhex("0f0b"))
    uc.mem_write(handler, bytes.fromhex("0f01c1"))
    uc.mem_write(idt + 8 * 6, (handler | 8 << 16 | 0x8e << 40).to_bytes(8, "little"))
    uc.mem_write(gdt + 8, bytes.fromhex("ffff0000009bcf00"))
    for level in range(3):
        uc.mem_write(root + level * page, (root + (level + 1) * page | 7).to_bytes(8, "little"))
    table = [n * page | 7 if n * page != stack else 0 for n in range(16)]
    uc.mem_write(root + 3 * page, struct.pack("<16Q", *table))
    private = ctypes.create_string_buffer(page)
    exits: list[tuple[int, int, int]] = []
    block64, failures = memoryview(private).cast("B").cast("Q"), []

    def on_exit(_uc: int, vector: int, _data: int) -> None:
        try:
            exits.append((vector, state.gpr[16], block64[hvm.EXIT_INFO_2 >> 3]))
            if vector == hvm.EXIT + hvm.EXIT_NPF and len(exits) == 1:
                uc.mem_write(root + 3 * page + 8 * (stack >> 12), (stack | 7).to_bytes(8, "little"))
                state.interrupt_request[2] = ui.INTERRUPT_EVENT >> 16
                return
        except BaseException as error:
            failures.append(error)
        state.interrupt_request[0] = ui.INTERRUPT_HALT

    callback = ui.HOOK_INTR(on_exit)
    for at in (hvm.ON_EXCEPTION, hvm.ON_INVALID, hvm.ON_EXIT):
        block64[at >> 3] = ctypes.cast(callback, ctypes.c_void_p).value or 0
    host = ctypes.addressof(private)
    uc.mem_unmap(block, page)
    uc.mem_map_ptr(block, page, lib.unicorn.UC_PROT_READ | lib.unicorn.UC_PROT_WRITE, host)
    ctypes.c_uint64.from_address(state.env + ui.MTRR_DEFTYPE).value = host
    hooks = ((lib.unicorn.UC_HOOK_INTR, lib.hvm.on_interrupt), (lib.unicorn.UC_HOOK_INSN_INVALID, lib.hvm.on_invalid))
    for kind, address in hooks:
        lib.hook_add(uc._uch, ctypes.byref(ctypes.c_size_t()), ctypes.c_int(kind), ctypes.c_void_p(address),
                     ctypes.c_void_p(host), ctypes.c_uint64(1), ctypes.c_uint64(0))
    context = UnicornHvmContext(ctypes.string_at(state.env, ui.CONTEXT_SIZE), block, root, lib)
    registers = context.get_hvm()
    registers.gdtr, registers.idtr = (gdt, 0xf), (idt, 0x7ff)
    registers.gpr[16], registers.gpr[4] = code, stack + 0x800
    context.put_hvm(registers)
    ctypes.memmove(state.env, context.buffer, ui.CONTEXT_SIZE)
    lib.tlb_flush(state.cpu)
    status = lib.emu_start(uc._uch, code, 0xffff, 0, 0)
    expected = [(hvm.EXIT + hvm.EXIT_NPF, code, stack + 0x7fc),
                (hvm.EXIT + hvm.EXIT_VMMCALL, handler, stack + 0x7fc)]
    if failures:
        raise failures[0]
    if status or exits != expected or state.gpr[4] != stack + 0x800 - 12:
        raise ui.unknown_build("a guest under nested paging does not take its own exceptions")
