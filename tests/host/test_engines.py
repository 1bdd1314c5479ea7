# SPDX-License-Identifier: GPL-2.0-only
"""Several real engines: domains spread over them, move between them with the code they have changed, and may be
pinned."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from pyxen.host import DomainHandle, Host
from pyxen.hypervisor import schedule_homes
from pyxen.machine.cpu.base import RBX
from tests.host.small_guests import config, write_kernel

pytestmark = [pytest.mark.engine, pytest.mark.guest]


def in_loop(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run an asynchronous test."""

    @functools.wraps(test)
    def run(**fixtures: Any) -> None:
        asyncio.run(test(**fixtures))  # type: ignore[arg-type]

    return run


def home(host: Host, domain: DomainHandle) -> int:
    return host.hypervisor.domains[domain.domid].home


async def bounce(host: Host, domain: DomainHandle, moves: int) -> int:
    """Ask for the domain from the engine it is not on, until it has moved that often. Returns its last count."""
    inner = host.hypervisor.domains[domain.domid]
    moved, at = 0, inner.home
    while moved < moves:
        other = 1 - inner.home
        host.hypervisor.scheduler.claim(inner, other)
        for _ in range(200):
            if inner.home != at or domain.phase.name != "LIVE":
                break
            await asyncio.sleep(0)
        if inner.home != at:
            moved, at = moved + 1, inner.home
        assert not inner.is_shutting_down, host.dmesg()
    return (await domain.registers()).gpr[RBX]


@in_loop
async def test_busy_domains_are_on_different_engines(tmp_path: Path) -> None:
    kernel = write_kernel(tmp_path / "count", then="count")
    async with Host(memory="128M", cpus=2, max_engines=2) as host:
        domains = [await host.create(config(kernel, f"busy{i}")) for i in range(2)]
        await asyncio.sleep(0.2)
        assert {home(host, domain) for domain in domains} == {0, 1}
        assert all([(await domain.registers()).gpr[RBX] for domain in domains])


@in_loop
async def test_code_changed_on_one_engine_is_what_the_other_executes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule_homes, "HOME_TURN_NS", 20_000)
    kernel = write_kernel(tmp_path / "selfmod", then="selfmod")
    async with Host(memory="128M", cpus=2, max_engines=2) as host:
        domain = await host.create(config(kernel, "selfmod"))
        count = await bounce(host, domain, 400)
        assert count > 20
        assert all(pcpu.entries > 10 for pcpu in host.hypervisor.pcpus)


@in_loop
async def test_a_domain_moves_with_its_affinity(tmp_path: Path) -> None:
    kernel = write_kernel(tmp_path / "count", then="count")
    async with Host(memory="128M", cpus=2, max_engines=2) as host:
        domain = await host.create(config(kernel, "busy"))
        inner = host.hypervisor.domains[domain.domid]
        await asyncio.sleep(0.1)
        for cpu in (1, 0, 1):
            await asyncio.to_thread(
                host.hypervisor.scheduler.vcpu_set_affinity, inner.vcpus[0], frozenset({cpu}), None)
            for _ in range(5000):
                if inner.home == cpu:
                    break
                await asyncio.sleep(0.002)
            assert inner.home == cpu
            before = (await domain.registers()).gpr[RBX]
            await asyncio.sleep(0.05)
            assert (await domain.registers()).gpr[RBX] > before
            assert inner.vcpus[0].processor == cpu


@in_loop
async def test_a_domain_dies_wherever_it_is(tmp_path: Path) -> None:
    kernel = write_kernel(tmp_path / "count", then="count")
    async with Host(memory="128M", cpus=3, max_engines=3) as host:
        free = host.hypervisor.allocator.free_frames
        for _ in range(5):
            domains = [await host.create(config(kernel, f"busy{i}")) for i in range(5)]
            await asyncio.sleep(0.05)
            for domain in domains:
                await domain.destroy()
        assert host.hypervisor.allocator.free_frames == free
        assert "internal error" not in host.dmesg()
