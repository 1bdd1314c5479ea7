# SPDX-License-Identifier: GPL-2.0-only
"""The part of :class:`~pyxen.machine.cpu.scripted.ScriptedCpu` that plays guests under nested paging (HvmCpu)."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, cast

from pyxen.errors import InternalError
from pyxen.machine.cpu.base import RAX, RCX, RDX, HvmRegisters, HvmTraps, Registers, Segment, Traps
from pyxen.machine.cpu.scripted_context import NATIVE_MSRS, Script, ScriptedContext, ScriptedHvmContext
from pyxen.machine.cpu.scripted_steps import (
    Halt,
    HvmStep,
    Hypercall,
    In,
    Intercept,
    MmioRead,
    MmioWrite,
    NestedFault,
    Out,
    ReadMsr,
    TripleFault,
    WriteCr,
    WriteMsr,
)

_U32 = 0xffffffff
_IF = 0x200
_VM = 0x20000
_GP = 13
_CODE, _DATA, _BUSY_TSS, _LDT = 0xc09b, 0xc093, 0x8b, 0x82
FXSAVE_RESET = (0x37f).to_bytes(2, "little") + bytes(22) + (0x1f80).to_bytes(4, "little") + bytes(484)


def start_of_day() -> HvmRegisters:
    """Flat 32-bit protected mode, as every HvmCpu starts a context."""
    data = Segment(0x10, 0, _U32, _DATA)
    segments = [Segment(data.selector, data.base, data.limit, data.attributes) for _ in range(6)]
    segments[1] = Segment(0x08, 0, _U32, _CODE)
    return HvmRegisters(
        gpr=[0] * 17, flags=2, segments=segments, ldtr=Segment(attributes=_LDT),
        tr=Segment(limit=0x67, attributes=_BUSY_TSS), gdtr=(0, 0), idtr=(0, 0), cr0=0x11, cr2=0, cr3=0, cr4=0, efer=0,
        dr=[0, 0, 0, 0, 0, 0, 0xffff0ff0, 0x400], msrs=dict.fromkeys(NATIVE_MSRS, 0), fxsave=FXSAVE_RESET)


class ScriptedHvm:
    """Mixed into the scripted CPU, whose attributes it uses."""

    if TYPE_CHECKING:
        gpr: memoryview
        flags: int
        cr2: int
        fs_base: int
        gs_base: int
        traps: Traps
        loaded: ScriptedContext | None
        journal: deque[tuple[object, ...]]
        _cr3: int
        _selectors: list[int]

        def _context(self) -> ScriptedContext: ...

    mmio_base = 0xff_0000_0000
    native_msrs = NATIVE_MSRS
    _pause_exits = False

    def new_hvm_context(self, nested_root: int, script: Script | None = None) -> ScriptedHvmContext:
        """A context in flat 32-bit protected mode; ``.script`` may be assigned later."""
        blank = Registers([0] * 17, 2, [0] * 6, [0] * 6, 0, 0, FXSAVE_RESET)
        context = ScriptedHvmContext(script, blank, hvm=start_of_day(), nested_root=nested_root)
        context.put_hvm(context.hvm)
        return context

    def _hvm(self) -> ScriptedHvmContext:
        context = self._context()
        if not isinstance(context, ScriptedHvmContext):
            raise InternalError("no guest under nested paging is loaded")
        return context

    # --- state -------------------------------------------------------------------------------------------------------

    def set_nested_root(self, maddr: int) -> None:
        """Recorded."""
        self._hvm().nested_root = maddr
        self.journal.append(("nested_root", maddr))

    def set_cr(self, number: int, value: int) -> None:
        """CR0, CR3, CR4 or CR8; EFER.LMA follows CR0.PG and EFER.LME."""
        hvm = self._hvm().hvm
        if number == 0:
            hvm.cr0 = value & _U32 | 0x10
            hvm.efer = hvm.efer & ~0x400 | (0x400 if value >> 31 & 1 and hvm.efer & 0x100 else 0)
        elif number == 3:
            self._cr3 = value
        elif number == 4:
            hvm.cr4 = value & _U32
        elif number == 8:
            self._hvm().cr8 = value & 0xf
        else:
            raise InternalError(f"CR{number} cannot be set")
        self.journal.append(("cr", number, value))

    def get_cr(self, number: int) -> int:
        """CR0, 2, 3, 4 or 8."""
        context = self._hvm()
        return {0: context.hvm.cr0, 2: self.cr2, 3: self._cr3, 4: context.hvm.cr4, 8: context.cr8}[number]

    def set_efer(self, value: int) -> None:
        """EFER, but for SVME."""
        self._hvm().hvm.efer = value & ~0x1000

    def get_efer(self) -> int:
        """EFER."""
        return self._hvm().hvm.efer

    def paging(self) -> tuple[int, int, int, int]:
        """CR0, CR3, CR4 and EFER."""
        h = self._hvm().hvm
        return h.cr0, self._cr3, h.cr4, h.efer

    def code_bytes(self) -> int:
        """By CR0, RFLAGS, EFER and CS."""
        h = self._hvm().hvm
        attributes = h.segments[1].attributes
        if not h.cr0 & 1:
            return 0
        if self.flags & _VM:
            return 1
        if h.efer & 0x400 and attributes & 0x2000:
            return 8
        return 4 if attributes & 0x4000 else 2

    def interruptible(self) -> bool:
        """RFLAGS.IF, and nothing else waits."""
        context = self._hvm()
        return bool(self.flags & _IF) and context.exception is None and context.interrupt is None

    def get_msr(self, number: int) -> int:
        """A native MSR."""
        if number not in NATIVE_MSRS:
            raise InternalError(f"MSR {number:#x} is not one of the engine's")
        return {0xc0000100: self.fs_base, 0xc0000101: self.gs_base}.get(number, self._hvm().hvm.msrs[number])

    def set_msr(self, number: int, value: int) -> None:
        """Set a native MSR."""
        if number not in NATIVE_MSRS:
            raise InternalError(f"MSR {number:#x} is not one of the engine's")
        if number == 0xc0000100:
            self.fs_base = value
        elif number == 0xc0000101:
            self.gs_base = value
        self._hvm().hvm.msrs[number] = value

    def segment(self, seg: int) -> Segment:
        """A segment register; the bases of FS and GS are live."""
        kept = self._hvm().hvm.segments[seg]
        base = {4: self.fs_base, 5: self.gs_base}.get(seg, kept.base)
        return Segment(self._selectors[seg], base, kept.limit, kept.attributes)

    # --- events ------------------------------------------------------------------------------------------------------

    def inject_exception(self, vector: int, error_code: int | None) -> None:
        """Taken, and recorded, before the next step."""
        self._hvm().exception = (vector, error_code)

    def inject_nmi(self) -> None:
        """Taken, and recorded, before the next step."""
        self._hvm().nmi = True

    def request_interrupt_window(self, on: bool) -> None:
        """Before the next step that finds IF set."""
        self._hvm().window = on

    def inject_interrupt(self, vector: int) -> None:
        """Taken, and recorded, before the next step."""
        context = self._hvm()
        if context.interrupt is not None or context.exception is not None:
            raise InternalError("an interrupt while another event waits")
        context.interrupt = vector

    def set_pause_exits(self, on: bool) -> None:
        """Whether Pause steps trap; a load turns it off."""
        self._pause_exits = on

    def _take_events(self, context: ScriptedHvmContext, rip: int) -> int:
        """Between two steps: what waits; returns where the guest is then. The handlers of scripts are not scripts:
        an event that was taken is only recorded."""
        if context.window and self.flags & _IF and context.exception is None and context.interrupt is None:
            rip = cast(HvmTraps, self.traps).interrupt_window(rip)
            if self.loaded is not context:
                return rip
        if context.exception is not None:
            self.journal.append(("exception", *context.exception))
            context.exception = None
        if context.nmi:
            self.journal.append(("nmi",))
            context.nmi = False
        if context.interrupt is not None:
            self.journal.append(("interrupt", context.interrupt))
            context.interrupt = None
        return rip

    # --- steps -------------------------------------------------------------------------------------------------------

    def _hvm_step(self, step: HvmStep, rip: int, following: int) -> tuple[int, Any]:
        """Take a step of a guest under nested paging; returns (next RIP, value of the yield)."""
        self._hvm()
        traps, gpr = cast(HvmTraps, self.traps), self.gpr
        match step:
            case Hypercall():
                return traps.hypercall(following), None
            case NestedFault():
                target = traps.nested_fault(step.gpa, step.error_code, rip)
                return following if target == rip else target, None
            case In():
                return following, traps.io_read(step.port, step.size)
            case Out():
                traps.io_write(step.port, step.size, step.value)
                return following, None
            case MmioRead():
                return following, traps.mmio_read(step.offset, step.size)
            case MmioWrite():
                traps.mmio_write(step.offset, step.size, step.value)
                return following, None
            case ReadMsr():
                if step.number in NATIVE_MSRS:
                    return following, self.get_msr(step.number)
                gpr[RCX] = step.number
                value = traps.read_msr(step.number)
                if value is None:
                    self.inject_exception(_GP, 0)
                else:
                    gpr[RAX], gpr[RDX] = value & _U32, value >> 32 & _U32
                return following, value
            case WriteMsr():
                if step.number in NATIVE_MSRS:
                    self.set_msr(step.number, step.value)
                    return following, True
                gpr[RCX], gpr[RAX], gpr[RDX] = step.number, step.value & _U32, step.value >> 32 & _U32
                return following, self._or_fault(traps.write_msr(step.number, step.value))
            case WriteCr():
                return following, self._or_fault(traps.write_cr(step.number, step.value))
            case Halt():
                return traps.halt(following), None
            case TripleFault():
                return traps.triple_fault(rip), None
            case Intercept():
                target = traps.intercept(step.code, step.info, rip)
                return following if target == rip else target, None

    def _or_fault(self, done: bool) -> bool:
        if not done:
            self.inject_exception(_GP, 0)
        return done
