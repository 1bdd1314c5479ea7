# SPDX-License-Identifier: GPL-2.0-only
"""Hypercall dispatch: what is there and what is not, multicalls, continuations, and bugs of ours."""

from __future__ import annotations

import errno
import struct

import pytest

from pyxen.abi.xen import MULTICALL_ENTRY, Hypercall
from pyxen.errors import GuestFault
from pyxen.hypervisor.hypercall import Entry, Preempted
from pyxen.hypervisor.hypercall_table import build_table
from pyxen.machine.cpu.base import RAX
from pyxen.machine.cpu.scripted import Spin, Syscall
from tests.hypervisor.rig import DATA_PFN, SYSCALL, Guest, Machine, va

HERE = va(DATA_PFN)
ENOSYS = -errno.ENOSYS


def test_every_number_without_a_handler_is_enosys(guest: Guest) -> None:
    table = guest.pv.traps.table
    for number in [*range(64), 64, 1000, 1 << 31, 1 << 32 | int(Hypercall.XEN_VERSION), (1 << 64) - 1]:
        if number >= 64 or (table[number] is None and number != Hypercall.IRET):
            assert guest.call(number) == ENOSYS, number
    assert not guest.domain.is_shut_down
    assert 20 < sum(entry is not None for entry in table) < 45


def test_it_is_said_once_for_each_number_if_one_wants_to_know(exact: Guest) -> None:
    exact.call(41)
    assert "not implemented" not in exact.machine.log()
    exact.machine.hv.log.verbose = True
    for _ in range(3):
        exact.call(40)
        exact.call(12345)
        exact.call(99999)
    assert exact.machine.log().count("not implemented") == 2


def test_arguments_and_counters(exact: Guest) -> None:
    seen: list[tuple[int, ...]] = []

    def handler(_caller: object, *arguments: int) -> int:
        seen.append(arguments)
        return -(1 << 63)

    exact.pv.traps.table[50] = Entry("test", handler, 6)
    assert exact.call(50, 1, 2, 3, 4, 5, (1 << 64) - 1) == -(1 << 63)
    assert seen == [(1, 2, 3, 4, 5, (1 << 64) - 1)]
    exact.call(Hypercall.XEN_VERSION, 0)
    exact.call(Hypercall.XEN_VERSION, 0)
    counters = exact.machine.privcmd.counters(exact.domid)
    assert counters["hypercall_xen_version"] == 2
    assert counters["hypercalls"] == 3


@pytest.mark.parametrize("number", [Hypercall.DOMCTL, Hypercall.SYSCTL])
def test_control_hypercalls_of_a_guest_are_decoded_then_refused(exact: Guest, number: int) -> None:
    version = 0xB if number == Hypercall.DOMCTL else 0xC
    exact.put(HERE, struct.pack("<IIH", 2, version, exact.domid))
    assert exact.call(number, HERE) == -errno.EPERM
    exact.put(HERE, struct.pack("<IIH", 2, version + 1, exact.domid))
    assert exact.call(number, HERE) == -errno.EACCES
    assert exact.call(number, 0x1000) == -errno.EFAULT


def test_a_continuation_executes_the_instruction_again_and_events_come_in_between(guest: Guest) -> None:
    def handler(_caller: object, left: int, total: int) -> int:
        if left:
            raise Preempted((left - 1,))
        return total

    guest.pv.traps.table[50] = Entry("test", handler, 2)
    assert guest.call(50, 5, 77) == 77
    guest.regs(rax=50, rdi=2, rsi=9)
    guest.mask, guest.pending = 0, 1
    target = guest.pv.traps.syscall(0)  # the instruction is the last two bytes of the address space
    assert guest.frame(3)[2] == (1 << 64) - 2
    assert target == guest.pv.event_callback
    assert guest.machine.cpu.gpr[RAX] == 50


# --- multicalls --------------------------------------------------------------------------------------------


def calls(guest: Guest, *entries: tuple[int, ...]) -> list[int]:
    """Results of a multicall, and its own last."""
    data = b"".join(MULTICALL_ENTRY.pack(e[0], 0x5A, *e[1:], *[0] * (7 - len(e))) for e in entries)
    guest.put(HERE, data)
    result = guest.call(Hypercall.MULTICALL, HERE, len(entries))
    found = [r[1] for r in MULTICALL_ENTRY.iter_unpack(guest.get(HERE, len(data)))]
    return [*found, result]


def test_multicall(guest: Guest) -> None:
    assert calls(guest, (Hypercall.XEN_VERSION, 0), (40,), (Hypercall.IRET,), (Hypercall.MULTICALL, HERE, 1),
                 (Hypercall.XEN_VERSION, 7), (Hypercall.XEN_VERSION, 1, 0x10), (1 << 32 | 17, 0),
                 ) == [4 << 16 | 6, ENOSYS, ENOSYS, -errno.EINVAL, 4096, -errno.EFAULT, ENOSYS, 0]
    assert guest.call(Hypercall.MULTICALL, 0x1000, 1) == -errno.EFAULT
    assert guest.call(Hypercall.MULTICALL, 0x1000, 0) == 0


