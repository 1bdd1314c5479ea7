# SPDX-License-Identifier: GPL-2.0-only
"""``xl top``: xentop's table, as text (``-b``) or on the terminal.  Columns, keys and order are xentop's, to the space.

There are no network and block devices in this version: their columns are 0 and ``-n`` and ``-x`` add no lines.
"""

from __future__ import annotations

import sys
import time

from pyxen.cli.client import ApiError, Client
from pyxen.cli.getopt import getopt
from pyxen.cli.report import Failure
from pyxen.cli.xl import Context

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_LONG = {
    "version": "V",
    "networks": "n",
    "vbds": "x",
    "repeat-header": "r",
    "vcpus": "v",
    "full-name": "f",
    "delay": "d",
    "batch": "b",
    "iterations": "i",
}
# xentop's letters and their order, and where xl list has them.
_STATES = (("d", 5), ("s", 3), ("b", 1), ("c", 4), ("p", 2), ("r", 0))
_NO_LIMIT_KB = 1 << 50
_KEY_WAIT_TENTHS = 5


class Sample:
    """What the host said at one moment."""

    def __init__(self, client: Client, before: Sample | None) -> None:
        self.at = time.monotonic()
        self.clock = time.strftime("%H:%M:%S")
        self.info: dict[str, Any] = client.get("/info")
        self.rows: list[dict[str, Any]] = client.get("/domains")
        self.total_kb = int(self.info["total_memory"]) * 1024
        self._used = {row["domid"]: row["cpu_time_ns"] for row in self.rows}
        self._before = before
        if before is not None:
            before._before = None  # a chain of all samples would hold them
        self.vcpus: dict[int, list[dict[str, Any]]] = {}

    def load_vcpus(self, client: Client) -> None:
        """Ask for the vCPUs too, once: most people do not look at them."""
        for row in () if self.vcpus else self.rows:
            try:
                self.vcpus[row["domid"]] = client.get(f"/domains/{row['domid']}/vcpus")
            except ApiError as error:
                if error.status != 404:  # it went while we were looking
                    raise

    def cpu_percent(self, row: dict[str, Any]) -> float:
        """Of one pCPU, since the sample before; 0 in the first."""
        before = self._before
        if before is None or row["domid"] not in before._used or self.at <= before.at:
            return 0.0
        used: float = (row["cpu_time_ns"] - before._used[row["domid"]]) / 1e9
        return max(0.0, 100 * used / (self.at - before.at))

    def memory_percent(self, kb: int) -> float:
        return 100 * kb / self.total_kb if self.total_kb else 0.0


class Column:
    """One field of the table: how wide, how it is shown, and by what it sorts."""

    def __init__(
        self, heading: str, width: int, show: Callable[[Sample, Any], str], key: Callable[[Sample, Any], Any]
    ) -> None:
        self.heading = heading.rjust(width)
        self.show = show
        self.key = key


def state_letters(row: dict[str, Any]) -> str:
    """xentop's six letters."""
    shown: str = row["state"].ljust(6, "-")
    return "".join(letter if shown[place] == letter else "-" for letter, place in _STATES)


def _maximum(sample: Sample, row: dict[str, Any]) -> str:
    kb: int = row["max_memory_kb"]
    return f"{'no limit':>10}" if kb >= _NO_LIMIT_KB else f"{kb:10d}"


def _maximum_percent(sample: Sample, row: dict[str, Any]) -> str:
    kb: int = row["max_memory_kb"]
    return f"{'n/a':>9}" if kb >= _NO_LIMIT_KB else f"{sample.memory_percent(kb):9.1f}"


def _none(heading: str, width: int) -> Column:
    """A column of devices that are not there."""
    return Column(heading, width, lambda s, r: "0".rjust(width), lambda s, r: 0)


