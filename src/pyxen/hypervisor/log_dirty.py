# SPDX-License-Identifier: GPL-2.0-only
"""Log-dirty: which frames of a domain were written since somebody last asked (Xen: xen/arch/x86/mm/paging.c,
paging_log_dirty_op; hap_enable_log_dirty).

Who writes, and how it is noticed:

* the guest under nested paging: its frames are write-protected; the first write faults, marks the frame and makes it
  writable again. Of a PV guest: see :mod:`pyxen.hypervisor.x86.pv.log_dirty`;
* the hypervisor on the guest's behalf (copies to guest memory, grant copies, a back end that says ``written``):
  they call :meth:`LogDirty.mark` or :meth:`LogDirty.mark_frames`;
* whoever holds a writable mapping (grants, foreign mappings), and the hypervisor where it stores all the time (shared
  info, a registered vcpu_info): those frames are *pinned*, that is dirty whenever anyone asks.

Frames are named as the guest names them (gfn, pfn). The bitmap grows with the highest frame that was ever written.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from pyxen.errors import XenError
from pyxen.hypervisor.x86.hvm.p2m_table import GFN_BITS

if TYPE_CHECKING:
    from pyxen.hypervisor.domain import Domain

MAX_PAGES: Final = 1 << GFN_BITS


class DirtyStats(NamedTuple):
    """struct xen_domctl_shadow_op_stats: since the last clean."""

    fault_count: int
    dirty_count: int


class LogDirty:
    """The state of one domain while log-dirty is on. Its lock is a leaf."""

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        self.lock = threading.Lock()
        self.bitmap = bytearray()
        self.fault_count = 0

    def mark(self, gfn: int, count: int = 1) -> None:
        """paging_mark_pfn_dirty(). Any thread."""
        if gfn >= 0 and gfn + count <= MAX_PAGES:
            self.mark_many(range(gfn, gfn + count))

    def mark_many(self, gfns: Sequence[int], faults: int = 0) -> None:
        """:meth:`mark` of each; those that are no frame numbers are passed over. ``faults``: for the statistics."""
        with self.lock:
            self.fault_count += faults
            bitmap = self.bitmap
            size = len(bitmap)
            for gfn in gfns:
                if 0 <= gfn < MAX_PAGES:
                    at = gfn >> 3
                    if at >= size:
                        bitmap.extend(bytes(at - size + 4097))
                        size = len(bitmap)
                    bitmap[at] |= 1 << (gfn & 7)

    def mark_frames(self, mfn: int, count: int = 1) -> None:
        """paging_mark_dirty(): the same by machine frames, wherever the domain has them. Any thread."""
        get = self.domain.hypervisor.frames.m2p.get
        for frame in range(mfn, mfn + count):
            self.mark(get(frame))

    def mark_pinned(self) -> None:
        """Mark everything that somebody may have written without saying so."""
        domain = self.domain
        with domain.mappings_lock:
            mappings = list(domain.writable_mappings)
        for mapping in mappings:
            mapping.mark_dirty()
        if domain.shared_info_mfn:
            self.mark_frames(domain.shared_info_mfn)
        for mfn in domain.grant_table.frames:
            self.mark_frames(mfn)
        for vcpu in domain.vcpus:
            if vcpu.info_mfn is not None:
                self.mark_frames(vcpu.info_mfn)
        for active in list(domain.grant_table.active.values()):
            if active.writers:
                self.mark_frames(active.mfn)

    def extract(self, start: int, pages: int) -> tuple[bytes, int]:
        """The bitmap of a range, its first frame in bit 0, and how many bits are set. With the lock held."""
        end = start + pages
        raw = int.from_bytes(self.bitmap[start >> 3 : (end + 7) >> 3], "little") >> (start & 7)
        raw &= (1 << pages) - 1
        return raw.to_bytes((pages + 7) // 8, "little"), raw.bit_count()

    def forget(self, start: int, bits: int) -> None:
        """Clear what is set in ``bits``, whose bit 0 is frame ``start``. With the lock held."""
        first = start >> 3
        size = min((start + bits.bit_length() + 7 >> 3) - first, len(self.bitmap) - first)
        if size > 0:
            old = int.from_bytes(self.bitmap[first : first + size], "little")
            self.bitmap[first : first + size] = (old & ~(bits << (start & 7))).to_bytes(size, "little")


def _on(domain: Domain) -> LogDirty:
    log = domain.log_dirty
    if log is None:
        raise XenError(errno.EINVAL)
    return log


def enable(domain: Domain) -> None:
    """paging_log_dirty_enable(). XenError: EINVAL if it is on or the domain dies, ENOMEM."""
    scheduler = domain.hypervisor.scheduler
    scheduler.domain_pause(domain)
    try:
        with domain.lock:
            if domain.log_dirty is not None or domain.dying:
                raise XenError(errno.EINVAL)
            domain.log_dirty = LogDirty(domain)
        try:
            domain.arch.log_dirty_start()
        except XenError:
            domain.log_dirty = None
            raise
    finally:
        scheduler.domain_unpause(domain)


def disable(domain: Domain) -> None:
    """paging_log_dirty_disable(). XenError(EINVAL) if it is off."""
    _on(domain)
    scheduler = domain.hypervisor.scheduler
    scheduler.domain_pause(domain)
    try:
        domain.arch.log_dirty_stop()
        domain.log_dirty = None
    finally:
        scheduler.domain_unpause(domain)


def peek(domain: Domain, start: int, pages: int) -> tuple[bytes, DirtyStats]:
    """paging_log_dirty_op(PEEK). XenError(EINVAL): off, or a range beyond the address space."""
    return _read(domain, start, pages, clean=False)


def clean(domain: Domain, start: int, pages: int) -> tuple[bytes, DirtyStats]:
    """paging_log_dirty_op(CLEAN): the bitmap, and protect again what it names. XenError: EINVAL, ENOMEM."""
    return _read(domain, start, pages, clean=True)


def _read(domain: Domain, start: int, pages: int, *, clean: bool) -> tuple[bytes, DirtyStats]:
    log = _on(domain)
    if start < 0 or pages < 0 or start + pages > MAX_PAGES:
        raise XenError(errno.EINVAL)
    scheduler = domain.hypervisor.scheduler
    scheduler.domain_pause(domain)
    try:
        log.mark_pinned()
        domain.arch.log_dirty_collect(log)
        with log.lock:
            data, count = log.extract(start, pages)
            stats = DirtyStats(log.fault_count, count)
            bits = int.from_bytes(data, "little")
            if clean:
                log.forget(start, bits)
                log.fault_count = 0
        if clean:
            domain.arch.log_dirty_clean((start + first, size) for first, size in _set_runs(bits))
        return data, stats
    finally:
        scheduler.domain_unpause(domain)


def _set_runs(bits: int) -> Iterable[tuple[int, int]]:
    """Runs of ones, as (first, length)."""
    at = 0
    while bits:
        zeros = (bits & -bits).bit_length() - 1
        bits >>= zeros
        at += zeros
        ones = (~bits & bits + 1).bit_length() - 1
        yield at, ones
        bits >>= ones
        at += ones
