# SPDX-License-Identifier: GPL-2.0-only
"""Random grants, mappings, copies and deaths; after each step the counts are what is mapped, neither more nor less."""

from __future__ import annotations

from collections import Counter

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pyxen.abi.grant_table import Gntmap, Gntst, Gtf
from pyxen.abi.xen import DOMID_SELF
from pyxen.hypervisor import grant_table
from pyxen.hypervisor.domain import Domain
from pyxen.hypervisor.grant_entry import GrantError
from pyxen.hypervisor.grant_map import BackendMapping
from pyxen.hypervisor.grant_table import map_for_backend
from tests.grants.conftest import Grants, use_fake_page_tables

guests = st.sampled_from([1, 2])
anyone = st.sampled_from([0, 1, 2])
refs = st.integers(8, 11) | st.just(512)
mfns = st.integers(40, 42) | st.integers(48, 49)
kinds = st.sampled_from([0, int(Gtf.READONLY), int(Gtf.SUB_PAGE)])
map_flags = st.sampled_from([2, 3, 6, 7, 1, 5, 0])
vas = st.integers(1, 5).map(lambda n: n * 4096)


class Granting(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.g = Grants()
        self.real = grant_table.create_grant_pv_mapping, grant_table.replace_grant_pv_mapping
        use_fake_page_tables(setattr, self.g.tables)
        # Without this a second mapping at one address would replace a PTE, which real page tables account for.
        create = self.g.tables.create
        grant_table.create_grant_pv_mapping = lambda vcpu, addr, mfn, flags: (  # type: ignore[assignment]
            Gntst.GENERAL_ERROR if (vcpu.domain.domid, addr) in self.g.tables.ptes
            else create(vcpu, addr, mfn, flags))
        self.handles: dict[tuple[int, int], tuple[int, int]] = {}
        self.views: list[BackendMapping] = []

    def domain(self, domid: int) -> Domain:
        return self.g.host.domains[domid]

    @rule(domid=guests, ref=st.integers(8, 11), mfn=mfns, to=anyone, flags=kinds)
    def grant(self, domid: int, ref: int, mfn: int, to: int, flags: int) -> None:
        """The granter writes an entry; a well-behaved one leaves entries in use alone."""
        if ref not in self.domain(domid).grant_table.active:
            self.g.grant(self.domain(domid), ref, mfn, self.domain(to), flags)

    @rule(mapper=guests, granter=guests, ref=refs, flags=map_flags, va=vas)
    def map(self, mapper: int, granter: int, ref: int, flags: int, va: int) -> None:
        status, handle, bus = self.g.map(self.domain(mapper), self.domain(granter), ref, va=va, flags=flags)
        if status == Gntst.OKAY:
            self.handles[mapper, handle] = va, bus

    @rule(mapper=guests, handle=st.integers(0, 12), host=st.booleans(), dev=st.booleans())
    def unmap(self, mapper: int, handle: int, host: bool, dev: bool) -> None:
        va, bus = self.handles.get((mapper, handle), (4096, 4096))
        self.g.unmap(self.domain(mapper), handle, va=va if host else 0, bus=bus if dev else 0)

    @rule(granter=guests, ref=refs, readonly=st.booleans())
    def view(self, granter: int, ref: int, readonly: bool) -> None:
        try:
            self.views += map_for_backend(self.g.host.dom0, self.domain(granter), [ref], readonly=readonly)
        except GrantError:
            pass

    @rule(index=st.integers(0, 5))
    def unview(self, index: int) -> None:
        if index < len(self.views):
            self.views.pop(index).unmap()

    @rule(caller=guests, source=refs, dest=refs, source_dom=guests, dest_dom=guests)
    def copy(self, caller: int, source: int, dest: int, source_dom: int, dest_dom: int) -> None:
        self.g.copy(self.domain(caller), (source, source_dom, 0), (dest, dest_dom, 8), 8, 3)

    @rule(caller=guests, mfn=mfns, ref=refs, granter=guests)
    def copy_out(self, caller: int, mfn: int, ref: int, granter: int) -> None:
        self.g.copy(self.domain(caller), (ref, granter, 0), (mfn, int(DOMID_SELF), 8), 8, 1)

    @invariant()
    def references_are_what_is_mapped(self) -> None:
        refs: Counter[int] = Counter()
        types: Counter[int] = Counter()
        for domain in self.g.host.domains.values():
            for track in domain.grant_table.maptrack.values():
                mfn = track.granter.grant_table.active[track.ref].mfn
                uses = bool(track.flags & Gntmap.HOST_MAP) + bool(track.flags & Gntmap.DEVICE_MAP)
                assert uses
                refs[mfn] += uses
                if not track.flags & Gntmap.READONLY:
                    types[mfn] += uses
        assert self.g.host.frames.held() == {mfn: n for mfn, n in refs.items() if n}
        assert {m: n for m, n in self.g.host.frames.type_refs.items() if n} == {m: n for m, n in types.items() if n}

    @invariant()
    def pins_and_status_bits_are_what_is_mapped(self) -> None:
        for granter in self.g.host.domains.values():
            table = granter.grant_table
            pins: Counter[int] = Counter()
            for domain in self.g.host.domains.values():
                for track in domain.grant_table.maptrack.values():
                    if track.granter is granter:
                        assert table.active[track.ref].domid == domain.domid
                        shift = 8 if track.flags & Gntmap.READONLY else 0
                        pins[track.ref] += bool(track.flags & Gntmap.HOST_MAP) << shift
                        pins[track.ref] += bool(track.flags & Gntmap.DEVICE_MAP) << shift + 16
            assert {ref: active.pin for ref, active in table.active.items()} == dict(pins)
            for ref in range(8, 12):
                flags = table.entry(ref)[0]
                assert bool(flags & Gtf.READING) == (ref in pins)
                assert bool(flags & Gtf.WRITING) == bool(pins[ref] & 0x00FF00FF)

    @invariant()
    def page_tables_show_only_what_is_granted(self) -> None:
        for (domid, _), (mfn, _) in self.g.tables.ptes.items():
            assert any(track.flags & Gntmap.HOST_MAP and track.granter.grant_table.active[track.ref].mfn == mfn
                       for track in self.domain(domid).grant_table.maptrack.values())

    def teardown(self) -> None:
        grant_table.create_grant_pv_mapping, grant_table.replace_grant_pv_mapping = self.real
        for view in self.views:
            view.unmap()
        for domid in (1, 2):
            ptes = [mfn for (owner, _), mfn in self.g.tables.ptes.items() if owner == domid]
            while not self.domain(domid).grant_table.release_mappings(budget=2):
                pass
            for mfn, readonly in ptes:  # what tearing down the page tables does
                (self.g.host.frames.put_page if readonly else self.g.host.frames.put_page_and_type)(mfn)
        assert not self.g.host.frames.held()
        assert not any(domain.grant_table.active for domain in self.g.host.domains.values())


TestGranting = Granting.TestCase
TestGranting.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck))
