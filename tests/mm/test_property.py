# SPDX-License-Identifier: GPL-2.0-only
"""Several domains do what they like to the page-type machine; after every step everything is counted again."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pyxen.abi.xen import DOMID_SELF
from pyxen.errors import XenError
from pyxen.hypervisor.domain import Dying
from pyxen.hypervisor.frames import PGT_SEG_DESC, PGT_TYPE_MASK, PGT_WRITABLE
from pyxen.hypervisor.frames_types import OWNED
from pyxen.hypervisor.x86.pv.grant_map import (
    GNTMAP_CONTAINS_PTE,
    GNTMAP_READONLY,
    create_grant_pv_mapping,
    replace_grant_pv_mapping,
)
from pyxen.hypervisor.x86.pv.mm_relinquish import relinquish_memory
from tests.mm.audit import Audit, nothing_left
from tests.mm.rig import NX, RW, USER, A, Caller, FakeDomain, P, Rig

FRAMES = 56
SLOTS = (0, 1, 2, 255, 256, 271, 272, 511)
FLAGS = (P, P, P | RW, P | RW, P | RW | USER, P | A | NX, P | RW | 8, P | 0x80, 0, RW)

who = st.integers(0, 2)
slot = st.sampled_from(SLOTS)
flags = st.sampled_from(FLAGS)
pick = st.integers(0, FRAMES + 2)
chance = st.sampled_from((0.0, 0.0, 0.3, 1.0))


class PageTypes(RuleBasedStateMachine):
    """Domain 1 is exact, 2 fast, 0 fast and privileged."""

    @initialize(seed=st.integers(0, 1 << 16))
    def start(self, seed: int) -> None:
        self.rig = Rig(FRAMES)
        self.audit = Audit(self.rig)
        self.random = random.Random(seed)
        self.rig.add(1, "exact")
        self.rig.add(2, "fast")
        self.rig.frames.preempt = lambda: self.random.random() < self.chance  # type: ignore[method-assign]
        self.chance = 0.0
        self.rig.between = self._between
        self.grants: list[tuple[int, int, int, int]] = []
        self.trees: dict[int, list[int]] = {}
        for domid in range(3):
            self.rig.alloc(self.rig.domains[domid], 8)

    def _between(self) -> bool:
        self.audit.check()
        return self.random.random() > 0.2  # sometimes the guest never comes back

    def domain(self, who: int) -> FakeDomain:
        return self.rig.domains[who]

    def frame(self, domain: FakeDomain, pick: int) -> int:
        """Mostly one's own, else any frame number, there or not."""
        mine = domain.frames
        return mine[pick % len(mine)] if mine and pick % 7 else pick

    # --- memory ------------------------------------------------------------------------------------

    @rule(who=who, count=st.integers(1, 4))
    def allocate(self, who: int, count: int) -> None:
        try:
            self.rig.alloc(self.domain(who), count)
        except XenError:
            assert self.rig.allocator.free_frames < count

    @rule(who=who, pick=pick, chance=chance)
    def decrease(self, who: int, pick: int, chance: float) -> None:
        self.chance = chance
        self.rig.frames.guest_remove_page(self.frame(self.domain(who), pick), self.domain(who))  # type: ignore[arg-type]

    @rule(who=who, to=who, pick=pick)
    def transfer(self, who: int, to: int, pick: int) -> None:
        mfn = self.frame(self.domain(who), pick)
        try:
            self.rig.frames.steal_page(mfn, self.domain(who))  # type: ignore[arg-type]
        except XenError:
            return
        self.rig.frames.assign_page(mfn, self.domain(to))  # type: ignore[arg-type]

    # --- page tables ---------------------------------------------------------------------------------

    @rule(
        who=who, table=pick, at=slot, mapped=pick, bits=flags, other=who, chance=chance, command=st.sampled_from((0, 2))
    )
    def mmu_update(
        self, who: int, table: int, at: int, mapped: int, bits: int, other: int, chance: float, command: int
    ) -> None:
        self.chance = chance
        domain = self.domain(who)
        pointer = self.frame(domain, table) << 12 | at << 3 | command
        value = self.frame(self.domain(other), mapped) << 12 | bits
        foreign = DOMID_SELF if other == who else other
        self.rig.mmu_update(domain, [(pointer, value)], foreign)

    @rule(who=who, picks=st.lists(pick, min_size=6, max_size=6), bits=flags, chance=chance, wide=st.booleans())
    def build(self, who: int, picks: list[int], bits: int, chance: float, wide: bool) -> None:
        """A tree as a kernel would make it, then pin its root: this is how deep ones come about."""
        self.chance = 0.0
        domain = self.domain(who)
        idle = [m for m in domain.frames if not self.rig.type_count(m)]
        if len(idle) < 6:
            return
        l4, l3, l2, l1, data, more = (self.frame(domain, p) if not p % 5 else idle.pop(p % len(idle)) for p in picks)
        entries = [(l4, 0, l3), (l3, 1, l2), (l2, 2, l1), (l1, 1, data)]
        if wide:
            entries += [(l4, 272, l3), (l3, 511, more), (l2, 511, more), (l4, 260, l3)]
        for table in (l4, l3, l2, l1, more):
            if table % 4:  # what is left in the others is adversarial enough
                self.rig.mmuext(domain, (16, table, 0))
        for table, index, child in entries:
            self.rig.update(domain, table, index, child << 12 | (bits if table == l1 else P | RW | USER))
        self.chance = chance
        self.rig.pin(domain, 4, l4)

    @rule(who=who, pick=pick, which=pick, change=st.sampled_from((RW, P, USER, P | RW, A, NX | RW)), chance=chance)
    def flip(self, who: int, pick: int, which: int, change: int, chance: float) -> None:
        """Change flags of an entry that stands in some table."""
        self.chance = chance
        domain = self.domain(who)
        tables = [m for m in domain.frames if 1 <= self.rig.type_of(m) <= 4 and self.rig.type_count(m)]
        if tables:
            table = tables[pick % len(tables)]
            entries = self.audit.entries(table)
            if entries:
                index, entry = entries[which % len(entries)]
                self.rig.update(domain, table, index, entry ^ change)

    @rule(who=who, pick=pick, which=pick, into=pick, chance=chance)
    def share(self, who: int, pick: int, which: int, into: int, chance: float) -> None:
        """A second parent for a table that has one, perhaps while either is half validated."""
        self.chance = chance
        domain = self.domain(who)
        tables = [m for m in domain.frames if 2 <= self.rig.type_of(m) <= 4 and self.rig.type_count(m)]
        idle = [m for m in domain.frames if not self.rig.type_count(m)]
        if not tables or not idle:
            return
        partial = [m for m in tables if m in self.rig.frames.partial]
        table = (partial or tables)[pick % len(partial or tables)]
        entries = self.audit.entries(table)
        other, level = idle[into % len(idle)], self.rig.type_of(table)
        if entries:
            self.rig.mmuext(domain, (16, other, 0))
            for index, entry in entries[: which % 3 + 1]:
                self.rig.update(domain, other, index, entry)
            self.rig.pin(domain, level, other)

    @rule(who=who, pick=pick, level=st.integers(1, 4), chance=chance)
    def pin(self, who: int, pick: int, level: int, chance: float) -> None:
        self.chance = chance
        self.rig.pin(self.domain(who), level, self.frame(self.domain(who), pick))

    @rule(who=who, pick=pick, chance=chance)
    def unpin(self, who: int, pick: int, chance: float) -> None:
        self.chance = chance
        domain = self.domain(who)
        pinned = [m for m in domain.frames if self.rig.frames.type_info[m] >> 42 & 1]
        self.rig.unpin(domain, pinned[pick % len(pinned)] if pinned else pick)

    @rule(who=who, pick=pick, user=st.booleans(), chance=chance)
    def baseptr(self, who: int, pick: int, user: bool, chance: float) -> None:
        self.chance = chance
        domain = self.domain(who)
        tables = [m for m in domain.frames if self.rig.type_of(m) == 4]
        mfn = tables[pick % len(tables)] if tables and pick % 5 else self.frame(domain, pick)
        self.rig.mmuext(domain, (15 if user else 5, mfn if pick else 0, 0))

    @rule(who=who, pick=pick, source=pick, copy=st.booleans())
    def clear_or_copy(self, who: int, pick: int, source: int, copy: bool) -> None:
        domain = self.domain(who)
        mfn = self.frame(domain, pick)
        self.rig.mmuext(domain, (17 if copy else 16, mfn, self.frame(domain, source)))

    @rule(who=who)
    def flush(self, who: int) -> None:
        self.rig.mmuext(self.domain(who), (10, 0, 0))

    # --- others' references ------------------------------------------------------------------------------

    @rule(who=who, pick=pick, kind=st.sampled_from((PGT_SEG_DESC, PGT_WRITABLE)))
    def hold(self, who: int, pick: int, kind: int) -> None:
        mfn = self.frame(self.domain(who), pick)
        if self.rig.frames.get_page_and_type(mfn, self.domain(who), kind):  # type: ignore[arg-type]
            self.audit.held[mfn, True] += 1

    @precondition(lambda self: self.audit.held)
    @rule(pick=pick)
    def let_go(self, pick: int) -> None:
        held = list(self.audit.held)
        mfn, is_typed = held[pick % len(held)]
        self.audit.held[mfn, is_typed] -= 1
        self.audit.held += type(self.audit.held)()
        self.rig.frames.put_page_and_type(mfn)

    @rule(granter=who, mapper=who, pick=pick, table=pick, at=slot, readonly=st.booleans())
    def grant_map(self, granter: int, mapper: int, pick: int, table: int, at: int, readonly: bool) -> None:
        """GNTTABOP_map_grant_ref with GNTMAP_contains_pte, as the grant table does it."""
        frames, mapping = self.rig.frames, self.domain(mapper)
        mfn = self.frame(self.domain(granter), pick)
        if not frames.get_page(mfn, self.domain(granter)):  # type: ignore[arg-type]
            return
        if not readonly and not frames.get_page_type(mfn, PGT_WRITABLE):
            frames.put_page(mfn)
            return
        address = self.frame(mapping, table) << 12 | at << 3
        bits = GNTMAP_CONTAINS_PTE | (GNTMAP_READONLY if readonly else 0)
        if create_grant_pv_mapping(mapping.vcpus[0], address, mfn, bits):
            if readonly:
                frames.put_page(mfn)
            else:
                frames.put_page_and_type(mfn)
        else:
            self.grants.append((mapper, address, mfn, bits))

    @precondition(lambda self: self.grants)
    @rule(pick=pick)
    def grant_unmap(self, pick: int) -> None:
        mapper, address, mfn, bits = self.grants.pop(pick % len(self.grants))
        frames, mapping = self.rig.frames, self.domain(mapper)
        if replace_grant_pv_mapping(mapping.vcpus[0], address, mfn, 0, bits) == 0:
            mapping.v.flush_tlb()
            if bits & GNTMAP_READONLY:
                frames.put_page(mfn)
            else:
                frames.put_page_and_type(mfn)

    # --- the end of a domain --------------------------------------------------------------------------------

    @rule(who=st.integers(1, 2), chance=chance)
    def destroy_and_recreate(self, who: int, chance: float) -> None:
        self._destroy(who, chance)
        if not self.rig.frames.pages_held(self.domain(who)):  # type: ignore[arg-type]
            mode = self.domain(who).pv.mode
            self.rig.frames.forget(self.domain(who))  # type: ignore[arg-type]
            self.rig.add(who, mode)
        else:  # someone still maps a frame of it: as in Xen, its domid stays taken. Here it just lives on.
            self.domain(who).dying = Dying.ALIVE

    def _destroy(self, who: int, chance: float) -> None:
        domain = self.domain(who)
        for mfn, is_typed in list(self.audit.held):
            if self.rig.frames.owner[mfn] == who | OWNED:
                for _ in range(self.audit.held.pop((mfn, is_typed))):
                    self.rig.frames.put_page_and_type(mfn)
        self.grants = [grant for grant in self.grants if grant[0] != who]
        domain.dying = Dying.DYING
        self.chance = chance
        for _ in range(10_000):
            if relinquish_memory(domain):  # type: ignore[arg-type]
                break
            self.audit.check()
        else:
            raise AssertionError("teardown makes no progress")
        self.audit.check()
        for mfn in domain.frames:
            assert not self.rig.frames.count_info[mfn] >> 40, "the owner's own reference is gone"
            assert self.rig.frames.type_info[mfn] & PGT_TYPE_MASK in (0, PGT_WRITABLE) or not self.rig.type_count(mfn)

    @invariant()
    def everything_adds_up(self) -> None:
        if hasattr(self, "audit"):
            self.audit.check()

    def teardown(self) -> None:
        if not hasattr(self, "audit"):
            return
        self.chance = 0.5
        for who in range(3):
            self._destroy(who, 0.5)
        self.audit.check()
        assert all(domain.tot_pages == 0 for domain in self.rig.domains.values())
        nothing_left(self.rig)


