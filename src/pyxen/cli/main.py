# SPDX-License-Identifier: GPL-2.0-only
"""The ``pyxen`` command: groups of sub-commands, each in a module that is imported when it is asked for.

A group's module has ``main(argv: list[str]) -> int``; ``argv`` is what follows the group's name.
"""

from __future__ import annotations

import sys

from pyxen.cli.report import guarded

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

_GROUPS = {
    "host": ("pyxen.cli.host", "start, stop and look at this user's host"),
    "guest": ("pyxen.cli.guest", "fetch guests to try things with"),
}
_LATER = ("image",)


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``pyxen`` with ``argv`` (without the program's name); the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    return guarded("pyxen", lambda: _run(args))


def _run(args: list[str]) -> int:
    if not args:
        print(_usage(), end="", file=sys.stderr)
        return 2
    group = args.pop(0)
    if group in ("-h", "--help", "help"):
        print(_usage(), end="")
        return 0
    if group in ("-V", "--version"):
        from pyxen import __version__

        print(f"pyxen {__version__}")
        return 0
    if group in _LATER:
        print(f"pyxen: '{group}' is not supported by this version of pyxen", file=sys.stderr)
        return 1
    if group not in _GROUPS:
        print(f"pyxen: there is no command '{group}'", file=sys.stderr)
        print("hint: run: pyxen help", file=sys.stderr)
        return 2
    from importlib import import_module

    code = import_module(_GROUPS[group][0]).main(args)
    return int(code)


def _usage() -> str:
    lines = [
        "Usage: pyxen <group> <command> [options]",
        "",
        *(f" {name:10} {text}" for name, (_, text) in _GROUPS.items()),
    ]
    return "\n".join([*lines, "", "Domains are managed with xl: see `xl help`.", ""])
