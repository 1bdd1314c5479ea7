# SPDX-License-Identifier: GPL-2.0-only
"""The state of scripted vCPUs."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pyxen.errors import InternalError
from pyxen.machine.cpu.base import HvmRegisters, Registers
from pyxen.machine.cpu.scripted_steps import Step

if TYPE_CHECKING:
    from pyxen.machine.cpu.scripted import ScriptedCpu

_U64 = (1 << 64) - 1

NATIVE_MSRS = frozenset((0x174, 0x175, 0x176, *range(0xc0000081, 0xc0000085), *range(0xc0000100, 0xc0000104)))
"""Those that a real engine holds."""

Script = Callable[["ScriptedCpu"], Generator[Step, Any, None]]


@dataclass
class ScriptedContext:
    """Registers of one scripted vCPU and where its script is."""

    script: Script | None
    registers: Registers
    engine: ScriptedCpu | None = None
    generator: Generator[Step, Any, None] | None = None
    step: Step | None = None
    value: Any = None
    awaits_rax: bool = False
    finished: bool = False
    debug: list[int] = field(default_factory=lambda: [0, 0, 0, 0, 0, 0, 0xffff0ff0, 0x400])

    def get(self) -> Registers:
        """A copy of the registers. Raises InternalError while a CPU holds them."""
        if self.engine is not None:
            raise InternalError("the context is loaded on a CPU: its registers are there")
        r = self.registers
        return Registers(list(r.gpr), r.flags, list(r.selectors), list(r.bases), r.cr2, r.cr3, r.fxsave)

    def put(self, registers: Registers) -> None:
        """Replace the registers. Raises InternalError while a CPU holds them."""
        if self.engine is not None:
            raise InternalError("the context is loaded on a CPU: its registers are there")
        r = registers
        gpr = [value & _U64 for value in r.gpr]
        self.registers = Registers(gpr, r.flags, list(r.selectors), list(r.bases), r.cr2, r.cr3, r.fxsave)


@dataclass
class ScriptedHvmContext(ScriptedContext):
    """A scripted vCPU under nested paging: the rest of HvmRegisters is kept as it was put, and what waits for it."""

    hvm: HvmRegisters = field(kw_only=True)
    nested_root: int = field(kw_only=True)
    window: bool = False
    nmi: bool = False
    cr8: int = 0
    interrupt: int | None = None
    exception: tuple[int, int | None] | None = None

    def get_hvm(self) -> HvmRegisters:
        """A copy of the registers. Raises InternalError while a CPU holds them."""
        r, h = self.get(), self.hvm
        segments = [replace(segment, selector=r.selectors[n]) for n, segment in enumerate(h.segments)]
        segments[4].base, segments[5].base = r.bases[4], r.bases[5]
        msrs = {**h.msrs, 0xc0000100: r.bases[4], 0xc0000101: r.bases[5]}
        return replace(h, gpr=r.gpr, flags=r.flags, segments=segments, ldtr=replace(h.ldtr), tr=replace(h.tr),
                       cr2=r.cr2, cr3=r.cr3, dr=list(self.debug), msrs=msrs, fxsave=r.fxsave)

    def put_hvm(self, registers: HvmRegisters) -> None:
        """Replace the registers. Raises InternalError while a CPU holds them, or for a state no CPU can be in."""
        r = registers
        if (len(r.gpr), len(r.segments), len(r.dr), len(r.fxsave)) != (17, 6, 8, 512) or set(r.msrs) != NATIVE_MSRS:
            raise InternalError("register file of the wrong shape")
        long = r.efer & 0x100 and r.cr0 >> 31 & 1
        if r.cr0 & 0x80000001 == 0x80000000 or bool(r.efer & 0x400) != bool(long) or (long and not r.cr4 & 0x20):
            raise InternalError("CR0, CR4 and EFER contradict each other")
        bases = [segment.base for segment in r.segments]
        self.put(Registers(r.gpr, r.flags, [segment.selector for segment in r.segments], bases, r.cr2, r.cr3, r.fxsave))
        self.debug = list(r.dr)
        self.hvm = replace(r, segments=[replace(segment) for segment in r.segments], ldtr=replace(r.ldtr),
                           tr=replace(r.tr), msrs=dict(r.msrs))

    def paging(self) -> tuple[int, int, int, int]:
        """CR0, CR3, CR4 and EFER."""
        h = self.hvm
        return h.cr0, self.get().cr3, h.cr4, h.efer

    def saved_flags(self) -> int:
        """RFLAGS."""
        return self.get().flags

    def set_nested_root(self, maddr: int) -> None:
        """From the next load on."""
        if self.engine is not None:
            raise InternalError("the context is loaded on a CPU")
        self.nested_root = maddr
