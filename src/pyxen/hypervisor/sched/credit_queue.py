# SPDX-License-Identifier: GPL-2.0-only
"""What the credit scheduler knows of domains, vCPUs and pCPUs, and the run queue of a pCPU (Xen: ``struct csched_dom``,
``csched_vcpu`` and ``csched_pcpu`` of xen/common/sched_credit.c). The policy is :mod:`pyxen.hypervisor.sched.credit`'s,
and so are the locks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from pyxen.hypervisor.timer import Timer

if TYPE_CHECKING:
    from pyxen.hypervisor.domain import Domain
    from pyxen.hypervisor.vcpu import Vcpu

DEFAULT_WEIGHT: Final = 256

# CSCHED_PRI_TS_*: also the index of the run queue's list, negated.
BOOST: Final = 0
UNDER: Final = -1
OVER: Final = -2
PRIORITY_NAMES: Final = ("boost", "under", "over")


class CreditDomain:
    """``struct csched_dom``."""

    __slots__ = ("active", "cap", "domain", "weight")

    def __init__(self, domain: Domain) -> None:
        self.domain = domain
        self.weight = DEFAULT_WEIGHT
        self.cap = 0
        self.active: dict[CreditVcpu, None] = {}


class CreditVcpu:
    """``struct csched_vcpu``."""

    __slots__ = (
        "active", "credit_ns", "domain", "parked", "priority", "queued", "queued_ns", "start_ns", "vcpu", "yielded",
    )

    def __init__(self, vcpu: Vcpu, domain: CreditDomain) -> None:
        self.vcpu = vcpu
        self.domain = domain
        self.priority = UNDER
        self.credit_ns = 0
        self.start_ns = 0
        """When the run not yet charged began."""
        self.active = False
        self.parked = False
        self.queued = False
        self.queued_ns = 0
        """Since when it waits in the run queue."""
        self.yielded = False


class CreditCpu:
    """``struct csched_pcpu``: a run queue, one first-in-first-out list for each priority, and whose turn it is.

    A *turn* is how long one domain has the pCPU (a time slice); in it its vCPUs rotate."""

    __slots__ = ("directed", "nr_vcpus", "queues", "siblings", "tick", "turn", "turn_end_ns", "turn_start_ns")

    def __init__(self, tick: Callable[[int], None]) -> None:
        self.queues: tuple[OrderedDict[CreditVcpu, None], ...] = (OrderedDict(), OrderedDict(), OrderedDict())
        self.siblings: dict[CreditDomain, OrderedDict[CreditVcpu, None]] = {}
        """What is queued, by domain."""
        self.tick = Timer(tick)
        self.nr_vcpus = 0
        self.turn: CreditDomain | None = None
        self.turn_start_ns = 0
        self.turn_end_ns = 0
        self.directed: CreditVcpu | None = None
        """Who is to run next within the turn (an IPI was sent to it)."""

    def insert(self, svc: CreditVcpu, now_ns: int) -> None:
        """__runq_insert(): last of its priority."""
        svc.queued = True
        svc.queued_ns = now_ns
        self.queues[-svc.priority][svc] = None
        self.siblings.setdefault(svc.domain, OrderedDict())[svc] = None

    def remove(self, svc: CreditVcpu) -> None:
        """__runq_remove()."""
        if svc.queued:
            svc.queued = False
            del self.queues[-svc.priority][svc]
            same = self.siblings[svc.domain]
            del same[svc]
            if not same:
                del self.siblings[svc.domain]
            if self.directed is svc:
                self.directed = None

    def exchange(self, svc: CreditVcpu | None, sdom: CreditDomain, now_ns: int) -> CreditVcpu:
        """:meth:`sibling` of ``sdom``, which there is, leaves the queue; ``svc``, of the same domain, comes in at the
        end."""
        waiting = self.siblings[sdom]
        chosen = self.directed
        self.directed = None
        if chosen is None or chosen.domain is not sdom:
            chosen = next(iter(waiting))
        chosen.queued = False
        del self.queues[-chosen.priority][chosen], waiting[chosen]
        if svc is not None:
            svc.queued = True
            svc.queued_ns = now_ns
            self.queues[-svc.priority][svc] = waiting[svc] = None
        elif not waiting:
            del self.siblings[sdom]
        return chosen

    def sibling(self, sdom: CreditDomain) -> CreditVcpu | None:
        """The queued vCPU of ``sdom`` that runs next: the one an IPI went to, else the one that waits longest.

        Whatever its priority: within a domain vCPUs wait for each other, and those in debt may have what the others
        spin for."""
        if self.directed is not None and self.directed.domain is sdom:
            return self.directed
        return next(iter(self.siblings.get(sdom, ())), None)
