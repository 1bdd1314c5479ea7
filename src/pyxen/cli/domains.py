# SPDX-License-Identifier: GPL-2.0-only
"""Commands that show domains: list, vm-list, vcpu-list, domid, domname, uptime.  Columns are xl's, to the space."""

from __future__ import annotations

import sys

from pyxen.cli.client import ApiError, Client
from pyxen.cli.getopt import getopt
from pyxen.cli.report import Failure, complain
from pyxen.cli.xl import Context, need

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

_NIL_UUID = "00000000-0000-0000-0000-000000000000"
# SHUTDOWN_* (xen/include/public/sched.h), as xl prints them.
SHUTDOWN_CODES = {"poweroff": 0, "reboot": 1, "suspend": 2, "crash": 3, "watchdog": 4, "soft-reset": 5, "soft_reset": 5}


def list_domains(args: list[str], context: Context) -> int:
    """``xl list``."""
    options, operands = getopt(
        args, "lvZcn", {"long": "l", "verbose": "v", "context": "Z", "cpupool": "c", "numa": "n"}
    )
    letters = {letter for letter, _ in options}
    if len(operands) > 1:
        from pyxen.cli.usage import command_help

        print(command_help("list"), end="", file=sys.stderr)
        return 1
    client = Client()
    if operands:
        try:
            rows = [client.domain(operands[0])]
        except ApiError as error:
            if error.status == 404 and operands[0].isdigit():
                raise Failure(f"Error: Domain '{operands[0]}' does not exist.") from None
            raise
    else:
        rows = client.get("/domains")
    if "l" in letters:
        _list_long(client, rows)
    else:
        _list_table(rows, letters)
    return 0


def _list_long(client: Client, rows: Iterable[dict[str, Any]]) -> None:
    from pyxen.toolstack.config.libxl_json import dumps

    found: list[Any] = []
    for row in rows:
        if "config" not in row:
            try:
                row = client.domain(str(row["domid"]))
            except ApiError as error:
                if error.status == 404:
                    continue  # it went while we were looking
                raise
        found.append({"domid": row["domid"], "config": row["config"]})
    # The second newline is xl's.
    print(dumps(found) + "\n")


def _list_table(rows: Iterable[dict[str, Any]], letters: set[str]) -> None:
    verbose, context = "v" in letters, "Z" in letters
    heading = "Name                                        ID   Mem VCPUs\tState\tTime(s)"
    if verbose:
        heading += "   UUID                            Reason-Code\tSecurity Label"
    elif context:
        heading += "   Security Label"
    if "c" in letters:
        heading += "         Cpupool"
    if "n" in letters:
        heading += " NODE Affinity"
    lines = [heading]
    for row in rows:
        seconds = row["cpu_time_ns"] / 1e9
        line = (
            f"{row['name'] or '(null)':<40} {row['domid']:5d} {row['memory_kb'] // 1024:5d} {row['vcpus']:5d}"
            f"     {row['state']:6}  {seconds:8.1f}"
        )
        if verbose:
            reason = row.get("shutdown_reason")
            code = SHUTDOWN_CODES.get(reason, reason) if isinstance(reason, str) else reason
            line += f" {row['uuid'] or _NIL_UUID} {'-' if code is None else code:>8}"
        if verbose or context:
            line += f" {row.get('ssid') or '-':>16}"
        if "c" in letters:
            line += f"{row.get('cpupool') or 'Pool-0':>16}"
        if "n" in letters:
            line += f" {ranges(row.get('node_affinity'))}"
        lines.append(line)
    print("\n".join(lines))


def ranges(numbers: Iterable[int] | None) -> str:
    """A set of CPUs or nodes as xl prints it; None is all of them."""
    if numbers is None:
        return "all"
    found: list[tuple[int, int]] = []
    for number in sorted(numbers):
        if found and found[-1][1] == number - 1:
            found[-1] = (found[-1][0], number)
        else:
            found.append((number, number))
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in found) or "none"


def vm_list(args: list[str], context: Context) -> int:
    """``xl vm-list``."""
    getopt(args, "")
    print("UUID                                  ID    name")
    for row in Client().get("/domains"):
        print(f"{row['uuid'] or _NIL_UUID}  {row['domid']}    {row['name'] or '(null)':<30}")
    return 0


def vcpu_list(args: list[str], context: Context) -> int:
    """``xl vcpu-list``."""
    _, operands = getopt(args, "")
    client = Client()
    code = 0
    print("Name                                ID  VCPU   CPU State   Time(s) Affinity (Hard / Soft)")
    if not operands:
        rows = client.get("/domains")
    else:
        rows = []
        for which in operands:
            try:
                rows.append(client.domain(which))
            except ApiError as error:
                code = complain(error)
    for row in rows:
        try:
            vcpus = client.get(f"/domains/{row['domid']}/vcpus")
        except ApiError as error:
            if error.status != 404:
                raise
            continue  # it went while we were looking
        for vcpu in vcpus:
            cpu, state = (f"{vcpu['cpu']:5d}", vcpu["state"]) if vcpu["cpu"] is not None else ("    -", "--p")
            affinity = f"{ranges(vcpu.get('hard_affinity'))} / {ranges(vcpu.get('soft_affinity'))}"
            print(
                f"{row['name'] or '(null)':<32} {row['domid']:5d} {vcpu['vcpu']:5d}{cpu} {state:>5} "
                f"{vcpu['time_ns'] / 1e9:9.1f}  {affinity}"
            )
    return code


def domid(args: list[str], context: Context) -> int:
    """``xl domid``."""
    _, operands = getopt(args, "")
    need(operands, 1, "domid")
    # Looked up among the names: a domain may be called 7, and then it is not the domain with that id.
    for row in Client().get("/domains"):
        if row["name"] == operands[0]:
            print(row["domid"])
            return 0
    raise Failure(f"Can't get domid of domain name '{operands[0]}', maybe this domain does not exist.")


def domname(args: list[str], context: Context) -> int:
    """``xl domname``."""
    _, operands = getopt(args, "")
    need(operands, 1, "domname")
    if not (operands[0].isascii() and operands[0].isdigit()):
        raise Failure("Invalid domain id.\n")
    try:
        print(Client().domain(operands[0])["name"])
    except ApiError as error:
        if error.status != 404:
            raise
        text = f"Can't get domain name of domain id '{operands[0]}', maybe this domain does not exist."
        raise Failure(text) from None
    return 0


def uptime(args: list[str], context: Context) -> int:
    """``xl uptime``."""
    options, operands = getopt(args, "s")
    client = Client()
    wanted = [client.domain(which)["domid"] for which in operands]
    rows = client.get("/uptime")
    if wanted:
        by_domid = {row["domid"]: row for row in rows}
        rows = [by_domid[domid] for domid in wanted if domid in by_domid]
    if options:
        import time

        now = time.strftime("%H:%M:%S")
        for row in rows:
            print(f" {now} up {_duration(row['seconds'], short=True)}, {row['name']} ({row['domid']})")
        return 0
    print(f"{'Name':<33} {'ID':>4} Uptime")
    for row in rows:
        print(f"{row['name'] or '(null)':<33} {row['domid']:4d} {_duration(row['seconds'], short=False)}")
    return 0


def _duration(seconds: float, *, short: bool) -> str:
    minutes, second = divmod(int(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    text = f"{hour:2d}:{minute:02d}" if short else f"{hour:2d}:{minute:02d}:{second:02d}"
    return f"{days} day{'s' if days > 1 else ''}, {text}" if days else text
