# SPDX-License-Identifier: GPL-2.0-only
"""Which nodes of xenstore a domain has, with which permissions (libxl: ``libxl__domain_make``, ``libxl__build_post``,
``libxl__device_console_add``; checked against ``xenstore-ls -fp`` of a real host).

This module only says what to write; :func:`publish` writes it in one transaction, so that a watcher sees a domain
whole or not at all, and a cancelled create has written nothing.
"""

from __future__ import annotations

import uuid as _uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from pyxen.abi.xen import DomId

if TYPE_CHECKING:
    from pyxen.toolstack.domains import DomainRecord

CONSOLE_LIMIT_BYTES: Final = 1 << 20
"""``LIBXL_XENCONSOLE_LIMIT``: how much of a guest's output xenconsoled keeps."""


@dataclass(frozen=True, slots=True)
class Node:
    """One xenstore node: ``permissions`` are ``xs_permissions`` in text form, the owner first (``n0``, ``r3``)."""

    path: str
    value: str
    permissions: tuple[str, ...]


class Store(Protocol):
    """What the toolstack needs of a xenstore connection (domain 0's)."""

    async def publish(self, nodes: Sequence[tuple[str, bytes, Sequence[str]]]) -> None:
        """Write all of ``nodes`` in one transaction, tried again while it conflicts."""
        ...

    async def read(self, path: str) -> bytes | None:
        """The node's value; None when it does not exist."""
        ...

    async def write(self, path: str, value: bytes) -> None: ...

    async def remove(self, paths: Sequence[str], prune: Sequence[str] = ()) -> None:
        """Remove subtrees in one transaction (those that are not there are no error), then each of ``prune`` that
        has no children left."""
        ...


def only_dom0() -> tuple[str, ...]:
    return ("n0",)


def dom0_and_reader(domid: DomId) -> tuple[str, ...]:
    """libxl's ``roperm``: domain 0 owns it, the guest reads it."""
    return ("n0", f"r{domid}")


def guest_owned(domid: DomId) -> tuple[str, ...]:
    """libxl's ``rwperm``: the guest owns it."""
    return (f"n{domid}",)


# libxl__domain_make: directories the guest may write, below /local/domain/N.
GUEST_OWNED: Final = (
    "control/shutdown",
    "control/feature-poweroff",
    "control/feature-reboot",
    "control/feature-suspend",
    "control/sysrq",
    "device/suspend/event-channel",
    "data",
    "drivers",
    "feature",
    "attr",
    "error",
)
GUEST_READABLE: Final = ("cpu", "memory", "device", "control", "device/suspend")


def domain_nodes(record: DomainRecord) -> list[Node]:
    """What exists of a domain before it is built (``libxl__domain_make``)."""
    domid, home, vm, libxl = record.domid, record.store_path, record.vm_path, record.libxl_path
    read_only, owned = dom0_and_reader(domid), guest_owned(domid)
    nodes = [
        Node(home, "", read_only),
        Node(vm, "", read_only),
        Node(libxl, "", only_dom0()),
        Node(f"{home}/vm", vm, read_only),
        Node(f"{home}/name", record.name, read_only),
        Node(f"{home}/domid", str(domid), read_only),
        Node(f"{vm}/name", record.name, read_only),
        Node(f"{vm}/uuid", str(record.uuid), read_only),
        Node(f"{vm}/start_time", f"{record.created_unix:.2f}", read_only),
        Node(f"{libxl}/type", record.config.type, only_dom0()),
        Node(f"{libxl}/dm-version", "qemu_xen", only_dom0()),
    ]
    nodes += [Node(f"{home}/{name}", "", read_only) for name in GUEST_READABLE]
    nodes += [Node(f"{home}/{name}", "", owned) for name in GUEST_OWNED]
    nodes += [
        Node(f"{home}/control/platform-feature-{name}", "1", read_only)
        for name in ("multiprocessor-suspend", "xs_reset_watches")
    ]
    return nodes


@dataclass(frozen=True, slots=True)
class BuiltDomain:
    """What a build leaves for xenstore to say: ring frames (a PV guest's are machine frames) and event channel
    ports as the guest numbers them."""

    store_gfn: int
    store_port: int
    console_gfn: int
    console_port: int
    memory_kb: int
    max_memory_kb: int
    vcpus: int
    online_vcpus: int
    kernel: str
    ramdisk: str | None
    cmdline: str
    console_tty: str


