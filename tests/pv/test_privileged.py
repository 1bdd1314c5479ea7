# SPDX-License-Identifier: GPL-2.0-only
"""Privileged instructions, MSRs, debug registers and CPUID of PV guests (Xen: emulate_privileged_op in traps.c)."""

from __future__ import annotations

import pytest

from pyxen.abi.xen import Hypercall
from pyxen.hypervisor.x86 import hypercall_page
from pyxen.hypervisor.x86.pit import Pit
from pyxen.machine.cpu.base import RAX, RBX, RCX, RDI, RDX, RSI
from pyxen.toolstack.build import pv_pages
from tests.hypervisor.rig import DATA_PFN, LDT_PFN, PAGES, USER_PFN, Guest, va

FAULT = -1
KERNEL = 0xFFFF_8800_0000_0000


def test_control_registers(guest: Guest) -> None:
    gpr = guest.machine.cpu.gpr
    assert guest.execute(b"\x0f\x20\xc0") == 3  # mov %cr0,%rax
    assert gpr[RAX] == 0x80050033
    gpr[RAX] |= 8
    assert guest.execute(b"\x0f\x22\xc0") == 3
    assert guest.pv.cr0_ts
    assert guest.execute(b"\x0f\x06") == 2  # clts
    assert not guest.pv.cr0_ts
    gpr[RAX] = 0x80050033 & ~1
    assert guest.execute(b"\x0f\x22\xc0") == FAULT
    gpr[RAX] = 0x8003B
    assert guest.execute(b"\x0f\x01\xf0") == 3  # lmsw %ax: TS
    assert guest.pv.cr0_ts
    gpr[RBX] = 0x123456789ABCDEF0
    assert guest.execute(b"\x0f\x22\xd3") == 3  # mov %rbx,%cr2
    assert guest.execute(b"\x0f\x20\xd1") == 3
    assert gpr[RCX] == 0x123456789ABCDEF0
    assert guest.execute(b"\x0f\x20\xda") == 3  # mov %cr3,%rdx
    assert gpr[RDX] == guest.mfns[0] << 12
    gpr[RAX] = 0x624
    assert guest.execute(b"\x0f\x22\xe0") == 3  # mov %rax,%cr4: TSD
    assert guest.execute(b"\x0f\x20\xe3") == 3
    assert gpr[RBX] == 0x624
    assert guest.execute(b"\x44\x0f\x20\xc0") == FAULT  # %cr8


def test_cr3_takes_a_root_only(guest: Guest) -> None:
    gpr = guest.machine.cpu.gpr
    gpr[RAX] = guest.mfns[4] << 12
    assert guest.execute(b"\x0f\x22\xd8") == 3
    assert guest.pv.guest_table == guest.mfns[4]
    gpr[RAX] = guest.mfns[0] << 12
    guest.put_pfn(USER_PFN, 0, b"\x0f\x22\xd8".ljust(16, b"\x90"))
    assert guest.fault(13, 0, va(USER_PFN)) == va(USER_PFN) + 3
    for wrong in (guest.mfns[DATA_PFN] << 12, (1 << 64) - 4096, 0):
        gpr[RAX] = wrong
        assert guest.execute(b"\x0f\x22\xd8") == FAULT


def test_a_root_that_takes_long_to_validate_has_the_instruction_executed_again(exact: Guest) -> None:
    frames, gpr = exact.hv.frames, exact.machine.cpu.gpr
    exact.machine.pin(exact, 4, 4)
    gpr[RAX] = exact.mfns[4] << 12
    real, frames.put_deferred = frames.put_deferred, lambda domid: False  # type: ignore[method-assign]
    assert exact.execute(b"\x0f\x22\xd8") == 0
    frames.put_deferred = real  # type: ignore[method-assign]
    assert exact.execute(b"\x0f\x22\xd8") == 3


@pytest.mark.parametrize(
    "code", [b"\x0f\x20\xc0", b"\x0f\x22\xd8", b"\x0f\x06", b"\x0f\x01\xf0", b"\x0f\x32", b"\x0f\x30", b"\x0f\x21\xf8",
             b"\x0f\x23\xf8", b"\x0f\x09", b"\x0f\x01\x38", b"\xfa", b"\xec", b"\xee", b"\x6c", b"\xf4", b"\x0f\x35"])
def test_user_mode_may_none_of_it(guest: Guest, code: bytes) -> None:
    guest.user()
    assert guest.execute(code) == FAULT
    assert guest.frame(3)[2] == 0


