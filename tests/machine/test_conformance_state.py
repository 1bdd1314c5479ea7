# SPDX-License-Identifier: GPL-2.0-only
"""Engine conformance: flags, segments, FPU, debug registers, and contexts that keep them."""

from __future__ import annotations

import struct
import time

import pytest

from pyxen.errors import InternalError
from pyxen.machine.cpu.base import RAX, RBX, RCX, RDI, RDX, RIP, RSI, RSP, Exit, Seg
from tests.machine import programs
from tests.machine.support import (
    CLOCK,
    CODE,
    DATA,
    GDT,
    ROOT,
    ROOT_STRIDE,
    STACK_TOP,
    Kicker,
    Machine,
    Trap,
    run_to_stop,
)

pytestmark = pytest.mark.engine
R8, R9, R10, R11, R15 = 8, 9, 10, 11, 15
U64 = (1 << 64) - 1


# --- flags and registers ---------------------------------------------------------------------------------------------

def test_flags_read_in_a_handler_are_those_the_guest_sees(machine: Machine) -> None:
    seen: list[int] = []
    machine.start(programs.FLAGS_AT_SYSCALLS, rax=7, rbx=9, rcx=1 << 63, rdx=U64)

    def note(next_rip: int) -> int:
        seen.append(machine.cpu.flags)
        if machine.cpu.gpr[RAX] == 0:
            machine.cpu.stop()
        return next_rip

    machine.recorder.on_syscall = note
    assert machine.cpu.run(None) is Exit.STOP
    pushed = [machine.cpu.gpr[n] for n in (R8, R9, R10, R11)]
    assert [flags & 0xcd5 for flags in seen[:4]] == [flags & 0xcd5 for flags in pushed]
    assert pushed[0] & 0x81 == 0x81 and pushed[2] & 0x440 == 0x440 and pushed[3] & 0x41 == 0x41


@pytest.mark.parametrize("flags", [0x202, 0x246, 0xad7, 0x203, 0x602, 0x240202, 0x200ed7])
def test_flags_written_in_a_handler_or_outside_reach_the_guest(machine: Machine, flags: int) -> None:
    for inside in (True, False):
        machine.start(programs.SYSCALL_THEN_FLAGS, rax=1)

        def set_them(next_rip: int, inside: bool = inside) -> int:
            if machine.cpu.gpr[RAX] == 0:
                machine.cpu.stop()
            elif inside:
                machine.cpu.flags = flags
                assert machine.cpu.flags == flags
            else:
                machine.cpu.stop()
            return next_rip

        machine.recorder.on_syscall = set_them
        assert machine.cpu.run(None) is Exit.STOP
        if not inside:
            machine.cpu.flags = flags
            assert machine.cpu.flags == flags
            assert machine.cpu.run(None) is Exit.STOP
        assert machine.cpu.gpr[R8] & 0x240fd7 == flags & 0x240dd7 | 0x200 & flags | 2
        machine.cpu.unload()


def test_segments_selectors_and_bases(machine: Machine) -> None:
    # mov rax,fs:[0]; mov rbx,gs:[8]; mov ecx,cs; mov edx,ss; syscall
    machine.start(bytes.fromhex("64488b042500000000 65488b1c2508000000 8cc9 8cd2 0f05"), rax=1)
    cpu = machine.cpu
    machine.memory.q[DATA >> 3], machine.memory.q[DATA + 0x108 >> 3] = 111, 222
    cpu.fs_base, cpu.gs_base = DATA, DATA + 0x100
    cpu.set_selector(Seg.CS, 0xe033)
    cpu.set_selector(Seg.SS, 0xe02b)
    machine.recorder.on_syscall = machine.recorder.stop
    assert cpu.run(None) is Exit.STOP
    assert [cpu.gpr[n] for n in (RAX, RBX, RCX, RDX)] == [111, 222, 0xe033, 0xe02b]
    assert cpu.selector(Seg.CS) == 0xe033 and (cpu.fs_base, cpu.gs_base) == (DATA, DATA + 0x100)
    cpu.load_segment(Seg.FS, 0x63, 0xabc000, 0xfffff, 0xc0f300)
    assert (cpu.selector(Seg.FS), cpu.fs_base, cpu.cpl()) == (0x63, 0xabc000, 3)


