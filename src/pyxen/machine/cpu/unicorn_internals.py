# SPDX-License-Identifier: GPL-2.0-only
"""Everything private that pyxen knows about Unicorn 2.1.4's x86-64 engine.

Unicorn's public API gives no page-fault error code, no INVLPG, no precise asynchronous stop and no fast way to
registers. The
Linux wheels export all symbols of the QEMU core, and its state structures do not move within a release, so we read
and write
those. This module is the only one that may: structure offsets (:class:`Env` and the module's constants), private
functions
(:class:`Library`) and the machine-code patches (``unicorn_patches``). :func:`library` checks on first use, in
milliseconds, that the build is
the one described here, by planting values through the public API and finding them at our offsets; anything else raises
EngineError, since guessing would corrupt guests.

Structures (QEMU 5.0 as vendored by Unicorn): ``uc_struct`` (uc), ``CPUState`` (cpu), ``CPUX86State`` (env, embedded
in cpu).
"""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Callable
from ctypes import c_bool, c_int, c_size_t, c_uint16, c_uint32, c_uint64, c_void_p
from typing import TYPE_CHECKING, Any

from pyxen.errors import EngineError

if TYPE_CHECKING:
    from pyxen.machine.cpu.unicorn_hvm import Placed

EXPECTED_VERSION = "2.1.4"

# --- CPUX86State, byte offsets ------------------------------------------------------------------------------------
GPR = 0x00            # target_ulong regs[16], then eip, eflags
EIP = 0x80
EFLAGS = 0x88
CC_DST = 0x90
CC_SRC = 0x98
CC_SRC2 = 0xa0
CC_OP = 0xa8          # uint32_t
DF = 0xac             # int32_t: 1 or -1
HFLAGS = 0xb0         # uint32_t
HFLAGS2 = 0xb4
SEGS = 0xb8           # SegmentCache[6]: u32 selector, pad, u64 base, u32 limit, u32 flags
SEG_SIZE = 24
LDT = 0x148
TR = 0x160
GDT = 0x178
IDT = 0x190
CR = 0x1a8            # target_ulong cr[5]
CR0, CR2, CR3, CR4 = CR, CR + 16, CR + 24, CR + 32
EFER = 0x250
FPSTT = 0x25c         # uint32_t
FPUS = 0x260          # uint16_t, without the top field
FPUC = 0x262
FPTAGS = 0x264        # uint8_t[8], 1 = empty, by physical register
FPREGS = 0x270        # FPReg[8], 16 bytes each, by physical register
FPOP, FPCS, FPDS = 0x2f0, 0x2f2, 0x2f4
FPIP, FPDP = 0x2f8, 0x300
MXCSR = 0x330
XMM = 0x338           # ZMMReg[32], 64 bytes each
XMM_SIZE = 64
ERROR_CODE = 0x1508   # int
EXCEPTION_IS_INT = 0x150c
EXCEPTION_NEXT_EIP = 0x1510
DR = 0x1518           # target_ulong dr[8], then 4 pointers to breakpoints
BREAKPOINTS = 0x1558
OLD_EXCEPTION = 0x1578
VM_VMCB = 0x1580
INTERCEPT = 0x1590
NESTED_CR3, NESTED_MODE = 0x15a8, 0x15b0
V_TPR = 0x15b4        # uint8_t
SYSENTER_CS, SYSENTER_ESP, SYSENTER_EIP = 0x12c0, 0x12c8, 0x12d0
STAR, LSTAR, CSTAR, FMASK, KERNEL_GS_BASE, TSC_AUX = 0x12d8, 0x12e8, 0x12f0, 0x12f8, 0x1300, 0x1320
MTRR_DEFTYPE = 0x1908 # beyond a context; unicorn_hvm keeps a pointer there
UC_POINTER = 0x1b58
CONTEXT_SIZE = 0x15c0
"""What belongs to the guest: everything above is configuration of the CPU model, or pointers into this engine."""

CC_OP_EFLAGS = 1
FLAGS_IN_CC = 0x8d5       # CF PF AF ZF SF OF live in cc_src while code runs
FLAGS_LAZY = 0xcd5        # these and DF are absent from env.eflags while code runs