def test_interrupt_flag_needs_iopl_and_changes_nothing(guest: Guest) -> None:
    guest.mask = 1
    assert guest.execute(b"\xfb") == FAULT
    guest.put(va(DATA_PFN), (1).to_bytes(4, "little"))
    assert guest.call(Hypercall.PHYSDEV_OP, 6, va(DATA_PFN)) == 0
    guest.mask = 1
    assert guest.execute(b"\xfb") == 1
    assert guest.execute(b"\xfa") == 1
    assert guest.mask == 1
    guest.user()
    assert guest.execute(b"\xfa") == FAULT  # IOPL 1 is the kernel's only


def test_invlpg_with_every_kind_of_address(guest: Guest) -> None:
    cpu = guest.machine.cpu
    cpu.gpr[RAX], cpu.gpr[RBX], cpu.gs_base = 0x1_2345_6000, 0x100, 0x7000_0000
    rip = va(DATA_PFN)
    for code, address in (
        (b"\x0f\x01\x38", 0x1_2345_6000),
        (b"\x0f\x01\x7c\x98\x10", 0x1_2345_6410),
        (b"\x0f\x01\x3d\x00\x10\x00\x00", rip + 7 + 0x1000),  # RIP-relative
        (b"\x67\x0f\x01\x38", 0x2345_6000),  # 32-bit address
        (b"\x65\x0f\x01\x38", 0x1_9345_6000),
    ):
        assert guest.execute(code) == len(code)
        assert cpu.journal[-1] == ("flush_page", address)


def test_cache_and_unknown_instructions(guest: Guest) -> None:
    assert guest.execute(b"\x0f\x09") == 2
    assert guest.execute(b"\x0f\x08") == 2
    assert guest.execute(b"\xf4") == FAULT  # HLT is not emulated
    assert guest.execute(b"\x0f\x01\xd1") == FAULT  # XSETBV


# --- ports -----------------------------------------------------------------------------------------------


def allow_ports(guest: Guest, level: int = 3) -> None:
    guest.pv.iopl = level


def test_ports_nobody_answers(guest: Guest) -> None:
    gpr = guest.machine.cpu.gpr
    assert guest.execute(b"\xec") == FAULT
    allow_ports(guest)
    for code, before, after in ((b"\xec", 0x1122334455667700, 0x11223344556677FF),
                                (b"\x66\xed", 0x1122334455660000, 0x112233445566FFFF),
                                (b"\xed", 0x1122334455667788, 0xFFFFFFFF), (b"\xe4\x80", 0, 0xFF)):
        gpr[RAX], gpr[RDX] = before, 0xCF8
        assert guest.execute(code) == len(code)
        assert gpr[RAX] == after
    for code in (b"\xee", b"\x66\xef", b"\xef", b"\xe6\x80"):
        assert guest.execute(code) == len(code)


def test_the_timers_ports_also_as_parts_of_wider_accesses(guest: Guest) -> None:
    gpr = guest.machine.cpu.gpr
    allow_ports(guest)
    gpr[RAX], gpr[RDX] = 0xB0 << 8 | 0x42, 0x42
    assert guest.execute(b"\x66\xef") == 2  # a byte to 0x42, then the control word
    gpr[RAX], gpr[RDX] = 0, 0x61
    assert guest.execute(b"\x66\xed") == 2
    assert gpr[RAX] >> 8 == 0xFF  # 0x62 is nobody's
    assert gpr[RAX] & 1 == 0


def test_the_io_bitmap_is_read_by_the_kernels_tables(guest: Guest) -> None:
    """The limit is a number of ports; bytes that cannot be read allow nothing."""
    guest.put(va(DATA_PFN), va(DATA_PFN + 1).to_bytes(8, "little") + (0x100).to_bytes(8, "little"))
    assert guest.call(Hypercall.PHYSDEV_OP, 7, va(DATA_PFN)) == 0
    guest.put(va(DATA_PFN + 1), b"\xff" * 16 + b"\xfe" + b"\xff" * 15)  # port 0x80
    gpr = guest.machine.cpu.gpr
    for kernel in (True, False):
        if not kernel:
            guest.user()
        for port, allowed in ((0x80, True), (0x81, False), (0x100, False), (0xFFFF, False)):
            gpr[RDX] = port
            assert (guest.execute(b"\xec") == 1) is allowed
            if not kernel and not allowed:
                guest.user()
    gpr[RDX] = 0x80
    assert guest.execute(b"\xed") == FAULT  # 0x80 to 0x83
    guest.pv.iobmp = va(PAGES) - 16
    guest.user()
    gpr[RDX] = 0x80
    assert guest.execute(b"\xec") == FAULT


