# SPDX-License-Identifier: GPL-2.0-only
"""Mapping grants and undoing it (Xen: __gnttab_map_grant_ref, __gnttab_unmap_common, unmap_common_complete).

Each mapping for a CPU holds, on the granted frame, one general reference and, if writable, one type reference.  When
the mapping is a PTE of a PV guest these belong to the PTE, as everywhere in PV memory: unmapping clears the PTE and
drops them here, while a page table that is torn down drops them itself; that is why the end of a mapper drops only
what has no PTE.  dom0's software has no page tables: its mappings are views of memory (:class:`BackendMapping`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from pyxen.abi.grant_table import Gntmap, Gntst
from pyxen.abi.xen import PAGE_SHIFT, PAGE_SIZE, Mfn
from pyxen.errors import XenError
from pyxen.hypervisor.grant_entry import DEVR_INC, DEVW_INC, HSTR_INC, HSTW_INC, GrantError, MapTrack, stopped

if TYPE_CHECKING:
    from pyxen.hypervisor.domain import Domain

Install = Callable[[Mfn], int]
"""Make the CPU mapping of a frame: GNTST_*. (GTF_PAT, PWT and PCD change nothing on a CPU without caches.)"""
Remove = Callable[[Mfn, int], int]
"""Undo the CPU mapping: (mfn, GNTMAP_* it was made with) -> GNTST_*."""


def map_grant(mapper: Domain, granter: Domain, ref: int, flags: int, install: Install | None) -> tuple[int, Mfn]:
    """One mapping, inside stopped(granter); the handle and the frame. ``install`` is None for a view (no PTE).

    GrantError: BAD_GNTREF, PERMISSION_DENIED, NO_DEVICE_SPACE, GENERAL_ERROR, BAD_PAGE, or what ``install`` says.
    """
    if not flags & (Gntmap.HOST_MAP | Gntmap.DEVICE_MAP):
        raise GrantError(Gntst.BAD_GNTREF, f"bad flags in grant map op ({flags:x})")
    try:
        mapper.hypervisor.xsm.grant_mapref(mapper, granter, flags)
    except XenError as error:
        raise GrantError(Gntst.PERMISSION_DENIED, str(error)) from error
    tracker = mapper.grant_table
    handle = tracker.get_handle()
    try:
        mfn = _map_pinned(mapper, granter, ref, flags, install)
    except BaseException:
        tracker.put_handle(handle)
        raise
    tracker.maptrack[handle] = MapTrack(granter, ref, flags, install is not None and not mapper.is_hvm)
    return handle, mfn


def _map_pinned(mapper: Domain, granter: Domain, ref: int, flags: int, install: Install | None) -> Mfn:
    table = granter.grant_table
    readonly = bool(flags & Gntmap.READONLY)
    pins = 0
    if flags & Gntmap.HOST_MAP:
        pins += HSTR_INC if readonly else HSTW_INC
    if flags & Gntmap.DEVICE_MAP:
        pins += DEVR_INC if readonly else DEVW_INC
    with table.lock:
        mfn = table.pin(ref, mapper.domid, pins, readonly=readonly, mapping=True).mfn
        held = 0
        try:
            for _ in range(bool(flags & Gntmap.HOST_MAP) + bool(flags & Gntmap.DEVICE_MAP)):
                table.get_frame(mfn, readonly=readonly)
                held += 1
            if flags & Gntmap.HOST_MAP and install is not None:
                status = install(mfn)
                if status != Gntst.OKAY:
                    raise GrantError(Gntst(status), "cannot map there")
        except BaseException:
            for _ in range(held):
                table.put_frame(mfn, readonly=readonly)
            table.unpin(ref, pins)
            raise
    return mfn


@dataclass(slots=True)
class Unmapping:
    """Between the two halves: the mapping is gone, the frame's references are still held, until TLBs are flushed."""

    handle: int
    track: MapTrack
    mfn: Mfn
    done: int
    """The GNTMAP_* that were undone."""


