# SPDX-License-Identifier: GPL-2.0-only
"""Our own guests (guests/), built and run on a host of their own."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from pyxen.host import DomainHandle, Host

GUESTS = Path(__file__).parents[2] / "guests"


@dataclass
class Outcome:
    """How one guest ended, and what it printed."""

    reason: str
    lines: list[str]

    @property
    def passed(self) -> list[str]:
        return [line.removeprefix("PASS ") for line in self.lines if line.startswith("PASS ")]

    @property
    def failed(self) -> dict[str, str]:
        """Test -> why."""
        found = (line.removeprefix("FAIL ").partition(": ") for line in self.lines if line.startswith("FAIL "))
        return {name: why for name, _, why in found}

    @property
    def finished(self) -> bool:
        return any(line.startswith("DONE ") for line in self.lines)


@pytest.fixture(scope="session")
def guests() -> Path:
    """The folder of built guests."""
    if shutil.which("gcc") is None or shutil.which("make") is None:
        pytest.skip("our guests need gcc and make")
    subprocess.run(["make", "--no-print-directory", "-C", str(GUESTS)], check=True)
    return GUESTS / "build"


def config(kernel: Path, extra: str = "", name: str | None = None, vcpus: int = 1) -> str:
    kind = "pvh" if kernel.suffix == ".pvh" else "pv"
    return "\n".join([
        f'name = "{name or kernel.name}"', f'type = "{kind}"', f'kernel = "{kernel}"', f'extra = "{extra}"', "memory = 16",
        *(["maxmem = 17"] if kind == "pv" else []),
        f"vcpus = {vcpus}", 'on_poweroff = "destroy"', 'on_crash = "destroy"', 'on_reboot = "destroy"',
    ]) + "\n"


async def run(domain: DomainHandle, timeout_s: float = 60) -> Outcome:
    """Start a guest that was created paused (it may be gone in milliseconds, and its console with it), wait for its end
    or destroy it; read its console to the end."""
    console = domain.console
    output = asyncio.ensure_future(console.read_to_end())
    await asyncio.sleep(0)
    await domain.unpause()
    try:
        async with asyncio.timeout(timeout_s):
            reason = await domain.wait()
            await domain.wait_gone()
    except TimeoutError:
        reason = "timeout"
        await domain.destroy()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(10):
            await output
    text = output.result() if output.done() and not output.cancelled() else b""
    return Outcome(reason, text.decode(errors="replace").replace("\r", "").splitlines())


def check_host(host: Host, free_frames: int) -> None:
    """Whatever its guests did, the host has all its frames again and met no error of its own."""
    dmesg = host.dmesg()
    assert "internal error" not in dmesg, dmesg
    assert "Traceback" not in dmesg, dmesg
    assert host.hypervisor.allocator.free_frames == free_frames
