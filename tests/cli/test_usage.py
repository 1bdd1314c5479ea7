# SPDX-License-Identifier: GPL-2.0-only
"""Finding commands, options and their mistakes; expected texts recorded from xl 4.17."""

from __future__ import annotations

import pytest

from pyxen.cli.getopt import HelpRequested, UsageError, getopt
from pyxen.cli.main import main as pyxen_main
from pyxen.cli.usage import NOT_YET, command_help
from pyxen.cli.xl import COMMANDS
from tests.cli.conftest import Xl
from tests.cli.fake_host import FakeHost


def test_unknown_command(xl: Xl) -> None:
    run = xl("bogus")
    assert (run.code, run.out, run.err) == (1, "", "command not implemented\n")


def test_command_of_real_xl_that_is_not_here_yet(xl: Xl) -> None:
    run = xl("save", "pv", "file")
    assert (run.code, run.err) == (1, "xl: 'save' is not supported by this version of pyxen\n")
    assert not NOT_YET & COMMANDS.keys()


def test_commands_can_be_shortened_while_unambiguous(host: FakeHost, xl: Xl) -> None:
    assert xl("lis").out == xl("list").out
    assert xl("s").err == "command not implemented\n"
    assert "'migrate'" in xl("migrate").err


def test_no_command_prints_the_commands(xl: Xl) -> None:
    run = xl()
    assert run.code == 1
    assert run.out.startswith("Usage xl [-vfNtT] <subcommand> [args]\n\nxl full list of subcommands:\n\n create    ")
    assert " list                List information about all/some domains\n" in run.out
    assert xl("help").out == run.out and xl("help").code == 0
    assert " save " not in run.out


def test_help_of_a_command(xl: Xl) -> None:
    text = "Usage: xl [-vtT] domid <DomainName>\n\nConvert a domain name to domain id.\n\n"
    for args in (("help", "domid"), ("domid", "-h"), ("domid", "--help"), ("help", "domid", "more")):
        run = xl(*args)
        assert (run.code, run.out) == (0, text)
    assert xl("help", "bogus").out == 'command "bogus" not implemented\n'
    assert xl("help", "save").code == 1
    for name in COMMANDS:
        assert command_help(name).startswith("Usage: xl [-vtT")


def test_missing_arguments(xl: Xl) -> None:
    run = xl("rename", "a")
    assert run.code == 2
    assert run.err == (
        "'xl rename' requires at least 2 arguments.\n\n"
        "Usage: xl [-vtTf] rename <Domain> <NewDomainName>\n\nRename a domain.\n\n"
    )
    assert xl("domid").err.startswith("'xl domid' requires at least 1 argument.\n\nUsage:")


def test_unknown_options(xl: Xl) -> None:
    run = xl("list", "-Q")
    assert (run.code, run.out, run.err) == (2, "", "option `Q' not supported.\n")
    assert xl("sched-credit", "-w").err == "option `w' not supported.\n"
    assert xl("-Z", "list").err.endswith("unknown global option\n")
    assert xl("-N", "list").err == "command does not implement -N (dryrun) option\n"


def test_global_options_are_taken(host: FakeHost, xl: Xl) -> None:
    assert xl("-vvf", "-t", "--", "domid", "pv").out == "3\n"


def test_getopt_is_getopt_long() -> None:
    long = {"domain": "d", "weight": "w", "all": "a", "alter": "x"}
    assert getopt(["a", "-d", "1", "b", "-w2", "-a"], "d:w:a", long) == (
        [("d", "1"), ("w", "2"), ("a", "")],
        ["a", "b"],
    )
    assert getopt(["--domain=1", "--weight", "2", "--", "-a"], "d:w:a", long) == ([("d", "1"), ("w", "2")], ["-a"])
    assert getopt(["--dom", "1", "-"], "d:w:a", long) == ([("d", "1")], ["-"])
    assert getopt(["-ad1"], "d:a") == ([("a", ""), ("d", "1")], [])
    for wrong in (["--al"], ["--all=1"], ["--domain"], ["-d"], ["-:"], ["--nosuch"], ["-é"]):
        with pytest.raises(UsageError):
            getopt(wrong, "d:w:ax", long)
    with pytest.raises(HelpRequested):
        getopt(["x", "-ah"], "a")


def test_pyxen_groups(capsys: pytest.CaptureFixture[str]) -> None:
    assert pyxen_main(["--version"]) == 0
    assert capsys.readouterr().out == "pyxen 0.1.0\n"
    assert pyxen_main([]) == 2
    assert pyxen_main(["help"]) == 0
    assert "host" in capsys.readouterr().out
    assert pyxen_main(["image", "show"]) == 1
    assert pyxen_main(["nosuch"]) == 2
    assert "Traceback" not in capsys.readouterr().err
