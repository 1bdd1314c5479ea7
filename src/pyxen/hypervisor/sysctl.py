# SPDX-License-Identifier: GPL-2.0-only
"""HYPERVISOR_sysctl: host-wide control, decoded (Xen 4.6: xen/common/sysctl.c)."""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from pyxen.abi import sysctl as abi
from pyxen.abi.domctl import SCHEDULER_CREDIT
from pyxen.abi.sysctl import Sysctl
from pyxen.errors import XenError
from pyxen.hypervisor import cpupool_op, keyhandler
from pyxen.hypervisor.domctl import getdomaininfo
from pyxen.hypervisor.x86.cpuid import CpuidPolicy

if TYPE_CHECKING:
    from pyxen.hypervisor.hypercall import Caller
    from pyxen.hypervisor.hypervisor import Hypervisor

_MAX_KEYS: Final = 256
_DECODED: Final[dict[int, Callable[[Caller, int, bytes], None]]] = {
    Sysctl.GETCPUINFO: cpupool_op.getcpuinfo,
    Sysctl.CPUTOPOINFO: cpupool_op.cputopoinfo,
    Sysctl.NUMAINFO: cpupool_op.numainfo,
    Sysctl.CPUPOOL_OP: cpupool_op.cpupool_op,
    Sysctl.SCHEDULER_OP: cpupool_op.scheduler_op,
}
"""Commands whose structure another module decodes: (caller, address of the union, the whole request)."""


def hardware_caps() -> tuple[int, ...]:
    """boot_cpu_data.x86_capability as XEN_SYSCTL_physinfo shows it: 1.EDX, 0x80000001.EDX, 1.ECX, 0x80000001.ECX,
    7.EBX."""
    policy = CpuidPolicy()
    basic, extended, seven = policy.leaf(1, 0), policy.leaf(0x80000001, 0), policy.leaf(7, 0)
    return basic[3], extended[3], 0, 0, basic[2], 0, extended[2], seven[1]


def _physinfo(hypervisor: Hypervisor) -> bytes:
    topology = hypervisor.topology
    return abi.PHYSINFO.pack(
        topology.threads, topology.cores, topology.nr_cpus, topology.nr_cpus - 1, topology.nodes, topology.nodes - 1,
        hypervisor.tsc.hz // 1000, hypervisor.memory.nr_frames, hypervisor.allocator.free_frames, 0, 0,
        struct.pack("<8I", *hardware_caps()), 0,
    )


def do_sysctl(caller: Caller, arg: int) -> int:
    """HYPERVISOR_sysctl(op). EACCES for another interface version, ENOSYS for a command that is not here."""
    request = caller.read(arg, abi.SIZE)
    command, version = abi.HEADER.unpack_from(request)
    if version != abi.INTERFACE_VERSION:
        raise XenError(errno.EACCES)
    hypervisor = caller.domain.hypervisor
    hypervisor.xsm.sysctl(caller.domain, command)
    union = arg + abi.UNION
    decoded = _DECODED.get(command)
    if decoded is not None:
        decoded(caller, union, request)
    elif command == Sysctl.PHYSINFO:
        caller.write(union, _physinfo(hypervisor))
    elif command == Sysctl.SCHED_ID:
        caller.write(union, abi.SCHED_ID.pack(SCHEDULER_CREDIT))
    elif command == Sysctl.READCONSOLE:
        clear, incremental, index, buffer, count = abi.READCONSOLE.unpack_from(request, abi.UNION)
        hypervisor.xsm.readconsole(caller.domain, bool(clear))
        if incremental:
            text, index = hypervisor.log.read_from(index, count, clear=bool(clear))
        else:
            text, index = hypervisor.log.read_from(0, clear=bool(clear))
            text = text[max(len(text) - count, 0) :]
        caller.write(buffer, text)
        caller.write(union, abi.READCONSOLE.pack(clear, incremental, index & 0xFFFFFFFF, buffer, len(text)))
    elif command == Sysctl.DEBUG_KEYS:
        keys, count = abi.DEBUG_KEYS.unpack_from(request, abi.UNION)
        for key in caller.read(keys, min(count, _MAX_KEYS)).decode("latin-1"):
            keyhandler.handle(hypervisor, key)
    elif command == Sysctl.GETDOMAININFOLIST:
        first, limit, buffer, _ = abi.GETDOMAININFOLIST.unpack_from(request, abi.UNION)
        found = sorted((d for d in hypervisor.domains.copy().values() if d.domid >= first), key=lambda d: d.domid)
        found = found[:limit]
        caller.write(buffer, b"".join(getdomaininfo(domain) for domain in found))
        caller.write(union, abi.GETDOMAININFOLIST.pack(first, limit, buffer, len(found)))
    else:
        raise XenError(errno.ENOSYS)
    return 0
