# SPDX-License-Identifier: GPL-2.0-only
"""What the commands print, to the space; the expected texts were recorded from xl 4.17 on a real Xen host."""

from __future__ import annotations

import pytest

from tests.cli.conftest import DOM0, POOL_0, POOL_1, PV, PVH, Xl, vcpu
from tests.cli.fake_host import Answer, FakeHost, Refusal


def test_list(host: FakeHost, xl: Xl) -> None:
    run = xl("list")
    assert (run.code, run.err) == (0, "")
    assert run.out == (
        "Name                                        ID   Mem VCPUs\tState\tTime(s)\n"
        "Domain-0                                     0  1536     2     r-----     401.0\n"
        "pv                                           3    96     1     -b----      26.7\n"
        "pvh                                          5    96     1     -b----      15.1\n"
    )


def test_list_one(host: FakeHost, xl: Xl) -> None:
    expected = "pv                                           3    96     1     -b----      26.7\n"
    assert xl("list", "pv").out.endswith("Time(s)\n" + expected)
    assert xl("list", "3").out.endswith("Time(s)\n" + expected)


def test_list_verbose(host: FakeHost, xl: Xl) -> None:
    host.routes["GET /domains"] = [DOM0, PV | {"shutdown_reason": "crash", "state": "---sc-"}]
    assert xl("list", "-v").out == (
        "Name                                        ID   Mem VCPUs\tState\tTime(s)"
        "   UUID                            Reason-Code\tSecurity Label\n"
        "Domain-0                                     0  1536     2     r-----     401.0"
        " 00000000-0000-0000-0000-000000000000        -                -\n"
        "pv                                           3    96     1     ---sc-      26.7"
        " 507644cf-a9b1-40ed-8c62-27c244f5c977        3                -\n"
    )


def test_list_context_and_numa(host: FakeHost, xl: Xl) -> None:
    first, second = xl("list", "-Z", "pv").out.splitlines()
    assert first == "Name                                        ID   Mem VCPUs\tState\tTime(s)   Security Label"
    assert second == "pv                                           3    96     1     -b----      26.7                -"
    first, second = xl("list", "--numa", "pv").out.splitlines()
    assert first == "Name                                        ID   Mem VCPUs\tState\tTime(s) NODE Affinity"
    assert second == "pv                                           3    96     1     -b----      26.7 all"


def test_list_long(host: FakeHost, xl: Xl) -> None:
    run = xl("list", "-l", "pv")
    assert run.out == (
        '[\n    {\n        "domid": 3,\n        "config": {\n            "c_info": {\n                "type": "pv",\n'
        '                "name": "pv"\n            },\n            "b_info": {\n                "sched_params": {\n\n'
        "                }\n            }\n        }\n    }\n]\n\n"
    )
    assert xl("list", "--long").out.count('"domid"') == 3


def test_list_of_a_domain_that_is_not_there(host: FakeHost, xl: Xl) -> None:
    run = xl("list", "nosuch")
    assert (run.code, run.out, run.err) == (1, "", "nosuch is an invalid domain identifier (rc=-6)\n")
    assert xl("list", "99").err == "Error: Domain '99' does not exist.\n"


def test_vcpu_list(host: FakeHost, xl: Xl) -> None:
    host.routes["GET /domains/0/vcpus"] = [vcpu(0, 0, "r--", 206.0), vcpu(1, 1, "-b-", 202.7)]
    host.routes["GET /domains/3/vcpus"] = [vcpu(0, 1, "-b-", 44.8, hard_affinity=[1]), vcpu(1, None, "--p", 0)]
    host.routes["GET /domains/5/vcpus"] = [vcpu(0, 1, "-b-", 16.0, hard_affinity=[0, 1, 2, 5], soft_affinity=[])]
    assert xl("vcpu-list").out == (
        "Name                                ID  VCPU   CPU State   Time(s) Affinity (Hard / Soft)\n"
        "Domain-0                             0     0    0   r--     206.0  all / all\n"
        "Domain-0                             0     1    1   -b-     202.7  all / all\n"
        "pv                                   3     0    1   -b-      44.8  1 / all\n"
        "pv                                   3     1    -   --p       0.0  all / all\n"
        "pvh                                  5     0    1   -b-      16.0  0-2,5 / none\n"
    )
    run = xl("vcpu-list", "nosuch", "pv")
    assert run.code == 1 and run.out.count("\n") == 3
    assert run.err == "nosuch is an invalid domain identifier (rc=-6)\n"


