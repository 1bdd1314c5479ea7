# SPDX-License-Identifier: GPL-2.0-only
"""TLB shoot-down: whom each kind of flush reaches, which masks are none, and that no vCPU goes on with what is old."""

from __future__ import annotations

import errno
import struct

import pytest

from pyxen.abi.xen import DOMID_SELF, MMUEXT_OP, UVMF_ALL, UVMF_INVLPG, UVMF_TLB_FLUSH, Hypercall, MmuextCmd
from tests.hypervisor.rig import DATA_PFN, Guest, Machine, va

PAGE = va(DATA_PFN + 5)
OTHER = va(DATA_PFN + 6)
MASK = va(DATA_PFN + 2)
CANONICAL_HOLE = 1 << 50
XENS_OWN = 0xFFFF800000000000


@pytest.fixture(params=["exact", "fast"])
def many(host: Machine, request: pytest.FixtureRequest) -> Guest:
    """A domain of 70 vCPUs: a mask of it is two words."""
    guest = Guest(host, request.param, 70).boot()
    guest.trap_table()
    return guest


def remember(guest: Guest) -> None:
    """Every vCPU has PAGE and OTHER in its translation cache."""
    for vcpu in guest.domain.vcpus:
        vcpu.pv.guest_table = guest.mfns[0]
        assert len(vcpu.pv.read(PAGE, 8) + vcpu.pv.read(OTHER, 8)) == 16


def forget(guest: Guest) -> None:
    for vcpu in guest.domain.vcpus[1:]:
        vcpu.pv.guest_table = 0


def knows(guest: Guest, address: int) -> set[int]:
    return {v.vcpu_id for v in guest.domain.vcpus if address >> 12 in v.pv._read_cache}


def mmuext(guest: Guest, command: int, arg1: int = 0, arg2: int = 0) -> int:
    guest.put(va(DATA_PFN + 3), MMUEXT_OP.pack(command, arg1, arg2))
    return guest.call(Hypercall.MMUEXT_OP, va(DATA_PFN + 3), 1, 0, DOMID_SELF)


def mask(guest: Guest, *words: int, at: int = MASK) -> int:
    guest.put(at, struct.pack(f"<{len(words)}Q", *words))
    return at


EVERYBODY = set(range(70))


@pytest.mark.parametrize(
    ("command", "reached", "others_too"),
    [
        (MmuextCmd.TLB_FLUSH_LOCAL, {0}, True),
        (MmuextCmd.INVLPG_LOCAL, {0}, False),
        (MmuextCmd.TLB_FLUSH_MULTI, {1, 3, 65}, True),
        (MmuextCmd.INVLPG_MULTI, {1, 3, 65}, False),
        (MmuextCmd.TLB_FLUSH_ALL, EVERYBODY, True),
        (MmuextCmd.INVLPG_ALL, EVERYBODY, False),
    ],
)
def test_whom_a_flush_reaches(many: Guest, command: int, reached: set[int], others_too: bool) -> None:
    """``others_too``: a flush of everything takes the other page along."""
    remember(many)
    chosen = mask(many, 0b1010, 1 << 1 | 1 << 63)  # the last bit is of no vCPU there is
    address = PAGE if "INVLPG" in MmuextCmd(command).name else 0
    assert mmuext(many, command, address, chosen) == 0
    assert knows(many, PAGE) == EVERYBODY - reached
    assert knows(many, OTHER) == (EVERYBODY - reached if others_too else EVERYBODY)
    forget(many)


@pytest.mark.parametrize("command", [MmuextCmd.TLB_FLUSH_MULTI, MmuextCmd.INVLPG_MULTI])
@pytest.mark.parametrize("at", [0x1000, CANONICAL_HOLE, XENS_OWN, va(64) - 8])
def test_a_mask_that_cannot_be_read_flushes_nobody(many: Guest, command: int, at: int) -> None:
    """mmuext_op says EINVAL, update_va_mapping EFAULT, as in Xen; the second word of the mask counts."""
    many.put(va(64) - 8, struct.pack("<Q", 0xFFFFFFFFFFFFFFFF))
    remember(many)
    assert mmuext(many, command, PAGE, at) == -errno.EINVAL
    assert knows(many, PAGE) == EVERYBODY
    forget(many)


@pytest.mark.parametrize("address", [CANONICAL_HOLE, XENS_OWN, XENS_OWN + 0x123])
def test_invlpg_of_no_guest_address_does_nothing(many: Guest, address: int) -> None:
    remember(many)
    chosen = mask(many, 2, 0)
    for command in (MmuextCmd.INVLPG_LOCAL, MmuextCmd.INVLPG_MULTI, MmuextCmd.INVLPG_ALL):
        assert mmuext(many, command, address, chosen) == 0
    assert knows(many, PAGE) == EVERYBODY
    forget(many)


