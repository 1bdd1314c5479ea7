# SPDX-License-Identifier: GPL-2.0-only
"""GNTTABOP_copy: copy between frames, each named by a grant or, for the caller's own, by its number.

Xen: gnttab_copy_one, __acquire_grant_for_copy in xen/common/grant_table.c.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pyxen.abi.grant_table import Gntst
from pyxen.abi.xen import DOMID_SELF, PAGE_SHIFT, PAGE_SIZE, DomId, Mfn
from pyxen.errors import XenError
from pyxen.hypervisor.frames import PGT_WRITABLE
from pyxen.hypervisor.grant_entry import HSTR_INC, HSTW_INC, GrantError, stopped

if TYPE_CHECKING:
    from pyxen.hypervisor.domain import Domain


@dataclass(frozen=True, slots=True)
class CopyEnd:
    """One end of a copy: ``number`` is a reference in ``domid``'s table (``by_grant``) or a frame of the caller."""

    by_grant: bool
    number: int
    domid: DomId
    offset: int


def copy(current: Domain, source: CopyEnd, dest: CopyEnd, length: int) -> None:
    """Copy ``length`` bytes, within one page at each end.

    GrantError: BAD_COPY_ARG (crosses a page), BAD_DOMAIN, PERMISSION_DENIED (a frame number of another domain),
    BAD_GNTREF, BAD_PAGE, GENERAL_ERROR (not granted; the target cannot be writable).
    """
    if source.offset + length > PAGE_SIZE or dest.offset + length > PAGE_SIZE:
        raise GrantError(Gntst.BAD_COPY_ARG, "copy beyond page area")
    source_domain = _domain_of(current, source)
    dest_domain = _domain_of(current, dest)
    try:
        current.hypervisor.xsm.grant_copy(source_domain, dest_domain)
    except XenError as error:
        raise GrantError(Gntst.PERMISSION_DENIED, str(error)) from error
    memory = current.hypervisor.memory
    with (_held(current, source, source_domain, readonly=True) as source_mfn,
          _held(current, dest, dest_domain, readonly=False) as dest_mfn):
        data = memory.read((source_mfn << PAGE_SHIFT) + source.offset, length)
        memory.write((dest_mfn << PAGE_SHIFT) + dest.offset, data)
        memory.written(dest_mfn)
        if dest_domain.log_dirty is not None:
            dest_domain.log_dirty.mark_frames(dest_mfn)


def _domain_of(current: Domain, end: CopyEnd) -> Domain:
    if end.domid == DOMID_SELF:
        return current
    if not end.by_grant:
        raise GrantError(Gntst.PERMISSION_DENIED, "only allow copy-by-mfn for DOMID_SELF")
    domain = current.hypervisor.domains.get(end.domid)
    if domain is None:
        raise GrantError(Gntst.BAD_DOMAIN, f"no domain {end.domid}")
    return domain


@contextmanager
def _held(current: Domain, end: CopyEnd, domain: Domain, *, readonly: bool) -> Iterator[Mfn]:
    """Hold the end's frame: pinned in its table if granted, with a type reference if it is to be written."""
    increment = HSTR_INC if readonly else HSTW_INC
    if end.by_grant:
        mfn = _pin(current, end, domain, increment, readonly)
    else:
        mfn = Mfn(_own_frame(current, end.number, readonly))
    frames = domain.hypervisor.frames
    try:
        if not frames.get_page(mfn, domain):
            raise GrantError(Gntst.BAD_PAGE, f"frame {mfn:#x} is not of {domain!r}")
        try:
            if not readonly and not frames.get_page_type(mfn, PGT_WRITABLE):
                raise GrantError(Gntst.GENERAL_ERROR, f"could not get writable frame {mfn:#x}")
            try:
                yield mfn
            finally:
                if not readonly:
                    frames.put_page_type(mfn)
        finally:
            frames.put_page(mfn)
    finally:
        if end.by_grant:
            _unpin(end, domain, increment)


def _own_frame(current: Domain, number: int, readonly: bool) -> int:
    """The caller's own frame by its number, which a translated domain has from its physmap; -1 for none."""
    if not current.is_hvm:
        return number
    p2m = current.hvm.p2m
    mfn = p2m.gfn_to_mfn(number) if readonly else p2m.writable_mfn(number)
    return -1 if mfn is None else mfn


def _pin(current: Domain, end: CopyEnd, domain: Domain, increment: int, readonly: bool) -> Mfn:
    table = domain.grant_table
    with stopped(domain), table.lock:
        return table.pin(end.number, current.domid, increment, readonly=readonly, mapping=False).mfn


def _unpin(end: CopyEnd, domain: Domain, increment: int) -> None:
    with stopped(domain), domain.grant_table.lock:
        domain.grant_table.unpin(end.number, increment)