def test_vm_list(host: FakeHost, xl: Xl) -> None:
    assert xl("vm-list").out == (
        "UUID                                  ID    name\n"
        "00000000-0000-0000-0000-000000000000  0    Domain-0                      \n"
        "507644cf-a9b1-40ed-8c62-27c244f5c977  3    pv                            \n"
        "4f65319e-1fac-46d6-a8a1-6f5c9919f30c  5    pvh                           \n"
    )


def test_domid_and_domname(host: FakeHost, xl: Xl) -> None:
    assert xl("domid", "pv").out == "3\n"
    assert xl("domname", "3").out == "pv\n"
    run = xl("domid", "nosuch")
    assert run.code == 1
    assert run.err == "Can't get domid of domain name 'nosuch', maybe this domain does not exist.\n"
    run = xl("domname", "99")
    assert run.err == "Can't get domain name of domain id '99', maybe this domain does not exist.\n"
    run = xl("domname", "pv")
    assert (run.code, run.err) == (1, "Invalid domain id.\n\n")


def test_uptime(host: FakeHost, xl: Xl) -> None:
    host.routes["GET /uptime"] = [
        {"domid": 0, "name": "Domain-0", "seconds": 707},
        {"domid": 3, "name": "pv", "seconds": 86400 * 2 + 556.7},
        {"domid": 5, "name": "pvh", "seconds": 86400 + 36000},
    ]
    assert xl("uptime").out == (
        "Name                                ID Uptime\n"
        "Domain-0                             0  0:11:47\n"
        "pv                                   3 2 days,  0:09:16\n"
        "pvh                                  5 1 day, 10:00:00\n"
    )
    assert xl("uptime", "pvh").out.splitlines()[1:] == ["pvh                                  5 1 day, 10:00:00"]
    assert xl("uptime", "-s", "Domain-0").out.endswith(" up  0:11, Domain-0 (0)\n")


INFO = {"host": "dom0", "nr_cpus": 2, "free_cpus": 0, "xen_version": "4.6.0", "xen_caps": "xen-3.0-x86_64 "}


def test_info(host: FakeHost, xl: Xl) -> None:
    host.routes["GET /info"] = INFO
    assert xl("info").out == (
        "host                   : dom0\n"
        "nr_cpus                : 2\n"
        "free_cpus              : 0\n"
        "xen_version            : 4.6.0\n"
        "xen_caps               : xen-3.0-x86_64 \n"
    )


def test_info_with_numa(host: FakeHost, xl: Xl) -> None:
    host.routes["GET /info"] = INFO | {
        "cpu_topology": [{"cpu": cpu, "core": cpu, "socket": 0, "node": 0} for cpu in range(2)],
        "numa_info": [{"node": 0, "memsize_mb": 6144, "memfree_mb": 2322, "distances": [10]}],
    }
    assert xl("info", "-n").out == (
        "host                   : dom0\n"
        "nr_cpus                : 2\n"
        "free_cpus              : 0\n"
        "cpu_topology           :\n"
        "cpu:    core    socket     node\n"
        "  0:       0        0        0\n"
        "  1:       1        0        0\n"
        "device topology        :\n"
        "device           node\n"
        "No device topology data available\n"
        "numa_info              :\n"
        "node:    memsize    memfree    distances\n"
        "   0:      6144       2322      10\n"
        "xen_version            : 4.6.0\n"
        "xen_caps               : xen-3.0-x86_64 \n"
    )
    assert host.requests[-1][0] == "GET /info?numa=1"


def test_dmesg_and_debug_keys(host: FakeHost, xl: Xl) -> None:
    text = "(XEN) Xen version 4.6.0\n(XEN) é\n" * 500
    host.routes["GET /dmesg"] = Answer(text=text, chunked=True)
    host.routes["POST /debug-keys"] = {}
    assert xl("dmesg").out == text
    assert xl("dmesg", "-c").out == text
    assert host.requests[-1][0] == "GET /dmesg?clear=1"
    assert xl("debug-keys", "qe").code == 0
    assert host.requests[-1] == ("POST /debug-keys", {"keys": "qe"})