COLUMNS = (
    Column("NAME", 10, lambda s, r: f"{_name(r):>10.10}", lambda s, r: _name(r).lower()),
    Column("STATE", 6, lambda s, r: state_letters(r), lambda s, r: [c == "-" for c in state_letters(r)]),
    Column("CPU(sec)", 10, lambda s, r: f"{r['cpu_time_ns'] // 10**9:10d}", lambda s, r: -r["cpu_time_ns"]),
    Column("CPU(%)", 6, lambda s, r: f"{s.cpu_percent(r):6.1f}", lambda s, r: -s.cpu_percent(r)),
    Column("MEM(k)", 10, lambda s, r: f"{r['memory_kb']:10d}", lambda s, r: -r["memory_kb"]),
    Column("MEM(%)", 6, lambda s, r: f"{s.memory_percent(r['memory_kb']):6.1f}", lambda s, r: -r["memory_kb"]),
    Column("MAXMEM(k)", 10, _maximum, lambda s, r: -r["max_memory_kb"]),
    Column("MAXMEM(%)", 9, _maximum_percent, lambda s, r: -r["max_memory_kb"]),
    Column("VCPUS", 5, lambda s, r: f"{r['vcpus']:5d}", lambda s, r: -r["vcpus"]),
    _none("NETS", 4),
    _none("NETTX(k)", 8),
    _none("NETRX(k)", 8),
    _none("VBDS", 4),
    _none("VBD_OO", 8),
    _none("VBD_RD", 8),
    _none("VBD_WR", 8),
    _none("VBD_RSECT", 10),
    _none("VBD_WSECT", 10),
    _none("SSID", 4),
)


def _name(row: dict[str, Any]) -> str:
    name: str = row["name"]
    return name or "(null)"


class View:
    """What is shown, and how; the keys change it."""

    def __init__(self, letters: set[str], delay_s: int) -> None:
        self.vcpus = "v" in letters
        self.repeat = "r" in letters
        self.full_name = "f" in letters
        self.networks = "n" in letters
        self.vbds = "x" in letters
        self.delay_s = delay_s
        self.sort = 0
        self.first = 0
        self.prompt: str | None = None
        """What has been typed as the new delay; None when nobody asks for one."""

    def table(self, sample: Sample) -> list[tuple[bool, str]]:
        """Lines, and whether each is a heading."""
        column = COLUMNS[self.sort]
        rows = sorted(sample.rows, key=lambda row: column.key(sample, row))
        self.first = min(self.first, max(0, len(rows) - 1))
        lines: list[tuple[bool, str]] = []
        for position, row in enumerate(rows[self.first :]):
            if position == 0 or self.repeat:
                lines.append((True, " ".join(column.heading for column in COLUMNS)))
            cells = [column.show(sample, row) for column in COLUMNS]
            if self.full_name:
                cells[0] = f"{_name(row):>10}"
            lines.append((False, " ".join(cells)))
            if self.vcpus:
                lines += [(False, line) for line in _vcpu_lines(sample.vcpus.get(row["domid"], []))]
        return lines

    def key(self, key: int | str) -> bool:
        """Do what a key means; False when it means to end. Keys are characters or curses' names."""
        if self.prompt is not None:
            self._prompt_key(key)
            return True
        if key in ("q", "Q", "\x1b"):
            return False
        if key in ("s", "S"):
            self.sort = (self.sort + 1) % len(COLUMNS)
        elif key in ("v", "V"):
            self.vcpus = not self.vcpus
        elif key in ("r", "R"):
            self.repeat = not self.repeat
        elif key in ("n", "N"):
            self.networks = not self.networks
        elif key in ("b", "B"):
            self.vbds = not self.vbds
        elif key in ("d", "D"):
            self.prompt = ""
        elif key == "KEY_DOWN":
            self.first += 1
        elif key == "KEY_UP":
            self.first = max(0, self.first - 1)
        return True

    def _prompt_key(self, key: int | str) -> None:
        assert self.prompt is not None
        if key in ("\r", "\n", "KEY_ENTER"):
            if self.prompt.isdigit() and int(self.prompt) > 0:
                self.delay_s = int(self.prompt)
            self.prompt = None
        elif key == "\x1b":
            self.prompt = None
        elif key in ("KEY_BACKSPACE", "\x7f", "\b"):
            self.prompt = self.prompt[:-1]
        elif isinstance(key, str) and len(key) == 1 and key.isascii() and key.isdigit() and len(self.prompt) < 6:
            self.prompt += key

    def bottom(self) -> str:
        """The last line of the screen."""
        if self.prompt is not None:
            return f"Delay(sec): {self.prompt}"
        return "Delay  Networks  vBds  VCPUs  Repeat header  Sort order  Quit"


