# SPDX-License-Identifier: GPL-2.0-only
"""The local APIC, through its registers and what comes of them."""

from __future__ import annotations

import pytest

from pyxen.abi.hvm.params import HvmParam
from pyxen.hypervisor.vcpu import PauseFlag
from pyxen.hypervisor.x86.hvm.vlapic import Vlapic
from tests.hvm.rig import Guest, Machine

ID, VERSION, TPR, PPR, EOI, LDR, DFR, SPIV, ESR, ICR, ICR2 = (
    0x20, 0x30, 0x80, 0xA0, 0xB0, 0xD0, 0xE0, 0xF0, 0x280, 0x300, 0x310)
LVTT, LVTERR, TMICT, TMCCT, TDCR = 0x320, 0x370, 0x380, 0x390, 0x3E0
X2 = 0x800


@pytest.fixture
def four(host: Machine) -> Guest:
    guest = host.guest(vcpus=4)
    for number in range(4):
        apic = lapic(guest, number)
        apic.write(SPIV, 0x1FF)
        apic.write(LDR, 1 << 24 + number)
        guest.vcpu(number).is_initialised = True
    return guest


def lapic(guest: Guest, number: int = 0) -> Vlapic:
    return guest.vcpu(number).hvm.vlapic


def mmio(guest: Guest, reg: int, value: int | None = None) -> int:
    if value is None:
        return guest.traps.mmio_read(reg, 4)
    guest.traps.mmio_write(reg, 4, value)
    return 0


def test_reset_state(guest: Guest) -> None:
    assert mmio(guest, ID) == 0
    assert mmio(guest, VERSION) == 0x50014
    assert mmio(guest, SPIV) == 0xFF
    assert mmio(guest, DFR) == 0xFFFFFFFF
    assert mmio(guest, LVTT) == 0x10000
    assert lapic(guest, 1).read(ID) == 2 << 24
    assert guest.traps.read_msr(0x1B) == 0xFEE00900
    assert lapic(guest, 1).apic_base == 0xFEE00800


def test_priorities(guest: Guest) -> None:
    apic = lapic(guest)
    apic.write(SPIV, 0x1FF)
    apic.set_irq(0x31)
    apic.set_irq(0x45)
    assert apic.has_pending_irq() == 0x45
    apic.ack_pending_irq(0x45)
    assert apic.read(0x100 + 0x20) == 1 << 5  # ISR of 0x40..0x5f
    assert apic.read(PPR) == 0x40
    assert apic.has_pending_irq() == -1  # 0x31 is of a lower class than what is in service
    apic.set_irq(0x46)
    assert apic.has_pending_irq() == -1  # the same class
    apic.set_irq(0x50)
    assert apic.has_pending_irq() == 0x50
    apic.ack_pending_irq(0x50)
    apic.eoi()
    assert apic.read(PPR) == 0x40
    apic.eoi()
    assert apic.has_pending_irq() == 0x46
    apic.set_tpr(0x50)
    assert apic.has_pending_irq() == -1


def test_a_disabled_one_delivers_nothing(guest: Guest) -> None:
    apic = lapic(guest)
    apic.set_irq(0x40)
    assert apic.has_pending_irq() == -1
    apic.write(SPIV, 0x1FF)
    assert apic.has_pending_irq() == 0x40


def test_vectors_below_16_are_errors(guest: Guest) -> None:
    apic = lapic(guest)
    apic.write(SPIV, 0x1FF)
    apic.write(LVTERR, 0x33)
    apic.write(ICR, 1 << 18 | 5)
    assert apic.has_pending_irq() == 0x33
    assert apic.read(ESR) == 0
    apic.write(ESR, 0)
    assert apic.read(ESR) == 1 << 5
    apic.write(ESR, 0)
    assert apic.read(ESR) == 0


@pytest.mark.parametrize(("icr", "icr2", "expected"), [
    (1 << 18, 0, {0}), (2 << 18, 0, {0, 1, 2, 3}), (3 << 18, 0, {1, 2, 3}),
    (0, 2 << 24, {1}), (0, 6 << 24, {3}), (0, 1 << 24, set()), (0, 0xFF << 24, {0, 1, 2, 3}),
    (1 << 11, 0b1010 << 24, {1, 3}), (1 << 11, 0xFF << 24, {0, 1, 2, 3}), (1 << 11, 0x10 << 24, set()),
])
def test_destinations(four: Guest, icr: int, icr2: int, expected: set[int]) -> None:
    mmio(four, ICR2, icr2)
    mmio(four, ICR, icr | 0x40)
    assert {n for n in range(4) if lapic(four, n).irr >> 0x40 & 1} == expected
    assert not mmio(four, ICR) & 1 << 12


