# SPDX-License-Identifier: GPL-2.0-only
"""Small hypercalls, the console ring, trace points, debug keys, the dummy XSM."""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable

import pytest

from pyxen.abi.arch_x86 import TRAP_INFO
from pyxen.abi.xen import Hypercall
from pyxen.errors import XenError
from pyxen.hypervisor import trace
from pyxen.hypervisor.conlog import RING_BYTES, ConsoleLog
from pyxen.hypervisor.domain import Domain
from pyxen.hypervisor.trace import Trace
from tests.hypervisor.rig import DATA_PFN, PAGES, Guest, Machine, va

HERE = va(DATA_PFN)


# --- xen_version -----------------------------------------------------------------------------------------


def test_versions(guest: Guest) -> None:
    version = Hypercall.XEN_VERSION
    assert guest.call(version, 0) == 4 << 16 | 6
    for command, size, start in ((1, 16, b".0-pyxen\0"), (2, 144, b"CPython\0"), (3, 1024, b"xen-3.0-x86_64 \0"),
                                 (4, 64, b""), (5, 8, struct.pack("<Q", 0xFFFF800000000000)),
                                 (8, 16, bytes(range(16))), (9, 1024, b"<denied>\0")):
        guest.put(HERE, b"\xee" * 1100)
        assert guest.call(version, command, HERE) == 0
        found = guest.get(HERE, 1100)
        assert found.startswith(start)
        assert found[size:] == b"\xee" * (1100 - size)
        assert guest.call(version, command, 0x1000) == -errno.EFAULT
    assert guest.call(version, 7) == 4096
    assert guest.call(version, 10) == -errno.ENOSYS


def test_features(guest: Guest) -> None:
    guest.put(HERE, struct.pack("<II", 0, 0))
    assert guest.call(Hypercall.XEN_VERSION, 6, HERE) == 0
    assert guest.get(HERE + 4, 4) == struct.pack("<I", 1 << 5 | 1 << 6 | 1 << 7)
    assert guest.call(Hypercall.VM_ASSIST, 0, 3) == 0
    guest.call(Hypercall.XEN_VERSION, 6, HERE)
    assert guest.get(HERE + 4, 1)[0] & 1 << 4
    guest.put(HERE, struct.pack("<I", 1))
    assert guest.call(Hypercall.XEN_VERSION, 6, HERE) == -errno.EINVAL


@pytest.mark.parametrize(("assist", "known"), [*((n, True) for n in (0, 1, 2, 3, 5, 32)),
                                               *((n, False) for n in (4, 6, 31, 33, 63, 64, 1 << 31))])
def test_vm_assist(exact: Guest, assist: int, known: bool) -> None:
    assert exact.call(Hypercall.VM_ASSIST, 0, assist) == (0 if known else -errno.EINVAL)
    if known:
        assert exact.domain.vm_assist >> assist & 1
        assert exact.call(Hypercall.VM_ASSIST, 1, assist) == 0
        assert not exact.domain.vm_assist >> assist & 1
        assert exact.call(Hypercall.VM_ASSIST, 2, assist) == -errno.ENOSYS


# --- callbacks and traps -----------------------------------------------------------------------------------


def test_trap_table(guest: Guest) -> None:
    table = Hypercall.SET_TRAP_TABLE
    guest.put(HERE, TRAP_INFO.pack(14, 4, 0xE030, 0x77) + TRAP_INFO.pack(255, 3, 0, 0x88) + bytes(16))
    assert guest.call(table, HERE) == 0
    assert guest.pv.trap_table[14] == (4, 0xE033, 0x77)
    assert guest.pv.trap_table[255] == (3, 3, 0x88)
    guest.put(HERE, TRAP_INFO.pack(1, 0, 0, 1 << 47))
    assert guest.call(table, HERE) == -errno.EINVAL
    assert guest.call(table, 0x1000) == -errno.EFAULT
    for pfn in (30, 31):
        guest.put(va(pfn), TRAP_INFO.pack(1, 0, 0, 1) * 256)
    assert guest.call(table, va(30)) == -errno.EINVAL  # no end to it
    assert guest.call(table, 0) == 0
    assert guest.pv.trap_table == [None] * 256


