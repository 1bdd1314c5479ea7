# SPDX-License-Identifier: GPL-2.0-only
"""The scripted CPU with the registers of a guest under nested paging: enough of HvmCpu for a hypervisor to be driven a
trap at a time. Nothing is translated and nothing is delivered; what was asked for is in the journal."""

from __future__ import annotations

from dataclasses import dataclass, field

from pyxen.errors import InternalError
from pyxen.machine.cpu.base import Context, HvmRegisters, Registers, Segment
from pyxen.machine.cpu.scripted import ScriptedContext, ScriptedCpu
from pyxen.machine.memory import Memory

NATIVE = frozenset((0x174, 0x175, 0x176, 0xC0000081, 0xC0000082, 0xC0000083, 0xC0000084, 0xC0000100, 0xC0000101,
                    0xC0000102, 0xC0000103))
FXSAVE = (0x37F).to_bytes(2, "little") + bytes(22) + (0x1F80).to_bytes(4, "little") + bytes(484)


def start_registers() -> HvmRegisters:
    data = Segment(0x10, 0, 0xFFFFFFFF, 0xC093)
    return HvmRegisters(
        gpr=[0] * 17, flags=2, segments=[data, Segment(8, 0, 0xFFFFFFFF, 0xC09B), data, data, data, data],
        ldtr=Segment(0, 0, 0, 0x82), tr=Segment(0, 0, 0x67, 0x8B), gdtr=(0, 0), idtr=(0, 0), cr0=0x11, cr2=0, cr3=0,
        cr4=0, efer=0, dr=[0] * 8, msrs=dict.fromkeys(NATIVE, 0), fxsave=FXSAVE)


@dataclass
class HvmScriptedContext(ScriptedContext):
    """Also holds what the plain one has no room for."""

    hvm: HvmRegisters = field(default_factory=start_registers)
    root: int = 0

    def get_hvm(self) -> HvmRegisters:
        r = self.get()
        self.hvm.gpr, self.hvm.flags, self.hvm.cr2 = r.gpr, r.flags, r.cr2
        return self.hvm

    def put_hvm(self, registers: HvmRegisters) -> None:
        if registers.cr0 >> 31 & 1 and not registers.cr0 & 1:
            raise InternalError("paging without protection")
        if set(registers.msrs) != NATIVE:
            raise InternalError("the MSRs are not the native ones")
        r = registers
        self.hvm = registers
        self.put(Registers(r.gpr, r.flags, [s.selector for s in r.segments], [s.base for s in r.segments], r.cr2, r.cr3,
                           r.fxsave))

    def paging(self) -> tuple[int, int, int, int, int]:
        return self.hvm.cr0, self.hvm.cr3, self.hvm.cr4, self.hvm.efer, self.get().flags

    def set_nested_root(self, maddr: int) -> None:
        self.root = maddr


class HvmScriptedCpu(ScriptedCpu):
    """See the module's text."""

    native_msrs = NATIVE

    def __init__(self, memory: Memory, *rest: object, **more: object) -> None:
        super().__init__(memory, *rest, **more)  # type: ignore[arg-type]
        self.mmio_base = 0xFF_0000_0000

    def _hvm(self) -> HvmRegisters:
        assert isinstance(self.loaded, HvmScriptedContext)
        return self.loaded.hvm

    def new_hvm_context(self, nested_root: int) -> HvmScriptedContext:
        plain = self.new_context(cpl=0)
        context = HvmScriptedContext(None, plain.registers)
        context.put_hvm(start_registers())
        context.root = nested_root
        return context

    def load(self, context: Context) -> None:
        super().load(context)
        self._cpl = 0

    def set_nested_root(self, maddr: int) -> None:
        self.journal.append(("root", maddr))

    def set_cr(self, number: int, value: int) -> None:
        r = self._hvm()
        if number == 0:
            r.cr0 = value
            if r.efer & 0x100:
                r.efer = r.efer | 0x400 if value >> 31 & 1 else r.efer & ~0x400
        elif number == 3:
            r.cr3 = value
        elif number == 4:
            r.cr4 = value
        self.journal.append(("cr", number, value))

    def get_cr(self, number: int) -> int:
        r = self._hvm()
        return {0: r.cr0, 2: self.cr2, 3: r.cr3, 4: r.cr4}.get(number, 0)

    def set_efer(self, value: int) -> None:
        self._hvm().efer = value

    def get_efer(self) -> int:
        return self._hvm().efer

    def get_msr(self, number: int) -> int:
        return self._hvm().msrs[number]

    def set_msr(self, number: int, value: int) -> None:
        self._hvm().msrs[number] = value

    def segment(self, seg: int) -> Segment:
        return self._hvm().segments[seg]

    def inject_exception(self, vector: int, error_code: int | None) -> None:
        self.journal.append(("exception", vector, error_code))

    def inject_nmi(self) -> None:
        self.journal.append(("nmi",))

    def request_interrupt_window(self, on: bool) -> None:
        self.journal.append(("window", on))

    def inject_interrupt(self, vector: int) -> None:
        self.journal.append(("interrupt", vector))

    def set_pause_exits(self, on: bool) -> None:
        self.journal.append(("pause", on))
