# SPDX-License-Identifier: GPL-2.0-only
"""HYPERVISOR_event_channel_op as a guest sees it: bytes in, bytes out."""

from __future__ import annotations

import errno
import struct

import pytest

from pyxen.abi.xen import DOMID_SELF, Virq
from pyxen.errors import GuestAccessError, XenError
from pyxen.hypervisor.domain import Domain
from pyxen.hypervisor.event_channel import State
from pyxen.hypervisor.event_channel_op import do_event_channel_op, do_event_channel_op_compat, dump_evtchn_info
from tests.events.fake_hypervisor import FakeCaller, FakeHypervisor

ARG = 0x1000
SELF = int(DOMID_SELF)


def op(caller: FakeCaller, cmd: int, layout: str, *values: int) -> tuple[int, ...]:
    """Do one operation and decode its structure afterwards."""
    caller.write(ARG, struct.pack(layout, *values))
    assert do_event_channel_op(caller, cmd, ARG) == 0
    return struct.unpack(layout, caller.read(ARG, struct.calcsize(layout)))


def test_a_channels_life(one: Domain, two: Domain) -> None:
    a, b = FakeCaller(one), FakeCaller(two)
    assert op(a, 6, "<HHI", SELF, 2, 0) == (SELF, 2, 1)  # alloc_unbound
    assert op(a, 5, "<HHIIIHHI", SELF, 0, 1, 0, 0, 0, 0, 0) == (SELF, 0, 1, 1, 0, 2, 0, 0)  # status: unbound, for d2
    assert op(b, 0, "<HHII", 1, 0, 1, 0) == (1, 0, 1, 1)  # bind_interdomain
    assert op(a, 5, "<HHIIIHHI", SELF, 0, 1, 0, 0, 0, 0, 0) == (SELF, 0, 1, 2, 0, 2, 0, 1)  # interdomain, d2 port 1
    op(b, 4, "<I", 1)  # send
    assert one.evtchn.is_pending(1)
    op(a, 8, "<II", 1, 1)  # bind_vcpu
    assert one.evtchn.channel(1).notify_vcpu_id == 1
    op(a, 9, "<I", 1)  # unmask
    op(b, 3, "<I", 1)  # close
    assert one.evtchn.channel(1).state is State.UNBOUND


def test_virqs_and_ipis(one: Domain) -> None:
    caller = FakeCaller(one)
    assert op(caller, 1, "<III", Virq.TIMER, 1, 0)[2] == 1
    assert op(caller, 7, "<II", 1, 0)[1] == 2
    assert op(caller, 5, "<HHIIIII", SELF, 0, 1, 0, 0, 99, 98)[3:] == (4, 1, 0, 98)
    assert op(caller, 5, "<HHIIIII", SELF, 0, 2, 0, 0, 99, 98)[3:] == (5, 1, 99, 98)


def test_reset_of_self(one: Domain) -> None:
    one.evtchn.bind_ipi(0)
    op(FakeCaller(one), 10, "<H", SELF)
    assert len(list(one.evtchn.channels())) == 1


@pytest.mark.parametrize(("cmd", "hook", "layout", "values"), [
    (6, "evtchn_unbound", "<HHI", (2, 1, 0)),
    (5, "evtchn_status", "<HHIIIII", (2, 0, 0, 0, 0, 0, 0)),
    (10, "evtchn_reset", "<H", (2,)),
])
def test_what_concerns_another_domain_passes_xsm(
        host: FakeHypervisor, one: Domain, two: Domain, cmd: int, hook: str, layout: str,
        values: tuple[int, ...]) -> None:
    host.xsm.refuse.add(hook)
    with pytest.raises(XenError) as caught:
        op(FakeCaller(one), cmd, layout, *values)
    assert caught.value.errno == errno.EPERM


@pytest.mark.parametrize("cmd", [11, 12, 13, 14, 0xFFFFFFFF])
def test_fifo_and_unknown_operations_are_not_there(one: Domain, cmd: int) -> None:
    with pytest.raises(XenError) as caught:
        do_event_channel_op(FakeCaller(one), cmd, ARG)
    assert caught.value.errno == errno.ENOSYS


@pytest.mark.parametrize("cmd", range(11))
def test_a_bad_pointer_is_efault(one: Domain, cmd: int) -> None:
    with pytest.raises(GuestAccessError):
        do_event_channel_op(FakeCaller(one), cmd, 0xFFFF_8000_0000_0000)


@pytest.mark.parametrize(("cmd", "layout", "values"), [
    (6, "<HHI", (77, 1, 0)), (0, "<HHII", (77, 0, 1, 0)), (5, "<HHIIIII", (77, 0, 0, 0, 0, 0, 0)), (10, "<H", (77,))])
def test_an_unknown_domain_is_esrch(one: Domain, cmd: int, layout: str, values: tuple[int, ...]) -> None:
    with pytest.raises(XenError) as caught:
        op(FakeCaller(one), cmd, layout, *values)
    assert caught.value.errno == errno.ESRCH


def test_the_old_hypercall_carries_command_and_structure_in_one(one: Domain) -> None:
    caller = FakeCaller(one)
    caller.write(ARG, struct.pack("<III", 7, 1, 0))  # bind_ipi on vCPU 1
    assert do_event_channel_op_compat(caller, ARG) == 0
    assert struct.unpack("<III", caller.read(ARG, 12)) == (7, 1, 1)
    caller.write_u32(ARG, 10)  # reset came later than the old call
    with pytest.raises(XenError) as caught:
        do_event_channel_op_compat(caller, ARG)
    assert caught.value.errno == errno.ENOSYS


def test_debug_key_e(host: FakeHypervisor, one: Domain) -> None:
    one.evtchn.bind_virq(Virq.TIMER, 0)
    one.evtchn.send(one.evtchn.bind_ipi(1))
    port = one.evtchn.alloc_unbound(host.dom0.domid, one)
    host.dom0.evtchn.bind_interdomain(one, port)
    one.evtchn.alloc_unbound(host.dom0.domid, one)
    dump_evtchn_info(host)  # type: ignore[arg-type]
    assert host.log.lines == [
        "'e' pressed -> dumping event-channel info",
        "Event channel information for domain 0:",
        "Polling vCPUs: {}",
        "    port [p/m/s]",
        "       1 [1/0/0]: s=3 n=0 x=0 d=1 p=3",
        "Event channel information for domain 1:",
        "Polling vCPUs: {}",
        "    port [p/m/s]",
        "       1 [0/0/0]: s=5 n=0 x=0 v=0",
        "       2 [1/0/1]: s=6 n=1 x=0",
        "       3 [0/0/0]: s=3 n=0 x=0 d=0 p=1",
        "       4 [0/0/0]: s=2 n=0 x=0 d=0",
    ]
