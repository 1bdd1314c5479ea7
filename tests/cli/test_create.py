# SPDX-License-Identifier: GPL-2.0-only
"""``xl create``: configuration files, dry runs, what is sent to the host, and following a domain over its reboots."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.cli.conftest import Xl
from tests.cli.fake_host import FakeHost, Refusal, console_socket
from tests.cli.test_client import XL, environment

CONFIG = 'name = "x"\nkernel = "/k"\nmemory = 64\n'


@pytest.fixture
def cfg(tmp_path: Path) -> Path:
    path = tmp_path / "x.cfg"
    path.write_text(CONFIG)
    return path


def test_sends_the_configuration_as_it_is(host: FakeHost, xl: Xl, cfg: Path) -> None:
    host.routes["POST /domains"] = {"domid": 7, "name": "x", "console": "/c", "warnings": ["careful"]}
    run = xl("create", str(cfg), "-p", "memory=96", "--pv-mode", "fast", 'name="y"')
    assert (run.code, run.out, run.err) == (0, "", f"Parsing config from {cfg}\ncareful\n")
    assert host.requests == [
        (
            "POST /domains",
            {
                "config_text": CONFIG,
                "config_path": str(cfg),
                "extra": ["memory=96", 'name="y"'],
                "paused": True,
                "pv_mode": "fast",
                "cwd": os.getcwd(),
            },
        )
    ]
    assert xl("create", "-q", f"--defconfig={cfg}").err == "careful\n"


def test_warnings_are_told_once(host: FakeHost, xl: Xl, cfg: Path) -> None:
    cfg.write_text(CONFIG + "colour=1\n")
    warning = f"{cfg}:4: warning: unknown parameter `colour' ignored"
    host.routes["POST /domains"] = {"domid": 7, "name": "x", "console": "/c", "warnings": [warning]}
    assert xl("create", "-q", str(cfg)).err == warning + "\n"


@pytest.mark.parametrize("args", [("create", "-n"), ("-N", "create")])
def test_dry_run_needs_no_host(run_dir: Path, xl: Xl, cfg: Path, args: tuple[str, ...]) -> None:
    run = xl(*args, str(cfg), 'disk=["a,raw,xvda,w"]')
    assert run.code == 0
    assert json.loads(run.out)["b_info"]["target_memkb"] == 65536
    assert run.out.startswith('{\n    "c_info": {\n        "type": "pv",\n        "name": "x",\n')
    assert run.err.splitlines()[1:] == ["warning: option `disk' is not supported by this version of pyxen"]
    assert not list(run_dir.iterdir())


def test_errors_of_the_file_are_xls(run_dir: Path, xl: Xl, cfg: Path) -> None:
    cfg.write_text('name="x"\nmemory = 12 34\n')
    run = xl("create", str(cfg))
    assert run.code == 1
    assert run.err == (
        f"Parsing config from {cfg}\n"
        f"{cfg}:2: config parsing error near `34': syntax error, unexpected NUMBER, expecting $end\n"
        "Failed to parse config: Invalid argument\n"
    )
    cfg.write_text('memory = 64\nkernel="/k"\n')
    assert xl("create", "-q", str(cfg)).err == "Domain name must be specified.\n"
    run = xl("create", "/nonexistent.cfg")
    assert (run.code, run.err) == (3, "Failed to read config file: /nonexistent.cfg: No such file or directory\n")
    run = xl("create", "memory=5")
    assert (run.code, run.err) == (6, "Config file not specified and none in save file\n")
    assert xl("create", "/dev/zero").err == "Failed to read config file: /dev/zero: File too large\n"
    assert xl("create", "a\0b").code == 3
    assert xl("create", "a", "b").code == 2


def test_refusal_of_the_host(host: FakeHost, xl: Xl, cfg: Path) -> None:
    host.routes["POST /domains"] = Refusal("option `vif' is not supported by this version of pyxen", hint="remove it")
    run = xl("create", "-q", str(cfg))
    assert (run.code, run.err) == (1, "option `vif' is not supported by this version of pyxen\nhint: remove it\n")


def test_options_that_are_not_here(run_dir: Path, xl: Xl, cfg: Path) -> None:
    assert xl("create", "-V", str(cfg)).err == "xl: 'create --vncviewer' is not supported by this version of pyxen\n"
    assert xl("create", "-e", str(cfg)).code == 1
    assert xl("create", "-M", str(cfg)).err == "option `M' not supported.\n"
    assert xl("create", "--pv-mode=quick", str(cfg)).err.startswith('Unknown pv_mode "quick" specified\nhint:')


def test_console_follows_a_reboot(host: FakeHost, run_dir: Path, cfg: Path) -> None:
    """The console of the first domain closes, the host says which domain took its place, and its console is next."""
    host.routes["POST /domains"] = {"domid": 7, "name": "x", "console": "/c", "warnings": []}
    host.routes["GET /domains/7/events"] = lambda query: {
        "0": [
            {"seq": 1, "event": "created"},
            {"seq": 2, "event": "shutdown", "reason": "reboot", "action": "restart"},
            {"seq": 3, "event": "destroyed"},
        ],
        "3": [{"seq": 5, "event": "restarted", "new_domid": 8}],
    }[query["?since"]]
    shutdown = {"seq": 6, "event": "shutdown", "reason": "poweroff", "action": "destroy"}
    host.routes["GET /domains/8/events"] = [shutdown, {"seq": 7, "event": "destroyed"}]
    host.routes["POST /domains/7/unpause"] = {}
    first, second = console_socket(run_dir, 7), console_socket(run_dir, 8)
    command = [*XL, "create", "-q", str(cfg), "-c"]
    with first, second, subprocess.Popen(command, stdin=-3, stdout=-1, stderr=-1, env=environment()) as process:
        for listener, text in ((first, b"booting\r\n"), (second, b"again\r\n")):
            with listener.accept()[0] as guest:
                guest.sendall(text)
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (0, b"booting\r\nagain\r\n", b"")
    # It starts when its console is open, so that no word of it is missed.
    assert host.requests[0][1]["paused"] is True
    assert host.requests[1][0] == "POST /domains/7/unpause"


def test_foreground_tells_how_it_ended(host: FakeHost, xl: Xl, cfg: Path) -> None:
    host.routes["POST /domains"] = {"domid": 7, "name": "x", "console": "/c", "warnings": []}
    shutdown = {"seq": 2, "event": "shutdown", "reason": "crash", "action": "destroy"}
    host.routes["GET /domains/7/events"] = [shutdown, {"seq": 3, "event": "destroyed"}]
    run = xl("create", "-qF", str(cfg))
    assert run.code == 0
    assert run.err == (
        "Domain 7 has shut down, reason code 3 0x3\n"
        "Action for shutdown reason code 3 is destroy\n"
        "Domain 7 has been destroyed.\n"
    )


def test_restart_that_failed_is_an_error(host: FakeHost, xl: Xl, cfg: Path) -> None:
    host.routes["POST /domains"] = {"domid": 7, "name": "x", "console": "/c", "warnings": []}
    shutdown = {"seq": 2, "event": "shutdown", "reason": "reboot", "action": "restart"}
    failed = {"seq": 4, "event": "action-failed", "action": "restart", "error": "no memory"}
    host.routes["GET /domains/7/events"] = [shutdown, {"seq": 3, "event": "destroyed"}, failed]
    run = xl("create", "-qF", str(cfg))
    assert run.code == 1 and run.err.endswith("domain 7: restart failed: no memory\n")
