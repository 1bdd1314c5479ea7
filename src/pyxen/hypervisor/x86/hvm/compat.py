# SPDX-License-Identifier: GPL-2.0-only
"""Hypercalls from 32-bit code of a translated guest (Xen: compat hypercalls, xen/common/compat, hvm_hypercall).

The number is in EAX, arguments in EBX, ECX, EDX, ESI, EDI, EBP.  Structures have 32-bit pointers and longs and
i386's alignment.  Those that differ are rewritten: the handler sees its 64-bit form at an address no 32-bit guest
has, and what it changed is written back.  What is not in the table below is ENOSYS, with a line in a verbose log: a
32-bit kernel gets as far as events, timers, memory, parameters and its console need, and no further (no grants yet).

A guest that sets its hypercall page or callback up in 32-bit code also has 32-bit *shared info* (Xen latches its word
size then); that layout is not kept here, so such a guest uses ports 0 to 31 of the first selector word only in as far
as both layouts agree: see SUPPORT.md.
"""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from pyxen.abi.memory import MEMOP_CMD_MASK, Xenmem
from pyxen.abi.sched import SchedOp
from pyxen.abi.vcpu import VcpuOp
from pyxen.abi.xen import Hypercall
from pyxen.errors import XenError
from pyxen.hypervisor.hypercall import Preempted
from pyxen.machine.cpu.base import RAX, RBP, RBX, RCX, RDI, RDX, RSI

if TYPE_CHECKING:
    from pyxen.hypervisor.domain import Domain
    from pyxen.hypervisor.hypercall import Entry
    from pyxen.hypervisor.vcpu import Vcpu
    from pyxen.hypervisor.x86.hvm.vcpu import HvmVcpu
    from pyxen.machine.cpu.base import HvmCpu

_SHADOW: Final = 1 << 40
"""Where the rewritten structure seems to be."""
_ARGUMENTS: Final = (RBX, RCX, RDX, RSI, RDI, RBP)
_M32: Final = 0xFFFFFFFF


class Layout(NamedTuple):
    """A structure in both forms, field by field in the same order."""

    compat: struct.Struct
    native: struct.Struct


def _layout(compat: str, native: str) -> Layout:
    return Layout(struct.Struct("<" + compat), struct.Struct("<" + native))


_SAME: Final = None
_MEMORY: Final[dict[int, Layout | None]] = {
    Xenmem.MAXIMUM_RAM_PAGE: _SAME, Xenmem.CURRENT_RESERVATION: _SAME, Xenmem.MAXIMUM_RESERVATION: _SAME,
    Xenmem.MAXIMUM_GPFN: _SAME,
    Xenmem.ADD_TO_PHYSMAP: _layout("HHIII", "HHIQQ"),
    Xenmem.REMOVE_FROM_PHYSMAP: _layout("H2xI", "H6xQ"),
    Xenmem.MEMORY_MAP: _layout("II", "I4xQ"),
}
_SCHED: Final[dict[int, Layout | None]] = {
    SchedOp.YIELD: _SAME, SchedOp.BLOCK: _SAME, SchedOp.SHUTDOWN: _SAME, SchedOp.SHUTDOWN_CODE: _SAME,
    SchedOp.WATCHDOG: _SAME, SchedOp.POLL: _layout("IIQ", "QI4xQ"),
}
_VCPU: Final[dict[int, Layout | None]] = {
    VcpuOp.UP: _SAME, VcpuOp.DOWN: _SAME, VcpuOp.IS_UP: _SAME, VcpuOp.INITIALISE: _SAME, VcpuOp.SEND_NMI: _SAME,
    VcpuOp.SET_PERIODIC_TIMER: _SAME, VcpuOp.STOP_PERIODIC_TIMER: _SAME, VcpuOp.STOP_SINGLESHOT_TIMER: _SAME,
    VcpuOp.SET_SINGLESHOT_TIMER: _layout("QI", "QI4x"), VcpuOp.REGISTER_VCPU_INFO: _SAME,
}


