# SPDX-License-Identifier: GPL-2.0-only
"""VCPUOP_* on the vCPUs of a domain with several: bring-up in slices, errors, taking down, what others may not do."""

from __future__ import annotations

import errno
import struct
from typing import Any

import pytest

from pyxen.abi.arch_x86 import Vgcf
from pyxen.abi.vcpu import RUNSTATE_INFO, VcpuOp
from pyxen.abi.xen import Hypercall, Virq
from pyxen.hypervisor.domain import ShutdownCode
from pyxen.hypervisor.vcpu import RunState, Vcpu
from pyxen.hypervisor.x86.pv.gdt import do_update_descriptor
from pyxen.machine.cpu.base import RAX, RSP, Seg
from tests.hypervisor.rig import CODE32, CODE64_SEL, DATA_PFN, GDT_PFN, STACK_PFN, USER_PFN, Guest, Machine, P, va

AREA = va(DATA_PFN)
BIG_PFN = 48
"""Four frames: a root (48) whose tables are 49, 50 and many uses of 51."""


def op(guest: Guest, command: int, vcpu: int, arg: int = 0) -> int:
    return guest.call(Hypercall.VCPU_OP, command, vcpu, arg)


def write_context(guest: Guest, *, root: int = 0, user_root: int = 0, **fields: Any) -> int:
    """A context that would do, but for ``fields`` and roots (frames) named, in the guest's memory (two frames)."""
    context = guest.context(**fields)
    if root:
        context.ctrlreg[3] = root << 12
    if user_root:
        context.ctrlreg[1] = user_root << 12
    data = context.pack()
    guest.put_pfn(DATA_PFN, 0, data[:4096])
    guest.put_pfn(DATA_PFN + 1, 0, data[4096:])
    return AREA


def second(guest: Guest) -> Vcpu:
    return guest.domain.vcpus[1]


def unpinned_root(guest: Guest) -> int:
    """A root that nobody validated, with work for many slices: 40 entries of its L3 and L2 are the same full table."""
    for pfn in range(BIG_PFN, BIG_PFN + 4):  # off the kernel's map, so that they may be page tables
        assert guest.call(Hypercall.UPDATE_VA_MAPPING, va(pfn), 0, 0) == 0
    for level in range(3):
        for index in range(40 if level else 1):
            guest.store(BIG_PFN + level, index, guest.mfns[BIG_PFN + level + 1] << 12 | 0x67)
    for index in range(512):
        guest.store(BIG_PFN + 3, index, guest.mfns[USER_PFN] << 12 | P | 0x60)
    return guest.mfns[BIG_PFN]


def begin(guest: Guest, vcpu: int, context: int) -> None:
    """The registers of a VCPUOP_initialise."""
    guest.regs(rax=int(Hypercall.VCPU_OP), rdi=int(VcpuOp.INITIALISE), rsi=vcpu, rdx=context)


def goes_on(guest: Guest) -> bool:
    """One slice of it: whether the guest is to execute its hypercall again."""
    return guest.pv.traps.syscall(0x400102) == 0x400100


def always_preempt(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(guest.hv.frames), "preempt", lambda _self: True)


def test_numbers_beyond_the_last_vcpu_name_nobody(guest: Guest) -> None:
    for number in (2, 31, 32, 127, 8191, 0xFFFFFFFF):
        for command in (VcpuOp.INITIALISE, VcpuOp.UP, VcpuOp.DOWN, VcpuOp.IS_UP, VcpuOp.SEND_NMI):
            assert op(guest, command, number, AREA) == -errno.ENOENT
    assert op(guest, VcpuOp.IS_UP, 1 << 32) == 1  # an unsigned int