def test_sched_credit(host: FakeHost, xl: Xl) -> None:
    host.routes["GET /sched-credit"] = {"tslice_ms": 30, "ratelimit_us": 1000, "migration_delay_us": 0}
    host.routes["GET /cpupools"] = {"pools": [POOL_0], "free_cpus": []}
    for row in (DOM0, PV, PVH):
        host.routes[f"GET /domains/{row['domid']}/sched-credit"] = {"weight": 256, "cap": 0}
    host.routes["POST /domains/3/sched-credit"] = {"weight": 512, "cap": 50}
    heading = "Name                                ID Weight  Cap\n"
    pool = "Cpupool Pool-0: tslice=30ms ratelimit=1000us migration-delay=0us\n"
    pv = "pv                                   3    256    0\n"
    assert xl("sched-credit").out == (
        pool
        + heading
        + "Domain-0                             0    256    0\n"
        + pv
        + "pvh                                  5    256    0\n"
    )
    assert xl("sched-credit", "-s").out == pool
    assert xl("sched-credit", "-d", "pv").out == heading + pv
    assert xl("sched-credit", "-dpv", "--weight=512", "-c50").out == ""
    assert host.requests[-1] == ("POST /domains/3/sched-credit", {"weight": 512, "cap": 50})
    del host.routes["GET /sched-credit"]
    assert xl("sched-credit", "-s").out == "Cpupool Pool-0: [sched params unavailable]\n"


def test_sched_credit_of_pools(host: FakeHost, xl: Xl) -> None:
    host.routes["GET /cpupools"] = {"pools": [POOL_0, POOL_1], "free_cpus": []}
    host.routes["GET /domains"] = [DOM0, PV, PVH | {"cpupool": "fast", "cpupool_id": 1}]
    host.routes["GET /sched-credit"] = lambda query: {
        "tslice_ms": 30 if query["?pool"] == "0" else 5, "ratelimit_us": 1000, "migration_delay_us": 0
    }  # fmt: skip
    for row in (DOM0, PV, PVH):
        host.routes[f"GET /domains/{row['domid']}/sched-credit"] = {"weight": 256, "cap": 0}
    heading = "Name                                ID Weight  Cap\n"
    fast = (
        "Cpupool fast: tslice=5ms ratelimit=1000us migration-delay=0us\n"
        + heading
        + "pvh                                  5    256    0\n"
    )
    assert xl("sched-credit").out == (
        "Cpupool Pool-0: tslice=30ms ratelimit=1000us migration-delay=0us\n"
        + heading
        + "Domain-0                             0    256    0\npv                                   3    256    0\n"
        + fast
    )
    assert xl("sched-credit", "-p", "fast").out == xl("sched-credit", "-p", "1").out == fast
    assert xl("sched-credit", "-s", "-p", "fast").out == fast.splitlines()[0] + "\n"
    run = xl("sched-credit", "-s", "-p", "nosuch")
    assert (run.code, run.out, run.err) == (1, "", "unknown cpupool 'nosuch'\n")


def test_sched_credit_sets_what_a_pool_runs_by(host: FakeHost, xl: Xl) -> None:
    host.routes["GET /cpupools"] = {"pools": [POOL_0, POOL_1], "free_cpus": []}
    host.routes["POST /sched-credit"] = {}
    assert xl("sched-credit", "-s", "-t", "5", "-r200", "-p", "fast").code == 0
    assert host.requests[-1] == ("POST /sched-credit", {"tslice_ms": 5, "ratelimit_us": 200, "pool": "1"})
    host.routes["POST /sched-credit"] = Refusal("Time slice out of range, valid range is from 1 to 1000", status=409)
    run = xl("sched-credit", "-s", "-t", "5000")
    assert (run.code, run.err) == (
        1,
        "libxl_sched_credit_params_set failed.\nhint: Time slice out of range, valid range is from 1 to 1000\n",
    )
    for wrong in ("abc", "", "1e3", "99999999999999", "٣"):
        run = xl("sched-credit", "-d", "pv", "-w", wrong)
        assert run.code == 1
        assert run.err.startswith("libxl_domain_sched_params_set failed.\nhint: weight is a whole number")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("sched-credit2",), "no cpupool is scheduled by credit2"),
        (("sched-credit2", "-s", "-p", "x"), "no cpupool is scheduled by credit2"),
        (("sched-credit2", "-d", "pv"), "libxl_domain_sched_params_get returned credit not credit2."),
        (("sched-credit2", "-w", "5"), "Must specify a domain."),
        (("sched-credit2", "-d", "pv", "-p", "x"), "Specifying a cpupool is not allowed with other options."),
        (("sched-credit2", "-d", "nosuch"), "nosuch is an invalid domain identifier (rc=-6)"),
        (("sched-rtds",), "no cpupool is scheduled by rtds"),
        (("sched-rtds", "-d", "pv", "-v", "all"), "libxl_domain_sched_params_get returned credit not rtds."),
        (("sched-rtds", "-p", "5"), "Missing parameters."),
        (("sched-rtds", "-d", "pv", "-b", "5"), "Must specify VCPU."),
    ],
)
def test_other_schedulers_are_an_error(host: FakeHost, xl: Xl, args: tuple[str, ...], message: str) -> None:
    run = xl(*args)
    assert (run.code, run.out, run.err.splitlines()[0]) == (1, "", message)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("-w", "5"), "Must specify a domain."),
        (("-t", "3"), "Must specify schedparam to set schedule parameter values."),
        (("-d", "pv", "-s"), "Specifying a cpupool or schedparam is not allowed with domain options."),
        (("-p", "foo"), "unknown cpupool 'foo'"),
    ],
)
def test_sched_credit_misuse(host: FakeHost, xl: Xl, args: tuple[str, ...], message: str) -> None:
    host.routes["GET /cpupools"] = {"pools": [POOL_0], "free_cpus": []}
    run = xl("sched-credit", *args)
    assert (run.code, run.err) == (1, message + "\n")


