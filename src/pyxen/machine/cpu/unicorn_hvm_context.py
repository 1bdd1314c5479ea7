# SPDX-License-Identifier: GPL-2.0-only
"""The saved state of a vCPU under nested paging on the Unicorn x86-64 engine."""

from __future__ import annotations

import ctypes

from pyxen.errors import InternalError
from pyxen.machine.cpu import unicorn_internals as ui
from pyxen.machine.cpu.base import HvmRegisters, Segment
from pyxen.machine.cpu.unicorn_context import LONG_MODE_FLAGS, UnicornContext, settle_flags

_U64 = (1 << 64) - 1
_U32 = 0xffffffff
_ATTRIBUTES = 0xf0ff

CR0_PE, CR0_ET, CR0_PG = 1 << 0, 1 << 4, 1 << 31
CR4_PAE, CR4_SMAP = 1 << 5, 1 << 21
EFER_LME, EFER_LMA, EFER_SVME = 1 << 8, 1 << 10, 1 << 12

_NESTED_MODE = 7          # PAE, long mode, NX: the format of the nested tables
# What cannot be executed in a guest and has no patch of its own: STGI, SKINIT, MONITOR, MWAIT; MSRs by bitmap; and the
# interrupt window (VINTR).
_INTERCEPTS = 1 << 4 | 1 << 28 | 1 << 36 | 1 << 38 | 1 << 42 | 1 << 43

MSR_OFFSETS = {
    0x174: ui.SYSENTER_CS, 0x175: ui.SYSENTER_ESP, 0x176: ui.SYSENTER_EIP,
    0xc0000081: ui.STAR, 0xc0000082: ui.LSTAR, 0xc0000083: ui.CSTAR, 0xc0000084: ui.FMASK,
    0xc0000100: ui.SEGS + 4 * ui.SEG_SIZE + 8, 0xc0000101: ui.SEGS + 5 * ui.SEG_SIZE + 8,
    0xc0000102: ui.KERNEL_GS_BASE, 0xc0000103: ui.TSC_AUX,
}
"""Where the native MSRs are in CPUX86State. SYSENTER_CS is 32 bits."""

_FLAT_CODE, _FLAT_DATA, _BUSY_TSS, _LDT = 0xc09b, 0xc093, 0x8b, 0x82

def read_segment(v64: memoryview, v32: memoryview, at: int) -> Segment:
    """A SegmentCache."""
    return Segment(v32[at >> 2] & 0xffff, v64[(at + 8) >> 3], v32[(at + 16) >> 2],
                   v32[(at + 20) >> 2] >> 8 & _ATTRIBUTES)


def _write_segment(v64: memoryview, v32: memoryview, at: int, segment: Segment) -> None:
    v32[at >> 2] = segment.selector & 0xffff
    v64[(at + 8) >> 3] = segment.base & _U64
    v32[(at + 16) >> 2] = segment.limit & _U32
    v32[(at + 20) >> 2] = (segment.attributes & _ATTRIBUTES) << 8


def read_msr(v64: memoryview, v32: memoryview, number: int) -> int:
    """A native MSR. Raises InternalError for another one."""
    at = MSR_OFFSETS.get(number)
    if at is None:
        raise InternalError(f"MSR {number:#x} is not one of the engine's")
    return int(v32[at >> 2] if at == ui.SYSENTER_CS else v64[at >> 3])


def write_msr(v64: memoryview, v32: memoryview, number: int, value: int) -> None:
    """Set a native MSR, unchecked."""
    at = MSR_OFFSETS.get(number)
    if at is None:
        raise InternalError(f"MSR {number:#x} is not one of the engine's")
    if at == ui.SYSENTER_CS:
        v32[at >> 2] = value & 0xffff
    else:
        v64[at >> 3] = value & _U64


_VM = 0x20000
_CR0, _CR3, _CR4, _EFER = ui.CR0 >> 3, ui.CR3 >> 3, ui.CR4 >> 3, ui.EFER >> 3