def test_initialise_and_up(guest: Guest) -> None:
    assert op(guest, VcpuOp.UP, 1) == -errno.EINVAL
    assert op(guest, VcpuOp.INITIALISE, 0, write_context(guest)) == -errno.EEXIST
    assert op(guest, VcpuOp.INITIALISE, 1, 0x1000) == -errno.EFAULT
    assert op(guest, VcpuOp.INITIALISE, 1, write_context(guest, rip=1 << 50)) == -errno.EINVAL
    assert not second(guest).is_initialised
    assert op(guest, VcpuOp.INITIALISE, 1, write_context(guest, rip=0x1234)) == 0
    assert op(guest, VcpuOp.INITIALISE, 1, write_context(guest)) == -errno.EEXIST
    assert op(guest, VcpuOp.IS_UP, 1) == 0
    assert second(guest).runstate is RunState.OFFLINE
    guest.machine.privcmd.domain_unpause(guest.domid)
    assert op(guest, VcpuOp.UP, 1) == 0
    assert op(guest, VcpuOp.UP, 1) == 0
    assert op(guest, VcpuOp.IS_UP, 1) == 1
    assert second(guest).runstate is RunState.RUNNABLE
    context = second(guest).context
    assert context is not None
    assert context.get().gpr[16] == 0x1234
    root = guest.mfns[0]
    assert guest.hv.frames.type_info[root] & 0xFFFF == 2  # of both vCPUs


def test_initialise_without_a_vcpu_info(host: Machine) -> None:
    """From vCPU 32 on: Xen's dummy_vcpu_info is nobody's to run with."""
    guest = Guest(host, "exact", 34).boot()
    guest.trap_table()
    assert op(guest, VcpuOp.INITIALISE, 33, write_context(guest)) == -errno.EINVAL
    guest.put(va(DATA_PFN + 3), struct.pack("<QII", guest.mfns[DATA_PFN + 4], 64, 0))
    assert op(guest, VcpuOp.REGISTER_VCPU_INFO, 33, va(DATA_PFN + 3)) == 0
    assert op(guest, VcpuOp.REGISTER_VCPU_INFO, 33, va(DATA_PFN + 3)) == -errno.EINVAL  # once
    assert guest.get(va(DATA_PFN + 4) + 64, 2) == b"\1\1"  # pending, masked
    assert op(guest, VcpuOp.INITIALISE, 33, write_context(guest)) == 0
    assert op(guest, VcpuOp.UP, 33) == 0


def test_a_vcpu_info_is_moved_by_its_vcpu_or_while_that_is_down(guest: Guest) -> None:
    guest.put(va(DATA_PFN + 3), struct.pack("<QII", guest.mfns[DATA_PFN + 4], 128, 0))
    assert op(guest, VcpuOp.INITIALISE, 1, write_context(guest)) == 0
    assert op(guest, VcpuOp.UP, 1) == 0
    assert op(guest, VcpuOp.REGISTER_VCPU_INFO, 1, va(DATA_PFN + 3)) == -errno.EINVAL
    assert op(guest, VcpuOp.DOWN, 1) == 0
    assert op(guest, VcpuOp.REGISTER_VCPU_INFO, 1, va(DATA_PFN + 3)) == 0


