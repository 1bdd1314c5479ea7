# SPDX-License-Identifier: GPL-2.0-only
"""``xl sched-credit``: weight and cap of domains, parameters of the credit scheduler."""

from __future__ import annotations

from pyxen.cli.client import ApiError, Client
from pyxen.cli.getopt import UsageError, getopt
from pyxen.cli.report import Failure
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
_POOL = "Pool-0"


def sched_credit(args: list[str], context: Context) -> int:
    """``xl sched-credit``."""
    given = dict(getopt(args, "d:w:c:p:t:r:m:s", _LONG)[0])
    new = {name: _number(given, letter) for letter, name in (("w", "weight"), ("c", "cap")) if letter in given}
    parameters = {name: _number(given, letter) for letter, name in _PARAMETERS.items() if letter in given}
    if ("p" in given or "s" in given) and ("d" in given or new):
        raise Failure("Specifying a cpupool or schedparam is not allowed with domain options.")
    if "d" not in given and new:
        raise Failure("Must specify a domain.")
    if parameters and "s" not in given:
        raise Failure("Must specify schedparam to set schedule parameter values.")
    if given.get("p", _POOL) not in (_POOL, "0"):
        raise Failure(f"unknown cpupool '{given['p']}'")
    client = Client()
    if "d" in given:
        row = client.domain(given["d"])
        path = f"/domains/{row['domid']}/sched-credit"
        if new:
            client.post(path, new)
        else:
            _print_heading()
            _print_domain(row, client.get(path))
        return 0
    if parameters:
        try:
            client.post("/sched-credit", parameters)
        except ApiError as error:
            if error.status not in (404, 405):
                raise
            raise Failure("setting scheduler parameters is not supported by this version of pyxen") from None
        return 0
    _print_pool(client)
    if "s" not in given:
        _print_heading()
        for row in client.get("/domains"):
            try:
                _print_domain(row, client.get(f"/domains/{row['domid']}/sched-credit"))
            except ApiError as error:
                if error.status != 404:  # it went while we were looking
                    raise
    return 0


def _number(given: dict[str, str], letter: str) -> int:
    text = given[letter]
    if not (text.isascii() and text.isdigit()) or len(text) > 9:
        raise UsageError(f"option `{letter}' needs a number, not '{text}'.")
    return int(text)


def _print_pool(client: Client) -> None:
    try:
        pool = client.get("/sched-credit")
    except ApiError as error:
        if error.status not in (404, 405):
            raise
        print(f"Cpupool {_POOL}: [sched params unavailable]")
        return
    print(
        f"Cpupool {_POOL}: tslice={pool['tslice_ms']}ms ratelimit={pool['ratelimit_us']}us "
        f"migration-delay={pool['migration_delay_us']}us"
    )


def _print_heading() -> None:
    print(f"{'Name':<33} {'ID':>4} {'Weight':>6} {'Cap':>4}")


def _print_domain(row: dict[str, Any], sched: dict[str, Any]) -> None:
    print(f"{row['name'] or '(null)':<33} {row['domid']:4d} {sched['weight']:6d} {sched['cap']:4d}")
