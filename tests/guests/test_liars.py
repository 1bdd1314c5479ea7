# SPDX-License-Identifier: GPL-2.0-only
"""A guest that lies hurts itself only: an honest one beside it does its work, and the host keeps every frame."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from pyxen.host import Host
from tests.guests.conftest import Outcome, check_host, config, run

pytestmark = [pytest.mark.guest, pytest.mark.engine]


async def beside_an_honest_guest(guests: Path, extra: str, mode: str) -> tuple[Outcome, Outcome]:
    async with Host(memory="128M", cpus=1, pv_mode=mode) as host:
        free = host.hypervisor.allocator.free_frames
        honest = await host.create(config(guests / "memory", name="honest"), paused=True)
        liar = await host.create(config(guests / "liar", extra), paused=True)
        outcomes = await asyncio.gather(run(honest), run(liar, timeout_s=15))
        check_host(host, free)
        return outcomes[0], outcomes[1]


@pytest.mark.parametrize("seed", range(1, 5))
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_a_liar_that_spares_itself_survives(guests: Path, mode: str, seed: int) -> None:
    honest, liar = asyncio.run(beside_an_honest_guest(guests, f"seed={seed * 1009} rounds=3000", mode))
    assert liar.reason == "poweroff"
    assert liar.passed == ["lies", "still_sane"]
    assert (honest.reason, honest.failed, honest.finished) == ("poweroff", {}, True)


@pytest.mark.parametrize("wild", [1, 2])
@pytest.mark.parametrize("seed", range(1, 7))
def test_a_wild_liar_may_crash_but_alone(guests: Path, wild: int, seed: int) -> None:
    mode = "fast" if seed % 2 else "exact"
    honest, liar = asyncio.run(beside_an_honest_guest(guests, f"seed={seed * 7919} rounds=2000 wild={wild}", mode))
    # However it ended (poweroff, a reason that is no reason, VCPUOP_down of its only vCPU), the end was its own.
    assert liar.reason
    assert (honest.reason, honest.failed, honest.finished) == ("poweroff", {}, True)
