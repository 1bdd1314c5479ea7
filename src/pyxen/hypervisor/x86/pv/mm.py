# SPDX-License-Identifier: GPL-2.0-only
"""PV memory management (Xen: xen/arch/x86/mm.c): the doors to it, for the hypercall table and the rest of the PV code.

* :mod:`~pyxen.hypervisor.frames`: frames, their owners, references and types
* :mod:`~pyxen.hypervisor.x86.pv.validate`: what may stand in a page table
* :mod:`~pyxen.hypervisor.x86.pv.mm_entry`, :mod:`~pyxen.hypervisor.x86.pv.mm_root`: changing an entry, or a root
* :mod:`~pyxen.hypervisor.x86.pv.mmu_update`, :mod:`~pyxen.hypervisor.x86.pv.mmuext`,
:mod:`~pyxen.hypervisor.x86.pv.mm_va`:
  the hypercalls
* :mod:`~pyxen.hypervisor.x86.pv.ptwr`: emulated writes to page tables
* :mod:`~pyxen.hypervisor.x86.pv.mm_relinquish`: the end
"""

from __future__ import annotations

from pyxen.hypervisor.x86.pv.mm_relinquish import relinquish_memory
from pyxen.hypervisor.x86.pv.mm_root import get_pg_owner, install_guest_tables
from pyxen.hypervisor.x86.pv.mm_va import do_update_va_mapping, do_update_va_mapping_otherdomain
from pyxen.hypervisor.x86.pv.mmu_update import do_mmu_update
from pyxen.hypervisor.x86.pv.mmuext import do_mmuext_op

__all__ = [
    "do_mmu_update",
    "do_mmuext_op",
    "do_update_va_mapping",
    "do_update_va_mapping_otherdomain",
    "get_pg_owner",
    "install_guest_tables",
    "relinquish_memory",
]
