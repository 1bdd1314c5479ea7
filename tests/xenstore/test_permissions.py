# SPDX-License-Identifier: GPL-2.0-only
"""Who may do what; each answer was checked against Xen 4.17's C xenstored with the same guests."""

from __future__ import annotations

import pytest

from pyxen.abi.io.xs_wire import XsType
from pyxen.xenstore.daemon import XenstoreDaemon
from tests.xenstore.peers import FakePrivcmd, Peer

OK = b"OK\0"


@pytest.fixture
def host() -> tuple[Peer, Peer, Peer]:
    """dom0, domain 5 and domain 6, whose home 5 may not enter."""
    service = XenstoreDaemon(None).service
    dom0, five, six = (Peer(service, domid) for domid in (0, 5, 6))
    for peer in (five, six):
        service.domains.adopt(peer.domid, peer)
    dom0.ask(XsType.WRITE, b"/local/domain/5/data\0")
    dom0.ask(XsType.SET_PERMS, b"/local/domain/5/data\0n5\0")
    dom0.ask(XsType.WRITE, b"/local/domain/5/ro\0x")
    dom0.ask(XsType.SET_PERMS, b"/local/domain/5/ro\0n0\0r5\0")
    return dom0, five, six


def test_a_guest_reads_and_writes_what_it_was_given_and_nothing_else(host: tuple[Peer, Peer, Peer]) -> None:
    dom0, five, _ = host
    assert five.ask(XsType.READ, b"ro\0") == b"x"
    assert five.ask(XsType.READ, b"/local/domain/5/ro\0") == b"x"
    assert five.ask(XsType.WRITE, b"ro\0y") == "EACCES"
    assert five.ask(XsType.MKDIR, b"ro\0") == "EACCES"
    assert five.ask(XsType.SET_PERMS, b"ro\0n0\0") == "EACCES"
    assert five.ask(XsType.WRITE, b"data/x/y\0v") == OK
    assert dom0.ask(XsType.GET_PERMS, b"/local/domain/5/data/x/y\0") == b"n5\0"
    for path in (b"/\0", b"/local/domain/6\0", b"/tool\0"):
        assert five.ask(XsType.READ, path) == "EACCES"
    assert five.ask(XsType.DIRECTORY, b"/local/domain\0") == "EACCES"
    assert five.ask(XsType.WRITE, b"/foo\0x") == "EACCES"
    assert five.ask(XsType.RM, b"/local/domain/6\0") == "EACCES"


def test_whether_a_node_exists_is_told_only_to_those_who_may_look(host: tuple[Peer, Peer, Peer]) -> None:
    dom0, five, _ = host
    assert five.ask(XsType.READ, b"/nonexistent\0") == "EACCES"
    assert five.ask(XsType.RM, b"/local/none\0") == "EACCES"
    assert five.ask(XsType.READ, b"data/none\0") == "ENOENT"
    assert five.ask(XsType.RM, b"data/none\0") == OK
    dom0.ask(XsType.SET_PERMS, b"/local/domain/5\0n0\0r5\0")
    for absent in (b"nonexist\0", b"non/exist\0"):
        assert five.ask(XsType.READ, absent) == "ENOENT"
        assert five.ask(XsType.RM, absent) == "EACCES"
        assert five.ask(XsType.WRITE, absent) == "EACCES"


def test_only_the_owner_changes_permissions_and_never_the_owner(host: tuple[Peer, Peer, Peer]) -> None:
    _, five, six = host
    five.ask(XsType.WRITE, b"data/x\0v")
    assert five.ask(XsType.SET_PERMS, b"data/x\0n5\0r6\0") == OK
    assert five.ask(XsType.SET_PERMS, b"data/x\0n6\0") == "EPERM"
    assert five.ask(XsType.SET_PERMS, b"data/x\0n0\0") == "EPERM"
    assert six.ask(XsType.SET_PERMS, b"/local/domain/5/data/x\0n5\0b6\0") == "EACCES"
    assert five.ask(XsType.GET_PERMS, b"data/x\0") == b"n5\0r6\0"


@pytest.mark.parametrize("entry", [b"q5", b"n", b"", b"n5x", b"nx5", b"rw5", b"5"])
def test_an_entry_that_is_none_changes_nothing(host: tuple[Peer, Peer, Peer], entry: bytes) -> None:
    _, five, _ = host
    assert five.ask(XsType.SET_PERMS, b"data\0n5\0" + entry + b"\0") == "EINVAL"
    assert five.ask(XsType.GET_PERMS, b"data\0") == b"n5\0"


def test_read_write_and_both_mean_what_they_say(host: tuple[Peer, Peer, Peer]) -> None:
    dom0, _, six = host
    path = b"/local/domain/5/data\0"
    assert six.ask(XsType.READ, path) == "EACCES"
    dom0.ask(XsType.SET_PERMS, path + b"n5\0r6\0")
    assert six.ask(XsType.READ, path) == b""
    assert six.ask(XsType.WRITE, path + b"v") == "EACCES"
    dom0.ask(XsType.SET_PERMS, path + b"n5\0w6\0")
    assert six.ask(XsType.READ, path) == "EACCES"
    assert six.ask(XsType.GET_PERMS, path) == "EACCES"
    assert six.ask(XsType.DIRECTORY, path) == "EACCES"
    assert six.ask(XsType.WRITE, path + b"v") == OK
    dom0.ask(XsType.SET_PERMS, path + b"n5\0b6\0")
    assert six.ask(XsType.READ, path) == b"v"
    # What a guest creates under another's node is its own.
    assert six.ask(XsType.WRITE, b"/local/domain/5/data/new\0v") == OK
    assert dom0.ask(XsType.GET_PERMS, b"/local/domain/5/data/new\0") == b"n6\0b6\0"
    assert six.ask(XsType.RM, path) == OK