def test_a_multicall_goes_on_after_a_preempted_entry(guest: Guest) -> None:
    def handler(_caller: object, left: int, total: int) -> int:
        if left:
            raise Preempted((left - 1,))
        return total

    guest.pv.traps.table[50] = Entry("test", handler, 2)
    assert calls(guest, (50, 3, 11), (Hypercall.XEN_VERSION, 7), (50, 2, 12)) == [11, 4096, 12, 0]


def test_a_huge_multicall_is_preemptible(exact: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pyxen.hypervisor.misc_op.should_preempt", lambda _caller: True)
    exact.put(HERE, MULTICALL_ENTRY.pack(Hypercall.XEN_VERSION, 0, 7, 0, 0, 0, 0, 0) * 3)
    exact.regs(rdi=HERE, rsi=3, rax=Hypercall.MULTICALL)
    assert exact.pv.traps.syscall(0x400102) == 0x400100
    assert exact.machine.cpu.gpr[7] == HERE + MULTICALL_ENTRY.size
    assert exact.machine.cpu.gpr[6] == 2


# --- our own bugs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bug", [ZeroDivisionError("x\ny"), struct.error("s"), MemoryError(), RecursionError(), KeyError(1)])
def test_a_bug_of_ours_crashes_the_caller_only_and_logs_the_traceback(host: Machine, bug: Exception) -> None:
    good, bad = host.guest("exact"), host.guest("exact")

    def handler(_caller: object) -> int:
        raise bug

    bad.pv.traps.table = [*bad.pv.traps.table]
    bad.pv.traps.table[50] = Entry("test", handler, 0)
    bad.call(50)
    assert bad.domain.shutdown_code == 3
    assert not good.domain.is_shut_down
    log = host.log()
    assert "Traceback" in log
    assert type(bug).__name__ in log
    assert [line for line in log.splitlines() if "domain_crash" in line] == [
        f"(XEN) domain_crash called for d{bad.domid}: {bad.domain.crash_reason}"]
    assert "internal error in a hypercall" in bad.domain.crash_reason
    good.load()
    assert good.call(Hypercall.XEN_VERSION, 0) == 4 << 16 | 6


def test_a_guests_own_fault_logs_no_traceback(exact: Guest) -> None:
    def handler(_caller: object) -> int:
        raise GuestFault("it did so")

    exact.pv.traps.table[50] = Entry("test", handler, 0)
    exact.call(50)
    assert exact.domain.crash_reason == "it did so"
    assert "Traceback" not in exact.machine.log()


def test_a_second_domain_goes_on_while_one_crashes(host: Machine) -> None:
    """The same, with the engine's thread running both."""
    crashed, fine = host.guest("exact"), host.guest("exact")
    results: list[int] = []

    def bad(_cpu: object):  # type: ignore[no-untyped-def]
        yield Syscall(rax=50)
        yield Spin()

    def good(_cpu: object):  # type: ignore[no-untyped-def]
        while not crashed.domain.is_shut_down:
            yield Syscall(rax=int(Hypercall.SCHED_OP), rdi=0, rsi=0)
        for _ in range(3):
            results.append((yield Syscall(rax=int(Hypercall.XEN_VERSION), rdi=0, rsi=0)))
        fine.put(HERE, bytes(4))
        yield Syscall(rax=int(Hypercall.SCHED_OP), rdi=2, rsi=HERE)

    def handler(_caller: object) -> int:
        raise ZeroDivisionError

    crashed.pv.traps.table = [*crashed.pv.traps.table]
    crashed.pv.traps.table[50] = Entry("test", handler, 0)
    host.cpu.unload()
    for guest, script in ((crashed, bad), (fine, good)):
        guest.vcpu.context.script = script  # type: ignore[union-attr]
        guest.vcpu.cpu = None
    host.hv.start()
    for guest in (crashed, fine):
        host.privcmd.domain_unpause(guest.domid)
    wait_for(lambda: fine.domain.is_shut_down)
    assert crashed.domain.shutdown_code == 3
    assert fine.domain.shutdown_code == 0
    assert results == [4 << 16 | 6] * 3


def wait_for(condition, timeout: float = 10.0) -> None:  # type: ignore[no-untyped-def]
    import time

    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.001)


def test_dom0s_table_has_no_hypercall_that_needs_a_running_vcpu() -> None:
    table = build_table(guest=False)
    for number in (Hypercall.SET_TRAP_TABLE, Hypercall.STACK_SWITCH, Hypercall.SET_GDT, Hypercall.PHYSDEV_OP):
        assert table[number] is None
    assert build_table()[Hypercall.STACK_SWITCH] is not None


def test_user_mode_makes_no_hypercalls(guest: Guest) -> None:
    guest.user()
    guest.regs(rax=Hypercall.XEN_VERSION, rdi=0)
    assert guest.pv.traps.syscall(0x400102) == SYSCALL
    assert guest.domain.hypercall_counts[Hypercall.XEN_VERSION] == 0
