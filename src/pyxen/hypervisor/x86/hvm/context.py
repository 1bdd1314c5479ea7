# SPDX-License-Identifier: GPL-2.0-only
"""Setting a vCPU's registers from outside: start of day, VCPUOP_initialise, SIPI, XEN_DOMCTL_sethvmcontext
(Xen: arch_set_info_hvm_guest in xen/arch/x86/hvm/domain.c, hvm_vcpu_reset_state, hvm_load_cpu_ctxt)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from pyxen.abi.arch_x86 import GuestContext, Vgcf
from pyxen.abi.hvm import hvm_vcpu as abi
from pyxen.errors import InternalError, XenError
from pyxen.hypervisor.x86.hvm.cr import CR0_ET, CR0_PE, CR0_PG, CR4_PAE, cr0_valid, cr4_valid
from pyxen.hypervisor.x86.hvm.msr import EFER_KNOWN, EFER_LMA, EFER_LME
from pyxen.hypervisor.x86.msr import canonical
from pyxen.machine.cpu.base import RBX, RIP, HvmRegisters, Seg, Segment

if TYPE_CHECKING:
    from pyxen.hypervisor.domain import Domain
    from pyxen.hypervisor.vcpu import Vcpu
    from pyxen.hypervisor.x86.hvm.vcpu import HvmVcpu

FXSAVE_RESET: Final = (0x37F).to_bytes(2, "little") + bytes(22) + (0x1F80).to_bytes(4, "little") + bytes(484)
DR6_RESET: Final = 0xFFFF0FF0
DR7_RESET: Final = 0x400
_MAX_LIMIT: Final = 0xFFFFFFFF
_FLAT_CODE32: Final = 0xC9B
_FLAT_CODE64: Final = 0xA9B
_FLAT_DATA: Final = 0xC93
_REAL_CODE: Final = 0x9B
_REAL_DATA: Final = 0x93
_TSS: Final = 0x8B
_LDT_UNUSABLE: Final = 0x82
EFLAGS_KNOWN: Final = 0x003F7FD7


def attributes_of(ar: int) -> int:
    """The ``_ar`` fields of the ABI and of struct hvm_hw_cpu have the flags right above the access byte; what
    :class:`Segment` holds keeps the descriptor's gap of four bits."""
    return ar & 0xFF | (ar & 0xF00) << 4


def _registers(gpr: list[int], flags: int, segments: list[Segment], tr: Segment, *, cr0: int, cr3: int, cr4: int,
               efer: int) -> HvmRegisters:
    return HvmRegisters(
        gpr=gpr, flags=flags, segments=segments, ldtr=Segment(0, 0, 0xFFFF, attributes_of(_LDT_UNUSABLE)), tr=tr,
        gdtr=(0, 0), idtr=(0, 0), cr0=cr0, cr2=0, cr3=cr3, cr4=cr4, efer=efer,
        dr=[0, 0, 0, 0, 0, 0, DR6_RESET, DR7_RESET], msrs={}, fxsave=FXSAVE_RESET,
    )


def _flat(code: int, data: int, limit: int = _MAX_LIMIT) -> list[Segment]:
    return [Segment(0, 0, limit, attributes_of(code if seg == Seg.CS else data)) for seg in range(6)]


def pvh_start(entry: int, start_info: int) -> HvmRegisters:
    """PVH's start of day (docs/misc/pvh): flat 32-bit protected mode, paging off, interrupts off. XenError(EINVAL)."""
    if not 0 <= entry <= _MAX_LIMIT or not 0 <= start_info <= _MAX_LIMIT:
        raise XenError(errno.EINVAL)
    gpr = [0] * 17
    gpr[RBX], gpr[RIP] = start_info, entry
    return _registers(gpr, 2, _flat(_FLAT_CODE32, _FLAT_DATA), Segment(0, 0, 0x67, attributes_of(_TSS)),
                      cr0=CR0_ET | CR0_PE, cr3=0, cr4=0, efer=0)


def decode(data: bytes) -> HvmRegisters:
    """struct vcpu_hvm_context, checked. XenError(EINVAL)."""
    mode, pad = abi.HEADER.unpack_from(data)[0], data[4:8]
    if any(pad):
        raise XenError(errno.EINVAL)
    if mode == abi.MODE_32B:
        return _decode32(data)
    if mode == abi.MODE_64B:
        return _decode64(data)
    raise XenError(errno.EINVAL)