def _vcpu_lines(vcpus: list[dict[str, Any]]) -> list[str]:
    lines = ["VCPUs(sec): "]
    for vcpu in vcpus:
        if vcpu["cpu"] is None:
            continue  # offline
        if vcpu["vcpu"] and vcpu["vcpu"] % 5 == 0:
            lines.append("        ")
        lines[-1] += f" {vcpu['vcpu']:2d}: {vcpu['time_ns'] // 10**9:10d}s"
    return lines


def summary(sample: Sample) -> list[str]:
    """The lines above the table."""
    rows, info = sample.rows, sample.info
    states = dict.fromkeys("rbpscd", 0)
    for row in rows:
        for letter in states:
            if letter in row["state"]:
                states[letter] += 1
                break
    free_kb = int(info["free_memory"]) * 1024
    return [
        f"xentop - {sample.clock}   Xen {info['xen_version']}",
        f"{len(rows)} domains: {states['r']} running, {states['b']} blocked, {states['p']} paused, "
        f"{states['c']} crashed, {states['d']} dying, {states['s']} shutdown ",
        f"Mem: {sample.total_kb}k total, {sample.total_kb - free_kb}k used, {free_kb}k free    "
        f"CPUs: {info['nr_cpus']} @ {int(float(info['cpu_mhz']))}MHz",
    ]


# --- the command ------------------------------------------------------------------------------------------


def top(args: list[str], context: Context) -> int:
    """``xl top``."""
    options, operands = getopt(args, "Vnxrvfd:bi:", _LONG)
    given = dict(options)
    if operands:
        raise Failure(f"xl top takes no operand '{operands[0]}'")
    if "V" in given:
        from pyxen import __version__

        print(f"xl top (pyxen {__version__})")
        return 0
    delay_s = _count(given.get("d", "3"), "delay")
    iterations = _count(given["i"], "iterations") if "i" in given else None
    view = View(set(given), delay_s)
    client = Client()
    try:
        if "b" in given:
            _batch(client, view, iterations)
        else:
            _interactive(client, view, iterations)
    except KeyboardInterrupt:
        pass  # as in xentop, the usual way to end it
    return 0


def _count(text: str, name: str) -> int:
    if not (text.isascii() and text.isdigit()) or not 1 <= int(text[:7]) <= 10**6:
        raise Failure(f"xl top: {name} is a whole number from 1, not '{text[:40]}'")
    return int(text)


def _batch(client: Client, view: View, iterations: int | None) -> None:
    sample: Sample | None = None
    while True:
        sample = Sample(client, sample)
        if view.vcpus:
            sample.load_vcpus(client)
        print("\n".join(line for _, line in view.table(sample)))
        sys.stdout.flush()
        if iterations is not None:
            iterations -= 1
            if not iterations:
                return
        time.sleep(view.delay_s)


def _interactive(client: Client, view: View, iterations: int | None) -> None:
    try:
        import curses
    except ImportError:
        raise Failure("this Python has no curses", hint="xl top -b prints the table") from None
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise Failure("xl top needs a terminal", hint="xl top -b prints the table")
    try:
        curses.wrapper(lambda window: _screen(window, client, view, iterations))
    except curses.error as error:
        raise Failure(f"cannot use this terminal: {error}", hint="xl top -b prints the table") from None


def _screen(window: Any, client: Client, view: View, iterations: int | None) -> None:
    import curses

    curses.halfdelay(_KEY_WAIT_TENTHS)
    sample: Sample | None = None
    while True:
        if sample is None or time.monotonic() - sample.at >= view.delay_s:
            sample = Sample(client, sample)
            if iterations is not None:
                iterations -= 1
        if view.vcpus:
            sample.load_vcpus(client)
        _draw(window, view, sample)
        if iterations == 0:
            return
        try:
            key = window.get_wch()
        except curses.error:
            continue  # nobody typed
        if not view.key(curses.keyname(key).decode() if isinstance(key, int) else key):
            return


def _draw(window: Any, view: View, sample: Sample) -> None:
    import curses

    window.erase()
    height, width = window.getmaxyx()
    lines = [(False, line) for line in summary(sample)] + view.table(sample)
    for row, (heading, line) in enumerate(lines[: height - 1]):
        # One column stays free: writing the last cell of the last line is an error to curses.
        window.addnstr(row, 0, line, max(0, width - 1), curses.A_REVERSE if heading else curses.A_NORMAL)
    window.addnstr(height - 1, min(2, width - 1), view.bottom(), max(0, width - 3))
    window.refresh()
