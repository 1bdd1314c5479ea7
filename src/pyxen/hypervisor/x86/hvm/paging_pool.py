# SPDX-License-Identifier: GPL-2.0-only
"""The frames that a domain's nested page tables are made of (Xen: hap_alloc_p2m_page, hap_set_allocation in
xen/arch/x86/mm/hap/hap.c).

A guest decides how many tables it needs, by where it has frames put and how it breaks superpages up.  So each domain
has an allowance, as Xen's paging pool: beyond it a table cannot be had (ENOMEM), whatever the host has left.  Unlike
Xen's the frames are taken when they are used.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from pyxen.errors import XenError

if TYPE_CHECKING:
    from pyxen.hypervisor.frames import FrameTable

MIN_FRAMES: Final = 256
"""hap_enable() begins with 256 pages."""


def default_allowance(max_pages: int, max_vcpus: int) -> int:
    """libxl_get_required_shadow_memory(): 1 MiB a vCPU, and two frames for each MiB of memory."""
    return MIN_FRAMES * max(max_vcpus, 1) + 2 * ((max_pages >> 8) + 1)


class PagingPool:
    """Allowance and use of one domain, in frames."""

    def __init__(self, frames: FrameTable, limit: int = MIN_FRAMES) -> None:
        self._frames = frames
        self.limit = limit
        self.is_set = False
        """XEN_DOMCTL_SHADOW_OP_SET_ALLOCATION said a number; else it follows max_mem."""
        self._used: set[int] = set()

    @property
    def used(self) -> int:
        """Frames in use."""
        return len(self._used)

    def alloc(self) -> int:
        """A zeroed frame. XenError(ENOMEM)."""
        if len(self._used) >= self.limit:
            raise XenError(errno.ENOMEM, "the domain's paging pool is empty")
        mfn = self._frames.alloc_xenheap()
        self._used.add(mfn)
        return mfn

    def free(self, mfn: int) -> None:
        """Give a frame back."""
        self._used.remove(mfn)
        self._frames.free_xenheap(mfn)

    def set_limit(self, limit: int) -> None:
        """hap_set_allocation(). XenError(ENOMEM): below what is in use (Xen would wait for it to be freed)."""
        if limit < len(self._used):
            raise XenError(errno.ENOMEM)
        self.limit = limit
        self.is_set = True

    def owns(self, mfn: int) -> bool:
        """Whether a frame is one of this pool."""
        return mfn in self._used

    def release(self, count: int) -> bool:
        """Free up to ``count`` frames, of a domain at its end; True when none is left."""
        for _ in range(min(count, len(self._used))):
            self._frames.free_xenheap(self._used.pop())
        return not self._used