def begin_unmap(mapper: Domain, handle: int, host_addr: int, dev_bus_addr: int, remove: Remove | None) -> Unmapping:
    """__gnttab_unmap_common(), inside stopped(granter): check, and remove the PTE. Zero addresses are not touched.

    GrantError: BAD_HANDLE, PERMISSION_DENIED, BAD_DEV_ADDR, or what ``remove`` says; nothing has changed then.
    """
    track = mapper.grant_table.maptrack.get(handle)
    if track is None:
        raise GrantError(Gntst.BAD_HANDLE, f"bad handle {handle}")
    granter = track.granter
    try:
        mapper.hypervisor.xsm.grant_unmapref(mapper, granter)
    except XenError as error:
        raise GrantError(Gntst.PERMISSION_DENIED, str(error)) from error
    with granter.grant_table.lock:
        # XSA-224: check both halves before either changes, or an error would leave one undone and uncounted.
        if not track.flags & (Gntmap.HOST_MAP | Gntmap.DEVICE_MAP):
            raise GrantError(Gntst.BAD_HANDLE, f"handle {handle} is being unmapped")
        mfn = granter.grant_table.active[track.ref].mfn
        done = 0
        if dev_bus_addr and track.flags & Gntmap.DEVICE_MAP:
            if dev_bus_addr != mfn << PAGE_SHIFT:
                raise GrantError(Gntst.BAD_DEV_ADDR, f"bus address {dev_bus_addr:#x} is not {mfn:#x}'s")
            done |= Gntmap.DEVICE_MAP
        if host_addr and track.flags & Gntmap.HOST_MAP:
            if remove is not None:
                status = remove(mfn, track.flags)
                if status != Gntst.OKAY:
                    raise GrantError(Gntst(status), "not mapped there")
            done |= Gntmap.HOST_MAP
        track.flags &= ~done
        return Unmapping(handle, track, mfn, done)


def finish_unmap(mapper: Domain, unmapping: Unmapping) -> None:
    """unmap_common_complete(), inside stopped(granter), after the flush: drop references, pins, the unused handle."""
    track, mfn, done = unmapping.track, unmapping.mfn, unmapping.done
    table = track.granter.grant_table
    readonly = bool(track.flags & Gntmap.READONLY)
    with table.lock:
        if done & Gntmap.DEVICE_MAP:
            table.put_frame(mfn, readonly=readonly)
            table.unpin(track.ref, DEVR_INC if readonly else DEVW_INC)
        if done & Gntmap.HOST_MAP:
            table.put_frame(mfn, readonly=readonly)
            table.unpin(track.ref, HSTR_INC if readonly else HSTW_INC)
    if done and not track.flags & (Gntmap.HOST_MAP | Gntmap.DEVICE_MAP):
        mapper.grant_table.put_handle(unmapping.handle)
    if done and not readonly:
        mapper.hypervisor.memory.written(mfn)


class BackendMapping:
    """A granted frame, mapped for dom0's software: ``view`` is its 4096 bytes. A context manager; or call unmap()."""

    def __init__(self, mapper: Domain, handle: int, mfn: Mfn, readonly: bool) -> None:
        self._mapper = mapper
        self._handle = handle
        self.mfn = mfn
        self.readonly = readonly
        start = mfn << PAGE_SHIFT
        view = mapper.hypervisor.memory.b[start : start + PAGE_SIZE]
        self.view: memoryview = view.toreadonly() if readonly else view
        self._mapped = True

    def written(self) -> None:
        """To be called after writing through ``view``: engines may hold translated code of the frame."""
        self._mapper.hypervisor.memory.written(self.mfn)

    def unmap(self) -> None:
        """Give the frame back; ``view`` is of no use any more. A second call does nothing."""
        if not self._mapped:
            return
        self._mapped = False
        self.view.release()
        track = self._mapper.grant_table.maptrack.get(self._handle)
        if track is not None:  # else dom0 was torn down under us
            with stopped(track.granter):
                finish_unmap(self._mapper, begin_unmap(self._mapper, self._handle, 1, 0, None))

    def __enter__(self) -> BackendMapping:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.unmap()


def map_for_backend(mapper: Domain, granter: Domain, refs: Sequence[int], *, readonly: bool) -> list[BackendMapping]:
    """Map ``refs`` of ``granter`` for dom0's software (any thread, no lock held): all or none.

    GrantError (see :func:`map_grant`) for the first that fails.
    """
    flags = int(Gntmap.HOST_MAP) | (int(Gntmap.READONLY) if readonly else 0)

    mapped: list[BackendMapping] = []
    try:
        with stopped(granter):
            for ref in refs:
                handle, mfn = map_grant(mapper, granter, ref, flags, None)
                mapped.append(BackendMapping(mapper, handle, mfn, readonly))
    except GrantError:
        for mapping in mapped:
            mapping.unmap()
        raise
    return mapped