def test_the_first_letter_is_for_everybody_else(host: tuple[Peer, Peer, Peer]) -> None:
    dom0, five, six = host
    dom0.ask(XsType.WRITE, b"/pub\0x")
    dom0.ask(XsType.SET_PERMS, b"/pub\0r0\0n6\0")
    assert five.ask(XsType.READ, b"/pub\0") == b"x"
    assert six.ask(XsType.READ, b"/pub\0") == "EACCES"


@pytest.mark.parametrize(
    ("kind", "payload"),
    [
        (XsType.INTRODUCE, b"8\x001\x001\0"), (XsType.RELEASE, b"5\0"), (XsType.RESUME, b"5\0"),
        (XsType.SET_TARGET, b"6\x005\0"), (XsType.CONTROL, b"check\0"), (XsType.IS_DOMAIN_INTRODUCED, b"5\0"),
        (XsType.SET_PERMS, b"@releaseDomain\0n0\0r5\0"),
    ],
)
def test_a_guest_commands_no_domains(host: tuple[Peer, Peer, Peer], kind: XsType, payload: bytes) -> None:
    _, five, _ = host
    assert five.ask(kind, payload) == "EACCES"


def test_a_stub_domain_stands_in_for_its_target(host: tuple[Peer, Peer, Peer]) -> None:
    dom0, five, six = host
    assert dom0.ask(XsType.SET_TARGET, b"6\x0099\0") == "ENOENT"
    assert dom0.ask(XsType.SET_TARGET, b"6\x005\0") == OK
    assert six.ask(XsType.READ, b"/local/domain/5/ro\0") == b"x"
    assert six.ask(XsType.WRITE, b"/local/domain/5/data/by6\0x") == OK
    assert dom0.ask(XsType.GET_PERMS, b"/local/domain/5/data/by6\0") == b"n6\0"
    assert five.ask(XsType.READ, b"data/by6\0") == "EACCES"
    # Naming dom0 as the target must not make a guest dom0.
    assert dom0.ask(XsType.SET_TARGET, b"6\x000\0") == OK
    assert six.ask(XsType.READ, b"/tool\0") == "EACCES"


def test_a_dead_domains_nodes_and_rights_do_not_wait_for_the_next_of_its_number() -> None:
    privcmd = FakePrivcmd()
    daemon = XenstoreDaemon(privcmd)
    service = daemon.service
    dom0, five = Peer(service), Peer(service, 5)
    privcmd.add(5)
    service.domains.adopt(5, five)
    dom0.ask(XsType.WRITE, b"/other\0v")
    dom0.ask(XsType.SET_PERMS, b"/other\0n0\0r5\0")
    dom0.ask(XsType.MKDIR, b"/owned/by/zero\0")
    dom0.ask(XsType.SET_PERMS, b"/owned/by\0n5\0")
    assert five.ask(XsType.READ, b"/other\0") == b"v"
    assert service.store.owned_count(5) == 1
    del privcmd.states[5]
    daemon.reap()
    assert five.closed
    assert dom0.ask(XsType.IS_DOMAIN_INTRODUCED, b"5\0") == b"F\0"
    assert dom0.ask(XsType.DIRECTORY, b"/owned\0") == b""
    assert service.store.owned_count(5) == 0
    # Granted while nobody has the number: shown, worth nothing.
    dom0.ask(XsType.WRITE, b"/later\0v")
    dom0.ask(XsType.SET_PERMS, b"/later\0n5\0r5\0")
    privcmd.add(5)
    reborn = Peer(service, 5)
    service.domains.adopt(5, reborn)
    for path in (b"/other\0", b"/later\0"):
        assert b"r5\0" in bytes(dom0.ask(XsType.GET_PERMS, path))  # type: ignore[arg-type]
        assert reborn.ask(XsType.READ, path) == "EACCES"
    dom0.ask(XsType.SET_PERMS, b"/other\0n0\0r5\0")
    assert reborn.ask(XsType.READ, b"/other\0") == b"v"
    assert list(service.store.check()) == []


def test_a_domain_that_dies_before_it_was_introduced_leaves_nothing() -> None:
    privcmd = FakePrivcmd()
    daemon = XenstoreDaemon(privcmd)
    dom0 = Peer(daemon.service)
    privcmd.add(7)
    dom0.ask(XsType.MKDIR, b"/local/domain/7\0")
    dom0.ask(XsType.SET_PERMS, b"/local/domain/7\0n7\0")
    del privcmd.states[7]
    daemon.reap()
    assert dom0.ask(XsType.READ, b"/local/domain/7\0") == "ENOENT"
