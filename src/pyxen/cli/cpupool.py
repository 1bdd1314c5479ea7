# SPDX-License-Identifier: GPL-2.0-only
"""The cpupool commands.

Where xl warns and still ends with 0 (a CPU that could not be added or removed), these end with 1.
"""

from __future__ import annotations

import os
import re
import sys

from pyxen.cli.client import ApiError, Client, quote
from pyxen.cli.getopt import getopt
from pyxen.cli.report import Failure
from pyxen.cli.vcpus import failed, host_shape
from pyxen.cli.xl import Context, need

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from pyxen.toolstack.config import Settings

_SCHEDULERS = ("unknown", "sedf", "credit", "credit2", "arinc653", "rtds", "null")
_NUMBER = re.compile(r"\s*([+-]?[0-9]{1,9})")


def cpupool_list(args: list[str], context: Context) -> int:
    """``xl cpupool-list``."""
    options, operands = getopt(args, "c", {"cpus": "c"})
    pools: list[dict[str, Any]] = Client().get("/cpupools")["pools"]
    if operands:
        pools = [pool for pool in pools if pool["name"] == operands[0]]
        if not pools:
            raise Failure(f"Pool '{operands[0]}' does not exist")
    lines = [f"{'Name':<19}" + ("CPU list" if options else "CPUs   Sched     Active   Domain count")]
    for pool in pools:
        if options:
            shown = ",".join(str(cpu) for cpu in pool["cpus"])
        else:
            shown = f"{len(pool['cpus']):3d} {pool['sched']:>9}       y       {pool['n_dom']:4d}"
        lines.append(f"{pool['name']:<19}{shown}")
    print("\n".join(lines))
    return 0


# --- creating -------------------------------------------------------------------------------------------


def cpupool_create(args: list[str], context: Context) -> int:
    """``xl cpupool-create``."""
    options, operands = getopt(args, "nf:", {"defconfig": "f", "dryrun": "n"})
    given = dict(options)
    file, extra = given.get("f"), []
    for operand in operands:
        if "=" in operand:
            extra.append(operand)
        elif file is None:
            file = operand
        else:
            from pyxen.cli.usage import command_help

            print(command_help("cpupool-create"), end="")
            return 1
    source = "command line" if file is None else file
    settings = _read(file, source, extra)
    if settings is None:
        return 1
    name = settings.string("name")
    if name is None:
        if file is None:
            raise Failure("Missing cpupool name!", hint='name="…" in the file or on the command line')
        name = os.path.basename(file)
    client = Client()
    known = client.get("/cpupools")
    if any(pool["name"] == name for pool in known["pools"]):
        raise Failure(f'Pool name "{name}" already exists')
    sched = settings.string("sched") or "credit"
    if sched not in _SCHEDULERS:
        raise Failure("Unknown scheduler", hint='this version has sched = "credit"')
    cpus = _cpus(client, settings, frozenset(known["free_cpus"]))
    for warning in settings.warnings:
        print(warning, file=sys.stderr)
    print(f'Using config file "{source}"')
    print(f"cpupool name:   {name}\nscheduler:      {sched}\nnumber of cpus: {len(cpus)}")
    sys.stdout.flush()
    if context.dry_run or "n" in given:
        return 0
    try:
        client.post("/cpupools", {"name": name, "sched": sched, "cpus": cpus})
    except ApiError as error:
        raise failed(error, "error on creating cpupool") from None
    return 0


def _read(file: str | None, source: str, extra: list[str]) -> Settings | None:
    """The settings; None (and why) when they are none."""
    from pyxen.cli.create import read_config
    from pyxen.toolstack.config import ConfigSyntaxError, Settings
    from pyxen.toolstack.config.syntax import parse_text

    text = "" if file is None else read_config(file, 1)
    text += "".join(f"\n{assignment}" for assignment in extra) + "\n"
    try:
        return Settings(source, parse_text(text, source))
    except ConfigSyntaxError as error:
        for report in error.reports:
            print(report, file=sys.stderr)
        print("Failed to parse config file: Invalid argument", file=sys.stderr)
        return None