def test_clusters(four: Guest) -> None:
    for n in range(4):
        lapic(four, n).write(DFR, 0x0FFFFFFF)
        lapic(four, n).write(LDR, (n // 2) << 28 | 1 << 24 + n % 2)
    mmio(four, ICR2, 0x12 << 24)
    mmio(four, ICR, 1 << 11 | 0x40)
    assert [n for n in range(4) if lapic(four, n).irr] == [3]


def test_lowest_priority_goes_to_one(four: Guest) -> None:
    lapic(four, 0).set_tpr(0x30)
    lapic(four, 1).set_tpr(0x20)
    lapic(four, 2).set_tpr(0x10)
    lapic(four, 3).set_tpr(0x20)
    mmio(four, ICR, 2 << 18 | 1 << 8 | 0x60)
    assert [n for n in range(4) if lapic(four, n).irr] == [2]


def test_nmi(four: Guest) -> None:
    mmio(four, ICR, 3 << 18 | 4 << 8)
    assert [v.nmi_pending for v in four.domain.vcpus] == [False, True, True, True]


def test_init_and_startup(host: Machine) -> None:
    """INIT-SIPI-SIPI brings a vCPU up in real mode; a second SIPI, and one for a vCPU that runs, do nothing."""
    guest = host.guest(vcpus=2)
    ap = guest.vcpu(1)
    assert ap.pause_flags & PauseFlag.DOWN
    mmio(guest, ICR2, 2 << 24)
    mmio(guest, ICR, 0xC500)
    assert ap.pause_flags & PauseFlag.DOWN
    mmio(guest, ICR, 0x8500)  # INIT level de-assert
    mmio(guest, ICR, 0x4600 | 0x9A)
    assert not ap.pause_flags & PauseFlag.DOWN
    registers = host.privcmd.vcpu_hvm_context(guest.domid, 1)
    assert (registers.cr0, registers.flags, registers.gpr[16]) == (0x10, 2, 0)
    assert (registers.segments[1].selector, registers.segments[1].base, registers.segments[1].limit) == (
        0x9A00, 0x9A000, 0xFFFF)
    context = ap.context
    mmio(guest, ICR, 0x4600 | 0x9B)
    assert ap.context is context
    lapic(guest, 1).set_tpr(0x20)
    mmio(guest, ICR, 0xC500)
    assert ap.pause_flags & PauseFlag.DOWN
    assert lapic(guest, 1).tpr == 0
    mmio(guest, ICR, 0x4600 | 0x10)
    assert not ap.pause_flags & PauseFlag.DOWN
    assert host.privcmd.vcpu_hvm_context(guest.domid, 1).segments[1].base == 0x10000


def test_one_shot_and_periodic_timer(guest: Guest, host: Machine) -> None:
    apic, timers = lapic(guest), host.hv.pcpus[0].timers
    apic.write(SPIV, 0x1FF)
    apic.write(TDCR, 0xB)  # divide by 1: 10 ns
    apic.write(LVTT, 0x70)
    apic.write(TMICT, 1000)
    host.clock.advance(4000)
    assert apic.read(TMCCT) == 600
    timers.run_expired(host.clock.now_ns())
    assert not apic.irr
    host.clock.advance(6000)
    timers.run_expired(host.clock.now_ns())
    assert apic.irr == 1 << 0x70
    assert apic.read(TMCCT) == 0
    apic.irr = 0
    apic.write(TDCR, 0)  # by 2
    apic.write(LVTT, 0x20070)
    apic.write(TMICT, 1000)
    for _ in range(3):
        host.clock.advance(20_000)
        timers.run_expired(host.clock.now_ns())
        assert apic.irr == 1 << 0x70
        apic.irr = 0
    host.clock.advance(50_000)  # late: one tick for what was missed, and the next one in time
    timers.run_expired(host.clock.now_ns())
    assert apic.irr == 1 << 0x70
    assert apic.timer.deadline_ns == host.clock.now_ns() + 10_000
    apic.write(TMICT, 0)
    assert not apic.timer.active


def test_tsc_deadline(guest: Guest, host: Machine) -> None:
    apic = lapic(guest)
    apic.write(SPIV, 0x1FF)
    assert guest.traps.write_msr(0x6E0, 1000)
    assert not apic.timer.active  # not in that mode
    apic.write(LVTT, 0x40070)
    assert guest.traps.write_msr(0x6E0, 5000)
    assert guest.traps.read_msr(0x6E0) == 5000
    host.clock.advance(5000)
    host.hv.pcpus[0].timers.run_expired(host.clock.now_ns())
    assert apic.irr == 1 << 0x70
    assert guest.traps.read_msr(0x6E0) == 0
    apic.write(LVTT, 0x70)
    assert guest.traps.write_msr(0x6E0, 99999)
    assert guest.traps.read_msr(0x6E0) == 0


def test_x2apic(four: Guest) -> None:
    traps = four.traps
    assert traps.read_msr(X2 + 2) is None  # not enabled
    assert not traps.write_msr(0x1B, 0xFEE00400)  # x2APIC without being enabled
    assert traps.write_msr(0x1B, 0xFEE00D00)
    assert mmio(four, VERSION) == 0xFFFFFFFF  # the page is gone
    assert traps.read_msr(X2 + 2) == 0
    assert traps.read_msr(X2 + 0xD) == 1
    assert not traps.write_msr(0x1B, 0xFEE00900)  # there is no way back but through "disabled"
    assert not traps.write_msr(X2 + 2, 5)
    assert not traps.write_msr(X2 + 0xD, 5)
    assert traps.read_msr(X2 + 0xE) is None  # no DFR
    assert traps.read_msr(X2 + 0xB) is None
    assert not traps.write_msr(X2 + 0xB, 1)
    assert traps.write_msr(X2 + 0xB, 0)
    assert traps.write_msr(X2 + 0x3F, 0x51)
    assert lapic(four).irr == 1 << 0x51
    assert traps.write_msr(X2 + 0x30, 4 << 32 | 0x52)
    assert lapic(four, 2).irr == 1 << 0x52
    assert traps.read_msr(X2 + 0x30) == 4 << 32 | 0x52
    assert traps.write_msr(X2 + 8, 0x70)
    assert not traps.write_msr(X2 + 8, 0x170)
    assert traps.write_msr(0x1B, 0xFEE00100)
    assert traps.write_msr(0x1B, 0xFEE00900)


def test_the_base_cannot_move(guest: Guest) -> None:
    assert not guest.traps.write_msr(0x1B, 0xFEC00900)
    assert not guest.traps.write_msr(0x1B, 0xFEE00900 | 1 << 50)
    assert guest.traps.write_msr(0x1B, 0xFEE00800)
    assert guest.traps.read_msr(0x1B) == 0xFEE00900  # who is the boot processor is not the guest's to say


def test_partial_and_misaligned_accesses(guest: Guest) -> None:
    assert guest.traps.mmio_read(VERSION + 2, 1) == 5
    assert guest.traps.mmio_read(VERSION + 4, 4) == 0
    guest.traps.mmio_write(TPR + 1, 1, 0x20)
    assert mmio(guest, TPR) == 0
    guest.traps.mmio_write(TPR, 1, 0x20)
    assert mmio(guest, TPR) == 0x20
    mmio(guest, VERSION, 7)
    assert mmio(guest, VERSION) == 0x50014


def test_interrupts_come_by_windows(guest: Guest) -> None:
    """Asked for while something is deliverable, in order of priority; the domain's callback first, without IRR."""
    apic = lapic(guest)
    apic.write(SPIV, 0x1FF)
    assert not guest.journal("window")
    apic.set_irq(0x40)
    apic.set_irq(0x60)
    assert guest.journal("window") == [("window", True)]
    guest.traps.interrupt_window(0x1000)
    guest.traps.interrupt_window(0x1000)
    assert guest.journal("interrupt") == [("interrupt", 0x60)]
    assert guest.journal("window")[-1] == ("window", False)
    apic.eoi()
    assert guest.journal("window")[-1] == ("window", True)
    guest.machine.privcmd.hvm_param_set(guest.domid, HvmParam.CALLBACK_IRQ, 2 << 56 | 0xF3)
    guest.hv.memory.b[guest.vcpu().info_maddr] = 1
    guest.traps.interrupt_window(0x1000)
    assert guest.journal("interrupt")[-1] == ("interrupt", 0xF3)
    assert not apic.irr >> 0xF3
    guest.hv.memory.b[guest.vcpu().info_maddr] = 0  # the guest's handler
    guest.traps.interrupt_window(0x1000)
    assert guest.journal("interrupt")[-1] == ("interrupt", 0x40)


def test_halting(guest: Guest) -> None:
    guest.flags = 0x202
    guest.traps.halt(0x1000)
    assert guest.vcpu().pause_flags & PauseFlag.BLOCKED
    lapic(guest).write(SPIV, 0x1FF)
    lapic(guest).set_irq(0x40)
    assert not guest.vcpu().pause_flags & PauseFlag.BLOCKED
    guest.traps.halt(0x1000)
    assert not guest.vcpu().pause_flags & PauseFlag.BLOCKED  # something waits


def test_halting_with_interrupts_off_ends_the_last_vcpu(guest: Guest) -> None:
    guest.flags = 2
    guest.traps.halt(0x1000)
    assert guest.domain.is_shut_down
    assert guest.domain.shutdown_code == 0


def test_an_interrupt_is_given_at_entry_to_a_guest_that_can_take_one(guest: Guest) -> None:
    apic = lapic(guest)
    apic.write(SPIV, 0x1FF)
    apic.set_irq(0x41)
    guest.flags = 2
    guest.hvm.before_entry(guest.machine.cpu)
    assert not guest.journal("interrupt")
    assert guest.journal("window")[-1] == ("window", True)  # RFLAGS.IF is clear: it will say when
    guest.flags = 0x202
    guest.hvm.before_entry(guest.machine.cpu)
    assert guest.journal("interrupt") == [("interrupt", 0x41)]
    assert guest.journal("window")[-1] == ("window", False)
    guest.hvm.before_entry(guest.machine.cpu)
    assert guest.journal("interrupt") == [("interrupt", 0x41)]  # once
