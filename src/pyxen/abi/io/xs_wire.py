# SPDX-License-Identifier: GPL-2.0-only
"""``xen/include/public/io/xs_wire.h``: messages between xenstored and its clients, and the guest's ring page.

All integers are little-endian u32.  A message is :data:`SOCKMSG` followed by ``len`` bytes of payload.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import Final


class XsType(IntEnum):
    """``enum xsd_sockmsg_type``."""

    CONTROL = 0
    DIRECTORY = 1
    READ = 2
    GET_PERMS = 3
    WATCH = 4
    UNWATCH = 5
    TRANSACTION_START = 6
    TRANSACTION_END = 7
    INTRODUCE = 8
    RELEASE = 9
    GET_DOMAIN_PATH = 10
    WRITE = 11
    MKDIR = 12
    RM = 13
    SET_PERMS = 14
    WATCH_EVENT = 15
    ERROR = 16
    IS_DOMAIN_INTRODUCED = 17
    RESUME = 18
    SET_TARGET = 19
    # 20 was XS_RESTRICT, removed from the protocol.
    RESET_WATCHES = 21
    DIRECTORY_PART = 22


XS_TYPE_COUNT: Final = 23
"""Number of request types; anything at or above it is ENOSYS."""

SOCKMSG: Final = struct.Struct("<IIII")
"""struct xsd_sockmsg: type, req_id, tx_id, len (of the payload that follows, in bytes)."""

ERROR_NAMES: Final = (
    "EINVAL", "EACCES", "EEXIST", "EISDIR", "ENOENT", "ENOMEM", "ENOSPC", "EIO",
    "ENOTEMPTY", "ENOSYS", "EROFS", "EBUSY", "EAGAIN", "EISCONN", "E2BIG", "EPERM",
)
"""``xsd_errors``: the only error strings that may travel in XS_ERROR."""

XENSTORE_PAYLOAD_MAX: Final = 4096
XENSTORE_ABS_PATH_MAX: Final = 3072
XENSTORE_REL_PATH_MAX: Final = 2048

# --- struct xenstore_domain_interface ------------------------------------------------------
XENSTORE_RING_SIZE: Final = 1024
RING_REQ: Final = 0
RING_RSP: Final = 1024
RING_REQ_CONS: Final = 2048
RING_REQ_PROD: Final = 2052
RING_RSP_CONS: Final = 2056
RING_RSP_PROD: Final = 2060
RING_SERVER_FEATURES: Final = 2064
RING_CONNECTION: Final = 2068
RING_ERROR: Final = 2072


class ServerFeature(IntFlag):
    """``XENSTORE_SERVER_FEATURE_*``."""

    RECONNECTION = 1
    ERROR = 2


XENSTORE_CONNECTED: Final = 0
XENSTORE_RECONNECT: Final = 1


class RingError(IntEnum):
    """``XENSTORE_ERROR_*``: what the server writes into the ring page before it stops listening."""

    NONE = 0
    COMM = 1
    RINGIDX = 2
    PROTO = 3
