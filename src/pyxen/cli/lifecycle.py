# SPDX-License-Identifier: GPL-2.0-only
"""Commands that change a domain's life: pause, unpause, shutdown, reboot, destroy, rename."""

from __future__ import annotations

import sys

from pyxen.cli.client import ApiError, Client
from pyxen.cli.getopt import getopt
from pyxen.cli.report import Failure, complain
from pyxen.cli.xl import Context, need

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any


def pause(args: list[str], context: Context) -> int:
    """``xl pause``."""
    return _simple("pause", args)


def unpause(args: list[str], context: Context) -> int:
    """``xl unpause``."""
    return _simple("unpause", args)


def _simple(command: str, args: list[str]) -> int:
    _, operands = getopt(args, "")
    need(operands, 1, command)
    client = Client()
    client.post(f"/domains/{client.domain(operands[0])['domid']}/{command}")
    return 0


def destroy(args: list[str], context: Context) -> int:
    """``xl destroy``."""
    options, operands = getopt(args, "f")
    need(operands, 1, "destroy")
    client = Client()
    domid = client.domain(operands[0])["domid"]
    if domid == 0 and not options:
        raise Failure(
            "Not destroying domain 0; use -f to force.\n"
            "This can only be done when using a disaggregated hardware domain and toolstack.\n"
        )
    client.delete(f"/domains/{domid}")
    return 0


def rename(args: list[str], context: Context) -> int:
    """``xl rename``."""
    _, operands = getopt(args, "")
    need(operands, 2, "rename")
    client = Client()
    client.post(f"/domains/{client.domain(operands[0])['domid']}/rename", {"name": operands[1]})
    return 0


def shutdown(args: list[str], context: Context) -> int:
    """``xl shutdown``."""
    return _ask_guests("shutdown", "Shutting down", args)


def reboot(args: list[str], context: Context) -> int:
    """``xl reboot``."""
    return _ask_guests("reboot", "Rebooting", args)


def _ask_guests(command: str, doing: str, args: list[str]) -> int:
    options, operands = getopt(args, "awF", {"all": "a", "wait": "w"})
    letters = {letter for letter, _ in options}
    everyone = "a" in letters
    if not everyone and not operands:
        raise Failure("You must specify -a or a domain id.\n")
    client = Client()
    if everyone:
        domids = [row["domid"] for row in client.get("/domains") if row["domid"] != 0]
    else:
        domids = [client.domain(operands[0])["domid"]]
    asked, code = [], 0
    for domid in domids:
        print(f"{doing} domain {domid}", file=sys.stderr)
        try:
            client.post(f"/domains/{domid}/{command}", {"force": "F" in letters})
        except ApiError as error:
            if not everyone:
                raise
            code = complain(error)
            continue
        asked.append(domid)
    if "w" in letters:
        print(f"Waiting for {len(asked)} domains", file=sys.stderr)
        for domid in asked:
            _wait_for_end(client, domid)
    return code


def _wait_for_end(client: Client, domid: int) -> None:
    from pyxen.cli.domains import SHUTDOWN_CODES

    for event in events(client, domid):
        if event["event"] == "shutdown":
            reason = event.get("reason")
            code = SHUTDOWN_CODES.get(str(reason), reason)
            print(f"Domain {domid} has been shut down, reason code {code}", file=sys.stderr)
            return
        if event["event"] == "destroyed":
            print(f"Domain {domid} has been destroyed", file=sys.stderr)
            return


def events(client: Client, domid: int) -> Iterator[dict[str, Any]]:
    """What happened to a domain so far and happens from now on; ends when the host no longer knows the domain."""
    since = 0
    while True:
        try:
            found = client.get(f"/domains/{domid}/events?since={since}")
        except ApiError as error:
            if error.status == 404:
                return
            raise
        for event in found:
            since = max(since, event["seq"])
            yield event
