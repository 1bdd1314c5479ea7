# SPDX-License-Identifier: GPL-2.0-only
"""HYPERVISOR_event_channel_op: decoding, and debug key 'e' (Xen: do_event_channel_op and dump_evtchn_info in
xen/common/event_channel.c, do_event_channel_op_compat in xen/common/compat.c).

The FIFO operations (init_control, expand_array, set_priority) answer ENOSYS: a guest falls back to 2-level.
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING, Final

from pyxen.abi import event_channel as abi
from pyxen.abi.event_channel import EvtchnCmd, EvtchnStat
from pyxen.abi.xen import DomId
from pyxen.errors import XenError
from pyxen.hypervisor.event_channel import State
from pyxen.hypervisor.vcpu import PauseFlag

if TYPE_CHECKING:
    from pyxen.hypervisor.domain import Domain
    from pyxen.hypervisor.hypercall import Caller
    from pyxen.hypervisor.hypervisor import Hypervisor

_COMPAT: Final = frozenset(range(EvtchnCmd.UNMASK + 1))


def do_event_channel_op(caller: Caller, cmd: int, arg: int) -> int:
    """Hypercall 32: ``arg`` is the address of the structure of ``cmd``. Raises XenError; returns 0."""
    domain = caller.domain
    hypervisor = domain.hypervisor
    evtchn = domain.evtchn
    match cmd:
        case EvtchnCmd.SEND:
            evtchn.send(abi.PORT.unpack(caller.read(arg, abi.PORT.size))[0], caller.vcpu)
        case EvtchnCmd.UNMASK:
            evtchn.unmask(abi.PORT.unpack(caller.read(arg, abi.PORT.size))[0])
        case EvtchnCmd.CLOSE:
            evtchn.close(abi.PORT.unpack(caller.read(arg, abi.PORT.size))[0])
        case EvtchnCmd.ALLOC_UNBOUND:
            domid, remote, _ = abi.ALLOC_UNBOUND.unpack(caller.read(arg, abi.ALLOC_UNBOUND.size))
            port = hypervisor.domain(DomId(domid), caller.domain).evtchn.alloc_unbound(DomId(remote), domain)
            caller.write(arg, abi.ALLOC_UNBOUND.pack(domid, remote, port))
        case EvtchnCmd.BIND_INTERDOMAIN:
            remote, remote_port, _ = abi.BIND_INTERDOMAIN.unpack(caller.read(arg, abi.BIND_INTERDOMAIN.size))
            port = evtchn.bind_interdomain(hypervisor.domain(DomId(remote), caller.domain), remote_port)
            caller.write(arg, abi.BIND_INTERDOMAIN.pack(remote, remote_port, port))
        case EvtchnCmd.BIND_VIRQ:
            virq, vcpu_id, _ = abi.BIND_VIRQ.unpack(caller.read(arg, abi.BIND_VIRQ.size))
            caller.write(arg, abi.BIND_VIRQ.pack(virq, vcpu_id, evtchn.bind_virq(virq, vcpu_id)))
        case EvtchnCmd.BIND_IPI:
            vcpu_id, _ = abi.BIND_IPI.unpack(caller.read(arg, abi.BIND_IPI.size))
            caller.write(arg, abi.BIND_IPI.pack(vcpu_id, evtchn.bind_ipi(vcpu_id)))
        case EvtchnCmd.BIND_PIRQ:
            pirq, flags, _ = abi.BIND_PIRQ.unpack(caller.read(arg, abi.BIND_PIRQ.size))
            caller.write(arg, abi.BIND_PIRQ.pack(pirq, flags, evtchn.bind_pirq(pirq, flags)))
        case EvtchnCmd.BIND_VCPU:
            evtchn.bind_vcpu(*abi.BIND_VCPU.unpack(caller.read(arg, abi.BIND_VCPU.size)))
        case EvtchnCmd.STATUS:
            _status(caller, arg)
        case EvtchnCmd.RESET:
            (domid,) = abi.RESET.unpack(caller.read(arg, abi.RESET.size))
            target = hypervisor.domain(DomId(domid), caller.domain)
            hypervisor.xsm.evtchn_reset(domain, target)
            target.evtchn.reset(caller, (cmd, arg))
        case _:
            raise XenError(errno.ENOSYS)
    return 0


def _status(caller: Caller, arg: int) -> None:
    domid, port, _, _, word0, word1 = abi.STATUS.unpack(caller.read(arg, abi.STATUS_SIZE))
    target = caller.domain.hypervisor.domain(DomId(domid), caller.domain)
    status, vcpu_id, value0, value1 = target.evtchn.status(port, caller.domain)
    # Only the member of the union that belongs to the status changes; a domid is 16 bits wide.
    match status:
        case EvtchnStat.UNBOUND:
            word0 = (word0 & ~0xFFFF) | value0
        case EvtchnStat.INTERDOMAIN:
            word0, word1 = (word0 & ~0xFFFF) | value0, value1
        case EvtchnStat.VIRQ:
            word0 = value0
        case _:
            pass
    caller.write(arg, abi.STATUS.pack(domid, port, status, vcpu_id, word0, word1))


def do_event_channel_op_compat(caller: Caller, arg: int) -> int:
    """Hypercall 16 (before 3.2.2): ``arg`` is a struct evtchn_op, command and union in one."""
    cmd = caller.read_u32(arg)
    if cmd not in _COMPAT:
        raise XenError(errno.ENOSYS)
    return do_event_channel_op(caller, cmd, arg + abi.COMPAT_OP_ARGS)


def dump_evtchn_info(hypervisor: Hypervisor) -> None:
    """Debug key 'e', as Xen prints it."""
    hypervisor.log.printk("'e' pressed -> dumping event-channel info")
    for domain in list(hypervisor.domains.values()):
        for line in _domain_lines(domain):
            hypervisor.log.printk(line)


def _domain_lines(domain: Domain) -> list[str]:
    evtchn = domain.evtchn
    polling = ",".join(str(vcpu.vcpu_id) for vcpu in domain.vcpus if vcpu.pause_flags & PauseFlag.POLLING)
    lines = [f"Event channel information for domain {domain.domid}:", f"Polling vCPUs: {{{polling}}}",
             "    port [p/m/s]"]
    with evtchn.lock:
        for chn in evtchn.channels():
            if chn.state is State.RESERVED:
                continue
            vcpu = domain.vcpus[chn.notify_vcpu_id] if chn.notify_vcpu_id < len(domain.vcpus) else None
            line = (f"    {chn.port:4} [{evtchn.is_pending(chn.port):d}/{evtchn.abi.is_masked(chn.port):d}/"
                    f"{evtchn.abi.describe(vcpu, chn.port)}]: s={chn.state:d} n={chn.notify_vcpu_id} "
                    f"x={chn.xen_consumer is not None:d}")
            if chn.state is State.UNBOUND:
                line += f" d={chn.remote_domid}"
            elif chn.state is State.INTERDOMAIN and chn.remote is not None:
                line += f" d={chn.remote.domid} p={chn.remote_port}"
            elif chn.state is State.VIRQ:
                line += f" v={chn.virq}"
            lines.append(line)
    return lines
