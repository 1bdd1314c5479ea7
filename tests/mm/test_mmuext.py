# SPDX-License-Identifier: GPL-2.0-only
"""MMUEXT operations, roots, update_va_mapping, continuations and teardown."""

from __future__ import annotations

import errno
import time

import pytest

from pyxen.abi.xen import DOMID_SELF, MMU_UPDATE_PREEMPTED, UVMF_ALL, UVMF_INVLPG, UVMF_TLB_FLUSH, VmAssist
from pyxen.errors import XenError
from pyxen.hypervisor.frames import ERESTART, PGT_L1, PGT_L4, PGT_PARTIAL, PGT_SEG_DESC, PGT_WRITABLE
from pyxen.hypervisor.hypercall import Preempted
from pyxen.hypervisor.x86.pv import mm
from pyxen.hypervisor.x86.pv.walk import guest_l1e, guest_walk, guest_walk_flags
from tests.mm.audit import Audit, nothing_left
from tests.mm.rig import NX, RW, USER, XEN_ENTRY, Caller, FakeDomain, P, Rig

NEW_BASEPTR, NEW_USER_BASEPTR = 5, 15


@pytest.fixture
def rig() -> Rig:
    return Rig()


@pytest.fixture
def d(rig: Rig) -> FakeDomain:
    return rig.add(1)


def wide_tree(rig: Rig, d: FakeDomain, l2s: int = 2, l1s: int = 3) -> tuple[int, list[int]]:
    """An L4 with one L3, some L2s, and some L1s in each with two writable leaves."""
    l4, l3 = rig.alloc(d, 2)
    tables = [l4, l3]
    rig.set(l4, 5, l3 << 12 | P | RW)
    for i in range(l2s):
        (l2,) = rig.alloc(d)
        tables.append(l2)
        rig.set(l3, 7 * i, l2 << 12 | P | RW)
        for j in range(l1s):
            l1, a, b = rig.alloc(d, 3)
            tables.append(l1)
            rig.set(l2, 511 - j, l1 << 12 | P | RW)
            rig.set(l1, j, a << 12 | P | RW)
            rig.set(l1, 400, b << 12 | P)
    return l4, tables


# --- roots -----------------------------------------------------------------------------------------------


def test_baseptr_holds_references_and_drops_the_old(rig: Rig, d: FakeDomain) -> None:
    a, b = rig.tree(d)[0], rig.tree(d)[0]
    assert rig.mmuext(d, (NEW_BASEPTR, a, 0)) == 0
    assert d.v.guest_table == a and (rig.count(a), rig.type_count(a)) == (2, 1)
    assert d.v.log == ["cr3"]
    assert rig.mmuext(d, (NEW_BASEPTR, b, 0)) == 0
    assert (rig.count(a), rig.type_count(a)) == (1, 0) and (rig.count(b), rig.type_count(b)) == (2, 1)
    assert rig.mmuext(d, (NEW_BASEPTR, b, 0)) == 0 and rig.count(b) == 2
    assert rig.unpin(d, b) == -errno.EINVAL, "in use but not pinned"


def test_baseptr_needs_a_table_of_ones_own(rig: Rig, d: FakeDomain) -> None:
    other = rig.add(2)
    (foreign,), (data,) = rig.alloc(other), rig.alloc(d)
    assert rig.frames.get_page_and_type(data, d, PGT_WRITABLE)
    for mfn in (foreign, data, 0, 1 << 45):
        assert rig.mmuext(d, (NEW_BASEPTR, mfn, 0)) == -errno.EINVAL
    assert rig.mmuext(d, (NEW_USER_BASEPTR, foreign, 0)) == -errno.EINVAL
    assert rig.mmuext(rig.dom0, (NEW_BASEPTR, foreign, 0), foreigndom=2) == -errno.EPERM
    assert d.v.guest_table == 0


def test_user_baseptr_zero_is_allowed(rig: Rig, d: FakeDomain) -> None:
    l4 = rig.tree(d)[0]
    assert rig.mmuext(d, (NEW_USER_BASEPTR, l4, 0)) == 0
    assert d.v.guest_table_user == l4 and not d.v.log, "user mode's root is loaded on the way there"
    assert rig.mmuext(d, (NEW_USER_BASEPTR, 0, 0)) == 0
    assert d.v.guest_table_user == 0 and rig.count(l4) == 1


