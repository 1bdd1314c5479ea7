# SPDX-License-Identifier: GPL-2.0-only
"""A guest as a Python object: what ``host.create`` returns."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pyxen.abi.xen import PAGE_SIZE, DomId
from pyxen.errors import HostError
from pyxen.toolstack import cpupools, runtime
from pyxen.toolstack.consoles import ConsoleStream, DomainConsole
from pyxen.toolstack.domains import DomainRecord, Phase
from pyxen.toolstack.operations import Operations
from pyxen.toolstack.runtime import CpuSet, Pinned
from pyxen.toolstack.services import in_thread

if TYPE_CHECKING:
    from pyxen.machine.cpu.base import Registers
    from pyxen.xenstore.client import Client

T = TypeVar("T")


class DomainHandle:
    """One domain, from its creation to long after its end (its id is not another's at once, but a name may be)."""

    def __init__(
        self, operations: Operations, record: DomainRecord, store: Client, find: Callable[[int], DomainHandle]
    ) -> None:
        self._operations = operations
        self._services = operations.services
        self._privcmd = operations.services.privcmd
        self._record = record
        self._client = store
        self._find = find
        self._stream: ConsoleStream | None = None

    def __repr__(self) -> str:
        return f"<domain {self.domid} {self.name!r} {self._record.phase.value}>"

    @property
    def domid(self) -> DomId:
        return self._record.domid

    @property
    def name(self) -> str:
        return self._record.name

    @property
    def warnings(self) -> list[str]:
        """xl's warnings about its configuration."""
        return list(self._record.warnings)

    @property
    def phase(self) -> Phase:
        return self._record.phase

    # --- console ----------------------------------------------------------------------------------

    @property
    def console(self) -> ConsoleStream:
        """The console, from its beginning as far as it is remembered; one stream for this handle."""
        if self._stream is None:
            console = self._record.console
            if not isinstance(console, DomainConsole):
                raise HostError(f"domain {self.domid} ({self.name}) has no console any more")
            self._stream = console.stream()
        return self._stream

    @property
    def console_path(self) -> Path:
        """The unix socket of the console."""
        return self._operations.services.consoles.socket_path(self.domid)

    # --- life -------------------------------------------------------------------------------------

    async def pause(self) -> None:
        """Stop it where it is (counted)."""
        self._operations.pause(self._record)

    async def unpause(self) -> None:
        """Undo one :meth:`pause`."""
        self._operations.unpause(self._record)

    async def shutdown(self, *, force: bool = False) -> None:
        """Ask the guest to power off; :meth:`wait` for it. ``force``: as ``xl shutdown -F``, which means HVM guests
        only."""
        del force  # libxl falls back to ACPI buttons with it; a PV guest has none
        await self._operations.request_shutdown(self._record, "poweroff")

    async def reboot(self, *, force: bool = False) -> None:
        """Ask the guest to reboot; see :meth:`successor`."""
        del force
        await self._operations.request_shutdown(self._record, "reboot")

    async def crash(self) -> None:
        """Shut it down with reason ``crash``."""
        self._operations.crash(self._record)

    async def destroy(self) -> None:
        """Remove it, whatever it is doing."""
        await self._operations.destroy(self._record)

    async def rename(self, name: str) -> None:
        """Another name."""
        await self._operations.rename(self._record, name)

    # --- resources --------------------------------------------------------------------------------

    async def set_vcpus(self, count: int) -> None:
        """Ask the guest to have its first ``count`` vCPUs online, through xenstore; its kernel does it when it likes.

        Raises HostError for more than it was configured with (``maxvcpus``).
        """
        await runtime.set_vcpus(self._services, self._record, count)

    async def pin(
        self, vcpu: int | None = None, hard: CpuSet | None = None, soft: CpuSet | None = None
    ) -> list[Pinned]:
        """Set the pCPUs where a vCPU (None: each) may run, and where it had better; None leaves one as it is.

        ``"0-3,^2"``, ``"node:1"``, ``"all"`` or numbers. Raises ConfigError, HostError.
        """
        return await runtime.pin(self._services, self._record, vcpu, hard, soft)

    async def set_memory(self, target_kb: int) -> None:
        """Ask the guest's balloon driver for this size in KiB, which becomes its limit too. Raises HostError above its
        static maximum."""
        await runtime.set_memory(self._services, self._record, target_kb)

    async def set_max_memory(self, maximum_kb: int) -> None:
        """Limit its memory, in KiB; nothing is taken from it. Raises HostError below its target."""
        await runtime.set_max_memory(self._services, self._record, maximum_kb)

    async def set_scheduling(self, *, weight: int | None = None, cap: int | None = None) -> None:
        """Weight (1 to 65535) and cap (percent of a pCPU, 0 for none). Raises HostError."""
        runtime.set_sched_credit(self._privcmd, self._record, weight, cap)

    async def move_to_pool(self, pool: str | int) -> None:
        """Run it on the pCPUs of a cpupool, by name or number. Raises HostError."""
        poolid = await cpupools.find_pool(self._services, str(pool))
        await cpupools.move_domain(self._services, poolid, self.domid)

    async def trigger(self, name: str, vcpu: int = 0) -> None:
        """Send ``nmi`` to a vCPU. Raises HostError for the triggers that this kind of guest cannot be sent."""
        runtime.send_trigger(self._services, self._record, name, vcpu)

    async def sysrq(self, letter: str) -> None:
        """Ask its kernel for a SysRq."""
        await runtime.send_sysrq(self._services, self._record, letter)

    # --- its end ----------------------------------------------------------------------------------

    async def wait(self) -> str:
        """Wait until it has ended: ``poweroff``, ``reboot``, ``crash``, … or ``destroyed`` when it never shut down."""
        await self._record.over.wait()
        return self._record.shutdown_reason or "destroyed"

    async def wait_gone(self) -> None:
        """Wait until nothing of it is left (its ``on_*`` action destroyed it, or a person did)."""
        seq = 0
        while self._record.phase is not Phase.GONE:
            for event in await self._operations.events.wait(seq, self.domid):
                seq = event.seq

    async def successor(self) -> DomainHandle:
        """Wait for the domain that a restart made in its place. Raises HostError when there will be none."""
        seq = 0
        while True:
            for event in await self._operations.events.wait(seq, self.domid):
                seq = event.seq
                if event.event == "restarted":
                    domid = event.detail["new_domid"]
                    assert isinstance(domid, int)
                    return self._find(domid)
                if event.event == "action-failed":
                    raise HostError(f"domain {self.domid}: {event.detail['action']} failed: {event.detail['error']}")
                if event.event == "destroyed" and self._record.shutdown_reason is None:
                    raise HostError(f"domain {self.domid} was destroyed")
                action = str(event.detail.get("action", ""))
                if event.event == "shutdown" and "restart" not in action:
                    raise HostError(f"domain {self.domid} has ended ({event.detail['reason']}) and is not restarted")

    # --- inside -----------------------------------------------------------------------------------

    async def registers(self, vcpu: int = 0) -> Registers:
        """Registers of a vCPU, which is paused for the moment of reading."""
        return await self._in_thread(lambda: self._privcmd.vcpu_registers(self.domid, vcpu))

    async def read_memory(self, address: int, size: int, vcpu: int = 0) -> bytes:
        """``size`` bytes at a virtual address, by the page tables a vCPU has loaded. Raises XenError(EFAULT)."""
        return await self._in_thread(lambda: self._privcmd.read_guest(self.domid, address, size, vcpu))

    async def read_frame(self, gfn: int) -> bytes:
        """A frame's 4096 bytes (for a PV guest a gfn is a machine frame). Raises XenError(EINVAL) if it has no such
        frame."""

        def work() -> bytes:
            mapping = self._privcmd.foreign_map(self.domid, gfn, 1, False)
            try:
                return bytes(mapping.view[:PAGE_SIZE])
            finally:
                mapping.close()

        return await self._in_thread(work)

    @property
    def counters(self) -> dict[str, int]:
        """What it did so far: hypercalls by name, exceptions, emulated instructions, events."""
        return self._privcmd.counters(self.domid)

    @property
    def xenstore(self) -> DomainStore:
        """Its part of xenstore."""
        return DomainStore(self._client, self._record.store_path)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await in_thread(self._operations.services.executor, work)


class DomainStore:
    """xenstore as domain 0 sees it, with relative paths that start at ``home`` (``/local/domain/N``)."""

    def __init__(self, client: Client, home: str) -> None:
        self.client = client
        self.home = home

    def path(self, path: str) -> str:
        """``path``, absolute."""
        return path if path.startswith("/") else f"{self.home}/{path}" if path else self.home

    async def read(self, path: str) -> str:
        """A node's value. Raises XenError(ENOENT)."""
        return await self.client.read(self.path(path))

    async def get(self, path: str, default: str | None = None) -> str | None:
        """A node's value, or ``default``."""
        return await self.client.get(self.path(path), default)

    async def write(self, path: str, value: str) -> None:
        """Set a value."""
        await self.client.write(self.path(path), value)

    async def ls(self, path: str = "") -> list[str]:
        """Names of the children."""
        return await self.client.ls(self.path(path))

    async def rm(self, path: str) -> None:
        """Remove a subtree."""
        await self.client.rm(self.path(path))
