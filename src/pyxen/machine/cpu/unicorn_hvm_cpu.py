# SPDX-License-Identifier: GPL-2.0-only
"""The part of :class:`~pyxen.machine.cpu.unicorn_x86.UnicornX86` that runs guests under nested paging (HvmCpu).

What happens natively, and why, is in :mod:`unicorn_hvm`; here are the exits that reach Python, and the state that such
guests have beyond what PV guests have.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from ctypes import c_uint64, c_void_p
from typing import TYPE_CHECKING, Any, cast

from pyxen.errors import EngineError, InternalError
from pyxen.machine.cpu import unicorn_hvm as hvm
from pyxen.machine.cpu import unicorn_internals as ui
from pyxen.machine.cpu.base import RAX, RCX, RDX, RIP, HvmTraps, Segment, Traps
from pyxen.machine.cpu.unicorn_hvm_context import (
    EFER_LMA,
    EFER_SVME,
    MSR_OFFSETS,
    UnicornHvmContext,
    read_msr,
    read_segment,
    write_msr,
)

if TYPE_CHECKING:
    from pyxen.machine.clock import Clock
    from pyxen.machine.cpu.unicorn_context import UnicornContext
    from pyxen.machine.memory import Memory

_U64 = (1 << 64) - 1
_U32 = 0xffffffff

MMIO_BASE = 0xff_0000_0000
"""Above any RAM, below 2^40: QEMU's limit for an address in a page-table entry."""
MMIO_PAGES = 256
_BLOCK = MMIO_BASE - 0x10000        # VMCB page, then the MSR permission map of two
_BLOCK_SIZE = 0x3000
_MSRPM = 0x1000
MEMORY_LIMIT = _BLOCK

_GP, _DF, _DB = 13, 8, 1
_CR0, _CR3, _CR4, _EFER = ui.CR0 >> 3, ui.CR3 >> 3, ui.CR4 >> 3, ui.EFER >> 3
_EFLAGS, _HFLAGS, _EVENT, _NMI = ui.EFLAGS >> 3, ui.HFLAGS >> 2, hvm.EVENT >> 2, hvm.NMI >> 2
_NEXT_RIP, _NO_SHADOW = hvm.NEXT_RIP >> 3, ~ui.HF_INHIBIT_IRQ
_IF, _VM = 0x200, 0x20000
_CONTRIBUTORY = frozenset((0, 10, 11, 12, 13))
_TF, _RF = 1 << 8, 1 << 16
_DR6_BS = 1 << 14


def _permissions() -> bytes:
    """The MSR permission map: two bits (read, write) an MSR, clear for those that do not leave."""
    bits = bytearray(b"\xff" * 0x1800)
    for number in MSR_OFFSETS:
        at = 2 * (number if number < 0x2000 else 0x2000 + (number - 0xc0000000))
        bits[at >> 3] &= ~(3 << (at & 7)) & 0xff
    return bytes(bits)


