# SPDX-License-Identifier: GPL-2.0-only
"""What scripts of the :class:`~pyxen.machine.cpu.scripted.ScriptedCpu` are made of."""

from __future__ import annotations

from dataclasses import dataclass

from pyxen.errors import InternalError
from pyxen.machine.cpu.base import GPR_NAMES


class _Registers:
    """Register values given by name (``rax=29``)."""

    def __init__(self, **registers: int) -> None:
        for name in registers:
            if name not in GPR_NAMES or name == "rip":
                raise InternalError(f"a step sets unknown register {name!r}")
        self.registers = registers


class Syscall(_Registers):
    """SYSCALL with these registers; the yield's value is RAX afterwards."""


class Set(_Registers):
    """Plain moves into registers."""


@dataclass(frozen=True)
class Fault:
    """An exception at this step; ``software`` for INT n. The yield's value is the RIP that the handler chose."""

    vector: int
    error_code: int | None = None
    cr2: int | None = None
    software: bool = False


@dataclass(frozen=True)
class Cpuid:
    """CPUID with EAX = ``leaf``, ECX = ``subleaf``; the yield's value is (EAX, EBX, ECX, EDX)."""

    leaf: int
    subleaf: int = 0


@dataclass(frozen=True)
class Store:
    """Write ``data`` at a machine address (the guest's own store: engines are not told, as for real stores)."""

    maddr: int
    data: bytes


@dataclass(frozen=True)
class Load:
    """Read machine memory; the yield's value is the bytes."""

    maddr: int
    size: int


@dataclass(frozen=True)
class Spin:
    """Run until kicked, once."""


class Hypercall(_Registers):
    """VMCALL with these registers, under nested paging; the yield's value is RAX afterwards."""


@dataclass(frozen=True)
class NestedFault:
    """A nested fault; the step is over when the handler returns (the retry succeeds). The yield's value is None."""

    gpa: int
    error_code: int = 1 << 32 | 4


@dataclass(frozen=True)
class In:
    """IN; the yield's value is what was read."""

    port: int
    size: int = 1


@dataclass(frozen=True)
class Out:
    """OUT."""

    port: int
    value: int
    size: int = 1


@dataclass(frozen=True)
class MmioRead:
    """A load from the MMIO window; the yield's value is what was read."""

    offset: int
    size: int = 4


@dataclass(frozen=True)
class MmioWrite:
    """A store into the MMIO window."""

    offset: int
    value: int
    size: int = 4


@dataclass(frozen=True)
class ReadMsr:
    """RDMSR; the yield's value is the register, None after #GP. Native ones do not trap."""

    number: int


@dataclass(frozen=True)
class WriteMsr:
    """WRMSR; the yield's value is False after #GP. Native ones do not trap."""

    number: int
    value: int


@dataclass(frozen=True)
class WriteCr:
    """MOV to CR0, 4 or 8; the yield's value is False after #GP."""

    number: int
    value: int


@dataclass(frozen=True)
class Halt:
    """HLT."""


@dataclass(frozen=True)
class Pause:
    """PAUSE: traps only while :meth:`ScriptedCpu.set_pause_exits` is on."""


@dataclass(frozen=True)
class TripleFault:
    """The guest shuts itself down."""


@dataclass(frozen=True)
class Intercept:
    """Any other exit, by SVM's code."""

    code: int
    info: int = 0


HvmStep = (Hypercall | NestedFault | In | Out | MmioRead | MmioWrite | ReadMsr | WriteMsr | WriteCr | Halt | TripleFault
           | Intercept)
Step = Syscall | Set | Fault | Cpuid | Store | Load | Spin | Pause | HvmStep
