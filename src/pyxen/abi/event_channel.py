# SPDX-License-Identifier: GPL-2.0-only
"""``xen/include/public/event_channel.h``: event-channel operations and their argument structures (x86-64)."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import Final


class EvtchnCmd(IntEnum):
    """``EVTCHNOP_*``."""

    BIND_INTERDOMAIN = 0
    BIND_VIRQ = 1
    BIND_PIRQ = 2
    CLOSE = 3
    SEND = 4
    STATUS = 5
    ALLOC_UNBOUND = 6
    BIND_IPI = 7
    BIND_VCPU = 8
    UNMASK = 9
    RESET = 10
    INIT_CONTROL = 11
    EXPAND_ARRAY = 12
    SET_PRIORITY = 13


class EvtchnStat(IntEnum):
    """``EVTCHNSTAT_*``: what EVTCHNOP_status says of a channel."""

    CLOSED = 0
    UNBOUND = 1
    INTERDOMAIN = 2
    PIRQ = 3
    VIRQ = 4
    IPI = 5


ALLOC_UNBOUND: Final = struct.Struct("<HHI")
"""struct evtchn_alloc_unbound: dom, remote_dom, OUT port."""
BIND_INTERDOMAIN: Final = struct.Struct("<H2xII")
"""struct evtchn_bind_interdomain: remote_dom, remote_port, OUT local_port."""
BIND_VIRQ: Final = struct.Struct("<III")
"""struct evtchn_bind_virq: virq, vcpu, OUT port."""
BIND_PIRQ: Final = struct.Struct("<III")
"""struct evtchn_bind_pirq: pirq, flags (BIND_PIRQ__*), OUT port."""
BIND_IPI: Final = struct.Struct("<II")
"""struct evtchn_bind_ipi: vcpu, OUT port."""
PORT: Final = struct.Struct("<I")
"""struct evtchn_close, evtchn_send and evtchn_unmask: port."""
STATUS: Final = struct.Struct("<H2xIIIII")
"""struct evtchn_status: dom, port, OUT status, OUT vcpu, OUT u (two words).

``u`` is dom for unbound; dom and port for interdomain; pirq or virq for those."""
STATUS_SIZE: Final = 24
BIND_VCPU: Final = struct.Struct("<II")
"""struct evtchn_bind_vcpu: port, vcpu."""
RESET: Final = struct.Struct("<H")
"""struct evtchn_reset: dom."""

COMPAT_OP_ARGS: Final = 4
"""Offset of the union in struct evtchn_op (EVENT_CHANNEL_OP_COMPAT): it follows the 32-bit cmd."""

EVTCHN_2L_NR_CHANNELS: Final = 8 * 8 * 64
EVTCHN_FIFO_NR_CHANNELS: Final = 1 << 17
