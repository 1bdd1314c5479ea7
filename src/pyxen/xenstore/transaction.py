# SPDX-License-Identifier: GPL-2.0-only
"""Transactions: a private sight of the tree, put in place at the end if nobody touched what it saw.

A transaction sees each node as it was when it first looked at it, like the C daemon's (not as it was when the
transaction began: what it never looks at cannot hurt it).  ``_seen`` keeps those nodes, frozen, and ``_mine`` the
versions it changed.  A look at an absent node is a look at its nearest existing ancestor too, whose permissions
decide whether the answer is ENOENT or EACCES.

The commit compares identities: the tree still holding the very objects that were seen means that no one changed
them.  Then ``_mine`` goes into the tree, and one watch event fires for each node a request named, in the order in
which the transaction first looked at them.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

from pyxen.errors import XenError
from pyxen.xenstore.permissions import Permissions
from pyxen.xenstore.store import Node, Store, base_name, parent_path, require, walk_up


@dataclass(frozen=True, slots=True)
class Change:
    """One event that a commit fires: who may read any of ``perms`` may know."""

    path: bytes
    exact: bool
    perms: tuple[Permissions, ...]


class Transaction:
    """One open transaction of a connection; ``max_nodes`` bounds the nodes it may look at (None: no bound)."""

    __slots__ = ("_exact", "_max_nodes", "_mine", "_owned_delta", "_seen", "_store", "failed", "ident")

    def __init__(self, store: Store, ident: int, max_nodes: int | None = None) -> None:
        self.ident = ident
        self.failed = False
        """A request ran over a quota: the transaction can only be aborted."""
        self._store = store
        self._max_nodes = max_nodes
        self._seen: dict[bytes, Node | None] = {}
        self._mine: dict[bytes, Node | None] = {}
        self._exact: dict[bytes, bool] = {}
        self._owned_delta: dict[int, int] = {}
        store.generation += 1

    def lookup(self, path: bytes) -> Node | None:
        """The node at ``path``, only to be read.  XenError(ENOSPC) beyond ``max_nodes``."""
        if path in self._mine:  # perhaps as None: removed in here
            return self._mine[path]
        if path in self._seen:
            return self._seen[path]
        if self._max_nodes is not None and len(self._seen) >= self._max_nodes:
            self.failed = True
            raise XenError(errno.ENOSPC)
        node = self._store.nodes.get(path)
        if node is not None:
            node.frozen = True
        self._seen[path] = node
        if node is None:
            self._see_nearest_ancestor(path)
        return node

    def nearest_ancestor(self, path: bytes) -> Node:
        """The deepest node above ``path`` that exists in this transaction."""
        while True:
            path = parent_path(path)
            if path in self._store.nodes or path in self._mine or path in self._seen:
                node = self.lookup(path)
                if node is not None:
                    return node

    def set_value(self, path: bytes, value: bytes) -> None:
        """Change an existing node's value."""
        self._changing(path).value = value
        self._exact[path] = False

    def set_perms(self, path: bytes, perms: Permissions) -> None:
        """Change an existing node's permission list."""
        node = self._changing(path)
        self._charge(node.perms.owner, -1)
        self._charge(perms.owner, 1)
        node.perms = perms
        self._exact[path] = False

    def create(self, path: bytes, value: bytes, creator: int) -> None:
        """Create an absent node and what is missing above it for domain ``creator``."""
        missing = [path]
        while (above := self.lookup(parent_path(missing[-1]))) is None:
            missing.append(parent_path(missing[-1]))
        perms = above.perms if creator == 0 else above.perms.owned_by(creator)
        children: dict[bytes, None] = {}
        for absent in missing:
            self._store.generation += 1
            self._mine[absent] = Node(value, perms, children, self._store.generation)
            self._charge(perms.owner, 1)
            value, children = b"", {base_name(absent): None}
        self._changing(parent_path(absent)).add_child(base_name(absent))
        self._exact[path] = False

    def remove(self, path: bytes) -> list[tuple[bytes, Permissions]]:
        """Remove an existing node and all below it."""
        removed = []
        for gone in walk_up(self, path):
            perms = require(self.lookup(gone)).perms
            self._mine[gone] = None
            self._charge(perms.owner, -1)
            self._exact[gone] = gone is not path
            removed.append((gone, perms))
        self._changing(parent_path(path)).drop_child(base_name(path))
        return removed

    def owned_count(self, domid: int) -> int:
        """Nodes ``domid`` would own if this committed now."""
        return self._store.owned_count(domid) + self._owned_delta.get(domid, 0)

    def overdrawn(self, domid: int, max_nodes: int) -> bool:
        """Whether this creates nodes for ``domid`` beyond ``max_nodes`` (others may have committed meanwhile)."""
        return self._owned_delta.get(domid, 0) > 0 and self.owned_count(domid) > max_nodes

    def conflicts(self) -> bool:
        """Whether anything this transaction saw has been changed since."""
        nodes = self._store.nodes
        return any(nodes.get(path) is not node for path, node in self._seen.items())

    def commit(self) -> list[Change]:
        """Put everything in place; only when :meth:`conflicts` says no.  Returns the events to fire."""
        store, mine = self._store, self._mine
        changes: list[Change] = []
        for path, before in self._seen.items():
            if path not in mine:
                continue
            after = mine[path]
            if before is None and after is None:
                continue
            exact = self._exact.get(path)
            if exact is not None:
                perms = [node.perms for node in (after, before) if node is not None]
                parent = self._seen.get(parent_path(path))
                if parent is not None:
                    perms.append(parent.perms)
                changes.append(Change(path, exact, tuple(perms)))
            store.replace(path, after)
        return changes

    def _changing(self, path: bytes) -> Node:
        node = self._mine.get(path)
        if node is None:
            node = self._mine[path] = require(self.lookup(path)).thawed()
        self._store.generation += 1
        node.generation = self._store.generation
        return node

    def _see_nearest_ancestor(self, path: bytes) -> None:
        nodes = self._store.nodes
        while path not in nodes:
            path = parent_path(path)
        self._seen.setdefault(path, nodes[path])
        nodes[path].frozen = True

    def _charge(self, domid: int, count: int) -> None:
        if domid:
            self._owned_delta[domid] = self._owned_delta.get(domid, 0) + count