def test_string_instructions_touch_what_the_current_mode_may(guest: Guest) -> None:
    gpr = guest.machine.cpu.gpr
    allow_ports(guest)
    gpr[RDI], gpr[RDX], gpr[RCX] = va(DATA_PFN + 1) + 0xFFE, 0x300, 2
    assert guest.execute(b"\xf3\x66\x6d") == 3  # rep insw
    assert guest.get(va(DATA_PFN + 1) + 0xFFC, 8) == bytes(2) + b"\xff" * 4 + bytes(2)
    assert (gpr[RCX], gpr[RDI]) == (0, va(DATA_PFN + 2) + 2)
    gpr[RDI], gpr[RCX] = va(LDT_PFN), 5
    assert guest.execute(b"\xf3\x6c") + va(DATA_PFN) == guest.handlers[14]  # read-only
    assert guest.frame(3)[2] == 3
    assert gpr[RCX] == 5
    guest.user()
    gpr[RDI], gpr[RCX] = va(DATA_PFN), 1
    assert guest.execute(b"\xf3\x6c") + va(USER_PFN) == guest.handlers[14]  # not the user's
    assert guest.frame(3)[2] == 6
    guest.user()
    gpr[RSI] = va(USER_PFN + 8) - 2
    assert guest.execute(b"\x6f") + va(USER_PFN) == guest.handlers[14]  # outsl across the end
    assert guest.hv.memory.q[(guest.vcpu.info_maddr + 16) >> 3] == va(USER_PFN + 8) + 1


def test_an_endless_repetition_is_done_in_pieces(guest: Guest) -> None:
    gpr = guest.machine.cpu.gpr
    allow_ports(guest)
    gpr[RCX], gpr[RDI], gpr[RDX] = (1 << 64) - 1, va(DATA_PFN + 3), 0x300
    assert guest.execute(b"\xf3\x6c") == 0
    assert gpr[RCX] == (1 << 64) - 1 - 1024


def test_latched_timer_bytes_are_bounded() -> None:
    """8254: a second latch or read-back before the first was read changes nothing; the status comes first."""
    pit = Pit(lambda: 0)
    pit.write(0x43, 0xB0)
    pit.write(0x42, 0x34)
    pit.write(0x42, 0x12)
    for _ in range(1000):
        pit.write(0x43, 0xC8)
        pit.write(0x43, 0x80)
    assert [pit.read(0x42) for _ in range(3)] == [0x30, 0x34, 0x12]
    channel = pit._channels[2]
    assert not channel.latched
    assert channel.status is None


# --- MSRs and debug registers ------------------------------------------------------------------------------


def wrmsr(guest: Guest, number: int, value: int) -> int:
    guest.regs(rcx=number, rax=value & 0xFFFFFFFF, rdx=value >> 32)
    return guest.execute(b"\x0f\x30")


def rdmsr(guest: Guest, number: int) -> int | None:
    guest.regs(rcx=number)
    gpr = guest.machine.cpu.gpr
    return gpr[RDX] << 32 | gpr[RAX] if guest.execute(b"\x0f\x32") == 2 else None


def test_segment_base_msrs(guest: Guest) -> None:
    for number in (0xC0000100, 0xC0000101, 0xC0000102):
        assert wrmsr(guest, number, KERNEL + number) == 2
        assert rdmsr(guest, number) == KERNEL + number
        assert wrmsr(guest, number, 1 << 47) == FAULT
    assert guest.machine.cpu.gs_base == KERNEL + 0xC0000101
    guest.user()
    assert guest.machine.cpu.gs_base == KERNEL + 0xC0000102


def test_other_msrs(guest: Guest) -> None:
    assert rdmsr(guest, 0xC0000080) == 0xD01
    assert rdmsr(guest, 0x277) == 0x050100070406
    assert rdmsr(guest, 0x12345) is None
    assert wrmsr(guest, 0xC0000080, 0) == 2  # ignored
    assert rdmsr(guest, 0xC0000080) == 0xD01


def test_the_hypercall_page_msr(guest: Guest) -> None:
    assert hypercall_page.page() == pv_pages.hypercall_page()
    assert wrmsr(guest, 0x40000000, guest.mfns[30] << 12) == 2
    assert guest.get(va(30), 4096) == hypercall_page.page()
    for bad in (guest.mfns[30] << 12 | 1, guest.mfns[0] << 12, 1 << 63, 0):
        assert wrmsr(guest, 0x40000000, bad) == FAULT


