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


@dataclass(slots=True)
class Segment:
    """A segment register with its hidden part. ``attributes`` as in VMX and struct hvm_hw_cpu, that is bits 8..23 of
    the descriptor's high word shifted down by 8 (type, S, DPL, P, -, AVL, L, D/B, G); ``limit`` in bytes."""

    selector: int = 0
    base: int = 0
    limit: int = 0
    attributes: int = 0


@dataclass(slots=True)
class HvmRegisters:
    """Whole architectural state of a vCPU under nested paging (struct hvm_hw_cpu without its Intel and AMD parts).

    ``gpr``: RAX..R15 in hardware order and RIP. ``segments`` in ``Seg`` order. ``msrs``: those of
    :attr:`Cpu.native_msrs`, all of them; FS_BASE and GS_BASE are the bases of FS and GS, and ``put_hvm`` takes those of
    the segments. ``dr``: DR0-3, 6, 7 in a list of 8. ``fxsave``: 512 bytes.
    """

    gpr: list[int]
    flags: int
    segments: list[Segment]
    ldtr: Segment
    tr: Segment
    gdtr: tuple[int, int]
    """Base, limit."""
    idtr: tuple[int, int]
    cr0: int
    cr2: int
    cr3: int
    cr4: int
    efer: int
    dr: list[int]
    msrs: dict[int, int]
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


class HvmContext(Context, Protocol):
    """Saved state of a vCPU under nested paging. :meth:`Context.get` and ``put`` know a part of it."""

    def get_hvm(self) -> HvmRegisters:
        """Decode the saved state."""
        ...

    def put_hvm(self, registers: HvmRegisters) -> None:
        """Replace the saved state. What no CPU could hold (LMA without PG …) raises InternalError: callers check."""
        ...

    def paging(self) -> tuple[int, int, int, int]:
        """CR0, CR3, CR4 and EFER of the saved state: what a walk of the guest's tables needs, at a fraction of what
        :meth:`get_hvm` costs."""
        ...

    def saved_flags(self) -> int:
        """RFLAGS of the saved state."""
        ...

    def set_nested_root(self, maddr: int) -> None:
        """The nested page-table root (4 levels, x86-64 format, machine address) it runs under from its next load on."""
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


