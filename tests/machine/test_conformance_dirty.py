# SPDX-License-Identifier: GPL-2.0-only
"""Engine conformance: the dirty map says which frames guest code wrote."""

from __future__ import annotations

import mmap
import random

import pytest

from pyxen.errors import InternalError
from pyxen.machine.cpu.base import RAX, RBX, RCX, RDI, RIP, RSI, RSP, Exit
from tests.machine import programs
from tests.machine.support import CODE, DATA, GDT, PWU, ROOT, STACK_TOP, Machine, run_to_stop

pytestmark = pytest.mark.engine

ALIAS = 0x30000
"""Other virtual addresses for the frames at DATA."""
PAGE = DATA >> 12
AD = 0x60
DONE = bytes.fromhex("31c00f05")  # xor eax,eax; syscall

STORES = [
    # Intel syntax, code, which pages from DATA on
    ("mov byte ptr [rsi], al", "8806", {0}),
    ("mov word ptr [rsi+0x10], ax", "66894610", {0}),
    ("mov dword ptr [rsi+0x10], eax", "894610", {0}),
    ("mov qword ptr [rsi+0xff8], rax", "488986f80f0000", {0}),
    ("mov qword ptr [rsi+3], rax", "48894603", {0}),
    ("mov qword ptr [rsi+0xffc], rax", "488986fc0f0000", {0, 1}),
    ("inc qword ptr [rsi]", "48ff06", {0}),
    ("sete byte ptr [rsi]", "0f9406", {0}),
    ("bts qword ptr [rsi], rcx (rcx = 0x9000)", "480fab0e", {1}),
    ("xchg qword ptr [rsi], rax", "488706", {0}),
    ("lock xadd qword ptr [rsi], rax", "f0480fc106", {0}),
    ("lock cmpxchg dword ptr [rsi], ecx", "f00fb10e", {0}),
    ("lock cmpxchg16b [rsi]", "f0480fc70e", {0}),
    ("lock or dword ptr [rsi+0xffe], 1", "f0838efe0f000001", {0, 1}),
    ("movnti qword ptr [rsi], rax", "480fc306", {0}),
    ("movaps xmmword ptr [rsi], xmm0", "0f2906", {0}),
    ("movups xmmword ptr [rsi+0xff8], xmm0", "0f1186f80f0000", {0, 1}),
    ("movlps qword ptr [rsi+0xff8], xmm0", "0f1386f80f0000", {0}),
    ("fxsave [rsi+0xf00]", "0fae86000f0000", {0, 1}),
    ("fstp tbyte ptr [rsi]", "db3e", {0}),
    ("fnstenv [rsi]", "d936", {0}),
    ("stmxcsr [rsi]", "0fae1e", {0}),
    ("sgdt [rsi]", "0f0106", {0}),
    ("mov rdi, rsi; mov ecx, 1024; rep stosq", "4889f7b900040000f348ab", {0, 1}),
    ("lea rdi, [rsi+0x1000]; mov ecx, 16; rep movsb", "488dbe00100000b910000000f3a4", {1}),
    ("lea rsp, [rsi+0x1008]; push rax; push rcx; pop rcx; pop rax", "488da60810000050515958", {0, 1}),
    ("lea rsp, [rsi+8]; call 1f; 1: mov esp, 0x9000", "488d6608e800000000bc00900000", {0}),
    ("lea rsp, [rsi+0x800]; pushfq; mov esp, 0x9000", "488da6000800009cbc00900000", {0}),
    ("lea rsp, [rsi+0x1004]; enter 64, 2; mov esp, 0x9000", "488da604100000c8400002bc00900000", {0, 1}),
]
LOADS = [
    ("mov rax, qword ptr [rsi]", "488b06"),
    ("movups xmm0, xmmword ptr [rsi+0xff8]", "0f1086f80f0000"),
    ("mov ecx, 1024; rep lodsq", "b900040000f348ad"),
    ("cmp qword ptr [rsi], rax", "483906"),
    ("mov rdi, rsi; mov ecx, 64; repe scasb", "4889f7b940000000f3ae"),
    ("prefetchw [rsi]", "0f0d0e"),
    ("fxrstor [rsi]", "0fae0e"),
]


