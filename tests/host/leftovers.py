# SPDX-License-Identifier: GPL-2.0-only
"""Everything that could be left behind, as a value that can be compared."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from pyxen.abi.event_channel import EvtchnStat
from pyxen.errors import XenError
from pyxen.host import Host

WORKERS = "pyxen-work"
"""Threads of the host's pool: they come when they are first needed and stay as long as the host."""


def of_process() -> dict[str, Any]:
    """Descriptors (by what they are), threads and our temporary folders."""
    kinds: dict[str, int] = {}
    for fd in os.listdir("/proc/self/fd"):
        try:
            target = os.readlink(f"/proc/self/fd/{fd}")
        except FileNotFoundError:
            continue
        kind = target.split(":")[0]
        kinds[kind] = kinds.get(kind, 0) + 1
    kinds.pop("/proc/self/fd", None)
    return {
        "descriptors": {kind: n for kind, n in kinds.items() if not kind.startswith("/proc/")},
        "threads": sorted(t.name for t in threading.enumerate() if not t.name.startswith(("asyncio", WORKERS))),
    }


def of_host(host: Host) -> dict[str, Any]:
    """What a domain could have left: frames, domains, ports of dom0, xenstore nodes, records, files, descriptors."""
    hypervisor = host.hypervisor
    return {
        "free": hypervisor.allocator.free_frames,
        "domains": sorted(hypervisor.domains),
        "dom0 ports": dom0_ports(host),
        "store": store_tree(host),
        "pools": {pool.poolid: (pool.cpus, pool.n_dom) for pool in hypervisor.cpupools.list()},
        "records": [record.domid for record in host.table],
        "reserved": set(host.table._reserved),
        "claims": dict(host.operations._claims),
        "files": sorted(str(p) for p in Path(host.rundir).rglob("*") if not p.is_dir() and p.parent.name != "log"),
        **of_process(),
    }


def dom0_ports(host: Host) -> int:
    """Event channels of domain 0 that are not free."""
    dom0 = host.hypervisor.dom0
    count = 0
    for port in range(1, 4096):
        try:
            state = dom0.evtchn.status(port, dom0)[0]
        except XenError:  # no such port yet: the rest was never used
            break
        count += state is not EvtchnStat.CLOSED
    return count


def store_tree(host: Host) -> dict[str, tuple[bytes, str]]:
    """Every node of xenstore with its value and permissions."""
    nodes = host.xenstored.service.store.nodes
    return {bytes(path).decode(): (bytes(node.value), str(node.perms)) for path, node in nodes.items()}
