# SPDX-License-Identifier: GPL-2.0-only
"""Who hears of what, and in which order; as the C daemon (4.17) answered the same requests."""

from __future__ import annotations

import pytest

from pyxen.abi.io.xs_wire import XsType
from pyxen.xenstore.daemon import XenstoreDaemon
from pyxen.xenstore.service import Service
from tests.xenstore.peers import Peer


@pytest.fixture
def service() -> Service:
    return XenstoreDaemon(None).service


def watch(peer: Peer, *watches: bytes) -> None:
    """Register each ``path NUL token`` and take the first events."""
    for each in watches:
        assert peer.ask(XsType.WATCH, each + b"\0") == b"OK\0"
        assert peer.events() == [each + b"\0"]


def test_the_first_event_follows_the_reply(service: Service) -> None:
    peer = Peer(service)
    service.handle(peer, XsType.WATCH, 3, 0, b"/a\0t\0")
    assert [message[0] for message in peer.messages] == [XsType.WATCH, XsType.WATCH_EVENT]


def test_events_of_a_change_precede_its_reply(service: Service) -> None:
    peer = Peer(service)
    watch(peer, b"/a\0t")
    service.handle(peer, XsType.WRITE, 3, 0, b"/a/b\0v")
    assert [message[0] for message in peer.messages] == [XsType.WATCH_EVENT, XsType.WRITE]


def test_one_client_hears_in_the_order_of_its_watches(service: Service) -> None:
    peer, dom0 = Peer(service), Peer(service)
    watch(peer, b"/d\0zz", b"/d\0aa", b"/\0root", b"/d/1/2\0low", b"/d\0mm")
    dom0.ask(XsType.WRITE, b"/d/1/2/3\0")
    assert peer.events() == [b"/d/1/2/3\0%s\0" % token for token in (b"zz", b"aa", b"root", b"low", b"mm")]


def test_a_removal_is_told_deepest_first_and_above_only_once(service: Service) -> None:
    peer, dom0 = Peer(service), Peer(service)
    dom0.ask(XsType.WRITE, b"/d/1/2/3\0")
    watch(peer, b"/d/1/2/3\0deep", b"/d/1\0mid", b"/d\0top", b"/d/1/nonex\0nonex", b"/d/1/2/3/4\0below")
    dom0.ask(XsType.RM, b"/d/1\0")
    assert peer.events() == [b"/d/1/2/3\0deep\0", b"/d/1\0mid\0", b"/d/1\0top\0"]


def test_a_relative_watch_hears_relative_paths(service: Service) -> None:
    guest, dom0 = Peer(service, 6), Peer(service)
    dom0.ask(XsType.MKDIR, b"/local/domain/6\0")
    dom0.ask(XsType.SET_PERMS, b"/local/domain/6\0n6\0")
    watch(guest, b"rel\0t2", b"/\0all")
    dom0.ask(XsType.WRITE, b"/local/domain/6/rel/y\0")
    assert guest.events() == [b"rel/y\0t2\0", b"/local/domain/6/rel/y\0all\0"]


def test_a_commit_tells_what_was_asked_for_in_the_order_of_looking(service: Service) -> None:
    peer, dom0 = Peer(service), Peer(service)
    for path in (b"/s/x\0", b"/s/base\0"):
        dom0.ask(XsType.WRITE, path)
    watch(peer, b"/\0root")
    tx = dom0.start()
    for kind, payload in (
        (XsType.WRITE, b"/s/b1\0"), (XsType.WRITE, b"/s/a1\0"), (XsType.WRITE, b"/s/n/e/w\0"), (XsType.READ, b"/x\0"),
        (XsType.RM, b"/s/x\0"), (XsType.SET_PERMS, b"/s/base\0n0\0"), (XsType.WRITE, b"/s/tmp\0"),
        (XsType.RM, b"/s/tmp\0"),
    ):
        dom0.ask(kind, payload, tx)
    assert peer.events() == []
    dom0.ask(XsType.TRANSACTION_END, b"T\0", tx)
    assert peer.events() == [
        b"%s\0root\0" % path for path in (b"/s/b1", b"/s/a1", b"/s/n/e/w", b"/s/x", b"/s/base")]
    tx = dom0.start()
    dom0.ask(XsType.WRITE, b"/s/b1\0v", tx)
    dom0.ask(XsType.RM, b"/s/n\0", tx)
    dom0.ask(XsType.WRITE, b"/s/a1\0v", tx)
    dom0.ask(XsType.MKDIR, b"/s/b1\0", tx)
    dom0.ask(XsType.TRANSACTION_END, b"T\0", tx)
    assert peer.events() == [b"%s\0root\0" % path for path in (b"/s/b1", b"/s/n", b"/s/a1")]


