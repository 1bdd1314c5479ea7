# SPDX-License-Identifier: GPL-2.0-only
"""The life of guests through ``xl``: guests of a few dozen bytes, so that each case costs a moment."""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

import pytest

from tests.e2e.place import Place, command, wait_until
from tests.host.small_guests import CRASH, POWEROFF, REBOOT, config, write_kernel

pytestmark = [pytest.mark.guest, pytest.mark.engine, pytest.mark.timeout(120)]


def guest(tmp_path: Path, then: str | int, *lines: str, name: str = "small", text: bytes = b"hello\n") -> str:
    """A configuration file of a guest that prints and then does something."""
    file = tmp_path / f"{name}.cfg"
    file.write_text(config(write_kernel(tmp_path / f"{name}.elf", text, then), name, *lines) + "\n")
    return str(file)


def test_the_verbs(place: Place, tmp_path: Path) -> None:
    place.pyxen("host", "start", "--memory", "64M")
    before = place.leftovers()
    done = place.xl("create", "-p", guest(tmp_path, "spin"))
    assert (done.stdout, done.stderr) == ("", f"Parsing config from {tmp_path / 'small.cfg'}\n")
    assert place.state("small") == "--p---"
    assert place.xl("domid", "small").stdout == "1\n"
    assert place.xl("domname", "1").stdout == "small\n"
    place.xl("unpause", "small")
    wait_until(lambda: place.state("small") in ("r-----", "------"))
    wait_until(lambda: float(place.xl("list", "1").stdout.split()[-1]) > 0.1)
    place.xl("pause", "1")
    used = place.api("/domains/1")["cpu_time_ns"]
    assert place.state("small") == "--p---"
    place.xl("rename", "small", "other")
    assert place.names() == ["Domain-0", "other"]
    assert re.search(r"^other +1 +0 +0 +--- +0\.[0-9]", place.xl("vcpu-list").stdout, re.MULTILINE)
    assert re.fullmatch(r"Name +ID Uptime\nother +1 +0:00:[0-9]{2}\n", place.xl("uptime", "other").stdout)
    assert '"name": "other"' in place.xl("list", "-l", "other").stdout
    assert re.search(r"^other .*--p--- .*-[0-9a-f]{12} +- ", place.xl("list", "-v").stdout, re.MULTILINE)
    assert "free_memory            :" in place.xl("info").stdout
    place.xl("debug-keys", "q")
    assert "(XEN) General information for domain 1:" in place.xl("dmesg").stdout
    assert place.api("/domains/1")["cpu_time_ns"] == used
    assert "small is an invalid domain identifier" in place.xl("destroy", "small", code=1).stderr
    place.xl("destroy", "other")
    place.settled(before)


@pytest.mark.parametrize(
    ("then", "line", "code"),
    [
        (POWEROFF, 'on_poweroff = "destroy"', 0),
        (REBOOT, 'on_reboot = "destroy"', 1),
        (CRASH, 'on_crash = "destroy"', 3),
        ("ud2", 'on_crash = "destroy"', 3),
    ],
)
def test_an_end_that_destroys(place: Place, tmp_path: Path, then: str | int, line: str, code: int) -> None:
    place.pyxen("host", "start", "--memory", "64M")
    before = place.leftovers()
    done = place.xl("create", "-F", guest(tmp_path, then, line))
    assert f"Domain 1 has shut down, reason code {code} 0x{code:x}\n" in done.stderr
    assert f"Action for shutdown reason code {code} is destroy\n" in done.stderr
    assert (place.rundir / "log" / "guest-small.log").read_bytes() == b"hello\n"
    place.settled(before)


@pytest.mark.parametrize(("then", "line"), [(POWEROFF, "on_poweroff"), ("ud2", "on_crash")])
def test_an_end_that_preserves(place: Place, tmp_path: Path, then: str | int, line: str) -> None:
    place.pyxen("host", "start", "--memory", "64M")
    before = place.leftovers()
    terminal = place.terminal("create", "-c", guest(tmp_path, then, f'{line} = "preserve"'))
    try:
        terminal.expect("hello")
        wait_until(lambda: place.state("small")[3] == "s")
        terminal.type("\x1d")  # the console of a preserved domain is there as long as the domain
        assert terminal.wait() == 0
    finally:
        terminal.close()
    crashed = then == "ud2"
    assert place.state("small") == ("---sc-" if crashed else "---s--")
    assert re.search(rf" +{3 if crashed else 0} +-$", place.xl("list", "-v", "small").stdout.rstrip())
    assert ("domain_crash called for d1" in place.xl("dmesg").stdout) == crashed
    assert "not running" in place.xl("shutdown", "small", code=1).stderr
    place.xl("destroy", "small")
    place.settled(before)


