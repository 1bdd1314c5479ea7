# SPDX-License-Identifier: GPL-2.0-only
"""An unknown Unicorn is refused before it can corrupt a guest."""

from __future__ import annotations

import time

import pytest

from pyxen.errors import EngineError
from pyxen.machine.cpu import (
    unicorn_blockcheck,
    unicorn_dirty,
    unicorn_hvm,
    unicorn_patches,
    unicorn_selftest,
    unicorn_spaces,
)
from pyxen.machine.cpu import unicorn_internals as ui
from pyxen.machine.cpu.unicorn_code import Code, CodePage

pytestmark = pytest.mark.engine


class Tampered:
    """The library, but with other code at some functions."""

    def __init__(self, lib: ui.Library, **code: bytes) -> None:
        self._lib, self._code = lib, code

    def __getattr__(self, name: str) -> object:
        return getattr(self._lib, name)

    def code(self, name: str, size: int) -> bytes:
        return self._code.get(name, self._lib.code(name, size))


def test_this_build_has_every_optional_speed_up_too() -> None:
    lib = ui.library()
    assert lib.block_check and lib.exchange_spaces is not None


def test_loading_again_is_free_and_the_checks_take_milliseconds() -> None:
    lib = ui.library()
    assert ui.library() is lib
    started = time.process_time()
    unicorn_selftest.check_layout(lib)
    unicorn_selftest.check_patches(lib)
    assert time.process_time() - started < 0.5


def test_another_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import unicorn

    monkeypatch.setattr(unicorn, "__version__", "2.2.0")
    with pytest.raises(EngineError, match=r"2\.2\.0") as caught:
        ui.Library()
    assert caught.value.hint is not None and "unicorn==2.1.4" in caught.value.hint


@pytest.mark.parametrize("field", ["GDT", "XMM", "CR2", "DR", "UC_POINTER", "CPU_UC", "MXCSR", "MTRR_DEFTYPE"])
def test_a_moved_field_is_refused(monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    lib = ui.library()
    monkeypatch.setattr(ui, field, getattr(ui, field) + 8)
    with pytest.raises(EngineError, match="unknown to pyxen"):
        unicorn_selftest.check_layout(lib)


def test_patched_code_is_not_patched_again() -> None:
    """The entries hold jumps now: that is "different code" to the installer, and it must change nothing."""
    lib = ui.library()
    before = lib.code("helper_syscall_x86_64", 16)
    with pytest.raises(EngineError, match="unknown to pyxen"):
        unicorn_patches.install(lib, 0)
    assert lib.code("helper_syscall_x86_64", 16) == before


def test_optional_patches_stay_off_where_they_do_not_fit() -> None:
    lib = ui.library()
    page = CodePage(lib.address("helper_syscall_x86_64"))
    other = Tampered(lib, translator_loop_x86_64=b"\x90" * 1024, tlb_flush_by_mmuidx_x86_64=b"\x90" * 16)
    assert unicorn_blockcheck.prepare(other, 0, page) is None  # type: ignore[arg-type]
    assert unicorn_spaces.prepare(other, page) is None  # type: ignore[arg-type]
    with pytest.raises(EngineError):
        unicorn_dirty.prepare_notdirty_write(
            Tampered(lib, tlb_set_dirty_x86_64=b"\x90" * 4096), page)  # type: ignore[arg-type]


def test_a_tlb_that_does_not_mark_its_entries_is_refused() -> None:
    """Log-dirty counts on it. (The patched place of notdirty_write is made to fit again.)"""
    lib = ui.library()
    page = CodePage(lib.address("helper_syscall_x86_64"))
    head = bytes.fromhex(unicorn_dirty._NOTDIRTY_HEAD.replace("DDDD", "00000000"))
    content = bytearray(lib.code("tlb_set_dirty_x86_64", 4096))
    found = ui.pattern(unicorn_dirty._NOTDIRTY_HEAD).search(content)
    assert found is not None
    test = bytes.fromhex(unicorn_dirty._NOTDIRTY_TEST.replace("BB", "7c"))
    content[found.start() + len(head) : found.start() + len(head) + len(test)] = test
    fits = {"tlb_set_dirty_x86_64": bytes(content)}
    unicorn_dirty.prepare_notdirty_write(Tampered(lib, **fits), page)  # type: ignore[arg-type]
    other = lib.code("tlb_set_page_with_attrs_x86_64", 4096).replace(bytes.fromhex("4981c900040000"), b"\x90" * 7)
    fits["tlb_set_page_with_attrs_x86_64"] = other
    with pytest.raises(EngineError, match="does not mark"):
        unicorn_dirty.prepare_notdirty_write(Tampered(lib, **fits), page)  # type: ignore[arg-type]


@pytest.mark.parametrize("symbol", ["cpu_abort_x86_64", "helper_sysret_x86_64"])
def test_other_code_for_nested_paging_is_refused(symbol: str) -> None:
    lib = ui.library()
    page = CodePage(lib.address("helper_syscall_x86_64"))
    with pytest.raises(EngineError, match="unknown to pyxen"):
        unicorn_hvm.prepare(Tampered(lib, **{symbol: b"\x90" * 256}), page)  # type: ignore[arg-type]


@pytest.mark.parametrize("symbol", ["on_interrupt", "on_invalid"])
def test_a_guest_that_does_not_take_its_own_exceptions_is_noticed(symbol: str) -> None:
    """The start-up check must fail when a hook only stops the run."""
    lib = ui.library()
    other = Tampered(lib)
    page = CodePage(lib.address("helper_syscall_x86_64"))
    code = page.begin()
    code.raw("488b87 d c640 b b", lib.uc_cpu, ui.CPU_INTERRUPT_REQUEST, ui.INTERRUPT_HALT)
    code.raw("b801000000 c3")
    page.place(code)
    page.seal()
    other.hvm = lib.hvm._replace(**{symbol: code.address})  # type: ignore[attr-defined]
    with pytest.raises(EngineError, match="does not take its own exceptions"):
        unicorn_selftest._check_nested(other)  # type: ignore[arg-type]


def test_a_missing_symbol_is_refused() -> None:
    with pytest.raises(EngineError, match="does not export"):
        ui.library().address("helper_of_tomorrow_x86_64")


def test_patterns_have_holes() -> None:
    assert ui.match(bytes.fromhex("4c8b87b801000090c3"), "4c8b87DDDD BBc3", "it") == (0x1b8, 0x90)
    with pytest.raises(EngineError, match="it starts with 4c8b"):
        ui.match(bytes.fromhex("4c8b86b801000090c3"), "4c8b87DDDD BBc3", "it")


def test_the_assembler_fills_in_distances() -> None:
    code = Code(0x1000)
    code.label("again")
    code.raw("83e9 b", 10)
    code.branch("75", "again")
    code.branch("74", "end")
    code.raw("48b8 q be d", 0x1122334455667788, -1)
    code.label("end")
    code.jump(0x1000)
    assert code.finish().hex() == "83e90a75fb740f48b88877665544332211beffffffffe9e5ffffff"


def test_far_branches() -> None:
    code = Code(0)
    code.far("74", "end")
    code.far("eb", "end")
    code.raw(" ".join(["90"] * 300))
    code.label("end")
    assert code.finish()[:11].hex() == "0f8431010000e92c010000"
    code.branch("74", "end")
    code.raw(" ".join(["90"] * 300))
    code.branch("74", "end")
    with pytest.raises(OverflowError):
        code.finish()


def test_peek_survives_wild_pointers() -> None:
    assert ui.peek(0, 8) == bytes(8) and ui.peek((1 << 64) - 8, 8) == bytes(8)
