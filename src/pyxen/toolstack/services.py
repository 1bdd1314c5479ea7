# SPDX-License-Identifier: GPL-2.0-only
"""What the toolstack's operations stand on, as they see it: dom0's control interface, xenstored, consoles, the clock.

Operations take these as one :class:`Services` value, so that a test can run every step of a create against doubles
that fail on purpose.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pyxen.abi.xen import DomId, EvtchnPort

if TYPE_CHECKING:
    from pyxen.hypervisor.privcmd import PrivCmd
    from pyxen.toolstack.build.kernel import KernelImage, PvhImage
    from pyxen.toolstack.domains import DomainRecord
    from pyxen.toolstack.store_entries import Store

T = TypeVar("T")


class ConsoleService(Protocol):
    """One domain's console: its ring is served, its output logged, its socket accepts readers."""

    path: Path
    """The unix socket that ``xl console`` attaches to."""

    async def close(self) -> None:
        """Drain the ring into the log and the readers, close them, remove the socket. Idempotent."""
        ...


class ConsoleServices(Protocol):
    """Makes consoles."""

    def socket_path(self, domid: DomId) -> Path: ...

    async def open(self, record: DomainRecord, ring_gfn: int, port: int) -> ConsoleService:
        """Serve the console ring in frame ``ring_gfn`` of the domain, whose own end of the event channel is
        ``port``."""
        ...


class Registry(Protocol):
    """xenstored's management of guests (XS_INTRODUCE, XS_RELEASE); it fires ``@releaseDomain`` by itself."""

    def introduce(self, domid: int, gfn: int, port: int) -> None: ...

    def release(self, domid: int) -> None:
        """Forget the domain. Raises XenError(ENOENT) for one that was never introduced."""
        ...

    def watch_releases(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call back, on the event loop, when a domain has shut down or gone (``@releaseDomain``).

        Returns how to stop.
        """
        ...


class Builder(Protocol):
    """Loads a guest into a domain that has been created (``toolstack.build``)."""

    async def __call__(
        self,
        privcmd: PrivCmd,
        record: DomainRecord,
        kernel: KernelImage | PvhImage,
        ramdisk: bytes | None,
        store_port: EvtchnPort,
        console_port: EvtchnPort,
    ) -> BuiltRings: ...


@dataclass(frozen=True, slots=True)
class BuiltRings:
    """Frames of the two rings a guest is born with, as the guest numbers them (a PV guest: machine frames)."""

    store_gfn: int
    console_gfn: int


@dataclass
class Services:
    """Everything the operations use."""

    privcmd: PrivCmd
    store: Store
    registry: Registry
    consoles: ConsoleServices
    build: Builder
    now_unix: Callable[[], float]
    executor: Executor
    """For work that would keep the event loop waiting: files, decompression, long control calls."""


async def in_thread(executor: Executor, work: Callable[[], T]) -> T:
    """``work()`` in another thread, waited for even when we are cancelled.

    ``asyncio.to_thread`` would leave the thread running behind a cancelled caller's back, and what it does next (to a
    domain that is being torn down) nobody would see.
    """
    future = asyncio.get_running_loop().run_in_executor(executor, work)
    try:
        return await asyncio.shield(future)
    except asyncio.CancelledError:
        await _settled(future)
        raise


async def to_the_end(work: Coroutine[Any, Any, T]) -> T:
    """``work``, which goes on to its end even when the caller is cancelled; the cancellation is raised afterwards.

    For cleaning up: a second Ctrl-C must not leave half of it undone.
    """
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await _settled(task)
        raise


async def _settled(future: asyncio.Future[Any]) -> None:
    while not future.done():
        try:
            await asyncio.wait({future})
        except asyncio.CancelledError:
            continue
    if not future.cancelled():
        future.exception()  # the caller is told of the cancellation; this one has been seen too


def first_line(error: BaseException) -> str:
    """An error as one line of text."""
    return " ".join(str(error).split()) or type(error).__name__