TestPageTypes = PageTypes.TestCase
TestPageTypes.settings = settings(
    max_examples=40, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)


@pytest.mark.parametrize("seed", range(2))
def test_long_random_walk(seed: int) -> None:
    """The same rules, chosen by a plain generator: fewer ideas, more steps on one machine."""
    generator = random.Random(seed)
    machine = PageTypes()
    machine.start(seed)
    rules: list[tuple[str, dict[str, Any]]] = [
        ("allocate", {"who": 2, "count": 4}),
        ("decrease", {"who": 2, "pick": FRAMES, "chance": 1}),
        ("transfer", {"who": 2, "to": 2, "pick": FRAMES}),
        ("build", {"who": 2, "picks": 6, "bits": FLAGS, "chance": 1, "wide": 1}),
        ("mmu_update", {"who": 2, "table": FRAMES, "at": SLOTS, "mapped": FRAMES, "bits": FLAGS, "other": 2,
                        "chance": 1, "command": (0, 2)}),
        ("flip", {"who": 2, "pick": FRAMES, "which": FRAMES, "change": (RW, P, USER, P | RW), "chance": 1}),
        ("share", {"who": 2, "pick": FRAMES, "which": FRAMES, "into": FRAMES, "chance": 1}),
        ("pin", {"who": 2, "pick": FRAMES, "level": (1, 2, 3, 4), "chance": 1}),
        ("unpin", {"who": 2, "pick": FRAMES, "chance": 1}),
        ("baseptr", {"who": 2, "pick": FRAMES, "user": 1, "chance": 1}),
        ("clear_or_copy", {"who": 2, "pick": FRAMES, "source": FRAMES, "copy": 1}),
        ("grant_map", {"granter": 2, "mapper": 2, "pick": FRAMES, "table": FRAMES, "at": SLOTS, "readonly": 1}),
        ("destroy_and_recreate", {"who": (1, 2), "chance": 1}),
    ]  # fmt: skip
    weights = [6, 3, 1, 12, 20, 8, 8, 6, 6, 6, 2, 4, 1]
    seen: set[int] = set()
    partial = False
    for _ in range(1200):
        name, shape = generator.choices(rules, weights)[0]
        arguments: dict[str, Any] = {}
        for key, kind in shape.items():
            if key == "chance":
                arguments[key] = generator.choice((0.0, 0.3, 1.0))
            elif key == "picks":
                arguments[key] = [generator.randrange(FRAMES) for _ in range(6)]
            elif isinstance(kind, tuple):
                arguments[key] = generator.choice(kind)
            else:
                arguments[key] = generator.randint(0, kind)
        getattr(machine, name)(**arguments)
        machine.audit.check()
        seen.update(machine.rig.type_of(m) for m in range(FRAMES) if machine.rig.type_count(m))
        partial |= bool(machine.rig.frames.partial)
    assert {1, 2, 3, 4, 7} <= seen and partial, "the walk reached too little"
    assert machine.rig.continuations > 10
    machine.teardown()


def test_the_audit_finds_what_it_should() -> None:
    """An audit that cannot fail proves nothing."""
    rig = Rig()
    audit = Audit(rig)
    domain = rig.add(1)
    l1, data = rig.alloc(domain, 2)
    assert rig.pin(domain, 1, l1) == 0
    assert rig.update(domain, l1, 0, data << 12 | P | RW) == 0
    audit.check()
    for damage in (
        lambda: rig.set(l1, 1, data << 12 | P | RW),
        lambda: rig.set(l1, 0, l1 << 12 | P | RW),
        lambda: rig.frames.count_info.__setitem__(data, rig.frames.count_info[data] + 1),
        lambda: rig.frames.owner.__setitem__(data, 0),
    ):
        saved = rig.entry(l1, 0), rig.frames.count_info[data], rig.frames.owner[data]
        damage()
        try:
            audit.check()
        except AssertionError:
            pass
        else:
            raise AssertionError("damage was not noticed")
        rig.set(l1, 1, 0)
        rig.set(l1, 0, saved[0])
        rig.frames.count_info[data], rig.frames.owner[data] = saved[1:]
    audit.check()
    assert Caller.BASE
