# SPDX-License-Identifier: GPL-2.0-only
"""What ``xl list`` costs against a running host, as a multiple of ``python3 -c pass`` (the figure: at most 4).

Both are run in turn, so that whatever else the machine does hits both; medians of wall time.

    python benchmarks/xl_list.py [runs]

Uses the host of the run directory (PYXEN_RUNDIR), starting one if there is none.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from pyxen.cli.client import Client

FIGURE = 4.0


def command() -> list[str]:
    """The installed ``xl`` of this interpreter, else the same thing its wrapper does."""
    installed = Path(sys.executable).with_name("xl")
    if installed.exists():
        return [str(installed), "list"]
    code = "import re, sys; from pyxen.cli.xl import main; sys.exit(main())"
    return [sys.executable, "-c", code, "list"]


def wall_s(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start


def main() -> int:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 41
    # The interpreter finds pyxen in the child processes as it did here.
    os.environ.setdefault("PYTHONPATH", os.pathsep.join(path for path in sys.path[1:] if path.endswith("src")))
    version = Client().get("/version")
    nothing, listing = [sys.executable, "-c", "pass"], command()
    for warm_up in (nothing, listing):
        wall_s(warm_up)
    pairs = [(wall_s(nothing), wall_s(listing)) for _ in range(runs)]
    base, cost = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"host {version['pyxen']}, pid {version['pid']}, {runs} runs each")
    print(f"python3 -c pass {base * 1e3:6.1f} ms")
    print(f"xl list         {cost * 1e3:6.1f} ms")
    print(f"ratio           {cost / base:6.2f}   (figure: <= {FIGURE:g})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
