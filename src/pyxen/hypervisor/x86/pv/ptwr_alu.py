# SPDX-License-Identifier: GPL-2.0-only
"""Arithmetic of the emulated stores: result and RFLAGS as the processor manuals define them.

Values are unsigned and fit ``bits`` (8, 16, 32 or 64); flags that the manuals call undefined come out clear or
unchanged.
"""

from __future__ import annotations

from typing import Final

CF: Final = 1 << 0
PF: Final = 1 << 2
AF: Final = 1 << 4
ZF: Final = 1 << 6
SF: Final = 1 << 7
DF: Final = 1 << 10
OF: Final = 1 << 11
ARITHMETIC: Final = CF | PF | AF | ZF | SF | OF

_PARITY: Final = bytes(PF if bin(value).count("1") % 2 == 0 else 0 for value in range(256))


def _szp(result: int, bits: int) -> int:
    return (0 if result else ZF) | (SF if result >> (bits - 1) else 0) | _PARITY[result & 0xFF]


def add(a: int, b: int, carry: int, bits: int, flags: int) -> tuple[int, int]:
    """ADD, ADC, XADD: (result, RFLAGS)."""
    total = a + b + carry
    result = total & ((1 << bits) - 1)
    new = _szp(result, bits) | (a ^ b ^ result) & AF
    if total >> bits:
        new |= CF
    if ((a ^ result) & (b ^ result)) >> (bits - 1):
        new |= OF
    return result, flags & ~ARITHMETIC | new


def subtract(a: int, b: int, borrow: int, bits: int, flags: int) -> tuple[int, int]:
    """SUB, SBB, CMP, NEG (a = 0): (result, RFLAGS)."""
    result = (a - b - borrow) & ((1 << bits) - 1)
    new = _szp(result, bits) | (a ^ b ^ result) & AF
    if a < b + borrow:
        new |= CF
    if ((a ^ b) & (a ^ result)) >> (bits - 1):
        new |= OF
    return result, flags & ~ARITHMETIC | new


def logic(result: int, bits: int, flags: int) -> tuple[int, int]:
    """AND, OR, XOR: (result, RFLAGS)."""
    return result, flags & ~ARITHMETIC | _szp(result, bits)


def increment(a: int, step: int, bits: int, flags: int) -> tuple[int, int]:
    """INC (``step`` 1) and DEC (-1): the carry stays."""
    result, new = add(a, 1, 0, bits, flags) if step > 0 else subtract(a, 1, 0, bits, flags)
    return result, new & ~CF | flags & CF


def shift(kind: str, a: int, count: int, bits: int, flags: int) -> tuple[int, int]:
    """SHL ("l"), SHR ("r") or SAR ("a"): (result, RFLAGS)."""
    count &= 0x3F if bits == 64 else 0x1F
    if not count:
        return a, flags
    mask, sign = (1 << bits) - 1, a >> (bits - 1)
    if kind == "l":
        result = a << count & mask
        carry = a >> (bits - count) & 1 if count <= bits else 0
        overflow = result >> (bits - 1) ^ carry
    elif kind == "r":
        result = a >> count
        carry = a >> (count - 1) & 1
        overflow = sign
    else:
        signed = a - (sign << bits)
        result = signed >> count & mask
        carry = signed >> (count - 1) & 1
        overflow = 0
    new = _szp(result, bits) | (CF if carry else 0) | (OF if overflow and count == 1 else 0)
    return result, flags & ~ARITHMETIC | new


def condition(code: int, flags: int) -> bool:
    """Does condition ``code`` (low four bits of Jcc, SETcc) hold?"""
    kind = code >> 1
    if kind == 0:
        holds = bool(flags & OF)
    elif kind == 1:
        holds = bool(flags & CF)
    elif kind == 2:
        holds = bool(flags & ZF)
    elif kind == 3:
        holds = bool(flags & (CF | ZF))
    elif kind == 4:
        holds = bool(flags & SF)
    elif kind == 5:
        holds = bool(flags & PF)
    else:
        holds = bool(flags & SF) != bool(flags & OF) or (kind == 7 and bool(flags & ZF))
    return holds != bool(code & 1)