# --- hflags ----------------------------------------------------------------------------------------------------------
HF_CPL = 3
HF_CS32, HF_SS32, HF_ADDSEG = 1 << 4, 1 << 5, 1 << 6
HF_TS = 1 << 11
HF_INHIBIT_IRQ = 1 << 3
HF_LMA, HF_CS64 = 1 << 14, 1 << 15
HF_PE = 1 << 7
HF_GUEST = 1 << 21
HF_SMAP = 1 << 23
HF_FROM_EFLAGS = 0x73100  # TF IOPL RF VM AC: the translator takes them from eflags, a stale copy here would stick

HF2_GIF, HF2_NMI, HF2_VINTR, HF2_NPT = 1 << 0, 1 << 2, 1 << 3, 1 << 6

# --- CPUState and uc_struct ------------------------------------------------------------------------------------------
CPU_INTERRUPT_REQUEST = 0x1c
CPU_EXCEPTION_INDEX = 0x81a0
CPU_UC = 0x81a8
UC_TCG = 0x300            # tcg_ctx
UC_RAM_BLOCKS = 0x298     # ram_list.blocks; RAMBlock: mr, host, offset, used_length
RAM_BLOCK_HOST, RAM_BLOCK_OFFSET, RAM_BLOCK_USED = 0x08, 0x10, 0x18
INTERRUPT_VIRQ = 0x100
INTERRUPT_EVENT = 0x10000 # ours: an event waits (unicorn_hvm)
INTERRUPT_HALT = 0x20     # CPU_INTERRUPT_HALT, which this engine never uses: unicorn_patches makes it "leave the run"

# uc_err values that a run can end with (unicorn.h)
UC_ERRORS = {
    3: "unsupported handle", 6: "guest read of unmapped memory", 7: "guest write to unmapped memory",
    8: "guest fetch of unmapped memory", 10: "invalid instruction",
    12: "guest write to protected memory", 13: "guest read of protected memory", 14: "guest fetch of protected memory",
    20: "out of memory", 21: "unhandled exception",
}

# Prototypes of the raw hooks. ctypes turns them into C function pointers; the public Python API would add 2 µs a call.
HOOK_INTR = ctypes.CFUNCTYPE(None, c_void_p, c_uint32, c_void_p)
HOOK_INVALID = ctypes.CFUNCTYPE(c_bool, c_void_p, c_void_p)
HOOK_SYSCALL = ctypes.CFUNCTYPE(None, c_void_p, c_void_p)
HOOK_CPUID = ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p)
HOOK_IN = ctypes.CFUNCTYPE(c_uint32, c_void_p, c_uint32, c_int, c_void_p)
HOOK_OUT = ctypes.CFUNCTYPE(None, c_void_p, c_uint32, c_int, c_uint32, c_void_p)
MMIO_READ = ctypes.CFUNCTYPE(c_uint64, c_void_p, c_uint64, ctypes.c_uint, c_void_p)
MMIO_WRITE = ctypes.CFUNCTYPE(None, c_void_p, c_uint64, ctypes.c_uint, c_uint64, c_void_p)
HOOK_MEMORY = ctypes.CFUNCTYPE(c_bool, c_void_p, c_int, c_uint64, c_int, ctypes.c_int64, c_void_p)

_HINT = f"install unicorn=={EXPECTED_VERSION} from PyPI (Linux x86-64 wheel): pip install 'unicorn=={EXPECTED_VERSION}'"


def unknown_build(what: str) -> EngineError:
    """The error for a library that is not the one this module describes."""
    return EngineError(f"this build of the Unicorn engine is unknown to pyxen: {what}", hint=_HINT)


def pattern(text: str) -> re.Pattern[bytes]:
    """Machine code in lower-case hex with holes of four (``DDDD``) and one byte (``BB``), which become groups."""
    expression = b"".join(
        {"DDDD": b"(.{4})", "BB": b"(.)"}.get(part) or re.escape(bytes.fromhex(part))
        for part in re.split("(DDDD|BB)", text.replace(" ", "")))
    return re.compile(expression, re.DOTALL)


def match(code: bytes, text: str, what: str) -> tuple[int, ...]:
    """Match ``code`` from its start against a :func:`pattern`; returns the unsigned little-endian values in the holes.

    Raises EngineError when the code is different.
    """
    found = pattern(text).match(code)
    if found is None:
        raise unknown_build(f"{what} starts with {code[:16].hex()}")
    return tuple(int.from_bytes(group, "little") for group in found.groups())


