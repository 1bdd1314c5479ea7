# SPDX-License-Identifier: GPL-2.0-only
"""A CPU whose guests are Python generators: the second engine behind the :class:`~pyxen.machine.cpu.base.Cpu` seam.

Hypervisor tests want a guest that makes three hypercalls and one page fault, not an assembler. A *script* is a
generator function; it gets the
:class:`ScriptedCpu` when its context first runs, and every value that it yields is one step of the guest::

    def guest(cpu):
        result = yield Syscall(rax=29, rdi=1)          # RAX after the hypercall
        yield Store(0x1000, b"hello")                  # through machine memory, at a machine address
        yield Fault(14, error_code=6, cr2=0xdead000)   # the hypervisor may redirect RIP; the script goes on behind it
        while True:
            yield Spin()                               # runs until kicked

    context = cpu.new_context(guest)

A guest under nested paging (:meth:`ScriptedCpu.new_hvm_context`) has further steps: :class:`Hypercall`,
:class:`NestedFault`, :class:`In`, :class:`Out`, :class:`MmioRead`, :class:`MmioWrite`, :class:`ReadMsr`,
:class:`WriteMsr`, :class:`WriteCr`, :class:`Halt`, :class:`Pause`, :class:`TripleFault`, :class:`Intercept`.
Interrupts, NMIs and injected exceptions are taken between two steps (an interrupt window opens when the script has set
IF in ``cpu.flags``) and listed in :attr:`ScriptedCpu.journal` as ("interrupt", vector), ("nmi",) and ("exception",
vector, error code).

Each step advances RIP by :data:`STEP` (or to where the trap handler says), so that "the instruction after the
syscall" and a re-executed
hypercall (a handler that returns the RIP *of* the syscall) mean what they mean on hardware: the step is repeated.
There is no paging here:
addresses in steps are machine addresses, TLB flushes and CR3 loads are only recorded (:attr:`ScriptedCpu.journal`).
"""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING, Any, cast

from pyxen.errors import InternalError
from pyxen.machine.cpu.base import (
    GPR_NAMES,
    RAX,
    RBX,
    RCX,
    RDX,
    RIP,
    Context,
    Exit,
    HvmTraps,
    NoTraps,
    Registers,
    Traps,
)
from pyxen.machine.cpu.deadline import AlarmClock
from pyxen.machine.cpu.scripted_context import Script, ScriptedContext, ScriptedHvmContext
from pyxen.machine.cpu.scripted_hvm import FXSAVE_RESET, ScriptedHvm
from pyxen.machine.cpu.scripted_steps import (
    Cpuid,
    Fault,
    Halt,
    HvmStep,
    Hypercall,
    In,
    Intercept,
    Load,
    MmioRead,
    MmioWrite,
    NestedFault,
    Out,
    Pause,
    ReadMsr,
    Set,
    Spin,
    Step,
    Store,
    Syscall,
    TripleFault,
    WriteCr,
    WriteMsr,
)

if TYPE_CHECKING:
    from pyxen.machine.clock import Clock
    from pyxen.machine.memory import Memory

__all__ = ["STEP", "Cpuid", "Fault", "Halt", "HvmStep", "Hypercall", "In", "Intercept", "Load", "MmioRead", "MmioWrite",
           "NestedFault", "Out", "Pause", "ReadMsr", "Script", "ScriptedContext", "ScriptedCpu", "ScriptedHvmContext",
           "Set", "Spin", "Step", "Store", "Syscall", "TripleFault", "WriteCr", "WriteMsr"]

STEP = 2
"""Length of every scripted "instruction", that of SYSCALL."""

_U64 = (1 << 64) - 1
_JOURNAL_LENGTH = 1024


