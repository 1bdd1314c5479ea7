# SPDX-License-Identifier: GPL-2.0-only
"""The local APIC of a vCPU (Xen: xen/arch/x86/hvm/vlapic.c; Intel's manual, volume 3, "APIC").

Registers are reached through the page at 0xfee00000 (xAPIC) or MSRs 0x800 and up (x2APIC).  IRR, ISR and TMR are kept
as 256-bit numbers.  Only the thread of the domain's engine touches any of it; a timer of another pCPU's queue posts.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Final

from pyxen.hypervisor.timer import Timer

if TYPE_CHECKING:
    from pyxen.hypervisor.x86.hvm.vcpu import HvmVcpu

APIC_ID: Final = 0x20
APIC_LVR: Final = 0x30
APIC_TASKPRI: Final = 0x80
APIC_PROCPRI: Final = 0xA0
APIC_EOI: Final = 0xB0
APIC_LDR: Final = 0xD0
APIC_DFR: Final = 0xE0
APIC_SPIV: Final = 0xF0
APIC_ISR: Final = 0x100
APIC_TMR: Final = 0x180
APIC_IRR: Final = 0x200
APIC_ESR: Final = 0x280
APIC_CMCI: Final = 0x2F0
APIC_ICR: Final = 0x300
APIC_ICR2: Final = 0x310
APIC_LVTT: Final = 0x320
APIC_LVTTHMR: Final = 0x330
APIC_LVTPC: Final = 0x340
APIC_LVT0: Final = 0x350
APIC_LVT1: Final = 0x360
APIC_LVTERR: Final = 0x370
APIC_TMICT: Final = 0x380
APIC_TMCCT: Final = 0x390
APIC_TDCR: Final = 0x3E0
APIC_SELF_IPI: Final = 0x3F0

VLAPIC_VERSION: Final = 0x00050014
"""Version 0x14, six LVT entries."""
BUS_CYCLE_NS: Final = 10
"""APIC_BUS_CYCLE_NS: 100 MHz."""

MSR_APIC_BASE_BSP: Final = 1 << 8
MSR_APIC_BASE_EXTD: Final = 1 << 10
MSR_APIC_BASE_ENABLE: Final = 1 << 11
APIC_BASE: Final = 0xFEE00000
APIC_BASE_MASK: Final = ((1 << 40) - 1) & ~0xFFF

_LVT_MASKED: Final = 1 << 16
_LVT_VALID: Final = {
    APIC_LVTT: 0x000710FF & ~0x1000 | 0x60000, APIC_LVTTHMR: 0x000117FF & ~0x1000, APIC_LVTPC: 0x000117FF & ~0x1000,
    APIC_LVT0: 0x0001F7FF & ~0x5000, APIC_LVT1: 0x0001F7FF & ~0x5000, APIC_LVTERR: 0x000110FF & ~0x1000,
}
"""What software can change: vector, mode, polarity, trigger, mask; the timer's mode is two bits."""
_SPIV_ENABLE: Final = 1 << 8
_SPIV_VALID: Final = 0x3FF
_ESR_SEND_ILLEGAL: Final = 1 << 5
_ESR_RECEIVE_ILLEGAL: Final = 1 << 6
_TIMER_MODE: Final = 3 << 17
_ONESHOT: Final = 0
_PERIODIC: Final = 1 << 17
_TSC_DEADLINE: Final = 2 << 17

# Delivery modes (ICR and LVT bits 8 to 10)
DM_FIXED: Final = 0
DM_LOWEST: Final = 1
DM_SMI: Final = 2
DM_NMI: Final = 4
DM_INIT: Final = 5
DM_STARTUP: Final = 6
DM_EXTINT: Final = 7
_ICR_LOGICAL: Final = 1 << 11
_ICR_BUSY: Final = 1 << 12
_ICR_ASSERT: Final = 1 << 14
_ICR_LEVEL: Final = 1 << 15

_ident = threading.get_ident


