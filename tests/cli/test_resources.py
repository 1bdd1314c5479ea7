# SPDX-License-Identifier: GPL-2.0-only
"""vcpu-set, vcpu-pin, mem-set, mem-max, trigger, sysrq and the cpupool commands: what they ask of the host, what they
print, and what they refuse.  Texts are those of xl 4.17, recorded or read in its source."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.conftest import POOL_0, POOL_1, PV, Xl
from tests.cli.fake_host import FakeHost, Refusal

INFO = {
    "nr_cpus": "6",
    "free_cpus": "1",
    "cpu_topology": [{"cpu": cpu, "core": cpu, "socket": cpu // 3, "node": cpu // 3} for cpu in range(6)],
    "numa_info": [],
}


@pytest.fixture
def host(host: FakeHost) -> FakeHost:
    host.routes["GET /info"] = INFO
    host.routes["GET /cpupools"] = {"pools": [POOL_0, POOL_1], "free_cpus": [4]}
    return host


def asked(host: FakeHost) -> list[tuple[str, object]]:
    """The requests that would change something."""
    return [(path, body) for path, body in host.requests if not path.startswith("GET")]


# --- vCPUs ----------------------------------------------------------------------------------------------


def test_vcpu_set(host: FakeHost, xl: Xl) -> None:
    host.routes["POST /domains/3/vcpus"] = {}
    run = xl("vcpu-set", "pv", "6")
    assert (run.code, run.out, run.err) == (0, "", "")
    assert asked(host) == [("POST /domains/3/vcpus", {"count": 6})]


def test_vcpu_set_beyond_the_host(host: FakeHost, xl: Xl) -> None:
    host.routes["POST /domains/3/vcpus"] = {}
    run = xl("vcpu-set", "pv", "7")
    assert (run.code, asked(host)) == (1, [])
    assert run.err == (
        "You are overcommmitting! You have 6 physical CPUs and want 7 vCPUs! Aborting, use --ignore-host to continue\n"
    )
    for option in ("-i", "--ignore-host"):
        assert xl("vcpu-set", option, "pv", "7").code == 0
    host.routes["GET /domains/pv"] = PV | {"online_vcpus": 8}
    assert xl("vcpu-set", "pv", "7").code == 0  # fewer than there are
    assert len(asked(host)) == 3


def test_vcpu_set_that_cannot_be(host: FakeHost, xl: Xl) -> None:
    host.routes["POST /domains/3/vcpus"] = Refusal("Requested 2 VCPUs, however maxcpus is 1!", status=409)
    run = xl("vcpu-set", "pv", "2")
    assert (run.code, run.err) == (
        1,
        "libxl_set_vcpuonline failed domid=3 max_vcpus=2, rc: -3\nhint: Requested 2 VCPUs, however maxcpus is 1!\n",
    )
    assert (xl("vcpu-set", "pv", "0").code, len(asked(host))) == (0, 1)  # xl(1): quietly ignored
    for wrong in ("x", "2x", "", "1.5", "99999999999", "٢"):
        run = xl("vcpu-set", "pv", wrong)
        assert (run.code, run.err.splitlines()[0]) == (1, "Error: Invalid argument.")
    assert xl("vcpu-set", "pv", "-1").code == 2
    assert xl("vcpu-set", "pv").err.startswith("'xl vcpu-set' requires at least 2 arguments.\n")
    assert xl("vcpu-set", "nosuch", "1").err == "nosuch is an invalid domain identifier (rc=-6)\n"


def test_vcpu_pin(host: FakeHost, xl: Xl) -> None:
    host.routes["POST /domains/3/affinity"] = [{"vcpu": 0, "hard": [1], "soft": [1]}]
    for args, body in (
        (("0", "1"), {"vcpu": 0, "hard": "1", "soft": None}),
        (("0", "-", "0"), {"vcpu": 0, "hard": None, "soft": "0"}),
        (("all", "all", "all"), {"vcpu": None, "hard": "all", "soft": "all"}),
        (("7", "1-3,^2", "node:0"), {"vcpu": 7, "hard": "1-3,^2", "soft": "node:0"}),
        (("-f", "0", "1", "-"), {"vcpu": 0, "hard": "1", "soft": None}),
        (("--ignore-global-affinity-masks", "0", "1"), {"vcpu": 0, "hard": "1", "soft": None}),
    ):
        run = xl("vcpu-pin", "pv", *args)
        assert (run.code, run.out, run.err) == (0, "", ""), args
        assert host.requests[-1] == ("POST /domains/3/affinity", body)


def test_vcpu_pin_warns_of_a_soft_affinity_that_is_out_of_reach(host: FakeHost, xl: Xl) -> None:
    host.routes["POST /domains/3/affinity"] = [{"vcpu": 2, "hard": [1], "soft": []}]
    run = xl("vcpu-pin", "pv", "2", "-", "0")
    assert (run.code, run.err) == (
        0,
        "All cpus in soft affinity of vcpu 2 are unreachable. Only hard affinity will be considered for scheduling\n",
    )
    assert xl("vcpu-pin", "pv", "2", "1").err == ""


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("x", "1"), "Error: Invalid argument x as VCPU."),
        (("1x", "1"), "Error: Invalid argument 1x as VCPU."),
        (("-f", "all", "1"), "Error: --force and 'all' as VCPU not allowed."),
        (("0", "1-"), "Invalid pcpu range: 1-."),
        (("0", "3-1"), "Invalid pcpu range: 3-1."),
        (("0", "^all"), 'Can\'t combine "^" and "all".'),
        (("0", "1", "node:x"), "Invalid pcpu range: x."),
    ],
)
def test_vcpu_pin_misuse(host: FakeHost, xl: Xl, args: tuple[str, ...], message: str) -> None:
    run = xl("vcpu-pin", "pv", *args)
    assert (run.code, run.out, run.err.splitlines()[0]) == (1, "", message)
    assert asked(host) == []


def test_vcpu_pin_that_the_host_refuses(host: FakeHost, xl: Xl) -> None:
    host.routes["POST /domains/3/affinity"] = Refusal("domain 3 has no vCPU 7: it has 1", status=409)
    run = xl("vcpu-pin", "pv", "7", "0")
    assert (run.code, run.err) == (
        1,
        "Could not set affinity for vcpu `7'.\nhint: domain 3 has no vCPU 7: it has 1\n",
    )
    assert xl("vcpu-pin", "pv", "all", "0").err.startswith("Could not set affinity.\n")
    host.routes["POST /domains/3/affinity"] = Refusal("vcpu hard affinity map is empty", status=400)
    assert xl("vcpu-pin", "pv", "0", "99").err == "vcpu hard affinity map is empty\n"


def test_vcpu_pin_dry_run(host: FakeHost, xl: Xl) -> None:
    assert xl("-N", "vcpu-pin", "pv", "0", "0-2,^1").out == "cpumap: 0,2\n"
    assert xl("-N", "vcpu-pin", "pv", "0", "node:1", "all").out == "cpumap: 3-5 all\n"
    assert xl("-N", "vcpu-pin", "pv", "all", "-", "0-5").out == "cpumap: - all\n"
    assert asked(host) == []


# --- memory ---------------------------------------------------------------------------------------------


def test_sizes_are_mib_without_a_unit(host: FakeHost, xl: Xl) -> None:
    host.routes["POST /domains/3/memory-target"] = host.routes["POST /domains/3/memory-max"] = {}
    for text, kb in (
        ("96", 98304), ("80m", 81920), ("80M", 81920), ("2048k", 2048), ("1g", 1 << 20), ("1T", 1 << 30),
        ("1048576b", 1024), ("0", 0),
    ):  # fmt: skip
        assert xl("mem-set", "pv", text).code == 0
        assert host.requests[-1] == ("POST /domains/3/memory-target", {"kb": kb})
        assert xl("mem-max", "pv", text).code == 0
        assert host.requests[-1] == ("POST /domains/3/memory-max", {"kb": kb})


def test_what_is_no_size(host: FakeHost, xl: Xl) -> None:
    for command in ("mem-set", "mem-max"):
        for wrong in ("x", "", "m", "1.5g", "12mb", "9" * 13, "1 m", "٣"):
            run = xl(command, "pv", wrong)
            assert (run.code, run.out, run.err.splitlines()[0]) == (1, "", f"invalid memory size: {wrong}")
    assert asked(host) == []


def test_memory_that_the_host_refuses(host: FakeHost, xl: Xl) -> None:
    reason = "memory_dynamic_max must be less than or equal to memory_static_max"
    host.routes["POST /domains/3/memory-target"] = Refusal(reason, status=409)
    run = xl("mem-set", "pv", "1g")
    assert (run.code, run.err) == (1, f"cannot set domid 3 dynamic max memory to : 1g\nhint: {reason}\n")
    host.routes["POST /domains/3/memory-max"] = Refusal("no", status=409)
    assert xl("mem-max", "pv", "1").err == "cannot set domid 3 static max memory to : 1\nhint: no\n"


# --- signals --------------------------------------------------------------------------------------------


def test_trigger(host: FakeHost, xl: Xl) -> None:
    host.routes["POST /domains/3/trigger"] = {}
    assert xl("trigger", "pv", "nmi").code == 0
    assert host.requests[-1] == ("POST /domains/3/trigger", {"trigger": "nmi", "vcpu": 0})
    assert xl("trigger", "pv", "s3resume", "2").code == 0
    assert host.requests[-1] == ("POST /domains/3/trigger", {"trigger": "s3resume", "vcpu": 2})
    run = xl("trigger", "pv", "nmi", "two")
    assert (run.code, run.err) == (0, "Invalid vcpuid, using default vcpuid=0.\n\n")
    run = xl("trigger", "pv", "boo")
    assert (run.code, run.err.splitlines()[0]) == (1, 'Invalid trigger "boo"')
    host.routes["POST /domains/3/trigger"] = Refusal("Send trigger 'reset' failed: why", status=409)
    assert (xl("trigger", "pv", "reset").code, xl("trigger", "pv", "reset").err) == (
        1,
        "Send trigger 'reset' failed: why\n",
    )


def test_sysrq(host: FakeHost, xl: Xl) -> None:
    host.routes["POST /domains/3/sysrq"] = {}
    assert xl("sysrq", "pv", "h").code == 0
    assert asked(host) == [("POST /domains/3/sysrq", {"letter": "h"})]
    for wrong in ("hh", "", "ä", "\n"):
        run = xl("sysrq", "pv", wrong)
        assert (run.code, run.err) == (1, "Invalid sysrq.\n\n")
        assert run.out.startswith("Usage: xl [-vtTf] sysrq <Domain> <letter>\n")
    assert len(asked(host)) == 1


# --- cpupools -------------------------------------------------------------------------------------------


def test_cpupool_list(host: FakeHost, xl: Xl) -> None:
    assert xl("cpupool-list").out == (
        "Name               CPUs   Sched     Active   Domain count\n"
        "Pool-0               4    credit       y          3\n"
        "fast                 1    credit       y          0\n"
    )
    assert xl("cpupool-list", "-c").out == (
        "Name               CPU list\nPool-0             0,1,2,5\nfast               3\n"
    )
    assert xl("cpupool-list", "--cpus", "fast").out == "Name               CPU list\nfast               3\n"
    run = xl("cpupool-list", "1")  # by name only, as xl
    assert (run.code, run.out, run.err) == (1, "", "Pool '1' does not exist\n")


def test_cpupool_create(host: FakeHost, xl: Xl, tmp_path: Path) -> None:
    host.routes["POST /cpupools"] = {"poolid": 2}
    run = xl("cpupool-create", 'name="p"', 'sched="credit"', 'cpus="4"')
    assert (run.code, run.err) == (0, "")
    assert run.out == (
        'Using config file "command line"\ncpupool name:   p\nscheduler:      credit\nnumber of cpus: 1\n'
    )
    assert asked(host) == [("POST /cpupools", {"name": "p", "sched": "credit", "cpus": [4]})]
    file = tmp_path / "slow"
    file.write_text('cpus = ["4"]\n')
    for args in ((str(file),), ("-f", str(file)), (f"--defconfig={file}",)):
        run = xl("cpupool-create", *args)
        assert run.out.splitlines()[:2] == [f'Using config file "{file}"', "cpupool name:   slow"]
        assert host.requests[-1][1] == {"name": "slow", "sched": "credit", "cpus": [4]}
    xl("cpupool-create", str(file), "name='other'", "nodes = [1, 0]")
    assert host.requests[-1][1] == {"name": "other", "sched": "credit", "cpus": [4]}
    assert xl("cpupool-create", "name='n'").out.endswith("number of cpus: 0\n")
    assert host.requests[-1][1] == {"name": "n", "sched": "credit", "cpus": []}
    assert xl("cpupool-create", "name='n'", "nodes='1'").code == 0
    before = len(asked(host))
    for args in (("-N", "cpupool-create", "name='n'"), ("cpupool-create", "-n", "name='n'")):
        assert xl(*args).out.startswith("Using config file")
    assert len(asked(host)) == before


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("nofile",), "Failed to read config file: nofile: No such file or directory"),
        ((), "Missing cpupool name!"),
        (("name='fast'",), 'Pool name "fast" already exists'),
        (("name='n'", "sched='best'"), "Unknown scheduler"),
        (("name='n'", "cpus='0'"), "cpu 0 illegal or not free"),
        (("name='n'", "cpus=['4', '77']"), "cpu 77 illegal or not free"),
        (("name='n'", "cpus=['-1']"), "cpu -1 illegal or not free"),
        (("name='n'", "cpus=['four']"), "cpus= holds what is no number: four"),
        (("name='n'", "cpus='4-'"), "Invalid pcpu range: 4-."),
        (("name='n'", "nodes=['0']"), "no free cpu found"),
        (("name='n'", "nodes=['9']"), "no free cpu found"),
        (("name=",), "command line:1: config parsing error near <newline>: syntax error, unexpected NEWLINE, "
                     "expecting STRING or NUMBER or '['"),
    ],
)  # fmt: skip
def test_cpupools_that_cannot_be_made(host: FakeHost, xl: Xl, args: tuple[str, ...], message: str) -> None:
    run = xl("cpupool-create", *args)
    assert (run.code, run.out, run.err.splitlines()[0]) == (1, "", message)
    assert asked(host) == []


def test_cpupool_create_that_the_host_refuses(host: FakeHost, xl: Xl) -> None:
    host.routes["POST /cpupools"] = Refusal("scheduler credit2 is not in this hypervisor", status=409)
    run = xl("cpupool-create", "name='n'", "sched='credit2'")
    assert (run.code, run.err) == (
        1,
        "error on creating cpupool\nhint: scheduler credit2 is not in this hypervisor\n",
    )


def test_cpupool_cpus(host: FakeHost, xl: Xl) -> None:
    host.routes["POST /cpupools/fast/cpu-add"] = host.routes["POST /cpupools/fast/cpu-remove"] = {"failed": {}}
    assert xl("cpupool-cpu-add", "fast", "4").code == 0
    assert host.requests[-1] == ("POST /cpupools/fast/cpu-add", {"cpus": [4]})
    assert xl("cpupool-cpu-add", "fast", "node:1,^5").code == 0
    assert host.requests[-1] == ("POST /cpupools/fast/cpu-add", {"cpus": [3, 4]})
    assert xl("cpupool-cpu-remove", "fast", "3-4").code == 0
    assert host.requests[-1] == ("POST /cpupools/fast/cpu-remove", {"cpus": [3, 4]})
    host.routes["POST /cpupools/fast/cpu-add"] = {"failed": {"0": "it is in use"}}
    run = xl("cpupool-cpu-add", "fast", "0")
    assert (run.code, run.err) == (
        1,
        "some cpus may not have been added to fast\nhint: cpu 0: it is in use\n",
    )
    host.routes["POST /cpupools/fast/cpu-remove"] = {"failed": {"3": "it is in use"}}
    run = xl("cpupool-cpu-remove", "fast", "3")
    assert run.err.startswith("Some cpus may have not or only partially been removed from 'fast'.\n")
    assert xl("cpupool-cpu-add", "fast", "x").err == "Invalid pcpu range: x.\n"
    assert xl("cpupool-cpu-add", "fast", "99").code == 1


def test_other_cpupool_commands(host: FakeHost, xl: Xl) -> None:
    host.routes["DELETE /cpupools/fast"] = {}
    host.routes["POST /cpupools/fast/rename"] = {}
    host.routes["POST /domains/3/cpupool"] = {}
    host.routes["POST /cpupools/numa-split"] = {}
    for args, request in (
        (("cpupool-destroy", "fast"), ("DELETE /cpupools/fast", {})),
        (("cpupool-rename", "fast", "new"), ("POST /cpupools/fast/rename", {"name": "new"})),
        (("cpupool-migrate", "pv", "fast"), ("POST /domains/3/cpupool", {"pool": "fast"})),
        (("cpupool-numa-split",), ("POST /cpupools/numa-split", {})),
    ):
        run = xl(*args)
        assert (run.code, run.out, run.err) == (0, "", "")
        assert host.requests[-1] == request


def test_cpupool_refusals(host: FakeHost, xl: Xl) -> None:
    unknown = Refusal("unknown cpupool 'x'", status=404)
    for path in ("DELETE /cpupools/x", "POST /cpupools/x/rename", "POST /cpupools/x/cpu-add"):
        host.routes[path] = unknown
    host.routes["POST /domains/3/cpupool"] = unknown
    for args in (
        ("cpupool-destroy", "x"), ("cpupool-rename", "x", "y"), ("cpupool-cpu-add", "x", "1"),
        ("cpupool-migrate", "pv", "x"),
    ):  # fmt: skip
        run = xl(*args)
        assert (run.code, run.err) == (1, "unknown cpupool 'x'\n"), args
    assert xl("cpupool-destroy", "a/b").err == "unknown cpupool 'a/b'\n"
    assert xl("cpupool-migrate", "nosuch", "fast").err == "unknown domain 'nosuch'\n"
    host.routes["DELETE /cpupools/fast"] = Refusal("there are 2 domains in the cpupool", hint="move them", status=409)
    run = xl("cpupool-destroy", "fast")
    assert (run.code, run.err) == (
        1,
        "Can't destroy cpupool 'fast'\nhint: there are 2 domains in the cpupool; move them\n",
    )
    host.routes["POST /cpupools/numa-split"] = Refusal("splitting not possible, already cpupools in use", status=409)
    assert xl("cpupool-numa-split").err == "splitting not possible, already cpupools in use\n"
