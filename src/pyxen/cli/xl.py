# SPDX-License-Identifier: GPL-2.0-only
"""The ``xl`` command: Xen's, as far as this version goes (``xl help`` lists what there is).

A command is a function ``(args, context) -> exit code`` in the module of its group, imported when it is asked for.
"""

from __future__ import annotations

import sys

from pyxen.cli.getopt import HelpRequested, UsageError
from pyxen.cli.report import guarded

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Command = Callable[[list[str], "Context"], int]

COMMANDS = {
    "create": ("create", "create"),
    "list": ("domains", "list_domains"),
    "destroy": ("lifecycle", "destroy"),
    "shutdown": ("lifecycle", "shutdown"),
    "reboot": ("lifecycle", "reboot"),
    "pause": ("lifecycle", "pause"),
    "unpause": ("lifecycle", "unpause"),
    "console": ("console", "console"),
    "mem-max": ("memory", "mem_max"),
    "mem-set": ("memory", "mem_set"),
    "vcpu-list": ("domains", "vcpu_list"),
    "vcpu-pin": ("vcpus", "vcpu_pin"),
    "vcpu-set": ("vcpus", "vcpu_set"),
    "vm-list": ("domains", "vm_list"),
    "info": ("hostinfo", "info"),
    "sched-credit": ("sched", "sched_credit"),
    "sched-credit2": ("sched", "sched_credit2"),
    "sched-rtds": ("sched", "sched_rtds"),
    "domid": ("domains", "domid"),
    "domname": ("domains", "domname"),
    "rename": ("lifecycle", "rename"),
    "trigger": ("signals", "trigger"),
    "sysrq": ("signals", "sysrq"),
    "debug-keys": ("hostinfo", "debug_keys"),
    "dmesg": ("hostinfo", "dmesg"),
    "top": ("top", "top"),
    "uptime": ("domains", "uptime"),
    "cpupool-create": ("cpupool", "cpupool_create"),
    "cpupool-list": ("cpupool", "cpupool_list"),
    "cpupool-destroy": ("cpupool", "cpupool_destroy"),
    "cpupool-rename": ("cpupool", "cpupool_rename"),
    "cpupool-cpu-add": ("cpupool", "cpupool_cpu_add"),
    "cpupool-cpu-remove": ("cpupool", "cpupool_cpu_remove"),
    "cpupool-migrate": ("cpupool", "cpupool_migrate"),
    "cpupool-numa-split": ("cpupool", "cpupool_numa_split"),
}
"""Command to the module below ``pyxen.cli`` and the function that do it, in the order of ``xl help``."""


DRY_RUN = frozenset(["create", "vcpu-pin", "cpupool-create"])
"""Commands that know the global option -N."""


class Context:
    """The global options."""

    def __init__(self, *, verbose: int = 0, dry_run: bool = False) -> None:
        self.verbose = verbose
        self.dry_run = dry_run


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``xl`` with ``argv`` (without the program's name); the exit code."""
    args = list(sys.argv[1:] if argv is None else argv)
    return guarded("xl", lambda: _run(args))


def _run(args: list[str]) -> int:
    context = Context()
    while args and args[0].startswith("-") and args[0] != "--":
        letters = args.pop(0)
        if letters in ("--help", "-h"):
            return _help([])
        for letter in letters[1:]:
            # -f, -t and -T (force past a lock, progress with carriage returns or time stamps) mean nothing here.
            if letter not in "vfNtT":
                print(f"xl: invalid option -- '{letter}'\nunknown global option", file=sys.stderr)
                return 1
            context.verbose += letter == "v"
            context.dry_run |= letter == "N"
    if args[:1] == ["--"]:
        args.pop(0)
    if not args:
        _help([])
        return 1
    name = args.pop(0)
    if name == "help":
        return _help(args)
    if name not in COMMANDS:
        from pyxen.cli.usage import full_name

        found = full_name(name)
        if found is None:
            print("command not implemented", file=sys.stderr)
            return 1
        if found not in COMMANDS:
            print(f"xl: '{found}' is not supported by this version of pyxen", file=sys.stderr)
            return 1
        name = found
    if context.dry_run and name not in DRY_RUN:
        print("command does not implement -N (dryrun) option", file=sys.stderr)
        return 1
    try:
        return _load(name)(args, context)
    except HelpRequested:
        return _help([name])
    except UsageError as error:
        print(error, file=sys.stderr)
        if str(error).startswith("'xl "):
            from pyxen.cli.usage import command_help

            print("\n" + command_help(name), end="", file=sys.stderr)
        return 2


def _load(name: str) -> Command:
    from importlib import import_module

    module, function = COMMANDS[name]
    command: Command = getattr(import_module(f"pyxen.cli.{module}"), function)
    return command


def _help(args: list[str]) -> int:
    from pyxen.cli import usage

    return usage.help_command(args)


def need(operands: list[str], count: int, name: str) -> None:
    """Refuse fewer than ``count`` operands of command ``name``, with xl's words."""
    if len(operands) < count:
        raise UsageError(f"'xl {name}' requires at least {count} argument{'' if count == 1 else 's'}.")
