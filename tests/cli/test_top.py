# SPDX-License-Identifier: GPL-2.0-only
"""xl top: the table as xentop 4.17 printed it (recorded), and its keys on a terminal."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pyxen.cli import top
from pyxen.cli.top import COLUMNS, View, state_letters
from tests.cli.conftest import DOM0, PV, PVH, Xl, vcpu
from tests.cli.fake_host import FakeHost

HEADING = (
    "      NAME  STATE   CPU(sec) CPU(%)     MEM(k) MEM(%)  MAXMEM(k) MAXMEM(%) VCPUS NETS NETTX(k) NETRX(k) VBDS"
    "   VBD_OO   VBD_RD   VBD_WR  VBD_RSECT  VBD_WSECT SSID\n"
)
NO_DEVICES = "    0        0        0    0        0        0        0          0          0    0\n"


@pytest.fixture
def host(host: FakeHost) -> FakeHost:
    host.routes["GET /info"] = {
        "total_memory": "4095", "free_memory": "2322", "nr_cpus": "2", "cpu_mhz": "2299.998", "xen_version": "4.6.0"
    }  # fmt: skip
    host.routes["GET /domains"] = [
        DOM0 | {"cpu_time_ns": 722_900_000_000, "vcpus": 2},
        PV | {"cpu_time_ns": 70_000_000_000, "max_memory_kb": 99328},
        PVH | {"cpu_time_ns": 72_000_000_000, "max_memory_kb": 99328, "memory_kb": 98368},
    ]
    return host


def test_batch(host: FakeHost, xl: Xl) -> None:
    run = xl("top", "-b", "-i", "1")
    assert (run.code, run.err) == (0, "")
    assert run.out == (
        HEADING
        + "  Domain-0 -----r        722    0.0    1572864   37.5    1572864      37.5     2" + NO_DEVICES
        + "        pv --b---         70    0.0      98304    2.3      99328       2.4     1" + NO_DEVICES
        + "       pvh --b---         72    0.0      98368    2.3      99328       2.4     1" + NO_DEVICES
    )  # fmt: skip


def test_cpu_percent_is_of_the_time_between_two_samples(
    host: FakeHost, xl: Xl, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[dict[str, Any]] = host.routes["GET /domains"]
    now = [100.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds
        rows[1] = rows[1] | {"cpu_time_ns": rows[1]["cpu_time_ns"] + 500_000_000}
        rows.append(PV | {"domid": 9, "name": "late", "cpu_time_ns": 5})

    monkeypatch.setattr(top.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(top.time, "sleep", sleep)
    out = xl("top", "-b", "-d2", "--iterations=2").out
    second = out.split(HEADING)[2].splitlines()
    assert [line.split()[3] for line in second] == ["0.0", "0.0", "25.0", "0.0"]
    assert [line.split()[0] for line in second] == ["Domain-0", "late", "pv", "pvh"]


def test_vcpus_and_names(host: FakeHost, xl: Xl) -> None:
    host.routes["GET /domains"] = [PV | {"name": "a-name-beyond-ten"}]
    vcpus = [vcpu(n, 0, "-b-", 368 if n == 0 else n) for n in range(7)]
    vcpus[2]["cpu"] = None
    host.routes["GET /domains/3/vcpus"] = vcpus
    lines = xl("top", "-b", "-i1", "-v").out.splitlines()
    assert lines[1].startswith("a-name-bey --b---")
    assert lines[2] == (
        "VCPUs(sec):   0:        368s  1:          1s  3:          3s  4:          4s"
    )
    assert lines[3] == "          5:          5s  6:          6s"
    assert xl("top", "-b", "-i1", "-f").out.splitlines()[1].startswith("a-name-beyond-ten --b---")
    host.routes["GET /domains"] = [PV, PVH]
    assert xl("top", "-bri1").out.count(HEADING) == 2


def test_misuse(host: FakeHost, xl: Xl) -> None:
    for args, message in (
        (("-b", "-d", "0"), "xl top: delay is a whole number from 1, not '0'"),
        (("-b", "-i", "x"), "xl top: iterations is a whole number from 1, not 'x'"),
        (("-b", "3"), "xl top takes no operand '3'"),
        ((), "xl top needs a terminal"),
    ):
        run = xl("top", *args)
        assert (run.code, run.out, run.err.splitlines()[0]) == (1, "", message)
    assert xl("top", "-V").out.startswith("xl top (pyxen ")
    assert xl("top", "-Q").code == 2


def test_states() -> None:
    for ours, xentop in (
        ("r-----", "-----r"), ("-b----", "--b---"), ("--p---", "----p-"), ("---sc-", "-s-c--"), ("-----d", "d-----"),
        ("", "------"),
    ):  # fmt: skip
        assert state_letters({"state": ours}) == xentop


def test_keys() -> None:
    view = View(set(), 3)
    for key in "svrnb":
        assert view.key(key)
    assert (view.sort, view.vcpus, view.repeat, view.networks, view.vbds) == (1, True, True, True, True)
    for _ in range(len(COLUMNS) - 1):
        view.key("S")
    assert view.sort == 0
    view.key("KEY_UP")
    view.key("KEY_DOWN")
    view.key("KEY_DOWN")
    view.key("KEY_RESIZE")
    assert view.first == 2
    for text, delay in (
        ("d17\r", 17), ("d0\n", 17), ("d\r", 17), ("d9\x1b", 17), ("dq\x7f5x\r", 5), ("d123456789\r", 123456),
    ):  # fmt: skip
        for key in text:
            assert view.key(key)
        assert (view.delay_s, view.prompt) == (delay, None)
    assert not view.key("q")
    assert not view.key("\x1b")


class Terminal:
    """``xl top`` on a pseudo terminal of 24 x 132."""

    def __init__(self, run_dir: Path, *args: str) -> None:
        self.fd, slave = pty.openpty()
        code = f"import sys; from pyxen.cli.xl import main; sys.exit(main(['top', *{list(args)!r}]))"
        environment = {**os.environ, "PYXEN_RUNDIR": str(run_dir), "TERM": "xterm", "LINES": "24", "COLUMNS": "132"}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        self.process = subprocess.Popen(
            [sys.executable, "-c", code], stdin=slave, stdout=slave, stderr=slave, env=environment
        )
        os.close(slave)
        self.seen = b""

    def expect(self, text: bytes, seconds: float = 20.0) -> None:
        deadline = time.monotonic() + seconds
        while text not in self.seen:
            ready, _, _ = select.select([self.fd], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, self.seen
            self.seen += os.read(self.fd, 65536)
        self.seen = self.seen.partition(text)[2]

    def type(self, text: bytes) -> None:
        os.write(self.fd, text)

    def end(self) -> int:
        try:
            return self.process.wait(20)
        finally:
            self.process.kill()
            os.close(self.fd)


def test_on_a_terminal(host: FakeHost, run_dir: Path) -> None:
    host.routes["GET /domains/0/vcpus"] = host.routes["GET /domains/3/vcpus"] = []
    host.routes["GET /domains/5/vcpus"] = [vcpu(0, 1, "-b-", 7)]
    terminal = Terminal(run_dir)
    terminal.expect(b"3 domains: 1 running, 2 blocked")
    terminal.expect(b"Mem: 4193280k total, 1815552k used, 2377728k free    CPUs: 2 @ 2299MHz")
    terminal.expect(b"pvh --b---")
    terminal.expect(b"Quit")
    terminal.type(b"v")
    for piece in (b"VCPUs(sec):", b"VCPUs(sec):", b"VCPUs(sec):", b"7s"):  # curses sends only what differs
        terminal.expect(piece)
    terminal.type(b"d")
    terminal.expect(b"(sec):")
    terminal.type(b"7\r")
    terminal.expect(b"Quit")
    terminal.type(b"q")
    assert terminal.end() == 0


def test_a_host_that_goes_leaves_the_terminal_as_it_was(run_dir: Path, host: FakeHost) -> None:
    terminal = Terminal(run_dir, "-d1")
    terminal.expect(b"Quit")
    del host.routes["GET /domains"]
    terminal.expect(b"\x1b[?1049l")  # back from the alternate screen
    terminal.expect(b"404")
    assert terminal.end() == 1
