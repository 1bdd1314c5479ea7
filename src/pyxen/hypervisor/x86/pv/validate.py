# SPDX-License-Identifier: GPL-2.0-only
"""What may stand in a PV guest's page tables: validation of L1 to L4 tables and descriptor pages, and its undoing.

Xen: xen/arch/x86/mm.c (get_page_from_l1e ... alloc_l4_table, free_l4_table, alloc_segdesc_page, adjust_guest_l*e).

A table is validated when it is first used as one, entry by entry; afterwards it holds a reference to everything it
maps, and changes only entry by entry through :mod:`pyxen.hypervisor.x86.pv.mm`.  Tables above level 1 are validated
and undone preemptibly: one level 1 table (at most 512 entries) is the smallest step.

Linear (recursive) page tables are refused, as by a Xen built without CONFIG_PV_LINEAR_PT (XSA-213, XSA-240).

All of it runs with the frame table's lock held.
"""

from __future__ import annotations

import errno
from array import array
from typing import TYPE_CHECKING, Final

from pyxen.abi.xen import DOMID_IO, DOMID_XEN, DomId
from pyxen.hypervisor.frames_types import (
    COUNT_MASK,
    ERESTART,
    OWNED,
    PGC_XEN_HEAP,
    PGT_L1,
    PGT_L2,
    PGT_L4,
    PGT_SEG_DESC,
    PGT_TYPE_MASK,
    PGT_WRITABLE,
)
from pyxen.hypervisor.x86.pv.descriptors import check_descriptor
from pyxen.hypervisor.x86.pv.mm_flags import (
    ADDRESS_MASK,
    BASE_DISALLOW_MASK,
    FIRST_XEN_SLOT,
    L1_DISALLOW_MASK,
    L1_DISALLOW_MASK_IO,
    LAST_XEN_SLOT,
    PAGE_GUEST_KERNEL,
    PAGE_PRESENT,
    PAGE_RW,
    PAGE_USER,
    is_guest_l4_slot,
)

if TYPE_CHECKING:
    from pyxen.hypervisor.domain import Domain
    from pyxen.hypervisor.frames import FrameTable

_ZERO_PAGE: Final = bytes(4096)
_INVALID_PFN: Final = ADDRESS_MASK >> 12
_LEVEL: Final = PGT_L1
"""Distance between the types of two levels."""


