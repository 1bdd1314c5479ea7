# SPDX-License-Identifier: GPL-2.0-only
"""How control enters a PV kernel and leaves it: bounce frames, iret, events, NMIs (Xen: x86_64/entry.S)."""

from __future__ import annotations

import pytest

from pyxen.abi.arch_x86 import CALLBACKOP_REGISTER, CALLBACKTYPE_SYSCALL32, CALLBACKTYPE_SYSENTER
from pyxen.abi.xen import Hypercall
from pyxen.hypervisor.x86.pv.descriptors import FLAT_RING3_CS32, FLAT_RING3_CS64, FLAT_RING3_SS32
from pyxen.machine.cpu.base import R11, RAX, RCX, RSP, Seg
from tests.hypervisor.rig import (
    CODE32_SEL,
    CODE64_SEL,
    DATA_PFN,
    DATA_SEL,
    EVENT,
    FAILSAFE,
    LDT_PFN,
    STACK_PFN,
    SYSCALL,
    USER_PFN,
    Guest,
    va,
)

FLAGS = 0x202 | 0x8D5 | 0x400
KERNEL_TOP = va(STACK_PFN + 1)


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("masked", [0, 1])
@pytest.mark.parametrize("error", [None, 0x18])
@pytest.mark.parametrize("user", [False, True])
def test_bounce_frame(guest: Guest, user: bool, error: int | None, masked: int, masks: bool) -> None:
    """rcx, r11, [error], rip, cs | saved mask << 32, rflags, rsp, ss; the kernel's CS has RPL 0 in it."""
    cpu, vector = guest.machine.cpu, 13 if error is not None else 6
    guest.trap_table(**{f"v{vector}": 4 if masks else 0})
    if user:
        guest.user()
    else:
        guest.regs(rsp=va(STACK_PFN) + 0x808)
    guest.mask = masked
    cpu.flags = FLAGS | 0x100 | 0x10000
    guest.regs(rcx=0x1111, r11=0x2222)
    to = guest.fault(vector, error, 0x400777)
    frame = guest.frame(7 if error is None else 8)
    cs, ss = (CODE64_SEL, DATA_SEL) if user else (0xE030, 0xE02B)
    want = [0x1111, 0x2222, 0x400777, cs | masked << 32, (FLAGS | 0x10100) & ~0x200 | (0 if masked else 0x200),
            va(USER_PFN + 1) if user else va(STACK_PFN) + 0x808, ss]
    if error is not None:
        want.insert(2, error)
    assert frame == tuple(want)
    assert to == guest.handlers[vector]
    assert cpu.gpr[RSP] == (KERNEL_TOP if user else va(STACK_PFN) + 0x800) - 8 * len(want)
    assert guest.mask == (1 if masks or masked else 0)
    assert not cpu.flags & 0x10100  # TF and RF are clear in the kernel
    assert guest.pv.kernel_mode
    assert guest.cs_ss() == (guest.pv.kernel_cs, guest.pv.kernel_ss_now)


@pytest.mark.parametrize("stack", [0x1000, 0xFFFF800000001000, 0xFFFF880000000010, 0x8000_0000_0000_0000, 16])
def test_a_kernel_stack_that_cannot_take_the_frame_crashes_the_domain(exact: Guest, stack: int) -> None:
    exact.regs(rsp=stack)
    exact.fault(6)
    assert exact.domain.is_shut_down
    assert "guest kernel stack" in exact.domain.crash_reason
    assert exact.machine.log().count("domain_crash called") == 1
    assert "Traceback" not in exact.machine.log()


def test_a_trap_without_a_handler_crashes_the_domain_with_one_line_and_registers(exact: Guest) -> None:
    exact.regs(rbx=0xABCDEF)
    exact.fault(0, None, 0x400ABC)
    log = exact.machine.log().splitlines()
    at = next(i for i, line in enumerate(log) if "domain_crash called" in line)
    assert log[at].endswith("unhandled trap 0 error 0x0 at rip 0x400abc")
    assert "rip: 0000000000400abc" in "".join(log[at + 1 :])
    assert "rbx: 0000000000abcdef" in "".join(log[at + 1 :])


def test_an_event_for_a_kernel_without_callback_crashes_it(host: object, exact: Guest) -> None:
    exact.pv.event_callback = 0
    exact.mask, exact.pending = 0, 1
    assert exact.call(Hypercall.XEN_VERSION, 0) == 4 << 16 | 6
    assert "nothing registered to enter its kernel at" in exact.domain.crash_reason


