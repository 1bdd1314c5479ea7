# SPDX-License-Identifier: GPL-2.0-only
"""Decoding of instructions that store into memory, for :mod:`pyxen.hypervisor.x86.pv.ptwr`.

A store is described by what it computes (:class:`Kind`), where (:class:`Operand`) and from what.  Descriptions do not
depend on where the instruction stands, so they are kept by the instruction's bytes: a kernel writes its page tables
from a few places only.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Final, NamedTuple

from iced_x86 import Code, ConditionCode, Decoder, Instruction, MemorySizeExt, Mnemonic, OpKind, Register, RegisterInfo

if TYPE_CHECKING:
    from iced_x86 import Register_

MAX_CACHED: Final = 1024
MAX_LENGTH: Final = 15


class Kind(IntEnum):
    """What is stored: NEW is the source, OLD the memory."""

    MOV = 0
    XCHG = 1
    CMPXCHG = 2
    XADD = 3
    ADD = 4
    OR = 5
    ADC = 6
    SBB = 7
    AND = 8
    SUB = 9
    XOR = 10
    INC = 11
    DEC = 12
    NOT = 13
    NEG = 14
    BTS = 15
    BTR = 16
    BTC = 17
    SETCC = 18
    STOS = 19
    MOVS = 20
    SHL = 21
    SHR = 22
    SAR = 23


class GprPart(NamedTuple):
    """Part of a general register: number in hardware order, size in bytes, and shift (8 for AH..BH)."""

    register: int
    size: int
    shift: int


class Operand(NamedTuple):
    """A memory operand: ``segment`` is 4 (FS), 5 (GS) or -1 (flat); registers are indices or -1; with ``rip`` the
    displacement is from the instruction itself."""

    segment: int
    base: int
    index_register: int
    scale: int
    displacement: int
    rip: bool
    mask: int


class Store(NamedTuple):
    """One decoded store. ``source`` is a register part, an immediate, or None."""

    kind: Kind
    length: int
    size: int
    operand: Operand
    source: GprPart | int | None
    condition: int
    repeat: bool


_BINARY: Final = {
    Mnemonic.MOV: Kind.MOV, Mnemonic.MOVNTI: Kind.MOV, Mnemonic.XCHG: Kind.XCHG, Mnemonic.CMPXCHG: Kind.CMPXCHG,
    Mnemonic.XADD: Kind.XADD, Mnemonic.ADD: Kind.ADD, Mnemonic.OR: Kind.OR, Mnemonic.ADC: Kind.ADC,
    Mnemonic.SBB: Kind.SBB, Mnemonic.AND: Kind.AND, Mnemonic.SUB: Kind.SUB, Mnemonic.XOR: Kind.XOR,
    Mnemonic.BTS: Kind.BTS, Mnemonic.BTR: Kind.BTR, Mnemonic.BTC: Kind.BTC, Mnemonic.SHL: Kind.SHL,
    Mnemonic.SAL: Kind.SHL, Mnemonic.SHR: Kind.SHR, Mnemonic.SAR: Kind.SAR,
}
_UNARY: Final = {Mnemonic.INC: Kind.INC, Mnemonic.DEC: Kind.DEC, Mnemonic.NOT: Kind.NOT, Mnemonic.NEG: Kind.NEG}
_STOS: Final = {Mnemonic.STOSB: 1, Mnemonic.STOSW: 2, Mnemonic.STOSD: 4, Mnemonic.STOSQ: 8}
_MOVS: Final = {Mnemonic.MOVSB: 1, Mnemonic.MOVSW: 2, Mnemonic.MOVSD: 4, Mnemonic.MOVSQ: 8}
_MASK64: Final = (1 << 64) - 1
_RDI: Final = 7
_HIGH_BYTES: Final = {Register.AH: 0, Register.CH: 1, Register.DH: 2, Register.BH: 3}
_IMMEDIATES: Final = frozenset({
    OpKind.IMMEDIATE8, OpKind.IMMEDIATE16, OpKind.IMMEDIATE32, OpKind.IMMEDIATE64, OpKind.IMMEDIATE8TO16,
    OpKind.IMMEDIATE8TO32, OpKind.IMMEDIATE8TO64, OpKind.IMMEDIATE32TO64,
})

_cache: dict[bytes, Store | None] = {}


def decode(code: bytes) -> Store | None:
    """The store that ``code`` (at most 15 bytes) begins with, or None if it is no store of a general register or
    constant of at most 8 bytes."""
    try:
        return _cache[code]
    except KeyError:
        pass
    if len(_cache) >= MAX_CACHED:
        _cache.clear()
    store = _cache[code] = _decode(code)
    return store


def _decode(code: bytes) -> Store | None:
    instruction = Decoder(64, code, ip=0).decode()
    if instruction.code == Code.INVALID:
        return None
    mnemonic = instruction.mnemonic
    if mnemonic in _STOS or mnemonic in _MOVS:
        return _string(instruction)
    operand = _memory(instruction)
    if operand is None:
        return None
    nbytes = MemorySizeExt.size(instruction.memory_size)
    if nbytes not in (1, 2, 4, 8):
        return None
    length = instruction.len
    kind = _BINARY.get(mnemonic)
    if kind is not None:
        source = _source(instruction)
        if source is None:
            return None
        return Store(kind, length, nbytes, operand, source, 0, False)
    kind = _UNARY.get(mnemonic)
    if kind is not None:
        return Store(kind, length, nbytes, operand, None, 0, False)
    if instruction.condition_code != ConditionCode.NONE and nbytes == 1 and instruction.op_count == 1:
        return Store(Kind.SETCC, length, 1, operand, None, _hardware_condition(instruction), False)
    return None


def _string(instruction: Instruction) -> Store | None:
    mnemonic = instruction.mnemonic
    kind, size = (Kind.STOS, _STOS[mnemonic]) if mnemonic in _STOS else (Kind.MOVS, _MOVS.get(mnemonic, 0))
    if instruction.op0_kind == OpKind.MEMORY_ESRDI:
        mask = _MASK64
    elif instruction.op0_kind == OpKind.MEMORY_ESEDI:
        mask = 0xFFFFFFFF
    else:
        return None  # MOVSD of SSE shares the mnemonic
    segment = _segment(instruction.memory_segment) if kind == Kind.MOVS else -1
    operand = Operand(segment, _RDI, -1, 1, 0, False, mask)
    repeat = instruction.has_rep_prefix or instruction.has_repne_prefix
    return Store(kind, instruction.len, size, operand, None, 0, repeat)


def _segment(register: Register_) -> int:
    return 4 if register == Register.FS else 5 if register == Register.GS else -1


def _memory(instruction: Instruction) -> Operand | None:
    if instruction.op_count == 0 or instruction.op0_kind != OpKind.MEMORY:
        return None
    base, index = instruction.memory_base, instruction.memory_index
    segment = _segment(instruction.memory_segment)
    displacement = instruction.memory_displacement
    if base in (Register.RIP, Register.EIP):
        # Decoded as if at address 0, so this is the distance from the instruction itself.
        return Operand(segment, -1, -1, 1, displacement, True, _MASK64 if base == Register.RIP else 0xFFFFFFFF)
    mask = _MASK64
    for register in (base, index):
        if register != Register.NONE and RegisterInfo(register).size == 4:
            mask = 0xFFFFFFFF
    if base == index == Register.NONE and instruction.memory_displ_size == 4:
        mask = 0xFFFFFFFF
    if RegisterInfo(base).size > 8 or RegisterInfo(index).size > 8:
        return None
    return Operand(segment, _gpr(base), _gpr(index), instruction.memory_index_scale, displacement, False, mask)


def _gpr(register: Register_) -> int:
    return -1 if register == Register.NONE else RegisterInfo(register).number


def _source(instruction: Instruction) -> GprPart | int | None:
    if instruction.op_count < 2:
        return None
    kind = instruction.op_kind(1)
    if kind == OpKind.REGISTER:
        register = instruction.op_register(1)
        if register in _HIGH_BYTES:
            return GprPart(_HIGH_BYTES[register], 1, 8)
        info = RegisterInfo(register)
        if info.full_register < Register.RAX or info.full_register > Register.R15:
            return None
        return GprPart(info.number, info.size, 0)
    if kind in _IMMEDIATES:
        return int(instruction.immediate(1)) & _MASK64
    return None


# ConditionCode in the order of the low four bits of Jcc, SETcc, CMOVcc.
_CONDITIONS: Final = (
    ConditionCode.O, ConditionCode.NO, ConditionCode.B, ConditionCode.AE, ConditionCode.E, ConditionCode.NE,
    ConditionCode.BE, ConditionCode.A, ConditionCode.S, ConditionCode.NS, ConditionCode.P, ConditionCode.NP,
    ConditionCode.L, ConditionCode.GE, ConditionCode.LE, ConditionCode.G,
)


def _hardware_condition(instruction: Instruction) -> int:
    return _CONDITIONS.index(instruction.condition_code)
