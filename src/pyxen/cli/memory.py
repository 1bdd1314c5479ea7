# SPDX-License-Identifier: GPL-2.0-only
"""Commands about a domain's memory: mem-set, mem-max."""

from __future__ import annotations

import re

from pyxen.cli.client import ApiError, Client
from pyxen.cli.getopt import getopt
from pyxen.cli.report import Failure
from pyxen.cli.vcpus import failed
from pyxen.cli.xl import Context, need

_SIZE = re.compile(r"([0-9]{1,12})([bkmgtBKMGT]?)")
_UNITS = {"k": 0, "": 10, "m": 10, "g": 20, "t": 30}


def mem_set(args: list[str], context: Context) -> int:
    """``xl mem-set``."""
    return _change(args, "mem-set", "memory-target", "dynamic max memory")


def mem_max(args: list[str], context: Context) -> int:
    """``xl mem-max``."""
    return _change(args, "mem-max", "memory-max", "static max memory")


def _change(args: list[str], command: str, action: str, what: str) -> int:
    _, operands = getopt(args, "")
    need(operands, 2, command)
    client = Client()
    domid, text = client.domain(operands[0])["domid"], operands[1]
    kb = size_kb(text)
    try:
        client.post(f"/domains/{domid}/{action}", {"kb": kb})
    except ApiError as error:
        raise failed(error, f"cannot set domid {domid} {what} to : {text}") from None
    return 0


def size_kb(text: str) -> int:
    """KiB of a size as xl takes it: MiB without a unit."""
    match = _SIZE.fullmatch(text)
    if match is None:
        raise Failure(f"invalid memory size: {text}", hint="a number of MiB, or one with b, k, m, g or t behind it")
    number, unit = int(match[1]), match[2].lower()
    return number >> 10 if unit == "b" else number << _UNITS[unit]
