# SPDX-License-Identifier: GPL-2.0-only
"""``xl help``: the commands of this version, and the names of real xl's others."""

from __future__ import annotations

import sys

from pyxen.cli.xl import COMMANDS

# Name: (arguments, what it does, options).
_HELP: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "create": (
        "<ConfigFile> [options] [vars]",
        "Create a domain from config file <filename>",
        (
            "-c                      Connect to the console after the domain is created.",
            "-d                      Print the resulting configuration before creating.",
            "-F                      Run in foreground until death of the domain.",
            "-f FILE, --defconfig=FILE",
            "                     Use the given configuration file.",
            "-h                      Print this help.",
            "-n, --dryrun            Dry run - prints the resulting configuration",
            "                         (deprecated in favour of global -N option).",
            "-p                      Leave the domain paused after it is created.",
            "-q, --quiet             Quiet.",
            "--pv-mode=MODE          How a PV guest's kernel is run: exact or fast (pyxen only).",
        ),
    ),
    "list": (
        "[options] [Domain]\n",
        "List information about all/some domains",
        (
            "-l, --long              Output all VM details",
            "-v, --verbose           Prints out UUIDs and security context",
            "-Z, --context           Prints out security context",
            "-c, --cpupool           Prints the cpupool the domain is in",
            "-n, --numa              Prints out NUMA node affinity",
        ),
    ),
    "destroy": (
        "[options] <Domain>\n",
        "Terminate a domain immediately",
        (
            "-f                      Permit destroying domain 0, which will only succeed",
            "                        when run from disaggregated toolstack domain with a",
            "                        hardware domain distinct from domain 0.",
        ),
    ),
    "shutdown": (
        "[options] <-a|Domain>",
        "Issue a shutdown signal to a domain",
        (
            "-a, --all               Shutdown all guest domains.",
            "-h                      Print this help.",
            "-F                      Fallback to ACPI power event for HVM guests with",
            "                        no PV drivers.",
            "-w, --wait              Wait for guest(s) to shutdown.",
            "",
        ),
    ),
    "reboot": (
        "[options] <-a|Domain>",
        "Issue a reboot signal to a domain",
        (
            "-a, --all               Reboot all guest domains.",
            "-h                      Print this help.",
            "-F                      Fallback to ACPI reset event for HVM guests with",
            "                        no PV drivers.",
            "-w, --wait              Wait for guest(s) to reboot.",
            "",
        ),
    ),
    "pause": ("<Domain>", "Pause execution of a domain", ()),
    "unpause": ("<Domain>", "Unpause a paused domain", ()),
    "console": (
        "[options] <Domain>\n-t <type>       console type, pv , serial or vuart\n-n <number>     console number",
        "Attach to domain's console",
        (),
    ),
    "vcpu-list": ("[Domain, ...]", "List the VCPUs for all/some domains", ()),
    "vm-list": ("", "List guest domains, excluding dom0, stubdoms, etc.", ()),
    "info": ("-n, --numa         List host NUMA topology information", "Get information about Xen host", ()),
    "sched-credit": (
        "[-d <Domain> [-w[=WEIGHT]|-c[=CAP]]] [-s [-t TSLICE] [-r RATELIMIT]] [-p CPUPOOL]",
        "Get/set credit scheduler parameters",
        (
            "-d DOMAIN, --domain=DOMAIN        Domain to modify",
            "-w WEIGHT, --weight=WEIGHT        Weight (int)",
            "-c CAP, --cap=CAP                 Cap (int)",
            "-s         --schedparam           Query / modify scheduler parameters",
            "-t TSLICE, --tslice_ms=TSLICE     Set the timeslice, in milliseconds",
            "-r RLIMIT, --ratelimit_us=RLIMIT  Set the scheduling rate limit, in microseconds",
            "-m DLY, --migration_delay_us=DLY  Set the migration delay, in microseconds",
            "-p CPUPOOL, --cpupool=CPUPOOL     Restrict output to CPUPOOL",
        ),
    ),
    "domid": ("<DomainName>", "Convert a domain name to domain id", ()),
    "domname": ("<DomainId>", "Convert a domain id to domain name", ()),
    "rename": ("<Domain> <NewDomainName>", "Rename a domain", ()),
    "debug-keys": ("<Keys>", "Send debug keys to Xen", ()),
    "dmesg": (
        "[-c]",
        "Read and/or clear dmesg buffer",
        ("  -c                        Clear dmesg buffer as well as printing it",),
    ),
    "uptime": ("[-s] [Domain]", "Print uptime for all/some domains", ()),
}

# Usage line of commands that change nothing has no -f.
_READ_ONLY = frozenset(["list", "console", "vcpu-list", "vm-list", "info", "domid", "domname", "dmesg", "uptime"])

_OTHERS = """
    config-update pci-attach pci-detach pci-list pci-assignable-add pci-assignable-remove pci-assignable-list vncviewer
    save migrate restore migrate-receive dump-core cd-insert cd-eject mem-max mem-set button-press vcpu-pin vcpu-set
    sharing sched-credit2 sched-rtds trigger sysrq set-parameters top network-attach network-list network-detach
    channel-list block-attach block-list block-detach vtpm-attach vtpm-list vtpm-detach vkb-attach vkb-list vkb-detach
    vdispl-attach vdispl-list vdispl-detach vsnd-attach vsnd-list vsnd-detach claims cpupool-create cpupool-list
    cpupool-destroy cpupool-rename cpupool-cpu-add cpupool-cpu-remove cpupool-migrate cpupool-numa-split getenforce
    setenforce loadpolicy remus devd psr-hwinfo psr-cmt-attach psr-cmt-detach psr-cmt-show psr-cat-set psr-cat-show
    psr-mba-set psr-mba-show usbctrl-attach usbctrl-detach usbdev-attach usbdev-detach usb-list qemu-monitor-command
"""
NOT_YET = frozenset(_OTHERS.split())
"""Commands of real xl that this version has not."""


def full_name(name: str) -> str | None:
    """The command that ``name`` is, or is the only beginning of (xl allows that)."""
    known = COMMANDS.keys() | NOT_YET | {"help"}
    if name in known:
        return name
    found = [command for command in known if command.startswith(name)]
    return found[0] if name and len(found) == 1 else None


def command_help(name: str) -> str:
    """What ``xl help NAME`` prints."""
    arguments, summary, options = _HELP[name]
    flags = "vtT" + ("" if name in _READ_ONLY else "f") + ("N" if name == "create" else "")
    text = f"Usage: xl [-{flags}] {name} {arguments}\n\n{summary}.\n\n"
    return text + "Options:\n\n" + "".join(f"{line}\n" for line in options) if options else text


def overview() -> str:
    """What ``xl help`` prints."""
    lines = ["Usage xl [-vfNtT] <subcommand> [args]", "", "xl full list of subcommands:", ""]
    lines += [f" {name:<19} {_HELP[name][1]}" for name in COMMANDS]
    return "\n".join(lines) + "\n"


def help_command(args: list[str]) -> int:
    """``xl help [command]``."""
    if not args:
        print(overview(), end="")
        return 0
    name = full_name(args[0])
    if name == "help":
        print(overview(), end="")
    elif name is None:
        print(f'command "{args[0]}" not implemented')
    elif name in COMMANDS:
        print(command_help(name), end="")
    else:
        print(f"xl: '{name}' is not supported by this version of pyxen", file=sys.stderr)
        return 1
    return 0
