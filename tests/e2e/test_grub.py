# SPDX-License-Identifier: GPL-2.0-only
"""A PV kernel that is neither Linux nor ours: GRUB's x86_64-xen image, as pvgrub users boot it."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from pathlib import Path

import pytest

import pyxen

MODULES = Path("/usr/lib/grub/x86_64-xen")
SCRIPT = """
echo "grub sees $grub_cpu-$grub_platform"
halt
"""

pytestmark = [
    pytest.mark.guest,
    pytest.mark.skipif(
        shutil.which("grub-mkimage") is None or not MODULES.is_dir(), reason="needs grub-common and grub-xen-bin"
    ),
]


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grub")
    script, output = folder / "grub.cfg", folder / "grub.elf"
    script.write_text(SCRIPT)
    command = ["grub-mkimage", "-O", "x86_64-xen", "-d", str(MODULES), "-o", str(output), "-c", str(script), "-p", "/"]
    subprocess.run([*command, "normal", "echo", "halt"], check=True, capture_output=True, timeout=60)
    return output


@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_grub_runs_its_script_and_halts(image: Path, mode: str) -> None:
    async def run() -> tuple[bytes, str]:
        async with pyxen.Host(memory="256M") as host:
            domain = await host.create(f'name="grub"\nkernel="{image}"\nmemory=64\npv_mode="{mode}"\n', paused=True)
            console = domain.console
            await domain.unpause()
            async with asyncio.timeout(60):
                return await console.read_to_end(), await domain.wait()

    said, reason = asyncio.run(run())
    assert b"grub sees x86_64-xen" in said
    assert reason == "poweroff"
