# SPDX-License-Identifier: GPL-2.0-only
"""A bare machine for guests under nested paging: nested tables, a guest's descriptor tables, and a recorder.

Guest-physical 0..2 MiB is machine GUEST..GUEST+2 MiB, so the two are never the same number.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from pyxen.machine.cpu.base import RAX, RIP, RSP, Exit, HvmContext, Segment
from pyxen.machine.cpu.unicorn_x86 import UnicornX86
from tests.machine.support import Machine, Recorder

GUEST = 0x400000
NESTED_ROOT = 0x200000
P, W, U, PS, NX = 1, 2, 4, 0x80, 1 << 63
PWU = P | W | U

CODE, HANDLERS, STACK_TOP, DATA = 0x1000, 0x3000, 0x9000, 0x10000
GDT, IDT, TSS, RING0_TOP, IST1_TOP = 0x18000, 0x19000, 0x1a000, 0x1c000, 0x1e000
TABLES = 0x40000
"""The guest's own page tables (L4 first in long mode; the directory in 32-bit mode)."""
DEVICE = 0xfee00000
KERNEL_CS, KERNEL_DS, USER_CS, USER_DS, USER_CS32, TSS_SELECTOR = 0x08, 0x10, 0x2b, 0x23, 0x1b, 0x30
HAS_ERROR_CODE = frozenset((8, 10, 11, 12, 13, 14, 17))


@dataclass
class Frame:
    """What an exception handler of the guest found on its stack."""

    vector: int
    error_code: int | None
    rip: int
    cs: int
    flags: int
    rsp: int | None
    cr2: int


@dataclass
class HvmRecorder(Recorder):
    """Records exits. EAX = 0 in a hypercall stops; 0x100 + n comes from the guest's handler of vector n."""

    cpu: UnicornX86
    machine: HvmMachine
    traps: list[Any] = field(default_factory=list)
    exits: list[tuple[Any, ...]] = field(default_factory=list)
    frames: list[Frame] = field(default_factory=list)
    on: dict[str, Callable[..., Any]] = field(default_factory=dict)
    on_syscall: Any = None
    on_exception: Any = None
    on_cpuid: Any = None

    def _exit(self, name: str, default: Any, *arguments: int, stop: bool = False) -> Any:
        self.exits.append((name, *arguments))
        if name in self.on:
            return self.on[name](*arguments)
        if stop:
            self.cpu.stop()
        return default

    def hypercall(self, next_rip: int) -> int:
        eax = self.cpu.gpr[RAX] & 0xffffffff
        if 0x100 <= eax < 0x200:
            frame = self.machine.frame(eax - 0x100)
            self.frames.append(frame)
            if "frame" in self.on:
                return int(self.on["frame"](frame, next_rip))
            self.cpu.stop()
            return next_rip
        return int(self._exit("hypercall", next_rip, next_rip, stop=eax == 0))

    def nested_fault(self, gpa: int, error_code: int, rip: int) -> int:
        return int(self._exit("nested_fault", rip, gpa, error_code, rip, stop=True))

    def io_read(self, port: int, size: int) -> int:
        return int(self._exit("io_read", 0x11223344, port, size))

    def io_write(self, port: int, size: int, value: int) -> None:
        self._exit("io_write", None, port, size, value)

    def mmio_read(self, offset: int, size: int) -> int:
        return int(self._exit("mmio_read", 0x8877665544332211 + offset, offset, size))

    def mmio_write(self, offset: int, size: int, value: int) -> None:
        self._exit("mmio_write", None, offset, size, value)

    def read_msr(self, number: int) -> int | None:
        value: int | None = self._exit("read_msr", 0x1122334455667788, number)
        return value

    def write_msr(self, number: int, value: int) -> bool:
        return bool(self._exit("write_msr", True, number, value))

    def write_cr(self, number: int, value: int) -> bool:
        self.exits.append(("write_cr", number, value))
        if "write_cr" in self.on:
            return bool(self.on["write_cr"](number, value))
        self.cpu.set_cr(number, value)
        return True

    def halt(self, next_rip: int) -> int:
        return int(self._exit("halt", next_rip, next_rip, stop=True))

    def pause(self, next_rip: int) -> int:
        return int(self._exit("pause", next_rip, next_rip))

    def interrupt_window(self, rip: int) -> int:
        return int(self._exit("interrupt_window", rip, rip))

    def triple_fault(self, rip: int) -> int:
        return int(self._exit("triple_fault", rip, rip, stop=True))

    def intercept(self, code: int, info: int, rip: int) -> int:
        self.exits.append(("intercept", code, info, rip))
        self.cpu.inject_exception(6, None)
        return rip

    @property
    def kinds(self) -> list[str]:
        return [entry[0] for entry in self.exits]


