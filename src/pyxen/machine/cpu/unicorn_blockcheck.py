# SPDX-License-Identifier: GPL-2.0-only
"""The exit check at the start of every translated block, made of two instructions instead of a call.

Unicorn calls ``helper_check_exit_request`` at each block start: load the engine's address, call, chase two pointers,
test, return. It was the hottest
function of a Linux boot (12 % in itself, more around it). QEMU's own check is a load from the CPU state, whose
address is in a register anyway, and a branch. The code below makes the translator emit that, with the call only on the
rare side of the branch; what the call does is unchanged, so stops stay as precise as they were.

The jump goes from the place in ``translator_loop`` where the call is emitted to hand-assembled code that calls the
same exported
``tcg_*`` functions in this order::

    t = ld_i32(env, icount_decr); brcondi_i32(GE, t, 0, label); call helper(uc, 0); label:

This is an optimisation: where the code is not the expected one it is left alone and the engine is as slow as it
always was. Exact instruction counts
(engine-notes, fact 21) will want the call back at each block: they replace this module.
"""

from __future__ import annotations

from pyxen.errors import EngineError
from pyxen.machine.cpu import unicorn_internals as ui
from pyxen.machine.cpu.unicorn_code import Code, CodePage, jump

# tcg/tcg-opc.h and tcg/tcg-cond.h of this build. The pattern below contains mov_i32 (5), tcg_gen_brcondi_i32
# contains br (3).
_OP_SET_LABEL = 1
_OP_LD_I32 = 13
_COND_GE = 3

_TCG_UC = 0x9970      # TCGContext.uc
_TCG_ENV = 0x98f0     # TCGContext.cpu_env: the temp's offset from the context
_UC_TCG = 0x300       # uc_struct.tcg_ctx
_TEMP_NAME = 0x20     # TCGTemp.name

# mov rsi,[rbp+uc]; mov rdi,rbp; call tcg_const_i64; … call tcg_gen_callN(helper) … call tcg_temp_free; then
# ops->tb_start
_EMITTER = (
    "488bb570990000 4889ef e8DDDD 31f6 4889ef 4989c6 e8DDDD 488b8d00010000 4c8d5c0500 4839c8 7422 4885c9 741d 4c89da"
    " 4801e9 be05000000 4889ef 4c895c2420 e8DDDD 4c8b5c2420 4c8b442410 b902000000 31d2 4901ee 488b35DDDD 4889ef"
    " 4c899c2488000000 4c895c2420 4c89b42480000000 e8DDDD 4c8b5c2420 4889ef 4c89de e8DDDD 4c89f6 4889ef e8DDDD")
_SEARCH = 1024


def _emit_check(lib: ui.Library, code: Code) -> None:
    """rbp is the TCGContext throughout; r14 is free, the other callee-saved registers are translator_loop's."""

    def call(symbol: str) -> None:
        code.raw("4889ef 48b8 q ffd0", lib.address(symbol))     # mov rdi, rbp; mov rax, symbol; call rax

    code.raw("4883ec20")                                        # sub rsp, 32: arguments at 0 and 8, label at 16
    code.raw("31f6 31d2")                                       # t = tcg_temp_new_internal(s, TCG_TYPE_I32, false)
    call("tcg_temp_new_internal_x86_64")
    code.raw("4989c6")                                          # mov r14, rax
    code.raw("be d 4c89f2", _OP_LD_I32)                         # tcg_gen_op3(s, ld_i32, t, env, icount_decr - env)
    code.raw("488b8d d 4801e9", _TCG_ENV)
    code.raw("49c7c0 d", lib.cpu_icount - lib.cpu_env)
    call("tcg_gen_op3_x86_64")
    call("gen_new_label_x86_64")
    code.raw("4889442410 4989c0")                               # mov [rsp+16], rax; mov r8, rax
    code.raw("be d 4c89f2 4829ea 31c9", _COND_GE)               # tcg_gen_brcondi_i32(s, GE, t, 0, label)
    call("tcg_gen_brcondi_i32_x86_64")
    code.raw("4c89f6")                                          # tcg_temp_free_internal(s, t)
    call("tcg_temp_free_internal_x86_64")
    code.raw("488bb5 d", _TCG_UC)                               # [rsp] = temp of tcg_const_i64(s, uc)
    call("tcg_const_i64_x86_64")
    code.raw("4801e8 48890424")
    code.raw("31f6")                                            # [rsp+8] = temp of tcg_const_i32(s, 0)
    call("tcg_const_i32_x86_64")
    code.raw("4801e8 4889442408")
    code.raw("48be q", lib.address("helper_check_exit_request_x86_64"))
    code.raw("31d2 b902000000 4989e0")                          # tcg_gen_callN(s, helper, NULL, 2, arguments)
    call("tcg_gen_callN_x86_64")
    code.raw("488b742408")
    call("tcg_temp_free_internal_x86_64")
    code.raw("488b3424")
    call("tcg_temp_free_internal_x86_64")
    code.raw("488b542410 800a01")                               # mov rdx, [rsp+16]; or byte [rdx], 1: label->present
    code.raw("be d", _OP_SET_LABEL)                             # tcg_gen_op1(s, set_label, label)
    call("tcg_gen_op1_x86_64")
    code.raw("4883c420")


def prepare(lib: ui.Library, uc_pointer: int, page: CodePage) -> tuple[int, bytes] | None:
    """Place the emitter; returns (address, code) to overwrite, or None where this build is not the expected one.

    ``uc_pointer`` is any live engine, to check the layout of its TCGContext.
    """
    try:
        start = lib.address("translator_loop_x86_64")
        found = ui.pattern(_EMITTER).search(lib.code("translator_loop_x86_64", _SEARCH))
        if found is None or not _layout_fits(lib, uc_pointer, start + found.start(4), found.group(4)):
            return None
        code = page.begin()
        _emit_check(lib, code)
    except EngineError:
        return None
    code.jump(start + found.end())
    page.place(code)
    entry = start + found.start()
    return entry, jump(entry, code.address)


def _layout_fits(lib: ui.Library, uc_pointer: int, operand: int, displacement: bytes) -> bool:
    got = operand + 4 + int.from_bytes(displacement, "little", signed=True)
    if _word(got) != lib.address("helper_check_exit_request_x86_64"):
        return False
    context = _word(uc_pointer + _UC_TCG)
    if _word(context + _TCG_UC) != uc_pointer:
        return False
    offset = _word(context + _TCG_ENV)
    return offset < 0x10000 and _text(_word(context + offset + _TEMP_NAME)) == b"env"


def _word(address: int) -> int:
    return int.from_bytes(ui.peek(address, 8), "little")


def _text(address: int) -> bytes:
    return ui.peek(address, 4).partition(b"\0")[0]
