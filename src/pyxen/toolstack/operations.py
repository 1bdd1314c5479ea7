# SPDX-License-Identifier: GPL-2.0-only
"""Creating, destroying and asking domains to stop (libxl: ``libxl_create.c``, ``libxl_dom.c``, ``libxl.c``).

Why it is built this way.  A create has a dozen steps and may be cancelled, or fail, in any of them.  Instead of an undo
per step there is one teardown, written so that it can run on a domain in *any* state and any number of times; a create
that does not reach its end runs it, to the end, before the error goes on.  Destroying a domain is the same
teardown, and
one that was cancelled is simply run again.

Each step either is synchronous (a hypercall: done or not done, with no moment in between at which a cancellation could
arrive), or the teardown knows how to undo it whether it was done, half done or not begun.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import stat
import uuid as _uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from pyxen.abi.xen import DomId
from pyxen.errors import ConfigError, HostError, ImageError, XenError
from pyxen.toolstack import placement, store_entries
from pyxen.toolstack.build.kernel import KernelImage, PvhImage, load_kernel, load_pvh_kernel
from pyxen.toolstack.config import DomainConfig, check_creatable, resolve
from pyxen.toolstack.config.domain import PvMode
from pyxen.toolstack.domains import DomainRecord, DomainTable, EventLog, Phase
from pyxen.toolstack.runtime import MAXMEM_SLACK_KB
from pyxen.toolstack.services import Services, in_thread, to_the_end

log = logging.getLogger("pyxen.toolstack")

MAX_KERNEL_BYTES: Final = 1 << 30
E820_RAM: Final = 1


class Operations:
    """The toolstack's verbs. All of them run on the event loop's thread."""

    def __init__(
        self,
        services: Services,
        table: DomainTable,
        events: EventLog,
        *,
        features: Iterable[str] = (),
        default_pv_mode: str = "exact",
    ) -> None:
        self.services = services
        self.table = table
        self.events = events
        self.features = tuple(features)
        self.default_pv_mode = default_pv_mode
        self._claims: dict[int, tuple[DomId | None, int]] = {}

    # --- create -----------------------------------------------------------------------------------

    async def create(
        self, config: DomainConfig, *, paused: bool = False, pv_mode: str | None = None, cwd: str | None = None
    ) -> DomainRecord:
        """Create a domain of ``config`` and start it, unless ``paused``.

        May be cancelled at every await; whatever the reason it does not reach its end, nothing is left of it when the
        exception arrives. Raises ConfigError, ImageError, HostError or XenError.
        """
        mode = self._pv_mode(config, pv_mode)
        check_creatable(config, self.features)
        check_actions(config)
        self._check_uuid(config)
        assert config.kernel is not None  # check_creatable
        kernel_path = resolve(config.kernel, cwd)
        ramdisk_path = None if config.ramdisk is None else resolve(config.ramdisk, cwd)
        self.table.reserve_name(config.name)
        claim = object()
        record: DomainRecord | None = None
        try:
            self._claim_memory(id(claim), config)
            kernel, ramdisk = await self._load(config, kernel_path, ramdisk_path)
            record = self._make(config, mode, kernel_path, ramdisk_path, cwd)
            self._claims[id(claim)] = (record.domid, self._claims[id(claim)][1])
            async with record.lock:
                await self._build(record, kernel, ramdisk)
                if not paused:
                    self.services.privcmd.domain_unpause(record.domid)
                record.phase = Phase.LIVE
        except BaseException:
            if record is not None:
                await to_the_end(self._abandon(record))
            raise
        finally:
            self._claims.pop(id(claim), None)
            self.table.release_name(config.name)
        self.events.add(record.domid, "created", name=record.name)
        return record

    def _pv_mode(self, config: DomainConfig, asked: str | None) -> PvMode | None:
        """How a PV guest's kernel is run; None for a guest that is not PV."""
        if config.type != "pv":
            if asked or config.pv_mode:
                raise ConfigError(f'pv_mode says how a PV guest is run; this is type = "{config.type}"')
            return None
        mode = asked or config.pv_mode or self.default_pv_mode
        if mode == "exact":
            return "exact"
        if mode == "fast":
            return "fast"
        raise ConfigError(f'unknown pv_mode "{mode[:40]}"', hint='it is "exact" or "fast"')

    def _check_uuid(self, config: DomainConfig) -> None:
        for record in self.table:
            if str(record.uuid) == config.uuid:
                raise ConfigError(
                    f"uuid {config.uuid} is already that of domain {record.domid} ({record.name})",
                    hint="leave uuid= out, and each domain gets one of its own",
                )

    def _claim_memory(self, claim: int, config: DomainConfig) -> None:
        """Make sure that the memory is there before anything is built, and that no other create counts on it too."""
        memory_kb = config.memory_mb * 1024
        need = memory_kb + self.services.privcmd.domain_overhead_kb(memory_kb, config.max_vcpus) + paging_kb(config)
        free = self.services.privcmd.physinfo().free_kb - sum(
            max(0, claimed - self._given_kb(domid)) for domid, claimed in self._claims.values()
        )
        if need > free:
            raise HostError(
                f"not enough memory for domain {config.name}: {need} KiB are needed, {max(free, 0)} KiB are free, "
                f"{need - max(free, 0)} KiB are missing",
                hint="destroy a domain, lower memory=, or start the host with more --memory",
            )
        self._claims[claim] = (None, need)

    def _given_kb(self, domid: DomId | None) -> int:
        info = None if domid is None else self.services.privcmd.domain_info(domid)
        return 0 if info is None else info.tot_pages * 4

    async def _load(
        self, config: DomainConfig, kernel: Path, ramdisk: Path | None
    ) -> tuple[KernelImage | PvhImage, bytes | None]:
        def work() -> tuple[KernelImage | PvhImage, bytes | None]:
            data = read_image(kernel, "kernel")
            image = load_pvh_kernel(data) if config.type == "pvh" else load_kernel(data)
            return image, None if ramdisk is None else read_image(ramdisk, "ramdisk")

        return await in_thread(self.services.executor, work)

    def _make(
        self, config: DomainConfig, mode: PvMode | None, kernel: Path, ramdisk: Path | None, cwd: str | None
    ) -> DomainRecord:
        """The first hypercall, and the record of it, with no await between them."""
        privcmd = self.services.privcmd
        uuid = _uuid.UUID(config.uuid)
        if mode is None:
            domid = privcmd.domain_create(uuid.bytes, max_vcpus=config.max_vcpus, kind="pvh")
        else:
            domid = privcmd.domain_create(uuid.bytes, max_vcpus=config.max_vcpus, pv_mode=mode)
        record = DomainRecord(
            domid,
            config.name,
            uuid,
            config,
            self.services.now_unix(),
            kernel,
            ramdisk,
            cwd,
            mode,
            warnings=list(config.warnings),
        )
        self.table.add(record)
        return record

    async def _build(self, record: DomainRecord, kernel: KernelImage | PvhImage, ramdisk: bytes | None) -> None:
        services, config, domid = self.services, record.config, record.domid
        privcmd = services.privcmd
        await store_entries.publish(services.store, store_entries.domain_nodes(record))
        record.check_abort()
        privcmd.max_mem(domid, config.maxmem_mb * 1024 + MAXMEM_SLACK_KB)
        if config.type == "pv":  # xc_domain_set_memmap_limit: without it a balloon cannot grow past the start
            privcmd.set_memory_map(domid, [(0, config.maxmem_mb << 20, E820_RAM)])
        privcmd.sched_credit_set(domid, weight=config.cpu_weight, cap=config.cap)
        await placement.apply(services, config, domid)
        record.check_abort()
        store_port = privcmd.evtchn_alloc_unbound(domid, 0)
        console_port = privcmd.evtchn_alloc_unbound(domid, 0)
        rings = await services.build(privcmd, record, kernel, ramdisk, store_port, console_port)
        record.check_abort()
        built = store_entries.BuiltDomain(
            rings.store_gfn,
            store_port,
            rings.console_gfn,
            console_port,
            config.memory_mb * 1024,
            config.maxmem_mb * 1024,
            config.max_vcpus,
            config.vcpus,
            str(record.kernel_path),
            None if record.ramdisk_path is None else str(record.ramdisk_path),
            config.cmdline or "",
            str(services.consoles.socket_path(domid)),
        )
        await store_entries.publish(services.store, store_entries.build_nodes(record, built))
        record.check_abort()
        services.registry.introduce(domid, rings.store_gfn, store_port)
        record.console = await services.consoles.open(record, rings.console_gfn, console_port)
        record.check_abort()

    async def _abandon(self, record: DomainRecord) -> None:
        try:
            await self.destroy(record)
        except Exception:
            # The error that made us give up is the one to report; this one stays for `xl destroy` and the log.
            log.exception("domain %d (%s) could not be removed completely", record.domid, record.name)

    # --- destroy ----------------------------------------------------------------------------------

    async def destroy(self, record: DomainRecord) -> None:
        """Tear the domain down. May be cancelled, and run again; a second caller waits for the first.

        A build in progress is told to give up first.
        """
        if record.phase is Phase.BUILDING:
            record.abort = f"domain {record.domid} ({record.name}) was destroyed while it was being built"
        async with record.lock:
            if record.phase is Phase.GONE:
                return
            record.phase = Phase.DYING
            await self._teardown(record)
            self.table.remove(record)
        self.events.add(record.domid, "destroyed", name=record.name)

    async def _teardown(self, record: DomainRecord) -> None:
        services, domid = self.services, record.domid
        with _gone_is_fine():
            services.privcmd.domain_pause_for_destroy(domid)
        # Whoever holds frames of the domain lets go first: its last words are still in the console's ring.
        if record.console is not None:
            await record.console.close()
            record.console = None
        with _gone_is_fine():
            services.registry.release(domid)
        await store_entries.withdraw(services.store, domid, record.uuid)
        with _gone_is_fine():
            await services.privcmd.domain_destroy(domid)

    # --- the rest ---------------------------------------------------------------------------------

    def pause(self, record: DomainRecord) -> None:
        """XEN_DOMCTL_pausedomain; counted, as in Xen."""
        self.services.privcmd.domain_pause(record.domid)
        self.events.add(record.domid, "paused")

    def unpause(self, record: DomainRecord) -> None:
        """XEN_DOMCTL_unpausedomain."""
        self.services.privcmd.domain_unpause(record.domid)
        self.events.add(record.domid, "unpaused")

    async def request_shutdown(self, record: DomainRecord, command: str = "poweroff") -> None:
        """Ask the guest, through xenstore, to ``poweroff``, ``reboot``, … It answers when it likes, or never."""
        if record.phase is not Phase.LIVE:
            raise HostError(f"domain {record.domid} ({record.name}) is not running")
        await store_entries.request_shutdown(self.services.store, record, command)

    def crash(self, record: DomainRecord) -> None:
        """Shut the domain down with reason ``crash`` (SCHEDOP_remote_shutdown)."""
        self.services.privcmd.domain_shutdown(record.domid, 3)

    async def rename(self, record: DomainRecord, name: str) -> None:
        """Another name, in the table and in xenstore. Raises ConfigError when it is taken or unfit."""
        before = record.name
        self.table.rename(record, name)
        try:
            await to_the_end(store_entries.renamed(self.services.store, record))
        except Exception:
            self.table.rename(record, before)
            raise
        self.events.add(record.domid, "renamed", name=name)

    async def preserve(self, record: DomainRecord, name: str, uuid: _uuid.UUID) -> None:
        """Give an ended domain another name and uuid, so that a new one can have its own
        (``libxl_domain_preserve``)."""
        async with record.lock:
            before, old_uuid = record.name, record.uuid
            self.table.rename(record, name)
            record.uuid = uuid
            try:
                self.services.privcmd.domain_set_handle(record.domid, uuid.bytes)
                await to_the_end(store_entries.moved(self.services.store, record, old_uuid))
            except Exception:
                self.table.rename(record, before)
                record.uuid = old_uuid
                raise


