# SPDX-License-Identifier: GPL-2.0-only
"""Control registers: what a translated guest may put there (Xen: hvm_set_cr0, hvm_set_cr4 in hvm.c)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pyxen.hypervisor.x86.hvm.msr import EFER_LMA, EFER_LME

if TYPE_CHECKING:
    from pyxen.hypervisor.x86.hvm.vcpu import HvmVcpu
    from pyxen.machine.cpu.base import HvmCpu

CR0_PE: Final = 1
CR0_ET: Final = 1 << 4
CR0_NW: Final = 1 << 29
CR0_CD: Final = 1 << 30
CR0_PG: Final = 1 << 31
CR0_KNOWN: Final = 0xE005003F
"""PE MP EM TS ET NE WP AM NW CD PG."""
CR4_PAE: Final = 1 << 5
CR4_KNOWN: Final = sum(1 << n for n in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 16, 20, 21))
"""VME PVI TSD DE PSE PAE MCE PGE PCE OSFXSR OSXMMEXCPT FSGSBASE SMEP SMAP: what CPUID shows, and MCE and PCE, which do
nothing. No PCIDE, UMIP, OSXSAVE, PKE, VMXE."""


def cr0_valid(value: int) -> bool:
    """No reserved bits; PG needs PE, NW needs CD. (The upper half is refused by #GP, undefined low bits are kept
    out here although hardware ignores them: it stores them as zero.)"""
    return not (value >> 32 or (value & CR0_PG and not value & CR0_PE) or (value & CR0_NW and not value & CR0_CD))


def cr4_valid(value: int) -> bool:
    """hvm_cr4_guest_valid_bits()."""
    return not value & ~CR4_KNOWN


def write(hvm: HvmVcpu, cpu: HvmCpu, number: int, value: int) -> bool:
    """A guest's write of CR0, CR4 or CR8; False is #GP(0)."""
    if number == 0:
        return _write_cr0(cpu, value)
    if number == 4:
        return _write_cr4(cpu, value)
    if number == 8:
        if value & ~0xF:
            return False
        hvm.vlapic.set_tpr(value << 4)
        cpu.set_cr(8, value)
        return True
    return False


def _write_cr0(cpu: HvmCpu, value: int) -> bool:
    if not cr0_valid(value):
        return False
    value = value & CR0_KNOWN | CR0_ET
    old, efer = cpu.get_cr(0), cpu.get_efer()
    if value & CR0_PG and not old & CR0_PG:
        if efer & EFER_LME and not cpu.get_cr(4) & CR4_PAE:
            return False
        if efer & EFER_LME and cpu.segment(1).attributes & 0x2000:
            return False  # 64-bit code segment
    elif old & CR0_PG and not value & CR0_PG and efer & EFER_LMA and cpu.segment(1).attributes & 0x2000:
        return False  # paging cannot go while 64-bit code runs
    cpu.set_cr(0, value)
    return True


def _write_cr4(cpu: HvmCpu, value: int) -> bool:
    if not cr4_valid(value):
        return False
    if not value & CR4_PAE and cpu.get_efer() & EFER_LMA:
        return False
    cpu.set_cr(4, value)
    return True