def test_restart_makes_a_new_domain_and_the_console_follows(place: Place, tmp_path: Path) -> None:
    place.pyxen("host", "start", "--memory", "64M")
    before = place.leftovers()
    file = guest(tmp_path, REBOOT, 'on_reboot = "restart"', text=b"round one\n")
    terminal = place.terminal("create", "-c", file)
    try:
        terminal.expect("round one")
        write_kernel(tmp_path / "small.elf", b"round two\n", "block")
        terminal.expect("round two", 20)
        assert place.xl("domid", "small").stdout == "2\n"
        terminal.type("\x1d")
        assert terminal.wait() == 0
        assert terminal.modes() == terminal.before
    finally:
        terminal.close()
    assert (place.rundir / "log" / "guest-small.log").read_bytes() == b"round one\nround two\n"
    place.xl("destroy", "small")
    place.settled(before)


def test_rename_restart_keeps_the_crashed_one(place: Place, tmp_path: Path) -> None:
    place.pyxen("host", "start", "--memory", "64M")
    before = place.leftovers()
    place.xl("create", guest(tmp_path, "ud2", 'on_crash = "rename-restart"'))
    wait_until(lambda: any(name.startswith("small-") for name in place.names()))
    write_kernel(tmp_path / "small.elf", b"well\n", "block")
    # How often it crashed before its kernel got better is not ours to say.
    wait_until(lambda: "small" in place.names() and place.state("small") == "-b----")
    preserved = [name for name in place.names() if name.startswith("small-2")]
    assert preserved
    assert place.state(preserved[0]) == "---sc-"
    uuids = {line.split()[0] for line in place.xl("vm-list").stdout.splitlines()[1:]}
    assert len(uuids) == len(preserved) + 2
    for name in [*preserved, "small"]:
        place.xl("destroy", name)
    place.settled(before)


def test_two_readers_of_a_console_and_its_history(place: Place, tmp_path: Path) -> None:
    place.pyxen("host", "start", "--memory", "64M")
    place.xl("create", guest(tmp_path, "block", text=b"before you came\n"))
    one, two = place.terminal("console", "small"), place.terminal("console", "1")
    try:
        one.expect("before you came")
        two.expect("before you came")
        assert one.modes() != one.before  # raw
        one.type(b"\x1d")
        assert one.wait() == 0
        assert one.modes() == one.before
        place.xl("destroy", "small")
        assert two.wait() == 0
        assert two.modes() == two.before
    finally:
        one.close()
        two.close()
    assert place.xl("console", "small", code=1).stderr.count("\n") <= 2


def test_a_signal_restores_the_terminal(place: Place, tmp_path: Path) -> None:
    place.pyxen("host", "start", "--memory", "64M")
    terminal = place.terminal("create", "-c", guest(tmp_path, "block"))
    try:
        terminal.expect("hello")
        terminal.process.terminate()
        assert terminal.wait() == 143
        assert terminal.modes() == terminal.before
        assert place.names() == ["Domain-0", "small"]  # the guest runs on
    finally:
        terminal.close()


def test_an_xl_that_is_interrupted_while_it_creates_leaves_nothing_or_a_domain(place: Place, tmp_path: Path) -> None:
    """``xl create`` killed at some moment: there is a whole domain afterwards, or no trace of one."""
    import subprocess
    import time

    place.pyxen("host", "start", "--memory", "256M")
    file = guest(tmp_path, "block", "memory = 200")
    before = place.leftovers()

    def states() -> dict[str, str]:
        return {row.split()[0]: row.split()[4] for row in place.xl("list").stdout.splitlines()[1:]}

    for delay in (0.06, 0.08, 0.1, 0.12, 0.16, 0.2):
        process = subprocess.Popen([*command("xl"), "create", file], env=place.env, stderr=subprocess.DEVNULL)
        time.sleep(delay)
        process.kill()
        process.wait()
        time.sleep(0.1)
        # What is listed may be whole, or on its way out again.
        wait_until(lambda: states().get("small", "-b----") == "-b----")
        if "small" in states():
            place.xl("destroy", "small")
        place.settled(before)


def test_commands_for_a_guest_while_it_comes_and_goes(place: Place, tmp_path: Path) -> None:
    """Readers of everything, while domains are created and destroyed: no reader ever sees half a domain or fails."""
    place.pyxen("host", "start", "--memory", "64M")
    file = guest(tmp_path, "block")
    before = place.leftovers()
    over = threading.Event()
    wrong: list[str] = []

    def look() -> None:
        for number in range(1 << 20):
            if over.is_set():
                return
            args = (["list"], ["list", "-l"], ["vcpu-list"], ["uptime"], ["list", "-v"])[number % 5]
            done = place.xl(*args, code=None)
            if done.returncode:
                wrong.append(f"{args}: {done.stderr}")

    reader = threading.Thread(target=look)
    reader.start()
    try:
        for _ in range(6):
            place.xl("create", "-q", file)
            place.xl("destroy", "small")
    finally:
        over.set()
        reader.join()
    assert not wrong
    place.settled(before)


def test_stopping_the_host_ends_a_console(place: Place, tmp_path: Path) -> None:
    terminal = place.terminal("create", "-c", guest(tmp_path, "block"))
    try:
        terminal.expect("hello")
        place.pyxen("host", "stop")
        terminal.wait()
        assert terminal.modes() == terminal.before
        assert b"Traceback" not in terminal.text
    finally:
        terminal.close()
    assert os.listdir(place.rundir / "console") == []
