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
from collections.abc import Container, Iterable
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
    """An immutable permission list; ``encoded`` is its wire form, entries each ended by NUL.

    ``void`` holds the places of entries that are shown but count for nobody: their domain is gone, and its number may
    be another domain's by now (XSA-322).
    """

    __slots__ = ("_acl", "_void", "default", "encoded", "entries", "owner")

    def __init__(self, entries: Iterable[Entry], *, void: frozenset[int] = frozenset()) -> None:
        self.entries = tuple(entries)
        self.encoded = b"".join(b"%s%d\0" % (_LETTERS[flags], domid) for domid, flags in self.entries)
        self._void = void
        self.owner, self.default = self.entries[0]
        if 0 in void:
            self.owner = 0
        acl: dict[int, int] = {}
        for place, (domid, flags) in enumerate(self.entries):
            if place and place not in void:
                # Of several entries for one domain the first counts.
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
        return Permissions(((domid, self.default), *self.entries[1:]), void=self._void - {0})

    def domains(self) -> set[int]:
        """Unprivileged domains that the list makes its owner or names."""
        return {domid for domid in (self.owner, *self._acl) if domid}

    def revoke(self, domids: Container[int]) -> Permissions:
        """The same list with the entries of these domains void."""
        gone = {place for place, (domid, _) in enumerate(self.entries) if domid and domid in domids}
        return Permissions(self.entries, void=self._void | gone) if gone else self


DOM0_ONLY: Final = Permissions([(0, 0)])
"""``n0``: what the root and everything that dom0 creates under it starts with."""
