# SPDX-License-Identifier: GPL-2.0-only
"""Debian's kernel as a person meets it: console, shell, xenstore, shutdown, reboot. A boot costs seconds, so one guest
serves all questions and a reboot gives the second."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from pyxen.toolstack.guests.initramfs import FIRST_USER_LINE
from tests.e2e.place import Place, wait_until

pytestmark = [pytest.mark.guest, pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(300)]

TROUBLE = re.compile(r"BUG|WARNING|Oops|Call Trace|Error -[0-9]+|rcu.*stall|soft lockup|not syncing")
BOOT_S = 60.0
ORACLE_DOMID = 3


def test_a_life_with_reboot_and_shutdown(place: Place, debian: Path) -> None:
    """From nothing running: the first ``xl`` starts the host too."""
    terminal = place.terminal("create", "-c", str(debian))
    try:
        terminal.expect(FIRST_USER_LINE, BOOT_S)
        terminal.expect("/ # ", BOOT_S)
        commands_answer(place)
        second_reader_sees_and_types(place, terminal)
        the_guest_is_in_xenstore(place)
        paused_means_paused(place)
        place.xl("reboot", "debian")
        terminal.expect("Restarting system", BOOT_S)
        terminal.expect(FIRST_USER_LINE, BOOT_S)  # the console follows
        assert place.xl("domid", "debian").stdout == "2\n"
        terminal.expect("/ # ", BOOT_S)
        terminal.type("\x1d")
        assert terminal.wait() == 0
        assert terminal.modes() == terminal.before
    finally:
        terminal.close()
    done = place.xl("shutdown", "-w", "debian")
    assert "Domain 2 has been shut down, reason code 0" in done.stderr
    wait_until(lambda: place.names() == ["Domain-0"])
    tree = place.tree()
    ours = re.compile(r"/(local/domain|libxl)/[12](/|$)|/vm/|/local/domain/0/backend")
    assert not [path for path in tree if ours.match(path)]
    log = (place.rundir / "log" / "guest-debian.log").read_text(errors="replace")
    assert log.count("Linux version") == 2
    assert not TROUBLE.findall(log), log
    dmesg = place.xl("dmesg").stdout
    assert "crash" not in dmesg, dmesg
    assert "internal error" not in dmesg, dmesg


def commands_answer(place: Place) -> None:
    row = place.xl("list", "debian").stdout.splitlines()[1]
    assert re.fullmatch(r"debian +1 +256 +1     [rb-]{2}-{4} +[0-9]+\.[0-9]", row), row
    assert place.state("debian") in ("-b----", "r-----", "------")
    counters = place.api("/domains/1")["counters"]
    assert counters["hypercalls"] > 10_000
    vcpus = place.xl("vcpu-list", "debian").stdout.splitlines()
    assert re.fullmatch(r"debian +1 +0 +[0-9-]+ +[rb-]{3} +[0-9.]+  all / all", vcpus[1])


def second_reader_sees_and_types(place: Place, first: object) -> None:
    """``xl console`` shows what was said before, and what it types reaches the same shell; both see the answer."""
    from tests.e2e.place import Terminal

    assert isinstance(first, Terminal)
    second = place.terminal("console", "debian")
    try:
        second.expect(FIRST_USER_LINE)
        second.type("echo $((6 * 7))-$(cat /sys/hypervisor/type)-$(cat /sys/hypervisor/version/major)\r")
        second.expect("\n42-xen-4\r")
        first.expect("\n42-xen-4\r")
        first.type("cat /sys/hypervisor/uuid\r")
        uuid = place.xl("vm-list").stdout.splitlines()[2].split()[0]
        second.expect(uuid)
        second.type("\x1d")
        assert second.wait() == 0
        assert second.modes() == second.before
    finally:
        second.close()


def paused_means_paused(place: Place) -> None:
    place.xl("pause", "debian")
    used = place.api("/domains/1")["cpu_time_ns"]
    assert place.state("debian") in ("--p---", "-bp---")
    place.xl("rename", "debian", "other")
    assert place.api("/domains/other")["cpu_time_ns"] == used
    place.xl("rename", "other", "debian")
    place.xl("unpause", "debian")


def the_guest_is_in_xenstore(place: Place) -> None:
    """Its tree is that of a PV guest on a real host, less the disk, the vif and what differs by its nature."""
    ours = {path.replace("/local/domain/1", "HOME"): node for path, node in place.tree("/local/domain/1").items()}
    assert ours["HOME/control/feature-poweroff"] == ("1", ("n1",))  # written by the guest
    assert ours["HOME/control/feature-reboot"] == ("1", ("n1",))
    assert ours["HOME/control/shutdown"] == ("", ("n1",))
    assert ours["HOME/memory/target"] == (str(256 * 1024), ("n0", "r1"))
    oracle = Path("/work/shared/oracle/state/xenstore-ls-fp.txt")
    if oracle.exists():
        expected = oracle_home(oracle.read_text())
        differing = {
            path: (permissions, ours.get(path, ("", ()))[1])
            for path, permissions in expected.items()
            if ours.get(path, ("", ()))[1] != permissions
        }
        assert not differing
        assert not ours.keys() - expected.keys()
    if shutil.which("xenstore-ls") is not None:  # the real client
        env = {**place.env, "XENSTORED_PATH": str(place.rundir / "xenstored" / "socket")}
        listing = subprocess.run(["xenstore-ls", "-f", "/local/domain/1"], env=env, capture_output=True, text=True)
        assert '/local/domain/1/name = "debian"' in listing.stdout, listing.stderr


def oracle_home(listing: str) -> dict[str, tuple[str, ...]]:
    """Permissions of the oracle's PV domain, as if it had been domain 1."""
    found: dict[str, tuple[str, ...]] = {}
    for line in listing.splitlines():
        path, _, rest = line.partition(" = ")
        home = f"/local/domain/{ORACLE_DOMID}"
        if (path != home and not path.startswith(home + "/")) or "/device/v" in path:
            continue
        letters = rest.rpartition("(")[2].rstrip(")").replace(str(ORACLE_DOMID), "1").split(",")
        found[path.replace(home, "HOME")] = tuple(letters)
    return found
