# SPDX-License-Identifier: GPL-2.0-only
"""Model-specific registers of a translated guest that the engine does not hold (Xen: hvm_msr_read_intercept,
hvm_msr_write_intercept in hvm.c, mtrr.c, guest_rdmsr in msr.c). What is not here is #GP, for reading and writing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pyxen.errors import XenError
from pyxen.hypervisor.x86 import hypercall_page

if TYPE_CHECKING:
    from pyxen.hypervisor.x86.hvm.vcpu import HvmVcpu
    from pyxen.machine.cpu.base import HvmCpu

MSR_TSC: Final = 0x10
MSR_PLATFORM_ID: Final = 0x17
MSR_APIC_BASE: Final = 0x1B
MSR_FEATURE_CONTROL: Final = 0x3A
MSR_UCODE_REV: Final = 0x8B
MSR_MTRRCAP: Final = 0xFE
MSR_SYSENTER: Final = range(0x174, 0x177)
MSR_MCG_CAP: Final = 0x179
MSR_MISC_ENABLE: Final = 0x1A0
MSR_DEBUGCTL: Final = 0x1D9
MSR_MTRR_PHYS: Final = range(0x200, 0x210)
MSR_MTRR_FIXED: Final = (0x250, 0x258, 0x259, *range(0x268, 0x270))
MSR_PAT: Final = 0x277
MSR_MTRR_DEF_TYPE: Final = 0x2FF
MSR_TSC_DEADLINE: Final = 0x6E0
MSR_X2APIC: Final = range(0x800, 0x900)
MSR_EFER: Final = 0xC0000080
MSR_TSC_AUX: Final = 0xC0000103
MSR_HYPERCALL_PAGE: Final = 0x40000000

PAT_RESET: Final = 0x0007040600070406
_MTRR_TYPES: Final = frozenset((0, 1, 4, 5, 6))
_PAT_TYPES: Final = frozenset((0, 1, 4, 5, 6, 7))
_MTRRCAP: Final = 0x508
"""Write-combining, fixed ranges, eight variable ranges."""
_PHYS_MASK: Final = (1 << 40) - 1
EFER_SCE: Final = 1
EFER_LME: Final = 1 << 8
EFER_LMA: Final = 1 << 10
EFER_NXE: Final = 1 << 11
EFER_KNOWN: Final = EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE

_ZERO: Final = frozenset((
    MSR_PLATFORM_ID, MSR_UCODE_REV, MSR_MCG_CAP, 0x17A, MSR_DEBUGCTL, 0x140, 0xCE, 0xC0010015, 0xC001001F,
))
"""Read as zero; writes of anything are dropped, as Xen drops those it knows to be harmless."""


class MsrState:
    """Of one vCPU. Memory types mean nothing to an emulated CPU without caches, so MTRRs and PAT are only kept."""

    def __init__(self) -> None:
        self.pat = PAT_RESET
        self.mtrr_def_type = 0xC06
        """Enabled, with fixed ranges, write-back: as hvmloader or a PVH toolstack leaves it."""
        self.mtrr_fixed = dict.fromkeys(MSR_MTRR_FIXED, 0x0606060606060606)
        self.mtrr_phys = dict.fromkeys(MSR_MTRR_PHYS, 0)
        self.misc_enable = 1
        self.tsc_aux = 0


def read(hvm: HvmVcpu, cpu: HvmCpu, number: int) -> int | None:
    """RDMSR; None is #GP(0)."""
    state = hvm.msr
    if number in MSR_X2APIC:
        return hvm.vlapic.read_msr(number)
    if number == MSR_APIC_BASE:
        return hvm.vlapic.apic_base
    if number == MSR_TSC:
        return hvm.hypervisor.clock.read_tsc()
    if number == MSR_TSC_DEADLINE:
        return hvm.vlapic.tsc_deadline
    if number == MSR_EFER:
        return cpu.get_efer()
    if number == MSR_PAT:
        return state.pat
    if number == MSR_MTRRCAP:
        return _MTRRCAP
    if number == MSR_MTRR_DEF_TYPE:
        return state.mtrr_def_type
    if number in state.mtrr_fixed:
        return state.mtrr_fixed[number]
    if number in state.mtrr_phys:
        return state.mtrr_phys[number]
    if number == MSR_MISC_ENABLE:
        return state.misc_enable
    if number == MSR_FEATURE_CONTROL:
        return 1  # locked, nothing enabled
    if number == MSR_TSC_AUX:
        return state.tsc_aux
    if number in _ZERO:
        return 0
    return None