class ScriptedCpu(ScriptedHvm):
    """Executes scripts; same protocol, same threads, same stickiness of kicks as a real engine."""

    def __init__(self, memory: Memory, clock: Clock, index: int = 0, alarms: AlarmClock | None = None) -> None:
        self.index = index
        self.error = ""
        self.exits_ns = 0
        self.traps: Traps = NoTraps()
        self.loaded: ScriptedContext | None = None
        self.gpr = memoryview(bytearray(17 * 8)).cast("Q")
        self.flags = 0x202
        self.cr2 = 0
        self.fs_base = 0
        self.gs_base = 0
        self.journal: deque[tuple[object, ...]] = deque(maxlen=_JOURNAL_LENGTH)
        """What the hypervisor did to the CPU, newest last: ("cr3", maddr), ("flush",), ("flush_page", va),
        ("invalidate", maddr, size) …"""
        self._memory = memory
        self._clock = clock
        self._cr3 = 0
        self._cpl = 3
        self._selectors = [0] * 6
        self._kicked = threading.Event()
        self._stopping = False
        self._running = False
        self._dirty_map: memoryview | None = None
        self._alarm = (alarms if alarms is not None else AlarmClock(clock)).alarm(self.kick)
        memory.add_listener(self.invalidate)

    # --- loaded state ------------------------------------------------------------------------------------------------

    @property
    def cr3(self) -> int:
        """The page-table root last set."""
        return self._cr3

    def selector(self, seg: int) -> int:
        """Visible selector."""
        return self._selectors[seg]

    def set_selector(self, seg: int, selector: int) -> None:
        """Visible selector only."""
        self._selectors[seg] = selector & 0xffff

    def load_segment(self, seg: int, selector: int, base: int, limit: int, attributes: int) -> None:
        """Selector and, for FS and GS, base."""
        self._selectors[seg] = selector & 0xffff
        if seg == 4:
            self.fs_base = base
        elif seg == 5:
            self.gs_base = base
        self.journal.append(("segment", int(seg), selector, base, limit, attributes))

    def set_cpl(self, cpl: int) -> None:
        """Privilege level."""
        self._cpl = cpl & 3

    def cpl(self) -> int:
        """Privilege level."""
        return self._cpl

    def set_cr3(self, maddr: int) -> None:
        """Recorded."""
        self._cr3 = maddr
        self.journal.append(("cr3", maddr))

    def switch_space(self, slot: int, maddr: int) -> None:
        """Recorded."""
        self._cr3 = maddr
        self.journal.append(("space", slot, maddr))

    def set_gdt(self, base: int, limit: int) -> None:
        """Recorded."""
        self.journal.append(("gdt", base, limit))

    def set_ldt(self, selector: int, base: int, limit: int) -> None:
        """Recorded."""
        self.journal.append(("ldt", selector, base, limit))

    def set_debug_register(self, n: int, value: int) -> None:
        """Kept; no breakpoint ever hits."""
        self._context().debug[n] = value & _U64

    def get_debug_register(self, n: int) -> int:
        """As set."""
        return self._context().debug[n]

    def set_task_switched(self, on: bool) -> None:
        """Recorded."""
        self.journal.append(("ts", on))

    def flush_tlb(self) -> None:
        """Recorded."""
        self.journal.append(("flush",))

    def flush_tlb_page(self, va: int) -> None:
        """Recorded."""
        self.journal.append(("flush_page", va))

    def _context(self) -> ScriptedContext:
        if self.loaded is None:
            raise InternalError("no context is loaded")
        return self.loaded

    # --- contexts ----------------------------------------------------------------------------------------------------

    def new_context(self, script: Script | None = None, *, cpl: int = 3) -> ScriptedContext:
        """A context that runs ``script``; one made without (by a hypervisor) gets its ``.script`` assigned later."""
        registers = Registers([0] * 17, 0x202, [cpl] * 6, [0] * 6, 0, 0, FXSAVE_RESET)
        return ScriptedContext(script, registers)

    def load(self, context: Context) -> None:
        """Make ``context`` the running one."""
        if context is self.loaded:
            return
        if not isinstance(context, ScriptedContext):
            raise InternalError("a context of another kind of engine")
        if context.engine is not None:
            raise InternalError("the context is loaded on another CPU")
        self.unload()
        r = context.registers
        for n, value in enumerate(r.gpr):
            self.gpr[n] = value
        self.flags, self.cr2, self._cr3 = r.flags, r.cr2, r.cr3
        self._selectors = list(r.selectors)
        self.fs_base, self.gs_base = r.bases[4], r.bases[5]
        context.engine = self
        self.loaded = context
        self.journal.append(("load",))

    def unload(self) -> None:
        """Save the loaded context."""
        context = self.loaded
        if context is None:
            return
        bases = [0, 0, 0, 0, self.fs_base, self.gs_base]
        context.registers = Registers(self.gpr.tolist(), self.flags, list(self._selectors), bases, self.cr2, self._cr3,
                                      context.registers.fxsave)
        context.engine = None
        self.loaded = None

    # --- running -----------------------------------------------------------------------------------------------------

    def run(self, deadline_ns: int | None) -> Exit:
        """Take steps until kicked or stopped; a script that returned spins."""
        self._context()
        if deadline_ns is not None and deadline_ns <= self._clock.now_ns():
            return Exit.KICK
        self._alarm.set(deadline_ns)
        self._running = True
        try:
            while not self._kicked.is_set():
                self._step(self._context())
        finally:
            self._running = False
        self._kicked.clear()
        if self._stopping:
            self._stopping = False
            return Exit.STOP
        return Exit.KICK

    def _step(self, context: ScriptedContext) -> None:
        gpr = self.gpr
        if isinstance(context, ScriptedHvmContext):
            gpr[RIP] = self._take_events(context, gpr[RIP])
            if self.loaded is not context or self._kicked.is_set():
                return
        step = context.step
        if step is None:
            step = context.step = self._next(context)
        rip = gpr[RIP]
        target = following = (rip + STEP) & _U64
        value: Any = None
        match step:
            case Spin():
                self._kicked.wait()
            case Syscall():
                self._set(step.registers)
                target = self.traps.syscall(following)
            case Set():
                self._set(step.registers)
            case Fault():
                if step.cr2 is not None:
                    self.cr2 = step.cr2
                at = following if step.software else rip
                target = value = self.traps.exception(step.vector, step.error_code, at, step.software)
                if target == rip and self.loaded is context:
                    target = following        # handled, so the retry succeeds
            case Cpuid():
                gpr[RAX], gpr[RCX] = step.leaf, step.subleaf
                self.traps.cpuid(rip)
                value = (gpr[RAX], gpr[RBX], gpr[RCX], gpr[RDX])
            case Store():
                dirty = self._dirty_map
                if dirty is not None:
                    for frame in range(step.maddr >> 12, (step.maddr + len(step.data) + 0xfff) >> 12):
                        dirty[frame] = 1
                self._memory.write(step.maddr, step.data)
            case Load():
                value = self._memory.read(step.maddr, step.size)
            case Pause():
                if self._pause_exits:
                    target = cast(HvmTraps, self.traps).pause(following)
            case _:
                if isinstance(step, Hypercall):
                    self._set(step.registers)
                target, value = self._hvm_step(step, rip, following)
        gpr[RIP] = target                     # of whichever context is loaded now
        context.value = value
        # A handler that returns the RIP of the syscall wants it again, with the registers as it left them.
        again = isinstance(step, (Syscall, Hypercall)) and target == rip and self.loaded is context
        context.step = None if not again else Syscall() if isinstance(step, Syscall) else Hypercall()
        context.awaits_rax = isinstance(step, (Syscall, Hypercall))

    def _set(self, registers: dict[str, int]) -> None:
        for name, value in registers.items():
            self.gpr[GPR_NAMES.index(name)] = value & _U64

    def _next(self, context: ScriptedContext) -> Step:
        """Resume the script with the outcome of its last step."""
        if context.generator is None:
            if context.script is None or context.finished:
                return Spin()
            context.generator = context.script(self)
        elif context.awaits_rax:
            context.value = self.gpr[RAX]
        try:
            return context.generator.send(context.value)
        except StopIteration:
            context.generator = None
            context.finished = True
            return Spin()

    def set_deadline(self, deadline_ns: int | None) -> None:
        """Move the deadline of the run in progress."""
        if deadline_ns is not None and deadline_ns <= self._clock.now_ns():
            self.kick()
        else:
            self._alarm.set(deadline_ns)

    def stop(self) -> None:
        """Leave :meth:`run` after this step."""
        self._stopping = True
        self._kicked.set()

    def kick(self) -> None:
        """Leave :meth:`run` after this step; sticky."""
        self._kicked.set()

    def invalidate(self, maddr: int, size: int) -> None:
        """Recorded."""
        self.journal.append(("invalidate", maddr, size))

    def set_pause_exits(self, on: bool) -> None:
        """Whether the step Pause calls :meth:`HvmTraps.pause`."""
        self._pause_exits = on

    def next_code(self, first: int, end: int) -> int:
        """Scripts are not code in memory."""
        return -1

    def forget_code(self, maddr: int, size: int) -> None:
        """There is none."""

    def set_dirty_map(self, frames: memoryview | None) -> None:
        """Every :class:`Store` marks its frames."""
        self._dirty_map = frames

    def close(self) -> None:
        """Forget scripts and alarms."""
        if self._running:
            raise InternalError("close of a running CPU")
        self._memory.remove_listener(self.invalidate)
        self._alarm.cancel()
        self.unload()
