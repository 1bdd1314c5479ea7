# SPDX-License-Identifier: GPL-2.0-only
"""What dom0's software may do to guests under nested paging: the part of :mod:`pyxen.hypervisor.privcmd` for PVH.

Everything acts as domain 0. Guest-physical addresses are bytes, ``gfn`` is such an address shifted right by 12.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from pyxen.abi.domctl import Domctl
from pyxen.errors import XenError
from pyxen.hypervisor import foreign_map, lifecycle
from pyxen.hypervisor.privcmd_base import Control

if TYPE_CHECKING:
    from pyxen.hypervisor.domain import Domain
    from pyxen.hypervisor.log_dirty import DirtyStats
    from pyxen.machine.cpu.base import HvmRegisters


_2M_ORDER: Final = 9
_2M: Final = 1 << _2M_ORDER


class HvmControl(Control):
    """Typed calls; a base of PrivCmd."""

    def _translated(self, domid: int, command: int) -> Domain:
        domain = self._target(domid, command)
        if not domain.is_hvm:
            raise XenError(errno.EINVAL)
        return domain

    # --- HVM parameters --------------------------------------------------------------------------------

    def hvm_param_set(self, domid: int, index: int, value: int) -> None:
        """HVMOP_set_param. XenError: EINVAL (not an HVM domain, unknown index, bad value), EEXIST (may be set once),
        ENODEV."""
        from pyxen.hypervisor.x86.hvm import params

        params.set_param(lifecycle.find(self._hypervisor, domid), self._dom0, index, value)

    def hvm_param_get(self, domid: int, index: int) -> int:
        """HVMOP_get_param. XenError(EINVAL)."""
        from pyxen.hypervisor.x86.hvm import params

        return params.get_param(lifecycle.find(self._hypervisor, domid), self._dom0, index)

    # --- vCPUs -----------------------------------------------------------------------------------------

    def vcpu_set_hvm_context(self, domid: int, vcpu: int, registers: HvmRegisters) -> None:
        """The CPU record of XEN_DOMCTL_sethvmcontext: set all registers of a vCPU, and bring it up (it runs once the
        domain is not paused any more).

        ``registers.msrs`` may leave registers out: those keep their reset values. XenError(EINVAL): no such vCPU, or
        registers that no CPU could have.
        """
        from pyxen.hypervisor.x86.hvm import context

        context.set_registers(self._translated(domid, Domctl.SETHVMCONTEXT), vcpu, registers)

    def vcpu_set_pvh_start(self, domid: int, entry: int, start_info: int) -> None:
        """vCPU 0 at PVH's start of day: flat 32-bit protected mode, paging off, EIP ``entry``, EBX the physical
        address of struct hvm_start_info; brings it up. XenError(EINVAL): an address beyond 4 GiB."""
        from pyxen.hypervisor.x86.hvm import context

        domain = self._translated(domid, Domctl.SETHVMCONTEXT)
        context.set_registers(domain, 0, context.pvh_start(entry, start_info))

    def vcpu_hvm_context(self, domid: int, vcpu: int = 0) -> HvmRegisters:
        """All registers of a vCPU, paused for the moment of reading. XenError: EINVAL, ENODATA (never set up)."""
        from pyxen.hypervisor.x86.hvm import context

        return context.get_registers(self._translated(domid, Domctl.GETHVMCONTEXT), vcpu)

    # --- memory ----------------------------------------------------------------------------------------

    def foreign_map(self, domid: int, gfn: int, count: int = 1, writable: bool = True) -> foreign_map.Mapping:
        """Map frames of a domain: ``gfn`` is a guest frame of a translated domain, a machine frame of a PV one.

        The result's ``view`` is all of it if the machine frames are contiguous (one page always is); ``pieces``,
        ``read`` and ``write`` work always. EINVAL if a frame is not there or not the domain's; a writable mapping is
        refused (EINVAL) for a frame of a PV domain that is a page table or descriptor page.
        """
        domain = lifecycle.find(self._hypervisor, domid)
        self._hypervisor.xsm.mmu_update(self._dom0, None, domain)
        return foreign_map.foreign_map(self._hypervisor, domain, gfn, count, writable)

    def read_physical(self, domid: int, address: int, size: int) -> bytes:
        """Read guest-physical memory of a translated domain. EINVAL where there is none."""
        if size <= 0:
            return b""
        first = address >> 12
        count = (address + size - 1 >> 12) - first + 1
        with self.foreign_map(domid, first, count, False) as mapping:
            return mapping.read(address & 0xFFF, size)

    def write_physical(self, domid: int, address: int, data: bytes | bytearray | memoryview) -> None:
        """Write guest-physical memory of a translated domain. EINVAL where there is none, or it is read-only."""
        if not len(data):
            return
        first = address >> 12
        count = (address + len(data) - 1 >> 12) - first + 1
        with self.foreign_map(domid, first, count) as mapping:
            mapping.write(address & 0xFFF, data)
            mapping.written()

    def set_paging_allocation(self, domid: int, frames: int) -> None:
        """XEN_DOMCTL_SHADOW_OP_SET_ALLOCATION, in frames of 4 KiB (Xen's unit is the MiB). ENOMEM below what is
        used."""
        domain = self._translated(domid, Domctl.SHADOW_OP)
        domain.hvm.pool.set_limit(frames)

    def paging_allocation(self, domid: int) -> tuple[int, int]:
        """(allowance, in use) of the nested page tables of a translated domain, in frames."""
        domain = self._translated(domid, Domctl.SHADOW_OP)
        return domain.hvm.pool.limit, domain.hvm.pool.used

    # --- log-dirty -------------------------------------------------------------------------------------

    def log_dirty_enable(self, domid: int) -> None:
        """XEN_DOMCTL_SHADOW_OP_ENABLE_LOGDIRTY: from now on every frame that is written is remembered. EINVAL if it
        is on, ENOMEM."""
        from pyxen.hypervisor import log_dirty

        log_dirty.enable(self._target(domid, Domctl.SHADOW_OP))

    def log_dirty_disable(self, domid: int) -> None:
        """XEN_DOMCTL_SHADOW_OP_OFF. EINVAL if it is off."""
        from pyxen.hypervisor import log_dirty

        log_dirty.disable(self._target(domid, Domctl.SHADOW_OP))

    def log_dirty_peek(self, domid: int, pages: int, start: int = 0) -> tuple[bytes, DirtyStats]:
        """XEN_DOMCTL_SHADOW_OP_PEEK: the bitmap of [start, start + pages), bit n of byte n // 8 for frame start + n;
        nothing is changed."""
        from pyxen.hypervisor import log_dirty

        return log_dirty.peek(self._target(domid, Domctl.SHADOW_OP), start, pages)

    def log_dirty_clean(self, domid: int, pages: int, start: int = 0) -> tuple[bytes, DirtyStats]:
        """XEN_DOMCTL_SHADOW_OP_CLEAN: as peek, and forget those: their next write is news again."""
        from pyxen.hypervisor import log_dirty

        return log_dirty.clean(self._target(domid, Domctl.SHADOW_OP), start, pages)


def populate(domain: Domain, pfns: Sequence[int]) -> list[range]:
    """Give a translated domain frames at ``pfns``, in the largest pages that these allow; the machine frames as runs in
    that order. XenError: ENOMEM (nothing has changed, or, without frames for tables, frames that have no place are
    the domain's until it dies), EINVAL."""
    frames = domain.hypervisor.frames
    given: list[tuple[int, range]] = []
    try:
        for first, count in _pieces(pfns):
            if count == _2M:
                try:
                    mfn = frames.alloc_domheap(domain, _2M_ORDER)
                except XenError as error:
                    if error.errno != errno.ENOMEM or domain.tot_pages + count > domain.max_pages:
                        raise
                else:
                    given.append((first, range(mfn, mfn + count)))
                    continue
            for run in frames.alloc_domheap_many(domain, count):
                given.append((first, run))
                first += len(run)
    except XenError:
        for _, run in given:
            for mfn in run:
                frames.guest_remove_page(mfn, domain)
        raise
    for first, run in given:
        domain.hvm.p2m.populate(first, [run])
    return [run for _, run in given]


def _pieces(pfns: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, count) of runs of consecutive numbers, cut at multiples of 2 MiB where whole ones fit."""
    at, total = 0, len(pfns)
    counted = isinstance(pfns, range) and pfns.step == 1  # a builder's; no need to look at each
    while at < total:
        first, count = pfns[at], total if counted else 1
        while at + count < total and pfns[at + count] == first + count:
            count += 1
        at += count
        head = min(-first % _2M, count)
        if head:
            yield first, head
        first += head
        count -= head
        while count >= _2M:
            yield first, _2M
            first += _2M
            count -= _2M
        if count:
            yield first, count