def test_callbacks(guest: Guest) -> None:
    op = Hypercall.CALLBACK_OP
    for kind, known in ((0, True), (1, True), (2, True), (3, False), (4, True), (5, True), (6, False), (7, True)):
        guest.put(HERE, struct.pack("<HH4xQ", kind, 1, 0x99000))
        assert guest.call(op, 0, HERE) == (0 if known else -errno.ENOSYS), kind
        guest.put(HERE, struct.pack("<HH4xQ", kind, 0, 1 << 47))
        assert guest.call(op, 0, HERE) == -errno.EINVAL
        guest.put(HERE, struct.pack("<HH", kind, 0))
        assert guest.call(op, 1, HERE) == (0 if kind == 4 else -errno.EINVAL if known else -errno.ENOSYS), kind
    pv = guest.pv
    assert pv.event_callback == pv.failsafe_callback == pv.syscall_callback == pv.sysenter_callback == 0x99000
    assert pv.failsafe_masks_events
    assert pv.syscall_masks_events
    assert guest.call(op, 2, HERE) == -errno.ENOSYS
    assert guest.call(Hypercall.SET_CALLBACKS, 1, 1 << 47, 3) == -errno.EINVAL
    assert pv.event_callback == 0x99000  # all or nothing
    assert guest.call(Hypercall.SET_CALLBACKS, 1, 2, 3) == 0
    assert (pv.event_callback, pv.failsafe_callback, pv.syscall_callback) == (1, 2, 3)
    assert guest.call(Hypercall.NMI_OP, 2, HERE) == -errno.ENOSYS


def test_stack_switch(guest: Guest) -> None:
    assert guest.call(Hypercall.STACK_SWITCH, 0x12348, va(25)) == 0
    assert (guest.pv.kernel_ss, guest.pv.kernel_sp) == (0x234B, va(25))
    guest.user()
    guest.fault(6)
    assert guest.machine.cpu.gpr[4] == va(25) - 56


def test_physdev_op(guest: Guest) -> None:
    op = Hypercall.PHYSDEV_OP
    guest.put(HERE, struct.pack("<I", 4))
    assert guest.call(op, 6, HERE) == -errno.EINVAL
    for bitmap, ports, result in ((va(30), 65536, 0), (va(30), 65537, -errno.EINVAL), (0, 0, 0),
                                  (0xFFFF800000000000, 8, -errno.EINVAL), ((1 << 64) - 1, 65536, -errno.EINVAL)):
        guest.put(HERE, struct.pack("<QI", bitmap, ports))
        assert guest.call(op, 7, HERE) == result
    assert guest.call(op, 6, 0x1000) == -errno.EFAULT
    assert guest.call(op, 12, HERE) == -errno.EINVAL
    assert guest.call(op, 28, HERE) == -errno.ENOSYS


# --- console -------------------------------------------------------------------------------------------------


def test_console_io(guest: Guest) -> None:
    guest.put(HERE, b"hello\x1b[2J\r\nwor")
    assert guest.call(Hypercall.CONSOLE_IO, 0, 14, HERE) == 0
    guest.put(HERE, b"ld\n")
    assert guest.call(Hypercall.CONSOLE_IO, 0, 3, HERE) == 0
    assert f"(d{guest.domid}) hello?[2J\n(d{guest.domid}) world\n" in guest.machine.log()
    assert guest.call(Hypercall.CONSOLE_IO, 0, 0xFFFFFFFF, va(PAGES) - 4) == -errno.EFAULT
    assert guest.call(Hypercall.CONSOLE_IO, 1, 3, HERE) == -errno.EPERM
    assert guest.call(Hypercall.CONSOLE_IO, 2, 3, HERE) == -errno.EPERM


def test_guests_cannot_push_the_hypervisors_lines_out(exact: Guest) -> None:
    exact.hv.log.printk("important")
    for pfn in range(30, 40):
        exact.put(va(pfn), b"x" * 100 + b"\n" + b"y" * 3995)
    for _ in range(30):
        assert exact.call(Hypercall.CONSOLE_IO, 0, 40960, va(30)) == 0
    log = exact.machine.log()
    assert "(XEN) important" in log
    assert len(log) <= RING_BYTES
    assert exact.hv.log.read(clear=True)
    assert exact.machine.log() == ""


def test_the_ring_keeps_order_and_whole_lines() -> None:
    log = ConsoleLog(lambda: 0)
    for i in range(3000):
        log.printk(f"line {i}")
        log.guest_write(1, f"guest {i}\n".encode())
    lines = log.read().decode().splitlines()
    own = [line for line in lines if line.startswith("(XEN) line ")]
    assert own[-1] == "(XEN) line 2999"
    assert [int(line.split()[-1]) for line in own] == list(range(3000 - len(own), 3000))
    assert lines[-2:] == ["(XEN) line 2999", "(d1) guest 2999"]
    assert sum(len(line) + 1 for line in lines) <= RING_BYTES


