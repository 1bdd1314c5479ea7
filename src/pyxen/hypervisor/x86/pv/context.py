# SPDX-License-Identifier: GPL-2.0-only
"""Setting and reading a PV vCPU's whole state (Xen: arch_set_info_guest, arch_get_info_guest in xen/arch/x86).

The vCPU must not be running: callers pause it, and its context is saved.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING, Final

from pyxen.abi.arch_x86 import GUEST_CONTEXT_SIZE, GuestContext, Vgcf
from pyxen.errors import XenError
from pyxen.hypervisor.hypercall import Preempted
from pyxen.hypervisor.misc_op import VALID_ASSISTS
from pyxen.hypervisor.x86.msr import canonical
from pyxen.hypervisor.x86.pv import emulate, gdt, ldt
from pyxen.hypervisor.x86.pv.descriptors import FAST_KERNEL_CS, FAST_KERNEL_SS, FLAT_KERNEL_CS, FLAT_KERNEL_SS
from pyxen.hypervisor.x86.pv.mm import install_guest_tables
from pyxen.hypervisor.x86.pv.vcpu import DEBUGREG_RESET
from pyxen.machine.cpu.base import Registers, Seg

if TYPE_CHECKING:
    from pyxen.hypervisor.x86.pv.vcpu import PvVcpu
    from pyxen.machine.cpu.base import Context

_FLAGS: Final = 0x254FD5
_FPU_RESET: Final = struct.pack("<H22xI", 0x37F, 0x1F80).ljust(512, b"\0")
"""FXSAVE image after FNINIT: control word 0x37f, all registers empty, MXCSR 0x1f80."""


def _context(pv: PvVcpu) -> Context:
    context = pv.vcpu.context
    if context is None:
        context = pv.hypervisor.new_context()
        pv.vcpu.context = context
    return context


def set_guest_context(pv: PvVcpu, data: bytes) -> None:
    """VCPUOP_initialise and XEN_DOMCTL_setvcpucontext. Nothing is changed on an error.

    EINVAL: a state no PV vCPU may have, tables that are not the domain's or not acceptable, or a vCPU that has no
    vcpu_info yet. EOPNOTSUPP: other page, GDT or LDT tables for a vCPU that was set up before. Raises
    hypercall.Preempted when the page tables need more time: call again with the same data.
    """
    if len(data) != GUEST_CONTEXT_SIZE:
        raise XenError(errno.EINVAL)
    c = GuestContext.unpack(data)
    addresses = (c.rip, c.event_callback, c.failsafe_callback, c.syscall_callback)
    if not all(canonical(a) for a in addresses):
        raise XenError(errno.EINVAL)
    if not all(canonical(a) for a in (c.fs_base, c.gs_base_kernel, c.gs_base_user)):
        raise XenError(errno.EINVAL)
    for _vector, _flags, _cs, address in c.traps:
        if not canonical(address):
            raise XenError(errno.EINVAL)
    if c.gdt_ents > 512 * 16 or c.ldt_ents > 8192 or c.ctrlreg[3] & 0xFFF:
        raise XenError(errno.EINVAL)
    in_kernel = bool(c.flags & Vgcf.IN_KERNEL)
    if (not in_kernel and not c.ctrlreg[1]) or not pv.vcpu.info_maddr or pv.domain.dying:
        raise XenError(errno.EINVAL)
    if pv.vcpu.is_initialised:
        if _tables(c) != _tables_of(pv):
            raise XenError(errno.EOPNOTSUPP)
    else:
        _install_tables(pv, c)
    pv.trap_table = [None] * 256
    for index, (_vector, flags, cs, address) in enumerate(c.traps):
        if address:
            pv.trap_table[index] = (flags, cs | 3, address)
    pv.kernel_mode = in_kernel
    pv.kernel_sp, pv.kernel_ss = c.kernel_sp, (c.kernel_ss | 3) & 0xFFFF
    pv.event_callback, pv.failsafe_callback, pv.syscall_callback = addresses[1:]
    pv.failsafe_masks_events = bool(c.flags & Vgcf.FAILSAFE_DISABLES_EVENTS)
    pv.syscall_masks_events = bool(c.flags & Vgcf.SYSCALL_DISABLES_EVENTS)
    pv.gs_base_kernel, pv.gs_base_user = c.gs_base_kernel, c.gs_base_user
    pv.cr0_ts = bool(c.ctrlreg[0] & 8)
    pv.iopl = c.rflags >> 12 & 3  # virtual: the real one is never the guest's
    if c.ctrlreg[4]:
        pv.guest_cr4 = emulate.guest_cr4(pv, c.ctrlreg[4])
    if pv.vcpu.vcpu_id == 0 and not pv.vcpu.is_initialised:
        pv.domain.vm_assist = c.vm_assist & VALID_ASSISTS
    pv.debugreg = list(DEBUGREG_RESET)
    for number in (0, 1, 2, 3, 6, 7):
        emulate.set_debugreg(pv, number, c.debugreg[number])
    context = _context(pv)
    root = pv.guest_table if in_kernel or (not pv.exact and pv._shares_root()) else pv.guest_table_user
    pv.root_loaded = root
    context.put(
        Registers(
            gpr=[*c.gpr, c.rip],
            flags=c.rflags & _FLAGS | 0x202,
            selectors=[c.es, c.cs | 3, c.ss | 3, c.ds, c.fs, c.gs],
            bases=[0, 0, 0, 0, c.fs_base, c.gs_base_kernel if in_kernel else c.gs_base_user],
            cr2=0,
            cr3=root << 12,
            fxsave=c.fpu if c.flags & Vgcf.I387_VALID else _FPU_RESET,
        )
    )
    pv.fresh = True
    pv.vcpu.is_initialised = True


def _tables(c: GuestContext) -> tuple[object, ...]:
    pages = (c.gdt_ents + 511) // 512
    return c.ctrlreg[3] >> 12, c.ctrlreg[1] >> 12, c.gdt_ents, list(c.gdt_frames[:pages]), c.ldt_base, c.ldt_ents


def _tables_of(pv: PvVcpu) -> tuple[object, ...]:
    return pv.guest_table, pv.guest_table_user, pv.gdt_ents, pv.gdt_frames, pv.ldt_base, pv.ldt_ents


def _install_tables(pv: PvVcpu, c: GuestContext) -> None:
    """Page, GDT and LDT tables of a vCPU that has none: all or, with XenError(EINVAL), none.

    Raises Preempted. A root that is done already then stays the vCPU's (Xen keeps it in old_guest_table), for to drop
    one that nobody else holds would undo it; the next slice takes it up, whatever tables it is then about.
    """
    if c.ctrlreg[1] and not c.ctrlreg[1] >> 12:
        raise XenError(errno.EINVAL)
    try:
        if not install_guest_tables(pv, c.ctrlreg[3] >> 12, c.ctrlreg[1] >> 12):
            raise Preempted(())
        gdt.set_gdt(pv, list(c.gdt_frames[: (c.gdt_ents + 511) // 512]), c.gdt_ents)
        ldt.set_ldt(pv, c.ldt_base, c.ldt_ents)
    except XenError:
        gdt.destroy_gdt(pv)
        ldt.set_ldt(pv, 0, 0)
        roots = pv.guest_table, pv.guest_table_user
        pv.guest_table = pv.guest_table_user = 0
        for mfn in roots:
            if mfn:
                pv.hypervisor.frames.put_page_and_type(mfn)
        raise


def get_guest_context(pv: PvVcpu) -> bytes:
    """XEN_DOMCTL_getvcpucontext: 5168 bytes. ENODATA for a vCPU that was never initialised."""
    context = pv.vcpu.context
    if context is None or not pv.vcpu.is_initialised:
        raise XenError(errno.ENODATA)
    r = context.get()
    masked = pv.bytes[pv.vcpu.info_maddr + 1]
    flags = Vgcf.I387_VALID | (Vgcf.IN_KERNEL if pv.kernel_mode else 0)
    if pv.failsafe_masks_events:
        flags |= Vgcf.FAILSAFE_DISABLES_EVENTS
    if pv.syscall_masks_events:
        flags |= Vgcf.SYSCALL_DISABLES_EVENTS
    if not pv.vcpu.pause_flags & 2:
        flags |= Vgcf.ONLINE
    gs_now = r.bases[Seg.GS]
    frames = pv.gdt_frames + [0] * (16 - len(pv.gdt_frames))
    return GuestContext(
        flags=flags, fpu=r.fxsave, gpr=r.gpr[:16], rip=r.gpr[16],
        rflags=r.flags | 0x200 | pv.iopl << 12,
        cs=FLAT_KERNEL_CS if r.selectors[Seg.CS] == FAST_KERNEL_CS else r.selectors[Seg.CS],
        ss=FLAT_KERNEL_SS if r.selectors[Seg.SS] == FAST_KERNEL_SS else r.selectors[Seg.SS],
        es=r.selectors[Seg.ES], ds=r.selectors[Seg.DS],
        fs=r.selectors[Seg.FS], gs=r.selectors[Seg.GS], saved_upcall_mask=masked,
        traps=[(i, e[0], e[1], e[2]) if (e := pv.trap_table[i]) else (i, 0, 0, 0) for i in range(256)],
        ldt_base=pv.ldt_base, ldt_ents=pv.ldt_ents, gdt_frames=frames, gdt_ents=pv.gdt_ents,
        kernel_ss=pv.kernel_ss, kernel_sp=pv.kernel_sp,
        ctrlreg=[
            0x80050033 | (8 if pv.cr0_ts else 0), pv.guest_table_user << 12,
            pv.memory.q[(pv.vcpu.info_maddr + 16) >> 3], pv.guest_table << 12, pv.guest_cr4, 0, 0, 0,
        ],
        debugreg=list(pv.debugreg),
        event_callback=pv.event_callback, failsafe_callback=pv.failsafe_callback, syscall_callback=pv.syscall_callback,
        vm_assist=pv.domain.vm_assist, fs_base=r.bases[Seg.FS],
        gs_base_kernel=gs_now if pv.kernel_mode else pv.gs_base_kernel,
        gs_base_user=pv.gs_base_user if pv.kernel_mode else gs_now,
    ).pack()
