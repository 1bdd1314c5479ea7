# SPDX-License-Identifier: GPL-2.0-only
"""How events become visible to a guest: the 2-level bitmaps, posting from foreign threads, polling, vcpu_info."""

from __future__ import annotations

import errno
import threading

import pytest

from pyxen.abi.xen import (
    SHARED_EVTCHN_MASK,
    SHARED_EVTCHN_PENDING,
    VI_PENDING_SEL,
    VI_UPCALL_MASK,
    VI_UPCALL_PENDING,
    DomId,
    Virq,
)
from pyxen.errors import XenError
from pyxen.hypervisor.domain import Domain
from pyxen.hypervisor.vcpu import PauseFlag, Vcpu
from pyxen.hypervisor.vcpu_info import map_vcpu_info, unmap_vcpu_info
from pyxen.hypervisor.virq import send_guest_vcpu_virq
from tests.events.fake_hypervisor import PAGE, FakeCpu, FakeHypervisor


def elsewhere(action: object, *args: object) -> None:
    """Run ``action(*args)`` on another thread."""
    thread = threading.Thread(target=action, args=args)  # type: ignore[arg-type]
    thread.start()
    thread.join()


def pending_bit(domain: Domain, port: int) -> int:
    word = domain.hypervisor.memory.q[(domain.shared_info_mfn * PAGE + SHARED_EVTCHN_PENDING) // 8 + port // 64]
    return word >> port % 64 & 1


def set_mask(domain: Domain, port: int, masked: bool) -> None:
    index = (domain.shared_info_mfn * PAGE + SHARED_EVTCHN_MASK) // 8 + port // 64
    q = domain.hypervisor.memory.q
    q[index] = q[index] | 1 << port % 64 if masked else q[index] & ~(1 << port % 64)


def upcall(vcpu: Vcpu) -> tuple[int, int]:
    """upcall_pending and the selector word."""
    memory = vcpu.domain.hypervisor.memory
    return memory.b[vcpu.info_maddr + VI_UPCALL_PENDING], memory.q[(vcpu.info_maddr + VI_PENDING_SEL) // 8]


def test_an_event_sets_bit_selector_and_upcall_of_the_notified_vcpu(one: Domain) -> None:
    ports = [one.evtchn.bind_ipi(1) for _ in range(130)]
    one.evtchn.send(ports[-1])
    assert pending_bit(one, 130) == 1
    assert upcall(one.vcpus[1]) == (1, 1 << 130 // 64)
    assert upcall(one.vcpus[0]) == (0, 0)
    assert one.hypervisor.scheduler.woken == [one.vcpus[1]]  # type: ignore[attr-defined]


def test_a_masked_port_becomes_pending_but_tells_nobody(one: Domain) -> None:
    port = one.evtchn.bind_ipi(0)
    set_mask(one, port, True)
    one.evtchn.send(port)
    assert pending_bit(one, port) == 1
    assert upcall(one.vcpus[0]) == (0, 0)
    assert not one.hypervisor.scheduler.woken  # type: ignore[attr-defined]


def test_unmask_tells_of_an_event_that_waited(one: Domain) -> None:
    port = one.evtchn.bind_ipi(0)
    set_mask(one, port, True)
    one.evtchn.unmask(port)
    assert upcall(one.vcpus[0]) == (0, 0)
    set_mask(one, port, True)
    one.evtchn.send(port)
    one.evtchn.unmask(port)
    assert upcall(one.vcpus[0]) == (1, 1)
    with pytest.raises(XenError):
        one.evtchn.unmask(128)


def test_local_events_need_delivery_obeys_the_upcall_mask(one: Domain) -> None:
    port = one.evtchn.bind_ipi(0)
    vcpu = one.vcpus[0]
    assert not one.evtchn.local_events_need_delivery(vcpu)
    one.evtchn.send(port)
    assert one.evtchn.local_events_need_delivery(vcpu)
    one.hypervisor.memory.b[vcpu.info_maddr + VI_UPCALL_MASK] = 1
    assert not one.evtchn.local_events_need_delivery(vcpu)


# --- posting ----------------------------------------------------------------------------------------


def test_a_foreign_thread_posts_and_does_not_touch_guest_memory(one: Domain) -> None:
    port = one.evtchn.bind_virq(Virq.TIMER, 0)
    before = bytes(one.hypervisor.memory.b[one.shared_info_mfn * PAGE :][:PAGE])
    elsewhere(send_guest_vcpu_virq, one.vcpus[0], Virq.TIMER)
    assert bytes(one.hypervisor.memory.b[one.shared_info_mfn * PAGE :][:PAGE]) == before
    assert one.evtchn.has_posted
    assert one.evtchn.is_pending(port)
    one.evtchn.apply_posted()
    assert not one.evtchn.has_posted
    assert pending_bit(one, port) == 1
    assert upcall(one.vcpus[0]) == (1, 1)


def test_posting_wakes_the_blocked_and_kicks_the_running(one: Domain) -> None:
    one.evtchn.bind_virq(Virq.TIMER, 0)
    cpu = FakeCpu()
    one.vcpus[1].cpu = cpu  # type: ignore[assignment]
    one.vcpus[0].pause_flags = PauseFlag.BLOCKED
    elsewhere(send_guest_vcpu_virq, one.vcpus[0], Virq.TIMER)
    assert one.vcpus[0].runnable
    assert cpu.kicks == 1


def test_posting_to_a_masked_port_kicks_but_wakes_nobody(one: Domain) -> None:
    """The guest may be about to unmask: it must leave its engine soon, or it would miss the event."""
    port = one.evtchn.bind_virq(Virq.TIMER, 0)
    set_mask(one, port, True)
    cpu = FakeCpu()
    one.vcpus[1].cpu = cpu  # type: ignore[assignment]
    one.vcpus[0].pause_flags = PauseFlag.BLOCKED
    elsewhere(send_guest_vcpu_virq, one.vcpus[0], Virq.TIMER)
    assert not one.vcpus[0].runnable
    assert cpu.kicks == 1
    set_mask(one, port, False)  # as the guest would, before it sees the kick
    assert one.evtchn.local_events_need_delivery(one.vcpus[0])


def test_a_blocking_vcpu_sees_posted_events(one: Domain) -> None:
    one.evtchn.bind_virq(Virq.TIMER, 0)
    elsewhere(send_guest_vcpu_virq, one.vcpus[0], Virq.TIMER)
    assert one.evtchn.local_events_need_delivery(one.vcpus[0])


def test_readers_on_foreign_threads_see_posted_events_of_unmasked_ports(one: Domain) -> None:
    port = one.evtchn.bind_virq(Virq.TIMER, 0)
    seen: list[bool] = []

    def look() -> None:
        send_guest_vcpu_virq(one.vcpus[0], Virq.TIMER)
        seen.extend(one.evtchn.local_events_need_delivery(vcpu) for vcpu in one.vcpus)
        set_mask(one, port, True)
        seen.append(one.evtchn.local_events_need_delivery(one.vcpus[0]))

    elsewhere(look)
    assert seen == [True, False, False]


def test_a_posted_event_does_not_reach_the_ports_next_owner(one: Domain) -> None:
    port = one.evtchn.bind_virq(Virq.TIMER, 0)
    elsewhere(send_guest_vcpu_virq, one.vcpus[0], Virq.TIMER)
    elsewhere(one.evtchn.close, port)
    assert one.evtchn.bind_ipi(0) == port
    one.evtchn.apply_posted()
    assert not one.evtchn.is_pending(port)
    assert pending_bit(one, port) == 0


def test_posts_are_bounded_by_ports(host: FakeHypervisor, one: Domain) -> None:
    port1 = one.evtchn.alloc_unbound(DomId(0), one)
    host.dom0.evtchn.bind_interdomain(one, port1)
    for _ in range(1000):
        one.evtchn.send(port1)
    assert len(host.dom0.evtchn.posted) == 1


def test_many_threads_lose_no_event(one: Domain) -> None:
    """Senders on four threads against an engine thread that applies: at the end every port is pending."""
    ports = [one.evtchn.bind_ipi(0) for _ in range(200)]

    def sender(part: list[int]) -> None:
        for port in part:
            one.evtchn.send(port)

    threads = [threading.Thread(target=sender, args=(ports[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        one.evtchn.apply_posted()
    one.evtchn.apply_posted()
    assert all(pending_bit(one, port) for port in ports)
    assert not one.evtchn.posted


# --- polling -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("foreign", [False, True])
@pytest.mark.parametrize(("poll_port", "woken"), [(1, True), (-1, True), (2, False)])
def test_pollers_wake_on_their_port_even_when_it_is_masked(
        one: Domain, foreign: bool, poll_port: int, woken: bool) -> None:
    port = one.evtchn.bind_ipi(0)
    set_mask(one, port, True)
    poller = one.vcpus[1]
    poller.pause_flags = PauseFlag.POLLING | PauseFlag.BLOCKED
    poller.poll_port = poll_port
    if foreign:
        elsewhere(one.evtchn.send, port)
    else:
        one.evtchn.send(port)
    assert poller.runnable is woken


# --- vcpu_info -----------------------------------------------------------------------------------------


def test_registering_vcpu_info_copies_it_and_marks_everything_pending(host: FakeHypervisor, one: Domain) -> None:
    host.frames.give(one, 50)
    vcpu = one.vcpus[0]
    host.memory.b[vcpu.info_maddr + 40] = 0x5A
    map_vcpu_info(vcpu, 50, 0x140, vcpu)
    assert vcpu.info_maddr == 50 * PAGE + 0x140
    assert host.memory.b[vcpu.info_maddr + 40] == 0x5A
    assert upcall(vcpu) == (1, (1 << 64) - 1)
    assert host.frames.type_refs[50] == 1
    unmap_vcpu_info(vcpu)
    unmap_vcpu_info(vcpu)
    assert not host.frames.held()


def test_vcpu_info_of_a_vcpu_without_a_slot_starts_masked(host: FakeHypervisor, one: Domain) -> None:
    """vCPUs from 32 on have no vcpu_info in shared_info; what was sent to them waits in the bitmaps."""
    host.frames.give(one, 50)
    vcpu = one.vcpus[1]
    vcpu.info_maddr = 0
    vcpu.pause_flags = PauseFlag.DOWN
    one.evtchn.send(one.evtchn.bind_ipi(1))
    map_vcpu_info(vcpu, 50, 0, one.vcpus[0])
    assert upcall(vcpu)[0] == 1
    assert host.memory.b[vcpu.info_maddr + VI_UPCALL_MASK] == 1


@pytest.mark.parametrize("offset", [-8, PAGE - 56, 4, PAGE, 1 << 40])
def test_vcpu_info_must_lie_in_the_page(host: FakeHypervisor, one: Domain, offset: int) -> None:
    host.frames.give(one, 50)
    with pytest.raises(XenError):
        map_vcpu_info(one.vcpus[0], 50, offset, one.vcpus[0])
    assert not host.frames.held()


def test_vcpu_info_must_be_the_domains_own_writable_frame(host: FakeHypervisor, one: Domain, two: Domain) -> None:
    host.frames.give(two, 50)
    host.frames.give(one, 51)
    host.frames.type_refs[51], host.frames.page_type[51] = 1, -1  # say, a page table
    for mfn in (50, 51, 52, 1 << 52, -1):
        with pytest.raises(XenError) as caught:
            map_vcpu_info(one.vcpus[0], mfn, 0, one.vcpus[0])
        assert caught.value.errno == errno.EINVAL


def test_vcpu_info_moves_once_and_not_under_another_running_vcpu(host: FakeHypervisor, one: Domain) -> None:
    host.frames.give(one, 50)
    with pytest.raises(XenError):
        map_vcpu_info(one.vcpus[1], 50, 0, one.vcpus[0])
    map_vcpu_info(one.vcpus[0], 50, 0, one.vcpus[0])
    with pytest.raises(XenError):
        map_vcpu_info(one.vcpus[0], 50, 64, one.vcpus[0])
    assert host.frames.refs[50] == 1
