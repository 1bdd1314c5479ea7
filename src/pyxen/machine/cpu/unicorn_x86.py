# SPDX-License-Identifier: GPL-2.0-only
"""An x86-64 CPU made of the Unicorn engine (machine.cpu.base.Cpu).

One engine object is one physical CPU: all of RAM is mapped at machine address 0, and what runs is the loaded
:class:`UnicornContext`. Guest code runs
without the GIL inside one long ``uc_emu_start``; hypercalls and faults come back through raw C callbacks on the same
thread.

How it stops: exit checks inside of instructions are turned off (``no_exit_request``), since a stop there replays
half-done instructions; the
checks at block starts remain. A kick sets the HALT bit of ``interrupt_request``, which the engine tests before every
turn of its loop and also before
the first block of a run, and ``icount_decr`` negative, which makes the current chain of blocks come back to that
loop. Both are plain stores, so any
thread may kick at any time, and a kick between two runs is not lost. So may a signal handler: that is how deadlines
come (``unicorn_timer``). They may come early; :meth:`UnicornX86.run` then goes on, unless somebody called
:meth:`UnicornX86.kick`, which says so in ``_kicked`` before it stores.
"""

from __future__ import annotations

import ctypes
import threading
from ctypes import c_int, c_size_t, c_uint64, c_void_p
from typing import TYPE_CHECKING, Any

from pyxen.errors import EngineError, InternalError
from pyxen.machine.cpu import unicorn_internals as ui
from pyxen.machine.cpu.base import RIP, Context, Exit, NoTraps, Seg, Traps
from pyxen.machine.cpu.deadline import AlarmClock, AlarmDeadline, Deadline
from pyxen.machine.cpu.unicorn_context import LONG_MODE_FLAGS, UnicornContext, settle_flags
from pyxen.machine.cpu.unicorn_hvm_context import UnicornHvmContext
from pyxen.machine.cpu.unicorn_hvm_cpu import MEMORY_LIMIT, HvmPart
from pyxen.machine.cpu.unicorn_spaces import HF_SECOND_SPACE, KERNEL_PART, USER_PART
from pyxen.machine.cpu.unicorn_timer import KickTimer
from pyxen.machine.cpu.unicorn_tlb import CODE_GENERATION, ContextTlb

if TYPE_CHECKING:
    from pyxen.machine.clock import Clock
    from pyxen.machine.memory import Memory

_U64 = (1 << 64) - 1

CR0_VALUE = 0x80050033
"""PE MP ET NE WP AM PG: what Xen runs PV guests with (WP makes read-only page tables hold against ring 0-2 too)."""
CR4_VALUE = 0x620
"""PAE OSFXSR OSXMMEXCPT. No PGE and no PSE: PV guests have neither, and every flush is a full one."""
EFER_VALUE = 0xd01
"""SCE LME LMA NXE."""

_ATTRIBUTES = 0x00f0ff00
_FLAT_CODE = 0x00a09b00     # G L P S, execute/read, accessed
_FLAT_DATA = 0x00c09300     # G B P S, read/write, accessed
_LDT_PRESENT = 0x00008200

# Vectors that push an error code (Intel SDM volume 3, table 6-1).
_HAS_ERROR_CODE = frozenset((8, 10, 11, 12, 13, 14, 17))

# INT n that a hardware IDT of Xen's lets through from ring 3 (arch/x86/x86_64/traps.c, traps.c
# set_intr_gate/_set_gate …, 3):
# breakpoint, overflow and the direct int 0x80. All others are #GP with the gate's selector error code.
DIRECT_VECTORS = frozenset((3, 4, 0x80))

