# SPDX-License-Identifier: GPL-2.0-only
"""What one guest may use; the counts at which the C daemon (4.17) refuses the same guest."""

from __future__ import annotations

import pytest

from pyxen.abi.io.xs_wire import XsType
from pyxen.xenstore.daemon import XenstoreDaemon
from tests.xenstore.peers import Peer

OK = b"OK\0"


@pytest.fixture
def guest() -> Peer:
    """Domain 6, which owns its home and lets domain 5 read it."""
    service = XenstoreDaemon(None).service
    dom0, six = Peer(service), Peer(service, 6)
    service.domains.adopt(6, six)
    dom0.ask(XsType.MKDIR, b"/local/domain/6\0")
    dom0.ask(XsType.SET_PERMS, b"/local/domain/6\0n6\0r5\0")
    return six


def count_until(guest: Peer, kind: XsType, payload: str, error: str, tx: int = 0) -> int:
    """How many requests go through before ``error``."""
    for number in range(3000):
        reply = guest.ask(kind, (payload % number).encode(), tx)
        if isinstance(reply, str) and reply != "ENOENT":
            assert reply == error
            return number
    raise AssertionError("no limit")


def test_node_size_counts_value_permissions_and_childrens_names(guest: Peer) -> None:
    assert count_until(guest, XsType.WRITE, "n/%d\0", "ENOSPC") == 529
    assert guest.ask(XsType.WRITE, b"n/0\0xx") == OK
    assert guest.ask(XsType.RM, b"n\0") == OK
    assert count_until(guest, XsType.WRITE, "c/%030d\0", "ENOSPC") == 64
    assert guest.ask(XsType.WRITE, b"big\0" + b"z" * 2008) == OK
    assert guest.ask(XsType.WRITE, b"big\0" + b"z" * 2009) == "ENOSPC"
    assert guest.ask(XsType.WRITE, b"big2\0" + b"z" * 2009) == "ENOSPC"
    assert guest.ask(XsType.READ, b"big2\0") == "ENOENT"
    assert guest.ask(XsType.WRITE, b"big\0small") == OK


def test_a_thousand_nodes(guest: Peer) -> None:
    for number in range(37):
        for leaf in range(26):
            assert guest.ask(XsType.MKDIR, b"n%d/%d\0" % (number, leaf)) == OK
    # The home and 37 * 27 nodes below it are 1000.
    assert guest.ask(XsType.MKDIR, b"n0/more\0") == "ENOSPC"
    assert guest.ask(XsType.MKDIR, b"deep/er\0") == "ENOSPC"
    assert guest.ask(XsType.RM, b"n0/0\0") == OK
    assert guest.ask(XsType.MKDIR, b"n0/more\0") == OK
    assert guest.service.store.owned_count(6) == 1000


def test_nodes_created_in_transactions_count(guest: Peer) -> None:
    guest.service.quota.nodes = 10
    tx = guest.start()
    assert count_until(guest, XsType.WRITE, "a%d\0", "ENOSPC", tx) == 9
    # A transaction that ran over a quota has lost a write: it cannot be what its owner meant.
    assert guest.ask(XsType.TRANSACTION_END, b"T\0", tx) == "ENOMEM"
    first, second = guest.start(), guest.start()
    for number in range(9):
        assert guest.ask(XsType.WRITE, b"a%d\0" % number, first) == OK
    assert guest.ask(XsType.READ, b"a0\0", second) == "ENOENT"
    assert guest.ask(XsType.TRANSACTION_END, b"T\0", first) == OK
    assert guest.ask(XsType.TRANSACTION_END, b"T\0", second) == "EAGAIN"
    assert guest.service.store.owned_count(6) == 10


def test_two_transactions_do_not_share_one_quota_twice(guest: Peer) -> None:
    service = guest.service
    guest.ask(XsType.MKDIR, b"p\0")
    guest.ask(XsType.MKDIR, b"q\0")
    service.quota.nodes = 8
    first, second = guest.start(), guest.start()
    for number in range(5):
        assert guest.ask(XsType.MKDIR, b"p/%d\0" % number, first) == OK
        assert guest.ask(XsType.MKDIR, b"q/%d\0" % number, second) == OK
    assert guest.ask(XsType.TRANSACTION_END, b"T\0", first) == OK
    assert guest.ask(XsType.TRANSACTION_END, b"T\0", second) == "ENOSPC"
    assert service.store.owned_count(6) == 8
    assert list(service.store.check()) == []


def test_nodes_looked_at_by_one_transaction(guest: Peer) -> None:
    tx = guest.start()
    assert count_until(guest, XsType.READ, "no%d\0", "ENOSPC", tx) in range(1000, 1025)
    assert guest.ask(XsType.TRANSACTION_END, b"T\0", tx) == "ENOMEM"


def test_watches_and_transactions(guest: Peer) -> None:
    # One over the quota, in the C daemon too.
    assert count_until(guest, XsType.WATCH, "w%d\0t\0", "E2BIG") == 129
    transactions = [guest.start() for _ in range(11)]
    assert guest.ask(XsType.TRANSACTION_START, b"\0") == "ENOSPC"
    assert guest.ask(XsType.RESET_WATCHES, b"\0") == OK
    assert [guest.ask(XsType.READ, b"n\0", tx) for tx in transactions] == ["ENOENT"] * 11
    assert guest.ask(XsType.WATCH, b"w0\0t\0") == OK
    assert guest.start() == 12


def test_permission_entries(guest: Peer) -> None:
    guest.ask(XsType.MKDIR, b"x\0")
    assert guest.ask(XsType.SET_PERMS, b"x\0n6\0n0\0r1\0r2\0r3\0") == OK
    assert guest.ask(XsType.SET_PERMS, b"x\0n6\0n0\0r1\0r2\0r3\0r4\0") == "ENOSPC"


def test_dom0_has_no_quota_and_changes_the_guests(guest: Peer) -> None:
    dom0 = Peer(guest.service)
    for number in range(1100):
        assert dom0.ask(XsType.WRITE, b"/many/%d\0" % number) == OK
    assert dom0.ask(XsType.WRITE, b"/huge\0" + b"z" * 4000) == OK
    assert dom0.ask(XsType.CONTROL, b"quota\0set\0watches\0" b"2\0") == OK
    assert count_until(guest, XsType.WATCH, "w%d\0t\0", "E2BIG") == 3
    assert b"watches          :        2 Watches per domain\n" in bytes(
        dom0.ask(XsType.CONTROL, b"quota\0"))  # type: ignore[arg-type]
    assert b"watches         :        3\n" in bytes(
        dom0.ask(XsType.CONTROL, b"quota\0" b"6\0"))  # type: ignore[arg-type]
    for wrong in (b"quota\0set\0bogus\0" b"1\0", b"quota\0x\0", b"quota\0set\0nodes\0-1\0", b"nosuch\0", b""):
        assert dom0.ask(XsType.CONTROL, wrong) == "EINVAL"
