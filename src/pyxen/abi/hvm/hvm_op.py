# SPDX-License-Identifier: GPL-2.0-only
"""``xen/include/public/hvm/hvm_op.h``."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final


class HvmOp(IntEnum):
    """``HVMOP_*``."""

    SET_PARAM = 0
    GET_PARAM = 1
    SET_PCI_INTX_LEVEL = 2
    SET_ISA_IRQ_LEVEL = 3
    SET_PCI_LINK_ROUTE = 4
    FLUSH_TLBS = 5
    PAGETABLE_DYING = 9
    GET_TIME = 10
    XENTRACE = 11
    GET_MEM_TYPE = 15
    SET_EVTCHN_UPCALL_VECTOR = 23
    GUEST_REQUEST_VM_EVENT = 24
    ALTP2M = 25


HVM_PARAM: Final = struct.Struct("<HHIQ")
"""struct xen_hvm_param: domid, pad, index, value."""
PAGETABLE_DYING: Final = struct.Struct("<H6xQ")
"""struct xen_hvm_pagetable_dying: domid, gpa."""
GET_TIME: Final = struct.Struct("<Q")
GET_MEM_TYPE: Final = struct.Struct("<HH4xQ")
"""struct xen_hvm_get_mem_type: domid, OUT mem_type, pfn."""
EVTCHN_UPCALL_VECTOR: Final = struct.Struct("<IB3x")
"""struct xen_hvm_evtchn_upcall_vector: vcpu, vector."""


class HvmMem(IntEnum):
    """``hvmmem_type_t``."""

    RAM_RW = 0
    RAM_RO = 1
    MMIO_DM = 2
