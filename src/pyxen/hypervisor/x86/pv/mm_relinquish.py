# SPDX-License-Identifier: GPL-2.0-only
"""The end of a PV domain's memory (Xen: xen/arch/x86/domain.c, domain_relinquish_resources, relinquish_memory).

In order: the vCPUs' roots; each frame's pin and its owner's reference; page tables that are still (partly) valid
because their validation was interrupted for good, from the highest level down.  What others have mapped stays until
they let go.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pyxen.hypervisor.frames import OWNER_SCAN
from pyxen.hypervisor.frames_types import (
    PGT_L1,
    PGT_L2,
    PGT_L3,
    PGT_L4,
    PGT_PARTIAL,
    PGT_PINNED,
    PGT_TYPE_MASK,
    PGT_VALIDATED,
    budget_from_now,
)

if TYPE_CHECKING:
    from pyxen.hypervisor.domain import Domain
    from pyxen.hypervisor.frames import FrameTable

_OWNERS: Final = 0
_PASSES: Final = (_OWNERS, PGT_L4, PGT_L3, PGT_L2)
_TABLES: Final = frozenset((PGT_L1, PGT_L2, PGT_L3, PGT_L4))
_CHECK_EVERY: Final = 64
_BUDGET_NS: Final = 150_000
"""Of a slice. The last table it undoes may take half a millisecond more."""


@dataclass(slots=True)
class Progress:
    """How far the teardown of a domain has come: ``d->arch.relmem``."""

    step: int = 0
    mfn: int = 0


def relinquish_memory(domain: Domain, budget_ns: int = _BUDGET_NS) -> bool:
    """Do a piece of the teardown of a dying domain; True when nothing is left to do (call again until then).

    The domain's vCPUs run no more and its GDT and LDT frames have been put.  Afterwards ``frames.pages_held(domain)``
    is the number of frames that others still refer to.
    """
    frames = domain.hypervisor.frames
    frames.lock.acquire()
    try:
        frames.start_budget(budget_from_now(budget_ns))
        progress = frames.relinquishing.get(domain.domid)
        if progress is None:
            frames.domains[domain.domid] = domain
            frames.flush(domain)
            progress = frames.relinquishing[domain.domid] = Progress()
        if not (_roots(frames, domain) and frames.put_deferred(domain.domid) and _pins(frames, domain)):
            return False
        while progress.step < len(_PASSES):
            if progress.step and not domain.tot_pages:
                break  # nothing is left that others hold or that holds itself
            if not _sweep(frames, domain, progress):
                return False
            progress.step += 1
            progress.mfn = 0
        del frames.relinquishing[domain.domid]
        return True
    finally:
        frames.release()


def _roots(frames: FrameTable, domain: Domain) -> bool:
    """vcpu_destroy_pagetables() of each vCPU."""
    for vcpu in domain.vcpus:
        pv = vcpu.pv
        root, user = pv.guest_table, pv.guest_table_user
        pv.guest_table = pv.guest_table_user = 0
        for mfn in (root, user):
            if mfn:
                frames.put_root(mfn)
        if (root or user) and frames.preempt():
            return False
    return True


def _pins(frames: FrameTable, domain: Domain) -> bool:
    """Unpin every table while the frames it maps still have their owner's reference: to undo a table is cheap then,
    and four
    times as dear when each entry is its frame's last user."""
    domid = domain.domid
    pinned = frames.pinned.get(domid)
    while pinned:
        mfn = pinned.pop()
        if frames.get(mfn, domid):
            if frames.type_info[mfn] & PGT_PINNED:
                frames.type_info[mfn] &= ~PGT_PINNED
                frames.put_root(mfn)
            frames.put(mfn)
        if not frames.put_deferred(domid) or frames.preempt():
            return False
    return True


def _sweep(frames: FrameTable, domain: Domain, progress: Progress) -> bool:
    """One pass over the domain's frames; False when the budget is used up."""
    page_type, domid = _PASSES[progress.step], domain.domid
    check = _CHECK_EVERY
    start = progress.mfn
    while start < frames.nr_frames:
        mfn = frames.next_owned(domid, start, start + OWNER_SCAN)
        if mfn < 0:
            start += OWNER_SCAN
            if frames.preempt():
                progress.mfn = start
                return False
            continue
        frames.get(mfn, domid)
        if frames.type_info[mfn] & PGT_TYPE_MASK in _TABLES:
            check = 1  # undoing a table costs as much as a few hundred frames do
        if page_type == _OWNERS:
            frames.drop_owner_refs(mfn)
            finished = True
        else:
            finished = _break_up(frames, mfn, page_type)
        frames.put(mfn)
        if not finished or (frames.deferred and not frames.put_deferred(domid)):
            progress.mfn = mfn
            return False
        check -= 1
        if not check:
            if frames.preempt():
                progress.mfn = mfn + 1
                return False
            check = _CHECK_EVERY
        start = mfn + 1
    return True


def _break_up(frames: FrameTable, mfn: int, page_type: int) -> bool:
    """Undo a table that nobody uses any more but that is still valid: partly validated, or part of a circle.

    Tables are not shared between domains and the roots are gone, so at this point no count says otherwise.
    """
    info = frames.type_info[mfn]
    if info & PGT_TYPE_MASK != page_type or not info & (PGT_VALIDATED | PGT_PARTIAL):
        return True
    partial = info & PGT_PARTIAL
    frames.type_info[mfn] = info & ~(PGT_VALIDATED | PGT_PARTIAL)
    if not partial:
        frames.partial[mfn] = (512, False)
    if frames.validator.devalidate(mfn, page_type):
        if not partial:  # the flag owns a reference of each kind
            frames.type_info[mfn] += 1
            frames.count_info[mfn] += 1
        frames.type_info[mfn] |= PGT_PARTIAL
        return False
    if partial:
        frames.type_info[mfn] -= 1
        frames.put(mfn)
    return True
