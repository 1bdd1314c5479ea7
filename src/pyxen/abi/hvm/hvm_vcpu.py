# SPDX-License-Identifier: GPL-2.0-only
"""``xen/include/public/hvm/hvm_vcpu.h``: struct vcpu_hvm_context, how a vCPU of a PVH guest is set up."""

from __future__ import annotations

import struct
from typing import Final

MODE_32B: Final = 0
MODE_64B: Final = 1
HEADER: Final = struct.Struct("<I4x")
"""mode, pad; the registers follow."""
X86_32: Final = struct.Struct("<10I3I4xQ10I5H6x")
"""eax, ecx, edx, ebx, esp, ebp, esi, edi, eip, eflags; cr0, cr3, cr4; efer; bases and limits of cs, ds, ss, es, tr;
their attributes."""
X86_64: Final = struct.Struct("<10Q4Q")
"""rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, rip, rflags; cr0, cr3, cr4, efer."""
SIZE: Final = HEADER.size + max(X86_32.size, X86_64.size)
