# SPDX-License-Identifier: GPL-2.0-only
"""CPUID of a translated domain: the PV policy (:mod:`pyxen.hypervisor.x86.cpuid`) with what only such a guest may
use, and Xen's leaves for it (xen/include/public/arch-x86/cpuid.h; cpuid_hypervisor_leaves, hvm_cpuid)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pyxen.hypervisor.x86.cpuid import XEN_LEAF, CpuidPolicy, Leaf

if TYPE_CHECKING:
    from pyxen.hypervisor.x86.hvm.vcpu import HvmVcpu
    from pyxen.machine.clock import TscCalibration


def _bits(*numbers: int) -> int:
    return sum(1 << n for n in numbers)


_1D: Final = _bits(1, 2, 3, 7, 9, 12, 13, 14, 17)
"""Over what PV guests have: VME DE PSE MCE APIC MTRR PGE MCA PSE36."""
_1D_MISSING: Final = _bits(7, 14)
"""MCE and MCA: no machine checks."""
_1C: Final = _bits(21, 24)
"""x2APIC, TSC-deadline timer."""
_7B: Final = _bits(0, 7, 9, 20)
"""FSGSBASE SMEP ERMS SMAP."""
_E1D: Final = _bits(26, 27)
"""1 GiB pages, RDTSCP."""
_MAX_LEAF: Final = 0x16
_APM_D: Final = 1 << 8
"""Invariant TSC."""

_VCPU_ID_PRESENT: Final = 1 << 3
_DOMID_PRESENT: Final = 1 << 4
_X2APIC_VIRT: Final = 1 << 1
_TSC_RELIABLE: Final = 1 << 1
_RDTSCP: Final = 1 << 2


class HvmCpuidPolicy(CpuidPolicy):
    """What one translated domain sees."""

    def __init__(self, tsc: TscCalibration) -> None:
        super().__init__()
        self._tsc = tsc

    def hvm_leaf(self, leaf: int, subleaf: int, hvm: HvmVcpu) -> Leaf:
        """EAX, EBX, ECX, EDX of one leaf for a vCPU."""
        value = self._hvm_leaf(leaf, subleaf, hvm)
        mask = self.masks.get((leaf, subleaf)) if self.masks else None
        if mask is None:
            return value
        return (value[0] & mask[0], value[1] & mask[1], value[2] & mask[2], value[3] & mask[3])

    def _hvm_leaf(self, leaf: int, subleaf: int, hvm: HvmVcpu) -> Leaf:
        if leaf == 1:
            a, b, c, d = self._leaf(1, 0, None)
            apic_id = hvm.vcpu.vcpu_id * 2
            d |= _1D & ~_1D_MISSING
            if not hvm.vlapic.hw_enabled:
                d &= ~(1 << 9)
            return a, b & 0xFF00FFFF | 1 << 16 | (apic_id & 0xFF) << 24, c | _1C, d
        if leaf == 7 and subleaf == 0:
            a, b, c, d = self._leaf(7, 0, None)
            return a, b | _7B, c, d
        if leaf == 0:
            _a, b, c, d = self._leaf(0, 0, None)
            return _MAX_LEAF, b, c, d
        if leaf == 0x16:  # processor frequency in MHz: who knows it need not time a loop by a PIT that is not there
            mhz = self._tsc.hz // 1_000_000 & 0xFFFF
            return mhz, mhz, 100, 0
        if leaf == 0xB:  # extended topology: one thread a core, as vCPU id * 2 is the APIC id
            apic_id = hvm.vcpu.vcpu_id * 2
            if subleaf == 0:
                return 1, 1, 1 << 8, apic_id
            if subleaf == 1:
                return 8, max(hvm.domain.max_vcpus, 1), 2 << 8 | 1, apic_id
            return 0, 0, subleaf & 0xFF, apic_id
        if leaf == XEN_LEAF:
            _a, b, c, d = self._leaf(XEN_LEAF, 0, None)
            return XEN_LEAF + 4, b, c, d
        if leaf == XEN_LEAF + 2:
            return 1, 0x40000000, 0, 0
        if leaf == XEN_LEAF + 3:
            return self._time(subleaf)
        if leaf == XEN_LEAF + 4:
            if subleaf:
                return 0, 0, 0, 0
            # Not XEN_HVM_CPUID_UPCALL_VECTOR, which is 4.17's: a Linux that sees it takes every event through the local
            # APIC, at the price of an EOI each. HVMOP_set_evtchn_upcall_vector is there for those who ask for it.
            return _VCPU_ID_PRESENT | _DOMID_PRESENT | _X2APIC_VIRT, hvm.vcpu.vcpu_id, hvm.domain.domid, 0
        if leaf == 0x80000001:
            a, b, c, d = self._leaf(leaf, 0, None)
            return a, b, c, d | _E1D
        if leaf == 0x80000007:
            return 0, 0, 0, _APM_D
        return self._leaf(leaf, subleaf, None)

    def _time(self, subleaf: int) -> Leaf:
        """Leaf 0x40000003: tsc_mode 2, not emulated; the scale as in vcpu_time_info."""
        mul, shift, tsc0 = self._tsc
        khz = self._tsc.hz // 1000
        if subleaf == 0:
            return _TSC_RELIABLE | _RDTSCP, 2, khz & 0xFFFFFFFF, 1
        if subleaf == 1:
            offset = -tsc0 & (1 << 64) - 1
            return offset & 0xFFFFFFFF, offset >> 32, mul, shift & 0xFFFFFFFF
        if subleaf == 2:
            return khz & 0xFFFFFFFF, 0, 0, 0
        return 0, 0, 0, 0
