# SPDX-License-Identifier: GPL-2.0-only
"""``xen/include/public/sched.h``: scheduler operations, and the scheduler's trace events of ``trace.h``."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final


class SchedOp(IntEnum):
    """``SCHEDOP_*``."""

    YIELD = 0
    BLOCK = 1
    SHUTDOWN = 2
    POLL = 3
    REMOTE_SHUTDOWN = 4
    SHUTDOWN_CODE = 5
    WATCHDOG = 6
    PIN_OVERRIDE = 7


SCHED_SHUTDOWN: Final = struct.Struct("<I")
"""struct sched_shutdown: reason."""
SCHED_POLL: Final = struct.Struct("<QI4xQ")
"""struct sched_poll: ports (guest handle of evtchn_port_t), nr_ports, timeout (absolute system time, ns; 0 is
never)."""
SCHED_REMOTE_SHUTDOWN: Final = struct.Struct("<H2xI")
"""struct sched_remote_shutdown: domain_id, reason."""
SCHED_WATCHDOG: Final = struct.Struct("<II")
"""struct sched_watchdog: id, timeout (seconds)."""

POLL_MAX_PORTS: Final = 128
NR_DOMAIN_WATCHDOG_TIMERS: Final = 2

# struct xen_sysctl_credit_schedule and its neighbours in sysctl.h
CSCHED_TSLICE_MIN_MS: Final = 1
CSCHED_TSLICE_MAX_MS: Final = 1000
SCHED_RATELIMIT_MIN_US: Final = 100
SCHED_RATELIMIT_MAX_US: Final = 500_000

TRC_SCHED_MIN: Final = 0x00021000
TRC_SCHED_VERBOSE: Final = 0x00028000
TRC_SCHED_RUNSTATE_CHANGE: Final = TRC_SCHED_MIN + 1
TRC_SCHED_CONTINUE_RUNNING: Final = TRC_SCHED_MIN + 2
TRC_SCHED_DOM_ADD: Final = TRC_SCHED_VERBOSE + 1
TRC_SCHED_DOM_REM: Final = TRC_SCHED_VERBOSE + 2
TRC_SCHED_SLEEP: Final = TRC_SCHED_VERBOSE + 3
TRC_SCHED_WAKE: Final = TRC_SCHED_VERBOSE + 4
TRC_SCHED_YIELD: Final = TRC_SCHED_VERBOSE + 5
TRC_SCHED_BLOCK: Final = TRC_SCHED_VERBOSE + 6
TRC_SCHED_SHUTDOWN: Final = TRC_SCHED_VERBOSE + 7
TRC_SCHED_CTL: Final = TRC_SCHED_VERBOSE + 8
TRC_SCHED_ADJDOM: Final = TRC_SCHED_VERBOSE + 9
TRC_SCHED_SWITCH: Final = TRC_SCHED_VERBOSE + 10
TRC_SCHED_SWITCH_INFPREV: Final = TRC_SCHED_VERBOSE + 14
TRC_SCHED_SWITCH_INFNEXT: Final = TRC_SCHED_VERBOSE + 15
TRC_SCHED_SHUTDOWN_CODE: Final = TRC_SCHED_VERBOSE + 16