def _cpus(client: Client, settings: Settings, free: frozenset[int]) -> list[int]:
    """``nodes=`` or ``cpus=``: pCPUs that are free; neither is none."""
    from pyxen.toolstack.config import parse_cpu_list

    nodes, cpus = settings.value("nodes"), settings.value("cpus")
    if nodes is not None:
        shape = host_shape(client).nodes
        wanted = {_integer(item, "nodes") for item in ((nodes,) if isinstance(nodes, str) else nodes)}
        found = sorted(cpu for node in wanted if 0 <= node < len(shape) for cpu in shape[node] if cpu in free)
        if not found:
            raise Failure("no free cpu found", hint="xl cpupool-cpu-remove frees those of another cpupool")
        return found
    if cpus is None:
        return []
    if isinstance(cpus, str):
        named = list(parse_cpu_list(cpus).resolve(host_shape(client)))
        if not named:
            raise Failure(f"no cpu of this host in cpus={cpus}")
    else:
        named = [_integer(item, "cpus") for item in cpus]
    for cpu in named:
        if cpu not in free:
            raise Failure(f"cpu {cpu} illegal or not free", hint="xl cpupool-cpu-remove frees those of another cpupool")
    return sorted(set(named))


def _integer(item: object, name: str) -> int:
    match = _NUMBER.fullmatch(item) if isinstance(item, str) else None
    if match is None:
        raise Failure(f"{name}= holds what is no number: {str(item)[:40]}")
    return int(match[1])


# --- the others -----------------------------------------------------------------------------------------


def cpupool_destroy(args: list[str], context: Context) -> int:
    """``xl cpupool-destroy``."""
    _, operands = getopt(args, "")
    need(operands, 1, "cpupool-destroy")
    client, pool = Client(), operands[0]
    try:
        client.delete(_path(pool))
    except ApiError as error:
        raise _pool_error(error, pool, f"Can't destroy cpupool '{pool}'") from None
    return 0


def cpupool_rename(args: list[str], context: Context) -> int:
    """``xl cpupool-rename``."""
    _, operands = getopt(args, "")
    need(operands, 2, "cpupool-rename")
    client, pool = Client(), operands[0]
    try:
        client.post(_path(pool) + "/rename", {"name": operands[1]})
    except ApiError as error:
        raise _pool_error(error, pool, f"Can't rename cpupool '{pool}'") from None
    return 0


def cpupool_cpu_add(args: list[str], context: Context) -> int:
    """``xl cpupool-cpu-add``."""
    pool, refused = _change_cpus("cpu-add", args)
    if refused:
        raise Failure(f"some cpus may not have been added to {pool}", hint=refused)
    return 0


def cpupool_cpu_remove(args: list[str], context: Context) -> int:
    """``xl cpupool-cpu-remove``."""
    pool, refused = _change_cpus("cpu-remove", args)
    if refused:
        raise Failure(f"Some cpus may have not or only partially been removed from '{pool}'.", hint=refused)
    return 0


def _change_cpus(action: str, args: list[str]) -> tuple[str, str]:
    """The pool, and which CPUs could not be moved and why ("" when all were)."""
    from pyxen.toolstack.config import parse_cpu_list

    _, operands = getopt(args, "")
    need(operands, 2, f"cpupool-{action}")
    pool, cpus = operands[0], parse_cpu_list(operands[1])
    client = Client()
    named = cpus.resolve(host_shape(client))
    if not named:
        raise Failure(f"no cpu of this host in {operands[1]}")
    try:
        answer = client.post(f"{_path(pool)}/{action}", {"cpus": list(named)})
    except ApiError as error:
        raise _pool_error(error, pool, str(error)) from None
    return pool, ", ".join(f"cpu {cpu}: {why}" for cpu, why in answer["failed"].items())


def cpupool_migrate(args: list[str], context: Context) -> int:
    """``xl cpupool-migrate``."""
    _, operands = getopt(args, "")
    need(operands, 2, "cpupool-migrate")
    client, pool = Client(), operands[1]
    try:
        domid = client.domain(operands[0])["domid"]
    except ApiError as error:
        if error.status != 404:
            raise
        raise Failure(f"unknown domain '{operands[0]}'") from None
    client.post(f"/domains/{domid}/cpupool", {"pool": pool})
    return 0


def cpupool_numa_split(args: list[str], context: Context) -> int:
    """``xl cpupool-numa-split``."""
    getopt(args, "")
    Client().post("/cpupools/numa-split")
    return 0


def _path(pool: str) -> str:
    if not pool or "/" in pool:
        raise Failure(f"unknown cpupool '{pool}'")
    return f"/cpupools/{quote(pool)}"


def _pool_error(error: ApiError, pool: str, line: str) -> Failure:
    if error.status == 404:
        return Failure(f"unknown cpupool '{pool}'")
    return failed(error, line)
