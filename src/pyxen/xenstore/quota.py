# SPDX-License-Identifier: GPL-2.0-only
"""How much of the store one unprivileged domain may use, and how much any connection.

Names and defaults are those of the C daemon (``xenstore-control quota``); domain 0 has no quota.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final


@dataclass(slots=True)
class Quota:
    """Limits of each unprivileged domain."""

    nodes: int = 1000
    watches: int = 128
    transactions: int = 10
    outstanding: int = 20
    """Requests whose answers the domain has not taken out of its ring."""
    transaction_nodes: int = 1024
    node_size: int = 2048
    """Bytes of one node: header, permissions, value and children's names (see Node.size_bytes)."""
    permissions: int = 5


QUOTA_TEXT: Final = (
    ("nodes", "nodes", "Nodes per domain"),
    ("watches", "watches", "Watches per domain"),
    ("transactions", "transactions", "Transactions per domain"),
    ("outstanding", "outstanding", "Outstanding requests per domain"),
    ("transaction-nodes", "transaction_nodes", "Max. number of accessed nodes per transaction"),
    ("node-size", "node_size", "Max. size of a node"),
    ("permissions", "permissions", "Max. number of permissions per node"),
)
"""(name on the wire, attribute of :class:`Quota`, description), in the order in which ``quota`` prints them."""

MAX_SOCKET_CONNECTIONS: Final = 1024
MAX_SOCKET_WATCHES: Final = 65536
"""Per connection: the C daemon has no such limit for dom0; a runaway client must not take the host's memory."""
MAX_SOCKET_TRANSACTIONS: Final = 4096
OUTPUT_PAUSE_BYTES: Final = 64 * 1024
"""A connection with this much unread output is not read from until it has taken some."""
OUTPUT_MAX_BYTES: Final = 8 * 1024 * 1024
"""Watch events come even to those who do not read; a socket this far behind is closed."""
RING_EVENTS_MAX_BYTES: Final = 256 * 1024
"""A guest this far behind loses further watch events (each distinct event is queued once)."""