class Vlapic:
    """One vCPU's local APIC."""

    def __init__(self, hvm: HvmVcpu) -> None:
        self._hvm = hvm
        self.vcpu_id = hvm.vcpu.vcpu_id
        self.timer = Timer(lambda _now: self._timer_expired())
        self.apic_base = APIC_BASE | MSR_APIC_BASE_ENABLE | (MSR_APIC_BASE_BSP if not self.vcpu_id else 0)
        self._expired = False
        """The timer went off on a thread that may not touch this."""
        self.reset()

    def reset(self) -> None:
        """vlapic_do_init(): as after power-on and INIT; the base stays."""
        self.irr = self.isr = self.tmr = 0
        self.tpr = 0
        self.apic_id = self.vcpu_id * 2
        self.ldr = 0
        self.dfr = 0xFFFFFFFF
        self.spiv = 0xFF
        self.esr = self._esr_next = 0
        self.icr = self.icr2 = 0
        self.lvt = dict.fromkeys(_LVT_VALID, _LVT_MASKED)
        self.tmict = self.tdcr = 0
        self.tsc_deadline = 0
        self._started_ns = 0
        self.timer.stop()
        if self.x2apic:
            self._set_x2apic_id()

    def _set_x2apic_id(self) -> None:
        self.ldr = (self.apic_id & ~0xF) << 12 | 1 << (self.apic_id & 0xF)

    @property
    def x2apic(self) -> bool:
        """In x2APIC mode."""
        return bool(self.apic_base & MSR_APIC_BASE_EXTD)

    @property
    def hw_enabled(self) -> bool:
        """IA32_APIC_BASE says so."""
        return bool(self.apic_base & MSR_APIC_BASE_ENABLE)

    @property
    def enabled(self) -> bool:
        """By IA32_APIC_BASE and by the spurious-interrupt register."""
        return bool(self.spiv & _SPIV_ENABLE) and self.hw_enabled

    # --- interrupts in and out -----------------------------------------------------------------------

    def set_irq(self, vector: int, *, level: bool = False) -> None:
        """vlapic_set_irq(): accept an interrupt."""
        if vector < 16:
            self._error(_ESR_RECEIVE_ILLEGAL)
            return
        bit = 1 << vector
        self.tmr = self.tmr | bit if level else self.tmr & ~bit
        if not self.irr & bit:
            self.irr |= bit
            self._hvm.event_state_changed()

    def _error(self, bits: int) -> None:
        """vlapic_error(): note it, and raise LVTERR's interrupt once."""
        if self._esr_next & bits == bits:
            return
        self._esr_next |= bits
        entry = self.lvt[APIC_LVTERR]
        if not entry & _LVT_MASKED and entry & 0xFF >= 16:
            self.set_irq(entry & 0xFF)

    @property
    def ppr(self) -> int:
        """Processor priority: of the TPR and the interrupt in service, the higher class."""
        isrv = (self.isr.bit_length() - 1) & 0xF0 if self.isr else 0
        return self.tpr if self.tpr & 0xF0 >= isrv else isrv

    def has_pending_irq(self) -> int:
        """vlapic_has_pending_irq(): the highest requested vector above the processor's priority, or -1."""
        if not self.irr or not self.enabled:
            return -1
        vector = self.irr.bit_length() - 1
        return vector if vector & 0xF0 > self.ppr & 0xF0 else -1

    def ack_pending_irq(self, vector: int) -> None:
        """vlapic_ack_pending_irq(): from requested to in service."""
        bit = 1 << vector
        self.irr &= ~bit
        self.isr |= bit

    def eoi(self) -> None:
        """vlapic_EOI_set(): the highest in service is done."""
        if self.isr:
            self.isr ^= 1 << self.isr.bit_length() - 1
            self._changed()

    def set_tpr(self, value: int) -> None:
        """The task priority register, also by CR8."""
        self.tpr = value & 0xFF
        self._changed()

    def _changed(self) -> None:
        self._hvm.update_window()

    # --- addressing ----------------------------------------------------------------------------------

    def matches(self, destination: int, logical: bool, *, x2apic: bool) -> bool:
        """vlapic_match_dest() without shorthand: ``x2apic`` says whether the destination is a 32-bit one."""
        if not logical:
            return destination == (0xFFFFFFFF if x2apic else 0xFF) or destination == self.apic_id
        if self.x2apic:
            if destination == (0xFFFFFFFF if x2apic else 0xFF):
                return True
            return destination >> 16 == self.ldr >> 16 and bool(destination & self.ldr & 0xFFFF)
        own = self.ldr >> 24
        if self.dfr >> 28 == 0xF:  # flat
            return bool(own & destination & 0xFF)
        if self.dfr >> 28 == 0:  # cluster
            return bool(own >> 4 == destination >> 4 & 0xF and own & destination & 0xF)
        return False

    def ipi(self, low: int, high: int) -> None:
        """vlapic_ipi(): send what the ICR says. ``high`` is the destination, of 32 bits in x2APIC mode, else of 8."""
        x2apic = self.x2apic
        shorthand = low >> 18 & 3
        logical = bool(low & _ICR_LOGICAL)
        targets: list[Vlapic] = []
        for vcpu in self._hvm.domain.vcpus:
            other = vcpu.hvm.vlapic
            if shorthand == 1:
                wanted = other is self
            elif shorthand == 2:
                wanted = True
            elif shorthand == 3:
                wanted = other is not self
            else:
                wanted = other.hw_enabled and other.matches(high, logical, x2apic=x2apic)
            if wanted:
                targets.append(other)
        mode = low >> 8 & 7
        if mode in (DM_FIXED, DM_LOWEST):
            if low & 0xFF < 16:
                self._error(_ESR_SEND_ILLEGAL)
                return
            if mode == DM_LOWEST and len(targets) > 1:
                enabled = [t for t in targets if t.enabled] or targets
                targets = [min(enabled, key=lambda t: (t.ppr, t.vcpu_id))]
        for target in targets:
            target.accept(mode, low)
        others = [target for target in targets if target is not self]
        if others and mode in (DM_FIXED, DM_LOWEST, DM_NMI):
            hvm = self._hvm
            hvm.hypervisor.scheduler.vcpu_yield_to(hvm.vcpu, others[0]._hvm.vcpu)

    def accept(self, mode: int, low: int) -> None:
        """vlapic_accept_irq(): an IPI arrives."""
        hvm = self._hvm
        if mode in (DM_FIXED, DM_LOWEST):
            if self.enabled:
                self.set_irq(low & 0xFF, level=bool(low & _ICR_LEVEL))
        elif mode == DM_NMI:
            hvm.vcpu.nmi_pending = True
            hvm.hypervisor.scheduler.vcpu_kick(hvm.vcpu)
        elif mode == DM_INIT:
            if low & _ICR_LEVEL and not low & _ICR_ASSERT:
                return  # INIT level de-assert only synchronises arbitration ids
            self._init()
        elif mode == DM_STARTUP:
            self._startup(low & 0xFF)

    def _init(self) -> None:
        """INIT: the vCPU stops and waits for a start-up IPI. (vCPU 0 too, as hardware's; it is then lost.)"""
        hvm = self._hvm
        vcpu = hvm.vcpu
        if not vcpu.is_initialised:
            return
        hvm.hypervisor.scheduler.vcpu_down(vcpu)
        vcpu.is_initialised = False
        vcpu.nmi_pending = False
        self.reset()

    def _startup(self, vector: int) -> None:
        """SIPI: real mode at vector << 12. A vCPU that runs ignores it."""
        from pyxen.hypervisor.x86.hvm.context import startup

        hvm = self._hvm
        vcpu = hvm.vcpu
        if vcpu.is_initialised or not startup(hvm, vector):
            return
        vcpu.is_initialised = True
        hvm.hypervisor.scheduler.vcpu_up(vcpu)

    # --- registers -----------------------------------------------------------------------------------

    def read(self, reg: int) -> int:
        """A 32-bit register, by its offset (a multiple of 16)."""
        if APIC_ISR <= reg < APIC_ESR:
            value = (self.isr, self.tmr, self.irr)[reg - APIC_ISR >> 7]
            return value >> (reg & 0x70) * 2 & 0xFFFFFFFF
        if reg in self.lvt:
            return self.lvt[reg]
        if reg == APIC_ID:
            return self.apic_id if self.x2apic else self.apic_id << 24 & 0xFFFFFFFF
        if reg == APIC_TMCCT:
            return self._current_count()
        return {
            APIC_LVR: VLAPIC_VERSION, APIC_TASKPRI: self.tpr, APIC_PROCPRI: self.ppr, APIC_LDR: self.ldr,
            APIC_DFR: self.dfr, APIC_SPIV: self.spiv, APIC_ESR: self.esr, APIC_ICR: self.icr, APIC_ICR2: self.icr2,
            APIC_TMICT: self.tmict, APIC_TDCR: self.tdcr,
        }.get(reg, 0)

    def write(self, reg: int, value: int) -> None:
        """vlapic_reg_write(): store a 32-bit register; what is read-only or not there takes nothing."""
        value &= 0xFFFFFFFF
        if reg == APIC_EOI:
            self.eoi()
        elif reg == APIC_TASKPRI:
            self.set_tpr(value)
        elif reg == APIC_ICR:
            self.icr = value & ~_ICR_BUSY
            self.ipi(self.icr, self.icr2 if self.x2apic else self.icr2 >> 24)
        elif reg == APIC_ICR2:
            self.icr2 = value if self.x2apic else value & 0xFF000000
        elif reg == APIC_LDR:
            self.ldr = value & 0xFF000000
        elif reg == APIC_DFR:
            self.dfr = value | 0x0FFFFFFF
        elif reg == APIC_SPIV:
            was, self.spiv = self.enabled, value & _SPIV_VALID
            if self.enabled and not was:
                self._hvm.apic_enabled()
            if not value & _SPIV_ENABLE:
                for lvt in self.lvt:
                    self.lvt[lvt] |= _LVT_MASKED
            self._changed()
        elif reg == APIC_ESR:
            self.esr, self._esr_next = self._esr_next, 0
        elif reg == APIC_LVTT:
            self._write_lvtt(value)
        elif reg in self.lvt:
            masked = 0 if self.enabled else _LVT_MASKED
            self.lvt[reg] = value & _LVT_VALID[reg] | masked
        elif reg == APIC_TMICT:
            if self._timer_mode != _TSC_DEADLINE:
                self.tmict = value
                self._start_timer()
        elif reg == APIC_TDCR:
            left = self._current_count()
            self.tdcr = value & 0xB
            if left and self._timer_mode != _TSC_DEADLINE:  # the rest goes on at the new rate
                self._arm(left)

    def _write_lvtt(self, value: int) -> None:
        masked = 0 if self.enabled else _LVT_MASKED
        old = self._timer_mode
        self.lvt[APIC_LVTT] = value & _LVT_VALID[APIC_LVTT] | masked
        if (old ^ self._timer_mode) & _TSC_DEADLINE:  # hardware disarms when the kind of timer changes
            self.timer.stop()
            self.tmict = self.tsc_deadline = 0

    # --- the timer -------------------------------------------------------------------------------------

    @property
    def _timer_mode(self) -> int:
        return self.lvt[APIC_LVTT] & _TIMER_MODE

    @property
    def _cycle_ns(self) -> int:
        divide = (self.tdcr & 3 | self.tdcr >> 1 & 4) + 1 & 7
        return BUS_CYCLE_NS << divide

    def _current_count(self) -> int:
        """TMCCT."""
        if not self.tmict or self._timer_mode == _TSC_DEADLINE:
            return 0
        passed = (self._hvm.hypervisor.scheduler.now_ns() - self._started_ns) // self._cycle_ns
        if self._timer_mode == _PERIODIC:
            return self.tmict - passed % self.tmict
        return max(self.tmict - passed, 0)

    def _start_timer(self) -> None:
        self.timer.stop()
        if self.tmict:
            self._arm(self.tmict)

    def _arm(self, count: int) -> None:
        now = self._hvm.hypervisor.scheduler.now_ns()
        self._started_ns = now - (self.tmict - count) * self._cycle_ns
        self._set_timer(now + count * self._cycle_ns)

    def _set_timer(self, deadline_ns: int) -> None:
        self._hvm.hypervisor.scheduler.timers(self._hvm.vcpu.processor).set(self.timer, deadline_ns)

    def set_tsc_deadline(self, value: int) -> None:
        """MSR 0x6e0: absolute TSC; 0 disarms. Ignored in the other modes."""
        if self._timer_mode != _TSC_DEADLINE:
            return
        self.tsc_deadline = value
        self.timer.stop()
        if value:
            self._set_timer(max(self._hvm.hypervisor.tsc.to_ns(value), 0))

    def _timer_expired(self) -> None:
        if self._hvm.domain.evtchn.home_thread == _ident():
            self._tick()
        else:
            self._expired = True
            self._hvm.event_state_changed()

    def run_posted(self) -> None:
        """Do what a timer on another thread could not."""
        if self._expired:
            self._expired = False
            self._tick()

    def _tick(self) -> None:
        mode = self._timer_mode
        if mode == _TSC_DEADLINE:
            self.tsc_deadline = 0
        elif mode == _PERIODIC and self.tmict:
            period = self.tmict * self._cycle_ns
            now = self._hvm.hypervisor.scheduler.now_ns()
            due = (now - self._started_ns) // period + 1
            self._set_timer(self._started_ns + due * period)
        entry = self.lvt[APIC_LVTT]
        if not entry & _LVT_MASKED and self.enabled:
            self.set_irq(entry & 0xFF)

    # --- the page at 0xfee00000 --------------------------------------------------------------------------

    def mmio_read(self, offset: int, size: int) -> int:
        """A load: 32-bit registers at multiples of 16; parts of them can be read, what lies between reads as zero."""
        if not self.hw_enabled or self.x2apic:
            return (1 << 8 * size) - 1
        value = 0
        for i in range(size):
            at = offset + i & 0xFFF
            byte = self.read(at & ~0xF) >> (at & 3) * 8 & 0xFF if at & 0xF < 4 else 0
            value |= byte << 8 * i
        return value

    def mmio_write(self, offset: int, size: int, value: int) -> None:
        """A store: whole registers only; a narrower one is merged, one that is not aligned is ignored, as Xen does."""
        if not self.hw_enabled or self.x2apic or offset & 0xF:
            return
        reg = offset & 0xFF0
        if size >= 4:
            self.write(reg, value)
        else:
            mask = (1 << 8 * size) - 1
            self.write(reg, self.read(reg) & ~mask | value & mask)

    # --- x2APIC MSRs, IA32_APIC_BASE -----------------------------------------------------------------------

    def read_msr(self, number: int) -> int | None:
        """MSR 0x800..0x8ff; None is #GP."""
        if not self.x2apic or not self.hw_enabled:
            return None
        reg = number - 0x800 << 4
        if reg == APIC_ICR:
            return self.icr2 << 32 | self.icr
        if reg not in _X2APIC_READABLE:
            return None
        return self.read(reg)

    def write_msr(self, number: int, value: int) -> bool:
        """guest_wrmsr_x2apic(); False is #GP: reserved bits, or not writable."""
        if not self.x2apic or not self.hw_enabled:
            return False
        reg = number - 0x800 << 4
        if reg == APIC_ICR:
            if value & 0xFFF33000 & ~_ICR_BUSY:
                return False
            self.icr2 = value >> 32
            self.write(APIC_ICR, value & 0xFFFFFFFF)
            return True
        if reg not in _X2APIC_WRITABLE or value & ~_X2APIC_WRITABLE[reg]:
            return False
        if reg == APIC_SELF_IPI:
            self.icr = value & 0xFF | 1 << 18
            self.ipi(self.icr, 0)
        else:
            self.write(reg, value)
        return True

    def set_apic_base(self, value: int) -> bool:
        """vlapic_msr_set(): False is #GP. The page cannot be moved (Xen crashes the domain that tries: its p2m page
        stays), and from x2APIC mode the way is through "disabled" only."""
        if value & ~(APIC_BASE_MASK | MSR_APIC_BASE_BSP | MSR_APIC_BASE_EXTD | MSR_APIC_BASE_ENABLE):
            return False
        if value & APIC_BASE_MASK != APIC_BASE:
            return False
        old, changed = self.apic_base, self.apic_base ^ value
        enable, extd = value & MSR_APIC_BASE_ENABLE, value & MSR_APIC_BASE_EXTD
        if extd and not enable:
            return False
        if changed & MSR_APIC_BASE_EXTD and not (extd and old & MSR_APIC_BASE_ENABLE) and enable:
            return False  # x2APIC to xAPIC, or disabled to x2APIC, in one step
        self.apic_base = value & ~MSR_APIC_BASE_BSP | old & MSR_APIC_BASE_BSP
        if changed & MSR_APIC_BASE_ENABLE:
            base = self.apic_base
            self.reset()
            self.apic_base = base
        if extd and changed & MSR_APIC_BASE_EXTD:
            self._set_x2apic_id()
        self._changed()
        return True

    def destroy(self) -> None:
        """The vCPU ends."""
        self.timer.kill()


_X2APIC_READABLE: Final = frozenset((
    APIC_ID, APIC_LVR, APIC_TASKPRI, APIC_PROCPRI, APIC_LDR, APIC_SPIV, APIC_ESR, APIC_ICR, APIC_LVTT, APIC_LVTTHMR,
    APIC_LVTPC, APIC_LVT0, APIC_LVT1, APIC_LVTERR, APIC_TMICT, APIC_TMCCT, APIC_TDCR, *range(APIC_ISR, APIC_ESR, 16),
))
_X2APIC_WRITABLE: Final = {
    APIC_TASKPRI: 0xFF, APIC_EOI: 0, APIC_SPIV: _SPIV_VALID, APIC_ESR: 0, APIC_TMICT: 0xFFFFFFFF, APIC_TDCR: 0xB,
    APIC_SELF_IPI: 0xFF, **_LVT_VALID,
}