def test_pause_unpause_rename_destroy(host: FakeHost, xl: Xl) -> None:
    for command in ("pause", "unpause"):
        host.routes[f"POST /domains/3/{command}"] = {}
        run = xl(command, "pv")
        assert (run.code, run.out, run.err) == (0, "", "")
        assert host.requests[-1] == (f"POST /domains/3/{command}", {})
    host.routes["POST /domains/3/rename"] = {}
    assert xl("rename", "pv", "pvx").code == 0
    assert host.requests[-1] == ("POST /domains/3/rename", {"name": "pvx"})
    host.routes["DELETE /domains/3"] = {}
    assert xl("destroy", "pv").code == 0
    assert host.requests[-1] == ("DELETE /domains/3", {})


def test_domain_0_is_not_destroyed_by_accident(host: FakeHost, xl: Xl) -> None:
    run = xl("destroy", "Domain-0")
    assert run.code == 1
    assert run.err == (
        "Not destroying domain 0; use -f to force.\n"
        "This can only be done when using a disaggregated hardware domain and toolstack.\n\n"
    )
    assert not [request for request, _ in host.requests if request.startswith("DELETE")]


def test_shutdown(host: FakeHost, xl: Xl) -> None:
    host.routes["POST /domains/3/shutdown"] = {}
    run = xl("shutdown", "pv")
    assert (run.code, run.out, run.err) == (0, "", "Shutting down domain 3\n")
    assert host.requests[-1] == ("POST /domains/3/shutdown", {"force": False})
    assert xl("shutdown").err == "You must specify -a or a domain id.\n\n"


def test_shutdown_wait_polls_until_the_end(host: FakeHost, xl: Xl) -> None:
    host.routes["POST /domains/3/shutdown"] = {}
    answers = iter([[{"seq": 4, "event": "created"}], [], [{"seq": 9, "event": "shutdown", "reason": "poweroff"}]])
    host.routes["GET /domains/3/events"] = lambda query: next(answers)
    run = xl("shutdown", "-wF", "pv")
    assert run.err == "Shutting down domain 3\nWaiting for 1 domains\nDomain 3 has been shut down, reason code 0\n"
    polled = [request for request, _ in host.requests if "events" in request]
    assert polled == [f"GET /domains/3/events?since={since}" for since in (0, 4, 4)]
    assert ("POST /domains/3/shutdown", {"force": True}) in host.requests


def test_reboot_all_goes_on_after_a_refusal(host: FakeHost, xl: Xl) -> None:
    host.routes["POST /domains/3/reboot"] = Refusal("domain 3 (pv) is not running", status=409)
    host.routes["POST /domains/5/reboot"] = {}
    run = xl("reboot", "-a")
    assert run.code == 1
    assert run.err == "Rebooting domain 3\ndomain 3 (pv) is not running\nRebooting domain 5\n"


def test_refusal_of_the_host_is_a_line_and_a_hint(host: FakeHost, xl: Xl) -> None:
    host.routes["POST /domains/3/rename"] = Refusal("name\nis taken", hint="choose another", exit=4)
    run = xl("rename", "pv", "pvh")
    assert (run.code, run.err) == (4, "name is taken\nhint: choose another\n")


def test_names_are_quoted_in_the_path(host: FakeHost, xl: Xl) -> None:
    host.routes["GET /domains/a b%ü?"] = PV | {"config": {}}
    assert xl("list", "a b%ü?").code == 0