def test_page_fault_tells_the_address_and_whose_access_it_was(guest: Guest) -> None:
    cpu = guest.machine.cpu
    for user in (False, True):
        if user:
            guest.user()
        cpu.cr2 = 0xFFFFFFFFFFFFF000
        assert guest.fault(14, 2 | 4 if user or guest.pv.exact else 2) == guest.handlers[14]
        assert guest.frame(3)[2] == (6 if user else 2)
        assert guest.hv.memory.q[(guest.vcpu.info_maddr + 16) >> 3] == 0xFFFFFFFFFFFFF000


# --- system calls --------------------------------------------------------------------------------------


def test_system_call(guest: Guest) -> None:
    """RCX and R11 as SYSCALL leaves them, and DF clear in the kernel."""
    cpu = guest.machine.cpu
    guest.user()
    cpu.flags = 0x202 | 0x400
    assert guest.pv.traps.syscall(0x428002) == SYSCALL
    rcx, r11, rip, cs, flags, rsp, ss = guest.frame(7)
    assert (rcx, r11, rip, flags, rsp) == (0x428002, 0x602, 0x428002, 0x602, va(USER_PFN + 1))
    assert (cs & 0xFFFF, ss) == (FLAT_RING3_CS64, FLAT_RING3_SS32)  # lstar_enter pushes these, whatever was loaded
    assert not cpu.flags & 0x400
    assert guest.pv.traps.system_calls == 1


def test_system_calls_nobody_takes_are_undefined_instructions(guest: Guest) -> None:
    guest.user()
    guest.pv.syscall_callback = 0
    assert guest.pv.traps.syscall(0x428002) == guest.handlers[6]
    assert guest.frame(7)[2] == 0x428000


def test_compatibility_mode_has_system_calls_of_its_own(guest: Guest) -> None:
    guest.user(cs=CODE32_SEL)
    assert guest.pv.traps.syscall(0x428002) == guest.handlers[6]
    guest.put(va(DATA_PFN), (CALLBACKTYPE_SYSCALL32 | 0x404000 << 64).to_bytes(16, "little"))
    assert guest.call(Hypercall.CALLBACK_OP, CALLBACKOP_REGISTER, va(DATA_PFN)) == 0
    guest.user(cs=CODE32_SEL)
    assert guest.pv.traps.syscall(0x428002) == 0x404000
    assert guest.frame(7)[3] & 0xFFFF == FLAT_RING3_CS32  # cstar_enter
    assert guest.machine.cpu.selector(Seg.CS) == guest.pv.kernel_cs


def test_sysenter_enters_its_callback_with_what_the_instruction_keeps(guest: Guest) -> None:
    guest.user()
    assert guest.execute(b"\x0f\x34") == -1  # not registered: #GP
    guest.put(va(DATA_PFN), (CALLBACKTYPE_SYSENTER | 1 << 16 | 0x405000 << 64).to_bytes(16, "little"))
    assert guest.call(Hypercall.CALLBACK_OP, CALLBACKOP_REGISTER, va(DATA_PFN)) == 0
    guest.user()
    assert guest.execute(b"\x0f\x34") + va(USER_PFN) == 0x405000
    _rcx, _r11, rip, cs, _flags, rsp, ss = guest.frame(7)
    assert (rip, cs & 0xFFFF, rsp, ss) == (0, 3, 0, 0xE02B)
    assert guest.mask == 1


# --- software interrupts -------------------------------------------------------------------------------


@pytest.mark.parametrize(("dpl", "user", "allowed"), [(0, False, False), (1, False, True), (1, True, False),
                                                      (3, True, True)])
def test_int_n_obeys_the_dpl_of_the_trap_table(guest: Guest, dpl: int, user: bool, allowed: bool) -> None:
    guest.pv.trap_table[0x40] = (dpl, 0xE033, 0x540000)
    if user:
        guest.user()
    to = guest.fault(13, 0x40 << 3 | 2, 0x400100)
    if allowed:
        assert to == 0x540000
        assert guest.frame(3)[2] == 0x400102
    else:
        assert to == guest.handlers[13]
        assert guest.frame(4)[2:4] == (0x40 << 3 | 2, 0x400100)


def test_int_80_needs_no_dpl_and_faults_like_any_gate_when_there_is_no_handler(guest: Guest) -> None:
    guest.user()
    assert guest.fault(0x80, None, 0x400102, soft=True) == guest.handlers[0x80]
    guest.user()
    guest.pv.trap_table[0x80] = None
    assert guest.fault(0x80, None, 0x400102, soft=True) == guest.handlers[13]
    assert guest.frame(4)[2:4] == (0x402, 0x400100)


