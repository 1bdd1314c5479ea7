# SPDX-License-Identifier: GPL-2.0-only
"""What happens when a domain ends by itself: ``on_poweroff``, ``on_reboot``, ``on_crash``, ``on_watchdog``.

On a real host a forked ``xl create`` waits for each domain (xl: ``handle_domain_death``, ``preserve_domain``). Here one
:class:`Lifecycle` waits for all of them, in libxl's way: VIRQ_DOM_EXC belongs to xenstored, which fires
``@releaseDomain``.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
import uuid as _uuid
from collections.abc import Callable, Coroutine
from typing import Any, Final

from pyxen.toolstack.domains import DomainRecord, Phase
from pyxen.toolstack.info import shutdown_reason
from pyxen.toolstack.operations import Operations
from pyxen.toolstack.services import first_line

log = logging.getLogger("pyxen.toolstack")

MINIMUM_LIFE_S: Final = 2.0
"""A domain is not restarted sooner than this after its creation, so that a guest that crashes at once cannot keep
the host
busy with building it. (xl sleeps two seconds before each restart.)"""


class Lifecycle:
    """Notices domains that have shut down, tells everyone, and does what their configuration says."""

    def __init__(self, operations: Operations, *, minimum_life_s: float = MINIMUM_LIFE_S) -> None:
        self.operations = operations
        self.minimum_life_s = minimum_life_s
        self._tasks: set[asyncio.Task[None]] = set()
        self._unbind: Callable[[], None] | None = None
        self._closing = False

    def start(self) -> None:
        """Listen from now on (call on the event loop's thread)."""
        self._unbind = self.operations.services.registry.watch_releases(self.look)

    async def close(self) -> None:
        """Stop listening; actions under way are cancelled (and leave their domains for whoever closes the host)."""
        self._closing = True
        if self._unbind is not None:
            self._unbind()
            self._unbind = None
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def look(self) -> None:
        """Find domains that have shut down since the last look, and act on each."""
        if self._closing:
            return
        for record in self.operations.table:
            if record.phase is not Phase.LIVE:
                continue
            info = self.operations.services.privcmd.domain_info(record.domid)
            if info is not None and info.shutdown:
                self._ended(record, info.shutdown_code)

    def _ended(self, record: DomainRecord, code: int) -> None:
        reason = shutdown_reason(code)
        action = action_for(record, reason)
        record.ended(reason)
        self.operations.events.add(record.domid, "shutdown", reason=reason, action=action)
        log.info("domain %d (%s) has shut down, reason %s; action %s", record.domid, record.name, reason, action)
        self._start(self._act(record, action))

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _act(self, record: DomainRecord, action: str) -> None:
        try:
            if record.phase is not Phase.ENDED:
                return  # a person was quicker
            if action == "destroy":
                await self.operations.destroy(record)
            elif action == "restart":
                await self._restart(record)
            elif action == "rename-restart":
                await self._rename_and_restart(record)
            else:
                self.operations.events.add(record.domid, "preserved", name=record.name)
        except Exception as error:
            log.error(
                "domain %d (%s): %s failed: %s", record.domid, record.name, action, first_line(error), exc_info=error
            )
            self.operations.events.add(record.domid, "action-failed", action=action, error=first_line(error))

    async def _restart(self, record: DomainRecord) -> None:
        await self._live_long_enough(record)
        await self.operations.destroy(record)
        await self._create_again(record, record.name, str(record.uuid))

    async def _rename_and_restart(self, record: DomainRecord) -> None:
        await self._live_long_enough(record)
        name, uuid = record.name, str(record.uuid)
        await self.operations.preserve(record, self._name_for_preserved(name), _uuid.uuid4())
        self.operations.events.add(record.domid, "preserved", name=record.name)
        await self._create_again(record, name, uuid)

    async def _live_long_enough(self, record: DomainRecord) -> None:
        lived = self.operations.services.now_unix() - record.created_unix
        if 0 <= lived < self.minimum_life_s:
            await asyncio.sleep(self.minimum_life_s - lived)

    async def _create_again(self, record: DomainRecord, name: str, uuid: str) -> None:
        config = dataclasses.replace(record.config, name=name, uuid=uuid)
        again = await self.operations.create(config, pv_mode=record.pv_mode, cwd=record.cwd)
        self.operations.events.add(record.domid, "restarted", name=name, new_domid=again.domid)
        self.look()  # it may have ended while we were not listening to it yet

    def _name_for_preserved(self, name: str) -> str:
        stamp = time.strftime("-%Y%m%dT%H%MZ", time.gmtime(self.operations.services.now_unix()))
        candidate, number = name + stamp, 1
        while self.operations.table.by_name(candidate) is not None:
            number += 1
            candidate = f"{name}{stamp}-{number}"
        return candidate


def action_for(record: DomainRecord, reason: str) -> str:
    """What the configuration wants done after ``reason`` (xl: ``handle_domain_death``)."""
    config = record.config
    match reason:
        case "poweroff":
            return config.on_poweroff
        case "reboot":
            return config.on_reboot
        case "suspend":
            return "preserve"
        case "crash":
            return config.on_crash
        case "watchdog":
            return config.on_watchdog
        case _:
            return "destroy"
