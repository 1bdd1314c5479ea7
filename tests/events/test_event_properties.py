# SPDX-License-Identifier: GPL-2.0-only
"""Random operations of three domains; after each: a port is in one state, both ends agree, closing frees."""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pyxen.abi.xen import NR_VIRQS, DomId
from pyxen.errors import XenError
from pyxen.hypervisor.domain import Dying
from pyxen.hypervisor.event_channel import State, alloc_unbound_xen_event_channel, free_xen_event_channel
from tests.events.fake_hypervisor import FakeHypervisor

domids = st.sampled_from([1, 2, 3])
ports = st.integers(0, 12) | st.sampled_from([127, 128, 4095, 1 << 31])
vcpus = st.integers(0, 2)


class Channels(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.host = FakeHypervisor()
        for domid in (1, 2, 3):
            self.host.create(domid)

    def attempt(self, domid: int, method: str, *args: object) -> None:
        try:
            getattr(self.host.domains[domid].evtchn, method)(*args)
        except XenError:
            pass

    @rule(domid=domids, remote=domids)
    def alloc_unbound(self, domid: int, remote: int) -> None:
        self.attempt(domid, "alloc_unbound", DomId(remote), self.host.domains[domid])

    @rule(domid=domids, remote=domids, port=ports)
    def bind_interdomain(self, domid: int, remote: int, port: int) -> None:
        self.attempt(domid, "bind_interdomain", self.host.domains[remote], port)

    @rule(domid=domids, virq=st.integers(0, NR_VIRQS), vcpu=vcpus)
    def bind_virq(self, domid: int, virq: int, vcpu: int) -> None:
        self.attempt(domid, "bind_virq", virq, vcpu)

    @rule(domid=domids, vcpu=vcpus)
    def bind_ipi(self, domid: int, vcpu: int) -> None:
        self.attempt(domid, "bind_ipi", vcpu)

    @rule(domid=domids, port=ports, vcpu=vcpus)
    def bind_vcpu(self, domid: int, port: int, vcpu: int) -> None:
        self.attempt(domid, "bind_vcpu", port, vcpu)

    @rule(domid=domids, port=ports)
    def close(self, domid: int, port: int) -> None:
        self.attempt(domid, "close", port)

    @rule(domid=domids, port=ports)
    def send(self, domid: int, port: int) -> None:
        self.attempt(domid, "send", port)

    @rule(domid=domids, remote=domids)
    def xen_channel(self, domid: int, remote: int) -> None:
        try:
            alloc_unbound_xen_event_channel(self.host.domains[domid], DomId(remote), lambda domain, port: None)
        except XenError:
            pass

    @rule(domid=domids, port=st.integers(1, 12))
    def free_xen_channel(self, domid: int, port: int) -> None:
        free_xen_event_channel(self.host.domains[domid], port)

    @precondition(lambda self: self.host.domains[3].dying is Dying.ALIVE)
    @rule()
    def kill(self) -> None:
        domain = self.host.domains[3]
        domain.dying = Dying.DYING
        while not domain.evtchn.destroy(budget=7):
            pass

    @invariant()
    def both_ends_agree(self) -> None:
        for domain in self.host.domains.values():
            for chn in domain.evtchn.channels():
                assert (chn.state is State.INTERDOMAIN) == (chn.remote is not None)
                if chn.remote is not None:
                    other = chn.remote.evtchn.channel(chn.remote_port)
                    assert other.state is State.INTERDOMAIN
                    assert other.remote is domain
                    assert other.remote_port == chn.port

    @invariant()
    def virqs_and_channels_agree(self) -> None:
        for domain in self.host.domains.values():
            tables = [domain.evtchn.global_virq_to_evtchn, *(vcpu.virq_to_evtchn for vcpu in domain.vcpus)]
            bound = [(virq, port) for table in tables for virq, port in enumerate(table) if port]
            assert sorted(bound) == sorted((c.virq, c.port) for c in domain.evtchn.channels() if c.state is State.VIRQ)

    @invariant()
    def free_ports_are_clean_and_not_pending(self) -> None:
        for domain in self.host.domains.values():
            evtchn = domain.evtchn
            for port in range(128):
                chn = evtchn.channel(port)
                if chn.state is State.FREE:
                    assert chn.xen_consumer is None
                    assert chn.consumer is None
                    assert chn.notify_vcpu_id == 0
                    assert not evtchn.is_pending(port)

    @invariant()
    def a_dead_domain_has_no_channel(self) -> None:
        domain = self.host.domains[3]
        if domain.dying is not Dying.ALIVE:
            assert [chn.port for chn in domain.evtchn.channels()] == [0]


TestChannels = Channels.TestCase
TestChannels.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))