class HvmTraps(Traps, Protocol):
    """What a hypervisor does when a guest under nested paging (PVH, HVM) leaves its own code.

    Exceptions of such a guest are delivered through its own IDT by the engine and do not come here, nor does SYSCALL:
    :meth:`Traps.exception` is called only for what is intercepted. :meth:`Traps.cpuid` is, always.

    A method that gets ``rip`` is called with the instruction not executed: returning ``rip`` restarts it. One that gets
    ``next_rip`` stands behind the instruction. To have the guest take an exception instead, a method calls
    :meth:`Cpu.inject_exception` and returns the address the exception is to be reported at.
    """

    def hypercall(self, next_rip: int) -> int:
        """VMCALL or VMMCALL, at any CPL."""
        ...

    def nested_fault(self, gpa: int, error_code: int, rip: int) -> int:
        """A nested page fault: the nested tables do not map guest-physical address ``gpa``, or not for this use.

        ``error_code`` as for a page fault: 1 present, 2 write, 4 user (always), 8 reserved bit, 16 fetch; bit 32 the
        final guest-physical address, bit 33 the guest's own page tables. The linear address is not known.
        """
        ...

    def io_read(self, port: int, size: int) -> int:
        """IN or INS of 1, 2 or 4 bytes; the guest's privilege (CPL, IOPL, TSS bitmap) has been checked. In the middle
        of a block: as for :meth:`Traps.cpuid`, no change of flags, tables or context."""
        ...

    def io_write(self, port: int, size: int, value: int) -> None:
        """OUT or OUTS. As :meth:`io_read`."""
        ...

    def mmio_read(self, offset: int, size: int) -> int:
        """A load of 1, 2, 4 or 8 bytes from the MMIO window (see :attr:`Cpu.mmio_base`), ``offset`` bytes into it. In
        the middle of an instruction: nothing of the CPU's state may change."""
        ...

    def mmio_write(self, offset: int, size: int, value: int) -> None:
        """A store into the MMIO window. As :meth:`mmio_read`."""
        ...

    def read_msr(self, number: int) -> int | None:
        """RDMSR of a register that the engine does not hold (:attr:`Cpu.native_msrs`); None is #GP(0). No switch of
        context here nor in the next two: they have no address to return."""
        ...

    def write_msr(self, number: int, value: int) -> bool:
        """WRMSR likewise; False is #GP(0)."""
        ...

    def write_cr(self, number: int, value: int) -> bool:
        """CR0, CR4 or CR8 is to become ``value`` (MOV, CLTS and LMSW alike); False is #GP(0). The engine has not
        changed it yet: the method calls :meth:`Cpu.set_cr`, perhaps with another value. CR3 never comes here."""
        ...

    def halt(self, next_rip: int) -> int:
        """HLT."""
        ...

    def pause(self, next_rip: int) -> int:
        """PAUSE, while :meth:`Cpu.set_pause_exits` is on. For PV guests too."""
        ...

    def interrupt_window(self, rip: int) -> int:
        """Asked for by :meth:`Cpu.request_interrupt_window`: RFLAGS.IF is set and no instruction holds interrupts off.
        :meth:`Cpu.inject_interrupt` is possible now."""
        ...

    def triple_fault(self, rip: int) -> int:
        """The guest shut itself down by faults."""
        ...

    def intercept(self, code: int, info: int, rip: int) -> int:
        """Any other instruction that nobody may execute here (VMRUN and the other SVM instructions, MONITOR, …):
        ``code`` is SVM's exit code. Usually #UD."""
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
        """Make ``context`` the running one; saves the one that was loaded, if any. No-op if already loaded.

        Translations of a context that this CPU had loaded before may be as they were when it was unloaded: whoever
        changed tables meanwhile calls :meth:`flush_tlb` before it runs. Setting its registers (:meth:`Context.put`)
        forgets them.
        """
        ...

    def unload(self) -> None:
        """Save the loaded context and leave the CPU idle."""
        ...

    @property
    def loaded(self) -> Context | None:
        """The context whose registers :attr:`gpr` shows."""
        ...

    exits_ns: int
    """How long exits of guests under nested paging took, in all (ns of the machine clock). The hooks of PV guests are
    too many and too short to be timed."""

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

    def set_pause_exits(self, on: bool) -> None:
        """Call :meth:`HvmTraps.pause` at each PAUSE, of whatever context is loaded, PV ones too. Outside of
        :meth:`run`, or in a trap handler."""
        ...

    def next_code(self, first: int, end: int) -> int:
        """The first frame in [first, end) that this CPU holds translated code of; -1 if there is none."""
        ...

    def forget_code(self, maddr: int, size: int) -> None:
        """:meth:`invalidate` at once. Outside of :meth:`run`."""
        ...

    def set_dirty_map(self, frames: memoryview | None) -> None:
        """From any thread: remember which frames guest code writes. ``frames``, a writable byte for each frame of RAM,
        shared with whom one likes: byte n is set to 1 before a context's first store to frame n after a flush of its
        TLB (:meth:`flush_tlb`, :meth:`set_cr3`), and perhaps with later ones. None: no more.

        Who wants to know of the next store clears the byte and flushes every context that may store there, when it is
        loaded again. What the CPU stores by itself while it walks
        page tables (accessed and dirty bits) is not noticed."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class HvmCpu(Cpu, Protocol):
    """A physical CPU that can also run guests under nested paging (PVH, HVM)."""

    mmio_base: int
    """Machine address of a window of 256 pages, above RAM: what a nested table maps there is a device inside the
    hypervisor (HvmTraps.mmio_read and mmio_write)."""
    native_msrs: frozenset[int]
    """MSRs that live in the context and that a guest's RDMSR and WRMSR reach without a trap."""

    def new_hvm_context(self, nested_root: int) -> HvmContext:
        """A context in flat 32-bit protected mode, paging off: CR0 0x11, all registers zero, RFLAGS 2, flat segments
        (code 0xc09b, data 0xc093; TR 0x8b, base 0, limit 0x67), as PVH's start of day wants it."""
        ...

    def set_nested_root(self, maddr: int) -> None:
        """Run the loaded context under another root (an altp2m view) and flush the TLB."""
        ...

    def set_cr(self, number: int, value: int) -> None:
        """CR0, CR3, CR4 or CR8 of a guest under nested paging, with what follows from it (EFER.LMA, TLB)."""
        ...

    def get_cr(self, number: int) -> int: ...

    def set_efer(self, value: int) -> None: ...

    def get_efer(self) -> int: ...

    def paging(self) -> tuple[int, int, int, int]:
        """CR0, CR3, CR4 and EFER at once."""
        ...

    def code_bytes(self) -> int:
        """What the loaded context's code is: 8, 4 or 2 by the code segment, 1 in virtual-8086 mode, 0 in real mode
        (Xen: hvm_guest_x86_mode)."""
        ...

    def interruptible(self) -> bool:
        """Whether the loaded context could take an interrupt now, between two runs: RFLAGS.IF, no interrupt shadow,
        and no other event that waits."""
        ...

    def get_msr(self, number: int) -> int:
        """A native MSR of the loaded context."""
        ...

    def set_msr(self, number: int, value: int) -> None: ...

    def segment(self, seg: int) -> Segment:
        """A segment register with its hidden part."""
        ...

    def inject_exception(self, vector: int, error_code: int | None) -> None:
        """From a trap handler: the guest takes this exception, through its IDT, at the address that the handler
        returns. (Double and triple faults follow by themselves; #PF's address is :attr:`cr2`.)"""
        ...

    def inject_nmi(self) -> None:
        """Outside of a run, in :meth:`HvmTraps.interrupt_window`, or in an exit that has ``rip``: vector 2, whatever
        IF."""
        ...

    def request_interrupt_window(self, on: bool) -> None:
        """Have :meth:`HvmTraps.interrupt_window` called as soon as the guest can take an interrupt (perhaps at once,
        when the run begins or the handler returns). Stays on until turned off; belongs to the loaded context."""
        ...

    def inject_interrupt(self, vector: int) -> None:
        """In :meth:`HvmTraps.interrupt_window`, or while :meth:`interruptible`: the guest takes this interrupt before
        its next instruction."""
        ...
