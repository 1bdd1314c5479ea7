# SPDX-License-Identifier: GPL-2.0-only
"""``xl help``: the commands of this version, and the names of real xl's others."""

from __future__ import annotations

import sys

from pyxen.cli.xl import COMMANDS, DRY_RUN

_MEMORY = "<Domain> <MemMB['b'[bytes]|'k'[KB]|'m'[MB]|'g'[GB]|'t'[TB]]>"
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
    "mem-max": (_MEMORY, "Set the maximum amount reservation for a domain", ()),
    "mem-set": (_MEMORY, "Set the current memory usage for a domain", ()),
    "vcpu-pin": (
        "[option] <Domain> <VCPU|all> <Hard affinity|-|all> <Soft affinity|-|all>",
        "Set which CPUs a VCPU can use",
        (
            "-f, --force        undo an override pinning done by the kernel",
            "--ignore-global-affinity-masks Ignore global masks in xl.conf",
        ),
    ),
    "vcpu-set": (
        "[option] <Domain> <vCPUs>",
        "Set the number of active VCPUs allowed for the domain",
        ("-i, --ignore-host  Don't limit the vCPU based on the host CPU count",),
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
    "sched-credit2": (
        "[-d <Domain> [-w[=WEIGHT]]] [-p CPUPOOL]",
        "Get/set credit2 scheduler parameters",
        (
            "-d DOMAIN, --domain=DOMAIN     Domain to modify",
            "-w WEIGHT, --weight=WEIGHT     Weight (int)",
            "-c CAP,    --cap=CAP           Cap (int)",
            "-s         --schedparam        Query / modify scheduler parameters",
            "-r RLIMIT, --ratelimit_us=RLIMIT Set the scheduling rate limit, in microseconds",
            "-p CPUPOOL, --cpupool=CPUPOOL  Restrict output to CPUPOOL",
        ),
    ),
    "sched-rtds": (
        "[-d <Domain> [-v[=VCPUID/all]] [-p[=PERIOD]] [-b[=BUDGET]] [-e[=Extratime]]]",
        "Get/set rtds scheduler parameters",
        (
            "-d DOMAIN, --domain=DOMAIN     Domain to modify",
            "-v VCPUID/all, --vcpuid=VCPUID/all    VCPU to modify or output;",
            "               Using '-v all' to modify/output all vcpus",
            "-p PERIOD, --period=PERIOD     Period (us)",
            "-b BUDGET, --budget=BUDGET     Budget (us)",
            "-e Extratime, --extratime=Extratime Extratime (1=yes, 0=no)",
            "",
        ),
    ),
    "trigger": ("<Domain> <nmi|reset|init|power|sleep|s3resume> [<VCPU>]", "Send a trigger to a domain", ()),
    "sysrq": ("<Domain> <letter>", "Send a sysrq to a domain", ()),
    "top": (
        "[options]",
        "Monitor a host and the domains in real time",
        (
            "-d, --delay=SECONDS     Seconds between updates (default 3)",
            "-n, --networks          Output vif network data",
            "-x, --vbds              Output vbd block device data",
            "-r, --repeat-header     Repeat table header before each domain",
            "-v, --vcpus             Output vcpu data",
            "-f, --full-name         Output the full domain name (not truncated)",
            "-b, --batch             Output in batch mode, no user input accepted",
            "-i, --iterations=COUNT  Number of iterations before exiting",
        ),
    ),
    "cpupool-create": (
        "[options] [<ConfigFile>] [Variable=value ...]",
        "Create a new CPU pool",
        (
            "-h, --help                   Print this help.",
            "-f FILE, --defconfig=FILE    Use the given configuration file.",
            "-n, --dryrun                 Dry run - prints the resulting configuration.",
            "                              (deprecated in favour of global -N option).",
            "",
            "See the xlcpupool.cfg(5) manpage for more information.",
        ),
    ),
    "cpupool-list": (
        "[-c|--cpus] [<CPU Pool>]",
        "List CPU pools on host",
        ("-c, --cpus                     Output list of CPUs used by a pool",),
    ),
    "cpupool-destroy": ("<CPU Pool>", "Deactivates a CPU pool", ()),
    "cpupool-rename": ("<CPU Pool> <new name>", "Renames a CPU pool", ()),
    "cpupool-cpu-add": ("<CPU Pool> <CPU nr>|node:<node nr>", "Adds a CPU to a CPU pool", ()),
    "cpupool-cpu-remove": ("<CPU Pool> <CPU nr>|node:<node nr>", "Removes a CPU from a CPU pool", ()),
    "cpupool-migrate": ("<Domain> <CPU Pool>", "Moves a domain into a CPU pool", ()),
    "cpupool-numa-split": ("", "Splits up the machine into one CPU pool per NUMA node", ()),
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
_READ_ONLY = frozenset(
    ["list", "console", "vcpu-list", "vm-list", "info", "domid", "domname", "dmesg", "top", "uptime", "cpupool-list"]
)

_OTHERS = """
    config-update pci-attach pci-detach pci-list pci-assignable-add pci-assignable-remove pci-assignable-list
    vncviewer save migrate restore migrate-receive dump-core cd-insert cd-eject button-press sharing set-parameters
    network-attach network-list network-detach channel-list block-attach block-list block-detach vtpm-attach
    vtpm-list vtpm-detach vkb-attach vkb-list vkb-detach vdispl-attach vdispl-list vdispl-detach vsnd-attach
    vsnd-list vsnd-detach claims getenforce setenforce loadpolicy remus devd psr-hwinfo psr-cmt-attach
    psr-cmt-detach psr-cmt-show psr-cat-set psr-cat-show psr-mba-set psr-mba-show usbctrl-attach usbctrl-detach
    usbdev-attach usbdev-detach usb-list qemu-monitor-command
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
    flags = "vtT" + ("" if name in _READ_ONLY else "f") + ("N" if name in DRY_RUN else "")
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
