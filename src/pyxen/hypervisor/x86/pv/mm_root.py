# SPDX-License-Identifier: GPL-2.0-only
"""Page-table roots of a PV vCPU, and whose frames a request is about (Xen: xen/arch/x86/mm.c, new_guest_cr3,
get_pg_owner).

``guest_table`` and ``guest_table_user`` of a vCPU each hold a general reference and one as a level 4 table.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from pyxen.abi.xen import DOMID_IO, DOMID_SELF, DOMID_XEN, DomId, VmAssist
from pyxen.errors import XenError
from pyxen.hypervisor.frames_types import ERESTART, PGT_L4
from pyxen.hypervisor.x86.pv.mm_flags import FIRST_XEN_SLOT

if TYPE_CHECKING:
    from pyxen.hypervisor.domain import Domain
    from pyxen.hypervisor.x86.pv.vcpu import PvVcpu

M2P_STRICT: Final = 1 << VmAssist.M2P_STRICT


def get_pg_owner(domain: Domain, domid: int) -> Domain:
    """get_pg_owner(): the domain that foreigndom names for a request of ``domain``. XenError(ESRCH); naming oneself
    is one too."""
    if domid == DOMID_SELF:
        return domain
    hypervisor = domain.hypervisor
    if domid == DOMID_IO:
        return hypervisor.dom_io
    if domid == DOMID_XEN:
        return hypervisor.dom_xen
    if domid == domain.domid:
        raise XenError(errno.ESRCH, "a domain cannot be its own foreign domain")
    return hypervisor.domain(DomId(domid))


def switch_guest_table(pv: PvVcpu, mfn: int) -> int:
    """new_guest_cr3(), one go of it: 0, -EINVAL or -ERESTART. The frame table's lock is held and its budget runs."""
    from pyxen.hypervisor.x86.pv import ldt

    domain = pv.domain
    frames = domain.hypervisor.frames
    old = pv.guest_table
    # Particularly important when this is the continuation of a switch whose old table took too long to drop.
    if old != mfn or not mfn:  # frame 0 is nobody's: refused below
        rc = frames.get_root(mfn, domain.domid, PGT_L4)
        if rc:
            return rc
        ldt.invalidate(pv)
        slot = (mfn << 9) + FIRST_XEN_SLOT
        if not domain.vm_assist & M2P_STRICT and not frames.memory.q[slot]:
            domain.pv.install_xen_slots(mfn)  # fill_ro_mpt(): it was once a user root
        pv.guest_table = mfn
    pv.new_cr3()
    if len(domain.vcpus) == 1:
        frames.flushed(domain)
    if old and old != mfn:
        frames.put_root(old)
    return 0


def switch_guest_table_user(pv: PvVcpu, mfn: int) -> int:
    """MMUEXT_NEW_USER_BASEPTR, one go: 0, -EINVAL or -ERESTART. Frame 0 is no table: user mode gets none."""
    domain = pv.domain
    frames = domain.hypervisor.frames
    old = pv.guest_table_user
    if old == mfn:
        return 0
    if mfn:
        rc = frames.get_root(mfn, domain.domid, PGT_L4)
        if rc:
            return rc
        if domain.vm_assist & M2P_STRICT:
            frames.memory.q[(mfn << 9) + FIRST_XEN_SLOT] = 0  # zap_ro_mpt()
    pv.guest_table_user = mfn
    if not pv.kernel_mode:  # else it is loaded on the way to user mode
        pv.new_cr3()
    if old:
        frames.put_root(old)
    return 0


def install_guest_tables(pv: PvVcpu, kernel_mfn: int, user_mfn: int) -> bool:
    """Give a vCPU both roots (arch_set_info_guest), dropping those it had; ``user_mfn`` 0 for none. A slice of it:
    False if it is to be called again. XenError(EINVAL): one of them is no root."""
    frames = pv.domain.hypervisor.frames
    frames.lock.acquire()
    try:
        frames.start_budget()
        if not frames.put_deferred(pv.domain.domid):
            return False
        for mfn, switch in ((kernel_mfn, switch_guest_table), (user_mfn, switch_guest_table_user)):
            rc = switch(pv, mfn)
            if rc == -ERESTART:
                return False
            if rc:
                raise XenError(-rc)
        return True
    finally:
        frames.release()