def build_nodes(record: DomainRecord, built: BuiltDomain) -> list[Node]:
    """What a built domain adds: memory, vCPUs, rings, console (``libxl__build_post``,
    ``libxl__device_console_add``)."""
    domid, home, vm, libxl = record.domid, record.store_path, record.vm_path, record.libxl_path
    read_only, private = dom0_and_reader(domid), only_dom0()
    backend = console_backend_path(domid)
    shared = {
        f"{home}/memory/static-max": str(built.max_memory_kb),
        f"{home}/memory/target": str(built.memory_kb),
        f"{home}/memory/videoram": "0",
        f"{home}/store": "",
        f"{home}/store/port": str(built.store_port),
        f"{home}/store/ring-ref": str(built.store_gfn),
    }
    for vcpu in range(built.vcpus):
        shared[f"{home}/cpu/{vcpu}"] = ""
        shared[f"{home}/cpu/{vcpu}/availability"] = _availability(vcpu, built.online_vcpus)
    console = {
        "": "",
        "/backend": backend,
        "/limit": str(CONSOLE_LIMIT_BYTES),
        "/type": "xenconsoled",
        "/output": "pty",
        "/port": str(built.console_port),
        "/ring-ref": str(built.console_gfn),
        "/tty": built.console_tty,
    }
    shared.update({f"{home}/console{name}": value for name, value in console.items()})
    nodes = [Node(path, value, read_only) for path, value in shared.items()]
    nodes.append(Node(f"{home}/console/backend-id", "0", (f"n{domid}", "r0")))

    if record.config.type == "pv":  # libxl's domcreate_bootloader_done: a PVH domain has none of these
        image = {"": "", "/ostype": "linux", "/kernel": built.kernel, "/cmdline": built.cmdline}
        if built.ramdisk is not None:
            image["/ramdisk"] = built.ramdisk
        nodes += [Node(f"{vm}/image{name}", value, read_only) for name, value in image.items()]

    # The same device is described three times: for its backend, for its frontend (above), and for libxl itself.
    device = {
        "/frontend": f"{home}/console",
        "/frontend-id": str(domid),
        "/online": "1",
        "/state": "1",
        "/protocol": "vt100",
    }
    nodes.append(Node(f"{libxl}/device/console/0", "", private))
    nodes += [Node(f"{libxl}/device/console/0{name}", value, private) for name, value in device.items()]
    nodes.append(Node(f"{libxl}/device/console/0/backend", backend, private))
    nodes.append(Node(backend.rpartition("/")[0], "", private))
    nodes.append(Node(backend, "", read_only))
    nodes += [Node(f"{backend}{name}", value, read_only) for name, value in device.items()]
    return nodes


def _availability(vcpu: int, online: int) -> str:
    return "online" if vcpu < online else "offline"


def vcpu_nodes(record: DomainRecord, online: int) -> list[Node]:
    """The first ``online`` vCPUs are to be up, the others down (``libxl__set_vcpuonline_xenstore``)."""
    home, read_only = record.store_path, dom0_and_reader(record.domid)
    return [
        Node(f"{home}/cpu/{vcpu}/availability", _availability(vcpu, online), read_only)
        for vcpu in range(record.config.max_vcpus)
    ]


def target_nodes(record: DomainRecord, target_kb: int) -> list[Node]:
    """What the balloon driver is to aim at (``libxl_set_memory_target``)."""
    read_only = dom0_and_reader(record.domid)
    return [
        Node(f"{record.store_path}/memory/target", str(target_kb), read_only),
        Node(f"{record.vm_path}/memory", str(target_kb // 1024), read_only),
    ]


def console_backend_path(domid: DomId) -> str:
    return f"/local/domain/0/backend/console/{domid}/0"


def dom0_nodes(memory_kb: int) -> list[Node]:
    """What ``xen-init-dom0`` writes when a host starts."""
    values = {
        "/local/domain/0": "",
        "/local/domain/0/name": "Domain-0",
        "/local/domain/0/domid": "0",
        "/local/domain/0/memory/static-max": str(memory_kb),
        "/local/domain/0/memory/target": str(memory_kb),
        "/local/pool/0/name": "Pool-0",
        "/vm": "",
        "/libxl": "",
    }
    return [Node(path, value, only_dom0()) for path, value in values.items()]


async def publish(store: Store, nodes: Sequence[Node]) -> None:
    """Write ``nodes`` in one transaction."""
    await store.publish(
        [(node.path, node.value.encode("utf-8", "surrogateescape"), node.permissions) for node in nodes]
    )


async def withdraw(store: Store, domid: DomId, vm_uuid: _uuid.UUID) -> None:
    """Remove everything :func:`domain_nodes` and :func:`build_nodes` describe; what is not there is no error."""
    await store.remove(
        [f"/local/domain/{domid}", f"/vm/{vm_uuid}", f"/libxl/{domid}", f"/local/domain/0/backend/console/{domid}"],
        # libxl__xs_path_cleanup: directories that were only there for this device go with it.
        prune=["/local/domain/0/backend/console", "/local/domain/0/backend"],
    )


async def renamed(store: Store, record: DomainRecord) -> None:
    """Write the domain's (new) name where libxl writes it."""
    read_only = dom0_and_reader(record.domid)
    await publish(store, [Node(f"{path}/name", record.name, read_only) for path in (record.store_path, record.vm_path)])


async def moved(store: Store, record: DomainRecord, old_uuid: _uuid.UUID) -> None:
    """A preserved domain has a new name and uuid: its ``/vm`` folder moves (``libxl_domain_preserve``)."""
    read_only, home, vm = dom0_and_reader(record.domid), record.store_path, record.vm_path
    await publish(
        store,
        [
            Node(vm, "", read_only),
            Node(f"{vm}/name", record.name, read_only),
            Node(f"{vm}/uuid", str(record.uuid), read_only),
            Node(f"{vm}/start_time", f"{record.created_unix:.2f}", read_only),
            Node(f"{home}/vm", vm, read_only),
            Node(f"{home}/name", record.name, read_only),
        ],
    )
    await store.remove([f"/vm/{old_uuid}"])


async def request_shutdown(store: Store, record: DomainRecord, command: str) -> None:
    """Ask the guest to shut down: ``control/shutdown`` (``libxl__domain_pvcontrol``); ``command`` is ``poweroff``,
    ``reboot``, …"""
    await store.write(f"{record.store_path}/control/shutdown", command.encode())
