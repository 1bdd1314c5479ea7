# SPDX-License-Identifier: GPL-2.0-only
"""Writable page tables: a guest kernel's stores into its own level 1 tables (Xen: xen/arch/x86/mm.c,
ptwr_do_page_fault, ptwr_emulated_update; later pv/ro-page-fault.c).

Page tables are mapped read-only, so such a store faults.  The one instruction is emulated and its result goes through
the same check as an mmu_update request; if it is refused, or is nothing that is known here, the guest gets its page
fault. Level 1 tables only, with VMASST_TYPE_writable_pagetables, stores of up to 8 naturally aligned bytes.  A Linux
boot has some hundreds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pyxen.abi.xen import MASK64, VmAssist
from pyxen.errors import GuestAccessError
from pyxen.hypervisor.trace import TRC_PV_PTWR_EMULATION
from pyxen.hypervisor.x86.pv import ptwr_alu as alu
from pyxen.hypervisor.x86.pv.mm_entry import mod_l1_entry
from pyxen.hypervisor.x86.pv.mm_flags import ADDRESS_MASK, PAGE_PRESENT, PAGE_RW
from pyxen.hypervisor.x86.pv.mm_va import writable_l1e
from pyxen.hypervisor.x86.pv.ptwr_decode import MAX_LENGTH, GprPart, Kind, Store, decode
from pyxen.hypervisor.x86.pv.walk import guest_l1e
from pyxen.machine.cpu.base import RAX, RCX, RDI, RSI

if TYPE_CHECKING:
    from pyxen.hypervisor.vcpu import Vcpu
    from pyxen.hypervisor.x86.pv.vcpu import PvVcpu
    from pyxen.machine.cpu.base import Cpu

_WRITABLE_PAGETABLES: Final = 1 << VmAssist.WRITABLE_PAGETABLES
_FS: Final = 4


def ptwr_do_page_fault(vcpu: Vcpu, cpu: Cpu, fault_va: int, rip: int) -> int | None:
    """Emulate the store at ``rip`` that faulted at ``fault_va`` (a write to a present page, by the guest's kernel).

    Returns the RIP to continue at, or None if the fault is the guest's to handle.
    """
    domain, pv = vcpu.domain, vcpu.pv
    if not domain.vm_assist & _WRITABLE_PAGETABLES or not pv.kernel_mode:
        return None
    frames = domain.hypervisor.frames
    q = frames.memory.q
    leaf = guest_l1e(frames.memory, pv.guest_table, fault_va)
    if leaf is None:
        return None
    pte = q[leaf]
    if pte & (PAGE_PRESENT | PAGE_RW) != PAGE_PRESENT:
        return None
    table = (pte & ADDRESS_MASK) >> 3
    if not writable_l1e(frames, domain, table):
        return None
    store = decode(_instruction(pv, rip))
    if store is None:
        return None
    frames.lock.acquire()
    try:
        return _emulate(vcpu, cpu, store, fault_va, rip, table)
    except GuestAccessError:
        return None
    finally:
        frames.release()


def _instruction(pv: PvVcpu, rip: int) -> bytes:
    try:
        return pv.read(rip, MAX_LENGTH)
    except GuestAccessError:
        try:  # the instruction may end before a page that is not there
            return pv.read(rip, 0x1000 - (rip & 0xFFF))
        except GuestAccessError:
            return b""


def _address(cpu: Cpu, store: Store, rip: int) -> int:
    operand, gpr = store.operand, cpu.gpr
    address = operand.displacement
    if operand.rip:
        address += rip
    if operand.base >= 0:
        address += gpr[operand.base]
    if operand.index_register >= 0:
        address += gpr[operand.index_register] * operand.scale
    address &= operand.mask
    if operand.segment >= 0 and store.kind != Kind.MOVS:  # there it is the source's: stores through RDI are flat
        address += cpu.fs_base if operand.segment == _FS else cpu.gs_base
    return address & MASK64


def _read_gpr(cpu: Cpu, part: GprPart) -> int:
    return cpu.gpr[part.register] >> part.shift & ((1 << part.size * 8) - 1)


def _write_gpr(cpu: Cpu, part: GprPart, value: int) -> None:
    if part.size >= 4:
        cpu.gpr[part.register] = value  # a 32-bit result clears the upper half
        return
    mask = ((1 << part.size * 8) - 1) << part.shift
    cpu.gpr[part.register] = cpu.gpr[part.register] & ~mask | value << part.shift


def _emulate(vcpu: Vcpu, cpu: Cpu, store: Store, fault_va: int, rip: int, table: int) -> int | None:
    frames, domain = vcpu.domain.hypervisor.frames, vcpu.domain
    kind, size = store.kind, store.size
    bits = size * 8
    mask = (1 << bits) - 1
    address = _address(cpu, store, rip)
    source = store.source
    operand = 0 if source is None else source & mask if isinstance(source, int) else _read_gpr(cpu, source)
    if Kind.BTS <= kind <= Kind.BTC and isinstance(source, GprPart):
        # A register's bit number reaches beyond the word.
        number = operand - (1 << bits) if operand >> (bits - 1) else operand
        address = (address + (number >> 3 & -size)) & MASK64
        operand = number & (bits - 1)
    # Only naturally aligned stores within the page that faulted.
    if (address ^ fault_va) & ~0xFFF or address & (size - 1):
        return None
    at = table + (address >> 3 & 511)
    if not writable_l1e(frames, domain, at):
        return None
    word = frames.memory.q[at]
    offset = (address & 7) * 8
    old = word >> offset & mask
    flags = cpu.flags
    if kind == Kind.MOVS:
        new, new_flags = _load(vcpu.pv, cpu, store), flags
    elif kind == Kind.CMPXCHG:
        new = operand
        difference, new_flags = alu.subtract(cpu.gpr[RAX] & mask, old, 0, bits, flags)
        if difference:
            _write_gpr(cpu, GprPart(RAX, size, 0), old)
            cpu.flags = new_flags
            return (rip + store.length) & MASK64
    else:
        new, new_flags = _result(cpu, kind, old, operand, bits, flags, store)
    entry = word & ~(mask << offset) | new << offset
    if mod_l1_entry(frames, at, entry, domain, domain, False):
        return None
    trace = domain.hypervisor.trace
    if trace.enabled:
        trace.event(TRC_PV_PTWR_EMULATION, vcpu, entry & 0xFFFFFFFF, entry >> 32, *_words(address), *_words(rip))
    if kind in (Kind.XCHG, Kind.XADD) and isinstance(source, GprPart):
        _write_gpr(cpu, source, old)
    if new_flags != flags:
        cpu.flags = new_flags
    if kind >= Kind.STOS and kind <= Kind.MOVS:
        return _advance(cpu, store, flags, rip)
    return (rip + store.length) & MASK64


def _words(value: int) -> tuple[int, int]:
    return value & 0xFFFFFFFF, value >> 32


def _result(cpu: Cpu, kind: Kind, old: int, operand: int, bits: int, flags: int, store: Store) -> tuple[int, int]:
    """(value to store, RFLAGS)."""
    mask = (1 << bits) - 1
    if kind <= Kind.XCHG:
        return operand, flags
    if kind == Kind.STOS:
        return cpu.gpr[RAX] & mask, flags
    if kind == Kind.SETCC:
        return int(alu.condition(store.condition, flags)), flags
    if kind == Kind.NOT:
        return old ^ mask, flags
    if kind == Kind.NEG:
        return alu.subtract(0, old, 0, bits, flags)
    if kind in (Kind.INC, Kind.DEC):
        return alu.increment(old, 1 if kind == Kind.INC else -1, bits, flags)
    if Kind.BTS <= kind <= Kind.BTC:
        bit = 1 << (operand & (bits - 1))
        new = old | bit if kind == Kind.BTS else old & ~bit if kind == Kind.BTR else old ^ bit
        return new, flags & ~alu.CF | (alu.CF if old & bit else 0)
    if kind >= Kind.SHL:
        return alu.shift({Kind.SHL: "l", Kind.SHR: "r"}.get(kind, "a"), old, operand, bits, flags)
    if kind == Kind.AND:
        return alu.logic(old & operand, bits, flags)
    if kind == Kind.OR:
        return alu.logic(old | operand, bits, flags)
    if kind == Kind.XOR:
        return alu.logic(old ^ operand, bits, flags)
    carry = flags & alu.CF if kind in (Kind.ADC, Kind.SBB) else 0
    if kind in (Kind.ADD, Kind.ADC, Kind.XADD):
        return alu.add(old, operand, carry, bits, flags)
    return alu.subtract(old, operand, carry, bits, flags)


def _load(pv: PvVcpu, cpu: Cpu, store: Store) -> int:
    address = cpu.gpr[RSI] & store.operand.mask
    if store.operand.segment >= 0:
        address += cpu.fs_base if store.operand.segment == _FS else cpu.gs_base
    return int.from_bytes(pv.read(address & MASK64, store.size), "little")


def _advance(cpu: Cpu, store: Store, flags: int, rip: int) -> int:
    """One step of a string instruction is done; with a repeat prefix the next one is the CPU's to try."""
    gpr, mask = cpu.gpr, store.operand.mask
    step = -store.size if flags & alu.DF else store.size
    gpr[RDI] = (gpr[RDI] + step) & mask
    if store.kind == Kind.MOVS:
        gpr[RSI] = (gpr[RSI] + step) & mask
    if store.repeat:
        left = (gpr[RCX] - 1) & mask
        gpr[RCX] = left
        if left:
            return rip
    return (rip + store.length) & MASK64