# helper_check_exit_request: mov r8,[rdi+cpu]; mov eax,[r8+icount_decr]; test eax,eax; jns; test esi,esi; je; ret
CHECK_EXIT_CODE = "4c8b87 DDDD 418b80 DDDD 85c0 7904 85f6 740a c3"
# check_exit_request: mov rsi,[rdi+tcg_ctx.uc]; cmp byte [rsi+no_exit_request],0; je; ret
CHECK_EMIT_CODE = "488bb7 DDDD 80be DDDD 00 7408 c3"

# uc_emu_stop: … mov byte [rdi+stop_request], 1; jne; mov rdi, [rdi+cpu]
EMU_STOP_CODE = "4154 4883ec10 80bf DDDD 00 7431 4531e4 80bf DDDD 00 c687 DDDD 01 7511 488bbf DDDD"
# cpu_exit: mov rax, [rdi+icount_decr_ptr]; mov edx, -1; mov byte [rdi+exit_request], 1; mov dword [rdi+tcg_exit_req], 1
CPU_EXIT_CODE = "488b87 DDDD ba DDDD c647BB01 c787 DDDD 01000000"


class Library:
    """The shared library, its private functions, and the offsets that are read out of its code."""

    def __init__(self) -> None:
        try:
            import unicorn
            from unicorn.unicorn_py3 import unicorn as bindings
        except ImportError as error:
            raise EngineError(f"the Unicorn engine cannot be loaded: {error}", hint=_HINT) from error
        version: str = vars(unicorn)["__version__"]
        if version != EXPECTED_VERSION:
            raise unknown_build(f"version {version}, {EXPECTED_VERSION} expected")
        self.unicorn: Any = unicorn
        self.path: str = bindings.uclib._name
        self._free = ctypes.CDLL(self.path)       # releases the GIL
        self._held = ctypes.PyDLL(self.path)      # keeps it: right for calls that take less than a microsecond

        # Set by unicorn_patches:
        self.next_code: Callable[[int, int, int], int]                 # unicorn_dirty
        self.hvm: Placed                                               # unicorn_hvm
        self.block_check = False                                       # unicorn_blockcheck is installed
        self.exchange_spaces: Callable[[Any, int], int] | None = None  # unicorn_spaces
        self.exchange_tlb: Callable[[int, int, int], None] | None = None  # unicorn_tlb

        # emu_start runs guest code: the one call that must let other Python threads go on.
        self.emu_start = self._free.uc_emu_start
        self.emu_start.argtypes = (c_void_p, c_uint64, c_uint64, c_uint64, c_size_t)
        self.emu_start.restype = c_int
        self.hook_add = self._held.uc_hook_add
        self.hook_add.restype = c_int
        self.mmio_map = self._held.uc_mmio_map
        self.mmio_map.argtypes = (c_void_p, c_uint64, c_size_t, c_void_p, c_void_p, c_void_p, c_void_p)
        self.mmio_map.restype = c_int
        self.tlb_init = self._function("tlb_init_x86_64", None, c_void_p)
        self.free = self._libc_free()
        self.tlb_flush = self._function("tlb_flush_x86_64", None, c_void_p)
        self.tlb_flush_by_mmuidx = self._function("tlb_flush_by_mmuidx_x86_64", None, c_void_p, c_uint16)
        self.tlb_flush_page = self._function("tlb_flush_page_x86_64", None, c_void_p, c_uint64)
        self.tb_flush = self._function("tb_flush_x86_64", None, c_void_p)
        self.tb_invalidate_range = self._function("tb_invalidate_phys_range_x86_64", None,
                                                  c_void_p, c_uint64, c_uint64)
        self.update_hflags = self._function("x86_update_hflags_x86_64", None, c_void_p)
        self.read_eflags = self._function("helper_read_eflags_x86_64", c_uint64, c_void_p)
        self.update_cr0 = self._function("cpu_x86_update_cr0_x86_64", None, c_void_p, c_uint32)
        self.update_cr4 = self._function("cpu_x86_update_cr4_x86_64", None, c_void_p, c_uint32)
        self.update_dr7 = self._function("cpu_x86_update_dr7_x86_64", None, c_void_p, c_uint32)

        check = self.code("helper_check_exit_request_x86_64", 48)
        self.uc_cpu, self.cpu_icount = match(check, CHECK_EXIT_CODE, "helper_check_exit_request")
        check = self.code("check_exit_request_x86_64", 32)
        _, self.uc_no_exit_request = match(check, CHECK_EMIT_CODE, "check_exit_request")
        *_, self.uc_stop_request, uc_cpu = match(self.code("uc_emu_stop", 48), EMU_STOP_CODE, "uc_emu_stop")
        _, _, self.cpu_exit_request, _ = match(self.code("cpu_exit", 32), CPU_EXIT_CODE, "cpu_exit")
        if uc_cpu != self.uc_cpu:
            raise unknown_build("two functions disagree about where uc.cpu is")
        # CPUNegativeOffsetState ends with icount_decr, padded to 16 bytes, right before env.
        self.cpu_env = self.cpu_icount + 16

    @staticmethod
    def _libc_free() -> Any:
        """What the engine's g_free() is."""
        free = ctypes.PyDLL(None).free
        free.argtypes = (c_void_p,)
        free.restype = None
        return free

    def _function(self, name: str, result: Any, *arguments: Any) -> Any:
        try:
            function = getattr(self._held, name)
        except AttributeError:
            raise unknown_build(f"it does not export {name}") from None
        function.argtypes = arguments
        function.restype = result
        return function

    def address(self, name: str) -> int:
        """Where an exported symbol is. Raises EngineError if there is none."""
        try:
            value = ctypes.cast(getattr(self._held, name), c_void_p).value
        except AttributeError:
            raise unknown_build(f"it does not export {name}") from None
        assert value is not None
        return value

    def code(self, name: str, size: int) -> bytes:
        """Machine code at an exported symbol."""
        return ctypes.string_at(self.address(name), size)


