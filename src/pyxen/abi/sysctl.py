# SPDX-License-Identifier: GPL-2.0-only
"""``xen/include/public/sysctl.h`` of Xen 4.6 (interface version 0xc)."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final

INTERFACE_VERSION: Final = 0x0000000C
HEADER: Final = struct.Struct("<II")
"""cmd, interface_version; the union starts at 8 and is 128 bytes."""
UNION: Final = 8
SIZE: Final = 136


class Sysctl(IntEnum):
    """``XEN_SYSCTL_*`` that are known here."""

    READCONSOLE = 1
    PHYSINFO = 3
    SCHED_ID = 4
    GETDOMAININFOLIST = 6
    DEBUG_KEYS = 7
    GETCPUINFO = 8
    CPUTOPOINFO = 16
    NUMAINFO = 17
    CPUPOOL_OP = 18
    SCHEDULER_OP = 19


READCONSOLE: Final = struct.Struct("<BBxxIQI4x")
"""clear, incremental, index, buffer (handle), count."""
PHYSINFO: Final = struct.Struct("<IIIIIIIxxxxQQQQ32sI4x")
"""threads_per_core, cores_per_socket, nr_cpus, max_cpu_id, nr_nodes, max_node_id, cpu_khz, total_pages, free_pages,
scrub_pages,
outstanding_pages, hw_cap[8], capabilities."""
SCHED_ID: Final = struct.Struct("<I")
GETDOMAININFOLIST: Final = struct.Struct("<H2xIQI4x")
"""first_domain, max_domains, buffer (handle), num_domains."""
DEBUG_KEYS: Final = struct.Struct("<QI4x")
"""keys (handle), nr_keys."""
GETCPUINFO: Final = struct.Struct("<I4xQI4x")
"""max_cpus, info (handle), nr_cpus."""
CPUINFO: Final = struct.Struct("<Q")
"""idletime (ns)."""
CPUTOPOINFO: Final = struct.Struct("<I4xQ")
"""num_cpus, cputopo (handle)."""
CPUTOPO: Final = struct.Struct("<III")
"""core, socket, node."""
NUMAINFO: Final = struct.Struct("<I4xQQ")
"""num_nodes, meminfo (handle), distance (handle of uint32 num_nodes × num_nodes)."""
MEMINFO: Final = struct.Struct("<QQ")
"""memsize, memfree (bytes)."""


class CpupoolOp(IntEnum):
    """``XEN_SYSCTL_CPUPOOL_OP_*``."""

    CREATE = 1
    DESTROY = 2
    INFO = 3
    ADDCPU = 4
    RMCPU = 5
    MOVEDOMAIN = 6
    FREEINFO = 7


CPUPOOL_OP: Final = struct.Struct("<IIIIIIQI4x")
"""op, cpupool_id, sched_id, domid, cpu, n_dom, cpumap (struct xenctl_bitmap: handle, nr_bits)."""
CPUPOOL_PAR_ANY: Final = 0xFFFFFFFF
SCHEDULER_OP: Final = struct.Struct("<III4xII")
"""cpupool_id, sched_id, cmd, then for credit: tslice_ms, ratelimit_us."""
SCHEDOP_PUTINFO: Final = 0
SCHEDOP_GETINFO: Final = 1
