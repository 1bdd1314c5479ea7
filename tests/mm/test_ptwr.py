# SPDX-License-Identifier: GPL-2.0-only
"""Emulated stores into page tables, and grant mappings."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import pytest
from iced_x86 import Code, Encoder, Instruction, MemoryOperand, Register

from pyxen.hypervisor.frames import PGT_WRITABLE
from pyxen.hypervisor.x86.pv import ptwr_alu as alu
from pyxen.hypervisor.x86.pv import ptwr_decode
from pyxen.hypervisor.x86.pv.grant_map import (
    GNTMAP_APPLICATION_MAP,
    GNTMAP_CONTAINS_PTE,
    GNTMAP_READONLY,
    create_grant_pv_mapping,
    replace_grant_pv_mapping,
)
from pyxen.hypervisor.x86.pv.ptwr import ptwr_do_page_fault
from pyxen.machine.cpu.base import R8, RAX, RBX, RCX, RDI, RSI
from tests.mm.rig import GUEST_KERNEL, NX, RW, USER, A, D, FakeDomain, P, Rig

CODE_VA, TABLE_VA, DATA_VA = 0x400000000, 0x400001000, 0x400002000
CF, ZF, SF, OF, DF, PF = alu.CF, alu.ZF, alu.SF, alu.OF, alu.DF, alu.PF


class Guest:
    """A kernel with its code at CODE_VA and one of its own L1 tables mapped read-only at TABLE_VA."""

    def __init__(self, mode: str = "fast") -> None:
        self.rig = Rig()
        self.d: FakeDomain = self.rig.add(1, mode)
        self.code, self.target, self.a, self.b, self.data = self.rig.alloc(self.d, 5)
        l4, l3, l2, l1 = self.rig.alloc(self.d, 4)
        rig = self.rig
        rig.set(l4, 0, l3 << 12 | P | RW)
        rig.set(l3, 16, l2 << 12 | P | RW)
        rig.set(l2, 0, l1 << 12 | P | RW)
        rig.set(l2, 1, self.target << 12 | P | RW)
        rig.set(l1, 0, self.code << 12 | P)
        rig.set(l1, 1, self.target << 12 | P)
        rig.set(l1, 2, self.data << 12 | P | RW)
        rig.set(self.target, 3, self.a << 12 | P | RW | A)
        self.l1 = l1
        assert rig.mmuext(self.d, (5, l4, 0)) == 0
        self.cpu: Any = SimpleNamespace(gpr=[0] * 17, flags=0x202, fs_base=0, gs_base=0)
        self.cpu.gpr[RDI] = TABLE_VA + 24
        self.before = rig.entry(self.target, 3)

    def run(self, code: str | bytes, va: int = TABLE_VA + 24, rip: int = CODE_VA) -> int | None:
        data = bytes.fromhex(code) if isinstance(code, str) else code
        self.rig.memory.write((self.code << 12) + (rip & 0xFFF), data)
        return ptwr_do_page_fault(self.d.vcpus[0], self.cpu, va, rip)

    def pte(self, index: int = 3) -> int:
        return self.rig.entry(self.target, index)


@pytest.fixture
def g() -> Guest:
    return Guest()


def test_mov_goes_through_mod_l1_entry(g: Guest) -> None:
    g.cpu.gpr[RAX] = g.b << 12 | P | RW
    assert g.run("488907") == CODE_VA + 3
    assert g.pte() == g.b << 12 | P | RW
    assert (g.rig.count(g.a), g.rig.count(g.b), g.rig.type_count(g.b)) == (1, 2, 1)


def test_refused_entry_is_the_guests_page_fault(g: Guest) -> None:
    g.cpu.gpr[RAX] = g.target << 12 | P | RW
    assert g.run("488907") is None
    g.cpu.gpr[RAX] = 1 << 45 | P
    assert g.run("488907") is None
    assert g.pte() == g.before and g.rig.count(g.a) == 2


def test_exact_mode_adjusts_what_is_stored() -> None:
    g = Guest("exact")
    g.cpu.gpr[RAX] = g.b << 12 | P
    assert g.run("488907") == CODE_VA + 3
    assert g.pte() == g.b << 12 | P | USER | GUEST_KERNEL


def test_only_level_1_tables_of_ones_own_mapped_readonly(g: Guest) -> None:
    g.cpu.gpr[RAX] = 0
    g.cpu.gpr[RDI] = CODE_VA
    assert g.run("488907", CODE_VA) is None, "a read-only page that is no page table"
    g.cpu.gpr[RDI] = DATA_VA
    assert g.run("488907", DATA_VA) is None, "a writable page"
    l2 = g.rig.entry(g.rig.entry(g.d.v.guest_table, 0) >> 12, 16) >> 12
    assert g.rig.update(g.d, g.l1, 9, l2 << 12 | P) == 0
    g.cpu.gpr[RDI] = CODE_VA + 0x9000
    assert g.run("488907", CODE_VA + 0x9000) is None, "an L2 table"
    g.cpu.gpr[RDI] = 0x7F0000000000
    assert g.run("488907", 0x7F0000000000) is None, "nothing mapped"


def test_needs_vm_assist_and_kernel_mode(g: Guest) -> None:
    g.d.vm_assist = 0
    assert g.run("48c70700000000") is None
    g.d.vm_assist = 4
    g.d.v.kernel_mode = False
    assert g.run("48c70700000000") is None
    g.d.v.kernel_mode = True
    assert g.run("48c70700000000") == CODE_VA + 7
    assert g.pte() == 0 and g.rig.count(g.a) == 1


def test_unaligned_other_page_and_wide_stores_are_not_emulated(g: Guest) -> None:
    g.cpu.gpr[RDI] = TABLE_VA + 25
    assert g.run("488907", TABLE_VA + 25) is None
    g.cpu.gpr[RDI] = TABLE_VA + 24
    assert g.run("488907", TABLE_VA + 0x1018) is None
    # SSE, cmpxchg16b, push, AVX, UD2, NOP, and no instruction at all
    for code in ("0f2907", "f30f7f07", "480fc70f", "ff37", "c4e17d7f07", "0f0b", "90", ""):
        assert g.run(code) is None
    assert g.pte() == g.before


@pytest.mark.parametrize(
    ("code", "size", "shift"),
    [("8807", 1, 0), ("668907", 2, 0), ("8907", 4, 0), ("8827", 1, 8), ("44884707", 1, 0), ("895f04", 4, 0)],
)
def test_parts_of_an_entry(g: Guest, code: str, size: int, shift: int) -> None:
    """ptwr_emulated_update(): "turn a sub-word access into a full-word access"."""
    g.rig.update(g.d, g.target, 3, 0x1122334455667700)
    g.cpu.gpr[RAX] = g.cpu.gpr[RBX] = g.cpu.gpr[R8] = 0x8877665544332200
    offset = {"44884707": 7, "895f04": 4}.get(code, 0)
    assert g.run(code, TABLE_VA + 24 + offset) is not None
    value = 0x8877665544332200 >> shift & (1 << 8 * size) - 1
    mask = ((1 << 8 * size) - 1) << 8 * offset
    assert g.pte() == 0x1122334455667700 & ~mask | value << 8 * offset


def test_cmpxchg(g: Guest) -> None:
    g.cpu.gpr[RCX] = g.b << 12 | P
    g.cpu.gpr[RAX] = 0x55
    assert g.run("f0480fb10f") == CODE_VA + 5
    assert g.pte() == g.before and g.cpu.gpr[RAX] == g.before and not g.cpu.flags & ZF
    assert g.run("f0480fb10f") == CODE_VA + 5
    assert g.pte() == g.b << 12 | P and g.cpu.flags & ZF
    g.cpu.gpr[RAX], g.cpu.gpr[RCX] = g.pte(), g.target << 12 | P | RW
    assert g.run("f0480fb10f") is None and g.pte() == g.b << 12 | P


def test_xchg_and_xadd_return_the_old_entry(g: Guest) -> None:
    g.cpu.gpr[RCX] = 0
    assert g.run("48870f") == CODE_VA + 3
    assert g.cpu.gpr[RCX] == g.before and g.pte() == 0 and g.rig.count(g.a) == 1
    g.cpu.gpr[RCX] = g.b << 12 | P
    assert g.run("f0480fc10f") == CODE_VA + 5
    assert g.cpu.gpr[RCX] == 0 and g.pte() == g.b << 12 | P
    g.cpu.gpr[RCX] = 0xFFFFFFFF00000000
    assert g.run("870f") == CODE_VA + 2
    assert g.cpu.gpr[RCX] == (g.b << 12 | P), "32-bit results clear the upper half"


def test_bit_operations(g: Guest) -> None:
    assert g.run("f0480fba3701") == CODE_VA + 6  # lock btr qword [rdi], 1: what ptep_set_wrprotect() is
    assert g.cpu.flags & CF and g.pte() == g.before & ~RW and g.rig.type_count(g.a) == 0
    assert g.run("f0480fba2f06") == CODE_VA + 6
    assert not g.cpu.flags & CF and g.pte() == g.before & ~RW | D
    g.cpu.gpr[RAX] = 64 + 6  # a register's bit number reaches into the next word
    g.cpu.gpr[RDI] = TABLE_VA + 16
    assert g.run("480fb307", TABLE_VA + 24) == CODE_VA + 4
    assert g.pte() == g.before & ~RW
    g.cpu.gpr[RAX] = (1 << 64) - 64 + 5  # backwards
    g.cpu.gpr[RDI] = TABLE_VA + 32
    assert g.run("480fbb07", TABLE_VA + 24) == CODE_VA + 4
    assert g.pte() == g.before & ~RW & ~A


def test_addressing(g: Guest) -> None:
    g.cpu.gpr[RAX], g.cpu.gpr[RBX], g.cpu.gpr[RCX] = 0, TABLE_VA - 0x100, 3
    assert g.run("488984cb00010000") == CODE_VA + 8  # [rbx+rcx*8+100h]
    assert g.pte() == 0
    g.cpu.gs_base = TABLE_VA
    g.cpu.gpr[RAX] = g.b << 12 | P
    assert g.run("6548890425" + "18000000") == CODE_VA + 9
    assert g.pte() == g.b << 12 | P
    rel = TABLE_VA + 24 - (CODE_VA + 0x100 + 11)
    assert g.run(bytes.fromhex("48c705") + rel.to_bytes(4, "little") + bytes(4), rip=CODE_VA + 0x100) == CODE_VA + 0x10B
    assert g.pte() == 0


def test_string_stores_one_step_at_a_time(g: Guest) -> None:
    g.cpu.gpr[RAX], g.cpu.gpr[RCX] = 0, 2
    assert g.run("f348ab") == CODE_VA
    assert g.pte() == 0 and g.cpu.gpr[RCX] == 1 and g.cpu.gpr[RDI] == TABLE_VA + 32
    assert g.run("f348ab", TABLE_VA + 32) == CODE_VA + 3
    assert g.cpu.gpr[RCX] == 0
    g.rig.memory.write(g.data << 12, (g.b << 12 | P).to_bytes(8, "little"))
    g.cpu.gpr[RDI], g.cpu.gpr[RSI] = TABLE_VA + 24, DATA_VA
    g.cpu.flags |= DF
    assert g.run("48a5") == CODE_VA + 2
    assert g.pte() == g.b << 12 | P
    assert (g.cpu.gpr[RDI], g.cpu.gpr[RSI]) == (TABLE_VA + 16, DATA_VA - 8)
    g.cpu.gpr[RSI] = 0x123456789000
    assert g.run("48a5", TABLE_VA + 16) is None


def test_instruction_at_the_end_of_a_page(g: Guest) -> None:
    g.cpu.gpr[RAX] = 0
    rig = g.rig
    l1_only_code = rig.update(g.d, g.l1, 1, 0)
    assert l1_only_code == 0 and rig.update(g.d, g.l1, 5, g.target << 12 | P) == 0
    g.cpu.gpr[RDI] = CODE_VA + 0x5018
    assert g.run("488907", CODE_VA + 0x5018, CODE_VA + 0xFFD) == CODE_VA + 0x1000
    assert g.pte() == 0


def test_decode_cache_is_bounded() -> None:
    for i in range(ptwr_decode.MAX_CACHED + 10):
        ptwr_decode.decode(b"\x48\x89\x87" + i.to_bytes(4, "little"))
    assert len(ptwr_decode._cache) <= ptwr_decode.MAX_CACHED


# --- arithmetic against the definition -----------------------------------------------------------------------

VALUES = (0, 1, 2, 0x0F, 0x10, 0x7F, 0x80, 0x81, 0xFE, 0xFF)


def signed(value: int) -> int:
    return value - 256 if value & 0x80 else value


def expect(result: int, carry: bool, overflow: bool, flags: int) -> None:
    assert bool(flags & CF) == carry and bool(flags & OF) == overflow
    assert bool(flags & ZF) == (result == 0) and bool(flags & SF) == bool(result & 0x80)
    assert bool(flags & PF) == (bin(result).count("1") % 2 == 0)
    assert flags & 0x202 == 0x202, "other flags stay"


@pytest.mark.parametrize("carry", [0, 1])
def test_add_and_subtract(carry: int) -> None:
    for a, b in itertools.product(VALUES, VALUES):
        result, flags = alu.add(a, b, carry, 8, 0x202)
        assert result == (a + b + carry) & 0xFF
        expect(result, a + b + carry > 0xFF, not -128 <= signed(a) + signed(b) + carry <= 127, flags)
        assert bool(flags & alu.AF) == ((a & 15) + (b & 15) + carry > 15)
        result, flags = alu.subtract(a, b, carry, 8, 0x202)
        assert result == (a - b - carry) & 0xFF
        expect(result, a < b + carry, not -128 <= signed(a) - signed(b) - carry <= 127, flags)
        assert bool(flags & alu.AF) == ((a & 15) < (b & 15) + carry)


def test_increment_keeps_the_carry() -> None:
    for a, carry in itertools.product(VALUES, (0, CF)):
        for step in (1, -1):
            result, flags = alu.increment(a, step, 8, 0x202 | carry)
            assert result == (a + step) & 0xFF
            expect(result, bool(carry), not -128 <= signed(a) + step <= 127, flags)


def test_shifts() -> None:
    for a, count in itertools.product(VALUES, range(1, 9)):
        result, flags = alu.shift("l", a, count, 8, 0x202)
        assert result == a << count & 0xFF and bool(flags & CF) == bool(a << count & 0x100)
        result, flags = alu.shift("r", a, count, 8, 0x202)
        assert result == a >> count and bool(flags & CF) == bool(a >> (count - 1) & 1)
        result, flags = alu.shift("a", a, count, 8, 0x202)
        assert result == signed(a) >> count & 0xFF and bool(flags & CF) == bool(signed(a) >> (count - 1) & 1)
    assert alu.shift("l", 0x80, 0, 8, 0x203) == (0x80, 0x203)
    assert alu.shift("l", 1, 64, 64, 0x203) == (1, 0x203)
    assert alu.shift("l", 0x40, 1, 8, 2)[1] & OF and not alu.shift("l", 0xC0, 1, 8, 2)[1] & OF


@pytest.mark.parametrize("opcode", range(16))
def test_setcc(g: Guest, opcode: int) -> None:
    compares = [(a, b) for a in (0, 1, 5, 0x80, 0xFF) for b in (0, 1, 5, 0x80, 0xFF)]
    for a, b in compares:
        _, g.cpu.flags = alu.subtract(a, b, 0, 8, 0x202)
        overflow = not -128 <= signed(a) - signed(b) <= 127
        less, below, equal = signed(a) < signed(b), a < b, a == b
        sign, parity = bool((a - b) & 0x80), bin((a - b) & 0xFF).count("1") % 2 == 0
        truth = [overflow, below, equal, below or equal, sign, parity, less, less or equal][opcode >> 1]
        assert g.rig.update(g.d, g.target, 3, 0) == 0
        assert g.run(bytes((0x0F, 0x90 | opcode, 0x47, 0x01)), TABLE_VA + 25) == CODE_VA + 4
        assert g.pte() == (truth != bool(opcode & 1)) << 8


@pytest.mark.parametrize(
    ("code", "result"),
    [
        (Code.ADD_RM32_IMM8, 0x12), (Code.OR_RM32_IMM8, 0x12), (Code.ADC_RM32_IMM8, 0x13), (Code.SBB_RM32_IMM8, 0xD),
        (Code.AND_RM32_IMM8, 0), (Code.SUB_RM32_IMM8, 0xE), (Code.XOR_RM32_IMM8, 0x12), (Code.SHL_RM32_IMM8, 0x40),
        (Code.SHR_RM32_IMM8, 4), (Code.SAR_RM32_IMM8, 4),
    ],
)  # fmt: skip
def test_every_read_modify_write(g: Guest, code: int, result: int) -> None:
    assert g.rig.update(g.d, g.target, 3, 0x10 << 32) == 0
    encoder = Encoder(64)
    encoder.encode(Instruction.create_mem_i32(code, MemoryOperand(Register.RDI, displ=4), 2), CODE_VA)
    g.cpu.flags |= CF
    assert g.run(encoder.take_buffer(), TABLE_VA + 28) is not None
    assert g.pte() == result << 32


@pytest.mark.parametrize(
    ("code", "result"),
    [(Code.INC_RM64, 0x11), (Code.DEC_RM64, 0xF), (Code.NOT_RM64, (1 << 64) - 0x11), (Code.NEG_RM64, (1 << 64) - 0x10)],
)
def test_every_unary(g: Guest, code: int, result: int) -> None:
    assert g.rig.update(g.d, g.target, 3, 0x10) == 0
    encoder = Encoder(64)
    encoder.encode(Instruction.create_mem(code, MemoryOperand(Register.RDI)), CODE_VA)
    if result & 1:
        assert g.run(encoder.take_buffer()) is None, "an entry that no guest may have"
        assert g.pte() == 0x10
        return
    assert g.run(encoder.take_buffer()) is not None
    assert g.pte() == result


# --- grants ---------------------------------------------------------------------------------------------------


def test_grant_by_linear_address_and_unmap(g: Guest) -> None:
    rig, vcpu = g.rig, g.d.vcpus[0]
    granter = rig.add(2)
    (page,) = rig.alloc(granter)
    assert rig.frames.get_page_and_type(page, granter, PGT_WRITABLE)  # type: ignore[arg-type]
    va = CODE_VA + (2 << 20) + 3 * 4096  # the slot that maps g.a
    assert create_grant_pv_mapping(vcpu, va, page, GNTMAP_APPLICATION_MAP | 5 << 16) == 0
    assert g.pte() == page << 12 | P | RW | USER | A | D | NX | 5 << 9
    assert rig.count(g.a) == 1, "what was mapped there is put"
    assert rig.pin(granter, 1, page) < 0, "the granter cannot make a page table of it"
    for frame, flags in ((page, GNTMAP_READONLY), (g.b, 0)):
        assert replace_grant_pv_mapping(vcpu, va, frame, 0, flags) == -1
    assert replace_grant_pv_mapping(vcpu, va, page, 0, GNTMAP_APPLICATION_MAP) == 0
    assert g.pte() == 0 and rig.count(page) == 2, "the reference is the grant table's to put"
    rig.frames.put_page_and_type(page)
    assert rig.count(page) == 1


def test_grant_by_entry_address(g: Guest) -> None:
    rig, vcpu = g.rig, g.d.vcpus[0]
    granter = rig.add(2)
    (page,) = rig.alloc(granter)
    assert rig.frames.get_page(page, granter)  # type: ignore[arg-type]
    flags = GNTMAP_CONTAINS_PTE | GNTMAP_READONLY
    at = g.target << 12 | 7 << 3
    for bad in (at | 4, g.data << 12, page << 12, 1 << 50, g.d.v.guest_table << 12):
        assert create_grant_pv_mapping(vcpu, bad, page, flags) == -1
    assert create_grant_pv_mapping(vcpu, at, page, flags) == 0
    assert g.pte(7) == page << 12 | P | A | D | NX
    assert replace_grant_pv_mapping(vcpu, at, page, DATA_VA, flags) == -1, "not together with contains_pte"
    assert rig.update(g.d, g.target, 7, 0) == 0
    assert rig.count(page) == 1, "overwritten by the guest: the entry's reference goes with it"
    assert replace_grant_pv_mapping(vcpu, at, page, 0, flags) == -1


def test_unmap_and_replace_moves_an_entry(g: Guest) -> None:
    rig, vcpu = g.rig, g.d.vcpus[0]
    granter = rig.add(2)
    (page,) = rig.alloc(granter)
    assert rig.frames.get_page(page, granter)  # type: ignore[arg-type]
    va = CODE_VA + (2 << 20) + 7 * 4096
    assert create_grant_pv_mapping(vcpu, va, page, GNTMAP_READONLY) == 0
    spare = CODE_VA + (2 << 20) + 3 * 4096
    assert replace_grant_pv_mapping(vcpu, va, page, va, GNTMAP_READONLY) == -1
    assert replace_grant_pv_mapping(vcpu, va, page, spare, GNTMAP_READONLY) == 0
    assert g.pte(7) == g.before and g.pte(3) == 0
    assert rig.count(g.a) == 2 and rig.type_count(g.a) == 1


def test_a_granted_pte_that_is_overwritten_leaves_no_translation_behind() -> None:
    """put_page_from_l1e of a foreign frame: who frees it later flushes only its own domain."""
    rig = Rig()
    granter, mapper = rig.add(1), rig.add(2)
    (frame,) = rig.alloc(granter)
    assert rig.frames.get_page(frame, granter)
    l4, _l3, _l2, l1 = rig.tree(mapper)
    assert rig.pin(mapper, 4, l4) == 0
    at = (l1 << 12) + 8 * 5
    mapped = create_grant_pv_mapping(mapper.vcpus[0], at, frame, GNTMAP_CONTAINS_PTE | GNTMAP_READONLY)
    assert mapped == 0
    assert rig.entry(l1, 5) >> 12 & (1 << 40) - 1 == frame
    rig.flushes.clear()
    assert rig.update(mapper, l1, 5, 0) == 0
    assert mapper.domid in rig.flushes
