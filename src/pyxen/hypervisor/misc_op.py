# SPDX-License-Identifier: GPL-2.0-only
"""Small hypercalls: console_io, vm_assist, multicall, physdev_op (Xen: drivers/char/console.c, common/kernel.c,
common/multicall.c,
arch/x86/physdev.c)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from pyxen.abi.xen import (
    CONSOLEIO_READ,
    CONSOLEIO_WRITE,
    MULTICALL_ENTRY,
    VMASST_CMD_DISABLE,
    VMASST_CMD_ENABLE,
    Hypercall,
    VmAssist,
)
from pyxen.errors import XenError
from pyxen.hypervisor.hypercall import Preempted, should_preempt

if TYPE_CHECKING:
    from pyxen.hypervisor.hypercall import Caller, Entry, Handler
    from pyxen.hypervisor.x86.pv.vcpu import PvVcpu

_CONSOLE_CHUNK: Final = 128
VALID_ASSISTS: Final = (
    1 << VmAssist.FOUR_GB_SEGMENTS | 1 << VmAssist.FOUR_GB_SEGMENTS_NOTIFY | 1 << VmAssist.WRITABLE_PAGETABLES
    | 1 << VmAssist.PAE_EXTENDED_CR3 | 1 << VmAssist.RUNSTATE_UPDATE_FLAG | 1 << VmAssist.M2P_STRICT
)
"""NATIVE_VM_ASSIST_VALID of 4.6, and the runstate flag, which is later. Not architectural_iopl (4.7): the virtual IOPL
is not shown in frames here."""

HVM_VALID_ASSISTS: Final = 1 << VmAssist.RUNSTATE_UPDATE_FLAG
"""HVM_VM_ASSIST_VALID."""

PHYSDEVOP_SET_IOPL: Final = 6
PHYSDEVOP_SET_IOBITMAP: Final = 7
PHYSDEVOP_EOI: Final = 12
PHYSDEVOP_IRQ_STATUS_QUERY: Final = 5


def do_console_io(caller: Caller, command: int, count: int, buffer: int) -> int:
    """HYPERVISOR_console_io(cmd, count, buffer): a guest's line goes to the hypervisor's log, with its domain id."""
    domain = caller.domain
    command &= 0xFFFFFFFF
    domain.hypervisor.xsm.console_io(domain, domain, command)
    count &= 0xFFFFFFFF
    if command == CONSOLEIO_WRITE:
        while count:
            chunk = min(count, _CONSOLE_CHUNK)
            domain.hypervisor.log.guest_write(domain.domid, caller.read(buffer, chunk))
            count -= chunk
            buffer += chunk
            if count and should_preempt(caller):
                raise Preempted((command, count, buffer))
        return 0
    if command == CONSOLEIO_READ:
        return 0  # the host's serial console has no input
    raise XenError(errno.ENOSYS)


def do_vm_assist(caller: Caller, command: int, assist: int) -> int:
    """HYPERVISOR_vm_assist(cmd, type): EINVAL for a type this guest cannot have, ENOSYS for an unknown command."""
    command &= 0xFFFFFFFF
    assist &= 0xFFFFFFFF
    if assist >= 64 or not (HVM_VALID_ASSISTS if caller.domain.is_hvm else VALID_ASSISTS) >> assist & 1:
        raise XenError(errno.EINVAL)
    if command == VMASST_CMD_ENABLE:
        caller.domain.vm_assist |= 1 << assist
    elif command == VMASST_CMD_DISABLE:
        caller.domain.vm_assist &= ~(1 << assist)
    else:
        raise XenError(errno.ENOSYS)
    return 0


def make_multicall(table: list[Entry | None]) -> Handler:
    """HYPERVISOR_multicall over a hypercall table."""
    size = MULTICALL_ENTRY.size
    unpack = MULTICALL_ENTRY.unpack

    def do_multicall(caller: Caller, calls: int, count: int) -> int:
        """Run ``count`` entries; each gets its result. A continuation inside one resumes there."""
        count &= 0xFFFFFFFF
        counts = caller.domain.hypercall_counts
        xsm, domain = caller.domain.hypervisor.xsm, caller.domain
        for done in range(count):
            at = calls + done * size
            number, _result, *arguments = unpack(caller.read(at, size))
            entry = table[number] if number < 64 else None
            try:
                if number == Hypercall.MULTICALL:
                    result = -errno.EINVAL  # "Multicall reentry is disallowed."
                elif entry is None:
                    result = -errno.ENOSYS
                else:
                    counts[number] += 1
                    xsm.hypercall(domain, number)
                    result = entry.handler(caller, *arguments[: entry.nr_args])
            except XenError as error:
                result = -error.errno
            except Preempted as more:
                # xen/common/multicall.c: the entry is rewritten to continue, and the multicall is called again from it
                changed = list(more.arguments) + arguments[len(more.arguments) :]
                caller.write(at + 16, b"".join((a & (1 << 64) - 1).to_bytes(8, "little") for a in changed))
                raise Preempted((at, count - done)) from None
            caller.write_u64(at + 8, result & (1 << 64) - 1)
            if done + 1 < count and should_preempt(caller):
                raise Preempted((at + size, count - done - 1))
        return 0

    return do_multicall


def do_physdev_op(pv: PvVcpu, command: int, arg: int) -> int:
    """HYPERVISOR_physdev_op: what a guest without devices may ask; ENOSYS for the rest."""
    command &= 0xFFFFFFFF
    pv.hypervisor.xsm.physdev_op(pv.domain, command)
    if command == PHYSDEVOP_SET_IOPL:
        iopl = pv.read_u32(arg)
        if iopl > 3:
            raise XenError(errno.EINVAL)
        pv.iopl = iopl
        return 0
    if command == PHYSDEVOP_SET_IOBITMAP:
        bitmap = pv.read_u64(arg)
        ports = pv.read_u32(arg + 8)
        if ports > 65536 or (bitmap and not pv.guest_address_ok(bitmap, (ports + 7) // 8 or 1)):
            raise XenError(errno.EINVAL)
        pv.iobmp, pv.iobmp_limit = bitmap, ports
        return 0
    if command in (PHYSDEVOP_EOI, PHYSDEVOP_IRQ_STATUS_QUERY):
        raise XenError(errno.EINVAL)  # a domain without physical interrupts: no irq number is in range
    raise XenError(errno.ENOSYS)
