# SPDX-License-Identifier: GPL-2.0-only
"""``pyxen guest fetch|list``: guest images in the user's cache. Needs no host."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from pyxen.cli.report import Failure


def main(argv: Sequence[str]) -> int:
    """Run ``pyxen guest ARGV…``; the exit status (2 for wrong usage). Raises PyxenError for what goes wrong."""
    parser = argparse.ArgumentParser(prog="pyxen guest", description="Guest images in the cache.")
    commands = parser.add_subparsers(dest="command", required=True)
    fetch = commands.add_parser("fetch", help="bring a guest into the cache, or bring it up to date")
    fetch.add_argument("name", help="debian")
    fetch.add_argument("--release", help="one of the releases that apt's sources name")
    fetch.add_argument("--force", action="store_true", help="fetch it even when it is up to date")
    commands.add_parser("list", help="what is in the cache, and what can be fetched")
    try:
        arguments = parser.parse_args(argv)
    except SystemExit as leave:  # argparse has printed its usage
        return int(leave.code or 0)
    return _fetch(arguments) if arguments.command == "fetch" else _list()


def _fetch(arguments: argparse.Namespace) -> int:
    from pyxen.toolstack.guests import debian

    if arguments.name != debian.NAME:
        raise Failure(f"there is no guest called {arguments.name}", hint="run: pyxen guest list")
    debian.fetch(arguments.release, force=arguments.force, progress=lambda line: print(f"==> {line}", flush=True))
    return 0


def _list() -> int:
    from pyxen.toolstack.guests.catalogue import AVAILABLE, fetched

    here = {guest.name: guest for guest in fetched()}
    print(f"{'Name':<12} {'Size':>8}  Version")
    for name, what in sorted(AVAILABLE.items()):
        guest = here.get(name)
        if guest is None:
            print(f"{name:<12} {'-':>8}  not fetched: {what}")
        else:
            print(f"{name:<12} {guest.size_bytes / 1e6:>5.1f} MB  {guest.version}")
    return 0
