# SPDX-License-Identifier: GPL-2.0-only
"""Event channels (Xen: xen/common/event_channel.c).

A port is an index into its domain's list of channels; each channel is in exactly one :class:`State`.  Two interdomain
channels name each other, always.  :mod:`pyxen.hypervisor.event_channel_op` decodes the hypercall,
:mod:`pyxen.hypervisor.virq` raises VIRQs.

**Who may touch pending bits.**  The bitmaps lie in guest memory and the guest changes them with locked instructions,
on an engine that runs without the GIL.  A read-modify-write in Python is safe on the thread of that engine, and only
there: while Python code runs on it, no guest code of the domain does (a domain runs on one engine at a time).  So an
event that arrives on another thread is *posted*: noted in :attr:`EventChannels.posted`, and the engine is kicked.  The
engine's thread moves posted events into the bitmaps (:meth:`EventChannels.apply_posted`) after every exit, before every
entry and before deciding whether a vCPU may block.  Nothing is lost in between:

* The poster notes first and looks for a running vCPU second; the engine's thread sets ``Vcpu.cpu`` first and applies
  second.  Whatever the interleaving, one of the two sees the other.
* A vCPU that blocks sets BLOCKED, then applies and checks; the poster notes, then unblocks.
* A masked port wakes nobody, as in Xen.  Only the guest unmasks, so it is running, so it was kicked, or it will run,
  and then the event is applied before its first instruction.
* ``posted`` says what a port's bit is to become; the last word wins.  A freed port posts "clear", so an old event
  cannot reach the port's next owner.

``posted`` is a plain dict used only through operations that are atomic in CPython, and no lock is taken to apply it: a
sender already holds its own domain's lock, and taking the target's as well would need both in order.

Ports of dom0 with a *consumer* (a back end's callback) have no bits: the callback is the upcall.  It runs on the
sender's thread with no lock held, and may come once more after the port was closed.

Lock order: two domains' ``lock`` in the order of their domid; then the run queue's.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from typing import TYPE_CHECKING

from pyxen.abi.event_channel import EvtchnStat
from pyxen.abi.xen import DOMID_SELF, NR_VIRQS, DomId, EvtchnPort
from pyxen.errors import XenError
from pyxen.hypervisor.domain import Dying
from pyxen.hypervisor.event_2l import EventAbi, TwoLevel
from pyxen.hypervisor.hypercall import Caller, Preempted, should_preempt
from pyxen.hypervisor.lock import TicketLock
from pyxen.hypervisor.vcpu import PauseFlag
from pyxen.hypervisor.vcpu_info import upcall_deliverable, vcpu_mark_events_pending
from pyxen.hypervisor.virq import virq_is_global

if TYPE_CHECKING:
    from pyxen.hypervisor.domain import Domain
    from pyxen.hypervisor.vcpu import Vcpu

XenConsumer = Callable[["Domain", int], None]
"""Called with (domain, port) when the guest's end of a Xen-attached channel is notified."""
LocalConsumer = Callable[[int], None]
"""Called with the local port when an event arrives for dom0's own software."""

EVTCHNS_PER_BUCKET = 128
MAX_EVTCHN_PORT = (1 << 31) - 1
NR_PIRQS = 16 + 32
"""nr_static_irqs + extra_domU_irqs of a machine without IOAPIC: pIRQs below exist, but no guest is given one."""

_ident = threading.get_ident
_POLLING = int(PauseFlag.POLLING)


class State(IntEnum):
    """``ECS_*`` (xen/include/xen/sched.h)."""

    FREE = 0
    RESERVED = 1
    UNBOUND = 2
    INTERDOMAIN = 3
    PIRQ = 4
    VIRQ = 5
    IPI = 6


