# SPDX-License-Identifier: GPL-2.0-only
"""``xen/include/public/xen.h``: hypercall numbers, domain ids, start info, shared info, MMU requests.

Numbers and layouts are the x86-64 ABI of Xen 4.6.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import Final, NewType

DomId = NewType("DomId", int)
VcpuId = NewType("VcpuId", int)
Mfn = NewType("Mfn", int)
Gfn = NewType("Gfn", int)
Pfn = NewType("Pfn", int)
EvtchnPort = NewType("EvtchnPort", int)
GrantRef = NewType("GrantRef", int)

PAGE_SHIFT: Final = 12
PAGE_SIZE: Final = 1 << PAGE_SHIFT
MASK64: Final = (1 << 64) - 1
INVALID_MFN: Final = Mfn(MASK64)
INVALID_M2P_ENTRY: Final = MASK64
SHARED_M2P_ENTRY: Final = MASK64 - 1

MAX_GUEST_CMDLINE: Final = 1024
MAX_LEGACY_VCPUS: Final = 32
"""XEN_LEGACY_MAX_VCPUS: vcpu_info slots inside shared_info."""


class Hypercall(IntEnum):
    """``__HYPERVISOR_*``."""

    SET_TRAP_TABLE = 0
    MMU_UPDATE = 1
    SET_GDT = 2
    STACK_SWITCH = 3
    SET_CALLBACKS = 4
    FPU_TASKSWITCH = 5
    SCHED_OP_COMPAT = 6
    PLATFORM_OP = 7
    SET_DEBUGREG = 8
    GET_DEBUGREG = 9
    UPDATE_DESCRIPTOR = 10
    MEMORY_OP = 12
    MULTICALL = 13
    UPDATE_VA_MAPPING = 14
    SET_TIMER_OP = 15
    EVENT_CHANNEL_OP_COMPAT = 16
    XEN_VERSION = 17
    CONSOLE_IO = 18
    PHYSDEV_OP_COMPAT = 19
    GRANT_TABLE_OP = 20
    VM_ASSIST = 21
    UPDATE_VA_MAPPING_OTHERDOMAIN = 22
    IRET = 23
    VCPU_OP = 24
    SET_SEGMENT_BASE = 25
    MMUEXT_OP = 26
    XSM_OP = 27
    NMI_OP = 28
    SCHED_OP = 29
    CALLBACK_OP = 30
    XENOPROF_OP = 31
    EVENT_CHANNEL_OP = 32
    PHYSDEV_OP = 33
    HVM_OP = 34
    SYSCTL = 35
    DOMCTL = 36
    KEXEC_OP = 37
    TMEM_OP = 38
    XC_RESERVED_OP = 39
    XENPMU_OP = 40
    ARCH_0 = 48


NR_HYPERCALLS: Final = 64

# Special domain ids.
DOMID_FIRST_RESERVED: Final = DomId(0x7FF0)
DOMID_SELF: Final = DomId(0x7FF0)
DOMID_IO: Final = DomId(0x7FF1)
DOMID_XEN: Final = DomId(0x7FF2)
DOMID_COW: Final = DomId(0x7FF3)
DOMID_INVALID: Final = DomId(0x7FF4)
DOMID_IDLE: Final = DomId(0x7FFF)


class Virq(IntEnum):
    """``VIRQ_*``."""

    TIMER = 0
    DEBUG = 1
    CONSOLE = 2
    DOM_EXC = 3
    TBUF = 4
    DEBUGGER = 6
    XENOPROF = 7
    CON_RING = 8
    PCPU_STATE = 9
    MEM_EVENT = 10
    XC_RESERVED = 11
    ENOMEM = 12
    XENPMU = 13
    ARCH_0 = 16


NR_VIRQS: Final = 24
GLOBAL_VIRQS: Final = frozenset(
    {Virq.CONSOLE, Virq.DOM_EXC, Virq.TBUF, Virq.DEBUGGER, Virq.CON_RING, Virq.PCPU_STATE,
     Virq.MEM_EVENT, Virq.ENOMEM}
)


# MMU_UPDATE request types (low two bits of ptr) and result codes.
MMU_NORMAL_PT_UPDATE: Final = 0
MMU_MACHPHYS_UPDATE: Final = 1
MMU_PT_UPDATE_PRESERVE_AD: Final = 2
MMU_UPDATE_PREEMPTED: Final = 1 << 31
"""Flag in the ``count`` argument of mmu_update and mmuext_op: a continuation of an earlier call."""


class MmuextCmd(IntEnum):
    """``MMUEXT_*``."""

    PIN_L1_TABLE = 0
    PIN_L2_TABLE = 1
    PIN_L3_TABLE = 2
    PIN_L4_TABLE = 3
    UNPIN_TABLE = 4
    NEW_BASEPTR = 5
    TLB_FLUSH_LOCAL = 6
    INVLPG_LOCAL = 7
    TLB_FLUSH_MULTI = 8
    INVLPG_MULTI = 9
    TLB_FLUSH_ALL = 10
    INVLPG_ALL = 11
    FLUSH_CACHE = 12
    SET_LDT = 13
    NEW_USER_BASEPTR = 15
    CLEAR_PAGE = 16
    COPY_PAGE = 17
    FLUSH_CACHE_GLOBAL = 18
    MARK_SUPER = 19
    UNMARK_SUPER = 20


MMUEXT_OP: Final = struct.Struct("<I4xQQ")
"""struct mmuext_op: cmd, arg1 (mfn or linear_addr), arg2 (nr_ents, vcpumask handle or src_mfn)."""
MMU_UPDATE: Final = struct.Struct("<QQ")
"""struct mmu_update: ptr, val."""

# UPDATE_VA_MAPPING flags.
UVMF_NONE: Final = 0
UVMF_TLB_FLUSH: Final = 1
UVMF_INVLPG: Final = 2
UVMF_FLUSHTYPE_MASK: Final = 3
UVMF_MULTI: Final = 0
UVMF_LOCAL: Final = 0
UVMF_ALL: Final = 4

# CONSOLE_IO commands.
CONSOLEIO_WRITE: Final = 0
CONSOLEIO_READ: Final = 1


class VmAssist(IntEnum):
    """``VMASST_TYPE_*``."""

    FOUR_GB_SEGMENTS = 0
    FOUR_GB_SEGMENTS_NOTIFY = 1
    WRITABLE_PAGETABLES = 2
    PAE_EXTENDED_CR3 = 3
    ARCHITECTURAL_IOPL = 4
    RUNSTATE_UPDATE_FLAG = 5
    M2P_STRICT = 32


VMASST_CMD_ENABLE: Final = 0
VMASST_CMD_DISABLE: Final = 1

MULTICALL_ENTRY: Final = struct.Struct("<QqQQQQQQ")
"""struct multicall_entry: op, result, args[6]."""

# --- shared_info (x86-64) -----------------------------------------------------------------
#   0     vcpu_info[32], 64 bytes each
#   2048  evtchn_pending[64]
#   2560  evtchn_mask[64]
#   3072  wc_version, wc_sec, wc_nsec, wc_sec_hi (u32 each)
#   3088  arch_shared_info: max_pfn, pfn_to_mfn_frame_list_list, nmi_reason, p2m_cr3, p2m_vaddr, p2m_generation
VCPU_INFO_SIZE: Final = 64
SHARED_EVTCHN_PENDING: Final = 2048
SHARED_EVTCHN_MASK: Final = 2560
SHARED_WC_VERSION: Final = 3072
SHARED_WC_SEC: Final = 3076
SHARED_WC_NSEC: Final = 3080
SHARED_WC_SEC_HI: Final = 3084
SHARED_ARCH_MAX_PFN: Final = 3088
SHARED_ARCH_P2M_LIST_LIST: Final = 3096
SHARED_ARCH_NMI_REASON: Final = 3104
SHARED_ARCH_P2M_CR3: Final = 3112
SHARED_ARCH_P2M_VADDR: Final = 3120
SHARED_ARCH_P2M_GENERATION: Final = 3128

# --- vcpu_info: offsets within the 64 bytes ------------------------------------------------
VI_UPCALL_PENDING: Final = 0
VI_UPCALL_MASK: Final = 1
VI_PENDING_SEL: Final = 8
VI_ARCH_CR2: Final = 16
VI_TIME: Final = 32
VCPU_TIME_INFO: Final = struct.Struct("<I4xQQIbB2x")
"""struct vcpu_time_info: version, tsc_timestamp, system_time, tsc_to_system_mul, tsc_shift, flags."""

NR_EVENT_CHANNELS_2L: Final = 4096

# --- start_info --------------------------------------------------------------------------
START_INFO: Final = struct.Struct("<32sQQI4xQI4xQI4xQQQQQ1024sQQ")
"""magic, nr_pages, shared_info, flags, store_mfn, store_evtchn, console mfn, console evtchn, pt_base,
nr_pt_frames, mfn_list, mod_start, mod_len, cmd_line, first_p2m_pfn, nr_p2m_frames."""


class Sif(IntFlag):
    """``SIF_*`` flags of start_info."""

    PRIVILEGED = 1 << 0
    INITDOMAIN = 1 << 1
    MULTIBOOT_MOD = 1 << 2
    MOD_START_PFN = 1 << 3
    VIRT_P2M_4TOOLS = 1 << 4


def xen_capabilities(major: int = 3, minor: int = 0) -> str:
    """What XENVER_capabilities reports for an x86-64 host that runs PV guests."""
    return f"xen-{major}.{minor}-x86_64 "