def test_an_aborted_or_refused_transaction_tells_nothing(service: Service) -> None:
    peer, dom0, other = Peer(service), Peer(service), Peer(service)
    dom0.ask(XsType.WRITE, b"/k\0")
    watch(peer, b"/\0root")
    tx = dom0.start()
    dom0.ask(XsType.WRITE, b"/k\0x", tx)
    dom0.ask(XsType.TRANSACTION_END, b"F\0", tx)
    tx = dom0.start()
    dom0.ask(XsType.WRITE, b"/k\0x", tx)
    other.ask(XsType.WRITE, b"/k\0y")
    assert dom0.ask(XsType.TRANSACTION_END, b"T\0", tx) == "EAGAIN"
    assert peer.events() == [b"/k\0root\0"]


def test_a_guest_hears_only_of_what_it_may_read(service: Service) -> None:
    guest, dom0 = Peer(service, 6), Peer(service)
    service.domains.adopt(6, guest)
    watch(guest, b"/\0all")
    dom0.ask(XsType.WRITE, b"/s/x\0z")
    dom0.ask(XsType.SET_PERMS, b"/s/x\0n5\0")
    assert guest.events() == []
    # Becoming readable, being removed while readable and ceasing to be readable are news to it.
    dom0.ask(XsType.SET_PERMS, b"/s/x\0n5\0r6\0")
    assert guest.events() == [b"/s/x\0all\0"]
    dom0.ask(XsType.SET_PERMS, b"/s/x\0n5\0")
    assert guest.events() == [b"/s/x\0all\0"]
    dom0.ask(XsType.RM, b"/s/x\0")
    assert guest.events() == []
    # A readable parent lists the child, so that the child's coming and going is no secret.
    dom0.ask(XsType.SET_PERMS, b"/s\0r0\0")
    guest.events()
    dom0.ask(XsType.WRITE, b"/s/kid\0")
    dom0.ask(XsType.SET_PERMS, b"/s/kid\0n0\0")
    dom0.ask(XsType.WRITE, b"/s/kid/kk\0z")
    dom0.ask(XsType.RM, b"/s/kid\0")
    assert guest.events() == [b"/s/kid\0all\0"] * 3
    tx = dom0.start()
    dom0.ask(XsType.WRITE, b"/secret/x\0", tx)
    dom0.ask(XsType.WRITE, b"/s/open\0", tx)
    dom0.ask(XsType.TRANSACTION_END, b"T\0", tx)
    assert guest.events() == [b"/s/open\0all\0"]


def test_special_watches(service: Service) -> None:
    guest, dom0 = Peer(service, 6), Peer(service)
    watch(dom0, b"@introduceDomain\0i", b"@releaseDomain\0r", b"@anything\0x")
    watch(guest, b"@releaseDomain\0r")
    service.domains.adopt(9, Peer(service, 9))
    assert dom0.events() == [b"@introduceDomain\0i\0"]
    service.domains.release(9)
    assert dom0.events() == [b"@releaseDomain\0r\0"]
    assert guest.events() == []
    dom0.ask(XsType.SET_PERMS, b"@releaseDomain\0n0\0r6\0")
    service.domains.adopt(9, Peer(service, 9))
    service.domains.release(9)
    assert guest.events() == [b"@releaseDomain\0r\0"]


def test_watches_end_with_unwatch_reset_and_the_domain(service: Service) -> None:
    guest, dom0 = Peer(service, 6), Peer(service)
    service.domains.adopt(6, guest)
    watch(dom0, b"/a\0" b"1", b"/a\0" b"2")
    assert dom0.ask(XsType.UNWATCH, b"/a\0" b"1\0") == b"OK\0"
    assert dom0.ask(XsType.UNWATCH, b"/a\0" b"1\0") == "ENOENT"
    dom0.ask(XsType.WRITE, b"/a\0")
    assert dom0.events() == [b"/a\0" b"2\0"]
    dom0.ask(XsType.RESET_WATCHES, b"\0")
    dom0.ask(XsType.WRITE, b"/a\0")
    assert dom0.events() == []
    watch(guest, b"/a\0g")
    dom0.ask(XsType.SET_PERMS, b"/a\0r0\0")
    assert guest.events() == [b"/a\0g\0"]
    service.domains.release(6)
    dom0.ask(XsType.WRITE, b"/a\0")
    assert guest.events() == []


def test_an_event_too_long_for_a_message_is_not_sent(service: Service) -> None:
    dom0 = Peer(service)
    token = b"t" * 4000
    watch(dom0, b"/a\0" + token)
    dom0.ask(XsType.WRITE, b"/a/" + b"b" * 90 + b"\0")
    assert dom0.events() == [b"/a/" + b"b" * 90 + b"\0" + token + b"\0"]
    dom0.ask(XsType.WRITE, b"/a/" + b"b" * 95 + b"\0")
    assert dom0.events() == []
