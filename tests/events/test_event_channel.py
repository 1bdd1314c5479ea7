# SPDX-License-Identifier: GPL-2.0-only
"""Rules of xen/common/event_channel.c, one test each."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from pyxen.abi.event_channel import EvtchnStat
from pyxen.abi.xen import DOMID_SELF, DomId, Virq
from pyxen.errors import XenError
from pyxen.hypervisor.domain import Domain, Dying
from pyxen.hypervisor.event_channel import (
    NR_PIRQS,
    State,
    alloc_unbound_xen_event_channel,
    free_xen_event_channel,
    notify_via_xen_event_channel,
)
from pyxen.hypervisor.hypercall import Preempted
from pyxen.hypervisor.virq import GlobalVirqs, send_guest_global_virq, send_guest_vcpu_virq, virq_is_global
from tests.events.fake_hypervisor import FakeCaller, FakeHypervisor


@contextmanager
def refused(number: int) -> Iterator[None]:
    with pytest.raises(XenError) as caught:
        yield
    assert caught.value.errno == number


def connect(one: Domain, two: Domain) -> tuple[int, int]:
    """An interdomain channel between two domains: their ports."""
    port1 = one.evtchn.alloc_unbound(two.domid, one)
    return port1, two.evtchn.bind_interdomain(one, port1)


# --- allocation ---------------------------------------------------------------------------------


def test_ports_start_at_one_and_the_lowest_free_one_is_reused(one: Domain) -> None:
    ports = [one.evtchn.bind_ipi(0) for _ in range(5)]
    assert ports == [1, 2, 3, 4, 5]
    one.evtchn.close(4)
    one.evtchn.close(2)
    assert [one.evtchn.bind_ipi(0) for _ in range(3)] == [2, 4, 6]


def test_port_zero_is_reserved(one: Domain) -> None:
    with refused(errno.EINVAL):
        one.evtchn.close(0)
    assert one.evtchn.channel(0).state is State.RESERVED


def test_two_level_ends_at_4096_ports(one: Domain) -> None:
    for _ in range(4095):
        one.evtchn.bind_ipi(0)
    with refused(errno.ENOSPC):
        one.evtchn.bind_ipi(0)
    one.evtchn.close(77)
    assert one.evtchn.bind_ipi(0) == 77


def test_set_max_evtchn_limits_the_highest_port(one: Domain) -> None:
    one.evtchn.max_port = 3
    assert [one.evtchn.bind_ipi(0) for _ in range(3)] == [1, 2, 3]
    with refused(errno.ENOSPC):
        one.evtchn.alloc_unbound(DomId(0), one)


def test_buckets_grow_when_needed(one: Domain) -> None:
    assert not one.evtchn.port_is_valid(128)
    for _ in range(128):
        one.evtchn.bind_ipi(0)
    assert one.evtchn.port_is_valid(255)
    assert not one.evtchn.port_is_valid(256)


def test_a_dying_domain_gets_no_port(one: Domain) -> None:
    one.dying = Dying.DYING
    with refused(errno.EINVAL):
        one.evtchn.bind_ipi(0)


# --- alloc_unbound, bind_interdomain -----------------------------------------------------------------


def test_alloc_unbound_remote_self_means_the_caller(host: FakeHypervisor, one: Domain) -> None:
    port = one.evtchn.alloc_unbound(DOMID_SELF, host.dom0)
    assert one.evtchn.channel(port).remote_domid == 0


def test_alloc_unbound_asks_xsm_before_it_allocates(host: FakeHypervisor, one: Domain, two: Domain) -> None:
    host.xsm.refuse.add("evtchn_unbound")
    with refused(errno.EPERM):
        two.evtchn.alloc_unbound(DomId(1), one)
    assert [chn.port for chn in two.evtchn.channels()] == [0]


def test_bind_interdomain_connects_both_ends(one: Domain, two: Domain) -> None:
    port1, port2 = connect(one, two)
    assert one.evtchn.status(port1, one) == (EvtchnStat.INTERDOMAIN, 0, 2, port2)
    assert two.evtchn.status(port2, two) == (EvtchnStat.INTERDOMAIN, 0, 1, port1)


def test_bind_interdomain_loopback(one: Domain) -> None:
    port1, port2 = connect(one, one)
    assert one.evtchn.status(port1, one) == (EvtchnStat.INTERDOMAIN, 0, 1, port2)
    one.evtchn.close(port1)
    assert one.evtchn.status(port2, one)[0] is EvtchnStat.UNBOUND


def test_bind_interdomain_always_sets_the_local_port_pending(one: Domain, two: Domain) -> None:
    port1, port2 = connect(one, two)
    assert two.evtchn.is_pending(port2)
    assert not one.evtchn.is_pending(port1)


@pytest.mark.parametrize("why", ["not ours", "bound", "free", "never allocated", "ipi"])
def test_bind_interdomain_refuses_a_port_that_does_not_wait_for_us(
        host: FakeHypervisor, one: Domain, two: Domain, why: str) -> None:
    match why:
        case "not ours":
            port = one.evtchn.alloc_unbound(DomId(3), one)
        case "bound":
            port = connect(one, two)[0]
        case "free":
            port = 99
        case "never allocated":
            port = 4000
        case _:
            port = one.evtchn.bind_ipi(0)
    before = len(list(two.evtchn.channels()))
    with refused(errno.EINVAL):
        two.evtchn.bind_interdomain(one, port)
    assert len(list(two.evtchn.channels())) == before


def test_bind_interdomain_asks_xsm(host: FakeHypervisor, one: Domain, two: Domain) -> None:
    port = one.evtchn.alloc_unbound(two.domid, one)
    host.xsm.refuse.add("evtchn_interdomain")
    with refused(errno.EPERM):
        two.evtchn.bind_interdomain(one, port)
    assert one.evtchn.channel(port).state is State.UNBOUND


# --- VIRQs, IPIs, pIRQs ------------------------------------------------------------------------------


@pytest.mark.parametrize("virq", [Virq.TIMER, Virq.DEBUG, Virq.XENOPROF, Virq.XENPMU])
def test_per_vcpu_virqs(virq: Virq, one: Domain) -> None:
    assert not virq_is_global(virq)
    assert one.evtchn.bind_virq(virq, 1)


@pytest.mark.parametrize("virq", [Virq.CONSOLE, Virq.DOM_EXC, Virq.CON_RING, Virq.ARCH_0, 23])
def test_global_virqs_bind_on_vcpu_0_only(virq: int, one: Domain) -> None:
    with refused(errno.EINVAL):
        one.evtchn.bind_virq(virq, 1)
    assert one.evtchn.bind_virq(virq, 0)


def test_a_virq_binds_once_per_vcpu(one: Domain) -> None:
    port = one.evtchn.bind_virq(Virq.TIMER, 0)
    with refused(errno.EEXIST):
        one.evtchn.bind_virq(Virq.TIMER, 0)
    one.evtchn.bind_virq(Virq.TIMER, 1)
    one.evtchn.close(port)
    assert one.evtchn.bind_virq(Virq.TIMER, 0) == port


def test_bind_virq_and_ipi_check_their_numbers(one: Domain) -> None:
    with refused(errno.EINVAL):
        one.evtchn.bind_virq(24, 0)
    with refused(errno.ENOENT):
        one.evtchn.bind_virq(Virq.TIMER, 2)
    with refused(errno.ENOENT):
        one.evtchn.bind_ipi(0xFFFFFFFF)


def test_bind_pirq_is_refused(one: Domain) -> None:
    with refused(errno.EPERM):
        one.evtchn.bind_pirq(NR_PIRQS - 1, 0)
    with refused(errno.EINVAL):
        one.evtchn.bind_pirq(NR_PIRQS, 0)


def test_virqs_reach_the_port_they_are_bound_to(one: Domain) -> None:
    send_guest_vcpu_virq(one.vcpus[1], Virq.TIMER)  # unbound: lost
    timer = one.evtchn.bind_virq(Virq.TIMER, 1)
    con = one.evtchn.bind_virq(Virq.CONSOLE, 0)
    assert not one.evtchn.is_pending(timer)
    send_guest_vcpu_virq(one.vcpus[1], Virq.TIMER)
    send_guest_global_virq(one, Virq.CONSOLE)
    assert one.evtchn.is_pending(timer)
    assert one.evtchn.is_pending(con)


def test_a_global_virq_moved_by_bind_vcpu_still_closes_cleanly(one: Domain) -> None:
    port = one.evtchn.bind_virq(Virq.CONSOLE, 0)
    one.evtchn.bind_vcpu(port, 1)
    send_guest_global_virq(one, Virq.CONSOLE)
    assert one.vcpus[1] in one.hypervisor.scheduler.woken  # type: ignore[attr-defined]
    one.evtchn.close(port)
    assert one.evtchn.bind_virq(Virq.CONSOLE, 0) == port


def test_global_virqs_of_the_host_go_to_their_handler(host: FakeHypervisor, one: Domain) -> None:
    virqs = GlobalVirqs(host)  # type: ignore[arg-type]
    port0 = host.dom0.evtchn.bind_virq(Virq.DOM_EXC, 0)
    port1 = one.evtchn.bind_virq(Virq.DOM_EXC, 0)
    virqs.send(Virq.DOM_EXC)
    assert host.dom0.evtchn.is_pending(port0)
    assert not one.evtchn.is_pending(port1)
    virqs.set_handler(one, Virq.DOM_EXC)
    virqs.send(Virq.DOM_EXC)
    assert one.evtchn.is_pending(port1)
    got: list[int] = []
    host.dom0.evtchn.bind_consumer(port0, got.append)
    virqs.forget(one)
    virqs.send(Virq.DOM_EXC)
    assert got == [port0, port0]
    with refused(errno.EINVAL):
        virqs.set_handler(one, Virq.TIMER)


# --- bind_vcpu ------------------------------------------------------------------------------------------


def test_bind_vcpu_moves_what_may_move(one: Domain, two: Domain) -> None:
    port1, _ = connect(one, two)
    unbound = one.evtchn.alloc_unbound(two.domid, one)
    for port in (port1, unbound, one.evtchn.bind_virq(Virq.CONSOLE, 0)):
        one.evtchn.bind_vcpu(port, 1)
        assert one.evtchn.status(port, one)[1] == 1


def test_bind_vcpu_refuses_ipis_per_vcpu_virqs_and_free_ports(one: Domain) -> None:
    for port in (one.evtchn.bind_ipi(0), one.evtchn.bind_virq(Virq.TIMER, 0), 50, 100000):
        with refused(errno.EINVAL):
            one.evtchn.bind_vcpu(port, 1)
    with refused(errno.ENOENT):
        one.evtchn.bind_vcpu(1, 2)


def test_a_reused_port_notifies_vcpu_0_again(one: Domain) -> None:
    port = one.evtchn.alloc_unbound(DomId(2), one)
    one.evtchn.bind_vcpu(port, 1)
    one.evtchn.close(port)
    assert one.evtchn.status(one.evtchn.alloc_unbound(DomId(2), one), one)[1] == 0


# --- close ------------------------------------------------------------------------------------------------


def test_closing_one_end_leaves_the_other_waiting_for_the_same_domain(one: Domain, two: Domain) -> None:
    port1, port2 = connect(one, two)
    two.evtchn.close(port2)
    assert one.evtchn.status(port1, one) == (EvtchnStat.UNBOUND, 0, 2, 0)
    assert two.evtchn.status(port2, two)[0] is EvtchnStat.CLOSED
    assert two.evtchn.bind_interdomain(one, port1) == port2


def test_close_refuses_free_ports(one: Domain) -> None:
    for port in (1, 127, 128, 1 << 31):
        with refused(errno.EINVAL):
            one.evtchn.close(port)


def test_a_freed_port_loses_its_pending_event(one: Domain) -> None:
    port = one.evtchn.bind_ipi(0)
    one.evtchn.send(port)
    one.evtchn.close(port)
    assert not one.evtchn.is_pending(one.evtchn.bind_ipi(0))


def test_reset_closes_everything_but_xen_attached_ports(host: FakeHypervisor, one: Domain, two: Domain) -> None:
    connect(one, two)
    one.evtchn.bind_virq(Virq.TIMER, 0)
    xen = alloc_unbound_xen_event_channel(one, DomId(0), lambda domain, port: None)
    one.evtchn.reset(FakeCaller(one), ())
    assert [chn.port for chn in one.evtchn.channels()] == [0, xen]
    assert one.evtchn.bind_virq(Virq.TIMER, 0)


def test_reset_is_preemptible_and_ends(one: Domain) -> None:
    for _ in range(1000):
        one.evtchn.bind_ipi(0)
    caller = FakeCaller(one)
    rounds = 0
    while True:
        caller.preempt_at = 1  # long ago: every round may close nothing but must say so
        try:
            if rounds:
                caller.preempt_at = 0
            one.evtchn.reset(caller, (10, 0x1000))
            break
        except Preempted as preempted:
            assert preempted.arguments == (10, 0x1000)
            rounds += 1
            assert rounds < 1000
    assert rounds >= 1
    assert [chn.port for chn in one.evtchn.channels()] == [0]


def test_destroy_closes_in_steps_and_frees_the_other_ends(host: FakeHypervisor, one: Domain, two: Domain) -> None:
    for _ in range(150):
        connect(one, two)
    alloc_unbound_xen_event_channel(one, DomId(0), lambda domain, port: None)
    one.dying = Dying.DYING
    steps = 0
    while not one.evtchn.destroy(budget=100):
        steps += 1
    assert steps == 2
    assert all(chn.state is State.RESERVED for chn in one.evtchn.channels())
    assert {chn.state for chn in two.evtchn.channels()} == {State.RESERVED, State.UNBOUND}


# --- send ---------------------------------------------------------------------------------------------------


def test_send_reaches_the_other_end_only(one: Domain, two: Domain) -> None:
    port1, port2 = connect(one, two)
    two.evtchn.close(port2)
    assert two.evtchn.bind_interdomain(one, port1) == port2
    two.evtchn.send(port2)
    assert one.evtchn.is_pending(port1)


def test_send_on_an_unbound_port_is_swallowed(one: Domain) -> None:
    port = one.evtchn.alloc_unbound(DomId(2), one)
    one.evtchn.send(port)
    assert not one.evtchn.is_pending(port)


def test_send_refuses_free_ports_and_virqs(one: Domain) -> None:
    for port in (0, 5, 4096, one.evtchn.bind_virq(Virq.TIMER, 0)):
        with refused(errno.EINVAL):
            one.evtchn.send(port)


def test_send_asks_xsm(host: FakeHypervisor, one: Domain) -> None:
    port = one.evtchn.bind_ipi(0)
    host.xsm.refuse.add("evtchn_send")
    with refused(errno.EPERM):
        one.evtchn.send(port)
    assert not one.evtchn.is_pending(port)


# --- channels that end in the hypervisor ----------------------------------------------------------------


def test_a_xen_attached_port_calls_its_consumer_and_is_out_of_the_guests_reach(
        host: FakeHypervisor, one: Domain, two: Domain) -> None:
    got: list[tuple[Domain, int]] = []
    port = alloc_unbound_xen_event_channel(one, two.domid, lambda domain, port: got.append((domain, port)))
    peer = two.evtchn.bind_interdomain(one, port)
    two.evtchn.send(peer)
    assert got == [(one, port)]
    for action in (one.evtchn.send, one.evtchn.close, lambda port: one.evtchn.bind_vcpu(port, 0)):
        with refused(errno.EINVAL):
            action(port)
    assert two.evtchn.is_pending(peer)  # from binding
    two.evtchn.abi.clear_pending(peer)
    notify_via_xen_event_channel(one, port)
    assert two.evtchn.is_pending(peer)
    free_xen_event_channel(one, port)
    free_xen_event_channel(one, port)
    assert two.evtchn.channel(peer).state is State.UNBOUND


def test_dom0_software_gets_events_through_its_consumer(host: FakeHypervisor, one: Domain) -> None:
    got: list[int] = []
    port1 = one.evtchn.alloc_unbound(DomId(0), one)
    port0 = host.dom0.evtchn.bind_interdomain(one, port1)
    host.dom0.evtchn.bind_consumer(port0, got.append)
    assert got == [port0]  # binding marks the port pending; the consumer came later and must not miss it
    one.evtchn.send(port1)
    assert got == [port0, port0]
    host.dom0.evtchn.send(port0)
    assert one.evtchn.is_pending(port1)
    host.dom0.evtchn.close(port0)
    one.evtchn.send(port1)
    assert got == [port0, port0]


def test_a_failing_consumer_does_not_hurt_the_sender(host: FakeHypervisor, one: Domain) -> None:
    def broken(port: int) -> None:
        raise RuntimeError("Event loop is closed")

    port1 = one.evtchn.alloc_unbound(DomId(0), one)
    port0 = host.dom0.evtchn.bind_interdomain(one, port1)
    host.dom0.evtchn.bind_consumer(port0, broken)
    one.evtchn.send(port1)
    assert any("Event loop is closed" in line for line in host.log.lines)


def test_consumers_attach_only_to_ports_in_use(host: FakeHypervisor) -> None:
    with refused(errno.EINVAL):
        host.dom0.evtchn.bind_consumer(5, lambda port: None)
