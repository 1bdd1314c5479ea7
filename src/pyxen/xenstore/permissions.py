# SPDX-License-Identifier: GPL-2.0-only
"""Who may do what with a node (docs/misc/xenstore.txt, "Permissions").

A node has a list of entries, a letter and a domid each: ``n`` nothing, ``r`` read, ``w`` write, ``b`` both.
The first entry names the owner, who may do anything, and its letter is what every domain not listed may do.
The further entries are single domains.  Domain 0 is above the list.

A list is immutable and shared by the nodes that inherited it, so that a tree of a hundred thousand nodes holds
a handful of them.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable
from typing import Final

from pyxen.errors import XenError

READ: Final = 1
WRITE: Final = 2
OWNER: Final = 4
ALL: Final = READ | WRITE | OWNER

_FLAGS: Final = {b"n": 0, b"r": READ, b"w": WRITE, b"b": READ | WRITE}
_LETTERS: Final = (b"n", b"r", b"w", b"b")
_ENTRY: Final = re.compile(rb"([nrwb]) *(\d{1,9})")

Entry = tuple[int, int]
"""(domid, READ | WRITE bits)."""


class Permissions:
    """An immutable permission list; ``encoded`` is its wire form, entries each ended by NUL."""

    __slots__ = ("_acl", "default", "encoded", "entries", "owner")

    def __init__(self, entries: Iterable[Entry], *, revoked: frozenset[int] = frozenset()) -> None:
        self.entries = tuple(entries)
        self.owner, self.default = self.entries[0]
        self.encoded = b"".join(b"%s%d\0" % (_LETTERS[flags], domid) for domid, flags in self.entries)
        acl: dict[int, int] = {}
        for domid, flags in self.entries[1:]:
            # The first entry that names a domain counts, and one of a domain that died counts for nobody.
            if domid not in revoked:
                acl.setdefault(domid, flags)
        self._acl = acl

    @classmethod
    def parse(cls, entries: list[bytes]) -> Permissions:
        """From wire entries such as ``[b"n0", b"r5"]``.  XenError(EINVAL) for an empty list or a bad entry."""
        parsed = []
        for raw in entries:
            match = _ENTRY.fullmatch(raw)
            if match is None:
                raise XenError(errno.EINVAL)
            parsed.append((int(match[2]), _FLAGS[match[1]]))
        if not parsed:
            raise XenError(errno.EINVAL)
        return cls(parsed)

    def for_domain(self, domid: int, target: int | None = None) -> int:
        """READ | WRITE | OWNER bits of unprivileged domain ``domid``, which may act as ``target`` (SET_TARGET)."""
        owner = self.owner
        if domid == owner or (target is not None and target == owner):
            return ALL
        acl = self._acl
        if acl:
            if domid in acl:
                return acl[domid]
            if target is not None and target in acl:
                return acl[target]
        return self.default

    def owned_by(self, domid: int) -> Permissions:
        """What a child that unprivileged ``domid`` creates under a node with this list gets: the list, itself first."""
        if self.owner == domid:
            return self
        return Permissions(((domid, self.default), *self.entries[1:]))

    def mentions(self) -> Iterable[int]:
        """Unprivileged domains with an entry that still counts, the owner not among them."""
        return self._acl.keys()

    def revoke(self, domid: int) -> Permissions:
        """The same list with ``domid``'s entries void, though still shown: its number may be another domain's soon."""
        live = self._acl.keys()
        gone = {entry[0] for entry in self.entries[1:] if entry[0] not in live}
        return Permissions(self.entries, revoked=frozenset(gone | {domid}))


DOM0_ONLY: Final = Permissions([(0, 0)])
"""``n0``: what the root and everything that dom0 creates under it starts with."""
