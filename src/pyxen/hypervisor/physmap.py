# SPDX-License-Identifier: GPL-2.0-only
"""HYPERVISOR_memory_op where it changes a translated domain's physmap (Xen: xenmem_add_to_physmap in
xen/common/memory.c, xenmem_add_to_physmap_one in xen/arch/x86/mm.c, guest_remove_page, populate_physmap).

The caller of each function sees to it that the domain's engine executes nothing of it meanwhile.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from pyxen.abi.memory import XENMAPIDX_GRANT_TABLE_STATUS, MapSpace
from pyxen.abi.xen import INVALID_M2P_ENTRY, INVALID_MFN
from pyxen.errors import XenError
from pyxen.hypervisor.frames_types import PGC_XEN_HEAP
from pyxen.hypervisor.x86.hvm.p2m_table import GFN_BITS
from pyxen.hypervisor.x86.hvm.p2m_types import BACKED, RAM, P2mType

if TYPE_CHECKING:
    from pyxen.hypervisor.domain import Domain


def add_to_physmap_one(domain: Domain, space: int, index: int, gpfn: int, foreign: Domain | None = None) -> None:
    """xenmem_add_to_physmap_one(): have the page that ``space`` and ``index`` name appear at ``gpfn``.

    What was at ``gpfn`` goes: memory of the domain is freed, as guest_remove_page() does. XenError: EINVAL for a page
    that is not there or a place out of range, ENOMEM, ENOSYS for a space that a domain here cannot have.
    """
    p2m = domain.hvm.p2m
    frames = domain.hypervisor.frames
    if not 0 <= gpfn < 1 << GFN_BITS:
        raise XenError(errno.EINVAL)
    if space == MapSpace.GMFN_FOREIGN:
        _add_foreign(domain, index, gpfn, foreign)
        return
    mfn = _source(domain, space, index)
    try:
        with p2m.lock:
            old, kind, _ = p2m.get_entry(gpfn)
            if old == mfn and kind in RAM:
                return
            _remove_old(domain, gpfn, old, kind)
            stands_at = frames.m2p.get(mfn)
            if stands_at != INVALID_M2P_ENTRY and not stands_at >> GFN_BITS:
                there, its_kind, _ = p2m.get_entry(stands_at)
                if there == mfn and its_kind in RAM:
                    p2m.remove_page(stands_at, mfn)
            p2m.add_entry(gpfn, mfn, 0, P2mType.RAM_RW)
    finally:
        frames.put_page(mfn)


def _source(domain: Domain, space: int, index: int) -> int:
    """The machine frame, with a reference taken. XenError(EINVAL)."""
    frames = domain.hypervisor.frames
    mfn = -1
    if space == MapSpace.SHARED_INFO:
        if index == 0:
            mfn = domain.shared_info_mfn
    elif space == MapSpace.GRANT_TABLE:
        table = domain.grant_table
        if not index & XENMAPIDX_GRANT_TABLE_STATUS:  # status frames are of version 2
            if len(table.frames) <= index < table.max_frames:
                table.grow(index + 1)
            if 0 <= index < len(table.frames):
                mfn = table.frames[index]
    elif space in (MapSpace.GMFN, MapSpace.GMFN_RANGE):
        return domain.hvm.p2m.get_page(index)
    else:
        raise XenError(errno.ENOSYS)
    if mfn < 0 or not frames.get_page(mfn, domain):
        raise XenError(errno.EINVAL)
    return mfn


def _remove_old(domain: Domain, gpfn: int, old: int, kind: P2mType) -> None:
    """Whatever stands at the place. A grant or foreign mapping is left for add_entry() to complain about."""
    if old == INVALID_MFN or kind not in RAM:
        return
    frames = domain.hypervisor.frames
    if frames.count_info[old] & PGC_XEN_HEAP:
        domain.hvm.p2m.remove_page(gpfn, old)
    else:
        remove_page(domain, gpfn)


def _add_foreign(domain: Domain, index: int, gpfn: int, foreign: Domain | None) -> None:
    """p2m_add_foreign(): map another domain's frame, and hold it. EINVAL."""
    if foreign is None or foreign is domain:
        raise XenError(errno.EINVAL)
    frames, p2m = domain.hypervisor.frames, domain.hvm.p2m
    if foreign.is_hvm:
        mfn = foreign.hvm.p2m.get_page(index)
    else:
        mfn = index
        if not frames.get_page(mfn, foreign):
            raise XenError(errno.EINVAL)
    try:
        with p2m.lock:
            old, kind, _ = p2m.get_entry(gpfn)
            _remove_old(domain, gpfn, old, kind)
            p2m.add_entry(gpfn, mfn, 0, P2mType.MAP_FOREIGN)
    except XenError:
        frames.put_page(mfn)
        raise


def remove_from_physmap(domain: Domain, gpfn: int) -> None:
    """XENMEM_remove_from_physmap: the page is mapped nowhere then, but still the domain's. ENOENT if nothing is."""
    p2m = domain.hvm.p2m
    with p2m.lock:
        mfn, kind, _ = p2m.get_entry(gpfn)
        if kind not in BACKED:
            raise XenError(errno.ENOENT)
        if kind is P2mType.MAP_FOREIGN:
            p2m.set_entry(gpfn, 0, 0, P2mType.INVALID)
        elif kind in RAM:
            p2m.remove_page(gpfn, mfn)
        else:
            raise XenError(errno.EINVAL)  # a grant is unmapped by its handle


def remove_page(domain: Domain, gpfn: int) -> bool:
    """guest_remove_page(): give a page of the domain up. False if none is at ``gpfn``."""
    p2m, frames = domain.hvm.p2m, domain.hypervisor.frames
    with p2m.lock:
        mfn, kind, _ = p2m.get_entry(gpfn)
        if kind not in RAM or not frames.get_page(mfn, domain):
            return False
        try:
            p2m.remove_page(gpfn, mfn)
            frames.guest_remove_page(mfn, domain)
        finally:
            frames.put_page(mfn)
        return True


def populate_one(domain: Domain, gpfn: int, order: int) -> None:
    """One extent of XENMEM_populate_physmap. XenError: ENOMEM, EINVAL; nothing of it is left then."""
    frames, p2m = domain.hypervisor.frames, domain.hvm.p2m
    if gpfn >> GFN_BITS or gpfn + (1 << order) - 1 >> GFN_BITS:
        raise XenError(errno.EINVAL)
    first = frames.alloc_domheap(domain, order)
    try:
        p2m.populate(gpfn, [range(first, first + (1 << order))])
    except XenError:
        for i in range(1 << order):
            with p2m.lock:
                mfn, _kind, _ = p2m.get_entry(gpfn + i)
                if mfn == first + i:
                    p2m.remove_page(gpfn + i, mfn)
            frames.guest_remove_page(first + i, domain)
        raise
