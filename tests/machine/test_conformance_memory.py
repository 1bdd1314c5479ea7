# SPDX-License-Identifier: GPL-2.0-only
"""Engine conformance: translated code, the TLB, and the two address spaces of exact mode."""

from __future__ import annotations

import struct
import threading

import pytest

from pyxen.machine.cpu import unicorn_x86
from pyxen.machine.cpu.base import RAX, RBX, RCX, RIP, RSI, RSP, Exit
from tests.machine import programs
from tests.machine.support import (
    CLOCK,
    CODE,
    DATA,
    GDT,
    NX,
    PWU,
    ROOT,
    STACK_TOP,
    Kicker,
    Machine,
    run_to_stop,
)

pytestmark = pytest.mark.engine
R8, R9, R10, R11, R15 = 8, 9, 10, 11, 15
U64 = (1 << 64) - 1


# --- translation caches ----------------------------------------------------------------------------------------------

def test_host_writes_of_code_are_seen_once_announced(machine: Machine) -> None:
    machine.put_code(0x5000, programs.RETURN_1)
    machine.start(programs.CALL_5000)
    results = []

    def rewrite(next_rip: int) -> int:
        results.append(machine.cpu.gpr[RAX])
        if len(results) == 2:
            machine.cpu.stop()
        machine.put_code(0x5000, programs.RETURN_2)              # before the next instruction
        return CODE

    machine.recorder.on_syscall = rewrite
    assert machine.cpu.run(None) is Exit.STOP
    machine.put_code(0x5000, programs.RETURN_1)                  # between runs
    machine.recorder.on_syscall = machine.recorder.stop
    assert machine.cpu.run(None) is Exit.STOP
    assert [*results, machine.cpu.gpr[RAX]] == [1, 2, 1]


def test_code_written_by_another_thread_reaches_a_running_guest(machine: Machine) -> None:
    machine.put_code(0x5000, programs.RETURN_1)
    machine.start(programs.CALL_5000_UNTIL_2)
    timer = threading.Timer(0.005, lambda: machine.put_code(0x5000, programs.RETURN_2))
    timer.start()
    end = CLOCK.now_ns() + 5_000_000_000
    while machine.cpu.run(end) is not Exit.STOP:
        assert CLOCK.now_ns() < end
    timer.join()


@pytest.mark.parametrize("limit", [2, 16384])
def test_many_posted_invalidations_are_honoured(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, limit: int,
) -> None:
    """Also when there are more than the engine keeps one by one."""
    monkeypatch.setattr(unicorn_x86, "_MAX_POSTED", limit)
    pages = (0x5000, 0x6000, 0x20000, 0x22000, 0x24000, 0x26000)
    machine.start(programs.NOPS)
    machine.recorder.on_syscall = machine.recorder.stop
    for answer in (1, 2, 3):
        for page in pages:
            machine.put_code(page, b"\xb8" + answer.to_bytes(4, "little") + b"\x0f\x05")  # mov eax,…; syscall
        for page in pages:
            machine.cpu.gpr[RIP] = page
            assert machine.cpu.run(None) is Exit.STOP
            assert machine.cpu.gpr[RAX] == answer


def test_announced_writes_where_no_code_is_do_not_disturb_a_running_guest(machine: Machine) -> None:
    machine.start(programs.SPIN)
    ended = threading.Event()

    def write_data() -> None:
        while not ended.wait(0.0005):
            machine.memory.written(0x300, 64)

    writer = threading.Thread(target=write_data)
    writer.start()
    deadline = CLOCK.now_ns() + 30_000_000
    assert machine.cpu.run(deadline) is Exit.KICK
    assert CLOCK.now_ns() >= deadline                            # nothing else ended it
    ended.set()
    writer.join()


def test_code_written_through_another_mapping_is_seen(machine: Machine) -> None:
    """The guest writes at 0x20000 (no execute) and runs at 0x5000, the same frame: no flush, no jump between views."""
    machine.put_code(0x5000, programs.RETURN_IMMEDIATE)
    machine.set_pte(0x20000, 0x5000 | PWU | NX)
    machine.start(programs.WRITE_CODE_AND_CALL)
    assert machine.cpu.run(None) is Exit.STOP
    assert [t.kind for t in machine.recorder.traps] == ["syscall"], machine.cpu.gpr[RBX]


