# SPDX-License-Identifier: GPL-2.0-only
"""CPU lists of ``cpus=``, ``cpus_soft=`` and ``xl vcpu-pin`` (xl.cfg(5), CPULIST): "0-3,^2,node:1,all".

Reading needs no host; ``all`` and ``node:`` get their meaning from :class:`HostCpus` when a domain is created.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from pyxen.errors import ConfigError

_RANGE = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")

MAX_ITEMS = 4096
"""Items read of one list; more is refused."""


@dataclass(frozen=True, slots=True)
class HostCpus:
    """The CPUs of the host: how many, and which ones each NUMA node has."""

    count: int
    nodes: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, slots=True)
class CpuRange:
    """One item: CPUs (or nodes) ``first`` to ``last``, both included, to add or (``exclude``) to take away."""

    first: int
    last: int
    exclude: bool = False
    of_nodes: bool = False


@dataclass(frozen=True, slots=True)
class CpuList:
    """A CPULIST; ``text`` as written, ``ranges`` None at each place of an ``all``."""

    text: str
    ranges: tuple[CpuRange | None, ...]

    @property
    def needs_host(self) -> bool:
        """Whether it means something else on another host."""
        return any(r is None or r.of_nodes for r in self.ranges)

    def resolve(self, host: HostCpus) -> tuple[int, ...]:
        """The CPUs of ``host`` it names, in order; those that do not exist are left out, as xl does."""
        cpus: set[int] = set()
        for r in self.ranges:
            if r is None:
                cpus.update(range(host.count))
            elif r.of_nodes:
                for node in range(r.first, min(r.last + 1, len(host.nodes))):
                    (cpus.difference_update if r.exclude else cpus.update)(host.nodes[node])
            else:
                named = range(r.first, min(r.last + 1, host.count))
                (cpus.difference_update if r.exclude else cpus.update)(named)
        return tuple(sorted(cpus))


def parse_cpu_list(text: str) -> CpuList:
    """Read a CPULIST.  Raises ConfigError with xl's words."""
    items = [item for item in text.split(",", MAX_ITEMS) if item]
    if len(items) > MAX_ITEMS:
        raise ConfigError(f"cpu list has more than {MAX_ITEMS} items")
    ranges: list[CpuRange | None] = []
    for item in items:
        exclude = item.startswith("^")
        rest = item[1:] if exclude else item
        of_nodes = rest.startswith(("node:", "nodes:"))
        if of_nodes:
            rest = rest.partition(":")[2]
        if rest == "all" and not of_nodes:
            if exclude:
                raise ConfigError('Can\'t combine "^" and "all".')
            ranges.append(None)
            continue
        match = _RANGE.fullmatch(rest)
        first = int(match.group(1)) if match else 0
        last = int(match.group(2) or first) if match else -1
        if last < first:
            raise ConfigError(f"Invalid pcpu range: {rest[:200]}.")
        ranges.append(CpuRange(first, last, exclude, of_nodes))
    return CpuList(text, tuple(ranges))


@dataclass(frozen=True, slots=True)
class Affinity:
    """What ``cpus=`` or ``cpus_soft=`` asks: one list for all vCPUs, or (``per_vcpu``) the nth for vCPU n."""

    lists: tuple[CpuList, ...]
    per_vcpu: bool

    @property
    def needs_host(self) -> bool:
        return any(cpus.needs_host for cpus in self.lists)

    def resolve(self, vcpus: int, host: HostCpus, *, kind: str = "hard") -> list[tuple[int, ...]]:
        """The CPUs of each vCPU of a domain with ``vcpus``; a vCPU beyond a short list is missing (may run anywhere).

        Raises ConfigError when one may run nowhere.
        """
        chosen: Sequence[CpuList] = self.lists[:vcpus] if self.per_vcpu else self.lists * vcpus
        cache = {cpus: cpus.resolve(host) for cpus in set(chosen)}
        if not all(cache.values()):
            raise ConfigError(f"vcpu {kind} affinity map is empty")
        return [cache[cpus] for cpus in chosen]