def test_an_unpinned_root_is_validated_in_slices(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each slice is a continuation that lets go of both locks; whatever their number, the end is the same."""
    root = unpinned_root(guest)
    always_preempt(guest, monkeypatch)
    begin(guest, 1, write_context(guest, root=root))
    slices = 0
    while goes_on(guest):
        slices += 1
        assert not guest.domain.lock.held()
        assert not guest.hv.frames.lock.held()
        assert not second(guest).is_initialised
        assert slices < 1000
    assert guest.machine.cpu.gpr[RAX] == 0
    assert slices >= 10
    assert second(guest).is_initialised
    assert second(guest).pv.guest_table == root


def test_a_continuation_that_never_comes_costs_nothing(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    root = unpinned_root(guest)
    with monkeypatch.context() as patch:
        always_preempt(guest, patch)
        begin(guest, 1, write_context(guest, user_root=root))
        assert all(goes_on(guest) for _ in range(5))
    assert second(guest).pv.guest_table == guest.mfns[0]
    guest.machine.cpu.unload()
    guest.machine.destroy(guest.domain)
    assert guest.machine.hv.allocator.free_frames == guest.machine.baseline


def test_a_guest_may_change_its_mind_between_two_slices(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel's root is done, the user's is not: then another pair of roots is asked for."""
    root = unpinned_root(guest)
    with monkeypatch.context() as patch:
        always_preempt(guest, patch)
        begin(guest, 1, write_context(guest, user_root=root))
        assert all(goes_on(guest) for _ in range(3))
        assert second(guest).pv.guest_table == guest.mfns[0]
    # A page table is no descriptor page: all is given up.
    assert op(guest, VcpuOp.INITIALISE, 1, write_context(guest, gdt_frames=[guest.mfns[0]] * 16)) == -errno.EINVAL
    assert (second(guest).pv.guest_table, second(guest).pv.guest_table_user) == (0, 0)
    assert guest.hv.frames.type_info[guest.mfns[0]] & 0xFFFF == 1
    assert op(guest, VcpuOp.INITIALISE, 1, write_context(guest)) == 0


# --- taking down ----------------------------------------------------------------------------------


def test_the_last_vcpu_that_goes_down_ends_the_domain(guest: Guest) -> None:
    """Xen 4.7; before, the domain lay there for ever."""
    assert op(guest, VcpuOp.INITIALISE, 1, write_context(guest)) == 0
    assert op(guest, VcpuOp.UP, 1) == 0
    assert op(guest, VcpuOp.DOWN, 0) == 0  # the calling one may; the other goes on
    assert not guest.domain.is_shut_down
    assert op(guest, VcpuOp.IS_UP, 0) == 0
    assert op(guest, VcpuOp.DOWN, 1) == 0
    assert guest.domain.is_shut_down
    assert guest.domain.shutdown_code == ShutdownCode.POWEROFF


def test_down_twice_and_a_vcpu_that_was_never_up(guest: Guest) -> None:
    assert op(guest, VcpuOp.DOWN, 1) == 0
    assert op(guest, VcpuOp.DOWN, 1) == 0
    assert not guest.domain.is_shut_down


def test_what_a_vcpu_remembers_does_not_outlive_its_time_offline(guest: Guest) -> None:
    """A guest need not flush a vCPU that is down: Linux leaves it out of its shoot-downs."""
    assert op(guest, VcpuOp.INITIALISE, 1, write_context(guest)) == 0
    pv = second(guest).pv
    old, new = va(DATA_PFN + 5), guest.mfns[DATA_PFN + 6]
    guest.put(old, b"old")
    assert pv.read(old, 3) == b"old"
    guest.put_pfn(DATA_PFN + 6, 0, b"new")
    assert guest.call(Hypercall.UPDATE_VA_MAPPING, old, new << 12 | 0x67, 2 | 0) == 0  # INVLPG, this vCPU only
    assert op(guest, VcpuOp.UP, 1) == 0
    assert pv.read(old, 3) == b"new"


def test_timers_are_the_vcpus_own(guest: Guest) -> None:
    guest.put(AREA, struct.pack("<QQ", 1 << 40, 0))
    assert op(guest, VcpuOp.SET_SINGLESHOT_TIMER, 1, AREA) == -errno.EINVAL
    assert op(guest, VcpuOp.STOP_SINGLESHOT_TIMER, 1) == -errno.EINVAL
    assert op(guest, VcpuOp.SET_SINGLESHOT_TIMER, 0, AREA) == 0
    guest.put(AREA, struct.pack("<Q", 2_000_000))
    assert op(guest, VcpuOp.SET_PERIODIC_TIMER, 1, AREA) == 0  # that one may be another's
    assert (second(guest).periodic_period_ns, guest.vcpu.periodic_period_ns) == (2_000_000, 10_000_000)
    assert op(guest, VcpuOp.STOP_PERIODIC_TIMER, 1) == 0
    assert second(guest).periodic_period_ns == 0


def test_virq_timer_goes_to_its_vcpu(guest: Guest) -> None:
    evtchn = guest.domain.evtchn
    ports = [evtchn.bind_virq(Virq.TIMER, vcpu) for vcpu in (0, 1)]
    evtchn.raise_virq(second(guest), Virq.TIMER)
    memory = guest.hv.memory
    assert not memory.b[guest.vcpu.info_maddr]
    assert memory.b[second(guest).info_maddr] == 1
    assert [evtchn.is_pending(port) for port in ports] == [False, True]


def test_runstate_of_an_offline_vcpu_is_its_time_offline(guest: Guest) -> None:
    guest.machine.clock.advance(5_000_000)
    assert op(guest, VcpuOp.GET_RUNSTATE_INFO, 1, AREA) == 0
    state, _since, *times = RUNSTATE_INFO.unpack(guest.get(AREA, RUNSTATE_INFO.size))
    assert state == RunState.OFFLINE
    assert times == [0, 0, 0, 5_000_000]
    guest.machine.privcmd.domain_unpause(guest.domid)
    assert op(guest, VcpuOp.INITIALISE, 1, write_context(guest)) == 0
    assert op(guest, VcpuOp.UP, 1) == 0
    guest.machine.clock.advance(3_000_000)
    assert op(guest, VcpuOp.GET_RUNSTATE_INFO, 1, AREA) == 0
    state, _since, *times = RUNSTATE_INFO.unpack(guest.get(AREA, RUNSTATE_INFO.size))
    assert (state, times) == (RunState.RUNNABLE, [0, 3_000_000, 0, 5_000_000])  # waiting is steal time


def test_nmi_to_another_vcpu(guest: Guest) -> None:
    assert op(guest, VcpuOp.SEND_NMI, 1, 8) == -errno.EINVAL
    assert op(guest, VcpuOp.SEND_NMI, 1) == 0
    assert second(guest).nmi_pending
    assert not guest.vcpu.nmi_pending


# --- descriptors that another vCPU changes ----------------------------------------------------------


def test_a_system_call_keeps_its_kind_when_another_vcpu_changes_a_descriptor(guest: Guest) -> None:
    """What is known of a vCPU's selectors is forgotten then, not taken for compatibility mode."""
    guest.user(cs=CODE64_SEL)
    assert do_update_descriptor(second(guest).pv, (guest.mfns[GDT_PFN] << 12) + 8 * 100, CODE32) == 0
    assert CODE64_SEL not in guest.pv.flat_code
    guest.regs(rcx=0)
    assert guest.pv.traps.syscall(0x428002) == 0x403000
    assert guest.frame(4)[3] & 0xFFFF == 0xE033


def test_an_instruction_in_the_upper_half_is_found_after_that(guest: Guest) -> None:
    cpu = guest.machine.cpu
    cpu.set_selector(Seg.CS, CODE64_SEL)
    guest.pv.flat_code.discard(CODE64_SEL)
    assert guest.execute(b"\x0f\x20\xc0") == 3  # mov %cr0, %rax
    assert CODE64_SEL in guest.pv.flat_code


# --- a user root that another vCPU changes -------------------------------------------------------------


def test_user_mode_leaves_the_kernels_root_when_they_differ(host: Machine) -> None:
    """Fast mode: user mode runs on the kernel's root while the lower halves are the same, which is looked at
    again at each entry, for another vCPU may have changed one of them."""
    guest = host.guest("fast")
    same = [guest.hv.memory.q[(guest.mfns[4] << 9) + i] for i in range(256)]
    kernel = [guest.hv.memory.q[(guest.mfns[0] << 9) + i] for i in range(256)]
    for i, word in enumerate(kernel):
        guest.store(4, i, word)
    guest.user()
    assert host.cpu.cr3 == guest.mfns[0] << 12
    guest.pv.before_entry(host.cpu)
    assert host.cpu.cr3 == guest.mfns[0] << 12
    for i, word in enumerate(same):
        guest.store(4, i, word)
    guest.pv.before_entry(host.cpu)
    assert host.cpu.cr3 == guest.mfns[4] << 12
    assert guest.fault(6) == guest.handlers[6]
    assert host.cpu.cr3 == guest.mfns[0] << 12


def test_where_a_new_vcpu_starts(guest: Guest) -> None:
    assert op(guest, VcpuOp.INITIALISE, 1, write_context(guest, flags=Vgcf.IN_KERNEL)) == 0
    context = second(guest).context
    assert context is not None
    registers = context.get()
    assert registers.gpr[RSP] == va(STACK_PFN + 1)
    assert registers.cr3 == guest.mfns[0] << 12
    assert second(guest).pv.kernel_mode
