# SPDX-License-Identifier: GPL-2.0-only
"""The host that most tests speak to: the guests of the recorded outputs of a real Xen host."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pyxen.cli.xl import main
from tests.cli.fake_host import FakeHost, Refusal

DOM0 = {
    "domid": 0,
    "name": "Domain-0",
    "uuid": "00000000-0000-0000-0000-000000000000",
    "memory_kb": 1572864,
    "max_memory_kb": 1572864,
    "vcpus": 2,
    "online_vcpus": 2,
    "cpu_time_ns": 401_000_000_000,
    "state": "r-----",
    "paused": False,
    "shutdown_reason": None,
    "ssid": None,
    "cpupool": "Pool-0",
    "cpupool_id": 0,
    "type": "pv",
    "created": 1_700_000_000,
    "counters": {},
}
PV = DOM0 | {
    "domid": 3,
    "name": "pv",
    "uuid": "507644cf-a9b1-40ed-8c62-27c244f5c977",
    "memory_kb": 98304,
    "vcpus": 1,
    "cpu_time_ns": 26_700_000_000,
    "state": "-b----",
}
PVH = PV | {"domid": 5, "name": "pvh", "uuid": "4f65319e-1fac-46d6-a8a1-6f5c9919f30c", "cpu_time_ns": 15_100_000_000}

POOL_0 = {"poolid": 0, "name": "Pool-0", "sched": "credit", "cpus": [0, 1, 2, 5], "n_dom": 3}
POOL_1 = {"poolid": 1, "name": "fast", "sched": "credit", "cpus": [3], "n_dom": 0}


def vcpu(number: int, cpu: int | None, state: str, seconds: float, **affinity: list[int]) -> dict[str, Any]:
    return {
        "vcpu": number,
        "cpu": cpu,
        "state": state,
        "time_ns": int(seconds * 1e9),
        "hard_affinity": None,
        "soft_affinity": None,
        **affinity,
    }


@dataclass
class Run:
    code: int
    out: str
    err: str


Xl = Callable[..., Run]


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "run"
    path.mkdir(mode=0o700)
    monkeypatch.setenv("PYXEN_RUNDIR", os.fspath(path))
    return path


@pytest.fixture
def host(run_dir: Path) -> Iterator[FakeHost]:
    fake = FakeHost(run_dir)
    rows = [DOM0, PV, PVH]
    fake.routes["GET /domains"] = rows
    for row in rows:
        config = {"c_info": {"type": "pv", "name": row["name"]}, "b_info": {"sched_params": {}}}
        for which in (row["domid"], row["name"]):
            fake.routes[f"GET /domains/{which}"] = row | {"config": config}
    for which in ("nosuch", "99"):
        refusal = Refusal(f"{which} is an invalid domain identifier (rc=-6)", status=404)
        fake.routes[f"GET /domains/{which}"] = refusal
    with fake.running():
        yield fake


@pytest.fixture
def xl(capsys: pytest.CaptureFixture[str]) -> Xl:
    def run(*args: str) -> Run:
        code = main(args)
        captured = capsys.readouterr()
        return Run(code, captured.out, captured.err)

    return run