class Dirty:
    """A machine with a dirty map; :meth:`take` reads and clears it."""

    def __init__(self, machine: Machine) -> None:
        self.machine, self.cpu = machine, machine.cpu
        self.map = memoryview(mmap.mmap(-1, machine.memory.nr_frames))
        self.cpu.set_dirty_map(self.map)

    def take(self) -> set[int]:
        found = {n for n, byte in enumerate(bytes(self.map)) if byte}
        for n in found:
            self.map[n] = 0
        return found

    def run(self, code: bytes, at: int = CODE) -> set[int]:
        machine, cpu = self.machine, self.cpu
        machine.put_code(at, code + DONE)
        cpu.gpr[RIP], cpu.gpr[RSP], cpu.gpr[RSI], cpu.gpr[RCX] = at, STACK_TOP, DATA, 0x9000
        cpu.gpr[RAX] = cpu.gpr[RBX] = cpu.gpr[RDI] = 0
        run_to_stop(cpu)
        return self.take()


@pytest.fixture
def dirty(machine: Machine) -> Dirty:
    machine.start(b"")
    return Dirty(machine)


@pytest.mark.parametrize(("source", "code", "pages"), STORES, ids=[source for source, *_ in STORES])
def test_a_store_marks_its_pages(dirty: Dirty, source: str, code: str, pages: set[int]) -> None:
    expected = {PAGE + n for n in pages}
    for before in (lambda: None, dirty.cpu.flush_tlb, lambda: dirty.cpu.set_cr3(ROOT)):
        before()
        assert dirty.run(bytes.fromhex(code)) == expected, source


@pytest.mark.parametrize(("source", "code"), LOADS, ids=[source for source, _ in LOADS])
def test_a_load_marks_nothing(dirty: Dirty, source: str, code: str) -> None:
    assert dirty.run(bytes.fromhex(code)) == set(), source


def test_a_load_before_does_not_hide_a_store(dirty: Dirty) -> None:
    """mov rax,[rsi]; mov [rsi],rax: the entry that the load filled."""
    dirty.machine.set_pte(DATA, DATA | PWU | AD)
    dirty.cpu.flush_tlb()
    assert dirty.run(bytes.fromhex("488b06488906")) == {PAGE}


def test_each_context_is_flushed_for_itself(dirty: Dirty) -> None:
    """Contexts keep translations of their own while others run."""
    store, cpu = bytes.fromhex("488906"), dirty.cpu
    contexts = [cpu.loaded, cpu.new_context()]
    for context in contexts:
        assert context is not None
        cpu.load(context)
        cpu.set_cr3(ROOT)
        assert dirty.run(store) == {PAGE}
    for flushed in (0, 1, 0):
        for number in (0, 1, 0):
            cpu.load(contexts[number])  # type: ignore[arg-type]
            if number == flushed:
                cpu.flush_tlb()
            found = dirty.run(store)
            assert found == {PAGE} or (number != flushed and not found)


def test_without_a_map_nothing_is_marked(dirty: Dirty) -> None:
    store = bytes.fromhex("488906")
    dirty.cpu.set_dirty_map(None)
    assert dirty.run(store) == set()
    dirty.cpu.flush_tlb()
    dirty.cpu.set_dirty_map(dirty.map)
    assert dirty.run(store) == {PAGE}
    with pytest.raises(InternalError):
        dirty.cpu.set_dirty_map(dirty.map[1:])


def test_a_map_may_be_shared_by_engines(pair: Machine) -> None:
    shared = Dirty(pair)
    pair.cpus[1].set_dirty_map(shared.map)
    for number, cpu in enumerate(pair.cpus):
        pair.start(programs.STORE, cpu=number, rsi=DATA + 0x1000 * number)
        pair.recorders[number].on_syscall = pair.recorders[number].stop
        assert cpu.run(None) is Exit.STOP
    assert shared.take() == {PAGE, PAGE + 1}
    pair.cpus[1].close()
    pair.cpus[1].set_dirty_map(None)  # a host that stops