def test_m2p_strict_hides_the_m2p_from_user_roots(rig: Rig, d: FakeDomain) -> None:
    """zap_ro_mpt() and fill_ro_mpt()."""
    l4 = rig.tree(d)[0]
    d.vm_assist |= 1 << VmAssist.M2P_STRICT
    assert rig.mmuext(d, (NEW_USER_BASEPTR, l4, 0)) == 0
    assert rig.entry(l4, 256) == 0
    d.vm_assist = 0
    assert rig.mmuext(d, (NEW_BASEPTR, l4, 0)) == 0
    assert rig.entry(l4, 256) == rig.xen_l3 << 12 | XEN_ENTRY


def test_install_guest_tables(rig: Rig, d: FakeDomain) -> None:
    k, u = wide_tree(rig, d)[0], rig.tree(d)[0]
    rig.always_preempt()
    slices = 1
    while not mm.install_guest_tables(d.v, k, u):  # type: ignore[arg-type]
        slices += 1
    assert slices > 2
    assert (d.v.guest_table, d.v.guest_table_user) == (k, u)
    with pytest.raises(XenError):
        mm.install_guest_tables(d.v, 1 << 40, 0)  # type: ignore[arg-type]
    assert (d.v.guest_table, d.v.guest_table_user) == (k, u)
    rig.never_preempt()
    assert mm.install_guest_tables(d.v, u, u)  # type: ignore[arg-type]
    assert rig.type_count(u) == 2 and rig.count(k) == 1


# --- continuations ------------------------------------------------------------------------------------------


def test_pin_is_continued_and_ends_the_same(rig: Rig, d: FakeDomain) -> None:
    """XSA-299 and before: whatever the number of interruptions, the counts are those of an uninterrupted run."""
    l4, tables = wide_tree(rig, d)
    rig.never_preempt()
    assert rig.pin(d, 4, l4) == 0 and rig.continuations == 0
    expected = [(rig.count(m), rig.type_count(m)) for m in d.frames]
    assert rig.unpin(d, l4) == 0
    rig.always_preempt()
    audit = Audit(rig)
    rig.between = lambda: audit.check() is None
    assert rig.pin(d, 4, l4) == 0
    assert rig.continuations >= 5
    assert [(rig.count(m), rig.type_count(m)) for m in d.frames] == expected
    assert rig.unpin(d, l4) == 0
    audit.check()
    assert all(rig.count(m) == 1 for m in d.frames) and not rig.frames.partial
    assert all(not rig.frames.type_info[m] & PGT_PARTIAL for m in tables)


def test_abandoned_validation_can_be_taken_up_elsewhere(rig: Rig, d: FakeDomain) -> None:
    """Two parents of one half-validated L2: whoever finishes, nobody's reference is lost or dropped twice."""
    l4, tables = wide_tree(rig, d, l2s=1)
    l3, l2 = tables[1], tables[2]
    l3b = rig.alloc(d)[0]
    rig.set(l3b, 0, l2 << 12 | P | RW)
    audit = Audit(rig)
    rig.always_preempt()
    rig.between = lambda: False
    assert rig.pin(d, 3, l3) == -errno.EINTR, "given up"
    assert rig.frames.type_info[l2] & PGT_PARTIAL and rig.frames.type_info[l3] & PGT_PARTIAL
    assert rig.pin(d, 3, l3b) == -errno.EINTR
    audit.check()
    rig.between = lambda: audit.check() is None
    assert rig.pin(d, 3, l3b) == 0
    assert rig.unpin(d, l3b) == 0
    audit.check()
    assert rig.pin(d, 4, l4) == 0
    audit.check()
    assert rig.unpin(d, l4) == 0
    audit.check()
    assert all(rig.count(m) == 1 for m in d.frames)


def test_error_after_interruption_is_undone(rig: Rig, d: FakeDomain) -> None:
    l4, tables = wide_tree(rig, d)
    rig.set(tables[1], 500, 1 << 45 | P)
    audit = Audit(rig)
    rig.always_preempt()
    rig.between = lambda: audit.check() is None
    assert rig.pin(d, 4, l4) == -errno.EINVAL
    assert rig.continuations > 5
    assert rig.call(mm.do_mmuext_op, Caller(d), 0, 0, 0, DOMID_SELF) == 0  # what was left is done before anything else
    assert not rig.frames.deferred and not rig.frames.partial
    assert all((rig.count(m), rig.type_count(m)) == (1, 0) for m in d.frames)