def test_iretq_and_selector_loads_use_the_gdt_and_ldt_that_were_set(machine: Machine) -> None:
    cpu = machine.cpu
    machine.memory.q[(GDT >> 3) + 5] = 0x00cff3000000ffff      # 0x28: data, DPL 3
    machine.memory.q[(GDT >> 3) + 6] = 0x00affb000000ffff      # 0x30: 64-bit code, DPL 3
    machine.memory.q[(GDT + 0x800 >> 3) + 1] = 0x00cff3123000ffff  # LDT entry 1: data, base 0x123000
    machine.start(programs.IRETQ, rax=1)
    cpu.set_gdt(GDT, 0x7f)
    assert cpu.run(None) is Exit.STOP
    assert [t.kind for t in machine.recorder.traps] == ["syscall"]
    assert (cpu.selector(Seg.CS), cpu.selector(Seg.SS), cpu.cpl(), cpu.gpr[RSP]) == (0x33, 0x2b, 3, STACK_TOP)
    # mov eax,0xf; mov fs,eax; rdfsbase is off: read the hidden base through the CPU; xor eax,eax; syscall
    machine.start(bytes.fromhex("b80f000000 8ee0 31c0 0f05"))
    cpu.set_gdt(GDT, 0x7f)
    cpu.set_ldt(0x40, GDT + 0x800, 0xf)
    assert cpu.run(None) is Exit.STOP
    assert (cpu.selector(Seg.FS), cpu.fs_base) == (0xf, 0x123000)
    machine.start(bytes.fromhex("b817000000 8ee0 31c0 0f05"))  # entry 2 is beyond the limit
    cpu.set_gdt(GDT, 0x7f)
    cpu.set_ldt(0x40, GDT + 0x800, 0xf)
    assert cpu.run(None) is Exit.STOP
    assert (machine.recorder.traps[-1].vector, machine.recorder.traps[-1].error_code) == (13, 0x14)


def test_task_switched_makes_fpu_use_fault_until_cleared(machine: Machine) -> None:
    machine.start(bytes.fromhex("660fefc0 31c0 0f05"))           # pxor xmm0,xmm0; xor eax,eax; syscall
    machine.cpu.set_task_switched(True)

    def clear(trap: Trap) -> int:
        machine.cpu.set_task_switched(False)
        return trap.rip

    machine.recorder.on_exception = clear
    assert machine.cpu.run(None) is Exit.STOP
    assert [(t.kind, t.vector) for t in machine.recorder.traps] == [("exception", 7), ("syscall", None)]


def test_locked_instructions(machine: Machine) -> None:
    steps = 5000
    machine.start(programs.LOCKED, rcx=steps, rsi=DATA)
    with Kicker(machine.cpu, 50e-6):
        run_to_stop(machine.cpu)
    q = machine.memory.q[DATA >> 3:(DATA >> 3) + 6].tolist()
    assert q == [steps, 3 * steps, 1, 0, steps, 0]


# --- contexts --------------------------------------------------------------------------------------------------------

class Chain:
    """A vCPU that runs an FPU program, and the same computation in Python."""

    def __init__(self, machine: Machine, number: int, code: bytes, constants: tuple[int, int]) -> None:
        self.machine, self.constants, self.steps = machine, constants, 37 + 13 * number
        at, self.data = 0x2000 + 0x1000 * number, DATA + 0x1000 * number
        self.increment = 3 + number
        machine.memory.q[self.data >> 3] = self.increment
        machine.start(code, at=at, rbx=number, rcx=self.steps, rdx=self.steps, rsi=self.data)
        cpu = machine.cpu
        cpu.gpr[RSP] = STACK_TOP + 0x1000 * number
        context = cpu.loaded
        assert context is not None
        self.context = context
        # fldz, so that the x87 chain has something to add to: run it outside of the program
        cpu.unload()
        registers = self.context.get()
        fxsave = bytearray(registers.fxsave)
        fxsave[0:5] = struct.pack("<HHB", 0x37f, 7 << 11, 0x80)
        registers.fxsave = bytes(fxsave)
        self.context.put(registers)
        self.rbx, self.xmm0, self.xmm3, self.x87, self.slices = number, [0, 0], 0.0, 0, 0

    def step_model(self) -> None:
        multiplier, addend = self.constants
        for rcx in range(self.steps, 0, -1):
            self.rbx = (self.rbx * multiplier + addend) & U64
            low, high = self.xmm0
            self.xmm0 = [high, (low + self.rbx) & U64]
            self.xmm3 += rcx
            self.x87 += self.increment
        self.slices += 1

    def check(self) -> None:
        registers = self.context.get()
        assert registers.gpr[RBX] == self.rbx
        assert registers.gpr[R9] == self.slices - 1              # CF set before each syscall and added after it
        assert registers.flags & 1
        fxsave = registers.fxsave
        assert list(struct.unpack_from("<2Q", fxsave, 160)) == self.xmm0
        assert struct.unpack_from("<d", fxsave, 160 + 48)[0] == self.xmm3
        mantissa, exponent = struct.unpack_from("<QH", fxsave, 32)
        assert mantissa * 2.0 ** (exponent - 16383 - 63) == self.x87


