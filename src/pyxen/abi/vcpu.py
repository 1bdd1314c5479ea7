# SPDX-License-Identifier: GPL-2.0-only
"""``xen/include/public/vcpu.h``: operations on vCPUs, run-state information."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final


class VcpuOp(IntEnum):
    """``VCPUOP_*``."""

    INITIALISE = 0
    UP = 1
    DOWN = 2
    IS_UP = 3
    GET_RUNSTATE_INFO = 4
    REGISTER_RUNSTATE_MEMORY_AREA = 5
    SET_PERIODIC_TIMER = 6
    STOP_PERIODIC_TIMER = 7
    SET_SINGLESHOT_TIMER = 8
    STOP_SINGLESHOT_TIMER = 9
    REGISTER_VCPU_INFO = 10
    SEND_NMI = 11
    GET_PHYSID = 12
    REGISTER_VCPU_TIME_MEMORY_AREA = 13


RUNSTATE_INFO: Final = struct.Struct("<i4xQ4Q")
"""struct vcpu_runstate_info: state, state_entry_time (system time, ns), time[4] (ns)."""
XEN_RUNSTATE_UPDATE: Final = 1 << 63
"""Set in state_entry_time of a registered area while it changes (VMASST_TYPE_runstate_update_flag)."""

REGISTER_AREA: Final = struct.Struct("<Q")
"""struct vcpu_register_runstate_memory_area, struct vcpu_register_time_memory_area: a guest virtual address."""
SET_PERIODIC_TIMER: Final = struct.Struct("<Q")
"""struct vcpu_set_periodic_timer: period_ns."""
SET_SINGLESHOT_TIMER: Final = struct.Struct("<QI4x")
"""struct vcpu_set_singleshot_timer: timeout_abs_ns, flags."""
REGISTER_VCPU_INFO: Final = struct.Struct("<QII")
"""struct vcpu_register_vcpu_info: mfn, offset, rsvd."""
VCPU_SSHOTTMR_FUTURE: Final = 1
"""Answer ETIME if the timeout has passed."""
