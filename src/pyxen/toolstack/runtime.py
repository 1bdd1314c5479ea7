# SPDX-License-Identifier: GPL-2.0-only
"""Changes to a domain that runs: its vCPUs, where they run, its memory, and signals to it (libxl:
``libxl_set_vcpuonline``, ``libxl_set_vcpuaffinity``, ``libxl_set_memory_target``, ``libxl_domain_setmaxmem``,
``libxl_send_trigger``, ``libxl_send_sysrq``).

vCPUs and memory are asked for through xenstore: the guest's kernel does it, when it likes, or never.  What was asked
for last is the configuration that a reboot starts with, as libxl has it.
"""

from __future__ import annotations

import dataclasses
import errno
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

from pyxen.abi.domctl import (
    SENDTRIGGER_INIT,
    SENDTRIGGER_NMI,
    SENDTRIGGER_POWER,
    SENDTRIGGER_RESET,
    SENDTRIGGER_SLEEP,
)
from pyxen.errors import ConfigError, HostError, XenError
from pyxen.toolstack import store_entries
from pyxen.toolstack.config import HostCpus, parse_cpu_list
from pyxen.toolstack.domains import DomainRecord, Phase
from pyxen.toolstack.services import Services, in_thread, to_the_end

if TYPE_CHECKING:
    from pyxen.hypervisor.privcmd import PrivCmd

MAXMEM_SLACK_KB: Final = 1024
"""LIBXL_MAXMEM_CONSTANT: what a domain may have beyond its memory (pages that its drivers share)."""
MAX_MEMORY_KB: Final = 1 << 42
TSLICE_MIN_MS: Final = 1
TSLICE_MAX_MS: Final = 1000
RATELIMIT_MIN_US: Final = 100
RATELIMIT_MAX_US: Final = 500_000
"""XEN_SYSCTL_CSCHED_TSLICE_* and XEN_SYSCTL_SCHED_RATELIMIT_*."""
TRIGGERS: Final = {
    "nmi": SENDTRIGGER_NMI,
    "reset": SENDTRIGGER_RESET,
    "init": SENDTRIGGER_INIT,
    "power": SENDTRIGGER_POWER,
    "sleep": SENDTRIGGER_SLEEP,
    "s3resume": None,
}
"""libxl_trigger_from_string(). s3resume is a parameter of HVM guests and no trigger to the hypervisor."""

CpuSet = str | Collection[int]
"""pCPUs: as xl writes them ("0-3,^2", "node:1", "all"), or their numbers."""


def host_cpus(privcmd: PrivCmd) -> HostCpus:
    """What ``all`` and ``node:`` mean on this host."""
    nodes: dict[int, list[int]] = {}
    places = privcmd.cpu_topology()
    for place in places:
        nodes.setdefault(place.node, []).append(place.cpu)
    return HostCpus(len(places), tuple(tuple(nodes.get(node, ())) for node in range(max(nodes) + 1)))


@asynccontextmanager
async def _held(record: DomainRecord) -> AsyncIterator[None]:
    """Keep ``record`` from being destroyed meanwhile. Raises HostError when it is too late."""
    async with record.lock:
        if record.phase not in (Phase.LIVE, Phase.ENDED):
            raise HostError(f"domain {record.domid} ({record.name}) is gone")
        yield


# --- vCPUs ----------------------------------------------------------------------------------------------


async def set_vcpus(services: Services, record: DomainRecord, count: int) -> None:
    """Ask the guest to have its first ``count`` vCPUs online (1 to what it was configured with).

    Raises HostError with libxl's words for a number that it can never have.
    """
    maximum = record.config.max_vcpus
    if count > maximum:
        raise HostError(f"Requested {count} VCPUs, however maxcpus is {maximum}!")
    if count < 1:
        raise HostError("a domain keeps at least one vCPU")
    async with _held(record):
        await store_entries.publish(services.store, store_entries.vcpu_nodes(record, count))
        record.config = dataclasses.replace(record.config, vcpus_set=count, maxvcpus_set=maximum)


