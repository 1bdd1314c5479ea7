# SPDX-License-Identifier: GPL-2.0-only
"""Commands about the host: info, dmesg, debug-keys."""

from __future__ import annotations

import sys

from pyxen.cli.client import Client
from pyxen.cli.getopt import getopt
from pyxen.cli.xl import Context, need

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def info(args: list[str], context: Context) -> int:
    """``xl info``."""
    options, _ = getopt(args, "n", {"numa": "n"})
    answer = Client().get("/info?numa=1" if options else "/info")
    topology, nodes = answer.pop("cpu_topology", None), answer.pop("numa_info", None)
    for key, value in answer.items():
        print(f"{key:<23}: {value}")
        if key == "free_cpus" and options:
            _numa(topology or [], nodes or [])
    return 0


def _numa(topology: list[dict[str, Any]], nodes: list[dict[str, Any]]) -> None:
    print("cpu_topology           :\ncpu:    core    socket     node")
    for cpu in topology:
        print(f"{cpu['cpu']:3d}:    {cpu['core']:4d}     {cpu['socket']:4d}     {cpu['node']:4d}")
    print("device topology        :\ndevice           node\nNo device topology data available")
    print("numa_info              :\nnode:    memsize    memfree    distances")
    for node in nodes:
        distances = ",".join(str(distance) for distance in node["distances"])
        print(f"{node['node']:4d}:    {node['memsize_mb']:6d}     {node['memfree_mb']:6d}      {distances}")


def dmesg(args: list[str], context: Context) -> int:
    """``xl dmesg``."""
    options, _ = getopt(args, "c")
    sys.stdout.write(Client().get("/dmesg?clear=1" if options else "/dmesg"))
    return 0


def debug_keys(args: list[str], context: Context) -> int:
    """``xl debug-keys``."""
    _, operands = getopt(args, "")
    need(operands, 1, "debug-keys")
    Client().post("/debug-keys", {"keys": operands[0]})
    return 0
