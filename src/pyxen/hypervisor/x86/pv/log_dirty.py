# SPDX-License-Identifier: GPL-2.0-only
"""Log-dirty of a PV domain, whose frames no nested table protects (Xen: shadow mode's part of
xen/arch/x86/mm/paging.c and mm/shadow/common.c, sh_enable_log_dirty).

Who writes, and how it is noticed:

* the guest: engines mark the frame of the first store through each translation (:meth:`Cpu.set_dirty_map
  <pyxen.machine.cpu.base.Cpu.set_dirty_map>`), so cleaning drops the domain's translations. It costs no exit;
* the hypervisor's copies to guest memory: they go through a vCPU's own little TLB, which obeys the same rule: filling
  it for writing marks, cleaning drops it;
* hypercalls that name frames (mmu_update of data, descriptors, MMUEXT_CLEAR_PAGE, new frames, new pfns …): they call
  :meth:`~pyxen.hypervisor.frames_types.References.mark_dirty`;
* page tables: the CPU sets accessed and dirty bits in them behind everybody's back, so a table is dirty whenever
  somebody asks, and when it ceases to be one. (Xen's shadow code marks tables that it writes, and one whose type goes.)

The domain says which frame is which pfn, in the machine-to-physical table, as for Xen's paging_mark_dirty(); frames
without a pfn (shared info, grant tables) have no bit. Collecting looks at the domain's frames only, 64 Ki at a time.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from pyxen.hypervisor.frames_types import PGT_L1, PGT_L4, PGT_PARTIAL, PGT_TYPE_MASK, PGT_VALIDATED

if TYPE_CHECKING:
    from pyxen.hypervisor.domain import Domain
    from pyxen.hypervisor.log_dirty import LogDirty

_CHUNK: Final = 1 << 16
_FLAGS: Final = 40
"""The byte of a type word from this bit on has all that says whether a frame is a page table."""
_MARKED: Final = re.compile(b"\1")


def _is_table(flags: int) -> bool:
    return (flags & PGT_TYPE_MASK) in range(PGT_L1, PGT_L4 + 1) and bool(flags & (PGT_VALIDATED | PGT_PARTIAL))


_TABLES: Final = bytes(_is_table(byte << _FLAGS) for byte in range(256))


def start(domain: Domain) -> None:
    """sh_enable_log_dirty(): from here on writes are noticed. The domain is paused."""
    hypervisor = domain.hypervisor
    hypervisor.dirty_map.use(domain)
    for run in hypervisor.frames.owned_runs(domain):
        hypervisor.dirty_map.take(run.start, len(run))
    hypervisor.flush_domain(domain)


def stop(domain: Domain) -> None:
    """sh_disable_log_dirty(). Idempotent."""
    domain.hypervisor.dirty_map.release(domain)


def collect(domain: Domain, log: LogDirty) -> None:
    """Tell ``log`` what was noticed since the last time, and which frames are page tables. The domain is paused."""
    frames, dirty_map = domain.hypervisor.frames, domain.hypervisor.dirty_map
    types = frames.type_info.cast("B")
    pfn = frames.m2p.get
    for run in frames.owned_runs(domain):
        for first in range(run.start, run.stop, _CHUNK):
            count = min(_CHUNK, run.stop - first)
            written = dirty_map.take(first, count)
            tables = bytes(types[first * 8 : (first + count) * 8])[_FLAGS >> 3 :: 8].translate(_TABLES)
            both = (int.from_bytes(written, "little") | int.from_bytes(tables, "little")).to_bytes(count, "little")
            log.mark_many([pfn(first + found.start()) for found in _MARKED.finditer(both)], faults=written.count(1))
