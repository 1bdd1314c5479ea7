# SPDX-License-Identifier: GPL-2.0-only
"""What each request does (docs/misc/xenstore.txt; answers to malformed ones as the C xenstored gives them).

A handler gets the service, the connection, the request's and the transaction's ids and the payload, and returns
the reply's payload, or None when it has replied itself.  It raises XenError for an XS_ERROR reply.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from pyxen.abi.io.xs_wire import XENSTORE_PAYLOAD_MAX, XENSTORE_REL_PATH_MAX, XS_TYPE_COUNT, XsType
from pyxen.errors import XenError
from pyxen.xenstore.control import control
from pyxen.xenstore.domain_requests import (
    get_domain_path,
    introduce,
    is_domain_introduced,
    leading_int,
    release,
    resume,
    set_target,
)
from pyxen.xenstore.permissions import OWNER, READ, WRITE, Permissions
from pyxen.xenstore.quota import MAX_SOCKET_TRANSACTIONS, MAX_SOCKET_WATCHES
from pyxen.xenstore.store import PERMISSION_BYTES, ROOT, Node, View, is_valid_node_path
from pyxen.xenstore.transaction import Transaction

if TYPE_CHECKING:
    from pyxen.xenstore.connection import Connection
    from pyxen.xenstore.service import Service

OK: Final = b"OK\0"

Handler = Callable[["Service", "Connection", int, int, bytes], bytes | None]


def _view(service: Service, conn: Connection, tx_id: int) -> View:
    if tx_id == 0:
        return service.store
    try:
        return conn.transactions[tx_id]
    except KeyError:
        raise XenError(errno.ENOENT) from None


def _one_string(payload: bytes, unterminated: int = errno.EINVAL) -> bytes:
    """The only string of ``payload``.  XenError(EINVAL) for several, XenError(``unterminated``) for none.

    The C daemon answers both with whatever errno it had last; the questions about a node get ENOENT here, as in
    the transcripts of it, since a path that is not one names no node.
    """
    if payload[-1:] != b"\0":
        raise XenError(unterminated)
    if payload.find(b"\0") != len(payload) - 1:
        raise XenError(errno.EINVAL)
    return payload[:-1]


def _node_path(service: Service, conn: Connection, raw: bytes) -> bytes:
    """The absolute path that ``raw`` means.  XenError(EINVAL) for one that no node can have."""
    path = raw if raw.startswith((b"/", b"@")) or not raw else conn.home + raw
    if path not in service.store.nodes and not is_valid_node_path(path):
        raise XenError(errno.EINVAL)
    return path


def _absent(view: View, conn: Connection, path: bytes, wanted: int) -> XenError:
    # Whether a node is there is nobody's business who could not read (or write) it if it were.
    if not conn.privileged and not view.nearest_ancestor(path).perms.for_domain(conn.domid, conn.target) & wanted:
        return XenError(errno.EACCES)
    return XenError(errno.ENOENT)


def _node(view: View, conn: Connection, path: bytes, wanted: int) -> Node:
    """The node at ``path``, with ``wanted`` access.  XenError(EACCES or ENOENT)."""
    node = view.lookup(path)
    if node is None:
        raise _absent(view, conn, path, wanted)
    if not conn.privileged and not node.perms.for_domain(conn.domid, conn.target) & wanted:
        raise XenError(errno.EACCES)
    return node


def _readable(service: Service, conn: Connection, tx_id: int, raw: bytes) -> Node:
    if tx_id == 0 and conn.privileged:
        node = service.store.nodes.get(raw)
        if node is not None:
            return node
    return _node(_view(service, conn, tx_id), conn, _node_path(service, conn, raw), READ)


# --- nodes -----------------------------------------------------------------------------------------------------------


def read(service: Service, conn: Connection, req_id: int, tx_id: int, payload: bytes) -> bytes:
    return _readable(service, conn, tx_id, _one_string(payload, errno.ENOENT)).value


def directory(service: Service, conn: Connection, req_id: int, tx_id: int, payload: bytes) -> bytes:
    listing = _readable(service, conn, tx_id, _one_string(payload, errno.ENOENT)).listing()
    if len(listing) > XENSTORE_PAYLOAD_MAX:
        raise XenError(errno.E2BIG)
    return listing


def directory_part(service: Service, conn: Connection, req_id: int, tx_id: int, payload: bytes) -> bytes:
    """Part of a listing from a byte offset: generation, names, and an empty name after the last one."""
    strings = payload.split(b"\0")
    if len(strings) != 3:
        raise XenError(errno.EINVAL)
    node = _readable(service, conn, tx_id, strings[0])
    offset = leading_int(strings[1])
    listing = node.listing()
    generation = b"%d\0" % node.generation
    if not 0 <= offset < len(listing):
        return generation + b"\0"
    room = XENSTORE_PAYLOAD_MAX - len(generation) - 1
    part = listing[offset:offset + room]
    if offset + len(part) == len(listing):
        return generation + part + b"\0"
    return generation + part[: part.rfind(b"\0") + 1]


def get_perms(service: Service, conn: Connection, req_id: int, tx_id: int, payload: bytes) -> bytes:
    return _readable(service, conn, tx_id, _one_string(payload, errno.ENOENT)).perms.encoded


def write(service: Service, conn: Connection, req_id: int, tx_id: int, payload: bytes) -> bytes:
    end = payload.find(b"\0")
    if end < 0:
        raise XenError(errno.EINVAL)
    path = _node_path(service, conn, payload[:end])
    value = payload[end + 1:]
    view = _view(service, conn, tx_id)
    node = view.lookup(path)
    if node is None:
        _create(service, conn, view, path, value)
    else:
        if not conn.privileged:
            if not node.perms.for_domain(conn.domid, conn.target) & WRITE:
                raise XenError(errno.EACCES)
            _charge_size(service, view, node, len(value) - len(node.value))
        view.set_value(path, value)
        if tx_id == 0:
            service.watches.fire(path, (node.perms,))
        return OK
    if tx_id == 0:
        service.watches.fire(path, (service.store.nodes[path].perms,))
    return OK


def mkdir(service: Service, conn: Connection, req_id: int, tx_id: int, payload: bytes) -> bytes:
    path = _node_path(service, conn, _one_string(payload))
    view = _view(service, conn, tx_id)
    if view.lookup(path) is not None:
        # An existing node is as good as a new one, to those who could have written it.
        _node(view, conn, path, WRITE)
        return OK
    _create(service, conn, view, path, b"")
    if tx_id == 0:
        service.watches.fire(path, (service.store.nodes[path].perms,))
    return OK


def _create(service: Service, conn: Connection, view: View, path: bytes, value: bytes) -> None:
    if conn.privileged:
        view.create(path, value, 0)
        return
    above = view.nearest_ancestor(path)
    if not above.perms.for_domain(conn.domid, conn.target) & WRITE:
        raise XenError(errno.EACCES)
    _charge_new_nodes(service, conn, view, path, above, value)
    view.create(path, value, conn.domid)


def _charge_new_nodes(service: Service, conn: Connection, view: View, path: bytes, above: Node, value: bytes) -> None:
    """Refuse (ENOSPC) what would take ``conn`` over its nodes, or a node over its size."""
    names: list[bytes] = []
    parent = path
    while True:
        cut = parent.rfind(b"/")
        names.append(parent[cut + 1:])
        parent = parent[:cut] or ROOT
        if view.lookup(parent) is above:
            break
    limit = service.quota.node_size
    # The new nodes inherit the list, so that their size is the empty one's plus the value or the one child's name.
    empty = above.size_bytes() - len(above.value) - len(above.listing())
    longest = max(len(value), *(len(name) + 1 for name in names[:-1])) if len(names) > 1 else len(value)
    if view.owned_count(conn.domid) + len(names) > service.quota.nodes or empty + longest > limit:
        raise _over_quota(view)
    _charge_size(service, view, above, len(names[-1]) + 1)


def _charge_size(service: Service, view: View, node: Node, growth: int) -> None:
    if growth > 0 and node.size_bytes() + growth > service.quota.node_size:
        raise _over_quota(view)


def _over_quota(view: View) -> XenError:
    if isinstance(view, Transaction):
        view.failed = True
    return XenError(errno.ENOSPC)


def remove(service: Service, conn: Connection, req_id: int, tx_id: int, payload: bytes) -> bytes:
    path = _node_path(service, conn, _one_string(payload))
    view = _view(service, conn, tx_id)
    if path == ROOT:
        raise XenError(errno.EINVAL)
    if view.lookup(path) is None:
        error = _absent(view, conn, path, WRITE)
        if error.errno == errno.ENOENT and view.lookup(path[: path.rfind(b"/")] or ROOT) is not None:
            return OK
        raise error
    _node(view, conn, path, WRITE)
    removed = view.remove(path)
    if tx_id == 0:
        service.fire_removed(removed)
    return OK


def set_perms(service: Service, conn: Connection, req_id: int, tx_id: int, payload: bytes) -> bytes:
    strings = payload.split(b"\0")[:-1]
    if len(strings) < 2:
        raise XenError(errno.EINVAL)
    perms = Permissions.parse(strings[1:])
    if not conn.privileged and len(perms.entries) > service.quota.permissions:
        raise XenError(errno.ENOSPC)
    if strings[0].startswith(b"@"):
        if not conn.privileged or strings[0] not in service.special:
            raise XenError(errno.EACCES)
        perms = perms.revoke(service.domains.absent(perms.domains()))
        service.special[strings[0]] = perms
        return OK
    path = _node_path(service, conn, strings[0])
    view = _view(service, conn, tx_id)
    node = _node(view, conn, path, OWNER)
    before = node.perms
    if not conn.privileged:
        if perms.owner != before.owner:
            raise XenError(errno.EPERM)
        _charge_size(service, view, node, PERMISSION_BYTES * (len(perms.entries) - len(before.entries)))
    perms = perms.revoke(service.domains.absent(perms.domains()))
    view.set_perms(path, perms)
    if tx_id == 0:
        service.watches.fire(path, (perms, before))
    return OK


# --- watches ---------------------------------------------------------------------------------------------------------


def _watch_path(conn: Connection, raw: bytes) -> tuple[bytes, int]:
    """(absolute path, length of the part that a relative one's events leave out)."""
    if raw.startswith(b"@"):
        if len(raw) > XENSTORE_REL_PATH_MAX:
            raise XenError(errno.EINVAL)
        return raw, 0
    path, hidden = (raw, 0) if raw.startswith(b"/") or not raw else (conn.home + raw, len(conn.home))
    if not is_valid_node_path(path):
        raise XenError(errno.EINVAL)
    return path, hidden


def watch(service: Service, conn: Connection, req_id: int, tx_id: int, payload: bytes) -> None:
    strings = payload.split(b"\0")
    if len(strings) != 3:
        raise XenError(errno.EINVAL)
    path, hidden = _watch_path(conn, strings[0])
    key = path, strings[1]
    if key in conn.watches:
        raise XenError(errno.EEXIST)
    # "More than" the quota, as in the C daemon: one goes over it.
    if len(conn.watches) > (MAX_SOCKET_WATCHES if conn.privileged else service.quota.watches):
        raise XenError(errno.E2BIG)
    registered = conn.watches[key] = service.watches.add(conn, path, strings[1], hidden)
    conn.send(XsType.WATCH, req_id, tx_id, OK)
    registered.fire(path)


def unwatch(service: Service, conn: Connection, req_id: int, tx_id: int, payload: bytes) -> bytes:
    strings = payload.split(b"\0")
    if len(strings) != 3:
        raise XenError(errno.EINVAL)
    path, _ = _watch_path(conn, strings[0])
    registered = conn.watches.pop((path, strings[1]), None)
    if registered is None:
        raise XenError(errno.ENOENT)
    service.watches.remove(registered)
    return OK


def reset_watches(service: Service, conn: Connection, req_id: int, tx_id: int, payload: bytes) -> bytes:
    """Forget the connection's watches and, as a guest that starts over asks for this, its transactions."""
    service.forget(conn)
    return OK


# --- transactions ----------------------------------------------------------------------------------------------------


def transaction_start(service: Service, conn: Connection, req_id: int, tx_id: int, payload: bytes) -> bytes:
    if tx_id:
        _view(service, conn, tx_id)
        raise XenError(errno.EBUSY)
    # "More than" the quota, as in the C daemon: with a quota of 10, eleven can be open.
    if len(conn.transactions) > (MAX_SOCKET_TRANSACTIONS if conn.privileged else service.quota.transactions):
        raise XenError(errno.ENOSPC)
    while (ident := conn.next_transaction) in conn.transactions or not ident:
        conn.next_transaction = (ident + 1) & 0xFFFFFFFF
    conn.next_transaction = (ident + 1) & 0xFFFFFFFF
    max_nodes = None if conn.privileged else service.quota.transaction_nodes
    conn.transactions[ident] = Transaction(service.store, ident, max_nodes)
    return b"%d\0" % ident


def transaction_end(service: Service, conn: Connection, req_id: int, tx_id: int, payload: bytes) -> bytes:
    if payload not in (b"T\0", b"F\0"):
        raise XenError(errno.EINVAL)
    transaction = conn.transactions.pop(tx_id, None)
    if transaction is None:
        raise XenError(errno.ENOENT)
    if payload == b"F\0":
        return OK
    if transaction.failed:
        raise XenError(errno.ENOMEM)
    if transaction.conflicts():
        raise XenError(errno.EAGAIN)
    if not conn.privileged and transaction.overdrawn(conn.domid, service.quota.nodes):
        raise XenError(errno.ENOSPC)
    for change in transaction.commit():
        service.watches.fire(change.path, change.perms, exact=change.exact)
    return OK


_TABLE: Final[dict[XsType, Handler]] = {
    XsType.CONTROL: control,
    XsType.DIRECTORY: directory,
    XsType.READ: read,
    XsType.GET_PERMS: get_perms,
    XsType.WATCH: watch,
    XsType.UNWATCH: unwatch,
    XsType.TRANSACTION_START: transaction_start,
    XsType.TRANSACTION_END: transaction_end,
    XsType.INTRODUCE: introduce,
    XsType.RELEASE: release,
    XsType.GET_DOMAIN_PATH: get_domain_path,
    XsType.WRITE: write,
    XsType.MKDIR: mkdir,
    XsType.RM: remove,
    XsType.SET_PERMS: set_perms,
    XsType.IS_DOMAIN_INTRODUCED: is_domain_introduced,
    XsType.RESUME: resume,
    XsType.SET_TARGET: set_target,
    XsType.RESET_WATCHES: reset_watches,
    XsType.DIRECTORY_PART: directory_part,
}

HANDLERS: Final[tuple[Handler | None, ...]] = tuple(
    _TABLE.get(XsType(number)) if number in XsType._value2member_map_ else None for number in range(XS_TYPE_COUNT)
)
"""Indexed by request type; None is ENOSYS."""