def test_code_that_modifies_itself_is_dirty(dirty: Dirty) -> None:
    """mov byte [the operand below],cl; jmp; mov ebx,imm: its page is written while it holds translations."""
    modify = bytes.fromhex("880d03000000eb00bb00000000")
    for value in range(1, 6):
        dirty.machine.put_code(0x5000, modify + DONE)
        dirty.cpu.gpr[RIP], dirty.cpu.gpr[RCX] = 0x5000, value
        if value == 4:
            dirty.cpu.flush_tlb()
        run_to_stop(dirty.cpu)
        assert dirty.cpu.gpr[RBX] == value
        assert dirty.take() == {5}


def test_a_faulting_store_marks_nothing(dirty: Dirty) -> None:
    """Neither a page that is not there nor one that is read-only."""
    for entry in (0, DATA | 5):
        dirty.machine.set_pte(DATA, entry)
        dirty.cpu.flush_tlb()
        assert dirty.run(bytes.fromhex("488906")) == set()
        assert dirty.machine.recorder.traps[-1].vector == 14


def test_the_accessed_bit_of_a_descriptor_is_a_store(machine: Machine) -> None:
    """mov ds,eax: the engine writes the descriptor."""
    machine.memory.q[GDT + 8 >> 3] = 0x00cff2000000ffff
    machine.start(bytes.fromhex("b80b0000008ed8") + DONE)
    machine.cpu.set_gdt(GDT, 15)
    dirty = Dirty(machine)
    run_to_stop(machine.cpu)
    assert machine.memory.q[GDT + 8 >> 3] & 1 << 40
    assert dirty.take() == {GDT >> 12}


def test_the_same_address_in_two_spaces_is_two_pages(machine: Machine) -> None:
    """A store in one space must not make the other's entry for that address unwatched."""
    root = machine.build_space(1)
    for space in (0, 1):
        machine.set_pte(DATA, DATA + 0x1000 * space | PWU | AD, space=space)  # so that loads fill entries for stores
    load, store = 0x3000, 0x4000
    machine.start(b"")
    machine.put_code(load, programs.LOAD)
    machine.put_code(store, programs.STORE)
    machine.recorder.on_syscall = machine.recorder.stop
    dirty = Dirty(machine)
    cpu = machine.cpu
    seen = []
    for slot, code in ((0, load), (1, load), (0, store), (1, store)):
        cpu.switch_space(slot, (ROOT, root)[slot])
        cpu.gpr[RIP], cpu.gpr[RSI], cpu.gpr[RAX] = code, DATA, slot
        assert cpu.run(None) is Exit.STOP
        seen.append(dirty.take())
    assert seen == [set(), set(), {PAGE}, {PAGE + 1}]


@pytest.mark.parametrize("seed", range(4))
def test_against_what_was_stored(machine: Machine, seed: int) -> None:
    """Stores through aliases, in two spaces that map the same addresses differently, with changes of the map and
    cleaning in between: after each cleaning exactly the frames that were stored to are marked."""
    random_ = random.Random(seed)
    roots = (ROOT, machine.build_space(1))
    pages = [(base + 0x1000 * n) for base in (DATA, ALIAS) for n in range(6)]
    frames: dict[tuple[int, int], int] = {}

    def remap() -> None:
        for space in (0, 1):
            for va in pages:
                frames[space, va] = PAGE + random_.randrange(6)
                machine.set_pte(va, frames[space, va] << 12 | PWU | AD, space=space)
        machine.cpu.flush_tlb()

    machine.start(b"")
    machine.put_code(0x3000, programs.LOAD)
    machine.put_code(0x4000, programs.STORE)
    dirty = Dirty(machine)
    cpu = machine.cpu
    machine.recorder.on_syscall = machine.recorder.stop
    remap()
    stored: set[int] = set()
    for _ in range(400):
        what = random_.randrange(20)
        if what == 0:
            assert dirty.take() == stored
            stored.clear()
            cpu.flush_tlb()
        elif what == 1:
            remap()
        elif what < 5:
            slot = random_.randrange(2)
            cpu.switch_space(slot, roots[slot])
        else:
            space = 0 if cpu.cr3 == ROOT else 1
            va = random_.choice(pages)
            write = random_.random() < 0.6
            cpu.gpr[RIP], cpu.gpr[RSI] = (0x4000 if write else 0x3000), va + 8 * random_.randrange(512)
            assert cpu.run(None) is Exit.STOP
            if write:
                stored.add(frames[space, va])
    assert dirty.take() == stored