def write(hvm: HvmVcpu, cpu: HvmCpu, number: int, value: int) -> bool:
    """WRMSR; False is #GP(0)."""
    state = hvm.msr
    if number in MSR_X2APIC:
        return hvm.vlapic.write_msr(number, value)
    if number == MSR_APIC_BASE:
        return hvm.vlapic.set_apic_base(value)
    if number == MSR_TSC_DEADLINE:
        hvm.vlapic.set_tsc_deadline(value)
        return True
    if number == MSR_EFER:
        return _write_efer(cpu, value)
    if number == MSR_HYPERCALL_PAGE:
        return _hypercall_page(hvm, value)
    if number == MSR_PAT:
        if any(value >> shift & 0xFF not in _PAT_TYPES for shift in range(0, 64, 8)):
            return False
        state.pat = value
        return True
    if number == MSR_MTRR_DEF_TYPE:
        if value & ~0xCFF or value & 0xFF not in _MTRR_TYPES:
            return False
        state.mtrr_def_type = value
        return True
    if number in state.mtrr_fixed:
        if any(value >> shift & 0xFF not in _MTRR_TYPES for shift in range(0, 64, 8)):
            return False
        state.mtrr_fixed[number] = value
        return True
    if number in state.mtrr_phys:
        flags = 0xFF if not number & 1 else 0x800
        if value & ~(_PHYS_MASK & ~0xFFF | flags) or (not number & 1 and value & 0xFF not in _MTRR_TYPES):
            return False
        state.mtrr_phys[number] = value
        return True
    if number == MSR_MISC_ENABLE:
        state.misc_enable = value & 1
        return True
    if number == MSR_TSC_AUX:
        if value >> 32:
            return False
        state.tsc_aux = value
        return True
    if number == MSR_TSC:
        # The engine's TSC has no offset of a guest's own.
        hvm.hypervisor.log.guest_printk(hvm.domain.domid, f"{hvm.vcpu} WRMSR of its TSC is ignored", debug=True)
        return True
    return number in _ZERO


def efer_valid(value: int, cr0: int, old: int) -> bool:
    """hvm_efer_valid() and hvm_set_efer(): no unknown bits, LME stays as it is under paging. LMA is not written."""
    if value & ~EFER_KNOWN:
        return False
    return not (cr0 >> 31 & 1 and (value ^ old) & EFER_LME)


def _write_efer(cpu: HvmCpu, value: int) -> bool:
    old = cpu.get_efer()
    if not efer_valid(value, cpu.get_cr(0), old):
        return False
    cpu.set_efer(value & ~EFER_LMA | old & EFER_LMA)
    return True


def _hypercall_page(hvm: HvmVcpu, value: int) -> bool:
    """guest_wrmsr_xen(): fill the page at this guest-physical address; its low bits are the number of the page."""
    if value & 0xFFF:
        return False
    p2m = hvm.domain.hvm.p2m
    try:
        mfn = p2m.get_page(value >> 12, writable=True)
    except XenError:
        return False
    try:
        hypercall_page.initialise_hvm(hvm.domain, mfn)
        if hvm.domain.log_dirty is not None:
            hvm.domain.log_dirty.mark(value >> 12)
    except XenError:
        return False
    finally:
        p2m.frames.put_page(mfn)
    return True