def _window(address: int, size: int) -> memoryview:
    return memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")


def peek(address: int, size: int) -> bytes:
    """Memory of this process at an address that may be wrong: zeros where nothing is mapped."""
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        try:
            return os.pread(memory.fileno(), size, address).ljust(size, b"\0")
        except (OSError, OverflowError):
            return bytes(size)


class State:
    """Typed windows into one engine's uc, cpu and env. They live as long as the engine does."""

    def __init__(self, lib: Library, uc_pointer: int) -> None:
        self.uc = uc_pointer
        self.cpu = int(c_uint64.from_address(uc_pointer + lib.uc_cpu).value)
        self.env = self.cpu + lib.cpu_env
        self.env8 = _window(self.env, CONTEXT_SIZE)
        self.env32 = self.env8.cast("I")
        self.env64 = self.env8.cast("Q")
        self.gpr = self.env64[:17]
        self.old_exception = self.env8[OLD_EXCEPTION:OLD_EXCEPTION + 4].cast("i")
        self.kick_words = (self.cpu + CPU_INTERRUPT_REQUEST, self.cpu + lib.cpu_icount + 2)
        """Addresses of the next two; what a kick stores there is a byte and 16 bits."""
        self.interrupt_request = _window(self.kick_words[0], 4)
        self.icount_high = _window(self.kick_words[1], 2).cast("H")
        self.no_exit_request = _window(uc_pointer + lib.uc_no_exit_request, 1)


    def release(self) -> None:
        """Make every window unusable: the engine is about to go."""
        for view in (self.gpr, self.env32, self.env64, self.old_exception, self.env8,
                     self.interrupt_request, self.icount_high, self.no_exit_request):
            view.release()

    def ram_is(self, host: int, size: int) -> bool:
        """Whether the engine's only RAM block starts at ``host`` and is ``size`` bytes: unicorn_dirty counts on it."""
        block = int.from_bytes(peek(self.uc + UC_RAM_BLOCKS, 8), "little")
        fields = peek(block + RAM_BLOCK_HOST, 24)
        return fields == host.to_bytes(8, "little") + bytes(8) + size.to_bytes(8, "little")


_library: Library | None = None


def library() -> Library:
    """The library, checked and patched on first use. Raises EngineError for an unknown build."""
    global _library
    if _library is None:
        from pyxen.machine.cpu import unicorn_patches, unicorn_selftest

        lib = Library()
        engine = unicorn_selftest.check_layout(lib)
        unicorn_patches.install(lib, engine.state.uc)
        unicorn_selftest.check_patches(lib)
        _library = lib
    return _library