def test_a_domain_that_moves_between_engines_runs_its_new_code(pair: Machine) -> None:
    """Ran on A, moved to B and rewritten there, moved back: what enters an engine is invalidated there."""
    first, second = pair.cpus
    pair.put_code(0x5000, programs.RETURN_1)
    pair.start(programs.CALL_5000)
    for recorder in pair.recorders:
        recorder.on_syscall = recorder.stop_at_code
    context = first.loaded
    assert context is not None
    assert first.run(None) is Exit.STOP and first.gpr[RAX] == 1
    first.unload()
    second.load(context)
    assert second.run(None) is Exit.STOP and second.gpr[RAX] == 1
    second.gpr[RIP] = 0x3000                                     # the guest itself writes, on B
    pair.put_code(0x3000, programs.STORE)
    second.gpr[RSI], second.gpr[RAX] = 0x5000, int.from_bytes(programs.RETURN_2.ljust(8, b"\x90"), "little")
    assert second.run(None) is Exit.STOP
    second.unload()
    first.load(context)
    first.invalidate(0, 2 << 20)
    assert first.run(None) is Exit.STOP and first.gpr[RAX] == 2


def test_pages_with_code_are_enumerated_and_forgotten(machine: Machine) -> None:
    """next_code finds exactly the pages that ran, over any distance; forget_code at once makes them none."""
    cpu, pages = machine.cpu, 32 << 20 >> 12
    assert cpu.next_code(0, pages) == -1
    far = (32 << 20) - 0x3000
    machine.set_pte(0x5000, far | PWU)
    machine.memory.write(far, programs.RETURN_1)
    machine.start(programs.CALL_5000)
    machine.recorder.on_syscall = machine.recorder.stop_at_code
    assert cpu.run(None) is Exit.STOP and cpu.gpr[RAX] == 1
    assert cpu.next_code(0, pages) == CODE >> 12
    assert cpu.next_code(0, CODE >> 12) == -1                    # the end is not included, the start is
    assert cpu.next_code((CODE >> 12) + 1, pages) == far >> 12 == cpu.next_code(far >> 12, (far >> 12) + 1)
    assert cpu.next_code((far >> 12) + 1, pages) == -1
    machine.memory.write(far, programs.RETURN_2)                 # not announced
    cpu.forget_code(far, 0x1000)
    assert cpu.next_code(0, pages) == CODE >> 12 and cpu.next_code((CODE >> 12) + 1, pages) == -1
    assert cpu.run(None) is Exit.STOP and cpu.gpr[RAX] == 2


def test_two_engines_run_in_two_threads(pair: Machine) -> None:
    space = pair.build_space(1)
    steps = 200_000
    for number, cpu in enumerate(pair.cpus):
        pair.start(programs.TORTURE, at=CODE + 0x2000 * number, cpu=number, space=number,
                   rax=5, rbx=9, rcx=steps, rdi=steps + 1, rsi=DATA + 0x1000 * number)
        cpu.gpr[RSP] = STACK_TOP + 0x2000 * number
    assert pair.cpus[1].cr3 == space
    threads = [threading.Thread(target=run_to_stop, args=(cpu,)) for cpu in pair.cpus]
    with Kicker(pair.cpus[0], 100e-6), Kicker(pair.cpus[1], 100e-6):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert [cpu.gpr[R15] for cpu in pair.cpus] == [0, 0]
    assert [cpu.gpr[RCX] for cpu in pair.cpus] == [0, 0]