class PageTables:
    """The validator of a :class:`FrameTable`, which makes it."""

    def __init__(self, frames: FrameTable) -> None:
        self.frames = frames
        self.q = frames.memory.q
        self.b = frames.memory.b

    # --- leaf entries --------------------------------------------------------------------------------

    def l1_disallow_mask(self, domain: Domain) -> int:
        """l1_disallow_mask(): only who may map I/O memory chooses caching attributes."""
        return L1_DISALLOW_MASK_IO if domain.is_privileged else L1_DISALLOW_MASK

    def get_page_from_l1e(self, entry: int, owner: Domain, pg_owner: Domain) -> int:
        """get_page_from_l1e(): take what a present L1 entry in a table of ``owner`` refers to, a frame of ``pg_owner``.

        0; -EINVAL: flags that are not allowed; -EPERM: no RAM; -EBUSY: not ``pg_owner``'s, or to be mapped writable
        and in use as a page table or descriptor page.
        """
        frames = self.frames
        if entry & self.l1_disallow_mask(owner):
            return -errno.EINVAL
        mfn = (entry & ADDRESS_MASK) >> 12
        if mfn >= frames.nr_frames or frames.owner[mfn] == DOMID_IO | OWNED:
            return self._get_io_page(mfn, owner, pg_owner)
        if not frames.get(mfn, pg_owner.domid):
            return -errno.EBUSY
        if entry & PAGE_RW and frames.get_type(mfn, PGT_WRITABLE):
            frames.put(mfn)
            return -errno.EBUSY
        return 0

    def _get_io_page(self, mfn: int, owner: Domain, pg_owner: Domain) -> int:
        # DOMID_IO reverts to the caller for the privilege check; there is no device memory behind the end of RAM.
        who = owner if pg_owner.domid == DOMID_IO else pg_owner
        if mfn < self.frames.nr_frames and who.is_privileged and owner.is_privileged:
            return 0
        return -errno.EINVAL if mfn == _INVALID_PFN else -errno.EPERM

    def put_page_from_l1e(self, entry: int, owner: Domain) -> None:
        """put_page_from_l1e(): drop what an entry referred to. Entries that are not present refer to nothing."""
        if not entry & PAGE_PRESENT:
            return
        frames = self.frames
        mfn = (entry & ADDRESS_MASK) >> 12
        if mfn >= frames.nr_frames:
            return
        word = frames.owner[mfn]
        if word == DOMID_IO | OWNED:
            return
        if word != owner.domid | OWNED:
            # Another domain's frame (a grant) loses its PTE without its grant being unmapped. When that domain frees
            # it, only
            # its own translations are looked after: this one's must be gone before.
            frames.flush_at_release(owner)
        if entry & PAGE_RW:
            frames.put_type(mfn)
        elif (
            frames.type_info[mfn] & PGT_TYPE_MASK == PGT_SEG_DESC
            and frames.type_info[mfn] & COUNT_MASK
            and word == owner.domid | OWNED
        ):
            # A page of an LDT in use, perhaps: Xen lets go of the whole shadow LDT, and the CPU asks again for what
            # it needs.
            self._invalidate_shadow_ldt(owner)
        frames.put(mfn)

    def _invalidate_shadow_ldt(self, domain: Domain) -> None:
        from pyxen.hypervisor.x86.pv import ldt

        for vcpu in domain.vcpus:
            ldt.invalidate(vcpu.pv)

    # --- the validator ----------------------------------------------------------------------------------

    def validate(self, mfn: int, page_type: int) -> int:
        """alloc_page_type(): see :class:`pyxen.hypervisor.frames_types.Validator`."""
        if page_type == PGT_L1:
            return self._alloc_l1_table(mfn)
        if page_type == PGT_SEG_DESC:
            return self._alloc_segdesc_page(mfn)
        if PGT_L2 <= page_type <= PGT_L4:
            return self._alloc_table(mfn, page_type)
        return -errno.EINVAL

    def devalidate(self, mfn: int, page_type: int) -> int:
        """free_page_type()."""
        if page_type == PGT_L1:
            self.frames.partial.pop(mfn, None)
            self._free_l1_table(mfn)
            return 0
        return self._free_table(mfn, page_type)

    def _owner(self, mfn: int) -> Domain | None:
        """The domain whose rules apply to a table. Xen's own frames and DOMID_IO's are nobody's page tables."""
        domid = self.frames.owner[mfn] & ~OWNED
        if self.frames.count_info[mfn] & PGC_XEN_HEAP or domid in (DOMID_IO, DOMID_XEN):
            return None
        return self.frames.domains.get(DomId(domid))

    def _alloc_l1_table(self, mfn: int) -> int:
        domain = self._owner(mfn)
        if domain is None:
            return -errno.EINVAL
        if bytes(self.b[mfn << 12 : (mfn + 1) << 12]) == _ZERO_PAGE:  # views compare slowly
            return 0
        frames = self.frames
        counts, types, owners, nr_frames = frames.count_info, frames.type_info, frames.owner, frames.nr_frames
        mine = domain.domid | OWNED
        disallowed = self.l1_disallow_mask(domain)
        exact = domain.pv.mode == "exact"
        base = mfn << 9
        entries = self.q[base : base + 512].tolist()
        adjusted = False
        rc = 0
        for i, entry in enumerate(entries):
            if not entry & PAGE_PRESENT:
                continue
            target = (entry & ADDRESS_MASK) >> 12
            # get_page_from_l1e() spelled out for the common case: this loop sees every page of a guest.
            if entry & disallowed or target >= nr_frames or owners[target] != mine:
                rc = self.get_page_from_l1e(entry, domain, domain)
                if rc:
                    break
            else:
                if entry & PAGE_RW:
                    info = types[target]
                    if info & PGT_TYPE_MASK == PGT_WRITABLE:
                        types[target] = info + 1
                    elif frames.get_type(target, PGT_WRITABLE):
                        rc = -errno.EBUSY
                        break
                counts[target] += 1
            if exact and not entry & PAGE_USER:
                entries[i] = entry | PAGE_USER | PAGE_GUEST_KERNEL
                adjusted = True
        if rc:
            for entry in entries[:i]:
                self.put_page_from_l1e(entry, domain)
            return rc
        if adjusted:
            self.q[base : base + 512] = memoryview(array("Q", entries))
        return 0

    def _free_l1_table(self, mfn: int) -> None:
        if bytes(self.b[mfn << 12 : (mfn + 1) << 12]) == _ZERO_PAGE:  # views compare slowly
            return
        frames = self.frames
        domain = frames.domains[frames.owner[mfn] & ~OWNED]
        counts, types, owners, nr_frames = frames.count_info, frames.type_info, frames.owner, frames.nr_frames
        stamps, generation = frames.stamp, frames.generation[domain.domid]
        mine = domain.domid | OWNED
        base = mfn << 9
        for entry in self.q[base : base + 512].tolist():
            if not entry & PAGE_PRESENT:
                continue
            target = (entry & ADDRESS_MASK) >> 12
            if target < nr_frames and owners[target] == mine and counts[target] & COUNT_MASK > 1:
                info = types[target]
                if entry & PAGE_RW:
                    types[target] = info - 1  # a mapped writable frame is of type PGT_WRITABLE: nothing to undo
                    if info & COUNT_MASK == 1:
                        stamps[target] = generation
                    counts[target] -= 1
                    continue
                if info & PGT_TYPE_MASK != PGT_SEG_DESC:
                    counts[target] -= 1
                    continue
            self.put_page_from_l1e(entry, domain)

    def _alloc_segdesc_page(self, mfn: int) -> int:
        domain = self._owner(mfn)
        if domain is None:
            return -errno.EINVAL
        gates = domain.pv.mode == "exact"
        base = mfn << 9
        page = self.q[base : base + 512].tolist()
        for i, descriptor in enumerate(page):
            if descriptor:
                checked = check_descriptor(descriptor, allow_gates=gates)
                if checked is None:
                    return -errno.EINVAL
                page[i] = checked
        self.q[base : base + 512] = memoryview(array("Q", page))
        return 0

    # --- tables of tables --------------------------------------------------------------------------------

    def _alloc_table(self, mfn: int, page_type: int) -> int:
        """alloc_l2_table() to alloc_l4_table()."""
        domain = self._owner(mfn)
        if domain is None:
            return -errno.EINVAL
        frames, q = self.frames, self.q
        start, partial_set = frames.partial.pop(mfn, (0, False))
        domid = domain.domid
        exact = domain.pv.mode == "exact"
        is_l4 = page_type == PGT_L4
        base = mfn << 9
        progress = False
        for i, entry in enumerate(q[base + start : base + 512].tolist(), start):
            if not entry & PAGE_PRESENT or (is_l4 and FIRST_XEN_SLOT <= i <= LAST_XEN_SLOT):
                continue
            if progress and frames.preempt():
                frames.partial[mfn] = (i, False)
                return -ERESTART
            if entry & BASE_DISALLOW_MASK:
                rc = -errno.EINVAL
            else:
                rc = frames.get_and_type((entry & ADDRESS_MASK) >> 12, domid, page_type - _LEVEL, partial_set)
            if rc:
                if rc == -ERESTART:
                    frames.partial[mfn] = (i, True)
                elif progress or start or partial_set or frames.failed >= 0:
                    # What was done so far is undone preemptibly. If the child is left partial, entry i takes over its
                    # reference.
                    frames.partial[mfn] = (i, partial_set or frames.failed >= 0)
                    frames.failed = mfn
                return rc if rc == -ERESTART else -errno.EINVAL
            partial_set = False
            progress = True
            if exact and not entry & PAGE_USER:
                q[base + i] = entry | PAGE_USER
        if is_l4:
            domain.pv.install_xen_slots(mfn)
        return 0

    def _free_table(self, mfn: int, page_type: int) -> int:
        """free_l2_table() to free_l4_table(): from the last valid entry down."""
        frames = self.frames
        count, partial_set = frames.partial.pop(mfn, (512, False))
        is_l4 = page_type == PGT_L4
        base = mfn << 9
        entries = self.q[base : base + 512].tolist()
        i = count if partial_set else count - 1
        while i >= 0:
            entry = entries[i]
            if entry & PAGE_PRESENT and (not is_l4 or is_guest_l4_slot(i)):
                child = (entry & ADDRESS_MASK) >> 12
                if frames.put_type(child, partial_set):
                    frames.partial[mfn] = (i, True)
                    return -ERESTART
                frames.put(child)
                if i and frames.preempt():
                    frames.partial[mfn] = (i, False)
                    return -ERESTART
            partial_set = False
            i -= 1
        return 0
