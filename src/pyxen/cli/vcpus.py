# SPDX-License-Identifier: GPL-2.0-only
"""Commands about a domain's vCPUs: vcpu-set, vcpu-pin."""

from __future__ import annotations

import sys

from pyxen.cli.client import ApiError, Client
from pyxen.cli.getopt import getopt
from pyxen.cli.report import Failure
from pyxen.cli.xl import Context, need

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyxen.toolstack.config import HostCpus


def vcpu_set(args: list[str], context: Context) -> int:
    """``xl vcpu-set``."""
    options, operands = getopt(args, "i", {"ignore-host": "i"})
    need(operands, 2, "vcpu-set")
    client = Client()
    row = client.domain(operands[0])
    text = operands[1]
    if not (text.isascii() and text.isdigit()) or len(text) > 9:
        raise Failure("Error: Invalid argument.", hint="the number of vCPUs is expected")
    count = int(text)
    if count < 1:
        return 0  # xl(1): quietly ignored
    if not options:
        host = int(client.get("/info")["nr_cpus"])
        if count > row["online_vcpus"] and count > host:
            raise Failure(
                f"You are overcommmitting! You have {host} physical CPUs and want {count} vCPUs! Aborting, "
                "use --ignore-host to continue"
            )
    try:
        client.post(f"/domains/{row['domid']}/vcpus", {"count": count})
    except ApiError as error:
        said = f"libxl_set_vcpuonline failed domid={row['domid']} max_vcpus={count}, rc: -3"
        raise failed(error, said) from None
    return 0


def failed(error: ApiError, line: str) -> Failure:
    """xl's own line for what the host refused, and the host's reason as the hint (libxl would have logged it)."""
    if error.status == 404:
        raise error
    return Failure(line, hint="; ".join(part for part in (str(error), error.hint) if part))


def vcpu_pin(args: list[str], context: Context) -> int:
    """``xl vcpu-pin``."""
    options, operands = getopt(
        _no_short_i(args), "fi", {"force": "f", "ignore-global-affinity-masks": "i"}
    )
    need(operands, 3, "vcpu-pin")
    client = Client()
    row = client.domain(operands[0])
    vcpu = _vcpu_number(operands[1], force=("f", "") in options)
    hard = operands[2] if operands[2] != "-" else None
    soft = operands[3] if len(operands) > 3 and operands[3] != "-" else None
    for text in (hard, soft):
        if text is not None:
            from pyxen.toolstack.config import parse_cpu_list

            parse_cpu_list(text)
    if context.dry_run:
        _print_maps(client, hard, soft)
        return 0
    which = "Could not set affinity." if vcpu is None else f"Could not set affinity for vcpu `{vcpu}'."
    try:
        answer = client.post(f"/domains/{row['domid']}/affinity", {"vcpu": vcpu, "hard": hard, "soft": soft})
    except ApiError as error:
        if " affinity map is empty" in str(error):
            raise
        raise failed(error, which) from None
    for pinned in answer:
        if soft is not None and not pinned["soft"]:
            print(
                f"All cpus in soft affinity of vcpu {pinned['vcpu']} are unreachable. Only hard affinity will be "
                "considered for scheduling",
                file=sys.stderr,
            )
    return 0


def _no_short_i(args: list[str]) -> list[str]:
    """--ignore-global-affinity-masks has no short form (and nothing to ignore: there is no xl.conf)."""
    from pyxen.cli.getopt import UsageError

    for arg in args:
        if arg == "--":
            break
        if arg.startswith("-i"):
            raise UsageError("option `i' not supported.")
    return args


def _vcpu_number(text: str, *, force: bool) -> int | None:
    if text == "all":
        if force:
            raise Failure("Error: --force and 'all' as VCPU not allowed.")
        return None
    if not (text.isascii() and text.isdigit()) or len(text) > 9:
        raise Failure(f"Error: Invalid argument {text} as VCPU.", hint="a vCPU's number is expected, or all")
    return int(text)


def host_shape(client: Client) -> HostCpus:
    """The host's pCPUs and nodes, for reading CPU lists here."""
    from pyxen.toolstack.config import HostCpus

    topology: list[dict[str, Any]] = client.get("/info?numa=1")["cpu_topology"]
    nodes: dict[int, list[int]] = {}
    for cpu in topology:
        nodes.setdefault(cpu["node"], []).append(cpu["cpu"])
    return HostCpus(len(topology), tuple(tuple(nodes.get(node, ())) for node in range(max(nodes, default=-1) + 1)))


def _print_maps(client: Client, hard: str | None, soft: str | None) -> None:
    from pyxen.cli.domains import ranges
    from pyxen.toolstack.config import parse_cpu_list

    host = host_shape(client)
    shown = []
    for text in (hard, soft):
        cpus = None if text is None else parse_cpu_list(text).resolve(host)
        shown.append("-" if cpus is None else ranges(None if len(cpus) == host.count else cpus))
    print("cpumap: " + " ".join(shown[: 2 if soft is not None else 1]))
