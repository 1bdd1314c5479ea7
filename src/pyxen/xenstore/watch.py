# SPDX-License-Identifier: GPL-2.0-only
"""Watches: who wants to hear about which path.

They are indexed by the path they watch, so that a change asks its own path and those above it, and the number of
watches elsewhere does not matter.  One connection hears in the order in which it registered.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final, Protocol

from pyxen.abi.io.xs_wire import XENSTORE_PAYLOAD_MAX
from pyxen.xenstore.permissions import READ, Permissions
from pyxen.xenstore.store import ROOT, Node, parent_path

INTRODUCE_DOMAIN: Final = b"@introduceDomain"
RELEASE_DOMAIN: Final = b"@releaseDomain"


class Watcher(Protocol):
    """The part of a connection that watches need."""

    domid: int
    privileged: bool
    target: int | None

    def send_event(self, payload: bytes) -> None:
        """Queue one WATCH_EVENT (path NUL token NUL)."""


class Watch:
    """One registration: ``path`` is absolute (or special), ``hidden`` what a relative one leaves out of its events."""

    __slots__ = ("hidden", "path", "sequence", "token", "watcher")

    def __init__(self, watcher: Watcher, path: bytes, token: bytes, hidden: int, sequence: int) -> None:
        self.watcher = watcher
        self.path = path
        self.token = token
        self.hidden = hidden
        self.sequence = sequence

    def fire(self, path: bytes) -> None:
        """Send the event for a change at absolute ``path``, unless the protocol has no room for it."""
        payload = b"%s\0%s\0" % (path[self.hidden:], self.token)
        if len(payload) <= XENSTORE_PAYLOAD_MAX:
            self.watcher.send_event(payload)


def _sequence(watch: Watch) -> int:
    return watch.sequence


class Watches:
    """Every watch of every connection; ``nodes`` is the tree, to ask a parent's permissions."""

    def __init__(self, nodes: Mapping[bytes, Node]) -> None:
        self._nodes = nodes
        self._by_path: dict[bytes, dict[Watch, None]] = {}
        self._sequence = 0

    def add(self, watcher: Watcher, path: bytes, token: bytes, hidden: int) -> Watch:
        """Register; the caller keeps the returned watch and fires it once at once."""
        self._sequence += 1
        watch = Watch(watcher, path, token, hidden, self._sequence)
        self._by_path.setdefault(path, {})[watch] = None
        return watch

    def remove(self, watch: Watch) -> None:
        """Forget a watch that :meth:`add` returned."""
        watches = self._by_path[watch.path]
        del watches[watch]
        if not watches:
            del self._by_path[watch.path]

    def count(self) -> int:
        """Number of watches of all connections."""
        return sum(len(watches) for watches in self._by_path.values())

    def remove_all(self, watches: Iterable[Watch]) -> None:
        """Forget several."""
        for watch in watches:
            self.remove(watch)

    def fire(self, path: bytes, perms: tuple[Permissions, ...], *, exact: bool = False) -> None:
        """Tell who watches ``path`` or, unless ``exact``, a path above it.

        An unprivileged domain hears only of what it may read (XSA-115): by one of ``perms``, or by the parent's.
        """
        by_path = self._by_path
        if not by_path:
            return
        hits: list[Watch] = []
        if path in by_path:
            hits.extend(by_path[path])
        if not exact:
            above = path
            while above != ROOT:
                above = above[: above.rfind(b"/")] or ROOT
                if above in by_path:
                    hits.extend(by_path[above])
        if len(hits) > 1:
            hits.sort(key=_sequence)
        for watch in hits:
            watcher = watch.watcher
            if watcher.privileged or self._may_know(watcher, path, perms):
                watch.fire(path)

    def _may_know(self, watcher: Watcher, path: bytes, perms: tuple[Permissions, ...]) -> bool:
        domid, target = watcher.domid, watcher.target
        for each in perms:
            if each.for_domain(domid, target) & READ:
                return True
        parent = self._nodes.get(parent_path(path)) if path.startswith(ROOT) else None
        return parent is not None and bool(parent.perms.for_domain(domid, target) & READ)
