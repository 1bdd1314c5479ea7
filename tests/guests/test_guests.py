# SPDX-License-Identifier: GPL-2.0-only
"""Each guest of guests/ runs in both PV modes; a line "FAIL ..." of it is a failure here."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from pyxen.host import Host
from tests.guests.conftest import Outcome, check_host, config, run

pytestmark = [pytest.mark.guest, pytest.mark.engine]

GROUPS = ["hello", "traps", "iret", "user", "segments", "pagetables", "events", "timers", "misc", "memory", "grants",
          "liar"]
KNOWN = {
    ("traps", "data_watchpoint"): "the emulated CPU has no data breakpoints (SUPPORT.md)",
}


async def boot(kernel: Path, mode: str, extra: str) -> Outcome:
    async with Host(memory="128M", cpus=1, pv_mode=mode) as host:
        free = host.hypervisor.allocator.free_frames
        outcome = await run(await host.create(config(kernel, extra), paused=True))
        check_host(host, free)
        return outcome


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("name", GROUPS)
def test_guest(guests: Path, name: str, mode: str) -> None:
    outcome = asyncio.run(boot(guests / name, mode, "fast=1" if mode == "fast" else ""))
    unexpected = {test: why for test, why in outcome.failed.items() if (name, test) not in KNOWN}
    assert not unexpected
    assert outcome.reason == "poweroff"
    assert outcome.finished, outcome.lines
    for group, test in KNOWN:
        if group == name:
            assert test in outcome.failed, f"{test} works now: take it off the list"


def test_every_guest_is_run(guests: Path) -> None:
    from tests.guests.test_smp import GUESTS

    assert {path.stem for path in (guests.parent / "src").glob("*.c")} == set(GROUPS) | set(GUESTS)