def test_breakpoint_returns_behind_it(guest: Guest) -> None:
    assert guest.fault(3, None, 0x400101, soft=True) == guest.handlers[3]
    assert guest.frame(3)[2] == 0x400101


def test_debug_exception_shows_dr6(exact: Guest) -> None:
    exact.machine.cpu.set_debug_register(6, 0xFFFF4FF0)
    assert exact.fault(1) == exact.handlers[1]
    assert exact.call(Hypercall.GET_DEBUGREG, 6) == 0xFFFF4FF0


def test_device_not_available_clears_ts(guest: Guest) -> None:
    assert guest.call(Hypercall.FPU_TASKSWITCH, 1) == 0
    assert guest.machine.cpu.journal[-1] == ("ts", True)
    assert guest.fault(7) == guest.handlers[7]
    assert guest.machine.cpu.journal[-1] == ("ts", False)
    assert not guest.pv.cr0_ts


# --- iret ----------------------------------------------------------------------------------------------


def test_iret_to_user_restores_registers_and_mask(guest: Guest) -> None:
    cpu = guest.machine.cpu
    guest.mask = 1
    to = guest.user(rax=0xA, rcx=0xC, r11=0xB, rflags=0x3246)
    assert to == va(USER_PFN)
    assert (cpu.gpr[RAX], cpu.gpr[RCX], cpu.gpr[R11], cpu.gpr[RSP]) == (0xA, 0xC, 0xB, va(USER_PFN + 1))
    assert cpu.flags == 0x246  # IOPL is not the guest's
    assert guest.mask == 0
    assert not guest.pv.kernel_mode
    assert guest.cs_ss() == (CODE64_SEL, DATA_SEL)
    assert cpu.cpl() == 3
    assert cpu.cr3 == guest.mfns[4] << 12
    guest.fault(6)
    guest.user(rflags=0x46)
    assert guest.mask == 1


def test_iret_in_syscall_returns_as_sysret_does(guest: Guest) -> None:
    cpu = guest.machine.cpu
    assert guest.user(cs=CODE64_SEL, flags=0x100, rcx=1, r11=2, rflags=0x246) == va(USER_PFN)
    assert (cpu.gpr[RCX], cpu.gpr[R11]) == (va(USER_PFN), 0x246)
    assert guest.cs_ss() == (0xE033, 0xE02B)


def test_iret_within_the_kernel(guest: Guest) -> None:
    assert guest.iret(rip=0x400200, cs=0xE030) == 0x400200
    assert guest.pv.kernel_mode
    assert guest.cs_ss() == (guest.pv.kernel_cs, guest.pv.kernel_ss_now)
    assert guest.machine.cpu.cpl() == (3 if guest.pv.exact else 1)


@pytest.mark.parametrize(
    ("cs", "ss", "rip"),
    [
        (0x3B, DATA_SEL, 0x428000),  # not there
        (3, DATA_SEL, 0x428000),  # null CS
        (DATA_SEL, DATA_SEL, 0x428000),  # not code
        (CODE64_SEL, 3, 0x428000),  # null SS
        (CODE64_SEL, CODE64_SEL, 0x428000),  # not writable
        (0x37, DATA_SEL, 0x428000),  # in an LDT there is none of
        (0xF033, DATA_SEL, 0x428000),  # beyond Xen's page of the GDT
        (CODE64_SEL, DATA_SEL, 1 << 47),  # not canonical
    ],
)
def test_an_iret_that_faults_enters_the_failsafe_callback(guest: Guest, cs: int, ss: int, rip: int) -> None:
    """The frame: rcx, r11, ds, es, fs, gs, rip, cs, rflags, rsp, ss, with what could not be returned to."""
    guest.pv.failsafe_masks_events = True
    for number, seg in enumerate((Seg.DS, Seg.ES, Seg.FS, Seg.GS)):
        guest.machine.cpu.set_selector(seg, 0x100 + number)
    assert guest.iret(cs=cs, ss=ss, rip=rip, rsp=va(USER_PFN + 1), rcx=1, r11=2) == FAILSAFE
    assert guest.frame(11) == (
        1, 2, 0x100, 0x101, 0x102, 0x103, rip, cs, 0x202, va(USER_PFN + 1), ss)
    assert guest.cs_ss() == (guest.pv.kernel_cs, guest.pv.kernel_ss_now)
    assert guest.mask == 1
    guest.pv.failsafe_callback = 0
    guest.iret(cs=cs, ss=ss, rip=rip)
    assert "no failsafe callback" in guest.domain.crash_reason


