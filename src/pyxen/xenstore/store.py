# SPDX-License-Identifier: GPL-2.0-only
"""The tree of nodes.

One dictionary from absolute path to node: a lookup costs the same at every depth and size.  Nodes are changed in
place until a transaction looks at one.  Looking freezes the node object; whoever changes a frozen node puts a
thawed copy into the tree instead.  So a transaction starts for nothing, keeps what it saw for nothing, and at its
end finds out whether anybody touched that by asking whether the tree still holds the same objects.

Nodes owned by unprivileged domains, and lists that name one, are indexed by domain: that is the node quota's count,
and what must go when the domain dies (XSA-322, XSA-419).
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from typing import Final, Protocol

from pyxen.abi.io.xs_wire import XENSTORE_ABS_PATH_MAX, XENSTORE_REL_PATH_MAX
from pyxen.errors import XenError
from pyxen.xenstore.permissions import DOM0_ONLY, Permissions

ROOT: Final = b"/"
_NODE_NAME: Final = re.compile(rb"/(?:[-A-Za-z0-9_@]+(?:/[-A-Za-z0-9_@]+)*)?")
_DOMAIN_HOME: Final = re.compile(rb"/local/domain/\d+/")

_NODE_HEADER_BYTES: Final = 24
PERMISSION_BYTES: Final = 8


def is_valid_node_path(path: bytes) -> bool:
    """Whether ``path`` is absolute, has no empty or foreign component and is not too long.

    The limit is 2048 bytes, not counting a leading ``/local/domain/N/``, as in the C daemon.
    """
    if len(path) > XENSTORE_REL_PATH_MAX:
        home = _DOMAIN_HOME.match(path)
        if home is None or len(path) - home.end() > XENSTORE_REL_PATH_MAX or len(path) > XENSTORE_ABS_PATH_MAX:
            return False
    return _NODE_NAME.fullmatch(path) is not None


def parent_path(path: bytes) -> bytes:
    """``b"/a"`` for ``b"/a/b"``; the root is its own parent."""
    return path[: path.rfind(b"/")] or ROOT


def base_name(path: bytes) -> bytes:
    """``b"b"`` for ``b"/a/b"``."""
    return path[path.rfind(b"/") + 1:]


class Node:
    """A value, a permission list and the names of the children in the order of their creation."""

    __slots__ = ("_listing", "children", "frozen", "generation", "perms", "value")

    def __init__(self, value: bytes, perms: Permissions, children: dict[bytes, None], generation: int) -> None:
        self.value = value
        self.perms = perms
        self.children = children
        self.generation = generation
        self.frozen = False
        self._listing: bytes | None = None

    def thawed(self) -> Node:
        """A copy that may be changed."""
        return Node(self.value, self.perms, self.children.copy(), self.generation)

    def add_child(self, name: bytes) -> None:
        self.children[name] = None
        self._listing = None

    def drop_child(self, name: bytes) -> None:
        self.children.pop(name, None)
        self._listing = None

    def listing(self) -> bytes:
        """The children's names, each ended by NUL."""
        listing = self._listing
        if listing is None:
            listing = self._listing = b"\0".join([*self.children, b""])
        return listing

    def size_bytes(self) -> int:
        """The node's size as the node-size quota counts it: the C daemon's record in its database."""
        return (_NODE_HEADER_BYTES + PERMISSION_BYTES * len(self.perms.entries)
                + len(self.value) + len(self.listing()))