@dataclasses.dataclass(frozen=True, slots=True)
class Pinned:
    """What became of a vCPU's affinity: the pCPUs that are left of it in the domain's cpupool."""

    vcpu: int
    hard: tuple[int, ...]
    soft: tuple[int, ...]


async def pin(
    services: Services,
    record: DomainRecord,
    vcpu: int | None,
    hard: CpuSet | None = None,
    soft: CpuSet | None = None,
) -> list[Pinned]:
    """Set where a vCPU (None: every one) may run and where it had better run; None leaves one as it is.

    Raises ConfigError for a set that is none, HostError when the vCPU or the pCPUs are not there.
    """
    if hard is None and soft is None:
        raise ConfigError("neither hard nor soft affinity is given")
    host = host_cpus(services.privcmd)
    wanted_hard, wanted_soft = _resolve(hard, host, "hard"), _resolve(soft, host, "soft")
    count = record.config.max_vcpus
    if vcpu is not None and not 0 <= vcpu < count:
        raise HostError(f"domain {record.domid} has no vCPU {vcpu}: it has {count}")
    async with _held(record):
        return await in_thread(
            services.executor,
            lambda: [
                _pin(services.privcmd, record.domid, one, wanted_hard, wanted_soft)
                for one in (range(count) if vcpu is None else (vcpu,))
            ],
        )


def _resolve(cpus: CpuSet | None, host: HostCpus, kind: str) -> frozenset[int] | None:
    if cpus is None:
        return None
    named = parse_cpu_list(cpus).resolve(host) if isinstance(cpus, str) else cpus
    found = frozenset(cpu for cpu in named if 0 <= cpu < host.count)
    if not found:
        raise ConfigError(f"vcpu {kind} affinity map is empty", hint=f"this host has CPUs 0 to {host.count - 1}")
    return found


def _pin(
    privcmd: PrivCmd, domid: int, vcpu: int, hard: frozenset[int] | None, soft: frozenset[int] | None
) -> Pinned:
    try:
        left = privcmd.vcpu_set_affinity(domid, vcpu, hard, soft)
    except XenError as error:
        if error.errno != errno.EINVAL:
            raise
        raise HostError(f"Domain {domid}: none of these CPUs is in the domain's cpupool") from None
    return Pinned(vcpu, tuple(sorted(left[0])), tuple(sorted(left[1])))


def set_sched_credit(privcmd: PrivCmd, record: DomainRecord, weight: int | None, cap: int | None) -> None:
    """Weight and cap of a domain; None leaves one as it is. Raises HostError (libxl's words) out of range."""
    most = 100 * record.config.max_vcpus
    if weight is not None and not 1 <= weight <= 65535:
        raise HostError("Cpu weight out of range, valid values are within range from 1 to 65535")
    if cap is not None and not 0 <= cap <= most:
        raise HostError(f"Cpu cap out of range, valid range is from 0 to {most} for specified number of vcpus")
    privcmd.sched_credit_set(record.domid, weight=weight, cap=cap)
    if weight is not None:
        record.config = dataclasses.replace(record.config, weight_set=weight)
    if cap is not None:
        record.config = dataclasses.replace(record.config, cap_set=cap)


def set_sched_credit_pool(privcmd: PrivCmd, poolid: int, tslice_ms: int | None, ratelimit_us: int | None) -> None:
    """Time slice and rate limit of a pool; None leaves one as it is. Raises HostError (libxl's words) out of range."""
    now = privcmd.sched_credit_parameters(poolid)
    tslice = now[0] if tslice_ms is None else tslice_ms
    ratelimit = now[1] if ratelimit_us is None else ratelimit_us
    if not TSLICE_MIN_MS <= tslice <= TSLICE_MAX_MS:
        raise HostError(f"Time slice out of range, valid range is from {TSLICE_MIN_MS} to {TSLICE_MAX_MS}")
    if ratelimit and not RATELIMIT_MIN_US <= ratelimit <= RATELIMIT_MAX_US:
        raise HostError(f"Ratelimit out of range, valid range is from {RATELIMIT_MIN_US} to {RATELIMIT_MAX_US}")
    if ratelimit > tslice * 1000:
        raise HostError("Ratelimit cannot be greater than timeslice")
    privcmd.sched_credit_set_parameters(poolid, tslice_ms=tslice, ratelimit_us=ratelimit)


