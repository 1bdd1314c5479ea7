# SPDX-License-Identifier: GPL-2.0-only
"""``xl sched-credit``: weight and cap of domains, parameters of the credit scheduler; and what there is to say of the
schedulers that are not here."""

from __future__ import annotations

import re

from pyxen.cli.client import ApiError, Client
from pyxen.cli.getopt import getopt
from pyxen.cli.report import Failure
from pyxen.cli.vcpus import failed
from pyxen.cli.xl import Context

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_LONG = {
    "domain": "d",
    "weight": "w",
    "cap": "c",
    "schedparam": "s",
    "tslice_ms": "t",
    "ratelimit_us": "r",
    "migration_delay_us": "m",
    "cpupool": "p",
}
_PARAMETERS = {"t": "tslice_ms", "r": "ratelimit_us", "m": "migration_delay_us"}
_FIRST_POOL = "0"
_INTEGER = re.compile(r"-?[0-9]{1,9}")


def sched_credit(args: list[str], context: Context) -> int:
    """``xl sched-credit``."""
    given = dict(getopt(args, "d:w:c:p:t:r:m:s", _LONG)[0])
    new = {name: given[letter] for letter, name in (("w", "weight"), ("c", "cap")) if letter in given}
    parameters = {name: given[letter] for letter, name in _PARAMETERS.items() if letter in given}
    if ("p" in given or "s" in given) and ("d" in given or new):
        raise Failure("Specifying a cpupool or schedparam is not allowed with domain options.")
    if "d" not in given and new:
        raise Failure("Must specify a domain.")
    if parameters and "s" not in given:
        raise Failure("Must specify schedparam to set schedule parameter values.")
    client = Client()
    if "d" in given:
        row = client.domain(given["d"])
        path = f"/domains/{row['domid']}/sched-credit"
        if new:
            _set(client, path, new, "libxl_domain_sched_params_set failed.")
        else:
            _print_heading()
            _print_domain(row, client.get(path))
        return 0
    if parameters:
        pool = _find_pool(client, given["p"])["poolid"] if "p" in given else 0
        _set(client, "/sched-credit", parameters, "libxl_sched_credit_params_set failed.", pool=str(pool))
        return 0
    if "s" in given:
        pools = [_find_pool(client, given.get("p", _FIRST_POOL))]
    elif "p" in given:
        pools = [_find_pool(client, given["p"])]
    else:
        pools = client.get("/cpupools")["pools"]
    rows = [] if "s" in given else client.get("/domains")
    for pool in pools:
        _print_pool(client, pool)
        if "s" not in given:
            _print_heading()
            for row in rows:
                if row.get("cpupool_id", 0) == pool["poolid"]:
                    _print_if_there(client, row)
    return 0


def _set(client: Client, path: str, new: dict[str, str], line: str, **more: str) -> None:
    numbers: dict[str, Any] = {}
    for name, text in new.items():
        if not _INTEGER.fullmatch(text):
            raise Failure(line, hint=f"{name} is a whole number, not '{text[:40]}'")
        numbers[name] = int(text)
    try:
        client.post(path, numbers | more)
    except ApiError as error:
        raise failed(error, line) from None


def _find_pool(client: Client, which: str) -> dict[str, Any]:
    """libxl_cpupool_qualifier_to_cpupoolid(): digits are a pool's number."""
    key, wanted = ("poolid", int(which)) if which.isascii() and which.isdigit() and len(which) < 10 else ("name", which)
    for pool in client.get("/cpupools")["pools"]:
        if pool[key] == wanted:
            found: dict[str, Any] = pool
            return found
    raise Failure(f"unknown cpupool '{which}'")


def _print_pool(client: Client, pool: dict[str, Any]) -> None:
    try:
        now = client.get(f"/sched-credit?pool={pool['poolid']}")
    except ApiError as error:
        if error.status != 404:
            raise
        print(f"Cpupool {pool['name']}: [sched params unavailable]")  # it went while we were looking
        return
    print(
        f"Cpupool {pool['name']}: tslice={now['tslice_ms']}ms ratelimit={now['ratelimit_us']}us "
        f"migration-delay={now['migration_delay_us']}us"
    )


def _print_if_there(client: Client, row: dict[str, Any]) -> None:
    try:
        _print_domain(row, client.get(f"/domains/{row['domid']}/sched-credit"))
    except ApiError as error:
        if error.status != 404:  # it went while we were looking
            raise


def _print_heading() -> None:
    print(f"{'Name':<33} {'ID':>4} {'Weight':>6} {'Cap':>4}")


def _print_domain(row: dict[str, Any], sched: dict[str, Any]) -> None:
    print(f"{row['name'] or '(null)':<33} {row['domid']:4d} {sched['weight']:6d} {sched['cap']:4d}")


# --- schedulers that are not here ------------------------------------------------------------------------


def sched_credit2(args: list[str], context: Context) -> int:
    """``xl sched-credit2``: options and their mistakes are xl's, but no pool of this hypervisor runs credit2."""
    long = {"domain": "d", "weight": "w", "cap": "c", "schedparam": "s", "ratelimit_us": "r", "cpupool": "p"}
    given = dict(getopt(args, "d:w:c:p:r:s", long)[0])
    if "p" in given and given.keys() & set("dwc"):
        raise Failure("Specifying a cpupool is not allowed with other options.")
    if "d" not in given and given.keys() & set("wc"):
        raise Failure("Must specify a domain.")
    return _not_here("credit2", given)


def sched_rtds(args: list[str], context: Context) -> int:
    """``xl sched-rtds``: as above."""
    long = {"domain": "d", "period": "p", "budget": "b", "extratime": "e", "vcpuid": "v", "cpupool": "c"}
    given = dict(getopt(args, "d:p:b:e:v:c:", long)[0])
    if "c" in given and len(given) > 1:
        raise Failure("Specifying a cpupool is not allowed with other options.")
    if "d" not in given and (given.keys() & set("pbe") or given.get("v", "all") != "all"):
        raise Failure("Missing parameters.")
    if "d" in given and "v" not in given and given.keys() & set("pbe"):
        raise Failure("Must specify VCPU.")
    return _not_here("rtds", given)


def _not_here(scheduler: str, given: dict[str, str]) -> int:
    hint = "this version schedules with credit: xl sched-credit"
    if "d" in given:
        Client().domain(given["d"])
        raise Failure(f"libxl_domain_sched_params_get returned credit not {scheduler}.", hint=hint)
    raise Failure(f"no cpupool is scheduled by {scheduler}", hint=hint)
