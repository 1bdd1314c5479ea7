# SPDX-License-Identifier: GPL-2.0-only
"""The host as a Python object, with Debian in it: the README's example, looking inside, and leaving nothing behind."""

from __future__ import annotations

import asyncio
import gc
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pyxen
from pyxen.machine.cpu.base import RIP
from pyxen.toolstack.config.paths import guest_dir
from pyxen.toolstack.guests.initramfs import FIRST_USER_LINE
from tests.e2e.place import SOURCE, Place
from tests.host import leftovers
from tests.host.small_guests import config, write_kernel

pytestmark = [pytest.mark.guest, pytest.mark.engine, pytest.mark.timeout(300)]

ROOT = Path(__file__).resolve().parents[2]
BOOT_S = 90.0


def test_the_readmes_example_runs_as_it_is(debian: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == 1
    env = {"PYTHONPATH": SOURCE, "PATH": "/usr/bin:/bin", "HOME": str(Path.home())}
    done = subprocess.run([sys.executable, "-c", blocks[0]], cwd=ROOT, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-2:] == ["debian", "poweroff"]


@pytest.mark.slow
def test_looking_inside_a_running_linux(debian: Path) -> None:
    async def main() -> None:
        async with pyxen.Host(memory="1G", pv_mode="fast") as host:
            domain = await host.create(debian, extra=['extra="console=hvc0 quiet"'])
            await domain.console.expect(FIRST_USER_LINE, BOOT_S)
            await domain.console.expect("/ # ", BOOT_S)
            await domain.console.write("grep -w linux_banner /proc/kallsyms; echo end\n")
            said = await domain.console.expect(re.compile(rb"\n([0-9a-f]{16}) D linux_banner\r"), 30)
            found = re.search(rb"\n([0-9a-f]{16}) D", said)
            assert found is not None
            await domain.console.write("while :; do :; done\n")
            modes = set()
            for _ in range(20):  # the kernel can be read wherever the vCPU is
                banner = await domain.read_memory(int(found[1], 16), 64)
                assert banner.startswith(b"Linux version 6.")
                modes.add((await domain.registers()).gpr[RIP] >> 63)
                await asyncio.sleep(0.02)
            assert 0 in modes  # user mode
            await domain.pause()
            registers = await domain.registers()
            again = await domain.registers()
            assert list(again.gpr) == list(registers.gpr)  # paused
            code = await domain.read_memory(registers.gpr[RIP], 16)
            assert len(code) == 16
            await domain.unpause()
            await domain.console.write("\x03")
            await domain.xenstore.write("data/hello", "from dom0")
            assert await domain.xenstore.read("data/hello") == "from dom0"
            assert await domain.xenstore.read("control/feature-poweroff") == "1"
            assert {"feature-poweroff", "shutdown"} <= set(await domain.xenstore.ls("control"))
            ring = await domain.read_frame(int(await domain.xenstore.read("console/ring-ref")))
            assert b"linux_banner" in ring
            counters = domain.counters
            assert counters["hypercalls"] > 10_000
            await domain.shutdown()
            assert await asyncio.wait_for(domain.wait(), BOOT_S) == "poweroff"
            await domain.wait_gone()

    asyncio.run(main())


def test_a_ramdisk_cut_short_is_the_guests_own_panic(place: Place, tmp_path: Path, debian: Path) -> None:
    """Linux panics, Xen reports the crash; others would not notice."""
    whole = (guest_dir("debian") / "initramfs.img").read_bytes()
    (tmp_path / "cut").write_bytes(whole[:4096])
    changes = [f'ramdisk="{tmp_path}/cut"', 'on_crash="destroy"', 'extra="console=hvc0"']
    done = place.xl("create", "-F", str(debian), *changes)
    assert "Domain 1 has shut down, reason code 3 0x3\n" in done.stderr
    assert "not syncing" in (place.rundir / "log" / "guest-debian.log").read_text(errors="replace")
    assert place.names() == ["Domain-0"]


def test_closing_a_host_with_running_guests_leaves_nothing(tmp_path: Path, debian: Path) -> None:
    spin, block = write_kernel(tmp_path / "s", then="spin"), write_kernel(tmp_path / "b", then="block")

    async def main() -> Path:
        async with pyxen.Host(memory="512M", cpus=2) as host:
            await host.create(config(spin, "spins"))
            waits = await host.create(config(block, "waits"))
            await host.create(config(block, "paused"), paused=True)
            linux = await host.create(debian)
            await waits.console.expect("hello", 30)
            await linux.console.expect("Linux version", 60)
            return host.rundir

    asyncio.run(main())  # what is made once for the whole process is made here
    gc.collect()
    before = leftovers.of_process()
    rundir = asyncio.run(main())
    gc.collect()
    assert leftovers.of_process() == before
    assert not rundir.exists()


def test_shares_follow_weights(tmp_path: Path) -> None:
    """Two guests that never stop computing, 1 : 3, on one engine (benchmarks/fairness.py measures more, to 5 %)."""
    spin = write_kernel(tmp_path / "spin", then="spin")

    async def main() -> float:
        async with pyxen.Host(memory="64M", cpus=1) as host:
            light = await host.create(config(spin, "light", "cpu_weight = 256"))
            heavy = await host.create(config(spin, "heavy", "cpu_weight = 768"))
            await asyncio.sleep(0.5)

            def used() -> tuple[int, int]:
                times = {row["domid"]: int(str(row["cpu_time_ns"])) for row in host.rows()}
                return times[light.domid], times[heavy.domid]

            before = used()
            await asyncio.sleep(3)
            after = used()
            return (after[1] - before[1]) / (after[0] - before[0])

    assert 2.5 < asyncio.run(main()) < 3.5
