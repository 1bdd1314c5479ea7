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