class Store:
    """The tree, with ``nodes`` open to readers; changes go through the methods, which keep the indexes right."""

    def __init__(self) -> None:
        self.generation = 0
        self.nodes: dict[bytes, Node] = {ROOT: Node(b"", DOM0_ONLY, {}, 0)}
        self._owned: dict[int, set[bytes]] = {}
        self._named: dict[int, set[bytes]] = {}

    # --- what Store and Transaction have in common ---------------------------------------------------------------

    def lookup(self, path: bytes) -> Node | None:
        """The node at ``path``, only to be read."""
        return self.nodes.get(path)

    def nearest_ancestor(self, path: bytes) -> Node:
        """The deepest existing node above ``path``."""
        nodes = self.nodes
        while True:
            path = parent_path(path)
            node = nodes.get(path)
            if node is not None:
                return node

    def set_value(self, path: bytes, value: bytes) -> None:
        """Change an existing node's value."""
        node = self._changing(path)
        node.value = value

    def set_perms(self, path: bytes, perms: Permissions) -> None:
        """Change an existing node's permission list."""
        self._index_out(path, self.nodes[path].perms)
        self._changing(path).perms = perms
        self._index_in(path, perms)

    def create(self, path: bytes, value: bytes, creator: int) -> None:
        """Create an absent node, and the absent ones above it, for ``creator`` (0: inherit the owner as well)."""
        missing = [path]
        while True:
            parent = parent_path(missing[-1])
            above = self.nodes.get(parent)
            if above is not None:
                break
            missing.append(parent)
        perms = above.perms if creator == 0 else above.perms.owned_by(creator)
        charged = bool(perms.domains())
        children: dict[bytes, None] = {}
        for absent in missing:
            self.generation += 1
            self.nodes[absent] = Node(value, perms, children, self.generation)
            if charged:
                self._index_in(absent, perms)
            value, children = b"", {base_name(absent): None}
        self._changing(parent).add_child(base_name(absent))

    def remove(self, path: bytes) -> list[tuple[bytes, Permissions]]:
        """Remove an existing node and all below it; returns them, the deepest first, ``path`` last."""
        removed: list[tuple[bytes, Permissions]] = []
        for gone in walk_up(self, path):
            node = self.nodes.pop(gone)
            self._index_out(gone, node.perms)
            removed.append((gone, node.perms))
        self.generation += 2 * len(removed) - 1
        self._changing(parent_path(path)).drop_child(base_name(path))
        return removed

    # --- for transactions ----------------------------------------------------------------------------------------

    def replace(self, path: bytes, node: Node | None) -> None:
        """Put a transaction's version of one node in place (None: it removed the node).

        The caller replaces the parent likewise, so that children lists and nodes stay in step.
        """
        old = self.nodes.get(path)
        if old is not None:
            self._index_out(path, old.perms)
        self.generation += 1
        if node is None:
            self.nodes.pop(path, None)
            return
        node.generation = self.generation
        self.nodes[path] = node
        self._index_in(path, node.perms)

    # --- domains -------------------------------------------------------------------------------------------------

    def owned_count(self, domid: int) -> int:
        """Number of nodes that unprivileged ``domid`` owns (the node quota's count)."""
        return len(self._owned.get(domid, ()))

    def owned_paths(self, domid: int) -> list[bytes]:
        """Paths of those nodes, sorted, so that a parent comes before its children."""
        return sorted(self._owned.get(domid, ()))

    def known_domains(self) -> set[int]:
        """Unprivileged domains that own a node or are named in a permission list."""
        return self._owned.keys() | self._named.keys()

    def revoke(self, domid: int) -> None:
        """Void every permission entry of a domain that is gone."""
        for path in sorted(self._named.get(domid, ())):
            self.set_perms(path, self.nodes[path].perms.revoke({domid}))

    def check(self) -> Iterator[str]:
        """Sentences about everything inconsistent (CONTROL check); none is the only right answer."""
        for path, node in self.nodes.items():
            if path != ROOT:
                parent = self.nodes.get(parent_path(path))
                if parent is None:
                    yield f"{path!r} has no parent"
                elif base_name(path) not in parent.children:
                    yield f"{path!r} is not listed by its parent"
            prefix = path if path == ROOT else path + b"/"
            for name in node.children:
                if prefix + name not in self.nodes:
                    yield f"{path!r} lists {name!r}, which is not there"
            if node.perms.owner and path not in self._owned.get(node.perms.owner, ()):
                yield f"{path!r} is not counted for its owner {node.perms.owner}"
        for domid, paths in self._owned.items():
            for path in paths:
                owned = self.nodes.get(path)
                if owned is None or owned.perms.owner != domid:
                    yield f"domain {domid} is charged for {path!r}, which it does not own"

    # --- private -------------------------------------------------------------------------------------------------

    def _changing(self, path: bytes) -> Node:
        node = self.nodes[path]
        if node.frozen:
            node = self.nodes[path] = node.thawed()
        self.generation += 1
        node.generation = self.generation
        return node

    def _index_in(self, path: bytes, perms: Permissions) -> None:
        for domid in perms.domains():
            index = self._owned if domid == perms.owner else self._named
            index.setdefault(domid, set()).add(path)

    def _index_out(self, path: bytes, perms: Permissions) -> None:
        for domid in perms.domains():
            _discard(self._owned if domid == perms.owner else self._named, domid, path)


def _discard(index: dict[int, set[bytes]], domid: int, path: bytes) -> None:
    paths = index.get(domid)
    if paths is not None:
        paths.discard(path)
        if not paths:
            del index[domid]


class View(Protocol):
    """What a request works on: the tree itself, or a transaction's sight of it."""

    def lookup(self, path: bytes) -> Node | None:
        """The node at ``path``, only to be read."""

    def nearest_ancestor(self, path: bytes) -> Node:
        """The deepest existing node above ``path``."""

    def set_value(self, path: bytes, value: bytes) -> None:
        """Change an existing node's value."""

    def set_perms(self, path: bytes, perms: Permissions) -> None:
        """Change an existing node's permission list."""

    def create(self, path: bytes, value: bytes, creator: int) -> None:
        """Create an absent node and what is missing above it."""

    def remove(self, path: bytes) -> list[tuple[bytes, Permissions]]:
        """Remove an existing node and all below it."""

    def owned_count(self, domid: int) -> int:
        """Number of nodes that ``domid`` owns."""


def walk_up(view: View, path: bytes) -> list[bytes]:
    """``path`` and everything below it, children before their parents, siblings in the order of their creation."""
    downwards: list[bytes] = []
    stack = [path]
    while stack:
        current = stack.pop()
        downwards.append(current)
        children = require(view.lookup(current)).children
        if children:
            prefix = current if current == ROOT else current + b"/"
            stack.extend([prefix + name for name in children])
    downwards.reverse()
    return downwards


def require(node: Node | None) -> Node:
    """``node``, or XenError(ENOENT)."""
    if node is None:
        raise XenError(errno.ENOENT)
    return node