def _decode32(data: bytes) -> HvmRegisters:
    r = abi.X86_32.unpack_from(data, abi.HEADER.size)
    eax, ecx, edx, ebx, esp, ebp, esi, edi, eip, eflags, cr0, cr3, cr4, efer = r[:14]
    cs_b, ds_b, ss_b, es_b, tr_b, cs_l, ds_l, ss_l, es_l, tr_l = r[14:24]
    cs_a, ds_a, ss_a, es_a, tr_a = r[24:29]
    cs = _segment(cs_b, cs_l, cs_a, "cs")
    ds = _segment(ds_b, ds_l, ds_a, "ds")
    ss = _segment(ss_b, ss_l, ss_a, "ss")
    es = _segment(es_b, es_l, es_a, "es")
    tr = Segment(0, tr_b, tr_l, attributes_of(tr_a))
    if tr_a & 0xF != 0xB or tr_a & 0x10 or not tr_a & 0x80:
        raise XenError(errno.EINVAL)  # a busy 32-bit TSS, present
    if not cs_a & 8 or ss_a & 8 or (cs_a & 0x200 and not efer & EFER_LMA):
        raise XenError(errno.EINVAL)
    if (ss_a >> 5 & 3) != (cs_a >> 5 & 3) or eip > cs.limit:
        raise XenError(errno.EINVAL)
    _check_modes(cr0, cr4, efer)
    segments = [es, cs, ss, ds, Segment(0, 0, 0, 0), Segment(0, 0, 0, 0)]
    segments[Seg.FS] = Segment(0, ds.base, ds.limit, ds.attributes)
    segments[Seg.GS] = Segment(0, ds.base, ds.limit, ds.attributes)
    gpr = [eax, ecx, edx, ebx, esp, ebp, esi, edi, *[0] * 8, eip]
    return _registers(gpr, eflags & EFLAGS_KNOWN | 2, segments, tr, cr0=cr0 | CR0_ET, cr3=cr3, cr4=cr4, efer=efer)


def _segment(base: int, limit: int, ar: int, name: str) -> Segment:
    """check_segment(): a code or data segment that hardware would load. XenError(EINVAL)."""
    if ar & 0xF000 or not ar & 0x10:
        raise XenError(errno.EINVAL)
    if not ar & 0x80:
        if name in ("cs", "ss"):
            raise XenError(errno.EINVAL)
        return Segment(0, 0, 0, 0)
    if name == "ss" and ar & 0xA != 2:
        raise XenError(errno.EINVAL)  # writable data
    if name in ("ds", "es") and ar & 0xA == 8:
        raise XenError(errno.EINVAL)  # execute-only code
    if ar & 0x800:
        if limit & 0xFFF != 0xFFF and limit >> 20:
            raise XenError(errno.EINVAL)
    elif limit >> 20:
        raise XenError(errno.EINVAL)
    return Segment(0, base, limit, attributes_of(ar | 1))


def _check_modes(cr0: int, cr4: int, efer: int) -> None:
    """The combinations that hardware accepts."""
    if not cr0_valid(cr0) or not cr4_valid(cr4) or efer & ~EFER_KNOWN:
        raise XenError(errno.EINVAL)
    paging, long_mode = bool(cr0 & CR0_PG), bool(efer & EFER_LME)
    if efer & EFER_LMA and not (paging and long_mode):
        raise XenError(errno.EINVAL)
    if paging and long_mode and not (efer & EFER_LMA and cr4 & CR4_PAE):
        raise XenError(errno.EINVAL)


def _decode64(data: bytes) -> HvmRegisters:
    r = abi.X86_64.unpack_from(data, abi.HEADER.size)
    rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, rip, rflags, cr0, cr3, cr4, efer = r
    if not cr0 & CR0_PG or not cr4 & CR4_PAE or not efer & EFER_LME or not efer & EFER_LMA or not canonical(rip):
        raise XenError(errno.EINVAL)
    _check_modes(cr0, cr4, efer)
    if cr3 >> 40:
        raise XenError(errno.EINVAL)
    gpr = [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, *[0] * 8, rip]
    return _registers(gpr, rflags & EFLAGS_KNOWN | 2, _flat(_FLAT_CODE64, _FLAT_DATA),
                      Segment(0, 0, 0x67, attributes_of(_TSS)), cr0=cr0 | CR0_ET, cr3=cr3, cr4=cr4, efer=efer)


