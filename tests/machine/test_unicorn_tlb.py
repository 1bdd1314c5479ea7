# SPDX-License-Identifier: GPL-2.0-only
"""Contexts with a TLB and a cache of translated blocks each: they keep both, and nothing stale is in them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from pyxen.machine.cpu import unicorn_internals as ui
from pyxen.machine.cpu import unicorn_tlb
from pyxen.machine.cpu.base import RAX, RIP, Exit
from pyxen.machine.cpu.unicorn_code import CodePage
from pyxen.machine.cpu.unicorn_context import UnicornContext
from tests.machine import programs
from tests.machine.support import CODE, PWU, Machine
from tests.machine.test_unicorn_internals import Tampered

pytestmark = pytest.mark.engine

RETURN_3 = bytes.fromhex("b803000000c3")


class Two:
    """Two contexts with an address space each: the code they call at virtual 0x5000 is at 0x5000 and at 0x6000."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.cpu = machine.cpu
        machine.put_code(0x5000, programs.RETURN_1)
        machine.put_code(0x6000, programs.RETURN_2)
        machine.build_space(1)
        machine.set_pte(0x5000, 0x6000 | PWU, space=1)
        self.contexts: list[UnicornContext] = []
        for space in (0, 1):
            machine.start(programs.CALL_5000, space=space)
            assert machine.cpu.loaded is not None
            self.contexts.append(machine.cpu.loaded)
        machine.recorder.on_syscall = machine.recorder.stop_at_code

    def run(self, *order: int) -> list[int]:
        """What the contexts return, run one after the other."""
        seen = []
        for number in order:
            self.cpu.load(self.contexts[number])
            self.cpu.gpr[RIP] = CODE
            assert self.cpu.run(None) is Exit.STOP
            seen.append(self.cpu.gpr[RAX])
        return seen

    def cached_blocks(self) -> int:
        """How many blocks the engine would find by virtual address, without looking them up."""
        layout = unicorn_tlb._layout(ui.library())
        assert layout is not None
        words = memoryview(ui.peek(self.cpu._state.cpu + layout.jumps, 0x8000)).cast("Q")
        return sum(1 for word in words if word)


def test_each_context_finds_its_own_code_at_one_address(machine: Machine) -> None:
    assert Two(machine).run(0, 1, 0, 1, 1, 0) == [1, 2, 1, 2, 2, 1]


def test_a_context_comes_back_with_its_blocks(machine: Machine) -> None:
    two = Two(machine)
    two.run(0, 1, 0)
    before = two.cached_blocks()
    two.cpu.load(two.cpu.new_context())
    assert (before > 0, two.cached_blocks()) == (True, 0)
    two.cpu.load(two.contexts[0])
    assert two.cached_blocks() == before


def _flush_all(two: Two) -> None:
    two.cpu._lib.tb_flush(two.cpu._cpu)


def _fill_the_engine(two: Two) -> None:
    """Throw all blocks away, and translate others into their memory."""
    _flush_all(two)
    two.machine.start(b"\x90" * 4000 + bytes.fromhex("31c0 0f05"), at=0x40000)
    assert two.cpu.run(None) is Exit.STOP


@pytest.mark.parametrize("forget", [
    _flush_all,
    _fill_the_engine,
    lambda two: two.machine.put_code(0x6000, RETURN_3),
    lambda two: two.cpu.forget_code(0x6000, 0x1000),
], ids=["all", "all and others in their place", "rewritten", "forgotten"])
def test_blocks_that_are_gone_are_not_executed_from_what_was_put_aside(
        machine: Machine, forget: Callable[[Two], None]) -> None:
    two = Two(machine)
    assert two.run(1, 0, 1, 0) == [2, 1, 2, 1]           # twice: a page's first translation flushes what is put aside
    machine.memory.write(0x6000, RETURN_3)              # announced by nobody: only a new translation shows it
    forget(two)
    assert two.run(1, 0, 1) == [3, 1, 3]


def test_a_context_that_was_changed_meanwhile_forgets_its_blocks(machine: Machine) -> None:
    two = Two(machine)
    assert two.run(0, 1) == [1, 2]
    registers = two.contexts[0].get()
    registers.cr3 = two.cpu.cr3                          # that of the other, which is loaded
    two.contexts[0].put(registers)
    assert two.run(0, 1, 0) == [2, 2, 2]


def _without_invalid() -> bytes:
    return ui.library().code("helper_lookup_tb_ptr_x86_64", 0x100).replace(
        bytes.fromhex("81e7ffff0eff"), bytes.fromhex("81e7ffff0aff"))


@pytest.mark.parametrize(("symbol", "code"), [
    ("tb_flush_x86_64", bytes(0x110)),
    ("helper_lookup_tb_ptr_x86_64", bytes(0x100)),
    ("helper_lookup_tb_ptr_x86_64", None),
    ("tlb_flush_by_mmuidx_x86_64", bytes(0x10)),
])
def test_another_build_has_no_exchange(symbol: str, code: bytes | None) -> None:
    lib = ui.library()
    page = CodePage(lib.address("helper_syscall_x86_64"))
    other = Tampered(lib, **{symbol: _without_invalid() if code is None else code})
    assert unicorn_tlb.prepare(other, page) is None  # type: ignore[arg-type]


def test_without_exchange_every_change_of_context_flushes(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.cpu, "_exchange_tlb", None)
    two = Two(machine)
    assert two.run(0, 1, 0) == [1, 2, 1]
    machine.set_pte(0x5000, 0x6000 | PWU)
    assert two.run(1, 0) == [2, 2]