class CompatCaller:
    """The vCPU as its hypercall's caller, with one rewritten structure at :data:`_SHADOW`."""

    def __init__(self, hvm: HvmVcpu) -> None:
        self._hvm = hvm
        self.shadow = bytearray()
        self.preempt_at = 0

    @property
    def domain(self) -> Domain:
        """The guest."""
        return self._hvm.domain

    @property
    def vcpu(self) -> Vcpu | None:
        """The calling vCPU."""
        return self._hvm.vcpu

    def read(self, address: int, size: int) -> bytes:
        """Raises GuestAccessError."""
        if address >= _SHADOW:
            return bytes(self.shadow[address - _SHADOW : address - _SHADOW + size]).ljust(size, b"\0")
        return self._hvm.read(address, size)

    def write(self, address: int, data: bytes) -> None:
        """Raises GuestAccessError."""
        if address >= _SHADOW:
            self.shadow[address - _SHADOW : address - _SHADOW + len(data)] = data
        else:
            self._hvm.write(address, data)

    def read_u32(self, address: int) -> int:
        """A 32-bit word."""
        return int.from_bytes(self.read(address, 4), "little")

    def read_u64(self, address: int) -> int:
        """A 64-bit word."""
        return int.from_bytes(self.read(address, 8), "little")

    def write_u32(self, address: int, value: int) -> None:
        """Store a 32-bit word."""
        self.write(address, (value & _M32).to_bytes(4, "little"))

    def write_u64(self, address: int, value: int) -> None:
        """Store a 64-bit word."""
        self.write(address, (value & (1 << 64) - 1).to_bytes(8, "little"))


def _rewritten(caller: CompatCaller, entry: Entry, arguments: tuple[int, ...], layout: Layout | None,
               position: int) -> int:
    """Call with the structure that argument ``position`` points to in its native form."""
    if layout is None:
        return entry.handler(caller, *arguments[: entry.nr_args])
    address = arguments[position]
    fields = layout.compat.unpack(caller.read(address, layout.compat.size))
    caller.shadow[:] = layout.native.pack(*fields)
    changed = (*arguments[:position], _SHADOW, *arguments[position + 1 :])
    try:
        result = entry.handler(caller, *changed[: entry.nr_args])
    except Preempted as more:
        raise Preempted(tuple(address if a == _SHADOW else a for a in more.arguments)) from None
    after = layout.native.unpack(bytes(caller.shadow))
    if after != fields:
        caller.write(address, layout.compat.pack(*(a & _M32 if a > _M32 and f <= _M32 else a
                                                   for a, f in zip(after, fields, strict=True))))
    return result


def _call(caller: CompatCaller, number: int, entry: Entry, arguments: tuple[int, ...]) -> int:
    layouts: dict[int, Layout | None]
    if number in (Hypercall.XEN_VERSION, Hypercall.EVENT_CHANNEL_OP, Hypercall.HVM_OP, Hypercall.CONSOLE_IO,
                  Hypercall.VM_ASSIST):
        return entry.handler(caller, *arguments[: entry.nr_args])
    if number == Hypercall.SET_TIMER_OP:
        return entry.handler(caller, arguments[0] | arguments[1] << 32)
    if number == Hypercall.MEMORY_OP:
        layouts, command, position = _MEMORY, arguments[0] & MEMOP_CMD_MASK, 1
    elif number == Hypercall.SCHED_OP:
        layouts, command, position = _SCHED, arguments[0], 1
    elif number == Hypercall.VCPU_OP:
        layouts, command, position = _VCPU, arguments[0], 2
    else:
        raise XenError(errno.ENOSYS)
    if command not in layouts:
        raise XenError(errno.ENOSYS)
    return _rewritten(caller, entry, arguments, layouts[command], position)


def hypercall(hvm: HvmVcpu, cpu: HvmCpu, table: list[Entry | None]) -> bool:
    """One hypercall; True when the instruction is to be executed again (a continuation)."""
    gpr = cpu.gpr
    number = gpr[RAX] & _M32
    arguments = tuple(gpr[register] & _M32 for register in _ARGUMENTS)
    entry = table[number] if number < 64 else None
    caller = CompatCaller(hvm)
    try:
        if entry is None:
            raise XenError(errno.ENOSYS)
        hvm.domain.hypercall_counts[number] += 1
        hvm.hypervisor.xsm.hypercall(hvm.domain, number)
        result = _call(caller, number, entry, arguments)
    except XenError as error:
        result = -error.errno
        if error.errno == errno.ENOSYS:
            hvm.hypervisor.note_enosys(hvm.domain, number)
    except Preempted as more:
        for register, value in zip(_ARGUMENTS, more.arguments, strict=False):
            gpr[register] = value & _M32
        return True
    gpr[RAX] = result & _M32
    return False