def test_the_translation_cache_may_overflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unicorn_x86, "_TRANSLATION_CACHE", 2 << 20)
    machine = Machine()
    # 0x80000..0xa0000: a chain of blocks, each "inc rax; jmp next", much more than the cache holds once translated
    block = bytes.fromhex("48ffc0eb00")
    chain = block * (0x20000 // len(block))
    for rounds in (1, 2):
        machine.memory.write(0x80000, chain + bytes.fromhex("4889c3 31c0 0f05"))  # mov rbx,rax; xor eax,eax; syscall
        machine.memory.written(0x80, 0x21)
        machine.start(b"\x90", at=0x70000)
        machine.cpu.gpr[RIP] = 0x80000
        assert machine.cpu.run(None) is Exit.STOP, rounds
        assert machine.cpu.gpr[RBX] == len(chain) // len(block)
        machine.cpu.unload()
    machine.close()


# --- TLB -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("how", ["cr3", "all", "page", "none"])
def test_translations_stay_until_they_are_flushed(machine: Machine, how: str) -> None:
    machine.memory.q[DATA >> 3], machine.memory.q[DATA + 0x1000 >> 3] = 1, 2
    machine.start(programs.LOAD_TWICE, rsi=DATA)
    seen = []

    def remap(next_rip: int) -> int:
        seen.append(machine.cpu.gpr[RAX])
        if len(seen) == 2:
            machine.cpu.stop()
        machine.set_pte(DATA, DATA + 0x1000 | PWU)
        match how:
            case "cr3":
                machine.cpu.set_cr3(ROOT)
            case "all":
                machine.cpu.flush_tlb()
            case "page":
                machine.cpu.flush_tlb_page(DATA + 0x123)
        return next_rip

    machine.recorder.on_syscall = remap
    assert machine.cpu.run(None) is Exit.STOP
    assert seen == [1, 1 if how == "none" else 2]


def test_flushing_one_page_keeps_the_others(machine: Machine) -> None:
    machine.memory.q[DATA >> 3], machine.memory.q[DATA + 0x1000 >> 3] = 1, 2
    machine.start(programs.LOAD_TWICE, rsi=DATA)
    seen = []

    def remap(next_rip: int) -> int:
        seen.append(machine.cpu.gpr[RAX])
        if len(seen) == 2:
            machine.cpu.stop()
        machine.set_pte(DATA, DATA + 0x1000 | PWU)
        machine.cpu.flush_tlb_page(DATA + 0x1000)
        return next_rip

    machine.recorder.on_syscall = remap
    assert machine.cpu.run(None) is Exit.STOP
    assert seen == [1, 1]


def test_accessed_and_dirty_bits_are_set_by_use(machine: Machine) -> None:
    entry = ROOT + 0x3000 + (DATA >> 12) * 8 >> 3
    machine.set_pte(DATA, DATA | PWU)
    machine.start(programs.LOAD, rsi=DATA)
    machine.recorder.on_syscall = machine.recorder.stop
    machine.cpu.run(None)
    assert machine.memory.q[entry] & 0x60 == 0x20
    machine.cpu.unload()
    machine.start(programs.STORE, rsi=DATA)
    machine.cpu.run(None)
    assert machine.memory.q[entry] & 0x60 == 0x60


class Spaces:
    """Two address spaces that map DATA to different frames; each syscall of the guest changes to the other one."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.cpu = machine, machine.cpu
        self.roots = [ROOT, machine.build_space(1)]
        for number in (0, 1):
            machine.memory.q[DATA + 0x1000 * number >> 3] = 100 + number
            machine.set_pte(DATA, DATA + 0x1000 * number | PWU, space=number)
        machine.start(programs.LOAD_TWICE, rsi=DATA)
        self.slot = 0
        self.seen: list[int] = []
        self.rounds = 6
        machine.recorder.on_syscall = self.toggle

    def before_toggle(self) -> None:
        """For tests to override."""

    def toggle(self, _next_rip: int) -> int:
        self.seen.append(self.cpu.gpr[RAX])
        if len(self.seen) == self.rounds:
            self.cpu.stop()
        self.before_toggle()
        self.slot ^= 1
        self.cpu.switch_space(self.slot, self.roots[self.slot])
        return CODE

    def run(self) -> list[int]:
        assert self.cpu.run(None) is Exit.STOP
        return self.seen


def test_two_spaces_never_mix(machine: Machine) -> None:
    assert Spaces(machine).run() == [100, 101] * 3


def test_a_space_keeps_its_translations_while_the_other_runs(machine: Machine) -> None:
    spaces = Spaces(machine)

    def remap_both() -> None:
        for number in (0, 1):
            machine.set_pte(DATA, DATA + 0x2000 | PWU, space=number)

    spaces.run()
    remap_both()
    spaces.rounds += 2
    assert spaces.run()[-2:] == [100, 101]
    cpu = spaces.cpu
    flushes = (cpu.flush_tlb, lambda: cpu.flush_tlb_page(DATA), lambda: cpu.set_cr3(cpu.cr3))
    for flush in flushes:
        for number in (0, 1):
            machine.set_pte(DATA, DATA + 0x1000 * number | PWU, space=number)
        spaces.cpu.flush_tlb()
        spaces.rounds += 2
        spaces.run()
        remap_both()
        flush()                                                  # acts on the space that is put aside, too
        spaces.rounds += 2
        assert spaces.run()[-2:] == [0, 0]


def test_a_new_root_for_a_space_flushes_it(machine: Machine) -> None:
    spaces = Spaces(machine)
    spaces.run()
    third = machine.build_space(2)
    machine.memory.q[DATA + 0x3000 >> 3] = 103
    machine.set_pte(DATA, DATA + 0x3000 | PWU, space=2)
    spaces.roots[1] = third
    spaces.rounds += 4
    assert spaces.run()[-4:] == [100, 103, 100, 103]


def test_the_same_code_address_in_two_spaces_is_two_programs(machine: Machine) -> None:
    machine.put_code(0x5000, programs.RETURN_1)
    machine.put_code(0x6000, programs.RETURN_2)
    spaces = Spaces(machine)
    machine.set_pte(0x5000, 0x6000 | PWU, space=1)
    machine.put_code(CODE, programs.CALL_5000)
    assert spaces.run() == [1, 2] * 3


def test_writes_in_one_space_to_code_of_the_other_are_seen(machine: Machine) -> None:
    """The frame at 0x5000 is executed in space 0 and written, through DATA, in space 1."""
    machine.put_code(0x5000, programs.RETURN_1)
    spaces = Spaces(machine)
    machine.put_code(0x3000, programs.STORE)
    machine.set_pte(DATA, 0x5000 | PWU | NX, space=1)
    cpu = spaces.cpu
    results = []

    def toggle(_next_rip: int) -> int:
        results.append(cpu.gpr[RAX])
        if len(results) == 9:
            cpu.stop()
        spaces.slot ^= 1
        cpu.switch_space(spaces.slot, spaces.roots[spaces.slot])
        if spaces.slot:
            code = (programs.RETURN_1, programs.RETURN_2)[len(results) // 2 % 2 ^ 1]
            cpu.gpr[RAX] = int.from_bytes(code.ljust(8, b"\x90"), "little")
            return 0x3000
        return CODE

    machine.put_code(CODE, programs.CALL_5000)
    machine.recorder.on_syscall = toggle
    assert cpu.run(None) is Exit.STOP
    assert results[::2] == [1, 2, 1, 2, 1]


def test_a_space_survives_a_switch_of_contexts(machine: Machine) -> None:
    spaces = Spaces(machine)
    spaces.rounds = 3
    spaces.run()
    context, other = spaces.cpu.loaded, spaces.cpu.new_context()
    assert context is not None
    spaces.cpu.load(other)
    spaces.cpu.load(context)
    spaces.rounds = 7
    assert spaces.run() == [100, 101] * 3 + [100]


def test_interrupt_returns_do_not_read_the_stack_of_the_other_space(machine: Machine) -> None:
    """IRET pops with kernel privilege, through translations that belong to no space."""
    spaces = Spaces(machine)
    cpu = spaces.cpu
    machine.memory.q[(GDT >> 3) + 5], machine.memory.q[(GDT >> 3) + 6] = 0x00cff3000000ffff, 0x00affb000000ffff
    cpu.set_gdt(GDT, 0x7f)
    stack = 0xa000
    machine.put_code(CODE, bytes.fromhex("48cf"))                # iretq
    machine.put_code(0x3000, b"\x0f\x05")
    machine.put_code(0x4000, b"\x0f\x05")
    machine.set_pte(stack, 0xb000 | PWU, space=1)
    for frame, target in ((0xa000, 0x3000), (0xb000, 0x4000)):
        machine.memory.write(frame, struct.pack("<5Q", target, 0x33, 0x202, stack, 0x2b))
    seen = []

    def toggle(next_rip: int) -> int:
        seen.append(next_rip - 2)
        if len(seen) == 6:
            cpu.stop()
        cpu.gpr[RSP] = stack
        spaces.slot ^= 1
        cpu.switch_space(spaces.slot, spaces.roots[spaces.slot])
        return CODE

    cpu.gpr[RSP] = stack
    machine.recorder.on_syscall = toggle
    assert cpu.run(None) is Exit.STOP
    assert seen == [0x3000, 0x4000] * 3
