# SPDX-License-Identifier: GPL-2.0-only
"""A vCPU's vcpu_info: where it lies, and its upcall_pending byte (Xen: map_vcpu_info in xen/common/domain.c,
vcpu_mark_events_pending in xen/arch/x86/domain.c).

The words are the guest's as much as ours: what changes them runs on the thread of the domain's engine
(see :mod:`pyxen.hypervisor.event_channel`).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from pyxen.abi.xen import PAGE_SHIFT, PAGE_SIZE, VCPU_INFO_SIZE, VI_PENDING_SEL, VI_UPCALL_MASK, VI_UPCALL_PENDING, Mfn
from pyxen.errors import XenError
from pyxen.hypervisor.frames import PGT_WRITABLE
from pyxen.hypervisor.vcpu import PauseFlag

if TYPE_CHECKING:
    from pyxen.hypervisor.vcpu import Vcpu


def vcpu_mark_events_pending(vcpu: Vcpu) -> None:
    """Set upcall_pending and, if it was clear, make the vCPU look at it. Engine thread of the domain only."""
    if vcpu.info_maddr:
        memory = vcpu.domain.hypervisor.memory
        index = vcpu.info_maddr + VI_UPCALL_PENDING
        if memory.b[index]:
            return
        memory.b[index] = 1
        if vcpu.domain.is_hvm:
            vcpu.hvm.assert_evtchn_irq()
        else:
            vcpu.domain.hypervisor.scheduler.vcpu_unblock(vcpu)


def upcall_deliverable(vcpu: Vcpu) -> bool:
    """Whether guest memory alone says that an upcall is due: pending and not masked."""
    if not vcpu.info_maddr:
        return False
    if vcpu.domain.is_hvm:
        return vcpu.arch.upcall_deliverable()
    b = vcpu.domain.hypervisor.memory.b
    return bool(b[vcpu.info_maddr + VI_UPCALL_PENDING]) and not b[vcpu.info_maddr + VI_UPCALL_MASK]


def map_vcpu_info(vcpu: Vcpu, mfn: int, offset: int, current: Vcpu | None) -> None:
    """Move ``vcpu``'s vcpu_info to byte ``offset`` of frame ``mfn`` (VCPUOP_register_vcpu_info).

    ``current`` is the calling vCPU: one may only move one's own or that of a vCPU that is down.

    Raises XenError(EINVAL): offset beyond the page or not a multiple of 8, moved before, a vCPU that is up, a frame
    that is not the domain's own or cannot be writable.
    """
    domain = vcpu.domain
    hypervisor = domain.hypervisor
    if not 0 <= offset <= PAGE_SIZE - VCPU_INFO_SIZE or offset & 7:
        raise XenError(errno.EINVAL)
    if vcpu.info_mfn is not None:
        raise XenError(errno.EINVAL)
    if vcpu is not current and not vcpu.pause_flags & PauseFlag.DOWN:
        raise XenError(errno.EINVAL)
    if domain.is_hvm:  # a frame number as the guest has them
        found = domain.hvm.p2m.writable_mfn(mfn)
        mfn = -1 if found is None else found
    if not 0 <= mfn < hypervisor.memory.nr_frames:
        raise XenError(errno.EINVAL)
    if not hypervisor.frames.get_page_and_type(Mfn(mfn), domain, PGT_WRITABLE):
        raise XenError(errno.EINVAL)

    memory = hypervisor.memory
    maddr = (mfn << PAGE_SHIFT) + offset
    if vcpu.info_maddr:
        memory.write(maddr, memory.read(vcpu.info_maddr, VCPU_INFO_SIZE))
    else:
        memory.write(maddr, bytes(VCPU_INFO_SIZE))
        memory.b[maddr + VI_UPCALL_MASK] = 1
    vcpu.info_maddr = maddr
    vcpu.info_mfn = mfn
    # An event may have been recorded only in the bitmaps (dummy_vcpu_info) or in the old place while we copied:
    # mark every word; the guest finds out that most have nothing.
    memory.b[maddr + VI_UPCALL_PENDING] = 1
    memory.q[maddr + VI_PENDING_SEL >> 3] = (1 << 64) - 1
    memory.written(mfn)


def unmap_vcpu_info(vcpu: Vcpu) -> None:
    """Give back the frame that holds a moved vcpu_info (domain teardown, vCPU reset)."""
    mfn = vcpu.info_mfn
    if mfn is None:
        return
    vcpu.info_maddr = 0
    vcpu.info_mfn = None
    vcpu.domain.hypervisor.frames.put_page_and_type(Mfn(mfn))
