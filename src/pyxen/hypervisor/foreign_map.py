# SPDX-License-Identifier: GPL-2.0-only
"""Frames of a domain, mapped for dom0's software (Xen: do_mmu_update with a foreign domain, as privcmd's MMAPBATCH
makes it).

A mapping holds, as one in dom0's page tables would, a reference to each frame and, if writable, one to its use as
data.  Of a PV domain the frame numbers are machine frames; of a translated one they are guest frames, which the p2m
may have put anywhere: such a mapping has several *pieces*.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final

from pyxen.errors import XenError
from pyxen.hypervisor.frames import PGT_WRITABLE

if TYPE_CHECKING:
    from types import TracebackType

    from pyxen.hypervisor.domain import Domain
    from pyxen.hypervisor.hypervisor import Hypervisor

LOCKED_FRAMES: Final = 256
"""How many frames are mapped or unmapped in one go under the frame table's lock: about a quarter of a millisecond."""


class Mapping:
    """Frames of a domain, seen as memory. Holds a reference to each frame until closed. A context manager, too."""

    def __init__(self, hypervisor: Hypervisor, domain: Domain, runs: Sequence[range], writable: bool) -> None:
        self._hypervisor = hypervisor
        self._domain = domain
        self._runs = tuple(runs)
        self._writable = writable
        memory = hypervisor.memory.b
        views = [memory[run.start << 12 : run.stop << 12] for run in runs]
        self.pieces: tuple[memoryview, ...] = tuple(v if writable else v.toreadonly() for v in views)
        """The frames in order, as memory that is contiguous within each piece."""
        self._open = True
        if writable:
            with domain.mappings_lock:
                domain.writable_mappings.add(self)

    @property
    def view(self) -> memoryview:
        """All of it as one piece. XenError(EINVAL) if it is not one: use :meth:`read` and :meth:`write`."""
        if len(self.pieces) != 1:
            raise XenError(errno.EINVAL, "the frames are not contiguous")
        return self.pieces[0]

    def read(self, offset: int, size: int) -> bytes:
        """Copy out of it. EINVAL beyond its end."""
        parts = []
        for piece, start, stop in self._parts(offset, size):
            parts.append(bytes(piece[start:stop]))
        return b"".join(parts)

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Copy into it. EINVAL beyond its end. See :meth:`written`."""
        done = 0
        for piece, start, stop in self._parts(offset, len(data)):
            piece[start:stop] = data[done : done + stop - start]
            done += stop - start

    def _parts(self, offset: int, size: int) -> Iterable[tuple[memoryview, int, int]]:
        if offset < 0 or size < 0 or offset + size > sum(len(piece) for piece in self.pieces):
            raise XenError(errno.EINVAL)
        for piece in self.pieces:
            if offset < len(piece) and size:
                count = min(size, len(piece) - offset)
                yield piece, offset, offset + count
                size -= count
                offset = 0
            else:
                offset -= len(piece)
            if not size:
                return

    def written(self) -> None:
        """Tell the engines, and log-dirty, that these frames changed."""
        for run in self._runs:
            self._hypervisor.memory.written(run.start, len(run))
        self.mark_dirty()

    def mark_dirty(self) -> None:
        """Tell log-dirty only."""
        log = self._domain.log_dirty
        if log is not None:
            for run in self._runs:
                log.mark_frames(run.start, len(run))

    def close(self) -> None:
        """Drop the references."""
        if self._open:
            self._open = False
            try:
                for piece in self.pieces:
                    piece.release()
            finally:
                if self._writable:
                    self.mark_dirty()  # its last writes may be news
                    with self._domain.mappings_lock:
                        self._domain.writable_mappings.discard(self)
                for run in self._runs:
                    put_frames(self._hypervisor, run, self._writable)
                self._hypervisor.reap()  # a dead domain's last frames may have waited for us

    def __enter__(self) -> Mapping:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def put_frames(hypervisor: Hypervisor, mfns: range, writable: bool) -> None:
    """Drop what a mapping holds of each frame."""
    frames = hypervisor.frames
    put = frames.put_root if writable else frames.put
    for first in range(0, len(mfns), LOCKED_FRAMES):
        frames.lock.acquire()
        try:
            for mfn in mfns[first : first + LOCKED_FRAMES]:
                put(mfn)
        finally:
            frames.release()


def _get_frames(hypervisor: Hypervisor, domain: Domain, mfns: range, writable: bool) -> None:
    frames, domid = hypervisor.frames, domain.domid
    for first in range(0, len(mfns), LOCKED_FRAMES):
        frames.lock.acquire()
        try:
            for mfn in mfns[first : first + LOCKED_FRAMES]:
                if frames.get_and_type(mfn, domid, PGT_WRITABLE) if writable else not frames.get(mfn, domid):
                    put_frames(hypervisor, range(mfns.start, mfn), writable)
                    raise XenError(errno.EINVAL)
        finally:
            frames.release()


def foreign_map(hypervisor: Hypervisor, domain: Domain, gfn: int, count: int, writable: bool) -> Mapping:
    """Map ``count`` frames from ``gfn`` on. XenError(EINVAL): one is not there, not the domain's own, or (of a PV
    domain, for writing) a page table or descriptor page."""
    if gfn < 0 or count < 1:
        raise XenError(errno.EINVAL)
    if not domain.is_hvm:
        mfns = range(gfn, gfn + count)
        _get_frames(hypervisor, domain, mfns, writable)
        return Mapping(hypervisor, domain, (mfns,), writable)
    p2m = domain.hvm.p2m
    runs: list[range] = []
    held: list[range] = []
    with p2m.lock:
        try:
            for run in p2m.machine_runs(gfn, count, writable=writable):
                _get_frames(hypervisor, domain, run, writable)
                held.append(run)
                if runs and runs[-1].stop == run.start:
                    runs[-1] = range(runs[-1].start, run.stop)
                else:
                    runs.append(run)
        except XenError:
            for run in held:
                put_frames(hypervisor, run, writable)
            raise
    return Mapping(hypervisor, domain, runs, writable)
