# SPDX-License-Identifier: GPL-2.0-only
"""Changing one entry of a PV guest's page tables (Xen: xen/arch/x86/mm.c, mod_l1_entry ... mod_l4_entry).

The new entry's references are taken, the entry is stored, the old entry's references are dropped, in this order.  The
frame table's lock is held; the guest's TLB is its own affair, as the ABI says.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from pyxen.abi.xen import DOMID_IO
from pyxen.hypervisor.frames_types import (
    COUNT_MASK,
    ERESTART,
    OWNED,
    PGT_L1,
    PGT_L2,
    PGT_L4,
    PGT_TYPE_MASK,
    PGT_VALIDATED,
    PGT_WRITABLE,
)
from pyxen.hypervisor.x86.pv.mm_flags import (
    ADDRESS_MASK,
    BASE_DISALLOW_MASK,
    MUST_CHECK,
    PAGE_AD,
    PAGE_GUEST_KERNEL,
    PAGE_PRESENT,
    PAGE_RW,
    PAGE_USER,
    is_guest_l4_slot,
)

if TYPE_CHECKING:
    from pyxen.hypervisor.domain import Domain
    from pyxen.hypervisor.frames import FrameTable

_LEVEL: Final = PGT_L1


def mod_l1_entry(frames: FrameTable, at: int, new: int, owner: Domain, pg_owner: Domain, preserve_ad: bool) -> int:
    """mod_l1_entry(): store ``new`` at index ``at`` of ``memory.q``, in a validated L1 table of ``owner``.

    0 or -errno as PageTables.get_page_from_l1e(); then nothing has changed.
    """
    q = frames.memory.q
    old = q[at]
    if not new & PAGE_PRESENT:
        q[at] = new | old & PAGE_AD if preserve_ad else new
    else:
        tables = frames.tables
        if new & tables.l1_disallow_mask(owner):
            return -errno.EINVAL
        similar = not (old ^ new) & MUST_CHECK
        if not similar:
            mfn = (new & ADDRESS_MASK) >> 12
            types = frames.type_info
            if (
                mfn < frames.nr_frames
                and frames.owner[mfn] == pg_owner.domid | OWNED
                and (not new & PAGE_RW or types[mfn] & PGT_TYPE_MASK == PGT_WRITABLE)
                and pg_owner.domid != DOMID_IO
            ):
                # get_page_from_l1e() when nothing can stand in the way
                if new & PAGE_RW:
                    types[mfn] += 1
                frames.count_info[mfn] += 1
            else:
                rc = tables.get_page_from_l1e(new, owner, pg_owner)
                if rc:
                    return rc
        if not new & PAGE_USER and owner.pv.mode == "exact":
            new |= PAGE_USER | PAGE_GUEST_KERNEL
        q[at] = new | old & PAGE_AD if preserve_ad else new
        if similar:
            return 0
    if old & PAGE_PRESENT:
        frames.tables.put_page_from_l1e(old, owner)
    return 0


def mod_table_entry(frames: FrameTable, at: int, new: int, owner: Domain, page_type: int, preserve_ad: bool) -> int:
    """mod_l2_entry() to mod_l4_entry(), by the type of the table. 0, -EINVAL or -ERESTART (nothing has changed yet)."""
    if page_type == PGT_L4 and not is_guest_l4_slot(at & 511):
        return -errno.EINVAL
    q = frames.memory.q
    old = q[at]
    if new & PAGE_PRESENT:
        if new & BASE_DISALLOW_MASK:
            return -errno.EINVAL
        similar = not (old ^ new) & MUST_CHECK
        if not similar:
            rc = frames.get_root((new & ADDRESS_MASK) >> 12, owner.domid, page_type - _LEVEL)
            if rc:
                return rc if rc == -ERESTART else -errno.EINVAL
        if not new & PAGE_USER and owner.pv.mode == "exact":
            new |= PAGE_USER
        q[at] = new | old & PAGE_AD if preserve_ad else new
        if similar:
            return 0
    else:
        q[at] = new | old & PAGE_AD if preserve_ad else new
    if old & PAGE_PRESENT:
        frames.put_root((old & ADDRESS_MASK) >> 12)
    return 0


def mod_entry(frames: FrameTable, at: int, new: int, owner: Domain, pg_owner: Domain, preserve_ad: bool) -> int:
    """What MMU_NORMAL_PT_UPDATE does to the word at index ``at`` of ``memory.q``, in a frame that is ``owner``'s."""
    mfn = at >> 9
    info = frames.type_info[mfn]
    page_type = info & PGT_TYPE_MASK
    if info & PGT_VALIDATED and info & COUNT_MASK:
        if page_type == PGT_L1:
            return mod_l1_entry(frames, at, new, owner, pg_owner, preserve_ad)
        if PGT_L2 <= page_type <= PGT_L4:
            return mod_table_entry(frames, at, new, owner, page_type, preserve_ad)
        if page_type != PGT_WRITABLE:
            return -errno.EINVAL
        _write_word(frames, at, new)
        return 0
    if frames.get_type(mfn, PGT_WRITABLE):
        return -errno.EINVAL
    _write_word(frames, at, new)
    frames.put_type(mfn)
    return 0


def _write_word(frames: FrameTable, at: int, value: int) -> None:
    frames.memory.q[at] = value
    frames.memory.written(at >> 9)
    frames.mark_dirty(at >> 9)