class Channel:
    """``struct evtchn``."""

    __slots__ = ("consumer", "notify_vcpu_id", "port", "remote", "remote_domid", "remote_port", "state", "virq",
                 "xen_consumer")

    def __init__(self, port: int) -> None:
        self.port = port
        self.state = State.FREE
        self.reset()

    def reset(self) -> None:
        """Back to what a port that was never used is."""
        self.state = State.FREE
        self.notify_vcpu_id = 0
        self.remote_domid = 0
        self.remote: Domain | None = None
        self.remote_port = 0
        self.virq = 0
        self.xen_consumer: XenConsumer | None = None
        self.consumer: LocalConsumer | None = None


class EventChannels:
    """The event channels of one domain. ``lock`` (Xen: event_lock) guards the channels, not the pending bits."""

    def __init__(self, domain: Domain, max_port: int = MAX_EVTCHN_PORT) -> None:
        self.domain = domain
        self.lock = TicketLock("event channels of a domain")
        self.abi: EventAbi = TwoLevel(domain)
        self.max_port = max_port
        """d->max_evtchn_port: the highest port it may have (XEN_DOMCTL_set_max_evtchn)."""
        self.home_thread: int | None = None
        """threading.get_ident() of the engine thread the domain runs on; None while it has none. Changed only when no
        engine is inside the domain."""
        self.posted: dict[int, bool] = {}
        """port -> whether its pending bit is to be set or cleared, not yet in guest memory."""
        self.events_sent = 0
        self.global_virq_to_evtchn = [0] * NR_VIRQS
        """Of the domain, not of vCPU 0 as in Xen: dom0's software has no vCPU."""
        self._channels: list[Channel] = []
        self._lowest_free = 1  # no port below is free
        self._destroyed = 0  # ports below are closed for good
        self._channels_grow()
        self._channels[0].state = State.RESERVED  # so that 0 can mean "none"

    # --- ports ------------------------------------------------------------------------------------

    def _channels_grow(self) -> None:
        base = len(self._channels)
        self._channels.extend(Channel(port) for port in range(base, base + EVTCHNS_PER_BUCKET))

    def port_is_valid(self, port: int) -> bool:
        return 0 <= port < len(self._channels)

    def channel(self, port: int) -> Channel:
        """The channel of ``port``. Raises XenError(EINVAL) for one never allocated."""
        if not 0 <= port < len(self._channels):
            raise XenError(errno.EINVAL)
        return self._channels[port]

    def channels(self) -> Iterator[Channel]:
        """Every channel that is not free, in port order."""
        return (chn for chn in self._channels if chn.state is not State.FREE)

    def _get_free_port(self) -> Channel:
        """get_free_port(). Raises XenError: EINVAL for a dying domain, ENOSPC at the limit."""
        if self.domain.dying is not Dying.ALIVE:
            raise XenError(errno.EINVAL)
        port = self._lowest_free
        lowest = -1
        while True:
            if port > self.max_port or port >= self.abi.max_ports:
                raise XenError(errno.ENOSPC)
            if port == len(self._channels):
                self._channels_grow()
            chn = self._channels[port]
            if chn.state is State.FREE:
                if lowest < 0:
                    self._lowest_free = lowest = port
                if not self.abi.is_busy(port):
                    return chn
            port += 1

    def _allocated(self, chn: Channel, state: State) -> EvtchnPort:
        """The last step of every allocation, after all that could fail."""
        chn.state = state
        if chn.port == self._lowest_free:
            self._lowest_free += 1
        self._apply_if_home()  # a "clear" from the port's last life
        return EvtchnPort(chn.port)

    def _free(self, chn: Channel) -> None:
        """free_evtchn(): a re-bound port starts without an old event."""
        chn.reset()
        self._lowest_free = min(self._lowest_free, chn.port)
        self.posted[chn.port] = False
        self._apply_if_home()

    def _vcpu(self, vcpu_id: int) -> Vcpu:
        if not 0 <= vcpu_id < len(self.domain.vcpus):
            raise XenError(errno.ENOENT)
        return self.domain.vcpus[vcpu_id]

    # --- binding ----------------------------------------------------------------------------------

    def alloc_unbound(self, remote_domid: DomId, current: Domain) -> EvtchnPort:
        """EVTCHNOP_alloc_unbound on behalf of ``current``: a port that ``remote_domid`` may bind to.

        DOMID_SELF as the remote is the *caller*. Raises XenError: EINVAL, ENOSPC, EPERM.
        """
        with self.lock:
            chn = self._get_free_port()
            self.domain.hypervisor.xsm.evtchn_unbound(current, self.domain, chn, remote_domid)
            chn.remote_domid = current.domid if remote_domid == DOMID_SELF else remote_domid
            return self._allocated(chn, State.UNBOUND)

    def bind_interdomain(self, remote: Domain, remote_port: int) -> EvtchnPort:
        """EVTCHNOP_bind_interdomain: connect a new local port to ``remote``'s unbound one.

        Raises XenError: EINVAL when the remote port does not wait for this domain, ENOSPC, EPERM.
        """
        with both_locked(self, remote.evtchn):
            chn = self._get_free_port()
            rchn = remote.evtchn.channel(remote_port)
            if rchn.state is not State.UNBOUND or rchn.remote_domid != self.domain.domid:
                raise XenError(errno.EINVAL)
            self.domain.hypervisor.xsm.evtchn_interdomain(self.domain, chn, remote, rchn)
            port = self._allocated(chn, State.INTERDOMAIN)
            chn.remote, chn.remote_port = remote, remote_port
            rchn.remote, rchn.remote_port = self.domain, port
            rchn.state = State.INTERDOMAIN
            # The other end may have notified before we were bound: never lose that.
            self._set_pending(chn)
            return port

    def bind_virq(self, virq: int, vcpu_id: int) -> EvtchnPort:
        """EVTCHNOP_bind_virq.

        Raises XenError: EINVAL (no such VIRQ, or a global one not on vCPU 0), ENOENT (vCPU), EEXIST, ENOSPC.
        """
        if not 0 <= virq < NR_VIRQS or (virq_is_global(virq) and vcpu_id != 0):
            raise XenError(errno.EINVAL)
        bound = self.global_virq_to_evtchn if virq_is_global(virq) else self._vcpu(vcpu_id).virq_to_evtchn
        with self.lock:
            if bound[virq]:
                raise XenError(errno.EEXIST)
            chn = self._get_free_port()
            chn.notify_vcpu_id, chn.virq = vcpu_id, virq
            port = bound[virq] = self._allocated(chn, State.VIRQ)
            return port

    def bind_ipi(self, vcpu_id: int) -> EvtchnPort:
        """EVTCHNOP_bind_ipi. Raises XenError: ENOENT, ENOSPC."""
        self._vcpu(vcpu_id)
        with self.lock:
            chn = self._get_free_port()
            chn.notify_vcpu_id = vcpu_id
            return self._allocated(chn, State.IPI)

    def bind_pirq(self, pirq: int, flags: int) -> EvtchnPort:
        """EVTCHNOP_bind_pirq: no domain is given an interrupt. Raises XenError: EINVAL beyond the last, else EPERM."""
        raise XenError(errno.EINVAL if not 0 <= pirq < NR_PIRQS else errno.EPERM)

    def bind_vcpu(self, port: int, vcpu_id: int) -> None:
        """EVTCHNOP_bind_vcpu. Raises XenError: ENOENT, EINVAL (per-vCPU VIRQs, IPIs, Xen-attached and unused ports)."""
        self._vcpu(vcpu_id)
        with self.lock:
            chn = self.channel(port)
            movable = chn.state in (State.UNBOUND, State.INTERDOMAIN) or (
                chn.state is State.VIRQ and virq_is_global(chn.virq))
            if chn.xen_consumer is not None or not movable:
                raise XenError(errno.EINVAL)
            chn.notify_vcpu_id = vcpu_id

    def bind_consumer(self, port: int, consumer: LocalConsumer) -> None:
        """Let dom0's software take the events of its own ``port``; one that waits is delivered at once.

        ``consumer(port)`` runs on the sender's thread: it must be quick and not raise.

        Raises XenError(EINVAL) for a free port.
        """
        with self.lock:
            chn = self.channel(port)
            if chn.state in (State.FREE, State.RESERVED):
                raise XenError(errno.EINVAL)
            chn.consumer = consumer
            waiting = self.posted.pop(port, False)
        if waiting:
            self._consume(chn)

    # --- closing ----------------------------------------------------------------------------------

    def close(self, port: int, *, guest: bool = True) -> None:
        """EVTCHNOP_close (evtchn_close). The other end of an interdomain channel becomes unbound again.

        Raises XenError(EINVAL): a port that is not in use or, for a ``guest``, one that Xen attached.
        """
        while True:
            remote = self.channel(port).remote
            with both_locked(self, remote.evtchn if remote else self):
                chn = self.channel(port)
                if chn.remote is not remote:
                    continue  # bound or closed while we waited for the locks
                self._close_locked(chn, guest)
                return

    def _close_locked(self, chn: Channel, guest: bool) -> None:
        if chn.state in (State.FREE, State.RESERVED) or (guest and chn.xen_consumer is not None):
            raise XenError(errno.EINVAL)
        if chn.state is State.VIRQ:
            if virq_is_global(chn.virq):
                self.global_virq_to_evtchn[chn.virq] = 0
            else:
                self.domain.vcpus[chn.notify_vcpu_id].virq_to_evtchn[chn.virq] = 0
        elif chn.state is State.INTERDOMAIN:
            assert chn.remote is not None
            other = chn.remote.evtchn._channels[chn.remote_port]
            other.state = State.UNBOUND
            other.remote, other.remote_port = None, 0
            other.remote_domid = self.domain.domid
        self._free(chn)

    def reset(self, caller: Caller, again: tuple[int, ...]) -> None:
        """EVTCHNOP_reset: close all ports that the guest could close.

        Raises Preempted(``again``) between two ports. There is no cursor that a guest could leave behind: skipping the
        closed ports costs less than the budget of one call, which starts at the first port to close.
        """
        for chn in self._channels:
            if chn.state in (State.FREE, State.RESERVED) or chn.xen_consumer is not None:
                continue
            if should_preempt(caller):
                raise Preempted(again)
            self._close_if_open(chn, guest=True)

    def destroy(self, budget: int = 128) -> bool:
        """evtchn_destroy(): close everything of a dying domain, at most ``budget`` ports a call. True when done."""
        assert self.domain.dying is not Dying.ALIVE  # else ports could be allocated behind the cursor
        end = min(self._destroyed + budget, len(self._channels))
        for chn in self._channels[self._destroyed:end]:
            self._close_if_open(chn, guest=False)
        self._destroyed = end
        return end == len(self._channels)

    def _close_if_open(self, chn: Channel, *, guest: bool) -> None:
        try:
            if chn.state not in (State.FREE, State.RESERVED):
                self.close(chn.port, guest=guest)
        except XenError:
            pass  # another thread closed it first

    # --- events -----------------------------------------------------------------------------------

    def send(self, port: int, current: Vcpu | None = None) -> None:
        """EVTCHNOP_send: notify the other end of ``port``; ``current`` is the vCPU that asks, if one does. An unbound
        port swallows it.

        Raises XenError: EINVAL for a port that is not interdomain, IPI or unbound, or that Xen attached; EPERM.
        """
        with self.lock:
            chn = self.channel(port)
            if chn.xen_consumer is not None:
                raise XenError(errno.EINVAL)
            self.domain.hypervisor.xsm.evtchn_send(self.domain, chn)
            if chn.state is State.INTERDOMAIN:
                assert chn.remote is not None
                target = chn.remote.evtchn
                peer = target._channels[chn.remote_port]
            elif chn.state is State.IPI:
                target, peer = self, chn
            elif chn.state is State.UNBOUND:
                return
            else:
                raise XenError(errno.EINVAL)
            self.events_sent += 1
            consumed = target._set_pending(peer)
        if consumed:
            target._consume(peer)
        elif chn.state is State.IPI and current is not None:
            self._yield_to(current, chn.notify_vcpu_id)

    def _yield_to(self, current: Vcpu, vcpu_id: int) -> None:
        """The sender of an IPI may wait for what it asked another vCPU to do, on the same engine."""
        vcpus = self.domain.vcpus
        if vcpu_id < len(vcpus) and vcpu_id != current.vcpu_id:
            self.domain.hypervisor.scheduler.vcpu_yield_to(current, vcpus[vcpu_id])

    def _set_pending(self, chn: Channel) -> bool:
        """evtchn_port_set_pending(), on any thread; True when a consumer is to be called (without locks)."""
        if chn.consumer is not None or chn.xen_consumer is not None:
            return True
        self.posted[chn.port] = True
        if self.home_thread == _ident():
            self.apply_posted()
        else:
            self._wake_for(chn)
        return False

    def _consume(self, chn: Channel) -> None:
        try:
            if chn.xen_consumer is not None:
                chn.xen_consumer(self.domain, chn.port)
            elif chn.consumer is not None:
                chn.consumer(chn.port)
        except Exception as error:  # a back end's bug must not hit the guest that notified it
            self.domain.hypervisor.log.printk(f"{self.domain!r}: consumer of port {chn.port} failed: {error!r}")

    def _wake_for(self, chn: Channel) -> None:
        """After posting from a foreign thread: interrupt the domain's engine, wake who waits for the event."""
        domain = self.domain
        if not domain.shared_info_mfn:
            return  # dom0: nobody waits for a port without a consumer
        scheduler = domain.hypervisor.scheduler
        if not self.abi.is_masked(chn.port) and chn.notify_vcpu_id < len(domain.vcpus):
            scheduler.vcpu_unblock(domain.vcpus[chn.notify_vcpu_id])
        for vcpu in domain.vcpus:
            if vcpu.pause_flags & _POLLING and vcpu.poll_port in (-1, 0, chn.port):
                scheduler.vcpu_unblock(vcpu)
            cpu = vcpu.cpu
            if cpu is not None:
                cpu.kick()

    def _apply_if_home(self) -> None:
        if self.home_thread == _ident():
            self.apply_posted()

    @property
    def has_posted(self) -> bool:
        """Whether :meth:`apply_posted` has anything to do. Reading ``posted`` as a truth value is the same, cheaper."""
        return bool(self.posted)

    def apply_posted(self) -> None:
        """Move posted events into guest memory. On the thread of the domain's engine, without the run queue's lock."""
        posted = self.posted
        while posted:
            port, pending = posted.popitem()  # only this thread removes, but for dom0, which has no engine
            self._apply(port, pending)

    def _apply(self, port: int, pending: bool) -> None:
        if not pending:
            self.abi.clear_pending(port)
            return
        domain = self.domain
        chn = self._channels[port]
        vcpu = domain.vcpus[chn.notify_vcpu_id] if chn.notify_vcpu_id < len(domain.vcpus) else None
        if self.abi.set_pending(vcpu, port) and vcpu is not None:
            vcpu_mark_events_pending(vcpu)
        for waiter in domain.vcpus:  # evtchn_check_pollers(): a poller waits for masked ports
            if waiter.pause_flags & _POLLING and waiter.poll_port in (-1, 0, port):
                domain.hypervisor.scheduler.vcpu_unblock(waiter)

    def is_pending(self, port: int) -> bool:
        """Whether an event waits on ``port``, posted ones included (any thread)."""
        posted = self.posted.get(port)
        return self.abi.is_pending(port) if posted is None else posted

    def local_events_need_delivery(self, vcpu: Vcpu) -> bool:
        """Whether ``vcpu`` would take an upcall now.

        Exact on the engine's thread; elsewhere a posted event counts when its port is not masked.
        """
        if self.posted:
            if self.home_thread == _ident():
                self.apply_posted()
            elif any(on and self._channels[port].notify_vcpu_id == vcpu.vcpu_id and not self.abi.is_masked(port)
                     for port, on in self.posted.copy().items()):
                return True
        return upcall_deliverable(vcpu)

    def unmask(self, port: int) -> None:
        """EVTCHNOP_unmask, on the caller's engine. Raises XenError(EINVAL) for a port never allocated."""
        with self.lock:
            chn = self.channel(port)
            self._apply_if_home()
            vcpus = self.domain.vcpus
            vcpu = vcpus[chn.notify_vcpu_id] if chn.notify_vcpu_id < len(vcpus) else None
            if self.abi.unmask(vcpu, port) and vcpu is not None:
                vcpu_mark_events_pending(vcpu)

    def status(self, port: int, current: Domain) -> tuple[EvtchnStat, int, int, int]:
        """EVTCHNOP_status for ``current``: status, vCPU, and the two words of the union.

        Raises XenError: EINVAL, EPERM.
        """
        with self.lock:
            chn = self.channel(port)
            self.domain.hypervisor.xsm.evtchn_status(current, self.domain, chn)
            match chn.state:
                case State.UNBOUND:
                    return EvtchnStat.UNBOUND, chn.notify_vcpu_id, chn.remote_domid, 0
                case State.INTERDOMAIN:
                    assert chn.remote is not None
                    return EvtchnStat.INTERDOMAIN, chn.notify_vcpu_id, chn.remote.domid, chn.remote_port
                case State.VIRQ:
                    return EvtchnStat.VIRQ, chn.notify_vcpu_id, chn.virq, 0
                case State.IPI:
                    return EvtchnStat.IPI, chn.notify_vcpu_id, 0, 0
                case _:
                    return EvtchnStat.CLOSED, chn.notify_vcpu_id, 0, 0

    # --- VIRQs ------------------------------------------------------------------------------------

    def raise_virq(self, vcpu: Vcpu, virq: int) -> None:
        """Set the port that a per-vCPU ``virq`` is bound to on ``vcpu``, if any, pending (any thread)."""
        self._raise(vcpu.virq_to_evtchn, virq)

    def raise_global_virq(self, virq: int) -> None:
        """The same for a global VIRQ of the domain."""
        self._raise(self.global_virq_to_evtchn, virq)

    def _raise(self, bound: list[int], virq: int) -> None:
        if not bound[virq]:
            return
        with self.lock:
            port = bound[virq]
            if not port:
                return
            chn = self._channels[port]
            consumed = self._set_pending(chn)
        if consumed:
            self._consume(chn)