def test_a_guest_cannot_flood_the_log(exact: Guest) -> None:
    exact.hv.log.verbose = True
    for i in range(300):
        wrmsr(exact, 0xC0000080, i)
        exact.regs(rax=1 << 40 | i)
        exact.execute(b"\x0f\x22\xe0")
        exact.call(50 + i % 10)
    assert len(exact.machine.log().splitlines()) < 40


@pytest.mark.parametrize(
    ("number", "value", "result"),
    [
        (0, 0x400000, 0), (3, KERNEL, 0), (0, 0xFFFF800000000000, -1), (1, 1 << 47, -1),
        (6, 0xFFFFFFFFFFFFFFFF, 0), (7, 0x155, 0), (7, 0x2000, -1), (7, 0x20001, -1), (8, 0, -22), (1 << 31, 0, -22),
    ],
)
def test_set_debugreg(guest: Guest, number: int, value: int, result: int) -> None:
    assert guest.call(Hypercall.SET_DEBUGREG, number, value) == result
    if not result:
        want = {6: 0xFFFFEFFF, 7: 0x555}.get(number, value)
        got = guest.call(Hypercall.GET_DEBUGREG, number) & (1 << 64) - 1
        assert got == want
        assert guest.machine.cpu.get_debug_register(number) == want
        assert guest.machine.cpu.gpr[RAX] == want


def test_debug_registers_by_instruction(guest: Guest) -> None:
    guest.regs(rax=0x400100)
    assert guest.execute(b"\x0f\x23\xc0") == 3
    assert guest.execute(b"\x0f\x21\xc3") == 3
    assert guest.machine.cpu.gpr[RBX] == 0x400100
    guest.regs(rax=0x2000)
    assert guest.execute(b"\x0f\x23\xf8") == FAULT
    assert guest.call(Hypercall.GET_DEBUGREG, 9) == -22


# --- CPUID ---------------------------------------------------------------------------------------------------


def test_forced_cpuid_and_cpuid_agree(guest: Guest) -> None:
    gpr = guest.machine.cpu.gpr
    for leaf in (0, 1, 7, 0x40000000, 0x40000001, 0x40000002, 0x80000001, 0x80000002, 0xFFFFFFFF):
        guest.put(va(DATA_PFN), b"\x0f\x0bxen\x0f\xa2")
        guest.regs(rax=leaf | 1 << 40, rcx=0)
        assert guest.fault(6, None, va(DATA_PFN)) == va(DATA_PFN) + 7
        forced = [gpr[i] for i in (RAX, RBX, RCX, RDX)]
        guest.regs(rax=leaf, rcx=0)
        assert guest.pv.traps.cpuid(0x400100) == 0x400102
        assert forced == [gpr[i] for i in (RAX, RBX, RCX, RDX)]
        assert all(word < 1 << 32 for word in forced)
        if leaf == 0x40000000:
            assert b"".join(w.to_bytes(4, "little") for w in forced[1:]) == b"XenVMMXenVMM"
        if leaf == 0x40000001:
            assert forced[0] == 4 << 16 | 6
        if leaf == 0x40000002:
            assert forced[:2] == [1, 0x40000000]


@pytest.mark.parametrize("code", [b"\x0f\x0b", b"\x0f\x0bxem\x0f\xa2", b"\x0f\x0bxen\x0f\x32"])
def test_other_undefined_instructions_are_the_guests(guest: Guest, code: bytes) -> None:
    guest.put(va(DATA_PFN), code.ljust(16, b"\x90"))
    assert guest.fault(6, None, va(DATA_PFN)) == guest.handlers[6]
    guest.put(va(PAGES - 1) + 4096 - len(code), code)
    assert guest.fault(6, None, va(PAGES) - len(code)) == guest.handlers[6]


def test_segment_bases(guest: Guest) -> None:
    cpu = guest.machine.cpu
    for which in (0, 1, 2):
        assert guest.call(Hypercall.SET_SEGMENT_BASE, which, KERNEL + which) == 0
        assert guest.call(Hypercall.SET_SEGMENT_BASE, which, 1 << 47) == -22
    assert (cpu.fs_base, guest.pv.gs_base_user, cpu.gs_base) == (KERNEL, KERNEL + 1, KERNEL + 2)
    assert guest.call(Hypercall.SET_SEGMENT_BASE, 3, 0x2B) == 0
    assert (guest.pv.gs_base_user, cpu.selector(5)) == (0, 0x2B)
    assert guest.call(Hypercall.SET_SEGMENT_BASE, 3, 0x3B) == 0  # not there: null, silently
    assert cpu.selector(5) == 0
    assert guest.call(Hypercall.SET_SEGMENT_BASE, 4, 0) == -22
