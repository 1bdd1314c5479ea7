# SPDX-License-Identifier: GPL-2.0-only
"""CPUID as guests see it: a policy over what the engine executes, and Xen's own leaves
(xen/include/public/arch-x86/cpuid.h).

The modelled CPU is QEMU 5.0's x86-64 without what a PV guest may not have (PSE, PGE, MTRR, VME, APIC timers'
deadline, AVX and
XSAVE: the engine has no YMM state).
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pyxen.hypervisor.x86.pv.vcpu import PvVcpu

Leaf = tuple[int, int, int, int]


def _bits(*numbers: int) -> int:
    return sum(1 << n for n in numbers)


# FPU TSC MSR PAE CX8 SEP CMOV PAT CLFLUSH MMX FXSR SSE SSE2
_1D: Final = _bits(0, 4, 5, 6, 8, 11, 15, 16, 19, 23, 24, 25, 26)
# SSE3 PCLMULQDQ SSSE3 CX16 SSE4.1 SSE4.2 POPCNT AES HYPERVISOR
_1C: Final = _bits(0, 1, 9, 13, 19, 20, 23, 25, 31)
# BMI1 BMI2 ADX
_7B: Final = _bits(3, 8, 19)
# SYSCALL NX LM
_E1D: Final = _bits(11, 20, 29)
_E1C: Final = _bits(0, 5)  # LAHF, ABM (LZCNT)

XEN_LEAF: Final = 0x40000000
XEN_SIGNATURE: Final = (0x566E6558, 0x65584D4D, 0x4D4D566E)  # "XenVMMXenVMM"
VERSION: Final = 4 << 16 | 6
BRAND: Final = b"pyxen virtual CPU (Unicorn)"
SIGNATURE: Final = 0x000106CA
"""Family 6, model 28: an in-order CPU. An emulated one does not speculate either, and kernels that know the model
leave out retpolines,
return thunks and buffer clearing, which cost a fifth of a Linux guest's time here."""
MAX_LEAF: Final = 0xD
MAX_EXTENDED: Final = 0x80000008


class CpuidPolicy:
    """What one domain sees. ``leaf`` is on the path of every CPUID instruction."""

    def __init__(self) -> None:
        self.masks: dict[tuple[int, int], Leaf] = {}
        """AND-masks by (leaf, subleaf), from the toolstack's policy."""

    def leaf(self, leaf: int, subleaf: int, pv: PvVcpu | None = None) -> Leaf:
        """EAX, EBX, ECX, EDX of one leaf. Unknown leaves read as zero."""
        value = self._leaf(leaf, subleaf, pv)
        mask = self.masks.get((leaf, subleaf)) if self.masks else None
        if mask is None:
            return value
        return (value[0] & mask[0], value[1] & mask[1], value[2] & mask[2], value[3] & mask[3])

    def _leaf(self, leaf: int, subleaf: int, pv: PvVcpu | None) -> Leaf:
        if leaf == 1:
            apic = (pv.vcpu.vcpu_id * 2 & 0xFF) << 24 if pv is not None else 0
            return SIGNATURE, 0x00010800 | apic, _1C, _1D
        if leaf == 0:
            return MAX_LEAF, 0x756E6547, 0x6C65746E, 0x49656E69
        if leaf == 7:
            return (0, _7B, 0, 0) if subleaf == 0 else (0, 0, 0, 0)
        if leaf == XEN_LEAF:
            return XEN_LEAF + 2, *XEN_SIGNATURE
        if leaf == XEN_LEAF + 1:
            return VERSION, 0, 0, 0
        if leaf == XEN_LEAF + 2:  # one hypercall page, its MSR; features: MMU_PT_UPDATE_PRESERVE_AD
            return 1, 0x40000000, 1, 0
        if leaf == 0x80000000:
            return MAX_EXTENDED, 0, 0, 0
        if leaf == 0x80000001:
            return 0, 0, _E1C, _E1D
        if 0x80000002 <= leaf <= 0x80000004:
            a, b, c, d = struct.unpack_from("<4I", BRAND.ljust(48, b"\0"), 16 * (leaf - 0x80000002))
            return a, b, c, d
        if leaf == 0x80000008:
            return 0x3028, 0, 0, 0
        return 0, 0, 0, 0