class HvmMachine(Machine):
    """A :class:`Machine` whose engines have HvmRecorders."""

    def __init__(self, engines: int = 1) -> None:
        super().__init__(engines)
        self.hvm = [HvmRecorder(cpu, self) for cpu in self.cpus]
        for cpu, recorder in zip(self.cpus, self.hvm, strict=True):
            cpu.traps = recorder
        self.rec = self.hvm[0]
        self.long = False
        self.build_nested()

    # --- nested tables -----------------------------------------------------------------------------------------------

    def build_nested(self, root: int = NESTED_ROOT, guest: int = GUEST, flags: int = PWU) -> None:
        """Map gpa 0..2 MiB to ``guest``, and DEVICE to the MMIO window (two pages)."""
        q = self.memory.q
        self.memory.zero(root >> 12, 8)
        q[root >> 3] = root + 0x1000 | PWU
        q[root + 0x1000 >> 3] = root + 0x2000 | PWU
        q[root + 0x2000 >> 3] = root + 0x3000 | PWU
        q[(root + 0x1000 >> 3) + 3] = root + 0x4000 | PWU          # 3..4 GiB
        q[(root + 0x4000 >> 3) + (DEVICE >> 21 & 511)] = root + 0x5000 | PWU
        for n in range(2):
            q[(root + 0x5000 >> 3) + (DEVICE >> 12 & 511) + n] = self.cpu.mmio_base + (n << 12) | PWU
        for page in range(512):
            q[(root + 0x3000 >> 3) + page] = guest + (page << 12) | flags

    def set_npte(self, gpa: int, entry: int, root: int = NESTED_ROOT) -> None:
        """Overwrite the nested L1 entry of ``gpa`` (< 2 MiB); flushes nothing."""
        self.memory.q[(root + 0x3000 >> 3) + (gpa >> 12)] = entry

    def grant(self, gpa: int, flags: int = PWU, root: int = NESTED_ROOT) -> None:
        self.set_npte(gpa, GUEST + (gpa & ~0xfff) | flags, root)

    # --- the guest's memory ------------------------------------------------------------------------------------------

    def write(self, gpa: int, data: bytes) -> None:
        self.memory.write(GUEST + gpa, data)
        for page in range(gpa >> 12, (gpa + len(data) - 1 >> 12) + 1):
            self.memory.written((GUEST >> 12) + page)

    def read(self, gpa: int, size: int) -> bytes:
        return bytes(self.memory.read(GUEST + gpa, size))

    def q(self, gpa: int) -> int:
        return int.from_bytes(self.read(gpa, 8), "little")

    def frame(self, vector: int) -> Frame:
        """The frame at the guest's stack pointer (identity-mapped)."""
        size = 8 if self.long else 4
        rsp = self.cpu.gpr[RSP]
        if rsp >= 0x1fff80:                              # a hostile guest's: not in its RAM
            return Frame(vector, None, 0, 0, 0, None, self.cpu.cr2)
        words = [int.from_bytes(self.read(rsp + size * n, size), "little") for n in range(1, 7)]
        error_code = words.pop(0) if vector in HAS_ERROR_CODE else None
        inner = self.long or words[1] & 3
        return Frame(vector, error_code, words[0], words[1], words[2], words[3] if inner else None, self.cpu.cr2)

    # --- a guest -----------------------------------------------------------------------------------------------------

    def tables(self, *, ist: dict[int, int] | None = None, dpl3: tuple[int, ...] = (3, 4, 0x80)) -> None:
        """GDT, TSS, IDT and handlers of every vector. Handlers make hypercall 0x100 + n, then return."""
        code = 0x00af9b000000ffff if self.long else 0x00cf9b000000ffff
        user = 0x00affb000000ffff if self.long else 0x00cffb000000ffff
        tss = 0x67 | (TSS & 0xffffff) << 16 | 0x89 << 40
        self.write(GDT, struct.pack("<8Q", 0, code, 0x00cf93000000ffff, 0x00cffb000000ffff, 0x00cff3000000ffff, user,
                                    tss, 0))
        if self.long:
            self.write(TSS, bytes(4) + struct.pack("<3Q", RING0_TOP, 0, 0) + bytes(8) + struct.pack("<Q", IST1_TOP)
                       + bytes(0x67 - 44 + 1))
        else:
            self.write(TSS, struct.pack("<III", 0, RING0_TOP, KERNEL_DS) + bytes(0x68 - 12))
        idt = bytearray()
        for vector in range(256):
            at = HANDLERS + 32 * vector
            attributes = 0x8e | (0x60 if vector in dpl3 else 0)
            gate = struct.pack("<HHBBH", at & 0xffff, KERNEL_CS, (ist or {}).get(vector, 0), attributes, at >> 16)
            idt += gate + bytes(8) if self.long else gate
            pop = (bytes.fromhex("4883c408") if self.long else bytes.fromhex("83c404")) * (vector in HAS_ERROR_CODE)
            # push rax; mov eax, 0x100 + vector; vmcall; pop rax; [add rsp, 8]; iret
            code_ = b"\x50\xb8" + (0x100 + vector).to_bytes(4, "little") + bytes.fromhex("0f01c158") + pop
            self.write(at, code_ + (bytes.fromhex("48cf") if self.long else b"\xcf"))
        self.write(IDT, bytes(idt))

    def identity(self, kind: str, flags: int = PWU) -> None:
        """The guest's own tables: virtual 0..2 MiB as guest-physical, and DEVICE."""
        self.write(TABLES, bytes(0x6000))
        if kind == "32":
            self.write(TABLES, (TABLES + 0x1000 | PWU).to_bytes(4, "little"))
            self.write(TABLES + (DEVICE >> 22) * 4, (TABLES + 0x2000 | PWU).to_bytes(4, "little"))
            self.write(TABLES + 0x1000, struct.pack("<512I", *(page << 12 | flags for page in range(512))))
            for n in range(2):
                self.write(TABLES + 0x2000 + (DEVICE >> 12 & 1023) * 4 + 4 * n,
                           (DEVICE + (n << 12) | PWU).to_bytes(4, "little"))
            return
        top = TABLES if kind == "64" else TABLES + 0x1000
        if kind == "64":
            self.write(top, (TABLES + 0x1000 | PWU).to_bytes(8, "little"))
        entry = P if kind == "pae" else PWU
        self.write(TABLES + 0x1000, (TABLES + 0x2000 | entry).to_bytes(8, "little"))
        self.write(TABLES + 0x1018, (TABLES + 0x4000 | entry).to_bytes(8, "little"))
        self.write(TABLES + 0x2000, (TABLES + 0x3000 | PWU).to_bytes(8, "little"))
        self.write(TABLES + 0x3000, struct.pack("<512Q", *(page << 12 | flags for page in range(512))))
        self.write(TABLES + 0x4000 + (DEVICE >> 21 & 511) * 8, (TABLES + 0x5000 | PWU).to_bytes(8, "little"))
        for n in range(2):
            self.write(TABLES + 0x5000 + (DEVICE >> 12 & 511) * 8 + 8 * n,
                       (DEVICE + (n << 12) | PWU).to_bytes(8, "little"))

    def set_pte64(self, va: int, entry: int) -> None:
        """The guest's own L1 entry in 64-bit or PAE mode."""
        self.write(TABLES + 0x3000 + (va >> 12) * 8, (entry & (1 << 64) - 1).to_bytes(8, "little"))

    def context(self, mode: str = "64", *, cpl: int = 0, root: int = NESTED_ROOT, engine: int = 0,
                **options: Any) -> HvmContext:
        """A guest in "flat" (32-bit, no paging), "32", "pae" or "64" mode, ready to run CODE at ``cpl``."""
        self.long = mode == "64"
        self.tables(**options)
        context = self.cpus[engine].new_hvm_context(root)
        r = context.get_hvm()
        if mode != "flat":
            self.identity(mode)
            r.cr0 |= 0x80010001
            r.cr3 = TABLES + 0x1000 if mode == "pae" else TABLES
            r.cr4 = 0x600 if mode == "32" else 0x620
        if self.long:
            r.efer = 0xd01
        selector = USER_CS if cpl else KERNEL_CS
        code = (0xa09b if self.long else 0xc09b) | cpl << 5
        r.segments = [Segment((USER_DS if cpl else KERNEL_DS), 0, 0xffffffff, 0xc093 | cpl << 5) for _ in range(6)]
        r.segments[1] = Segment(selector, 0, 0xffffffff, code)
        r.gdtr, r.idtr = (GDT, 0x3f), (IDT, 0xfff if self.long else 0x7ff)
        r.tr = Segment(TSS_SELECTOR, TSS, 0x67, 0x8b)
        r.gpr[RIP], r.gpr[RSP] = CODE, STACK_TOP
        context.put_hvm(r)
        return context

    def begin(self, code: bytes, mode: str = "64", **options: Any) -> UnicornX86:
        """Load a guest that will run ``code``."""
        self.write(CODE, code)
        context = self.context(mode, **options)
        cpu = self.cpus[options.get("engine", 0)]
        cpu.load(context)
        return cpu

    def run(self, code: bytes, mode: str = "64", **options: Any) -> Exit:
        """Begin and run to the first stop; kicks do not count."""
        cpu = self.begin(code, mode, **options)
        return self.go(cpu)

    def go(self, cpu: UnicornX86 | None = None) -> Exit:
        cpu = cpu or self.cpu
        while (reason := cpu.run(None)) is Exit.KICK:
            pass
        return reason