# Where v64 and v32 have what hypercalls and context switches touch: a shift of another module's constant at each
# access would cost more than the access.
_EFLAGS, _CC_SRC, _CR2, _CR3, _DR7 = ui.EFLAGS >> 3, ui.CC_SRC >> 3, ui.CR2 >> 3, ui.CR3 >> 3, (ui.DR + 56) >> 3
_CC_OP, _DF, _HFLAGS = ui.CC_OP >> 2, ui.DF >> 2, ui.HFLAGS >> 2
_FS_BASE, _GS_BASE = (ui.SEGS + 4 * ui.SEG_SIZE + 8) >> 3, (ui.SEGS + 5 * ui.SEG_SIZE + 8) >> 3
_SELECTORS = tuple((ui.SEGS + ui.SEG_SIZE * n) >> 2 for n in range(6))
_HF_CPL, _NOT_CPL, _HF_SETTLED, _FLAGS_STRICT = ui.HF_CPL, ~ui.HF_CPL, ~ui.HF_FROM_EFLAGS, ~ui.FLAGS_LAZY
_FLAGS_IN_CC, _CC_OP_EFLAGS = ui.FLAGS_IN_CC, ui.CC_OP_EFLAGS

_TRANSLATION_CACHE = 128 << 20
_MAX_POSTED = 16384


