# SPDX-License-Identifier: GPL-2.0-only
"""Commands that poke a guest: trigger, sysrq."""

from __future__ import annotations

import sys

from pyxen.cli.client import Client
from pyxen.cli.getopt import getopt
from pyxen.cli.report import Failure
from pyxen.cli.xl import Context, need

TRIGGERS = ("nmi", "reset", "init", "power", "sleep", "s3resume")


def trigger(args: list[str], context: Context) -> int:
    """``xl trigger``. (xl itself ends with 0 whatever becomes of it; here a refusal is one.)"""
    _, operands = getopt(args, "")
    need(operands, 2, "trigger")
    client = Client()
    domid = client.domain(operands[0])["domid"]
    name = operands[1]
    if name not in TRIGGERS:
        raise Failure(f'Invalid trigger "{name}"', hint=f"it is one of {', '.join(TRIGGERS)}")
    vcpu = 0
    if len(operands) > 2:
        text = operands[2]
        if text.isascii() and text.isdigit() and len(text) < 10:
            vcpu = int(text)
        else:
            print("Invalid vcpuid, using default vcpuid=0.\n", file=sys.stderr)
    client.post(f"/domains/{domid}/trigger", {"trigger": name, "vcpu": vcpu})
    return 0


def sysrq(args: list[str], context: Context) -> int:
    """``xl sysrq``."""
    _, operands = getopt(args, "")
    need(operands, 2, "sysrq")
    client = Client()
    domid = client.domain(operands[0])["domid"]
    letter = operands[1]
    if len(letter) != 1 or not "!" <= letter <= "~":
        from pyxen.cli.usage import command_help

        print("Invalid sysrq.\n", file=sys.stderr)
        print(command_help("sysrq"), end="")
        return 1
    client.post(f"/domains/{domid}/sysrq", {"letter": letter})
    return 0
