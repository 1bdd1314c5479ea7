# SPDX-License-Identifier: GPL-2.0-only
"""The shape of the modelled machine: NUMA nodes, sockets, cores, threads (what ``xl info -n`` shows)."""

from __future__ import annotations

from dataclasses import dataclass

from pyxen.errors import ConfigError

MAX_CPUS = 4096
MAX_NODES = 64
"""Xen: include/asm-x86/numa.h NODES_SHIFT 6."""

_KEYS = ("nodes", "sockets", "cores", "threads")


@dataclass(frozen=True, slots=True)
class CpuPlace:
    """Where one pCPU sits; numbers count over the whole machine, except ``thread`` (in its core)."""

    cpu: int
    node: int
    socket: int
    core: int
    thread: int


@dataclass(frozen=True, slots=True)
class Topology:
    """``sockets`` per machine (a multiple or a divisor of ``nodes``), ``cores`` per socket, ``threads`` per core."""

    nodes: int = 1
    sockets: int = 1
    cores: int = 1
    threads: int = 1

    def __post_init__(self) -> None:
        for key in _KEYS:
            if getattr(self, key) < 1:
                raise ConfigError(f"topology: {key} must be at least 1")
        if self.nodes > MAX_NODES:
            raise ConfigError(f"topology: at most {MAX_NODES} NUMA nodes")
        if self.nr_cpus > MAX_CPUS:
            raise ConfigError(f"topology: {self.nr_cpus} CPUs, at most {MAX_CPUS}")
        if self.sockets % self.nodes and self.nodes % self.sockets:
            raise ConfigError(f"topology: {self.sockets} sockets cannot be spread evenly over {self.nodes} nodes")
        if self.nr_cpus % self.nodes:
            raise ConfigError(f"topology: {self.nr_cpus} CPUs cannot be spread evenly over {self.nodes} nodes")

    @classmethod
    def parse(cls, text: str) -> Topology:
        """``nodes=1,sockets=1,cores=2,threads=1`` (any subset, any order) or ``1:1:2:1``. Raises ConfigError."""
        hint = "write nodes=1,sockets=1,cores=2,threads=1 or 1:1:2:1"
        values = dict.fromkeys(_KEYS, 1)
        fields = text.strip().split(":") if "=" not in text else text.strip().split(",")
        if "=" not in text and len(fields) != len(_KEYS):
            raise ConfigError(f"topology {text!r}: four numbers expected", hint=hint)
        seen: set[str] = set()
        for position, field in enumerate(fields):
            key, value = _KEYS[position % len(_KEYS)], field.strip()
            if "=" in text:
                name, _, value = (part.strip() for part in field.partition("="))
                if name not in values or name in seen:
                    raise ConfigError(f"topology {text!r}: unknown or repeated key {name!r}", hint=hint)
                key = name
            seen.add(key)
            if not value.isascii() or not value.isdigit() or len(value) > 6:
                raise ConfigError(f"topology {text!r}: {value!r} is not a number", hint=hint)
            values[key] = int(value)
        return cls(**values)

    @property
    def nr_cpus(self) -> int:
        """pCPUs in the machine."""
        return self.sockets * self.cores * self.threads

    def place(self, cpu: int) -> CpuPlace:
        """Where ``cpu`` sits. CPUs are numbered thread first, then core, then socket, as Xen numbers APIC ids."""
        if not 0 <= cpu < self.nr_cpus:
            raise IndexError(cpu)
        core, thread = divmod(cpu, self.threads)
        return CpuPlace(cpu, cpu * self.nodes // self.nr_cpus, core // self.cores, core, thread)

    def cpus_of_node(self, node: int) -> range:
        """pCPUs of a NUMA node."""
        per_node = self.nr_cpus // self.nodes
        return range(node * per_node, (node + 1) * per_node)