class HvmPart:
    """Mixed into the engine class, whose attributes it uses."""

    if TYPE_CHECKING:
        gpr: memoryview
        traps: Traps
        loaded: UnicornContext | None
        _lib: ui.Library
        _handle: Any
        _uc: Any
        _memory: Memory
        _state: ui.State
        _v32: memoryview
        _v64: memoryview
        _icount: memoryview
        _interrupt: memoryview
        exits_ns: int
        _clock: Clock
        _cpu: c_void_p
        _env: c_void_p
        _running: bool
        _blank: dict[int, bytes]
        _keep: list[Any]

        def _fail(self, error: BaseException) -> None: ...
        def stop(self) -> None: ...

    mmio_base = MMIO_BASE
    native_msrs = frozenset(MSR_OFFSETS)

    # --- construction ------------------------------------------------------------------------------------------------

    def _map_block(self, uc: Any, unicorn: Any) -> None:
        """Before the first hook: the VMCB page and its neighbours, above RAM."""
        self._block_memory = mmap.mmap(-1, _BLOCK_SIZE)
        self._block_anchor = (ctypes.c_ubyte * _BLOCK_SIZE).from_buffer(self._block_memory)
        self._block_host = ctypes.addressof(self._block_anchor)
        self._block = block = memoryview(self._block_anchor).cast("B")
        self._block32, self._block64 = block.cast("I"), block.cast("Q")
        uc.mem_map_ptr(_BLOCK, _BLOCK_SIZE, unicorn.UC_PROT_READ | unicorn.UC_PROT_WRITE, self._block_host)
        block[_MSRPM:_MSRPM + 0x1800] = _permissions()
        self._block64[hvm.MSRPM_BASE >> 3] = _BLOCK + _MSRPM

    def _install_hvm_hooks(self, on_exception: Any, on_invalid: Any) -> None:
        """The native hooks, which call ``on_exception`` and ``on_invalid`` for PV guests; ports and the MMIO window."""
        unicorn = self._lib.unicorn
        x86 = unicorn.x86_const
        callbacks = (on_exception, on_invalid, ui.HOOK_INTR(self._make_exit_hook()))
        for at, callback in zip((hvm.ON_EXCEPTION, hvm.ON_INVALID, hvm.ON_EXIT), callbacks, strict=True):
            self._block64[at >> 3] = ctypes.cast(callback, c_void_p).value or 0
        c_uint64.from_address(self._state.env + ui.MTRR_DEFTYPE).value = self._block_host
        block = c_void_p(self._block_host)
        self._hook(unicorn.UC_HOOK_INTR, c_void_p(self._lib.hvm.on_interrupt), data=block)
        self._hook(unicorn.UC_HOOK_INSN_INVALID, c_void_p(self._lib.hvm.on_invalid), data=block)
        self._hook(unicorn.UC_HOOK_INSN, ui.HOOK_IN(self._make_in_hook()), x86.UC_X86_INS_IN)
        self._hook(unicorn.UC_HOOK_INSN, ui.HOOK_OUT(self._make_out_hook()), x86.UC_X86_INS_OUT)
        read, write = ui.MMIO_READ(self._make_mmio_read()), ui.MMIO_WRITE(self._make_mmio_write())
        status = self._lib.mmio_map(self._handle, MMIO_BASE, MMIO_PAGES << 12, ctypes.cast(read, c_void_p), None,
                                    ctypes.cast(write, c_void_p), None)
        if status:
            raise EngineError(f"the Unicorn engine refuses the MMIO window: error {status}")
        self._keep += [*callbacks, read, write]

    if TYPE_CHECKING:
        def _hook(self, kind: int, callback: Any, instruction: int | None = None, low: int = 1, high: int = 0,
                  data: Any = None) -> None: ...

    def set_dirty_map(self, frames: memoryview | None) -> None:
        """See :meth:`Cpu.set_dirty_map <pyxen.machine.cpu.base.Cpu.set_dirty_map>`."""
        if self._uc is None:
            return
        address = 0
        if frames is not None:
            if frames.nbytes << 12 < self._memory.size_bytes:
                raise InternalError("a dirty map that is smaller than RAM")
            address = ctypes.addressof(ctypes.c_ubyte.from_buffer(frames))
            if not any(kept is frames for kept in self._keep):
                self._keep.append(frames)                  # generated code may be in the middle of using it
        self._block64[hvm.DIRTY_MAP >> 3] = address        # one store, which generated code reads as one

    def _release_block(self) -> None:
        for view in (self._block32, self._block64, self._block):
            view.release()

    # --- callbacks ---------------------------------------------------------------------------------------------------

    def _make_in_hook(self) -> Any:
        def on_in(_uc: int, port: int, size: int, _data: int) -> int:
            try:
                return cast(HvmTraps, self.traps).io_read(port & 0xffff, size) & _U32
            except BaseException as error:
                self._fail(error)
                return _U32

        return on_in

    def _make_out_hook(self) -> Any:
        def on_out(_uc: int, port: int, size: int, value: int, _data: int) -> None:
            try:
                cast(HvmTraps, self.traps).io_write(port & 0xffff, size, value & (1 << 8 * size) - 1)
            except BaseException as error:
                self._fail(error)

        return on_out

    def _make_mmio_read(self) -> Any:
        def on_read(_uc: int, offset: int, size: int, _data: int) -> int:
            try:
                return cast(HvmTraps, self.traps).mmio_read(offset, size) & _U64
            except BaseException as error:
                self._fail(error)
                return _U64

        return on_read

    def _make_mmio_write(self) -> Any:
        def on_write(_uc: int, offset: int, size: int, value: int, _data: int) -> None:
            try:
                cast(HvmTraps, self.traps).mmio_write(offset, size, value & (1 << 8 * size) - 1)
            except BaseException as error:
                self._fail(error)

        return on_write

    def _make_exit_hook(self) -> Any:
        gpr, v32, block32, old_exception = self.gpr, self._v32, self._block32, self._state.old_exception
        exits: dict[int, Callable[[int], int]] = {
            hvm.EXIT_NPF: self._exit_nested_fault, hvm.EXIT_VMMCALL: self._exit_hypercall,
            hvm.EXIT_MSR: self._exit_msr, hvm.EXIT_HLT: self._exit_hlt, hvm.EXIT_PAUSE: self._exit_pause,
            hvm.EXIT_VINTR: self._exit_window, hvm.EXIT_SHUTDOWN: self._exit_shutdown,
            hvm.EXIT_WRITE_CR0: self._exit_write_cr0, hvm.EXIT_WRITE_CR0 + 4: self._exit_write_cr4,
            hvm.EXIT_WRITE_CR0 + 8: self._exit_write_cr8,
        }
        event_at, error_at = hvm.EVENT >> 2, ui.ERROR_CODE >> 2
        now_ns = self._clock.now_ns

        def on_exit(_uc: int, vector: int, _data: int) -> None:
            began = now_ns()
            old_exception[0] = -1
            try:
                code, rip = vector - hvm.EXIT, gpr[RIP]
                handler = exits.get(code)
                if handler is None:
                    gpr[RIP] = cast(HvmTraps, self.traps).intercept(code, v32[error_at], rip) & _U64
                else:
                    gpr[RIP] = handler(rip) & _U64
                if block32[event_at] & hvm.VALID:
                    self._request_event()
            except BaseException as error:
                self._fail(error)
            self.exits_ns += now_ns() - began

        return on_exit

    def _exit_nested_fault(self, rip: int) -> int:
        block = self._block
        bit = 1 << 33 if block[hvm.WALKING] else 1 << 32
        return cast(HvmTraps, self.traps).nested_fault(
            self._block64[hvm.EXIT_INFO_2 >> 3], self._v32[ui.ERROR_CODE >> 2] | bit, rip)

    def _executed(self) -> None:
        """The instruction counts as executed: its interrupt shadow and RF are over, and TF makes a trap."""
        self._v32[_HFLAGS] &= _NO_SHADOW
        eflags = self._v64[_EFLAGS]
        if eflags & (_TF | _RF):
            self._v64[ui.EFLAGS >> 3] = eflags & ~_RF
            if eflags & _TF and isinstance(self.loaded, UnicornHvmContext):
                self._v64[(ui.DR + 48) >> 3] |= _DR6_BS
                self.inject_exception(_DB, None)

    def _exit_hypercall(self, _rip: int) -> int:
        self._executed()
        return cast(HvmTraps, self.traps).hypercall(self._block64[_NEXT_RIP])

    def _exit_hlt(self, _rip: int) -> int:
        self._executed()
        return cast(HvmTraps, self.traps).halt(self._block64[_NEXT_RIP])

    def _exit_pause(self, _rip: int) -> int:
        self._executed()
        return cast(HvmTraps, self.traps).pause(self._block64[_NEXT_RIP])

    def _exit_window(self, rip: int) -> int:
        return cast(HvmTraps, self.traps).interrupt_window(rip)

    def _exit_shutdown(self, rip: int) -> int:
        self._block32[hvm.EVENT >> 2] = 0
        return cast(HvmTraps, self.traps).triple_fault(rip)

    def _exit_write_cr0(self, rip: int) -> int:
        return self._write_cr(0, rip)

    def _exit_write_cr4(self, rip: int) -> int:
        return self._write_cr(4, rip)

    def _exit_write_cr8(self, rip: int) -> int:
        return self._write_cr(8, rip)

    def _write_cr(self, number: int, rip: int) -> int:
        self._executed()
        next_rip = self._block64[_NEXT_RIP]
        if cast(HvmTraps, self.traps).write_cr(number, self._block64[hvm.CR_VALUE >> 3]):
            return next_rip
        self.inject_exception(_GP, 0)
        return rip

    def _exit_msr(self, rip: int) -> int:
        gpr, traps = self.gpr, cast(HvmTraps, self.traps)
        number = gpr[RCX] & _U32
        write = self._v32[ui.ERROR_CODE >> 2]
        self._executed()
        if write:
            done = traps.write_msr(number, (gpr[RDX] & _U32) << 32 | gpr[RAX] & _U32)
        else:
            value = traps.read_msr(number)
            done = value is not None
            if value is not None:
                gpr[RAX], gpr[RDX] = value & _U32, value >> 32 & _U32
        if done:
            return rip + 2
        self.inject_exception(_GP, 0)
        return rip

    # --- contexts ----------------------------------------------------------------------------------------------------

    def new_hvm_context(self, nested_root: int) -> UnicornHvmContext:
        """A context in flat 32-bit protected mode, as PVH's start of day wants it."""
        return UnicornHvmContext(self._blank[3], _BLOCK, nested_root, self._lib)

    def _load_events(self, context: UnicornHvmContext) -> None:
        """What waits for delivery, or was asked for, is the engine's from now on."""
        block32 = self._block32
        block32[_EVENT], block32[hvm.EVENT_ERROR >> 2] = context.event, context.event_error
        block32[_NMI] = context.nmi
        self._interrupt[1] = ui.INTERRUPT_VIRQ >> 8 if context.window else 0
        self._interrupt[2] = ui.INTERRUPT_EVENT >> 16 if context.event & hvm.VALID or context.nmi else 0
        context.event = 0
        context.nmi = context.window = False

    def _save_events(self, context: UnicornHvmContext) -> None:
        """What the engine still has of it goes back to the context."""
        block32 = self._block32
        context.event, context.event_error = block32[_EVENT], block32[hvm.EVENT_ERROR >> 2]
        context.nmi = block32[_NMI] != 0
        context.window = self._interrupt[1] != 0
        block32[_EVENT] = block32[_NMI] = 0
        self._interrupt[1] = self._interrupt[2] = 0

    def _has_events(self) -> bool:
        interrupt = self._interrupt
        return bool(interrupt[1] or interrupt[2] or self._block32[_EVENT] or self._block32[_NMI])

    def set_nested_root(self, maddr: int) -> None:
        """Run the loaded context under another root, and flush the TLB."""
        self._hvm()
        self._v64[ui.NESTED_CR3 >> 3] = maddr & _U64
        self._lib.tlb_flush(self._cpu)

    def _hvm(self) -> UnicornHvmContext:
        context = self.loaded
        if not isinstance(context, UnicornHvmContext):
            raise InternalError("no guest under nested paging is loaded")
        return context

    # --- registers ---------------------------------------------------------------------------------------------------

    def set_cr(self, number: int, value: int) -> None:
        """CR0, CR3, CR4 or CR8, with what follows from it."""
        self._hvm()
        if number == 0:
            self._lib.update_cr0(self._env, value & _U32)
        elif number == 3:
            self._v64[ui.CR3 >> 3] = value & _U64
            self._lib.tlb_flush(self._cpu)
        elif number == 4:
            self._lib.update_cr4(self._env, value & _U32)
        elif number == 8:
            self._state.env8[ui.V_TPR] = value & 0xf
        else:
            raise InternalError(f"CR{number} cannot be set")

    def get_cr(self, number: int) -> int:
        """CR0, 2, 3, 4 or 8."""
        if number == 8:
            return int(self._state.env8[ui.V_TPR])
        return int(self._v64[(ui.CR + 8 * number) >> 3])

    def set_efer(self, value: int) -> None:
        """EFER; LMA as given, SVME never."""
        self._hvm()
        changed = self.get_efer() ^ value
        self._v64[ui.EFER >> 3] = value & ~EFER_SVME & _U64
        hflags = self._v32[ui.HFLAGS >> 2] & ~ui.HF_LMA
        self._v32[ui.HFLAGS >> 2] = hflags | (ui.HF_LMA if value & EFER_LMA else 0)
        if changed:
            self._lib.tlb_flush(self._cpu)

    def get_efer(self) -> int:
        """EFER."""
        return int(self._v64[ui.EFER >> 3])

    def paging(self) -> tuple[int, int, int, int]:
        """CR0, CR3, CR4 and EFER."""
        v64 = self._v64
        return v64[_CR0], v64[_CR3], v64[_CR4], v64[_EFER]

    def code_bytes(self) -> int:
        """By the engine's summary of CR0, EFER and CS; RFLAGS.VM is not in it (HF_FROM_EFLAGS)."""
        hflags = self._v32[_HFLAGS]
        if not hflags & ui.HF_PE:
            return 0
        if self._v64[_EFLAGS] & _VM:
            return 1
        if hflags & ui.HF_CS64:
            return 8
        return 4 if hflags & ui.HF_CS32 else 2

    def interruptible(self) -> bool:
        """See :class:`~pyxen.machine.cpu.base.HvmCpu`."""
        return not (self._v32[_HFLAGS] & ui.HF_INHIBIT_IRQ or self._block32[_EVENT] & hvm.VALID
                    or self._block32[_NMI]) and bool(self._v64[_EFLAGS] & _IF)

    def get_msr(self, number: int) -> int:
        """A native MSR of the loaded context."""
        return read_msr(self._v64, self._v32, number)

    def set_msr(self, number: int, value: int) -> None:
        """Set a native MSR of the loaded context; the caller has checked the value."""
        write_msr(self._v64, self._v32, number, value)

    def segment(self, seg: int) -> Segment:
        """A segment register with its hidden part."""
        return read_segment(self._v64, self._v32, ui.SEGS + ui.SEG_SIZE * seg)

    # --- events ------------------------------------------------------------------------------------------------------

    def _request_event(self) -> None:
        self._interrupt[2] = ui.INTERRUPT_EVENT >> 16
        self._icount[0] = 0xffff

    def inject_exception(self, vector: int, error_code: int | None) -> None:
        """The guest takes this exception at the address that the handler returns.

        When another event is still to be delivered (a nested fault interrupted it), the two become what hardware makes
        of them (Intel SDM volume 3, table 6-5): the newer one, a double fault, or a triple fault. An interrupt that
        waited is lost then, as in Xen; an NMI comes after.
        """
        self._hvm()
        if not 0 <= vector < 32:
            raise InternalError(f"vector {vector} is no exception")
        block32 = self._block32
        event = block32[hvm.EVENT >> 2]
        if event & hvm.VALID and event & hvm.TYPE_MASK == hvm.TYPE_EXCEPTION:
            first = event & 0xff
            if first == _DF:
                block32[hvm.EVENT >> 2] = 0
                self.gpr[RIP] = cast(HvmTraps, self.traps).triple_fault(self.gpr[RIP])
                return
            if (first in _CONTRIBUTORY and vector in _CONTRIBUTORY) or (
                    first == 14 and (vector in _CONTRIBUTORY or vector == 14)):
                vector, error_code = _DF, 0
        elif event & hvm.VALID and event & hvm.TYPE_MASK == hvm.TYPE_NMI:
            block32[hvm.NMI >> 2] = 1
            self._v32[ui.HFLAGS2 >> 2] &= ~ui.HF2_NMI
        block32[hvm.EVENT_ERROR >> 2] = (error_code or 0) & _U32
        block32[hvm.EVENT >> 2] = hvm.VALID | hvm.TYPE_EXCEPTION | vector
        self._request_event()

    def inject_nmi(self) -> None:
        """Vector 2, as soon as no other NMI is being handled."""
        self._hvm()
        self._block32[hvm.NMI >> 2] = 1
        self._request_event()

    def request_interrupt_window(self, on: bool) -> None:
        """Leave for :meth:`HvmTraps.interrupt_window` as soon as the guest can take an interrupt."""
        self._hvm()
        self._interrupt[1] = ui.INTERRUPT_VIRQ >> 8 if on else 0
        if on:
            self._icount[0] = 0xffff

    def inject_interrupt(self, vector: int) -> None:
        """In :meth:`HvmTraps.interrupt_window`, or while :meth:`interruptible`: the guest takes this interrupt before
        its next instruction."""
        self._hvm()
        if self._block32[hvm.EVENT >> 2] & hvm.VALID:
            raise InternalError("an interrupt while another event waits")
        self._block32[hvm.EVENT >> 2] = hvm.VALID | hvm.TYPE_INTERRUPT | vector & 0xff
        self._request_event()

    def set_pause_exits(self, on: bool) -> None:
        """Leave for :meth:`HvmTraps.pause` at each PAUSE."""
        self._block32[hvm.PAUSE_EXITS >> 2] = on
