# SPDX-License-Identifier: GPL-2.0-only
"""What ``xl info``, ``xl list``, ``xl vcpu-list`` and ``xl uptime`` show, as data (libxl: ``libxl_get_physinfo``,
``libxl_get_version_info``, ``libxl_list_domain``; keys and order of ``xl info`` are xl's).
"""

from __future__ import annotations

import os
import platform
import resource
import uuid as _uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from pyxen.abi.xen import xen_capabilities
from pyxen.toolstack.config import Running, domain_0_json, to_json
from pyxen.toolstack.domains import DOM0_NAME, DomainRecord, DomainTable
from pyxen.toolstack.runtime import MAXMEM_SLACK_KB, host_cpus, target_kb

if TYPE_CHECKING:
    from pyxen.hypervisor.privcmd import DomainInfo, PhysInfo, PrivCmd

XEN_MAJOR: Final = 4
XEN_MINOR: Final = 6
XEN_EXTRA: Final = ".0-pyxen"


@dataclass(frozen=True, slots=True)
class Machine:
    """What the composition root knows of the machine and privcmd does not tell."""

    version: str
    """pyxen's own version."""
    engine: str
    """Name and version of what executes guests (``Unicorn 2.1.4``)."""
    command_line: str
    """The host's options, as a hypervisor would have them on its command line."""


def host_info(privcmd: PrivCmd, machine: Machine, *, numa: bool = False) -> dict[str, object]:
    """``xl info``'s lines in its order; with ``numa`` also ``cpu_topology`` and ``numa_info`` (``xl info -n``)."""
    physical = privcmd.physinfo()
    names = os.uname()
    info: dict[str, object] = {
        "host": names.nodename,
        "release": f"{machine.version}-pyxen",
        "version": f"#1 SMP pyxen {machine.version} ({_python()}, {machine.engine})",
        "machine": "x86_64",
        **_physical_info(physical, len(privcmd.cpupool_free_cpus())),
    }
    if numa:
        info["cpu_topology"] = [
            {"cpu": place.cpu, "core": place.core, "socket": place.socket, "node": place.node}
            for place in privcmd.cpu_topology()
        ]
        info["numa_info"] = [
            {
                "node": node.node,
                "memsize_mb": node.total_kb // 1024,
                "memfree_mb": node.free_kb // 1024,
                "distances": list(node.distances),
            }
            for node in privcmd.numa_info()
        ]
    info.update(
        {
            "xen_major": str(XEN_MAJOR),
            "xen_minor": str(XEN_MINOR),
            "xen_extra": XEN_EXTRA,
            "xen_version": f"{XEN_MAJOR}.{XEN_MINOR}{XEN_EXTRA}",
            "xen_caps": xen_capabilities(),
            "xen_scheduler": "credit",
            "xen_pagesize": "4096",
            "platform_params": "virt_start=0xffff800000000000",
            "xen_changeset": "",
            "xen_commandline": machine.command_line,
            "cc_compiler": _python(),
            "cc_compile_by": "pyxen",
            "cc_compile_domain": "localdomain",
            "cc_compile_date": "",
            "xend_config_format": "4",
        }
    )
    return info


def _python() -> str:
    return f"{platform.python_implementation()} {platform.python_version()}"


