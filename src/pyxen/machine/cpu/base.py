# SPDX-License-Identifier: GPL-2.0-only
"""The seam between a hypervisor and the thing that executes guest instructions.

A :class:`Cpu` is a *physical* CPU: it sees all of machine memory at machine address 0 and executes
whatever :class:`Context` is loaded.  Hypercalls and faults do not end a run: the engine calls the
:class:`Traps` object in place, on its own thread, with the guest's registers live in
:attr:`Cpu.gpr`; that is what makes a hypercall cost a microsecond and not ten.  A trap handler that wants the CPU back
calls :meth:`Cpu.stop`.

Registers of the loaded context are read and written through the ``Cpu``; a context that is not loaded
anywhere is read and written through :meth:`Context.get` and :meth:`Context.put`.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol, runtime_checkable

from pyxen.errors import InternalError

# Indices into Cpu.gpr (hardware encoding order) and of RIP.
RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8, R9, R10, R11, R12, R13, R14, R15, RIP = range(17)
GPR_NAMES = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi",
             "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "rip")


class Seg(IntEnum):
    """Segment registers, hardware encoding order."""

    ES = 0
    CS = 1
    SS = 2
    DS = 3
    FS = 4
    GS = 5


class Exit(IntEnum):
    """Why :meth:`Cpu.run` returned."""

    KICK = 0
    """The deadline passed or another thread kicked; guest state is between two instructions."""
    STOP = 1
    """A trap handler called :meth:`Cpu.stop`."""
    ERROR = 2
    """The engine itself failed; :attr:`Cpu.error` says how. The context is lost."""


@dataclass(slots=True)
class Registers:
    """Architectural state of one vCPU, engine-independent.

    ``gpr`` holds RAX..R15 in hardware order and RIP (17 values). Selectors in ``Seg`` order; ``bases`` likewise
    (only FS and GS matter in long mode). ``fxsave`` is the 512-byte FXSAVE image. ``flags`` is RFLAGS.
    """

    gpr: list[int]
    flags: int
    selectors: list[int]
    bases: list[int]
    cr2: int
    cr3: int
    fxsave: bytes


class Context(Protocol):
    """Saved state of a vCPU that is not loaded on any engine."""

    def get(self) -> Registers:
        """Decode the saved state."""
        ...

    def put(self, registers: Registers) -> None:
        """Replace the saved state. Segment descriptors are flat 64-bit ones of the CPL chosen by
        :meth:`Cpu.new_context`."""
        ...


class Traps(Protocol):
    """What a hypervisor does when a guest leaves its own code.

    Every method runs on the engine's thread, with the guest's registers live, and returns the RIP to continue at.
    An exception that escapes a handler stops the run and is re-raised from :meth:`Cpu.run`.
    """

    def syscall(self, next_rip: int) -> int:
        """SYSCALL executed; ``next_rip`` is the address after it. RCX, R11, CS, SS are *not* changed yet by the
        engine."""
        ...

    def exception(self, vector: int, error_code: int | None, rip: int, software: bool) -> int:
        """A fault (``rip`` at the instruction) or, with ``software``, INT n/INT3/INTO (``rip`` after it).

        #UD arrives here too (vector 6). For #PF, :attr:`Cpu.cr2` holds the address. ``error_code`` is None for
        vectors that have none.
        """
        ...

    def cpuid(self, rip: int) -> int:
        """CPUID executed (XEN_EMULATE_PREFIX is #UD and never comes here); ``rip`` at the instruction.

        The handler sets RAX..RDX. The engine goes on behind the instruction whatever it returns, in the middle of a
        translated
        block: no change of flags, CPL, page tables or context here. :meth:`Cpu.stop` takes effect at the end of the
        block.
        """
        ...


class NoTraps:
    """What a CPU has before a hypervisor gives it handlers: any trap is a bug of ours."""

    def syscall(self, next_rip: int) -> int:
        """Raises InternalError."""
        raise InternalError(f"SYSCALL before {next_rip:#x}, and nobody to take it")

    def exception(self, vector: int, error_code: int | None, rip: int, software: bool) -> int:
        """Raises InternalError."""
        raise InternalError(f"exception {vector} at {rip:#x}, and nobody to take it")

    def cpuid(self, rip: int) -> int:
        """Raises InternalError."""
        raise InternalError(f"CPUID at {rip:#x}, and nobody to take it")


@runtime_checkable
class Cpu(Protocol):
    """A physical CPU. Unless a method says otherwise it may be called only by the thread that runs it."""

    index: int
    gpr: memoryview
    """Live registers of the loaded context, 17 unsigned 64-bit words: RAX..R15, RIP. RIP is authoritative only
    outside of :meth:`run`; a trap handler gets it as an argument and returns it."""
    traps: Traps
    error: str

    # Loaded state. In trap handlers all of these are exact.
    flags: int
    """RFLAGS (property)."""
    cr2: int
    fs_base: int
    gs_base: int

    def selector(self, seg: int) -> int:
        """Visible selector of a segment register."""
        ...

    def set_selector(self, seg: int, selector: int) -> None:
        """Set the visible selector only; the hidden part stays."""
        ...

    def load_segment(self, seg: int, selector: int, base: int, limit: int, attributes: int) -> None:
        """Set selector and hidden part. ``attributes``: bits 8..23 of the descriptor's high word, in place. For CS
        and SS call :meth:`set_cpl` after."""
        ...

    def set_cpl(self, cpl: int) -> None:
        """Set the current privilege level without touching segments (recomputes what the engine derives from it)."""
        ...

    def cpl(self) -> int:
        """Current privilege level."""
        ...

    def set_cr3(self, maddr: int) -> None:
        """Switch the page-table root (machine address) and flush the TLB."""
        ...

    def switch_space(self, slot: int, maddr: int) -> None:
        """Change between two address spaces (slots 0 and 1) of one guest, as PCID does on hardware.

        Translations of both are kept as long as each slot's root stays the same; a slot whose root is new is flushed.
        :meth:`flush_tlb` and :meth:`flush_tlb_page` act on both. For code at CPL 3 (an exact-mode PV guest's kernel
        and user)."""
        ...

    def set_gdt(self, base: int, limit: int) -> None: ...

    def set_ldt(self, selector: int, base: int, limit: int) -> None: ...

    def set_debug_register(self, n: int, value: int) -> None:
        """DR0-3, 6, 7, effective at once."""
        ...

    def get_debug_register(self, n: int) -> int: ...

    def set_task_switched(self, on: bool) -> None:
        """CR0.TS."""
        ...

    def flush_tlb(self) -> None: ...

    def flush_tlb_page(self, va: int) -> None: ...

    def new_context(self, *, cpl: int = 3) -> Context:
        """A context in 64-bit mode, paging on, all registers zero, RFLAGS 0x202, FPU as after FNINIT/MXCSR 0x1f80.

        Its segments are flat 64-bit ones of privilege level ``cpl`` (0, 1 or 3).
        """
        ...

    def load(self, context: Context) -> None:
        """Make ``context`` the running one; saves the one that was loaded, if any; flushes the TLB. No-op if already
        loaded."""
        ...

    def unload(self) -> None:
        """Save the loaded context and leave the CPU idle."""
        ...

    @property
    def loaded(self) -> Context | None:
        """The context whose registers :attr:`gpr` shows."""
        ...

    def run(self, deadline_ns: int | None) -> Exit:
        """Execute the loaded context until kicked, stopped or ``deadline_ns`` (of the machine clock)."""
        ...

    def set_deadline(self, deadline_ns: int | None) -> None:
        """Move the deadline of the run in progress (trap handlers only)."""
        ...

    def stop(self) -> None:
        """From a trap handler: leave :meth:`run` when the handler returns, at the RIP it returns."""
        ...

    def kick(self) -> None:
        """From any thread: make :meth:`run` return soon (at the next block boundary). Sticky: a kick between two
        runs ends the next one at once."""
        ...

    def invalidate(self, maddr: int, size: int) -> None:
        """From any thread: forget translated code of this range before the next guest instruction. May be deferred
        until the engine is in a hook or outside :meth:`run`."""
        ...

    def close(self) -> None: ...
