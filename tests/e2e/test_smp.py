# SPDX-License-Identifier: GPL-2.0-only
"""Debian's kernel with many vCPUs: all of them come up, take interrupts and work."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.e2e.place import Place, Terminal, wait_until
from tests.e2e.test_debian import TROUBLE

pytestmark = [pytest.mark.guest, pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(400)]

BOOT_S = 150.0


def answer(terminal: Terminal, command: str, patience_s: float = 60.0) -> str:
    """What a command prints in the guest's shell."""
    terminal.type(f"echo BEG''IN; {command}; echo DO''NE\r")
    return terminal.expect("DONE", patience_s).replace("\r", "").rpartition("BEGIN\n")[2].rpartition("DONE")[0]


@pytest.mark.parametrize(("vcpus", "mode"), [(4, "exact"), (32, "fast")])
def test_debian(place: Place, debian: Path, vcpus: int, mode: str) -> None:
    terminal = place.terminal("create", "-c", str(debian), f"vcpus={vcpus}", f'pv_mode="{mode}"')
    try:
        terminal.expect("/ # ", BOOT_S)
        assert answer(terminal, "nproc").strip() == str(vcpus)
        assert answer(terminal, "cat /sys/devices/system/cpu/online").strip() == f"0-{vcpus - 1}"
        # Each vCPU works, and only where it was told to: a process bound to it sees itself there.
        each = answer(terminal, f"for i in $(seq 0 {vcpus - 1}); do taskset $(printf %x $((1 << i))) "
                                "awk '{print $39}' /proc/self/stat; done", BOOT_S)
        assert [int(line) for line in each.split()] == list(range(vcpus))
        interrupts = {line.split()[-1]: line.split()[1 : 1 + vcpus]
                      for line in answer(terminal, "cat /proc/interrupts").splitlines() if "percpu" in line}
        assert {f"resched{n}" for n in (0, vcpus - 1)} <= set(answer(terminal, "cat /proc/interrupts").split())
        for n in range(vcpus):
            timer, function = interrupts[f"timer{n}"], interrupts[f"callfunc{n}"]
            assert int(timer[n]) > 0, f"no timer interrupt on vCPU {n}"
            assert sum(map(int, timer)) == int(timer[n]), f"timer of vCPU {n} elsewhere: {timer}"
            assert len(function) == vcpus
        steal = re.findall(r"^cpu[0-9]+ (.*)$", answer(terminal, "cat /proc/stat"), re.MULTILINE)
        assert len(steal) == vcpus
        assert sum(int(line.split()[7]) for line in steal) > 0  # they share one engine: somebody waited
        row = place.xl("list", "debian").stdout.splitlines()[1].split()
        assert row[3] == str(vcpus)
        listed = place.xl("vcpu-list", "debian").stdout.splitlines()[1:]
        assert len(listed) == vcpus
        assert not any("-p-" in line or "--p" in line for line in listed)
        place.xl("shutdown", "-w", "debian")
        wait_until(lambda: place.names() == ["Domain-0"])
    finally:
        terminal.close()
    log = (place.rundir / "log" / "guest-debian.log").read_text(errors="replace")
    assert f"Brought up 1 node, {vcpus} CPUs" in log
    # Linux finds the APIC ids of a PV guest's CPUs odd, on Xen too.
    assert not TROUBLE.findall(re.sub(r"\[Firmware Bug\]: CPU[0-9]+: APIC id mismatch", "", log)), log
    assert "crash" not in place.xl("dmesg").stdout
