# SPDX-License-Identifier: GPL-2.0-only
"""Blocking, waking, run states, sched_op, vcpu_op and guest timers, in virtual time."""

from __future__ import annotations

import errno
import struct
from typing import Any

import pytest

from pyxen.abi.sched import SchedOp
from pyxen.abi.vcpu import RUNSTATE_INFO, XEN_RUNSTATE_UPDATE, VcpuOp
from pyxen.abi.xen import VCPU_TIME_INFO, VI_TIME, VI_UPCALL_MASK, Virq, VmAssist
from pyxen.errors import GuestAccessError, InternalError, XenError
from pyxen.hypervisor import runstate
from pyxen.hypervisor.domain import Domain, ShutdownCode
from pyxen.hypervisor.sched_op import do_sched_op, do_sched_op_compat
from pyxen.hypervisor.schedule import VPF_BLOCKED, VPF_DOWN, VPF_POLLING
from pyxen.hypervisor.time import do_set_timer_op, update_domain_wallclock, vcpu_periodic_timer_work
from pyxen.hypervisor.vcpu import RunState, Vcpu
from pyxen.hypervisor.vcpu_op import do_vcpu_op
from tests.sched.model import MS, Pv, S, hog, host

BUFFER = Pv.BASE + 0x2000


class Guest:
    """One running domain with one pCPU, and its hypercalls."""

    def __init__(self, vcpus: int = 1) -> None:
        self.hypervisor, self.pcpu = host()
        self.domain = self.hypervisor.new_domain(vcpus=vcpus)
        self.vcpu = self.domain.vcpus[0]
        self.pcpu.load(self.domain, hog)
        self.pcpu.run_for(MS if vcpus == 1 else MS // 10)
        assert self.pcpu.current is self.vcpu

    def poke(self, data: bytes, at: int = BUFFER) -> int:
        self.vcpu.pv.write(at, data)
        return at

    def sched_op(self, cmd: int, data: bytes = b"") -> int:
        return do_sched_op(self.vcpu.pv, cmd, self.poke(data))

    def vcpu_op(self, cmd: int, data: bytes = b"", vcpu_id: int = 0) -> int:
        return do_vcpu_op(self.vcpu.pv, cmd, vcpu_id, self.poke(data) if data else 0)

    def timer_ticks(self) -> int:
        return self.events.virqs.count((0, Virq.TIMER))

    @property
    def events(self) -> Any:
        return self.domain.evtchn


def fails(code: int, function: Any, *arguments: Any) -> None:
    with pytest.raises(XenError) as caught:
        function(*arguments)
    assert caught.value.errno == code


# --- block, poll, yield ------------------------------------------------------------------------------------


def test_block_unmasks_events_and_waits_for_one() -> None:
    guest = Guest()
    mask = guest.vcpu.info_maddr + VI_UPCALL_MASK
    guest.hypervisor.memory.b[mask] = 1
    assert guest.sched_op(SchedOp.BLOCK) == 0
    assert guest.hypervisor.memory.b[mask] == 0
    guest.pcpu.run_for(S)
    assert guest.pcpu.current is None
    assert guest.vcpu.runstate is RunState.BLOCKED
    guest.events.upcall(guest.vcpu)
    guest.pcpu.run_for(MS)
    assert guest.pcpu.current is guest.vcpu
    state, _since, times = guest.hypervisor.scheduler.runstate(guest.vcpu)
    assert state == RunState.RUNNING
    assert times[RunState.BLOCKED] == S


def test_block_with_an_event_pending_does_not_sleep() -> None:
    guest = Guest()
    guest.hypervisor.memory.b[guest.vcpu.info_maddr] = 1
    guest.hypervisor.memory.b[guest.vcpu.info_maddr + VI_UPCALL_MASK] = 1  # block clears it, so it is deliverable
    guest.sched_op(SchedOp.BLOCK)
    assert not guest.vcpu.pause_flags
    assert not guest.pcpu.resched


def test_a_wake_between_block_and_the_decision_is_not_lost() -> None:
    guest = Guest()
    guest.sched_op(SchedOp.BLOCK)
    guest.events.upcall(guest.vcpu)
    guest.pcpu.run_for(MS)
    assert guest.pcpu.current is guest.vcpu


def test_poll_ends_by_its_port_by_its_timeout_and_by_any_upcall() -> None:
    guest = Guest()
    poll = struct.Struct("<QI4xQ")
    ports = guest.poke(struct.pack("<I", 5), BUFFER + 64)
    scheduler = guest.hypervisor.scheduler

    guest.sched_op(SchedOp.POLL, poll.pack(ports, 1, 0))
    guest.pcpu.run_for(S)
    assert guest.pcpu.current is None
    assert guest.vcpu.pause_flags == VPF_BLOCKED | VPF_POLLING
    assert guest.vcpu.poll_port == 5
    scheduler.vcpu_unblock(guest.vcpu)  # what an event on the port does
    guest.pcpu.run_for(1)
    assert guest.pcpu.current is guest.vcpu
    assert (guest.vcpu.pause_flags, guest.vcpu.poll_port) == (0, 0)

    deadline = guest.hypervisor.clock.now_ns() + 7 * MS
    guest.sched_op(SchedOp.POLL, poll.pack(ports, 1, deadline))
    guest.pcpu.run_until(deadline - 1)
    assert guest.pcpu.current is None
    guest.pcpu.run_until(deadline + 1)
    assert guest.pcpu.current is guest.vcpu
    assert guest.vcpu.pause_flags == 0

    guest.sched_op(SchedOp.POLL, poll.pack(ports, 1, deadline + S))
    guest.pcpu.run_for(1)
    guest.events.upcall(guest.vcpu)
    guest.pcpu.run_for(1)
    assert guest.pcpu.current is guest.vcpu
    assert not guest.vcpu.poll_timer.active


def test_poll_with_something_pending_returns_at_once() -> None:
    guest = Guest()
    ports = guest.poke(struct.pack("<II", 5, 6), BUFFER + 64)
    guest.events.pending.add(6)
    guest.sched_op(SchedOp.POLL, struct.pack("<QI4xQ", ports, 2, 0))
    assert guest.vcpu.pause_flags == 0
    assert not guest.pcpu.resched


@pytest.mark.parametrize(("ports", "count", "code"), [
    ([5], 129, errno.EINVAL), ([99], 1, errno.EINVAL), ([5, 0], 2, errno.EINVAL), (None, 1, errno.EFAULT),
])
def test_poll_errors_leave_the_vcpu_running(ports: list[int] | None, count: int, code: int) -> None:
    guest = Guest()
    at = 0x1000
    if ports is not None:
        at = guest.poke(struct.pack(f"<{len(ports)}I", *ports), BUFFER + 64)
    fails(code, guest.sched_op, SchedOp.POLL, struct.pack("<QI4xQ", at, count, 0))
    assert guest.vcpu.pause_flags == 0
    assert guest.vcpu.poll_port == 0


def test_128_ports_may_be_polled() -> None:
    guest = Guest()
    at = guest.poke(struct.pack("<128I", *[7] * 128), BUFFER + 64)
    guest.sched_op(SchedOp.POLL, struct.pack("<QI4xQ", at, 128, 0))
    assert guest.vcpu.poll_port == -1


def test_a_stale_poll_timeout_does_not_end_a_block() -> None:
    guest = Guest()
    now = guest.hypervisor.clock.now_ns()
    guest.hypervisor.scheduler.timers(0).set(guest.vcpu.poll_timer, now + 5 * MS)
    guest.sched_op(SchedOp.BLOCK)
    guest.pcpu.run_for(S)
    assert guest.pcpu.current is None


def test_yield_and_unknown_operations() -> None:
    guest = Guest()
    assert guest.sched_op(SchedOp.YIELD) == 0
    assert guest.pcpu.resched
    fails(errno.ENOSYS, guest.sched_op, SchedOp.PIN_OVERRIDE, struct.pack("<i", 0))
    fails(errno.ENOSYS, guest.sched_op, 99)
    fails(errno.EFAULT, do_sched_op, guest.vcpu.pv, SchedOp.POLL, 0x10)


def test_the_first_sched_op_takes_the_reason_as_argument() -> None:
    guest = Guest()
    assert do_sched_op_compat(guest.vcpu.pv, SchedOp.YIELD, 0) == 0
    fails(errno.ENOSYS, do_sched_op_compat, guest.vcpu.pv, SchedOp.POLL, 0)
    assert do_sched_op_compat(guest.vcpu.pv, SchedOp.SHUTDOWN, ShutdownCode.REBOOT) == 0
    assert guest.domain.shutdown_code == ShutdownCode.REBOOT


# --- shutting down --------------------------------------------------------------------------------------------


def test_shutdown_stops_all_vcpus_and_tells_dom0() -> None:
    guest = Guest(vcpus=2)
    guest.sched_op(SchedOp.SHUTDOWN, struct.pack("<I", ShutdownCode.POWEROFF))
    assert guest.domain.is_shut_down
    assert guest.domain.shutdown_code == 0
    assert guest.hypervisor.global_virqs == [Virq.DOM_EXC]
    guest.pcpu.run_for(S)
    assert guest.pcpu.current is None
    guest.hypervisor.scheduler.domain_shutdown(guest.domain, ShutdownCode.CRASH)  # too late
    assert guest.domain.shutdown_code == 0
    assert guest.hypervisor.global_virqs == [Virq.DOM_EXC]
    guest.hypervisor.scheduler.domain_resume(guest.domain)
    assert guest.domain.shutdown_code == -1
    guest.pcpu.run_for(MS)
    assert guest.pcpu.current is not None


def test_shutdown_code_is_kept_for_the_shutdown() -> None:
    guest = Guest()
    guest.sched_op(SchedOp.SHUTDOWN_CODE, struct.pack("<I", ShutdownCode.SUSPEND))
    assert not guest.domain.is_shut_down
    guest.sched_op(SchedOp.SHUTDOWN, struct.pack("<I", ShutdownCode.POWEROFF))
    assert guest.domain.shutdown_code == ShutdownCode.SUSPEND


def test_remote_shutdown_asks_xsm() -> None:
    guest = Guest()
    other = guest.hypervisor.new_domain()
    guest.hypervisor.xsm.refuse = True
    fails(errno.EPERM, guest.sched_op, SchedOp.REMOTE_SHUTDOWN, struct.pack("<H2xI", other.domid, 1))
    assert not other.is_shut_down
    guest.hypervisor.xsm.refuse = False
    fails(errno.ESRCH, guest.sched_op, SchedOp.REMOTE_SHUTDOWN, struct.pack("<H2xI", 77, 1))
    fails(errno.ESRCH, guest.sched_op, SchedOp.REMOTE_SHUTDOWN, struct.pack("<H2xI", 0x7FF0, 1))
    guest.sched_op(SchedOp.REMOTE_SHUTDOWN, struct.pack("<H2xI", other.domid, 1))
    assert other.shutdown_code == 1


def watchdog(guest: Guest, timer_id: int, timeout: int) -> int:
    return guest.sched_op(SchedOp.WATCHDOG, struct.pack("<II", timer_id, timeout))


def test_watchdogs() -> None:
    guest = Guest()
    assert watchdog(guest, 0, 10) == 1
    assert watchdog(guest, 0, 20) == 2
    fails(errno.ENOSPC, watchdog, guest, 0, 10)
    fails(errno.EINVAL, watchdog, guest, 3, 10)
    assert watchdog(guest, 1, 0) == 0
    fails(errno.EINVAL, watchdog, guest, 1, 10)
    guest.pcpu.run_for(15 * S)
    assert watchdog(guest, 2, 20) == 0  # fed
    guest.pcpu.run_for(19 * S)
    assert not guest.domain.is_shut_down
    guest.pcpu.run_for(2 * S)
    assert guest.domain.is_shut_down
    assert guest.domain.shutdown_code == ShutdownCode.WATCHDOG
    assert guest.hypervisor.log.lines == ["Watchdog timer fired for domain 1"]


def test_a_destroyed_domain_leaves_no_timers() -> None:
    guest = Guest()
    watchdog(guest, 0, 10)
    do_set_timer_op(guest.vcpu.pv, 5 * S)
    guest.hypervisor.scheduler.domain_pause(guest.domain)
    guest.pcpu.run_for(100 * MS)
    guest.hypervisor.scheduler.vcpu_destroy(guest.vcpu)
    guest.hypervisor.scheduler.domain_destroy(guest.domain)
    assert [timer for timer in (guest.vcpu.singleshot_timer, guest.vcpu.poll_timer) if timer.active] == []
    guest.pcpu.run_for(S)
    assert guest.pcpu.timers.next_deadline() is None


# --- pausing ----------------------------------------------------------------------------------------------------


def test_pause_counts_and_too_many_unpauses_are_our_bug() -> None:
    guest = Guest()
    scheduler = guest.hypervisor.scheduler
    scheduler.vcpu_pause(guest.vcpu)
    scheduler.vcpu_pause_nosync(guest.vcpu)
    guest.pcpu.run_for(MS)
    assert guest.pcpu.current is None
    assert guest.vcpu.runstate is RunState.OFFLINE
    scheduler.vcpu_unpause(guest.vcpu)
    guest.pcpu.run_for(MS)
    assert guest.pcpu.current is None
    scheduler.vcpu_unpause(guest.vcpu)
    guest.pcpu.run_for(MS)
    assert guest.pcpu.current is guest.vcpu
    with pytest.raises(InternalError):
        scheduler.vcpu_unpause(guest.vcpu)
    with pytest.raises(InternalError):
        scheduler.domain_unpause(guest.domain)


def test_blocked_dominates_offline() -> None:
    """vcpu.h: a blocked vCPU that is paused stays 'blocked'; woken while paused it is 'offline'."""
    guest = Guest()
    guest.sched_op(SchedOp.BLOCK)
    guest.pcpu.run_for(MS)
    guest.hypervisor.scheduler.domain_pause(guest.domain)
    assert guest.vcpu.runstate is RunState.BLOCKED
    guest.hypervisor.scheduler.vcpu_unblock(guest.vcpu)
    assert guest.vcpu.runstate is RunState.OFFLINE
    guest.hypervisor.scheduler.domain_unpause(guest.domain)
    assert guest.vcpu.runstate is RunState.RUNNABLE


def test_runstate_times_add_up_to_system_time() -> None:
    hypervisor, pcpu = host()
    domains = [hypervisor.new_domain() for _ in range(3)]
    begin = hypervisor.clock.now_ns()
    for domain in domains:
        pcpu.load(domain, hog)
    pcpu.run_for(3 * S + 17)
    for domain in domains:
        assert sum(hypervisor.scheduler.runstate(domain.vcpus[0])[2]) == hypervisor.clock.now_ns() - begin


# --- vcpu_op ----------------------------------------------------------------------------------------------------


def test_up_down_and_is_up() -> None:
    guest = Guest(vcpus=2)
    other = guest.domain.vcpus[1]
    assert guest.vcpu_op(VcpuOp.IS_UP, vcpu_id=1) == 1
    assert guest.vcpu_op(VcpuOp.DOWN, vcpu_id=1) == 0
    assert guest.vcpu_op(VcpuOp.IS_UP, vcpu_id=1) == 0
    assert other.runstate is RunState.OFFLINE
    assert guest.vcpu_op(VcpuOp.UP, vcpu_id=1) == 0
    assert guest.vcpu_op(VcpuOp.IS_UP, vcpu_id=1) == 1
    assert other.runstate is RunState.RUNNABLE
    assert other.pv.flushes == 1  # what it remembered of translations is old
    assert guest.vcpu_op(VcpuOp.UP, vcpu_id=1) == 0
    assert other.pv.flushes == 1
    other.is_initialised = False
    fails(errno.EINVAL, guest.vcpu_op, VcpuOp.UP, b"", 1)
    fails(errno.ENOENT, guest.vcpu_op, VcpuOp.UP, b"", 2)
    fails(errno.ENOENT, guest.vcpu_op, VcpuOp.IS_UP, b"", 0xFFFFFFFF)
    fails(errno.ENOSYS, guest.vcpu_op, 99)


def test_initialise_errors() -> None:
    guest = Guest(vcpus=2)
    other = guest.domain.vcpus[1]
    context = bytes(5168)
    fails(errno.EEXIST, guest.vcpu_op, VcpuOp.INITIALISE, context, 1)
    fails(errno.EFAULT, do_vcpu_op, guest.vcpu.pv, VcpuOp.INITIALISE, 1, 0x1000)
    other.info_maddr = 0
    fails(errno.EINVAL, guest.vcpu_op, VcpuOp.INITIALISE, context, 1)


def test_get_runstate_info_counts_up_to_now() -> None:
    guest = Guest()
    guest.pcpu.run_for(5 * MS)
    do_vcpu_op(guest.vcpu.pv, VcpuOp.GET_RUNSTATE_INFO, 0, BUFFER)
    state, since, *times = RUNSTATE_INFO.unpack(guest.vcpu.pv.read(BUFFER, 48))
    assert (state, since, times) == (0, 0, [6 * MS, 0, 0, 0])


def test_singleshot_timer() -> None:
    guest = Guest(vcpus=2)
    now = guest.hypervisor.clock.now_ns()
    request = struct.Struct("<QI4x")
    guest.vcpu_op(VcpuOp.SET_SINGLESHOT_TIMER, request.pack(now + 3 * MS, 1))
    guest.pcpu.run_until(now + 3 * MS - 1)
    assert guest.timer_ticks() == 0
    guest.pcpu.run_until(now + 3 * MS)
    assert guest.timer_ticks() == 1
    fails(errno.ETIME, guest.vcpu_op, VcpuOp.SET_SINGLESHOT_TIMER, request.pack(now, 1))
    guest.vcpu_op(VcpuOp.SET_SINGLESHOT_TIMER, request.pack(now, 0))  # the past, without the flag: at once
    guest.pcpu.run_for(1)
    assert guest.timer_ticks() == 2
    guest.vcpu_op(VcpuOp.SET_SINGLESHOT_TIMER, request.pack(now + S, 0))
    guest.vcpu_op(VcpuOp.STOP_SINGLESHOT_TIMER)
    guest.pcpu.run_for(2 * S)
    assert guest.timer_ticks() == 2
    fails(errno.EINVAL, guest.vcpu_op, VcpuOp.SET_SINGLESHOT_TIMER, request.pack(now, 0), 1)
    fails(errno.EINVAL, guest.vcpu_op, VcpuOp.STOP_SINGLESHOT_TIMER, b"", 1)


def test_periodic_timer_ticks_while_running_only() -> None:
    guest = Guest()
    period = struct.Struct("<Q")
    fails(errno.EINVAL, guest.vcpu_op, VcpuOp.SET_PERIODIC_TIMER, period.pack(999_999))
    fails(errno.EINVAL, guest.vcpu_op, VcpuOp.SET_PERIODIC_TIMER, period.pack(1 << 63))
    guest.vcpu_op(VcpuOp.SET_PERIODIC_TIMER, period.pack(10 * MS))
    guest.pcpu.run_for(S)
    assert guest.timer_ticks() == pytest.approx(100, abs=1)
    guest.hypervisor.memory.b[guest.vcpu.info_maddr] = 0  # the guest handled them
    guest.sched_op(SchedOp.BLOCK)
    before = guest.timer_ticks()
    guest.pcpu.run_for(S)
    assert guest.timer_ticks() == before
    guest.hypervisor.scheduler.vcpu_unblock(guest.vcpu)
    guest.pcpu.run_for(1)
    vcpu_periodic_timer_work(guest.vcpu)  # the context switch does this
    assert guest.timer_ticks() == before + 1  # what fell due meanwhile is one tick
    guest.vcpu_op(VcpuOp.STOP_PERIODIC_TIMER)
    guest.pcpu.run_for(S)
    assert guest.timer_ticks() == before + 1


def test_set_timer_op() -> None:
    guest = Guest()
    now = guest.hypervisor.clock.now_ns()
    do_set_timer_op(guest.vcpu.pv, now + MS)
    guest.pcpu.run_for(2 * MS)
    assert guest.timer_ticks() == 1
    do_set_timer_op(guest.vcpu.pv, now + S)
    do_set_timer_op(guest.vcpu.pv, 0)
    guest.pcpu.run_for(2 * S)
    assert guest.timer_ticks() == 1
    # Wrapped numbers: not at once, not in 13 days.
    for odd in ((1 << 64) - 5, 1 << 63, guest.hypervisor.clock.now_ns() + (1 << 51)):
        do_set_timer_op(guest.vcpu.pv, odd)
        assert guest.vcpu.singleshot_timer.deadline_ns == guest.hypervisor.clock.now_ns() + 100 * MS


def test_nmi_and_physid() -> None:
    guest = Guest(vcpus=2)
    guest.vcpu_op(VcpuOp.SEND_NMI)
    assert guest.vcpu.nmi_pending
    assert guest.pcpu.kicks == 1
    fails(errno.EINVAL, guest.vcpu_op, VcpuOp.SEND_NMI, b"x")
    fails(errno.EINVAL, guest.vcpu_op, VcpuOp.GET_PHYSID)
    sleeper = guest.domain.vcpus[1]
    guest.hypervisor.scheduler.vcpu_kick(sleeper)
    assert guest.pcpu.kicks == 1


# --- areas in guest memory --------------------------------------------------------------------------------------


def area(guest: Guest) -> tuple[int, ...]:
    return RUNSTATE_INFO.unpack(guest.vcpu.pv.read(BUFFER + 0x100, 48))


def test_runstate_area_is_filled_at_registration_and_each_switch() -> None:
    guest = Guest()
    guest.vcpu_op(VcpuOp.REGISTER_RUNSTATE_MEMORY_AREA, struct.pack("<Q", BUFFER + 0x100))
    assert area(guest)[:3] == (0, 0, MS)
    guest.sched_op(SchedOp.BLOCK)
    guest.pcpu.run_for(S)
    guest.events.upcall(guest.vcpu)
    guest.pcpu.run_for(1)
    runstate.update_runstate_area(guest.vcpu)  # the pCPU's context switch does this
    assert area(guest) == (0, S + MS, MS, 0, S, 0)


def test_runstate_area_is_written_in_one_go_so_that_no_vcpu_can_see_it_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """The flag that a guest asks for with VMASST_TYPE_runstate_update_flag would be set and clear again in there."""
    guest = Guest()
    guest.vcpu.runstate_guest_va = BUFFER + 0x100
    seen: list[int] = []
    write = guest.vcpu.pv.write

    def watch(address: int, data: bytes) -> None:
        write(address, data)
        seen.append(area(guest)[1] >> 63)

    monkeypatch.setattr(guest.vcpu.pv, "write", watch)
    runstate.update_runstate_area(guest.vcpu)
    assert seen == [0]
    seen.clear()
    guest.domain.vm_assist = 1 << VmAssist.RUNSTATE_UPDATE_FLAG
    runstate.update_runstate_area(guest.vcpu)
    assert seen == [0]
    assert not area(guest)[1] & XEN_RUNSTATE_UPDATE


def test_runstate_area_is_written_for_a_vcpu_in_user_mode_and_a_bad_one_ignored() -> None:
    guest = Guest()
    guest.vcpu.runstate_guest_va = BUFFER + 0x100
    guest.vcpu.pv.kernel_mode = False
    runstate.update_runstate_area(guest.vcpu)
    assert not guest.vcpu.pv.kernel_mode
    guest.vcpu.pv.kernel_mode = True
    assert area(guest)[0] == RunState.RUNNING
    guest.vcpu_op(VcpuOp.REGISTER_RUNSTATE_MEMORY_AREA, struct.pack("<Q", 0x1000))  # unmapped: accepted, as in Xen
    runstate.update_runstate_area(guest.vcpu)
    with pytest.raises(GuestAccessError):
        guest.vcpu.pv.read(0x1000, 1)
    for address in (0xFFFF800000000000, 0xFFFF87FFFFFFFFFF, 0xFFFF7FFFFFFFFFE0, (1 << 64) - 8):
        fails(errno.EFAULT, guest.vcpu_op, VcpuOp.REGISTER_RUNSTATE_MEMORY_AREA, struct.pack("<Q", address))


def test_time_info_follows_the_version_protocol_and_has_a_second_copy() -> None:
    guest = Guest()
    at = guest.vcpu.info_maddr + VI_TIME
    memory = guest.hypervisor.memory
    memory.d[at >> 2] = 0xFFFFFFFF  # a hostile or wrapping version
    guest.vcpu_op(VcpuOp.REGISTER_VCPU_TIME_MEMORY_AREA, struct.pack("<Q", BUFFER + 0x200))
    version, tsc, system, mul, shift, flags = VCPU_TIME_INFO.unpack(memory.read(at, 32))
    assert version % 2 == 0
    assert flags == 0
    assert (mul, shift, tsc) == guest.hypervisor.tsc
    assert system == 0
    assert (1_000_000 << shift if shift >= 0 else 1_000_000 >> -shift) * mul >> 32 == pytest.approx(1_000_000, abs=2)
    assert guest.vcpu.pv.read(BUFFER + 0x200, 32)[8:] == memory.read(at + 8, 24)


def test_wallclock_is_the_unix_time_of_the_hosts_start() -> None:
    guest = Guest()
    guest.domain.shared_info_mfn = 3
    guest.domain.time_offset_s = 3600
    guest.hypervisor.clock.advance(1_234_567)
    update_domain_wallclock(guest.domain)
    version, sec, nsec, high = struct.unpack("<4I", guest.hypervisor.memory.read(3 * 4096 + 3072, 16))
    assert version == 2
    assert (high << 32 | sec, nsec) == (1_450_000_000 + 3600, 0)


def test_vcpus_are_down_until_somebody_brings_them_up() -> None:
    hypervisor, pcpu = host()
    domain: Domain = hypervisor.new_domain(up=False)
    vcpu: Vcpu = domain.vcpus[0]
    assert vcpu.pause_flags == VPF_DOWN
    hypervisor.scheduler.vcpu_unblock(vcpu)
    hypervisor.scheduler.vcpu_wake(vcpu)
    pcpu.run_for(MS)
    assert pcpu.current is None
