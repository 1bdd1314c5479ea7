# SPDX-License-Identifier: GPL-2.0-only
"""``xl create``: read a configuration, have the host make the domain, and follow it if asked to."""

from __future__ import annotations

import os
import sys

from pyxen.cli.client import Client
from pyxen.cli.getopt import getopt
from pyxen.cli.report import Failure
from pyxen.cli.xl import Context
from pyxen.toolstack.config import FEATURES, ConfigSyntaxError, DomainConfig, dumps, parse, to_json, unsupported
from pyxen.toolstack.config.syntax import MAX_TEXT_CHARS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_LONG = {
    "dryrun": "n",
    "quiet": "q",
    "defconfig": "f",
    "vncviewer": "V",
    "vncviewer-autopass": "A",
    "ignore-global-affinity-masks": "i",
    "pv-mode": "M",
}
# libxl's ERROR_FAIL and ERROR_INVAL, as exit codes of xl.
_EXIT_UNREADABLE, _EXIT_INVALID = 3, 6


def create(args: list[str], context: Context) -> int:
    """``xl create``."""
    # i and M have no short form: their letters cannot be typed as one (see _no_short_form).
    options, operands = getopt(_no_short_form(args), "Fnqf:pcdeVAiM:", _LONG)
    given = dict(options)
    if not _supported(given):
        return 1
    file = given.get("f")
    extra = []
    for operand in operands:
        if "=" in operand:
            extra.append(operand)
        elif file is None:
            file = operand
        else:
            from pyxen.cli.usage import command_help

            print(command_help("create"), end="", file=sys.stderr)
            return 2
    if file is None:
        raise Failure("Config file not specified and none in save file", exit_code=_EXIT_INVALID)
    text = read_config(file)
    if "q" not in given:
        print(f"Parsing config from {file}", file=sys.stderr)
    config = _parse(text, file, extra)
    if config is None:
        return 1
    dry_run = context.dry_run or "n" in given
    if dry_run or "d" in given:
        print(dumps(to_json(config)))
        sys.stdout.flush()
    if dry_run:
        for name in unsupported(config, FEATURES):
            print(f"warning: option `{name}' is not supported by this version of pyxen", file=sys.stderr)
        return 0
    client = Client()
    answer = client.post(
        "/domains",
        {
            "config_text": text,
            "config_path": file,
            "extra": extra,
            # As xl does: a guest may have ended before anybody could attach, so it starts when its console is open.
            "paused": "p" in given or "c" in given,
            "pv_mode": given.get("M"),
            "cwd": os.getcwd(),
        },
    )
    for warning in answer.get("warnings", ()):
        if warning not in config.warnings:
            print(warning, file=sys.stderr)
    start = "c" in given and "p" not in given
    return _follow(client, answer, console="c" in given, foreground="F" in given, start=start)


def _no_short_form(args: list[str]) -> list[str]:
    for arg in args:
        if arg == "--":
            break
        if len(arg) > 1 and arg[0] == "-" and arg[1] in "iM":
            from pyxen.cli.getopt import UsageError

            raise UsageError(f"option `{arg[1]}' not supported.")
    return args


def _supported(given: dict[str, str]) -> bool:
    for letter, name in (("e", "-e"), ("V", "--vncviewer"), ("A", "--vncviewer-autopass")):
        if letter in given:
            print(f"xl: 'create {name}' is not supported by this version of pyxen", file=sys.stderr)
            return False
    if given.get("M", "exact") not in ("exact", "fast"):
        raise Failure(f'Unknown pv_mode "{given["M"]}" specified', hint='it is "exact" or "fast"', exit_code=2)
    return True


def read_config(file: str, exit_code: int = _EXIT_UNREADABLE) -> str:
    """The text of ``file``; what is not UTF-8 survives as it is. Raises Failure with that exit code."""
    limit = MAX_TEXT_CHARS * 4  # of UTF-8
    try:
        with open(file, "rb") as stream:
            data = stream.read(limit + 1)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise Failure(f"Failed to read config file: {file}: {reason}", exit_code=exit_code) from None
    text = data.decode(errors="surrogateescape")
    if len(data) > limit or len(text) > MAX_TEXT_CHARS:
        raise Failure(f"Failed to read config file: {file}: File too large", exit_code=exit_code)
    return text


def _parse(text: str, file: str, extra: list[str]) -> DomainConfig | None:
    """The configuration, with its warnings told; None (and why) when it is none."""
    try:
        config = parse(text, file, extra)
    except ConfigSyntaxError as error:
        for report in error.reports:
            print(report, file=sys.stderr)
        print("Failed to parse config: Invalid argument", file=sys.stderr)
        return None
    for warning in config.warnings:
        print(warning, file=sys.stderr)
    return config


def _follow(client: Client, created: dict[str, Any], *, console: bool, foreground: bool, start: bool) -> int:
    """Stay with the domain, over reboots, as long as the console or -F asks for it; ``start`` it when its console is
    open."""
    from pyxen.cli.console import LEFT, NoConsole, attach

    first: int = created["domid"]
    domid: int | None = first

    def unpause() -> None:
        if start and domid == first:
            client.post(f"/domains/{domid}/unpause")

    while domid is not None:
        if console:
            try:
                if attach(client.run_dir, domid, unpause) == LEFT:
                    console = False
            except NoConsole:
                if domid == first:
                    unpause()
                    raise
                # A restarted guest was not paused for us: it may have had a very short life.
        if not (console or foreground):
            break
        domid = _successor(client, domid, tell=foreground)
    return 0


def _successor(client: Client, domid: int, *, tell: bool) -> int | None:
    """Wait for the end of a domain; the id of the one that took its place, or None when none will."""
    from pyxen.cli.domains import SHUTDOWN_CODES
    from pyxen.cli.lifecycle import events

    restarts = False
    for event in events(client, domid):
        kind = event["event"]
        if kind == "shutdown":
            restarts = "restart" in str(event.get("action"))
            if tell:
                code = SHUTDOWN_CODES.get(str(event.get("reason")), -1)
                print(f"Domain {domid} has shut down, reason code {code} 0x{code & 0xFFFFFFFF:x}", file=sys.stderr)
                print(f"Action for shutdown reason code {code} is {event.get('action')}", file=sys.stderr)
        elif kind == "restarted":
            new: int = event["new_domid"]
            return new
        elif kind == "action-failed":
            raise Failure(f"domain {domid}: {event.get('action')} failed: {event.get('error')}")
        elif kind == "destroyed" and not restarts:
            if tell:
                print(f"Domain {domid} has been destroyed.", file=sys.stderr)
            return None
        elif kind == "preserved" and not restarts:
            return None
    return None