class UnicornX86(HvmPart):
    """One CPU on ``memory``, with deadlines on ``clock``. Raises EngineError for an unusable Unicorn.

    ``alarms`` may be shared between the CPUs of a machine; without it the CPU has its own. They are used only where
    the clock or the host have no timer signals.
    """

    def __init__(self, memory: Memory, clock: Clock, index: int = 0, alarms: AlarmClock | None = None) -> None:
        self.index = index
        self.error = ""
        self.loaded: UnicornContext | None = None
        self.traps: Traps = NoTraps()
        self._memory = memory
        self._clock = clock
        self._lib = lib = ui.library()
        self._uc = self._open(memory)
        self._handle = self._uc._uch
        self._state = state = ui.State(lib, self._uc._uch.value)
        state.no_exit_request[0] = 1
        if not state.ram_is(memory.host_address, memory.size_bytes):
            raise ui.unknown_build("RAM is not one block at machine address 0")
        self.gpr = state.gpr
        self._v32 = state.env32
        self._v64 = state.env64
        self._image = state.env8
        self._interrupt = state.interrupt_request
        self._icount = state.icount_high
        self._cpu = c_void_p(state.cpu)
        self._env = c_void_p(state.env)
        self._running = False
        self._slot = 0
        self._roots = [-1, -1]
        self._exchange_tlb = lib.exchange_tlb
        self._spare_tlbs: list[ContextTlb] = []
        self.tlb = ContextTlb(self)  # the one that the engine was made with
        self.tlb.filled = True
        self._spare_tlbs.append(self.tlb)
        self.exits_ns = 0
        self._stopping = False
        self._kicked = False
        self._failure: BaseException | None = None
        self._thread = 0
        self._posted: list[tuple[int, int]] = []
        self._posting = threading.Lock()
        self._flush_all = False
        self._blank = {cpl: self._blank_image(cpl) for cpl in (0, 1, 3)}
        self._keep: list[Any] = []
        self._install_hooks()
        self._alarms = alarms
        self._deadline_ns: int | None = None
        self._deadline: Deadline = (KickTimer.make(self, clock, state.kick_words, self._alarm_deadline)
                                    or self._alarm_deadline())
        memory.add_listener(self.invalidate)

    def _alarm_deadline(self) -> AlarmDeadline:
        alarms = self._alarms if self._alarms is not None else AlarmClock(self._clock)
        return AlarmDeadline(self._clock, alarms.alarm(self._halt))

    # --- construction ------------------------------------------------------------------------------------------------

    def _open(self, memory: Memory) -> Any:
        unicorn = self._lib.unicorn
        x86 = unicorn.x86_const
        if memory.size_bytes > MEMORY_LIMIT:
            raise EngineError(f"the engine addresses {MEMORY_LIMIT >> 30} GiB of RAM at most")
        try:
            uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
            # EPYC is the model with SVM, which the same engine needs for PVH and HVM guests.
            uc.ctl_set_cpu_model(x86.UC_CPU_X86_EPYC)
            # An empty exit list: with a single "until" address, a guest that jumps there would end the run.
            uc.ctl_exits_enabled(True)
            uc.ctl_set_tcg_buffer_size(_TRANSLATION_CACHE)
            uc.mem_map_ptr(0, memory.size_bytes, unicorn.UC_PROT_ALL, memory.host_address)
            self._map_block(uc, unicorn)
            uc.reg_write(x86.UC_X86_REG_MSR, (0xc0000080, EFER_VALUE))
            uc.reg_write(x86.UC_X86_REG_CR4, CR4_VALUE)
            uc.reg_write(x86.UC_X86_REG_CR0, CR0_VALUE)
        except unicorn.UcError as error:
            raise EngineError(f"the Unicorn engine does not start: {error}") from error
        return uc

    def _blank_image(self, cpl: int) -> bytes:
        v64, v32 = self._v64, self._v32
        v64[ui.CR0 >> 3], v64[ui.CR4 >> 3], v64[ui.EFER >> 3] = CR0_VALUE, CR4_VALUE, EFER_VALUE
        for n in range(17):
            self.gpr[n] = 0
        settle_flags(v64, v32, 0x202)
        x86 = self._lib.unicorn.x86_const
        self._uc.reg_write(x86.UC_X86_REG_FPCW, 0x37f)        # as after FNINIT; Unicorn resets it to 0
        self._uc.reg_write(x86.UC_X86_REG_MXCSR, 0x1f80)
        self._state.env8[ui.FPTAGS:ui.FPTAGS + 8] = b"\1" * 8  # all empty
        for seg in Seg:
            attributes = (_FLAT_CODE if seg == Seg.CS else _FLAT_DATA) | cpl << 13
            self._write_segment(seg, cpl, 0, 0xffffffff, attributes)
        self._lib.update_hflags(self._env)
        self._lib.read_eflags(self._env)
        v32[ui.HFLAGS >> 2] = (v32[ui.HFLAGS >> 2] & ~(ui.HF_CPL | ui.HF_FROM_EFLAGS)) | cpl
        return ctypes.string_at(self._state.env, ui.CONTEXT_SIZE)

    def _install_hooks(self) -> None:
        unicorn = self._lib.unicorn
        x86 = unicorn.x86_const
        self._hook(unicorn.UC_HOOK_INSN, ui.HOOK_SYSCALL(self._make_syscall_hook()), x86.UC_X86_INS_SYSCALL)
        self._hook(unicorn.UC_HOOK_INSN, ui.HOOK_CPUID(self._make_cpuid_hook()), x86.UC_X86_INS_CPUID)
        self._install_hvm_hooks(ui.HOOK_INTR(self._make_exception_hook()), ui.HOOK_INVALID(self._make_invalid_hook()))
        # Bounded above RAM: a memory hook over RAM would make every guest store slow.
        outside = (unicorn.UC_HOOK_MEM_READ_UNMAPPED | unicorn.UC_HOOK_MEM_WRITE_UNMAPPED
                   | unicorn.UC_HOOK_MEM_FETCH_UNMAPPED)
        self._hook(outside, ui.HOOK_MEMORY(self._outside_of_ram), low=self._memory.size_bytes, high=_U64)

    def _hook(self, kind: int, callback: Any, instruction: int | None = None, low: int = 1, high: int = 0,
              data: Any = None) -> None:
        handle = c_size_t()
        arguments = [self._handle, ctypes.byref(handle), c_int(kind), callback, data, c_uint64(low), c_uint64(high)]
        if instruction is not None:
            arguments.append(c_int(instruction))
        status = self._lib.hook_add(*arguments)
        if status:
            raise EngineError(f"the Unicorn engine refuses a hook of kind {kind:#x}: error {status}")
        self._keep.append(callback)

    # --- hooks: these run inside emu_start, on its thread, with the GIL ----------------------------------------------

    def _make_syscall_hook(self) -> Any:
        gpr, v64 = self.gpr, self._v64
        length_at = ui.EXCEPTION_NEXT_EIP >> 3

        def on_syscall(_uc: int, _data: int) -> None:
            length = v64[length_at]          # left there by unicorn_patches; the engine adds it to RIP after this hook
            try:
                gpr[RIP] = (self.traps.syscall((gpr[RIP] + length) & _U64) - length) & _U64
            except BaseException as error:
                self._fail(error)

        return on_syscall

    def _make_cpuid_hook(self) -> Any:
        gpr = self.gpr

        def on_cpuid(_uc: int, _data: int) -> int:
            try:
                self.traps.cpuid(gpr[RIP])
            except BaseException as error:
                self._fail(error)
            return 1                         # the engine's own CPUID is skipped

        return on_cpuid

    def _make_invalid_hook(self) -> Any:
        gpr, v32, old_exception = self.gpr, self._v32, self._state.old_exception
        is_int_at = ui.EXCEPTION_IS_INT >> 2

        def on_invalid(_uc: int, _data: int) -> bool:
            old_exception[0] = -1
            try:
                rip = gpr[RIP]
                if v32[is_int_at]:                       # INT 6, which the engine takes for #UD
                    v32[is_int_at] = 0
                    gpr[RIP] = self.traps.exception(13, 6 << 3 | 2, rip, False)
                else:
                    gpr[RIP] = self.traps.exception(6, None, rip, False)
            except BaseException as error:
                self._fail(error)
            return True

        return on_invalid

    def _make_exception_hook(self) -> Any:
        gpr, v32, old_exception = self.gpr, self._v32, self._state.old_exception
        error_at, is_int_at = ui.ERROR_CODE >> 2, ui.EXCEPTION_IS_INT >> 2

        def on_exception(_uc: int, vector: int, _data: int) -> None:
            # The engine delivers nothing itself, so nobody else clears what would turn the next fault into a double
            # fault.
            old_exception[0] = -1
            try:
                rip = gpr[RIP]
                if v32[is_int_at]:
                    v32[is_int_at] = 0
                    length = v32[error_at]   # by unicorn_patches; RIP has moved past the instruction already
                    if vector in DIRECT_VECTORS:
                        gpr[RIP] = self.traps.exception(vector, None, rip, True)
                    else:
                        gpr[RIP] = self.traps.exception(13, vector << 3 | 2, (rip - length) & _U64, False)
                else:
                    error_code = v32[error_at] if vector in _HAS_ERROR_CODE else None
                    gpr[RIP] = self.traps.exception(vector, error_code, rip, False)
            except BaseException as error:
                self._fail(error)

        return on_exception

    def _outside_of_ram(self, _uc: int, _kind: int, address: int, size: int, _value: int, _data: int) -> bool:
        self.error = f"guest access of {size} bytes at machine address {address:#x}, outside of RAM"
        return False

    def _fail(self, error: BaseException) -> None:
        """Leave the run; :meth:`run` raises ``error``. Nothing may escape through the engine's C frames."""
        if self._failure is None:
            self._failure = error
        self.stop()

    # --- registers ---------------------------------------------------------------------------------------------------

    @property
    def flags(self) -> int:
        """RFLAGS."""
        v64 = self._v64
        if not self._running:
            return v64[_EFLAGS] & 0xffffffff
        v32 = self._v32
        if v32[_CC_OP] != _CC_OP_EFLAGS:
            return int(self._lib.read_eflags(self._env)) & 0xffffffff | 2
        return (v64[_EFLAGS] & _FLAGS_STRICT | v64[_CC_SRC] & _FLAGS_IN_CC | v32[_DF] & 0x400 | 2) & 0xffffffff

    @flags.setter
    def flags(self, value: int) -> None:
        loaded = self.loaded
        settle_flags(self._v64, self._v32, value, LONG_MODE_FLAGS if loaded is None else loaded.flags)
        self._v32[_HFLAGS] &= _HF_SETTLED
        if self._running:
            self._v64[_EFLAGS] &= _FLAGS_STRICT

    @property
    def cr2(self) -> int:
        """The last page-fault address."""
        return int(self._v64[_CR2])

    @cr2.setter
    def cr2(self, value: int) -> None:
        self._v64[_CR2] = value

    @property
    def cr3(self) -> int:
        """The page-table root."""
        return int(self._v64[_CR3])

    @property
    def fs_base(self) -> int:
        """Base of FS."""
        return int(self._v64[_FS_BASE])

    @fs_base.setter
    def fs_base(self, value: int) -> None:
        self._v64[_FS_BASE] = value

    @property
    def gs_base(self) -> int:
        """Base of GS."""
        return int(self._v64[_GS_BASE])

    @gs_base.setter
    def gs_base(self, value: int) -> None:
        self._v64[_GS_BASE] = value

    def selector(self, seg: int) -> int:
        """Visible selector of a segment register."""
        return self._v32[_SELECTORS[seg]] & 0xffff

    def set_selector(self, seg: int, selector: int) -> None:
        """Set the visible selector only."""
        self._v32[_SELECTORS[seg]] = selector & 0xffff

    def _write_segment(self, seg: int, selector: int, base: int, limit: int, attributes: int) -> None:
        at = ui.SEGS + ui.SEG_SIZE * seg
        self._v32[at >> 2] = selector & 0xffff
        self._v64[(at + 8) >> 3] = base & _U64
        self._v32[(at + 16) >> 2] = limit & 0xffffffff
        self._v32[(at + 20) >> 2] = attributes & _ATTRIBUTES

    def load_segment(self, seg: int, selector: int, base: int, limit: int, attributes: int) -> None:
        """Set selector and hidden part; the CPL stays as it is (see :meth:`set_cpl`)."""
        self._write_segment(seg, selector, base, limit, attributes)
        cpl = self.cpl()
        self._lib.update_hflags(self._env)
        v32 = self._v32
        v32[_HFLAGS] = (v32[_HFLAGS] & _NOT_CPL & _HF_SETTLED) | cpl

    def set_cpl(self, cpl: int) -> None:
        """Set the privilege level: the engine's translations and TLB depend on nothing else for it."""
        self._v32[_HFLAGS] = (self._v32[_HFLAGS] & _NOT_CPL) | cpl & 3

    def cpl(self) -> int:
        """Current privilege level."""
        return self._v32[_HFLAGS] & _HF_CPL

    def set_cr3(self, maddr: int) -> None:
        """Switch the page-table root and flush the TLB (of both spaces)."""
        self._v64[_CR3] = maddr
        self._roots[self._slot] = maddr
        self._lib.tlb_flush(self._cpu)

    def switch_space(self, slot: int, maddr: int) -> None:
        """Go to address space ``slot`` with root ``maddr``; the translations of both stay as long as their roots do."""
        exchange = self._lib.exchange_spaces
        if slot == self._slot:
            if maddr != self._v64[_CR3]:
                self.set_cr3(maddr)
            return
        self._slot = slot
        self._v32[_HFLAGS] ^= HF_SECOND_SPACE
        if exchange is None:
            self.set_cr3(maddr)
            return
        stale = exchange(self._env, maddr) & KERNEL_PART
        if self._roots[slot] != maddr:
            self._roots[slot] = maddr
            stale |= USER_PART
        if stale:
            self._lib.tlb_flush_by_mmuidx(self._cpu, stale)

    def set_gdt(self, base: int, limit: int) -> None:
        """LGDT."""
        self._v64[(ui.GDT + 8) >> 3] = base & _U64
        self._v32[(ui.GDT + 16) >> 2] = limit & 0xffff

    def set_ldt(self, selector: int, base: int, limit: int) -> None:
        """LLDT with the descriptor's content; a null selector makes the LDT empty."""
        self._v32[ui.LDT >> 2] = selector & 0xffff
        self._v64[(ui.LDT + 8) >> 3] = base & _U64
        self._v32[(ui.LDT + 16) >> 2] = limit & 0xffffffff
        self._v32[(ui.LDT + 20) >> 2] = _LDT_PRESENT if selector & 0xfffc else 0

    def set_debug_register(self, n: int, value: int) -> None:
        """DR0-3, 6 or 7; instruction breakpoints follow at once. Data breakpoints are kept, but the engine never
        hits them."""
        if n == 7:
            self._lib.update_dr7(self._env, value & 0xffffffff)
            return
        enabled = self._v64[_DR7]
        if n < 4 and enabled >> 2 * n & 3:
            # The engine keys its breakpoints by address when DR7 is written: take them off and put them on again.
            self._lib.update_dr7(self._env, 0x400)
            self._v64[(ui.DR + 8 * n) >> 3] = value & _U64
            self._lib.update_dr7(self._env, enabled)
            return
        self._v64[(ui.DR + 8 * n) >> 3] = value & _U64

    def get_debug_register(self, n: int) -> int:
        """DR0-3, 6 or 7."""
        return int(self._v64[(ui.DR + 8 * n) >> 3])

    def set_task_switched(self, on: bool) -> None:
        """CR0.TS."""
        v64, v32 = self._v64, self._v32
        if on:
            v64[ui.CR0 >> 3] |= 8
            v32[_HFLAGS] |= ui.HF_TS
        else:
            v64[ui.CR0 >> 3] &= ~8
            v32[_HFLAGS] &= ~ui.HF_TS

    def flush_tlb(self) -> None:
        """Forget all translations."""
        self._lib.tlb_flush(self._cpu)

    def flush_tlb_page(self, va: int) -> None:
        """INVLPG."""
        self._lib.tlb_flush_page(self._cpu, va & ~0xfff & _U64)

    # --- contexts ----------------------------------------------------------------------------------------------------

    def new_context(self, *, cpl: int = 3) -> UnicornContext:
        """A context in 64-bit mode with flat segments of privilege level ``cpl`` (0, 1 or 3)."""
        return UnicornContext(self._blank[cpl])

    def load(self, context: Context) -> None:
        """Make ``context`` the running one, here or inside a trap handler (whose returned RIP then is the new
        context's)."""
        if context is self.loaded:
            return
        if not isinstance(context, UnicornContext):
            raise InternalError("a context of another kind of engine")
        if context.engine is not None:
            raise InternalError("the context is loaded on another CPU")
        self.unload()
        v64, v32 = self._v64, self._v32
        self._image[:] = context.view
        if self._running:
            settle_flags(v64, v32, v64[_EFLAGS], context.flags)
            v64[_EFLAGS] &= _FLAGS_STRICT
        if context.fpu_changed:
            context.fpu_changed = False
            x86 = self._lib.unicorn.x86_const
            self._uc.reg_write(x86.UC_X86_REG_FPCW, v32[ui.FPUS >> 2] >> 16)
            self._uc.reg_write(x86.UC_X86_REG_MXCSR, v32[ui.MXCSR >> 2])
        dr7 = context.dr7
        if dr7 & 0xff:
            self._lib.update_dr7(self._env, dr7)
        else:
            v64[_DR7] = dr7
        self._load_tlb(context)
        if isinstance(context, UnicornHvmContext) and (context.window or context.event or context.nmi):
            self._load_events(context)
        context.engine = self
        self.loaded = context

    def _load_tlb(self, context: UnicornContext) -> None:
        tlb = context.tlb
        if tlb is None or tlb.engine is not self:
            if tlb is not None:
                tlb.engine.retire(tlb)
            tlb = context.tlb = self._spare_tlbs.pop() if self._spare_tlbs else ContextTlb(self)
            tlb.stale = True
        generation = self._block32[CODE_GENERATION >> 2]
        used = self.tlb
        if tlb is not used:
            if self._exchange_tlb is None:
                tlb.stale = True
            else:
                self._exchange_tlb(self._state.env, used.address, tlb.address)
                if not tlb.filled:
                    self._lib.tlb_init(self._cpu)
                    tlb.filled = True
            used.generation, used.slot, used.roots = generation, self._slot, self._roots
            self.tlb = tlb
            self._slot, self._roots = tlb.slot, tlb.roots
            if tlb.generation != generation:
                tlb.stale = True
        if tlb.stale:
            tlb.stale = False
            self._lib.tlb_flush(self._cpu)
            self._slot = 1 if self._v32[ui.HFLAGS >> 2] & HF_SECOND_SPACE else 0
            self._roots = [-1, -1]
            self._roots[self._slot] = self.cr3

    def retire(self, tlb: ContextTlb) -> None:
        """A context needs ``tlb``, which is of this engine, no more. Any thread."""
        tlb.stale = True
        if self._uc is not None:
            self._spare_tlbs.append(tlb)
        elif tlb is not self.tlb:
            tlb.free(self._lib)

    def unload(self) -> None:
        """Save the loaded context."""
        context = self.loaded
        if context is None:
            return
        if isinstance(context, UnicornHvmContext) and self._has_events():
            self._save_events(context)
        v64 = self._v64
        # In a run RFLAGS is in several places; an image has all of it in one.
        v64[_EFLAGS] = (self.flags if self._running else v64[_EFLAGS]) & context.flags | 2
        context.dr7 = dr7 = v64[_DR7]
        if dr7 & 0xff:
            self._lib.update_dr7(self._env, 0x400)
        context.view[:] = self._image
        context.engine = None
        self.loaded = None

    # --- running -----------------------------------------------------------------------------------------------------

    def run(self, deadline_ns: int | None) -> Exit:
        """Execute the loaded context."""
        if self.loaded is None:
            raise InternalError("run without a context")
        if not self._deadline.enter(deadline_ns):
            return Exit.KICK
        self._deadline_ns = deadline_ns
        self._thread = threading.get_ident()
        self._running = True
        if self._posted or self._flush_all:
            self._forget_posted()
        while True:
            status = self._lib.emu_start(self._handle, self.gpr[RIP], 0, 0, 0)
            # An early alarm is no reason to leave; a moment from now it would have been the next run's.
            if status or self._kicked or not self._deadline.set(self._deadline_ns):
                break
        self._running = False
        # Kicks up to here are answered by this return: their senders have posted what it is about.
        self._kicked = False
        if self._failure is not None:
            failure, self._failure = self._failure, None
            self._stopping = False
            raise failure
        if status:
            detail = self.error or ui.UC_ERRORS.get(status, f"engine error {status}")
            self.error = f"{detail} at rip {self.gpr[RIP]:#x}"
            return Exit.ERROR
        if self._stopping:
            self._stopping = False
            return Exit.STOP
        return Exit.KICK

    def set_deadline(self, deadline_ns: int | None) -> None:
        """Move the deadline of the run in progress."""
        self._deadline_ns = deadline_ns
        if not self._deadline.set(deadline_ns):
            self.kick()

    def stop(self) -> None:
        """Leave :meth:`run` when the trap handler returns."""
        self._stopping = True
        self.kick()

    def kick(self) -> None:
        """Make :meth:`run` return at the next block boundary."""
        self._kicked = True
        self._halt()

    def _halt(self) -> None:
        self._interrupt[0] = ui.INTERRUPT_HALT
        self._icount[0] = 0xffff

    def invalidate(self, maddr: int, size: int) -> None:
        """Forget translated code of a range of machine memory."""
        end = maddr + size
        if self._running and threading.get_ident() == self._thread:
            self._lib.tb_invalidate_range(self._handle, maddr, end)
            return
        # Backends write into guest memory all the time, and almost never where there is code.
        if self._lib.next_code(self._state.uc, maddr >> 12, (end + 0xfff) >> 12) < 0:
            return
        with self._posting:
            posted = self._posted
            if posted and posted[-1][1] == maddr:
                posted[-1] = (posted[-1][0], end)
            elif len(posted) < _MAX_POSTED:
                posted.append((maddr, end))
            else:
                self._flush_all = True
        # run() sets _running before it looks at what was posted: either it sees this, or we see that it runs.
        if self._running:
            self.kick()

    def next_code(self, first: int, end: int) -> int:
        """The first page (machine frame number) from ``first`` on and before ``end`` that this engine has translated
        code of, or -1. From any thread; what another thread learns may be old at once."""
        return self._lib.next_code(self._state.uc, first, end)

    def forget_code(self, maddr: int, size: int) -> None:
        """Forget translated code of a range of machine memory now. Outside of :meth:`run` or in a trap handler, by
        the engine's thread; raises InternalError while another thread runs it."""
        if self._running and threading.get_ident() != self._thread:
            raise InternalError("forget_code of a CPU that another thread runs")
        self._lib.tb_invalidate_range(self._handle, maddr, maddr + size)

    def _forget_posted(self) -> None:
        with self._posting:
            posted, self._posted = self._posted, []
            flush_all, self._flush_all = self._flush_all, False
        if flush_all:
            self._lib.tb_flush(self._cpu)
            return
        for start, end in posted:
            self._lib.tb_invalidate_range(self._handle, start, end)

    def close(self) -> None:
        """Release the engine; it must not be running."""
        if self._running:
            raise InternalError("close of a running CPU")
        if self._uc is None:
            return
        self._memory.remove_listener(self.invalidate)
        self._deadline.cancel()
        self.unload()
        # The windows into the engine must not outlive it.
        self._state.release()
        self._release_block()
        self._uc = None
        self._keep.clear()
        for tlb in self._spare_tlbs:
            if tlb is not self.tlb:  # which the engine itself frees
                tlb.free(self._lib)