@pytest.mark.parametrize(
    ("flags", "reached"),
    [(0, set()), (UVMF_INVLPG, {0}), (UVMF_TLB_FLUSH, {0}), (UVMF_INVLPG | UVMF_ALL, EVERYBODY),
     (UVMF_TLB_FLUSH | UVMF_ALL, EVERYBODY), (UVMF_INVLPG | MASK, {2, 64}), (UVMF_TLB_FLUSH | MASK, {2, 64})],
)
def test_update_va_mapping_flushes_those_it_names(many: Guest, flags: int, reached: set[int]) -> None:
    remember(many)
    mask(many, 1 << 2, 1)
    entry = many.mfns[DATA_PFN + 7] << 12 | 0x67
    assert many.call(Hypercall.UPDATE_VA_MAPPING, PAGE, entry, flags) == 0
    assert knows(many, PAGE) == EVERYBODY - reached
    forget(many)


def test_update_va_mapping_with_a_mask_that_cannot_be_read(many: Guest) -> None:
    remember(many)
    entry = many.mfns[DATA_PFN + 7] << 12 | 0x67
    assert many.call(Hypercall.UPDATE_VA_MAPPING, PAGE, entry, UVMF_INVLPG | 0x1000) == -errno.EFAULT
    assert knows(many, PAGE) == EVERYBODY
    forget(many)


def test_only_a_flush_of_all_voids_the_stamps_of_frames(many: Guest) -> None:
    """A frame that gives up its type is safe to have another one once *every* vCPU has flushed."""
    generation = many.hv.frames.generation
    domid = many.domid
    before = generation[domid]
    mmuext(many, MmuextCmd.TLB_FLUSH_LOCAL)
    mmuext(many, MmuextCmd.TLB_FLUSH_MULTI, 0, mask(many, (1 << 64) - 2, (1 << 64) - 1))
    assert generation[domid] == before
    mmuext(many, MmuextCmd.TLB_FLUSH_MULTI, 0, mask(many, (1 << 64) - 1, (1 << 64) - 1))
    assert generation[domid] == before + 1
    mmuext(many, MmuextCmd.TLB_FLUSH_ALL)
    assert generation[domid] == before + 2


def test_a_frame_that_becomes_a_page_table_is_forgotten_by_every_vcpu(many: Guest) -> None:
    """Some vCPU may write through what it remembers, else: whatever the guest flushed, or did not."""
    for vcpu in many.domain.vcpus:
        vcpu.pv.guest_table = many.mfns[0]
        vcpu.pv.write(PAGE, bytes(8))
    assert many.call(Hypercall.UPDATE_VA_MAPPING, PAGE, 0, 0) == 0  # no flush at all
    assert knows_writable(many) == EVERYBODY
    assert mmuext(many, MmuextCmd.PIN_L1_TABLE, many.mfns[DATA_PFN + 5]) == 0
    assert knows_writable(many) == set()
    forget(many)


def knows_writable(guest: Guest) -> set[int]:
    return {v.vcpu_id for v in guest.domain.vcpus if PAGE >> 12 in v.pv._write_cache}


def test_a_loaded_vcpus_engine_is_flushed_too(many: Guest) -> None:
    cpu = many.machine.cpu
    cpu.journal.clear()
    assert mmuext(many, MmuextCmd.TLB_FLUSH_ALL) == 0
    assert ("flush",) in cpu.journal
    cpu.journal.clear()
    assert mmuext(many, MmuextCmd.TLB_FLUSH_MULTI, 0, mask(many, 2, 0)) == 0
    assert ("flush",) not in cpu.journal  # vCPU 1 is not on it: loading flushes
    assert mmuext(many, MmuextCmd.INVLPG_MULTI, PAGE, mask(many, 1, 0)) == 0
    assert ("flush_page", PAGE) in cpu.journal


def test_vcpus_share_a_root_and_have_user_roots_of_their_own(many: Guest) -> None:
    """Each vCPU's use counts; what one lets go of stays the other's."""
    frames, root, user = many.hv.frames, many.mfns[0], many.mfns[4]
    uses = frames.type_info[root] & 0xFFFF
    second = many.domain.vcpus[1].pv
    from pyxen.hypervisor.x86.pv.mm import install_guest_tables

    assert install_guest_tables(second, root, user)
    assert frames.type_info[root] & 0xFFFF == uses + 1
    user_uses = frames.type_info[user] & 0xFFFF
    assert mmuext(many, MmuextCmd.NEW_USER_BASEPTR, 0) == 0
    assert frames.type_info[user] & 0xFFFF == user_uses - 1
    assert second.guest_table_user == user
    assert mmuext(many, MmuextCmd.NEW_USER_BASEPTR, user) == 0
    assert install_guest_tables(second, user, 0)
    assert frames.type_info[root] & 0xFFFF == uses