def test_a_line_about_a_guest_comes_ten_times_then_ten_a_second() -> None:
    now = [0]
    log = ConsoleLog(lambda: now[0])
    for _ in range(50):
        log.guest_printk(3, "again")
    assert log.read().count(b"again") == 10
    now[0] = 250_000_000
    log.guest_printk(3, "again")
    assert b"40 messages suppressed" in log.read()
    log.printk("a\nb\x1b")
    assert log.read().endswith(b"(XEN) a\n(XEN) b?\n")
    log.guest_write(3, b"no end")
    log.forget(3)
    assert log.read().endswith(b"(d3) no end\n")


# --- trace, keys, XSM ----------------------------------------------------------------------------------------


def test_trace_masks_match_class_and_subclass(host: Machine) -> None:
    found = Trace(host.clock, capacity=3)
    found.event(trace.TRC_SCHED_WAKE, None, 1)
    found.set_mask(trace.TRC_GEN)
    assert found.enabled
    found.event(trace.TRC_SCHED_RUNSTATE_CHANGE, None, 1)
    found.set_mask(0x00022000)
    found.event(trace.TRC_SCHED_RUNSTATE_CHANGE, None, 1)
    assert found.drain() == []
    for i in range(5):
        found.event(trace.TRC_SCHED_WAKE, None, i, -1)
    records = found.drain()
    assert found.lost == 2
    assert [struct.unpack("<IQII", r) for r in records] == [
        (trace.TRC_SCHED_WAKE | 2 << 28 | 1 << 31, 0, i, 0xFFFFFFFF) for i in (2, 3, 4)]
    assert found.drain() == []


def test_hypercalls_and_faults_are_trace_points(exact: Guest) -> None:
    exact.hv.trace.set_mask(trace.TRC_PV)
    exact.call(Hypercall.XEN_VERSION, 0)
    exact.machine.cpu.cr2 = 0x1234
    exact.fault(14, 4)
    codes = [struct.unpack_from("<I", r)[0] & 0x0FFFFFFF for r in exact.hv.trace.drain()]
    assert codes == [trace.TRC_PV_HYPERCALL_V2, trace.TRC_PV_PAGE_FAULT]


@pytest.mark.parametrize(
    ("key", "words"),
    [("q", ("General information for domain 1", "VCPU0")), ("e", ("Event channel information for domain 1",)),
     ("g", ("gnttab",)), ("r", ("credit",)), ("d", ("RIP: 000000000040a000", "d1v0")), ("m", ("kB free",)),
     ("h", ("key 'q'", "dump domain")), ("?", ())])
def test_debug_keys(exact: Guest, key: str, words: tuple[str, ...]) -> None:
    exact.machine.cpu.unload()
    exact.hv.log.read(clear=True)
    exact.machine.privcmd.debug_keys(key)
    log = exact.machine.log()
    assert all(word in log for word in words), log
    assert bool(log) is bool(words)


def test_dummy_xsm(host: Machine) -> None:
    xsm, dom0 = host.hv.xsm, host.hv.dom0
    one, two = host.guest("exact").domain, host.guest("exact").domain
    hooks: tuple[Callable[[Domain, Domain], None], ...] = (
        xsm.memory_adjust_reservation, xsm.memory_stat_reservation, xsm.memory_exchange, xsm.add_to_physmap,
        xsm.remove_from_physmap, xsm.domain_memory_map, xsm.mmuext_op, xsm.update_va_mapping,
        xsm.schedop_shutdown, xsm.grant_setup, xsm.grant_query_size, xsm.evtchn_reset,
    )
    for hook in hooks:
        hook(one, one)
        hook(dom0, one)
        with pytest.raises(XenError) as caught:
            hook(one, two)
        assert caught.value.errno == errno.EPERM
    refusals: tuple[Callable[[], None], ...] = (
        lambda: xsm.domctl(one, one, 1), lambda: xsm.sysctl(one, 1), lambda: xsm.claim_pages(one),
        lambda: xsm.platform_op(one, 1), lambda: xsm.machine_memory_map(one), lambda: xsm.readconsole(one, False),
        lambda: xsm.mmu_update(one, two, one), lambda: xsm.evtchn_unbound(one, two, None, 0),
    )
    for refused in refusals:
        with pytest.raises(XenError):
            refused()