def test_continuation_is_encoded_as_xens(rig: Rig, d: FakeDomain) -> None:
    l1, a = rig.alloc(d, 2)
    assert rig.pin(d, 1, l1) == 0
    count = 200
    requests = b"".join(
        (l1 << 12 | i << 3).to_bytes(8, "little") + (a << 12 | P).to_bytes(8, "little") for i in range(count)
    )
    caller = Caller(d, requests + bytes(4))
    pdone = Caller.BASE + len(requests)
    rig.always_preempt()
    with pytest.raises(Preempted) as info:
        mm.do_mmu_update(caller, Caller.BASE, count, pdone, DOMID_SELF)
    done = caller.read_u32(pdone)
    assert 0 < done < count
    assert info.value.arguments == (Caller.BASE + 16 * done, (count - done) | MMU_UPDATE_PREEMPTED, pdone, DOMID_SELF)
    assert rig.call(mm.do_mmu_update, caller, *info.value.arguments) == 0
    assert caller.read_u32(pdone) == count


def test_the_result_survives_work_left_over(rig: Rig, d: FakeDomain) -> None:
    """An update that drops a deep table: the rest of it is undone in continuations that carry the result."""
    l4, _ = wide_tree(rig, d)
    assert rig.pin(d, 4, l4) == 0
    rig.always_preempt()
    caller = Caller(d, (l4 << 12 | 5 << 3).to_bytes(8, "little") + bytes(8))
    with pytest.raises(Preempted) as info:
        mm.do_mmu_update(caller, Caller.BASE, 1, 0, DOMID_SELF)
    assert info.value.arguments[:2] == (0, MMU_UPDATE_PREEMPTED)
    assert rig.call(mm.do_mmu_update, caller, *info.value.arguments) == 0
    assert not rig.frames.deferred and d.frames


