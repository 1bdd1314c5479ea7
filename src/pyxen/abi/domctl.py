# SPDX-License-Identifier: GPL-2.0-only
"""``xen/include/public/domctl.h`` of Xen 4.6 (interface version 0xb)."""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import Final

INTERFACE_VERSION: Final = 0x0000000B
HEADER: Final = struct.Struct("<IIH6x")
"""cmd, interface_version, domain; the union starts at 16 and is 128 bytes."""
UNION: Final = 16
SIZE: Final = 144


class Domctl(IntEnum):
    """``XEN_DOMCTL_*`` that are known here."""

    CREATEDOMAIN = 1
    DESTROYDOMAIN = 2
    PAUSEDOMAIN = 3
    UNPAUSEDOMAIN = 4
    GETDOMAININFO = 5
    SETVCPUAFFINITY = 9
    SHADOW_OP = 10
    MAX_MEM = 11
    SETVCPUCONTEXT = 12
    GETVCPUCONTEXT = 13
    GETVCPUINFO = 14
    MAX_VCPUS = 15
    SCHEDULER_OP = 16
    SETDOMAINHANDLE = 17
    GETVCPUAFFINITY = 25
    RESUMEDOMAIN = 27
    SENDTRIGGER = 28
    HYPERCALL_INIT = 29
    GETHVMCONTEXT = 33
    SETHVMCONTEXT = 34
    GETHVMCONTEXT_PARTIAL = 55
    SET_MAX_EVTCHN = 70


class DomInf(IntFlag):
    """``XEN_DOMINF_*``."""

    DYING = 1 << 0
    HVM_GUEST = 1 << 1
    SHUTDOWN = 1 << 2
    PAUSED = 1 << 3
    BLOCKED = 1 << 4
    RUNNING = 1 << 5
    DEBUGGED = 1 << 6
    PVH_GUEST = 1 << 7


DOMINF_SHUTDOWN_SHIFT: Final = 16
CREATEDOMAIN: Final = struct.Struct("<I16sI")
"""ssidref, handle, flags."""
GETDOMAININFO: Final = struct.Struct("<H2xIQQQQQQQIII16sI")
"""domain, flags, tot_pages, max_pages, outstanding_pages, shr_pages, paged_pages, shared_info_frame, cpu_time,
nr_online_vcpus,
max_vcpu_id, ssidref, handle, cpupool."""
MAX_MEM: Final = struct.Struct("<Q")
VCPUCONTEXT: Final = struct.Struct("<I4xQ")
GETVCPUINFO: Final = struct.Struct("<IBBB1xQI4x")
"""vcpu, online, blocked, running, cpu_time, cpu."""
MAX_VCPUS: Final = struct.Struct("<I")
SCHEDULER_OP: Final = struct.Struct("<IIHH")
"""sched_id, cmd, then for credit: weight, cap."""
HYPERCALL_INIT: Final = struct.Struct("<Q")
"""gmfn."""
CDF_HVM_GUEST: Final = 1 << 0
CDF_HAP: Final = 1 << 1
CDF_PVH_GUEST: Final = 1 << 4
"""XEN_DOMCTL_CDF_pvh_guest: 4.6's own PVH, of which there is no more."""
SHADOW_OP: Final = struct.Struct("<III4xQQII")
"""struct xen_domctl_shadow_op: op, mode, mb, dirty_bitmap (handle), pages, stats (fault_count, dirty_count)."""
SHADOW_OP_OFF: Final = 0
SHADOW_OP_ENABLE: Final = 32
SHADOW_OP_CLEAN: Final = 11
SHADOW_OP_PEEK: Final = 12
SHADOW_OP_GET_ALLOCATION: Final = 30
SHADOW_OP_SET_ALLOCATION: Final = 31
SHADOW_ENABLE_LOG_DIRTY: Final = 1 << 2
SHADOW_OP_ENABLE_LOGDIRTY: Final = 2
VCPUAFFINITY: Final = struct.Struct("<IIQI4xQI4x")
"""vcpu, flags, then two struct xenctl_bitmap (handle, nr_bits): hard, soft."""
VCPUAFFINITY_HARD: Final = 1 << 0
VCPUAFFINITY_SOFT: Final = 1 << 1
SENDTRIGGER: Final = struct.Struct("<II")
"""trigger, vcpu."""
SENDTRIGGER_NMI: Final = 0
SENDTRIGGER_RESET: Final = 1
SENDTRIGGER_INIT: Final = 2
SENDTRIGGER_POWER: Final = 3
SENDTRIGGER_SLEEP: Final = 4
INVALID_MAX_VCPU_ID: Final = 0xFFFFFFFF
SCHEDULER_SEDF: Final = 4
SCHEDULER_CREDIT: Final = 5
SCHEDULER_CREDIT2: Final = 6
SCHEDULER_ARINC653: Final = 7
SCHEDULER_RTDS: Final = 8
SCHEDOP_PUTINFO: Final = 0
SCHEDOP_GETINFO: Final = 1
