# SPDX-License-Identifier: GPL-2.0-only
"""The composition root: one object that is a whole Xen host.

    async with pyxen.Host(memory="2G") as host:
        domain = await host.create("examples/debian-pv.cfg")
        await domain.console.expect(b"login:", timeout=30)
        await domain.shutdown()
        print(await domain.wait())                          # poweroff

Everything is built in :meth:`Host.start`, in the order of the floors (machine, hypervisor, xenstored, toolstack),
and taken
down in the reverse order by :meth:`Host.close`, which leaves nothing: no domain, thread, descriptor or file.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import stat
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final

from pyxen import __version__
from pyxen.domain_handle import DomainHandle
from pyxen.errors import ConfigError, HostError
from pyxen.hypervisor.hypervisor import Hypervisor
from pyxen.hypervisor.privcmd import PrivCmd
from pyxen.machine.clock import Clock, RealClock
from pyxen.machine.cpu.base import Cpu
from pyxen.machine.memory import PAGE_SIZE, Memory
from pyxen.machine.topology import Topology
from pyxen.toolstack import info, runtime, store_entries
from pyxen.toolstack.build import pv_builder, pvh_builder
from pyxen.toolstack.build.kernel import KernelImage, PvhImage
from pyxen.toolstack.config import FEATURES, DomainConfig, parse
from pyxen.toolstack.consoles import Consoles
from pyxen.toolstack.cpupools import Cpupools
from pyxen.toolstack.dom0_store import Dom0Store
from pyxen.toolstack.domains import DOM0_NAME, DomainRecord, DomainTable, EventLog, LifeEvent, UnknownDomain
from pyxen.toolstack.lifecycle import Lifecycle
from pyxen.toolstack.operations import Operations
from pyxen.toolstack.services import BuiltRings, Services, in_thread, to_the_end
from pyxen.xenstore.daemon import XenstoreDaemon

if TYPE_CHECKING:
    from pyxen.abi.xen import EvtchnPort

__all__ = ["DomainHandle", "Host", "parse_size"]

log = logging.getLogger("pyxen.host")

EngineFactory = Callable[[Memory, Clock, int], Cpu]
"""Makes CPU ``index`` of a machine."""

MINIMUM_MEMORY: Final = 32 << 20
MAXIMUM_MEMORY: Final = 256 << 30
_SIZE: Final = re.compile(r"([0-9]{1,15})([KMGT]?)i?B?", re.IGNORECASE)
_UNITS: Final = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}


def parse_size(size: str | int) -> int:
    """Bytes of ``"2G"``, ``"512M"``, ``"1048576"`` or a number. Raises ConfigError."""
    if isinstance(size, int):
        return size
    match = _SIZE.fullmatch(size.strip())
    if match is None:
        raise ConfigError(f"{size[:40]!r} is not a size", hint="write 512M or 2G")
    return int(match[1]) << _UNITS[match[2].upper()]


def unicorn_engine(memory: Memory, clock: Clock, index: int) -> Cpu:
    """The emulated x86-64 CPU."""
    from pyxen.machine.cpu.unicorn_x86 import UnicornX86

    return UnicornX86(memory, clock, index)


class Host:
    """A Xen host. Use it as an asynchronous context manager, or :meth:`start` and :meth:`close` it.

    ``memory`` is the machine's RAM (bytes, or text such as ``"2G"``), ``cpus`` or ``topology`` its shape.
    ``rundir`` is a
    folder of the user's own (mode 0700) for sockets and logs; without one, a temporary folder is made and removed.
    ``pv_mode`` (``exact`` or ``fast``) is what domains get that do not say.  ``engine`` is ``"unicorn"`` or a
    function that
    makes a CPU; ``clock`` is the machine's (a virtual one in tests).  The first ``max_engines`` of the CPUs (default:
    as many as this computer has, at least 4) execute guests in parallel, the others are only modelled.
    """

    def __init__(
        self,
        memory: str | int = "2G",
        cpus: int | None = None,
        topology: Topology | str | None = None,
        rundir: str | os.PathLike[str] | None = None,
        pv_mode: str | None = None,
        engine: str | EngineFactory = "unicorn",
        *,
        clock: Clock | None = None,
        max_engines: int | None = None,
        minimum_life_s: float | None = None,
        verbose: bool = False,
    ) -> None:
        self.topology = _topology(cpus, topology)
        self.memory_bytes = _memory_bytes(memory, self.topology.nodes)
        if pv_mode not in (None, "exact", "fast"):
            raise ConfigError(f'unknown pv_mode "{pv_mode}"', hint='it is "exact" or "fast"')
        if isinstance(engine, str) and engine != "unicorn":
            raise ConfigError(f'unknown engine "{engine}"', hint='this version has "unicorn"')
        self._engine: EngineFactory = unicorn_engine if isinstance(engine, str) else engine
        self._engine_name = engine if isinstance(engine, str) else getattr(engine, "__name__", "engine")
        self.pv_mode = pv_mode or "exact"
        self._max_engines = max_engines if max_engines is not None else max(4, os.cpu_count() or 1)
        self._clock = clock
        self._wanted_rundir = None if rundir is None else Path(rundir)
        self._minimum_life_s = minimum_life_s
        self._verbose = verbose
        self._stack: contextlib.AsyncExitStack | None = None
        self.stop_requested = asyncio.Event()
        """Set by ``POST /host/stop``: whoever runs this host should close it."""
        self.table = DomainTable()
        self.events = EventLog()
        # Built by start().
        self.rundir: Path
        self.clock: Clock
        self.memory: Memory
        self.hypervisor: Hypervisor
        self.privcmd: PrivCmd
        self.xenstored: XenstoreDaemon
        self.store: Dom0Store
        self.operations: Operations
        self.cpupools: Cpupools
        self.lifecycle: Lifecycle
        self.started_unix = 0.0

    # --- life -------------------------------------------------------------------------------------

    async def __aenter__(self) -> Host:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def start(self) -> None:
        """Build the host. Raises HostError (EngineError among them); nothing is left then."""
        if self._stack is not None:
            raise HostError("this host has been started already")
        async with contextlib.AsyncExitStack() as stack:
            self._make_rundir(stack)
            self._make_machine(stack)
            await self._make_dom0(stack)
            self._stack = stack.pop_all()

    def _make_rundir(self, stack: contextlib.ExitStack | contextlib.AsyncExitStack) -> None:
        if self._wanted_rundir is None:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="pyxen-"))
            self.rundir = Path(folder)
        else:
            self.rundir = _private_folder(self._wanted_rundir)

    def _make_machine(self, stack: contextlib.AsyncExitStack) -> None:
        self.clock = self._clock if self._clock is not None else RealClock()
        self.started_unix = self._now_unix()
        self.memory = Memory(self.memory_bytes, self.topology.nodes)
        stack.callback(self.memory.close)
        engines: list[Cpu] = []
        try:
            # The first pCPUs have an engine each, which is a thread; those beyond are modelled (SUPPORT.md).
            for index in range(min(self.topology.nr_cpus, self._max_engines)):
                engines.append(self._engine(self.memory, self.clock, index))
            self.hypervisor = Hypervisor(self.memory, self.clock, self.topology, engines, verbose=self._verbose)
        except BaseException:
            for engine in engines:
                engine.close()
            raise
        stack.callback(self.hypervisor.stop)
        self.hypervisor.start()
        self.privcmd = PrivCmd(self.hypervisor)

    async def _make_dom0(self, stack: contextlib.AsyncExitStack) -> None:
        self.xenstored = XenstoreDaemon(self.privcmd)
        await self.xenstored.start(self.rundir / "xenstored" / "socket")
        stack.push_async_callback(self.xenstored.stop)
        self.store = Dom0Store(self.xenstored)
        stack.push_async_callback(self.store.close)
        dom0 = self.privcmd.domain_info(0)
        await store_entries.publish(self.store, store_entries.dom0_nodes(0 if dom0 is None else dom0.tot_pages * 4))
        executor = stack.enter_context(ThreadPoolExecutor(2, thread_name_prefix="pyxen-work"))
        self.executor = executor
        self.consoles = Consoles(self.privcmd, self.rundir)
        services = Services(self.privcmd, self.store, self.store, self.consoles, self._build, self._now_unix, executor)
        self.cpupools = Cpupools(services)
        self.operations = Operations(
            services, self.table, self.events, features=FEATURES, default_pv_mode=self.pv_mode
        )
        stack.push_async_callback(self._destroy_all)
        self.lifecycle = Lifecycle(self.operations)
        if self._minimum_life_s is not None:
            self.lifecycle.minimum_life_s = self._minimum_life_s
        self.lifecycle.start()
        stack.push_async_callback(self.lifecycle.close)

    async def close(self) -> None:
        """Destroy all domains and take the host down. Idempotent; goes on to its end when cancelled."""
        stack, self._stack = self._stack, None
        if stack is not None:
            await to_the_end(stack.aclose())

    async def _destroy_all(self) -> None:
        for record in self.table:
            try:
                await self.operations.destroy(record)
            except Exception:
                log.exception("domain %d (%s) could not be removed", record.domid, record.name)

    def request_stop(self) -> None:
        """Ask whoever runs this host to close it."""
        self.stop_requested.set()

    def _now_unix(self) -> float:
        return self.clock.wallclock_ns() / 1e9

    async def _build(
        self,
        privcmd: PrivCmd,
        record: DomainRecord,
        kernel: KernelImage | PvhImage,
        ramdisk: bytes | None,
        store_port: EvtchnPort,
        console_port: EvtchnPort,
    ) -> BuiltRings:
        """The builder of the guest's kind (toolstack.services.Builder)."""
        config, cmdline, pages = record.config, record.config.cmdline or "", record.config.memory_mb * 256
        if isinstance(kernel, PvhImage):
            pvh = await pvh_builder.build(
                privcmd, record.domid, kernel, ramdisk, cmdline, pages,
                vcpus=config.max_vcpus, store_port=store_port, console_port=console_port,
            )  # fmt: skip
            return BuiltRings(pvh.store_gfn, pvh.console_gfn)
        pv = await pv_builder.build(
            privcmd, record.domid, kernel, ramdisk, cmdline, pages, store_port=store_port, console_port=console_port
        )
        return BuiltRings(pv.store_gfn, pv.console_gfn)

    # --- domains ----------------------------------------------------------------------------------

    async def create(
        self,
        config: DomainConfig | str | os.PathLike[str],
        *,
        paused: bool = False,
        extra: Sequence[str] = (),
        pv_mode: str | None = None,
    ) -> DomainHandle:
        """Create a domain and start it, unless ``paused``.

        ``config`` is a parsed configuration, its text (anything with a line break or ``=``), or the path of a file.
        ``extra`` are assignments as on xl's command line. Cancelling leaves nothing behind.
        """
        if isinstance(config, DomainConfig):
            if extra:
                raise ConfigError("extra assignments need the configuration's text")
            return self._handle(await self.operations.create(config, paused=paused, pv_mode=pv_mode, cwd=os.getcwd()))
        if isinstance(config, str) and ("\n" in config or "=" in config):
            text, name = config, "(configuration)"
        else:
            name = os.fspath(config)
            text = await in_thread(self.executor, lambda: _read_text(Path(name)))
        return await self.create_from_text(text, path=name, extra=extra, paused=paused, pv_mode=pv_mode)

    async def create_from_text(
        self,
        text: str,
        *,
        path: str = "(configuration)",
        extra: Sequence[str] = (),
        paused: bool = False,
        pv_mode: str | None = None,
        cwd: str | None = None,
    ) -> DomainHandle:
        """Create a domain of a configuration's text; relative paths in it start at ``cwd`` (default: ours)."""
        config = await in_thread(self.executor, lambda: parse(text, path, extra))
        record = await self.operations.create(config, paused=paused, pv_mode=pv_mode, cwd=cwd or os.getcwd())
        return self._handle(record)

    def domains(self) -> list[DomainHandle]:
        """Every guest, by id."""
        return [self._handle(record) for record in self.table]

    def domain(self, which: str | int) -> DomainHandle:
        """The guest of that name or id. Raises UnknownDomain; HostError for domain 0, which is this host itself."""
        if str(which) in ("0", DOM0_NAME):
            raise HostError(f"{DOM0_NAME} is the host itself", hint="stop the host with: pyxen host stop")
        return self._handle(self.table.find(which))

    def _handle(self, record: DomainRecord) -> DomainHandle:
        return DomainHandle(self.operations, record, self.store.client, self.domain)

    def domid_of(self, which: str | int) -> int:
        """The id of a domain of that name or id, domain 0 included. Raises UnknownDomain."""
        return 0 if str(which) in ("0", DOM0_NAME) else self.table.find(which).domid

    def domid_with_history(self, which: str) -> int:
        """As :meth:`domid_of`, but an id that is gone will do as long as events of it are remembered."""
        try:
            return self.domid_of(which)
        except UnknownDomain:
            if which.isascii() and which.isdecimal() and len(which) < 10 and self.events.since(0, int(which)):
                return int(which)
            raise

    async def wait_events(self, since: int, domid: int, timeout_s: float) -> list[LifeEvent]:
        """Events of a domain after sequence number ``since``; waits for one, but not when the host is being stopped."""
        waiting = asyncio.ensure_future(self.events.wait(since, domid, timeout_s))
        stopping = asyncio.ensure_future(self.stop_requested.wait())
        try:
            await asyncio.wait({waiting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            return waiting.result() if waiting.done() else []
        finally:
            waiting.cancel()
            stopping.cancel()

    # --- what xl shows ----------------------------------------------------------------------------

    def version(self) -> dict[str, object]:
        """``GET /version``."""
        return {"pyxen": __version__, "xen": f"{info.XEN_MAJOR}.{info.XEN_MINOR}.0", "pid": os.getpid()}

    def info(self, *, numa: bool = False) -> dict[str, object]:
        """``xl info``."""
        machine = info.Machine(
            version=__version__,
            engine=f"{self._engine_name} {_version_of(self._engine_name)}".strip(),
            command_line=self._command_line(),
        )
        return info.host_info(self.privcmd, machine, numa=numa)

    def _command_line(self) -> str:
        shape = self.topology
        return (
            f"memory={self.memory_bytes >> 20}M "
            f"topology=nodes={shape.nodes},sockets={shape.sockets},cores={shape.cores},threads={shape.threads} "
            f"pv_mode={self.pv_mode}"
        )

    def rows(self) -> list[dict[str, object]]:
        """``xl list``."""
        return info.domain_rows(self.privcmd, self.table, self.started_unix, self.cpupools.names)

    def row(self, which: str | int) -> dict[str, object]:
        """One domain of :meth:`rows`, with its configuration."""
        domid = self.domid_of(which)
        found, record = self.privcmd.domain_info(domid), self.table.get(domid)
        if found is None:
            raise UnknownDomain(f"{which} is an invalid domain identifier (rc=-6)")
        row = info.domain_row(found, record, self.started_unix, self.cpupools.names)
        return {**row, "config": info.domain_config(self.privcmd, found, record)}

    def vcpus(self, which: str | int) -> list[dict[str, object]]:
        """``xl vcpu-list``."""
        return info.vcpu_rows(self.privcmd, self.domid_of(which))

    def uptime(self) -> list[dict[str, object]]:
        """``xl uptime``."""
        return info.uptime_rows(self.table, self._now_unix(), self.started_unix)

    def dmesg(self, *, clear: bool = False) -> str:
        """``xl dmesg``."""
        return self.privcmd.console_ring(clear=clear)

    def debug_keys(self, keys: str) -> None:
        """``xl debug-keys``."""
        self.privcmd.debug_keys(keys)

    def sched_credit(self, domid: int) -> dict[str, int]:
        """A domain's credit scheduler parameters."""
        if domid == 0:
            return {"weight": 256, "cap": 0}  # domain 0 is not scheduled by us; Xen's default
        weight, cap = self.privcmd.sched_credit_get(domid)
        return {"weight": weight, "cap": cap}

    def set_sched_credit(self, domid: int, weight: int | None, cap: int | None) -> None:
        """Change them; None leaves one as it is. Raises HostError (libxl's words) out of range."""
        if domid == 0:
            raise HostError(f"{DOM0_NAME} is not scheduled by this hypervisor")
        runtime.set_sched_credit(self.privcmd, self.table.find(domid), weight, cap)

    def sched_credit_pool(self, poolid: int = 0) -> dict[str, int]:
        """The parameters of a cpupool's scheduler."""
        timeslice_ms, ratelimit_us = self.privcmd.sched_credit_parameters(poolid)
        return {"tslice_ms": timeslice_ms, "ratelimit_us": ratelimit_us, "migration_delay_us": 0}

    def set_sched_credit_pool(
        self, poolid: int = 0, *, tslice_ms: int | None = None, ratelimit_us: int | None = None
    ) -> None:
        """Change them; None leaves one as it is. Raises HostError (libxl's words) out of range."""
        runtime.set_sched_credit_pool(self.privcmd, poolid, tslice_ms, ratelimit_us)


def _topology(cpus: int | None, topology: Topology | str | None) -> Topology:
    shape = Topology.parse(topology) if isinstance(topology, str) else topology
    if shape is None:
        if cpus is not None and not 1 <= cpus <= 4096:
            raise ConfigError(f"a machine of {cpus} CPUs cannot be made", hint="1 to 4096")
        return Topology(cores=cpus or os.cpu_count() or 1)
    if cpus is not None and cpus != shape.nr_cpus:
        raise ConfigError(f"{cpus} CPUs do not make a topology of {shape.nr_cpus}", hint="give one of the two")
    return shape


def _memory_bytes(memory: str | int, nodes: int) -> int:
    size = parse_size(memory)
    if not MINIMUM_MEMORY <= size <= MAXIMUM_MEMORY:
        raise ConfigError(
            f"a machine of {size >> 20} MiB cannot be made",
            hint=f"{MINIMUM_MEMORY >> 20}M to {MAXIMUM_MEMORY >> 30}G",
        )
    return size - size % (PAGE_SIZE * nodes)


def _private_folder(path: Path) -> Path:
    """``path``, made if need be; whoever else could write into it could stand in for this host. Raises HostError."""
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()
    except OSError as error:
        raise HostError(f"run directory {path}: {error.strerror}") from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise HostError(f"run directory {path} is not a private folder of this user", hint=f"chmod 700 {path}")
    return path


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="surrogateescape")
    except OSError as error:
        raise ConfigError(f"Failed to read config file: {path}: {error.strerror}") from None


def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