def paging_kb(config: DomainConfig) -> int:
    """What the nested page tables of a translated domain may take (``libxl_get_required_shadow_memory``): 256 frames a
    vCPU, two for each MiB of memory. A PV domain's page tables are in its own memory."""
    return 0 if config.type == "pv" else 4 * (256 * config.max_vcpus + 2 * config.maxmem_mb)


def check_actions(config: DomainConfig) -> None:
    """Refuse ``on_*`` actions that would need what this version does not have. Raises ConfigError."""
    for event in ("poweroff", "reboot", "watchdog", "crash"):
        action = getattr(config, f"on_{event}")
        if action in ("coredump-destroy", "coredump-restart"):
            raise ConfigError(
                f'on_{event} = "{action}" is not supported yet: there are no core dumps',
                hint=f'use "{action.removeprefix("coredump-")}", or "preserve" to look at what is left',
            )
        if action == "soft-reset":
            raise ConfigError(f'on_{event} = "soft-reset" needs an HVM guest', hint='use "restart"')


def read_image(path: Path, what: str) -> bytes:
    """The bytes of a kernel or ramdisk file. Raises ImageError, with one line, for what cannot be read as one."""
    try:
        # Not blocking: a FIFO in the place of a kernel must not hang a thread of the host.
        # And by open() itself: os.fdopen() of a folder fails without closing it.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ImageError(f"{what} {path} is not a regular file")
            if status.st_size > MAX_KERNEL_BYTES:
                raise ImageError(f"{what} {path} is larger than {MAX_KERNEL_BYTES >> 20} MiB")
            return file.read(MAX_KERNEL_BYTES)
    except OSError as error:
        raise ImageError(f"{what} {path}: {error.strerror}") from None


@contextlib.contextmanager
def _gone_is_fine() -> Iterator[None]:
    try:
        yield
    except XenError as error:
        if error.errno not in (errno.ESRCH, errno.ENOENT):
            raise