def test_no_lock_is_held_over_a_millisecond() -> None:
    """4 MiB of page tables for 2 GiB mapped: each go stays near its budget of 500 us."""
    rig = Rig(4096)
    d = rig.add(1)
    data = rig.alloc(d, 2048)
    leaves = b"".join((m << 12 | P | RW).to_bytes(8, "little") for m in data[:512])
    l4, l3, l2 = rig.alloc(d, 3)
    rig.set(l4, 0, l3 << 12 | P | RW)
    rig.set(l3, 0, l2 << 12 | P | RW)
    for i, l1 in enumerate(rig.alloc(d, 256)):
        rig.memory.write(l1 << 12, leaves)
        rig.set(l2, i, l1 << 12 | P | RW)
    held: list[float] = []
    begin = 0.0

    def between() -> bool:
        nonlocal begin
        held.append(time.thread_time() - begin)
        begin = time.thread_time()
        return True

    rig.between = between
    for operation in (lambda: rig.pin(d, 4, l4), lambda: rig.unpin(d, l4)):
        held.clear()
        begin = time.thread_time()
        assert operation() == 0
        assert len(held) > 10, "that was no long operation"
        assert sorted(held)[len(held) * 9 // 10] < 1.5e-3, f"slowest goes: {sorted(held)[-5:]}"


# --- TLB operations -------------------------------------------------------------------------------------------


def test_tlb_operations_reach_the_right_vcpus(rig: Rig) -> None:
    d = rig.add(3, vcpus=3)
    logs = [v.pv.log for v in d.vcpus]

    def take() -> list[list[object]]:
        seen = [list(log) for log in logs]
        for log in logs:
            log.clear()
        return seen

    caller = Caller(d, (0b101).to_bytes(8, "little"))
    assert rig.mmuext(d, (6, 0, 0)) == 0 and take() == [["flush"], [], []]
    assert rig.mmuext(d, (10, 0, 0)) == 0 and take() == [["flush"]] * 3
    assert rig.mmuext(d, (7, 0x5000, 0)) == 0 and take() == [[0x5000], [], []]
    assert rig.mmuext(d, (11, 0x5000, 0)) == 0 and take() == [[0x5000]] * 3
    assert rig.mmuext(d, (11, 0xFFFF800000000000, 0)) == 0 and take() == [[], [], []], "not the guest's to flush"
    from pyxen.abi.xen import MMUEXT_OP

    for command, expected in ((8, "flush"), (9, 0x5000)):
        caller = Caller(d, (0b101).to_bytes(8, "little") + MMUEXT_OP.pack(command, 0x5000, Caller.BASE))
        assert rig.call(mm.do_mmuext_op, caller, Caller.BASE + 8, 1, 0, DOMID_SELF) == 0
        assert take() == [[expected], [], [expected]]
    assert rig.mmuext(d, (8, 0, 0xDEAD000)) == -errno.EINVAL
    for command in (6, 7, 8, 9, 10, 11, 12, 13, 18):
        assert rig.mmuext(rig.dom0, (command, 0, 0), foreigndom=3) == -errno.EPERM


def test_flush_cache_needs_io_memory(rig: Rig, d: FakeDomain) -> None:
    assert rig.mmuext(d, (12, 0, 0)) == -errno.EACCES
    assert rig.mmuext(d, (18, 0, 0)) == -errno.EINVAL
    assert rig.mmuext(rig.dom0, (12, 0, 0)) == 0 and rig.mmuext(rig.dom0, (18, 0, 0)) == 0


def test_superpages_are_off(rig: Rig, d: FakeDomain) -> None:
    assert rig.mmuext(d, (19, 0, 0)) == -errno.ENOSYS
    assert rig.mmuext(d, (20, 512, 0)) == -errno.ENOSYS
    assert rig.mmuext(d, (19, 5, 0)) == -errno.EINVAL
    assert rig.mmuext(rig.dom0, (19, 0, 0), foreigndom=1) == -errno.EPERM


def test_clear_and_copy_page(rig: Rig, d: FakeDomain) -> None:
    a, b, l1 = rig.alloc(d, 3)
    (foreign,) = rig.alloc(rig.add(2))
    rig.memory.write(a << 12, b"hello")
    seen: list[int] = []
    rig.memory.add_listener(lambda maddr, size: seen.append(maddr >> 12))
    assert rig.mmuext(d, (17, b, a)) == 0
    assert rig.memory.read(b << 12, 5) == b"hello" and seen == [b]
    assert rig.mmuext(d, (16, b, 0)) == 0 and rig.memory.read(b << 12, 5) == bytes(5)
    assert rig.pin(d, 1, l1) == 0
    for operation in ((16, l1, 0), (17, l1, a), (16, foreign, 0), (17, a, foreign), (17, foreign, a), (16, 1 << 44, 0)):
        assert rig.mmuext(d, operation) == -errno.EINVAL
    assert [rig.count(m) for m in (a, b, l1, foreign)] == [1, 1, 2, 1]


def test_set_ldt_checks_its_arguments(rig: Rig, d: FakeDomain) -> None:
    for base, entries in ((0x1001, 5), (0xFFFF800000000000, 5), (1 << 50, 5), (0x1000, 8193)):
        assert rig.mmuext(d, (13, base, entries)) == -errno.EINVAL
    assert rig.mmuext(d, (13, 0x7000, 16)) == 0
    assert (d.v.ldt_base, d.v.ldt_ents) == (0x7000, 16)
    assert rig.mmuext(d, (13, 0x1001, 0)) == 0, "without entries the address does not matter"
    assert (d.v.ldt_base, d.v.ldt_ents) == (0, 0)


def test_dom0_software_has_no_vcpu(rig: Rig) -> None:
    from pyxen.abi.xen import MMUEXT_OP

    for command in (5, 6, 13, 15):
        caller = Caller(rig.dom0, MMUEXT_OP.pack(command, 0, 0), vcpu=False)
        assert rig.call(mm.do_mmuext_op, caller, Caller.BASE, 1, 0, DOMID_SELF) == -errno.EINVAL


# --- update_va_mapping --------------------------------------------------------------------------------------------


def test_update_va_mapping(rig: Rig, d: FakeDomain) -> None:
    (data,) = rig.alloc(d)
    l4, _, _, l1 = rig.tree(d, slot=3)
    assert rig.mmuext(d, (NEW_BASEPTR, l4, 0)) == 0
    va = 3 << 39 | 9 << 12
    d.v.log.clear()
    caller = Caller(d)
    assert rig.call(mm.do_update_va_mapping, caller, va, data << 12 | P | RW, UVMF_TLB_FLUSH | UVMF_ALL) == 0
    assert rig.entry(l1, 9) == data << 12 | P | RW and d.v.log == ["flush"]
    d.v.log.clear()
    assert rig.call(mm.do_update_va_mapping, caller, va, 0, UVMF_INVLPG) == 0
    assert d.v.log == [va] and rig.count(data) == 1
    for bad in (4 << 39, 0xFFFF800000000000, 1 << 55):
        assert rig.call(mm.do_update_va_mapping, caller, bad, data << 12 | P, 0) == -errno.EINVAL
    assert rig.call(mm.do_update_va_mapping, caller, va, l1 << 12 | P | RW, 0) == -errno.EBUSY
    assert rig.call(mm.do_update_va_mapping_otherdomain, caller, va, data << 12 | P, 0, 0) == -errno.EPERM
    assert rig.call(mm.do_update_va_mapping_otherdomain, caller, va, data << 12 | P, 0, 55) == -errno.ESRCH


# --- walks ---------------------------------------------------------------------------------------------------------


def test_walk(rig: Rig, d: FakeDomain) -> None:
    data, ro = rig.alloc(d, 2)
    l4, l3, l2, l1 = rig.tree(d, [(data, P | RW | USER), (ro, P | NX)], slot=511)
    base = 511 << 39 | 0xFFFF << 48
    memory = rig.memory
    assert guest_walk(memory, l4, base + 0x123, True) == data << 12 | 0x123
    assert guest_walk(memory, l4, base + 0x1123, False) == ro << 12 | 0x123
    assert guest_walk(memory, l4, base + 0x1123, True) is None
    assert guest_walk(memory, l4, base & (1 << 48) - 1, False) is None, "not canonical"
    assert guest_walk_flags(memory, l4, base) == (data << 12, P | RW | USER)
    assert guest_walk_flags(memory, l4, base + 0x1000) == (ro << 12, P | NX)
    assert guest_l1e(memory, l4, base + 0x5000) == (l1 << 9) + 5
    rig.set(l2, 1, 0x200000 | P | RW | 0x80 | USER)
    rig.set(l4, 511, l3 << 12 | P | USER)
    assert guest_walk(memory, l4, base, True) is None, "read-only above"
    assert guest_walk(memory, l4, base + (2 << 20), False) is None, "beyond the end of RAM"
    rig.set(l2, 1, P | 0x80 | USER)
    assert guest_walk(memory, l4, base + (2 << 20) + 0x12345, False) == 0x12345
    assert guest_walk_flags(memory, l4, base + (2 << 20)) == (0, P | USER)
    assert guest_l1e(memory, l4, base + (2 << 20)) is None
    rig.set(l3, 0, 1 << 50 | P)
    assert guest_walk(memory, l4, base, False) is None and guest_l1e(memory, l4, base) is None
    assert guest_walk_flags(memory, l4, base) is None


# --- the end ---------------------------------------------------------------------------------------------------------


def test_teardown_returns_everything_in_small_steps(rig: Rig) -> None:
    d = rig.add(1, "exact", vcpus=2)
    l4, _ = wide_tree(rig, d)
    assert rig.pin(d, 4, l4) == 0
    assert rig.mmuext(d, (NEW_BASEPTR, l4, 0), (NEW_USER_BASEPTR, l4, 0)) == 0
    l4b, _ = wide_tree(rig, d)
    rig.always_preempt()
    rig.between = lambda: False
    assert rig.pin(d, 4, l4b) == -errno.EINTR  # left half-validated for good
    heap = rig.frames.alloc_xenheap(d)  # type: ignore[arg-type]
    assert rig.teardown(d) > 3
    assert d.tot_pages == 0 and rig.frames.pages_held(d) == 0
    rig.frames.free_xenheap(heap)
    nothing_left(rig)


def test_frames_mapped_by_others_outlive_their_owner(rig: Rig, d: FakeDomain) -> None:
    mfn, _ = rig.alloc(d, 2)
    assert rig.frames.get_page_and_type(mfn, d, PGT_WRITABLE)  # a grant mapping
    rig.teardown(d)
    assert d.tot_pages == 1 and rig.frames.page_owner(mfn) == 1
    rig.frames.put_page_and_type(mfn)
    assert d.tot_pages == 0
    nothing_left(rig)


def test_preemptible_get_for_others(rig: Rig, d: FakeDomain) -> None:
    l4, _ = wide_tree(rig, d)
    rig.always_preempt()
    goes = 1
    while (rc := rig.frames.get_page_and_type_preemptible(l4, d, PGT_L4)) == -ERESTART:  # type: ignore[arg-type]
        goes += 1
    assert rc == 0 and goes > 3
    rig.frames.put_page_and_type(l4)
    assert rig.call(mm.do_mmuext_op, Caller(d), 0, 0, 0, DOMID_SELF) == 0
    assert all((rig.count(m), rig.type_count(m)) == (1, 0) for m in d.frames)
    assert not rig.frames.get_page_and_type(l4, rig.add(2), PGT_L1)
    assert rig.frames.get_page_and_type(l4, d, PGT_SEG_DESC) is False or rig.type_of(l4) == 5