class UnicornHvmContext(UnicornContext):
    """State of one vCPU under nested paging: the image, what waits for delivery, and what was asked for."""

    __slots__ = ("_lib", "event", "event_error", "nmi", "window")
    flags = LONG_MODE_FLAGS | _VM

    def __init__(self, image: bytes, vmcb: int, nested_root: int, lib: ui.Library) -> None:
        super().__init__(image)
        self._lib = lib
        self.event = 0            # EVENTINJ
        self.event_error = 0
        self.nmi = False
        self.window = False
        v64, v32 = self.view64, self.view32
        v64[ui.VM_VMCB >> 3] = vmcb
        v64[ui.INTERCEPT >> 3] = _INTERCEPTS
        v32[ui.NESTED_MODE >> 2] = _NESTED_MODE
        v32[ui.HFLAGS2 >> 2] = ui.HF2_GIF | ui.HF2_NPT | ui.HF2_VINTR      # the last: CR8 is v_tpr
        self.set_nested_root(nested_root)
        data = Segment(0x10, 0, _U32, _FLAT_DATA)
        segments = [data, Segment(0x08, 0, _U32, _FLAT_CODE), data, data, data, data]
        self.put_hvm(HvmRegisters(
            gpr=[0] * 17, flags=2, segments=segments, ldtr=Segment(attributes=_LDT),
            tr=Segment(limit=0x67, attributes=_BUSY_TSS), gdtr=(0, 0), idtr=(0, 0),
            cr0=CR0_PE | CR0_ET, cr2=0, cr3=0, cr4=0, efer=0, dr=[0, 0, 0, 0, 0, 0, 0xffff0ff0, 0x400],
            msrs=dict.fromkeys(MSR_OFFSETS, 0), fxsave=self._fxsave()))

    def set_nested_root(self, maddr: int) -> None:
        """The nested page-table root, from the next load on."""
        self._must_be_idle()
        self.forget_translations()
        self.view64[ui.NESTED_CR3 >> 3] = maddr & _U64

    def paging(self) -> tuple[int, int, int, int]:
        """CR0, CR3, CR4 and EFER. Raises InternalError while an engine holds them."""
        if self.engine is not None:
            self._must_be_idle()
        v64 = self.view64
        return v64[_CR0], v64[_CR3], v64[_CR4], v64[_EFER]

    def saved_flags(self) -> int:
        """RFLAGS. Raises InternalError while an engine holds them."""
        self._must_be_idle()
        return self.view64[ui.EFLAGS >> 3] & _U32

    def get_hvm(self) -> HvmRegisters:
        """Decode the saved state. Raises InternalError while an engine holds it."""
        self._must_be_idle()
        v64, v32 = self.view64, self.view32
        tr = read_segment(v64, v32, ui.TR)
        if tr.attributes & 0x15 == 1:
            tr.attributes |= 2               # the engine's check of the I/O bitmap wants it "available"
        dr = [v64[(ui.DR + 8 * n) >> 3] for n in range(8)]
        dr[7] = self.dr7
        return HvmRegisters(
            gpr=v64[:17].tolist(),
            flags=v64[ui.EFLAGS >> 3] & _U32,
            segments=[read_segment(v64, v32, ui.SEGS + ui.SEG_SIZE * n) for n in range(6)],
            ldtr=read_segment(v64, v32, ui.LDT), tr=tr,
            gdtr=(v64[(ui.GDT + 8) >> 3], v32[(ui.GDT + 16) >> 2]),
            idtr=(v64[(ui.IDT + 8) >> 3], v32[(ui.IDT + 16) >> 2]),
            cr0=v64[ui.CR0 >> 3], cr2=v64[ui.CR2 >> 3], cr3=v64[ui.CR3 >> 3], cr4=v64[ui.CR4 >> 3],
            efer=v64[ui.EFER >> 3], dr=dr,
            msrs={number: read_msr(v64, v32, number) for number in MSR_OFFSETS},
            fxsave=self._fxsave(),
        )

    def put_hvm(self, registers: HvmRegisters) -> None:
        """Replace the saved state. Raises InternalError while an engine holds it, or for a state no CPU can be in."""
        self._must_be_idle()
        self.forget_translations()
        r = registers
        if (len(r.gpr), len(r.segments), len(r.dr), len(r.fxsave)) != (17, 6, 8, 512):
            raise InternalError("register file of the wrong shape")
        if set(r.msrs) != set(MSR_OFFSETS):
            raise InternalError("the MSRs are not the native ones")
        paging = r.cr0 & (CR0_PE | CR0_PG)
        if paging == CR0_PG or bool(r.efer & EFER_LMA) != (bool(r.efer & EFER_LME) and paging == CR0_PE | CR0_PG):
            raise InternalError("CR0 and EFER contradict each other")
        if r.efer & EFER_LMA and not r.cr4 & CR4_PAE:
            raise InternalError("long mode without PAE")
        if r.efer & EFER_SVME or r.cr0 >> 32 or r.cr4 >> 32:
            raise InternalError("reserved bits in EFER, CR0 or CR4")
        v64, v32 = self.view64, self.view32
        for n, value in enumerate(r.gpr):
            v64[n] = value & _U64
        # VM counts in protected mode only; elsewhere it is dropped, as bits that are not defined are.
        legacy = r.cr0 & CR0_PE and not r.efer & EFER_LMA
        settle_flags(v64, v32, r.flags, self.flags if legacy else LONG_MODE_FLAGS)
        for n, segment in enumerate(r.segments):
            _write_segment(v64, v32, ui.SEGS + ui.SEG_SIZE * n, segment)
        _write_segment(v64, v32, ui.LDT, r.ldtr)
        tr = r.tr
        if tr.attributes & 0x15 == 1:
            tr = Segment(tr.selector, tr.base, tr.limit, tr.attributes & ~2)
        _write_segment(v64, v32, ui.TR, tr)
        for at, (base, limit) in ((ui.GDT, r.gdtr), (ui.IDT, r.idtr)):
            v64[(at + 8) >> 3], v32[(at + 16) >> 2] = base & _U64, limit & 0xffff
        v64[ui.CR0 >> 3], v64[ui.CR2 >> 3] = r.cr0 | CR0_ET, r.cr2 & _U64
        v64[ui.CR3 >> 3], v64[ui.CR4 >> 3], v64[ui.EFER >> 3] = r.cr3 & _U64, r.cr4, r.efer
        for n in (0, 1, 2, 3, 6):
            v64[(ui.DR + 8 * n) >> 3] = r.dr[n] & _U64
        self.dr7 = r.dr[7] & _U32
        for number, value in r.msrs.items():
            if number not in (0xc0000100, 0xc0000101):           # the bases of FS and GS: the segments have them
                write_msr(v64, v32, number, value)
        self._set_fxsave(r.fxsave)
        self._derive_hflags()

    def _derive_hflags(self) -> None:
        v64, v32 = self.view64, self.view32
        v32[ui.HFLAGS >> 2] = ui.HF_GUEST | (ui.HF_SMAP if v64[ui.CR4 >> 3] & CR4_SMAP else 0)
        self._lib.update_hflags(ctypes.addressof(self.buffer))
        v32[ui.HFLAGS >> 2] &= ~ui.HF_FROM_EFLAGS