def test_iret_with_an_ldt_selector_loads_a_checked_descriptor(guest: Guest) -> None:
    guest.pv.ldt_base, guest.pv.ldt_ents = va(LDT_PFN), 512
    assert guest.user(cs=CODE32_SEL | 4) == va(USER_PFN)
    assert guest.pv.ldt_frames == {0: guest.mfns[LDT_PFN]}
    # A page that cannot be a descriptor page (it is mapped writable) does not do.
    guest.fault(6)
    guest.pv.ldt_base = va(DATA_PFN)
    guest.pv.ldt_frames.clear()
    guest.put(va(DATA_PFN) + (CODE32_SEL & ~7), (0x00CFFB000000FFFF).to_bytes(8, "little"))
    assert guest.user(cs=CODE32_SEL | 4) == FAILSAFE


@pytest.mark.parametrize("sp", [8, 0xFFFF800000000000, va(64) - 8])
def test_an_iret_frame_that_cannot_be_read_crashes_the_domain(exact: Guest, sp: int) -> None:
    exact.regs(rsp=sp, rax=Hypercall.IRET)
    exact.pv.traps.syscall(0x400102)
    assert "fault while reading IRET context" in exact.domain.crash_reason


def test_iret_without_user_tables(exact: Guest) -> None:
    exact.pv.guest_table_user, table = 0, exact.pv.guest_table_user
    exact.user()
    assert "no user page tables" in exact.domain.crash_reason
    exact.pv.guest_table_user = table


# --- LDT window ------------------------------------------------------------------------------------------


def test_a_fault_in_the_ldt_window_maps_the_page_or_names_the_guests_own_address(guest: Guest) -> None:
    from pyxen.hypervisor.x86.pv.slots import ldt_va

    cpu = guest.machine.cpu
    guest.pv.ldt_base, guest.pv.ldt_ents = va(LDT_PFN), 1024
    guest.user()
    cpu.cr2 = ldt_va(0) + 0x20
    assert guest.fault(14, 0, 0x428000) == 0x428000
    cpu.cr2 = ldt_va(0) + 0x1020  # the second page is data, mapped writable
    assert guest.fault(14, 0, 0x428000) == guest.handlers[14]
    assert guest.hv.memory.q[(guest.vcpu.info_maddr + 16) >> 3] == va(LDT_PFN) + 0x1020


# --- events and NMIs -----------------------------------------------------------------------------------------


def test_an_event_interrupts_user_mode_on_the_kernels_stack_with_events_masked(guest: Guest) -> None:
    guest.user()
    guest.pending = 1
    guest.machine.cpu.gpr[16] = 0x428010
    guest.pv.before_entry(guest.machine.cpu)
    assert guest.machine.cpu.gpr[16] == EVENT
    assert guest.frame(3)[2] == 0x428010
    assert guest.mask == 1
    assert guest.pv.kernel_mode


def test_an_nmi_is_delivered_even_with_events_masked_and_only_one_at_a_time(guest: Guest) -> None:
    cpu = guest.machine.cpu
    guest.put(va(DATA_PFN), (0x50000).to_bytes(8, "little"))
    assert guest.call(Hypercall.NMI_OP, 0, va(DATA_PFN)) == 0
    guest.mask = 1
    assert guest.call(Hypercall.VCPU_OP, 11, 0, 0) == 0
    cpu.gpr[16] = 0x400200
    guest.pv.before_entry(cpu)
    assert cpu.gpr[16] == 0x50000
    assert guest.frame(4)[2:4] == (0x400200, 0xE030 | 1 << 32)
    guest.vcpu.nmi_pending = True
    guest.pv.before_entry(cpu)
    assert cpu.gpr[16] == 0x50000  # not within the handler
    assert guest.vcpu.nmi_pending
    cpu.gpr[16] = guest.iret(rip=0x400300, cs=0xE030, rflags=2)
    guest.pv.before_entry(cpu)
    assert cpu.gpr[16] == 0x50000
    assert not guest.vcpu.nmi_pending


def test_an_nmi_without_handler_is_lost(guest: Guest) -> None:
    guest.vcpu.nmi_pending = True
    rip = guest.machine.cpu.gpr[16]
    guest.pv.before_entry(guest.machine.cpu)
    assert guest.machine.cpu.gpr[16] == rip
    assert not guest.vcpu.nmi_pending