@contextmanager
def both_locked(a: EventChannels, b: EventChannels) -> Iterator[None]:
    """Hold the locks of two domains (or twice of one), lower domid first (double_evtchn_lock)."""
    first, second = (a, b) if a.domain.domid <= b.domain.domid else (b, a)
    with first.lock, second.lock:
        yield


# --- channels that end in the hypervisor -----------------------------------------------------------

def alloc_unbound_xen_event_channel(domain: Domain, remote_domid: DomId, consumer: XenConsumer) -> EvtchnPort:
    """A port of ``domain`` that ``remote_domid`` may bind; its events go to ``consumer`` instead of the guest.

    Raises XenError: EINVAL, ENOSPC.
    """
    evtchn = domain.evtchn
    with evtchn.lock:
        chn = evtchn._get_free_port()
        chn.remote_domid = remote_domid
        chn.xen_consumer = consumer
        return evtchn._allocated(chn, State.UNBOUND)


def free_xen_event_channel(domain: Domain, port: int) -> None:
    """Close a port made by :func:`alloc_unbound_xen_event_channel`; it may be gone already (the domain died first)."""
    try:
        domain.evtchn.close(port, guest=False)
    except XenError:
        pass


def notify_via_xen_event_channel(domain: Domain, port: int) -> None:
    """Notify the other end of a Xen-attached port; nothing happens when it is unbound or the domain dies."""
    evtchn = domain.evtchn
    with evtchn.lock:
        if domain.dying is not Dying.ALIVE:
            return
        chn = evtchn.channel(port)
        if chn.state is not State.INTERDOMAIN or chn.remote is None:
            return
        target, peer = chn.remote.evtchn, chn.remote.evtchn._channels[chn.remote_port]
        consumed = target._set_pending(peer)
    if consumed:
        target._consume(peer)