def _physical_info(physical: PhysInfo, free_cpus: int) -> dict[str, str]:
    return {
        "nr_cpus": str(physical.nr_cpus),
        "max_cpu_id": str(physical.nr_cpus - 1),
        "nr_nodes": str(physical.nr_nodes),
        "cores_per_socket": str(physical.cores_per_socket),
        "threads_per_core": str(physical.threads_per_core),
        "cpu_mhz": f"{physical.cpu_khz // 1000}.{physical.cpu_khz % 1000:03d}",
        "hw_caps": ":".join(f"{word:08x}" for word in physical.hw_caps),
        "virt_caps": "pv",
        "total_memory": str(physical.total_kb // 1024),
        "free_memory": str(physical.free_kb // 1024),
        "sharing_freed_memory": "0",
        "sharing_used_memory": "0",
        "outstanding_claims": "0",
        "free_cpus": str(free_cpus),
    }


# --- domains ---------------------------------------------------------------------------------------


def domain_rows(
    privcmd: PrivCmd, table: DomainTable, started_unix: float, pools: Mapping[int, str]
) -> list[dict[str, object]]:
    """A row per domain, domain 0 first; ``pools`` are the cpupools' names."""
    return [domain_row(info, table.get(info.domid), started_unix, pools) for info in privcmd.domain_list()]


def domain_row(
    info: DomainInfo, record: DomainRecord | None, started_unix: float, pools: Mapping[int, str]
) -> dict[str, object]:
    """One domain as the API shows it. Memory in KiB, times in ns, ``created`` in Unix seconds."""
    is_dom0 = info.domid == 0
    return {
        "domid": info.domid,
        "name": DOM0_NAME if is_dom0 else "" if record is None else record.name,
        "uuid": str(_uuid.UUID(bytes=info.handle)),
        "memory_kb": info.tot_pages * 4,
        "max_memory_kb": info.tot_pages * 4 if is_dom0 else info.max_pages * 4,
        "vcpus": 1 if is_dom0 else info.online_vcpus,
        "max_vcpus": info.max_vcpus,
        "online_vcpus": 1 if is_dom0 else info.online_vcpus,
        "cpu_time_ns": dom0_cpu_time_ns() if is_dom0 else info.cpu_time_ns,
        "state": "r-----" if is_dom0 else state_letters(info),
        "paused": info.paused,
        "shutdown_reason": None if not info.shutdown else shutdown_reason(info.shutdown_code),
        "crash_reason": info.crash_reason or None,
        "ssid": None,
        "cpupool": pools.get(info.cpupool, f"(cpupool {info.cpupool})"),
        "cpupool_id": info.cpupool,
        "type": "pv" if record is None else record.config.type,
        "pv_mode": info.pv_mode or None,
        "created": started_unix if record is None else record.created_unix,
        "counters": {} if is_dom0 else info.counters,
    }


def dom0_cpu_time_ns() -> int:
    """CPU time of domain 0: its software is the thread that runs the event loop, which must be the caller's."""
    used = resource.getrusage(resource.RUSAGE_THREAD)
    return int((used.ru_utime + used.ru_stime) * 1_000_000_000)


def state_letters(info: DomainInfo) -> str:
    """``xl list``'s six letters: running, blocked, paused, shut down, crashed, dying."""
    crashed = info.shutdown and info.shutdown_code == 3
    flags = (info.running, info.blocked, info.paused, info.shutdown, crashed, info.dying)
    return "".join(letter if on else "-" for letter, on in zip("rbpscd", flags, strict=True))


def shutdown_reason(code: int) -> str:
    """The name of a ``SHUTDOWN_*`` code (xen/include/public/sched.h)."""
    return SHUTDOWN_REASONS.get(code, f"unknown-{code}")


SHUTDOWN_REASONS: Final = {0: "poweroff", 1: "reboot", 2: "suspend", 3: "crash", 4: "watchdog", 5: "soft-reset"}


def domain_config(privcmd: PrivCmd, info: DomainInfo, record: DomainRecord | None) -> dict[str, object]:
    """The domain's configuration as ``xl list -l`` shows it (the value of its ``config`` key)."""
    if record is None:
        return dict(domain_0_json(info.tot_pages * 4, info.tot_pages * 4))
    weight, cap = privcmd.sched_credit_get(info.domid)
    running = Running(target_kb(record), info.max_pages * 4 - MAXMEM_SLACK_KB, weight, cap)
    document = dict(to_json(record.config, running=running, host=host_cpus(privcmd)))
    c_info = document["c_info"]
    assert isinstance(c_info, dict)
    c_info["name"], c_info["uuid"] = record.name, str(record.uuid)  # renamed or preserved since
    return {**document}


def vcpu_rows(privcmd: PrivCmd, domid: int) -> list[dict[str, object]]:
    """``xl vcpu-list``'s rows of one domain. ``cpu`` is None for a vCPU that is offline."""
    if domid == 0:
        return [{"vcpu": 0, "cpu": 0, "state": "r--", "time_ns": dom0_cpu_time_ns(), "hard_affinity": None,
                 "soft_affinity": None}]  # fmt: skip
    return [
        {
            "vcpu": vcpu.vcpu,
            "cpu": vcpu.cpu if vcpu.online else None,
            "state": f"{'r' if vcpu.running else '-'}{'b' if vcpu.blocked else '-'}-" if vcpu.online else "--p",
            "time_ns": vcpu.cpu_time_ns,
            "hard_affinity": None if vcpu.hard_affinity is None else sorted(vcpu.hard_affinity),
            "soft_affinity": None if vcpu.soft_affinity is None else sorted(vcpu.soft_affinity),
        }
        for vcpu in privcmd.vcpu_info(domid)
    ]


def uptime_rows(table: DomainTable, now_unix: float, started_unix: float) -> list[dict[str, object]]:
    """``xl uptime``'s rows: seconds since the host and each domain started."""
    rows: list[dict[str, object]] = [{"domid": 0, "name": DOM0_NAME, "seconds": max(0, int(now_unix - started_unix))}]
    rows += [
        {"domid": record.domid, "name": record.name, "seconds": max(0, int(now_unix - record.created_unix))}
        for record in table
    ]
    return rows
