# SPDX-License-Identifier: GPL-2.0-only
"""A domain's configuration as libxl's JSON: what ``xl create -n`` and ``xl list -l`` print and streams carry.

Order, defaults that are left out, booleans as strings and the blank line in an empty object are libxl's
(libxl_types.idl, yajl's generator): tools compare these texts.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from pyxen.toolstack.config.cpulist import Affinity, HostCpus
from pyxen.toolstack.config.domain import DomainConfig

Json = dict[str, "Json"] | list["Json"] | str | int | bool | None

_INVALID_DOMID = 0xFFFFFFFF
_ACTION_NAMES = {"rename-restart": "restart_rename"}
_U64 = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Running:
    """What a running domain adds to its configuration in ``xl list -l``."""

    target_memkb: int
    max_memkb: int
    weight: int
    cap: int
    scheduler: str = "credit"


def to_json(config: DomainConfig, *, running: Running | None = None, host: HostCpus | None = None) -> dict[str, Json]:
    """``libxl_domain_config``: with ``running`` as ``xl list -l`` has it, without as ``xl create -n``.

    ``host`` is needed to print affinities that say ``all`` or ``node:``; without it those are left out.
    """
    c_info: dict[str, Json] = {"type": config.type, "name": config.name}
    if running is not None:
        c_info["domid"] = _INVALID_DOMID
    c_info["uuid"] = config.uuid
    if config.pool is not None:
        c_info["pool_name"] = config.pool
    c_info["run_hotplug_scripts"] = "True"
    document: dict[str, Json] = {"c_info": c_info, "b_info": _build_info(config, running, host)}
    for name, value in (
        ("on_poweroff", config.on_poweroff),
        ("on_reboot", config.on_reboot),
        ("on_watchdog", config.on_watchdog),
        ("on_crash", config.on_crash),
        ("on_soft_reset", config.on_soft_reset),
    ):
        if value != "destroy":
            document[name] = _ACTION_NAMES.get(value, value.replace("-", "_"))
    return document


def _build_info(config: DomainConfig, running: Running | None, host: HostCpus | None) -> dict[str, Json]:
    info: dict[str, Json] = {}
    if running is not None or config.vcpus_set or config.maxvcpus_set:
        info["max_vcpus"] = config.max_vcpus
    if running is not None or config.vcpus_set:
        info["avail_vcpus"] = list(range(config.vcpus))
    for name, affinity in (("vcpu_hard_affinity", config.cpus), ("vcpu_soft_affinity", config.cpus_soft)):
        if affinity is not None and (masks := _masks(affinity, config.max_vcpus, host, name[5:9])):
            info[name] = masks
    if (config.cpus is not None and config.cpus.per_vcpu) or config.cpus_soft is not None:
        info["numa_placement"] = "False"
    if running is not None:
        if config.type == "pvh":
            info["tsc_mode"] = "native"  # libxl's choice for PVH; a PV domain keeps the default, which is not shown
        info["max_memkb"] = running.max_memkb
        info["target_memkb"] = running.target_memkb
        info["video_memkb"] = 0
    else:
        limit = config.memory_set if config.maxmem_set is None else config.maxmem_set
        # A negative size is as libxl has it: unsigned.  It is refused when the domain is created.
        if limit is not None:
            info["max_memkb"] = (limit << 10) & _U64
        if config.memory_set is not None:
            info["target_memkb"] = (config.memory_set << 10) & _U64
    info["sched_params"] = _sched_params(config, running)
    info["claim_mode"] = "True"
    for name, text in (("kernel", config.kernel), ("cmdline", config.cmdline), ("ramdisk", config.ramdisk)):
        if text is not None:
            info[name] = text
    parts = ("vga", "vnc", "sdl", "spice", "rdm") if config.type == "hvm" else ()
    info[f"type.{config.type}"] = {part: {} for part in parts}
    info["arch_arm"] = {}
    info["arch_x86"] = {} if running is None else {"msr_relaxed": "False"}
    return info


def _masks(affinity: Affinity, vcpus: int, host: HostCpus | None, kind: str) -> list[Json]:
    if host is None:
        if affinity.needs_host:
            return []
        last = max((r.last for cpus in affinity.lists for r in cpus.ranges if r is not None), default=0)
        # libxl's map has a whole number of bytes; without a host, as many as the list itself asks, within reason.
        host = HostCpus(min(last + 1, 4096))
    return [list(cpus) for cpus in affinity.resolve(vcpus, host, kind=kind)]


def _sched_params(config: DomainConfig, running: Running | None) -> dict[str, Json]:
    if running is not None:
        return {"sched": running.scheduler, "weight": running.weight, "cap": running.cap}
    params: dict[str, Json] = {}
    if config.weight_set is not None:
        params["weight"] = config.weight_set
    if config.cap_set is not None:
        params["cap"] = config.cap_set
    return params


def domain_0_json(target_memkb: int, max_memkb: int, *, weight: int = 256, cap: int = 0) -> dict[str, Json]:
    """Domain-0's entry in ``xl list -l``: it was never configured."""
    return {
        "c_info": {"type": "pv", "name": "Domain-0"},
        "b_info": {
            "max_memkb": max_memkb,
            "target_memkb": target_memkb,
            "sched_params": {"sched": "credit", "weight": weight, "cap": cap},
            "type.pv": {},
            "arch_arm": {},
            "arch_x86": {},
        },
    }


def dumps(value: Json) -> str:
    """``value`` in yajl's layout: four spaces, a blank line in what is empty, UTF-8 left as it is."""
    out: list[str] = []
    _dump(value, "", out)
    return "".join(out)


def _dump(value: Json, indent: str, out: list[str]) -> None:
    inner = indent + "    "
    if isinstance(value, dict):
        out.append("{\n")
        for number, (key, item) in enumerate(value.items()):
            out.append(f"{',' if number else ''}{chr(10) if number else ''}{inner}{_string(key)}: ")
            _dump(item, inner, out)
        out.append(f"\n{indent}}}")
    elif isinstance(value, list):
        out.append("[\n")
        for number, item in enumerate(value):
            out.append(f",\n{inner}" if number else inner)
            _dump(item, inner, out)
        out.append(f"\n{indent}]")
    elif isinstance(value, str):
        out.append(_string(value))
    else:
        out.append(json.dumps(value))


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
