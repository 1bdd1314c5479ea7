# SPDX-License-Identifier: GPL-2.0-only
"""MSRs as a PV kernel sees them (Xen: xen/arch/x86/traps.c, the RDMSR and WRMSR cases of emulate_privileged_op).

Writes to MSRs that are not the guest's are ignored, as Xen ignores them; reads of MSRs that the modelled CPU has not
raise #GP.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pyxen.errors import XenError
from pyxen.hypervisor.x86 import hypercall_page

if TYPE_CHECKING:
    from pyxen.hypervisor.x86.pv.vcpu import PvVcpu
    from pyxen.machine.cpu.base import Cpu

MSR_FS_BASE: Final = 0xC0000100
MSR_GS_BASE: Final = 0xC0000101
MSR_SHADOW_GS_BASE: Final = 0xC0000102
MSR_EFER: Final = 0xC0000080
MSR_IA32_TSC: Final = 0x10
MSR_PAT: Final = 0x277
MSR_HYPERCALL_PAGE: Final = 0x40000000
"""CPUID leaf 0x40000002 names it."""

EFER_GUEST: Final = 0xD01  # SCE, LME, LMA, NXE
XEN_PAT: Final = 0x050100070406
"""The host's PAT, which Xen lets PV guests see (xen/include/asm-x86/processor.h)."""

_CONSTANT: Final[dict[int, int]] = {
    0x17: 0,  # IA32_PLATFORM_ID
    0x1B: 0xFEE00900,  # IA32_APIC_BASE: enabled, BSP
    0x3A: 1,  # IA32_FEATURE_CONTROL: locked, nothing enabled
    0x8B: 0,  # IA32_UCODE_REV: reads as zero for a guest
    0xCE: 0,  # MSR_PLATFORM_INFO
    0xFE: 0,  # IA32_MTRRCAP: none
    0x140: 0,  # MSR_MISC_FEATURES_ENABLES
    0x1A0: 1,  # IA32_MISC_ENABLE: fast strings
    0x1D9: 0,  # IA32_DEBUGCTL
    0x179: 0,  # IA32_MCG_CAP: no banks
    0x17A: 0,  # IA32_MCG_STATUS
    0xC0010015: 0,
    0xC001001F: 0,
}


def canonical(address: int) -> bool:
    """Bits 47..63 all alike."""
    return address < 1 << 47 or address >= (1 << 64) - (1 << 47)


def read(pv: PvVcpu, cpu: Cpu, number: int) -> int | None:
    """RDMSR; None means #GP."""
    if number == MSR_FS_BASE:
        return cpu.fs_base
    if number == MSR_GS_BASE:
        return cpu.gs_base
    if number == MSR_SHADOW_GS_BASE:
        return pv.gs_base_user
    if number == MSR_EFER:
        return EFER_GUEST
    if number == MSR_PAT:
        return XEN_PAT
    if number == MSR_IA32_TSC:
        return pv.hypervisor.clock.read_tsc()
    return _CONSTANT.get(number)


def write(pv: PvVcpu, cpu: Cpu, number: int, value: int) -> bool:
    """WRMSR; False means #GP."""
    if number in (MSR_FS_BASE, MSR_GS_BASE, MSR_SHADOW_GS_BASE):
        if not canonical(value):
            return False
        if number == MSR_FS_BASE:
            cpu.fs_base = value
        elif number == MSR_GS_BASE:
            cpu.gs_base = value
            pv.gs_base_kernel = value
        else:
            pv.gs_base_user = value
        return True
    if number == MSR_HYPERCALL_PAGE:
        return _hypercall_page(pv, value)
    if read(pv, cpu, number) != value:
        pv.hypervisor.log.guest_printk(
            pv.domain.domid, f"{pv.vcpu} attempted WRMSR {number:#010x} to {value:#x}", debug=True)
    return True


def _hypercall_page(pv: PvVcpu, value: int) -> bool:
    """wrmsr_hypervisor_regs(): fill the frame at address ``value``; its low bits are the number of the page, 0."""
    if value & 0xFFF:
        return False
    try:
        hypercall_page.initialise(pv.domain, value >> 12)
    except XenError:
        return False
    return True