@pytest.mark.parametrize("inside", [True, False])
def test_contexts_keep_integer_sse_x87_and_flags_across_switches(machine: Machine, inside: bool) -> None:
    cpu = machine.cpu
    chains = [Chain(machine, number, *((programs.FPU_A, programs.FPU_A_CONSTANTS) if number % 2 else
                                       (programs.FPU_B, programs.FPU_B_CONSTANTS))) for number in range(4)]
    order = [(n * 7 + n // 3) % 4 for n in range(200)]
    position = 0

    def switch(next_rip: int) -> int:
        nonlocal position
        cpu.gpr[RIP] = next_rip
        chains[order[position]].step_model()
        position += 1
        if position == len(order):
            cpu.stop()
            return next_rip
        if inside:
            cpu.load(chains[order[position]].context)
        else:
            cpu.stop()
        return cpu.gpr[RIP]

    machine.recorder.on_syscall = switch
    while position < len(order):
        cpu.load(chains[order[position]].context)
        assert cpu.run(None) is Exit.STOP
    cpu.unload()
    for chain in chains:
        assert chain.slices > 10
        chain.check()


def test_contexts_survive_being_switched_at_any_block(machine: Machine) -> None:
    cpu = machine.cpu
    chains = [Chain(machine, number, programs.FPU_A, programs.FPU_A_CONSTANTS) for number in range(2)]
    for chain in chains:
        chain.steps = 200_000
        registers = chain.context.get()
        registers.gpr[RCX] = registers.gpr[RDX] = chain.steps
        chain.context.put(registers)
    machine.recorder.on_syscall = machine.recorder.stop
    done = [False, False]
    switches = 0
    with Kicker(cpu, 50e-6):
        while not all(done):
            for number, chain in enumerate(chains):
                if not done[number]:
                    cpu.load(chain.context)
                    done[number] = cpu.run(None) is Exit.STOP
                    switches += 1
    assert switches > 20
    cpu.unload()
    for chain in chains:
        chain.step_model()
        chain.check()


def test_context_put_and_get_are_inverse_and_the_guest_sees_what_was_put(machine: Machine) -> None:
    cpu = machine.cpu
    # stmxcsr [rsi]; fnstcw [rsi+4]; fnstsw [rsi+6]; movsd [rsi+8],xmm15; mov rax,fs:[0]; pushf; pop r8; syscall
    machine.put_code(CODE, bytes.fromhex("0fae1e d97e04 dd7e06 f2440f117e08 64488b042500000000 9c 4158 0f05"))
    context = cpu.new_context()
    registers = context.get()
    assert registers.flags == 0x202 and registers.gpr == [0] * 17
    assert struct.unpack_from("<HHB", registers.fxsave, 0) == (0x37f, 0, 0)
    assert struct.unpack_from("<I", registers.fxsave, 24) == (0x1f80,)
    fxsave = bytearray(registers.fxsave)
    struct.pack_into("<HHB", fxsave, 0, 0x27f, 0x3800 | 0x4700 & ~0x3800, 0x80)
    struct.pack_into("<I", fxsave, 24, 0x7f80)
    struct.pack_into("<d", fxsave, 160 + 15 * 16, 2.5)
    struct.pack_into("<QH", fxsave, 32, 1 << 63, 0x3fff)
    registers.fxsave = bytes(fxsave)
    registers.gpr[RIP], registers.gpr[RSP], registers.gpr[RSI] = CODE, STACK_TOP, DATA
    registers.flags, registers.bases[4], registers.cr3, registers.cr2 = 0xad7, DATA + 0x100, ROOT, 0x777
    registers.selectors = [1, 0xe033, 0xe02b, 2, 3, 4]
    machine.memory.q[DATA + 0x100 >> 3] = 4242
    context.put(registers)
    assert context.get() == registers
    machine.recorder.on_syscall = machine.recorder.stop
    cpu.load(context)
    assert cpu.cr2 == 0x777
    assert cpu.run(None) is Exit.STOP
    assert struct.unpack_from("<IHHd", machine.memory.b, DATA) == (0x7f80, 0x27f, 0x3800 | 0x4700 & ~0x3800, 2.5)
    assert cpu.gpr[RAX] == 4242 and cpu.gpr[R8] & 0xcd5 == 0x8d5
    with pytest.raises(InternalError):
        context.get()


def test_rounding_mode_that_was_put_is_in_force(machine: Machine) -> None:
    """MXCSR.RC = up: 1/3 rounds up. A saved control word that is only visible would not."""
    cpu = machine.cpu
    # cvtsi2sd xmm0,rax; cvtsi2sd xmm1,rbx; divsd xmm0,xmm1; movq rcx,xmm0; syscall
    machine.put_code(CODE, bytes.fromhex("f2480f2ac0 f2480f2acb f20f5ec1 66480f7ec1 0f05"))
    machine.recorder.on_syscall = machine.recorder.stop
    results = []
    for mxcsr in (0x1f80, 0x5f80):
        context = cpu.new_context()
        registers = context.get()
        fxsave = bytearray(registers.fxsave)
        struct.pack_into("<I", fxsave, 24, mxcsr)
        registers.fxsave = bytes(fxsave)
        registers.gpr[RIP], registers.gpr[RAX], registers.gpr[RBX], registers.cr3 = CODE, 1, 3, ROOT
        context.put(registers)
        cpu.load(context)
        assert cpu.run(None) is Exit.STOP
        results.append(cpu.gpr[RCX])
        cpu.unload()
    assert results[1] == results[0] + 1


def test_a_context_is_on_one_cpu_at_a_time(pair: Machine) -> None:
    pair.start(programs.SPIN)
    context = pair.cpu.loaded
    assert context is not None
    with pytest.raises(InternalError):
        pair.cpus[1].load(context)
    pair.cpu.load(context)                                       # loaded already: nothing happens
    pair.cpu.gpr[RAX] = 99
    pair.cpu.load(context)
    assert pair.cpu.gpr[RAX] == 99


def test_breakpoints_and_watchpoints(machine: Machine) -> None:
    cpu = machine.cpu
    machine.start(programs.NOPS)
    cpu.set_debug_register(0, CODE + 1)
    cpu.set_debug_register(7, 0x402)                             # G0, execute
    assert cpu.run(None) is Exit.STOP
    assert (machine.recorder.traps[-1].vector, machine.recorder.traps[-1].rip) == (1, CODE + 1)
    assert cpu.get_debug_register(6) & 0xf == 1
    context, other = cpu.loaded, cpu.new_context()
    assert context is not None
    # Another vCPU must not hit it, and it must be armed again when its owner is back.
    registers = other.get()
    registers.gpr[RIP], registers.gpr[RSP], registers.cr3 = CODE, STACK_TOP, ROOT
    other.put(registers)
    cpu.load(other)
    assert cpu.run(None) is Exit.STOP and machine.recorder.traps[-1].kind == "syscall"
    cpu.load(context)
    cpu.gpr[RIP] = CODE
    assert cpu.run(None) is Exit.STOP
    assert (machine.recorder.traps[-1].vector, machine.recorder.traps[-1].rip) == (1, CODE + 1)
    cpu.set_debug_register(7, 0x400)
    assert cpu.run(None) is Exit.STOP and machine.recorder.traps[-1].kind == "syscall"


def test_closing_gives_everything_back() -> None:
    machine = Machine(engines=2)
    machine.start(programs.SPIN)
    machine.cpu.run(CLOCK.now_ns() + 1_000_000)
    machine.close()
    machine.close()
    with pytest.raises(ValueError):
        _ = machine.cpu.gpr[RAX]


def test_a_fast_hypercall_path() -> None:
    """Not a benchmark: a syscall to Python and back that takes over 50 µs means the slow Python API crept in."""
    machine = Machine()
    machine.start(programs.SYSCALL_LOOP)
    count = 0

    def handler(next_rip: int) -> int:
        nonlocal count
        count += 1
        if count == 20_000:
            machine.cpu.stop()
        return next_rip

    machine.recorder.on_syscall = handler
    started = time.process_time()
    assert machine.cpu.run(None) is Exit.STOP
    assert (time.process_time() - started) / count < 50e-6
    machine.close()


def test_used_constants_are_consistent() -> None:
    assert ROOT % 0x1000 == 0 and ROOT_STRIDE >= 0x4000 and RDI == 7
