# SPDX-License-Identifier: GPL-2.0-only
"""PVH guests through the whole host: Debian's kernel, and GRUB's 32-bit PVH image."""

from __future__ import annotations

import asyncio
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import pyxen
from pyxen.domain_handle import DomainHandle
from pyxen.toolstack.guests.initramfs import FIRST_USER_LINE
from tests.e2e.test_debian import TROUBLE

pytestmark = [pytest.mark.guest, pytest.mark.engine, pytest.mark.timeout(300)]

GRUB_MODULES = Path("/usr/lib/grub/i386-xen_pvh")
GRUB_SCRIPT = """
echo "grub sees $grub_cpu-$grub_platform"
halt
"""


@pytest.fixture(scope="session")
def debian_pvh(debian: Path) -> Path:
    return debian.with_name("debian-pvh.cfg")


@pytest.mark.slow
@pytest.mark.parametrize("vcpus", [1, 4])
def test_debian_as_a_pvh_guest(debian_pvh: Path, vcpus: int) -> None:
    """It sees what its configuration promised, powers off when asked, and had nothing to complain of."""

    async def ask(domain: DomainHandle, command: str, answer: bytes) -> bytes:
        await domain.console.write(f"{command}; echo don''e\n")
        said = await domain.console.expect(b"\ndone\r\n", timeout=60)
        assert re.search(answer, said), said
        return said

    async def run() -> None:
        async with pyxen.Host(memory="1G") as host:
            domain = await host.create(debian_pvh, extra=[f"vcpus={vcpus}"])
            await domain.console.expect(FIRST_USER_LINE.encode(), timeout=90)
            await domain.console.expect(b"/ # ", timeout=60)
            await ask(domain, "nproc", rb"\n%d\r\n" % vcpus)
            await ask(domain, "cat /sys/hypervisor/guest_type", rb"\nPVH\r\n")
            await ask(domain, "cat /sys/firmware/acpi/tables/APIC | wc -c", rb"\n%d\r\n" % (44 + 8 * vcpus))
            (row,) = [row for row in host.rows() if row["domid"] == domain.domid]
            await ask(domain, "cat /sys/hypervisor/uuid", str(row["uuid"]).encode())
            await ask(domain, "grep MemTotal /proc/meminfo", rb"MemTotal: +2[0-9]{5} kB")
            log = await ask(domain, "dmesg", rb"Booting (paravirtualized )?kernel on Xen PVH")
            assert not TROUBLE.findall(log.decode(errors="replace")), log
            assert b"ACPI Error" not in log
            assert (row["type"], row["pv_mode"], row["vcpus"]) == ("pvh", None, vcpus)
            await domain.shutdown()
            async with asyncio.timeout(60):
                assert await domain.wait() == "poweroff"
            assert "crash" not in host.privcmd.console_ring()

    asyncio.run(run())


@pytest.mark.slow
def test_debian_pvh_reboots(debian_pvh: Path) -> None:
    async def run() -> None:
        async with pyxen.Host(memory="1G") as host:
            domain = await host.create(debian_pvh)
            await domain.console.expect(b"/ # ", timeout=90)
            await domain.reboot()
            async with asyncio.timeout(60):
                again = await domain.successor()
            await again.console.expect(FIRST_USER_LINE.encode(), timeout=90)

    asyncio.run(run())


@pytest.mark.skipif(
    shutil.which("grub-mkimage") is None or not GRUB_MODULES.is_dir(), reason="needs grub-common and grub-xen-bin"
)
def test_grubs_32_bit_image_runs_its_script(tmp_path: Path) -> None:
    script, image = tmp_path / "grub.cfg", tmp_path / "grub.elf"
    script.write_text(GRUB_SCRIPT)
    command = ["grub-mkimage", "-O", "i386-xen_pvh", "-d", str(GRUB_MODULES), "-o", str(image), "-c", str(script)]
    subprocess.run([*command, "-p", "/", "normal", "echo", "halt"], check=True, capture_output=True, timeout=60)

    async def run() -> tuple[bytes, str]:
        async with pyxen.Host(memory="256M") as host:
            domain = await host.create(f'name="grub"\ntype="pvh"\nkernel="{image}"\nmemory=64\n', paused=True)
            console = domain.console
            await domain.unpause()
            async with asyncio.timeout(60):
                return await console.read_to_end(), await domain.wait()

    said, reason = asyncio.run(run())
    assert b"grub sees i386-xen_pvh" in said
    assert reason == "poweroff"
