# SPDX-License-Identifier: GPL-2.0-only
"""What the toolstack remembers of each domain, and the history of what became of them.

libxl keeps a domain's configuration in a file (``/var/lib/xen/userdata-*``) and its waiting in a forked ``xl create``.
Here one process holds both: a :class:`DomainRecord` per domain, and one :class:`EventLog` that every waiter reads.
"""

from __future__ import annotations

import asyncio
import uuid as _uuid
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Final

from pyxen.abi.xen import DomId
from pyxen.errors import ConfigError, HostError
from pyxen.toolstack.config import check_name

if TYPE_CHECKING:
    from pyxen.toolstack.config import DomainConfig
    from pyxen.toolstack.services import ConsoleService

DOM0_NAME: Final = "Domain-0"
MAX_NAME_BYTES: Final = 240
"""A domain's name is part of a file name (``guest-NAME.log``), and those end at 255 bytes."""


class Phase(Enum):
    """Where a domain is between its first and its last hypercall."""

    BUILDING = "building"
    LIVE = "live"
    ENDED = "ended"
    """It has shut down (or crashed); its memory is still there until an ``on_*`` action or a person destroys it."""
    DYING = "dying"
    """Being torn down. A teardown that was cancelled leaves the record here, and can be run again."""
    GONE = "gone"


@dataclass(eq=False)
class DomainRecord:
    """One domain as the toolstack sees it. ``lock`` serialises whoever builds or destroys it."""

    domid: DomId
    name: str
    uuid: _uuid.UUID
    config: DomainConfig
    created_unix: float
    kernel_path: Path
    ramdisk_path: Path | None = None
    cwd: str | None = None
    """Where relative paths of the configuration start."""
    pv_mode: str | None = None
    target_kb: int | None = None
    """``memory/target`` as ``xl mem-set`` left it; None while it is the configuration's."""
    phase: Phase = Phase.BUILDING
    console: ConsoleService | None = None
    warnings: list[str] = field(default_factory=list)
    shutdown_reason: str | None = None
    """``poweroff``, ``reboot``, … once it has shut down."""
    abort: str | None = None
    """Set by someone who wants a build in progress to give up; the builder looks at it between two steps."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    over: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when the domain has ended, by itself or by being destroyed."""

    def ended(self, reason: str) -> None:
        """The domain has shut down."""
        self.phase = Phase.ENDED
        self.shutdown_reason = reason
        self.over.set()

    def check_abort(self) -> None:
        """Raise HostError when someone wants this build to give up."""
        if self.abort is not None:
            raise HostError(self.abort)

    @property
    def store_path(self) -> str:
        """The domain's home in xenstore (no trailing slash)."""
        return f"/local/domain/{self.domid}"

    @property
    def vm_path(self) -> str:
        return f"/vm/{self.uuid}"

    @property
    def libxl_path(self) -> str:
        return f"/libxl/{self.domid}"


class DomainTable:
    """Every domain the toolstack knows, by id and by name.

    A name is taken from the moment a build begins, so that two creates at once cannot both have it.
    """

    def __init__(self) -> None:
        self._by_domid: dict[DomId, DomainRecord] = {}
        self._reserved: set[str] = set()

    def __iter__(self) -> Iterator[DomainRecord]:
        return iter(sorted(self._by_domid.values(), key=lambda record: record.domid))

    def __len__(self) -> int:
        return len(self._by_domid)

    def reserve_name(self, name: str) -> None:
        """Take ``name`` for a domain that does not exist yet. Raises ConfigError as libxl's
        ``libxl__domain_rename`` does."""
        check_name(name)
        if len(name.encode(errors="surrogateescape")) > MAX_NAME_BYTES:
            raise ConfigError(f"domain name is longer than {MAX_NAME_BYTES} bytes")
        if name == DOM0_NAME or name in self._reserved or self.by_name(name) is not None:
            raise ConfigError(
                f'domain with name "{name}" already exists.', hint="destroy it first, or give the new one another name"
            )
        self._reserved.add(name)

    def release_name(self, name: str) -> None:
        self._reserved.discard(name)

    def add(self, record: DomainRecord) -> None:
        """Publish a record; its name's reservation (if any) becomes the record's."""
        self._by_domid[record.domid] = record
        self._reserved.discard(record.name)

    def remove(self, record: DomainRecord) -> None:
        self._by_domid.pop(record.domid, None)
        record.phase = Phase.GONE
        record.over.set()

    def rename(self, record: DomainRecord, name: str) -> None:
        """Give ``record`` another name. Raises ConfigError when the name is taken."""
        if name == record.name:
            return
        self.reserve_name(name)
        record.name = name
        self._reserved.discard(name)

    def get(self, domid: int) -> DomainRecord | None:
        return self._by_domid.get(DomId(domid))

    def by_name(self, name: str) -> DomainRecord | None:
        for record in self._by_domid.values():
            if record.name == name:
                return record
        return None

    def find(self, which: str | int) -> DomainRecord:
        """The domain called ``which``; digits are a domain id, as in ``libxl_domain_qualifier_to_domid``.

        Raises HostError with xl's words when there is none.
        """
        text = str(which)
        record = self.get(int(text)) if text.isdecimal() and text.isascii() and len(text) < 10 else self.by_name(text)
        if record is None:
            raise UnknownDomain(f"{text} is an invalid domain identifier (rc=-6)")
        return record


class UnknownDomain(HostError):
    """There is no domain of that name or id (xl: ``is an invalid domain identifier``)."""


@dataclass(frozen=True, slots=True)
class LifeEvent:
    """Something that happened to a domain. ``seq`` counts from 1 over the whole host and never repeats."""

    seq: int
    domid: DomId
    event: str
    """``created``, ``paused``, ``unpaused``, ``renamed``, ``shutdown``, ``restarted``, ``preserved``,
    ``action-failed``, ``destroyed``."""
    detail: dict[str, object]

    def to_json(self) -> dict[str, object]:
        return {"seq": self.seq, "domid": self.domid, "event": self.event, **self.detail}


class EventLog:
    """The last ``limit`` events, and a way to wait for the next one.

    Readers ask for what came after a sequence number, so that none is missed between two questions. A reader that
    falls more than ``limit`` behind
    loses the oldest: bounded memory is worth more than a complete history.
    """

    def __init__(self, limit: int = 4096) -> None:
        self._events: deque[LifeEvent] = deque(maxlen=limit)
        self._changed = asyncio.Event()
        self.seq = 0

    def add(self, domid: DomId, event: str, **detail: object) -> LifeEvent:
        self.seq += 1
        entry = LifeEvent(self.seq, domid, event, detail)
        self._events.append(entry)
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        return entry

    def since(self, seq: int, domid: int | None = None) -> list[LifeEvent]:
        """Events after ``seq``, oldest first; of one domain, or of all."""
        return [e for e in self._events if e.seq > seq and (domid is None or e.domid == domid)]

    async def wait(self, seq: int, domid: int | None = None, timeout_s: float | None = None) -> list[LifeEvent]:
        """As :meth:`since`, but wait until there is at least one; empty when ``timeout_s`` passes first."""
        try:
            async with asyncio.timeout(timeout_s):
                while not (events := self.since(seq, domid)):
                    await self._changed.wait()
        except TimeoutError:
            return []
        return events
