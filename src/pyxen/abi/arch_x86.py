# SPDX-License-Identifier: GPL-2.0-only
"""``xen/include/public/arch-x86/xen.h`` and ``xen-x86_64.h``: vCPU context, traps, segment and callback numbers."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from enum import IntFlag
from typing import Final

HYPERVISOR_VIRT_START: Final = 0xFFFF800000000000
HYPERVISOR_VIRT_END: Final = 0xFFFF880000000000
MACH2PHYS_VIRT_START: Final = 0xFFFF800000000000
MACH2PHYS_VIRT_END: Final = 0xFFFF804000000000
MACH2PHYS_NR_ENTRIES: Final = (MACH2PHYS_VIRT_END - MACH2PHYS_VIRT_START) >> 3
ROOT_PAGETABLE_FIRST_XEN_SLOT: Final = 256
ROOT_PAGETABLE_LAST_XEN_SLOT: Final = 271
ROOT_PAGETABLE_XEN_SLOTS: Final = 16

SEGBASE_FS: Final = 0
SEGBASE_GS_USER: Final = 1
SEGBASE_GS_KERNEL: Final = 2
SEGBASE_GS_USER_SEL: Final = 3

TRAP_INFO: Final = struct.Struct("<BBH4xQ")
"""struct trap_info: vector, flags (bits 0-1 DPL, bit 2 disables events), cs, address."""
IRET_CONTEXT: Final = struct.Struct("<9Q")
"""struct iret_context: rax, r11, rcx, flags, rip, cs, rflags, rsp, ss; at RSP when HYPERVISOR_iret is called."""
VGCF_IN_SYSCALL: Final = 0x100


class Vgcf(IntFlag):
    """``VGCF_*``: flags of vcpu_guest_context."""

    I387_VALID = 1 << 0
    IN_KERNEL = 1 << 2
    FAILSAFE_DISABLES_EVENTS = 1 << 3
    SYSCALL_DISABLES_EVENTS = 1 << 4
    ONLINE = 1 << 5


_USER_REGS = struct.Struct("<15QIIQHHB3xQQH6xH6xH6xH6xH6x")
_TAIL = struct.Struct("<QQ16QQQQ8Q8QQQQQQQQ")
GUEST_CONTEXT_SIZE: Final = 512 + 8 + _USER_REGS.size + 256 * TRAP_INFO.size + _TAIL.size
"""sizeof(struct vcpu_guest_context) on x86-64: 5168."""

# Order of the first fifteen words of struct cpu_user_regs, as indices of hardware encoding.
_REG_ORDER: Final = (15, 14, 13, 12, 5, 3, 11, 10, 9, 8, 0, 1, 2, 6, 7)


@dataclass(slots=True)
class GuestContext:
    """``struct vcpu_guest_context`` (x86-64). ``gpr`` is in hardware order (RAX, RCX, …), RSP included; traps are
    (vector, flags, cs, address)."""

    flags: int = 0
    fpu: bytes = bytes(512)
    gpr: list[int] = field(default_factory=lambda: [0] * 16)
    rip: int = 0
    rflags: int = 0
    cs: int = 0
    ss: int = 0
    es: int = 0
    ds: int = 0
    fs: int = 0
    gs: int = 0
    saved_upcall_mask: int = 0
    traps: list[tuple[int, int, int, int]] = field(default_factory=list)
    ldt_base: int = 0
    ldt_ents: int = 0
    gdt_frames: list[int] = field(default_factory=lambda: [0] * 16)
    gdt_ents: int = 0
    kernel_ss: int = 0
    kernel_sp: int = 0
    ctrlreg: list[int] = field(default_factory=lambda: [0] * 8)
    debugreg: list[int] = field(default_factory=lambda: [0] * 8)
    event_callback: int = 0
    failsafe_callback: int = 0
    syscall_callback: int = 0
    vm_assist: int = 0
    fs_base: int = 0
    gs_base_kernel: int = 0
    gs_base_user: int = 0

    def pack(self) -> bytes:
        """The structure's bytes."""
        regs = _USER_REGS.pack(
            *(self.gpr[i] for i in _REG_ORDER), 0, 0, self.rip, self.cs, 0, self.saved_upcall_mask,
            self.rflags, self.gpr[4], self.ss, self.es, self.ds, self.fs, self.gs,
        )
        traps = b"".join(TRAP_INFO.pack(*t) for t in self.traps[:256]).ljust(256 * TRAP_INFO.size, b"\0")
        tail = _TAIL.pack(
            self.ldt_base, self.ldt_ents, *self.gdt_frames, self.gdt_ents, self.kernel_ss, self.kernel_sp,
            *self.ctrlreg, *self.debugreg, self.event_callback, self.failsafe_callback, self.syscall_callback,
            self.vm_assist, self.fs_base, self.gs_base_kernel, self.gs_base_user,
        )
        return self.fpu[:512].ljust(512, b"\0") + struct.pack("<Q", self.flags) + regs + traps + tail

    @classmethod
    def unpack(cls, data: bytes) -> GuestContext:
        """Decode; ``data`` must hold GUEST_CONTEXT_SIZE bytes (struct.error otherwise)."""
        (flags,) = struct.unpack_from("<Q", data, 512)
        regs = _USER_REGS.unpack_from(data, 520)
        gpr = [0] * 16
        for index, value in zip(_REG_ORDER, regs, strict=False):
            gpr[index] = value
        rip, cs, _pad, mask, rflags, gpr[4], ss, es, ds, fs, gs = regs[17:28]
        at = 520 + _USER_REGS.size
        traps = [TRAP_INFO.unpack_from(data, at + i * TRAP_INFO.size) for i in range(256)]
        tail = _TAIL.unpack_from(data, at + 256 * TRAP_INFO.size)
        return cls(
            flags=flags, fpu=data[:512], gpr=gpr, rip=rip, rflags=rflags, cs=cs, ss=ss, es=es, ds=ds, fs=fs, gs=gs,
            saved_upcall_mask=mask, traps=[(v, f, c, a) for v, f, c, a in traps],
            ldt_base=tail[0], ldt_ents=tail[1], gdt_frames=list(tail[2:18]), gdt_ents=tail[18],
            kernel_ss=tail[19], kernel_sp=tail[20], ctrlreg=list(tail[21:29]), debugreg=list(tail[29:37]),
            event_callback=tail[37], failsafe_callback=tail[38], syscall_callback=tail[39], vm_assist=tail[40],
            fs_base=tail[41], gs_base_kernel=tail[42], gs_base_user=tail[43],
        )


# xen/include/public/callback.h
CALLBACKTYPE_EVENT: Final = 0
CALLBACKTYPE_FAILSAFE: Final = 1
CALLBACKTYPE_SYSCALL: Final = 2
CALLBACKTYPE_SYSENTER_DEPRECATED: Final = 3
CALLBACKTYPE_NMI: Final = 4
CALLBACKTYPE_SYSENTER: Final = 5
CALLBACKTYPE_SYSCALL32: Final = 7
CALLBACKF_MASK_EVENTS: Final = 1
CALLBACK_REGISTER: Final = struct.Struct("<HH4xQ")
"""struct callback_register: type, flags, address."""
CALLBACK_UNREGISTER: Final = struct.Struct("<H2x")
CALLBACKOP_REGISTER: Final = 0
CALLBACKOP_UNREGISTER: Final = 1