# --- memory ---------------------------------------------------------------------------------------------


async def set_memory(services: Services, record: DomainRecord, target_kb: int) -> None:
    """Ask the guest's balloon driver to have ``target_kb``, and let it have no more. Without a balloon driver it keeps
    what it has. Raises HostError (libxl's words) above its static maximum."""
    if not 0 <= target_kb <= record.config.maxmem_mb * 1024:
        raise HostError("memory_dynamic_max must be less than or equal to memory_static_max")
    async with _held(record):
        await to_the_end(_set_memory(services, record, target_kb))


async def _set_memory(services: Services, record: DomainRecord, target_kb: int) -> None:
    services.privcmd.max_mem(record.domid, target_kb + MAXMEM_SLACK_KB)
    await store_entries.publish(services.store, store_entries.target_nodes(record, target_kb))
    record.target_kb = target_kb
    config = record.config
    record.config = dataclasses.replace(config, memory_set=max(target_kb >> 10, 1), maxmem_set=config.maxmem_mb)


async def set_max_memory(services: Services, record: DomainRecord, maximum_kb: int) -> None:
    """Limit what the hypervisor lets the domain have; nothing is taken from it. Raises HostError below its target."""
    async with _held(record):
        if maximum_kb < target_kb(record):
            raise HostError("memory_static_max must be greater than or or equal to memory_dynamic_max")
        if maximum_kb > MAX_MEMORY_KB:
            raise HostError(f"{maximum_kb} KiB is more than any machine has")
        services.privcmd.max_mem(record.domid, maximum_kb + MAXMEM_SLACK_KB)


def target_kb(record: DomainRecord) -> int:
    """What was asked for last (``memory/target``)."""
    return record.config.memory_mb * 1024 if record.target_kb is None else record.target_kb


# --- signals --------------------------------------------------------------------------------------------


def send_trigger(services: Services, record: DomainRecord, name: str, vcpu: int = 0) -> None:
    """``nmi`` to a vCPU; the others are for guests with hardware that PV and PVH guests have not (HostError)."""
    if name not in TRIGGERS:
        raise ConfigError(f'Invalid trigger "{name[:80]}"', hint=f"it is one of {', '.join(TRIGGERS)}")
    number = TRIGGERS[name]
    if number is None:
        raise HostError("Send trigger 's3resume' failed: it needs an HVM guest in ACPI S3")
    count = record.config.max_vcpus
    if not 0 <= vcpu < count:
        raise HostError(f"domain {record.domid} has no vCPU {vcpu}: it has {count}")
    try:
        services.privcmd.send_trigger(record.domid, number, vcpu)
    except XenError as error:
        reason = {
            errno.EINVAL: "it needs an HVM guest with power management",
            errno.ENOSYS: "Xen does not implement it",
        }.get(error.errno)
        if reason is None:
            raise
        raise HostError(f"Send trigger '{name}' failed: {reason}") from None


async def send_sysrq(services: Services, record: DomainRecord, letter: str) -> None:
    """Ask the guest's kernel for a SysRq (``control/sysrq``)."""
    if len(letter) != 1 or not "!" <= letter <= "~":
        raise ConfigError("Invalid sysrq.", hint="it is one letter, as in Linux's sysrq.txt")
    async with _held(record):
        await services.store.write(f"{record.store_path}/control/sysrq", letter.encode())