def _put(vcpu: Vcpu, registers: HvmRegisters) -> None:
    """Into a fresh context: nothing of what waited for the old one's delivery is left. XenError(EINVAL) for what no
    CPU could hold."""
    context = vcpu.domain.hypervisor.new_hvm_context(vcpu.hvm.p2m.root_maddr)
    native = context.get_hvm().msrs
    registers.msrs = {number: registers.msrs.get(number, value) for number, value in native.items()}
    try:
        context.put_hvm(registers)
    except InternalError as error:
        raise XenError(errno.EINVAL, str(error)) from error
    vcpu.context = context
    vcpu.hvm.window = False


def initialise(vcpu: Vcpu, data: bytes) -> None:
    """VCPUOP_initialise of a vCPU that is down. XenError(EINVAL)."""
    _put(vcpu, decode(data))


def startup(hvm: HvmVcpu, vector: int) -> bool:
    """hvm_vcpu_reset_state() for SIPI: real mode, CS:IP = vector << 8 : 0. False if this engine cannot (the domain
    then crashes)."""
    base = vector << 12
    gpr = [0] * 17
    segments = _flat(_REAL_CODE, _REAL_DATA, 0xFFFF)
    segments[Seg.CS] = Segment(vector << 8, base, 0xFFFF, attributes_of(_REAL_CODE))
    registers = _registers(gpr, 2, segments, Segment(0, 0, 0xFFFF, attributes_of(_TSS)), cr0=CR0_ET, cr3=0, cr4=0,
                           efer=0)
    registers.gdtr = registers.idtr = (0, 0xFFFF)
    try:
        _put(hvm.vcpu, registers)
    except XenError as error:
        hvm.hypervisor.crash(hvm.domain, f"{hvm.vcpu} cannot start in real mode: {error}")
        return False
    return True


def set_registers(domain: Domain, vcpu_id: int, registers: HvmRegisters) -> None:
    """Set everything and bring the vCPU up. XenError(EINVAL)."""
    if not 0 <= vcpu_id < len(domain.vcpus):
        raise XenError(errno.EINVAL)
    if len(registers.gpr) != 17 or len(registers.segments) != 6 or len(registers.fxsave) != 512:
        raise XenError(errno.EINVAL)
    _check_modes(registers.cr0, registers.cr4, registers.efer)
    vcpu = domain.vcpus[vcpu_id]
    scheduler = domain.hypervisor.scheduler
    scheduler.domain_pause(domain)
    try:
        _put(vcpu, registers)
        vcpu.is_initialised = True
        scheduler.vcpu_up(vcpu)
    finally:
        scheduler.domain_unpause(domain)


def get_registers(domain: Domain, vcpu_id: int) -> HvmRegisters:
    """Registers of a vCPU, paused meanwhile. XenError: EINVAL, ENODATA."""
    if not 0 <= vcpu_id < len(domain.vcpus):
        raise XenError(errno.EINVAL)
    vcpu = domain.vcpus[vcpu_id]
    scheduler = domain.hypervisor.scheduler
    scheduler.vcpu_pause(vcpu)
    try:
        return vcpu.hvm.registers()
    finally:
        scheduler.vcpu_unpause(vcpu)


def guest_context(registers: HvmRegisters) -> bytes:
    """XEN_DOMCTL_getvcpucontext of such a vCPU: struct vcpu_guest_context with what it has room for."""
    c = GuestContext(flags=Vgcf.ONLINE | Vgcf.I387_VALID | Vgcf.IN_KERNEL, fpu=registers.fxsave)
    c.gpr, c.rip, c.rflags = list(registers.gpr[:16]), registers.gpr[RIP], registers.flags
    c.es, c.cs, c.ss, c.ds, c.fs, c.gs = (s.selector for s in registers.segments)
    c.fs_base, c.gs_base_kernel = registers.segments[Seg.FS].base, registers.segments[Seg.GS].base
    c.ctrlreg[0], c.ctrlreg[2], c.ctrlreg[3], c.ctrlreg[4] = (
        registers.cr0, registers.cr2, registers.cr3, registers.cr4)
    c.debugreg = list(registers.dr)
    return c.pack()
