# SPDX-License-Identifier: GPL-2.0-only
"""What a scheduler is to the rest of the hypervisor (Xen: ``struct scheduler`` in xen/include/xen/sched-if.h).

A scheduler is a policy without side effects: it orders vCPUs and answers who runs next and for how long.  Locking,
run states, timers of the guests, kicking engines and switching contexts are :mod:`pyxen.hypervisor.schedule`'s.  That
is why its methods *return* the pCPUs that ought to decide again ("tickle" in Xen) and do not poke them: they are
called with a run queue's lock held, under which nobody may call an engine.  It also lets a test run a scheduler in
virtual time without engines or threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from pyxen.hypervisor.domain import Domain
    from pyxen.hypervisor.timer import TimerQueue
    from pyxen.hypervisor.vcpu import Vcpu


class Decision(NamedTuple):
    """``struct task_slice``: who runs next (None: nobody, idle) and for how long at most (None: until something
    happens).
    """

    vcpu: Vcpu | None
    slice_ns: int | None
    wanted: Sequence[Domain] = ()
    """Domains whose vCPUs wait here but are at home on another pCPU: to be asked for."""


class SchedulerHost(Protocol):
    """What a scheduler may ask of :class:`~pyxen.hypervisor.schedule.Schedule`."""

    def now_ns(self) -> int:
        """System time."""
        ...

    def current(self, cpu: int) -> Vcpu | None:
        """The vCPU a pCPU has chosen to run. Stable under that pCPU's run queue lock."""
        ...

    def cpu_lock(self, cpu: int) -> AbstractContextManager[object]:
        """pcpu_schedule_lock(): a pCPU's run queue lock."""
        ...

    def vcpu_lock(self, vcpu: Vcpu) -> AbstractContextManager[object]:
        """vcpu_schedule_lock(): the run queue lock of the pCPU that ``vcpu`` is assigned to."""
        ...

    def timers(self, cpu: int) -> TimerQueue:
        """The timers of a pCPU."""
        ...

    def executed_ns(self, cpu: int) -> int:
        """How long the current vCPU of ``cpu`` has really been executed since it was switched to: not the time that the
        computer gave to something else."""
        ...

    def may_run(self, domain: Domain, cpu: int) -> bool:
        """Whether ``domain`` is at home on the engine of ``cpu``, and not about to leave it. Under its queue's lock."""
        ...

    def allowed_on(self, vcpu: Vcpu, cpu: int) -> bool:
        """Whether affinity and cpupool let ``vcpu`` run on the engine of ``cpu``."""
        ...

    def capacity(self, poolid: int) -> float:
        """How many engines a cpupool has."""
        ...

    def tickle(self, cpus: Sequence[int]) -> None:
        """cpu_raise_softirq(SCHEDULE_SOFTIRQ). Without locks."""
        ...

    def vcpu_pause_nosync(self, vcpu: Vcpu) -> None:
        """Without locks."""
        ...

    def vcpu_unpause(self, vcpu: Vcpu) -> None:
        """Without locks."""
        ...


class Scheduler(Protocol):
    """A scheduling policy. "Locked" below means: called with the run queue lock of ``vcpu.processor`` (or of ``cpu``)
    held.
    """

    name: str
    """As ``xl info`` shows it ("credit")."""

    def attach(self, host: SchedulerHost) -> None:
        """Called once, before anything else."""
        ...

    def add_cpu(self, cpu: int) -> None:
        """alloc_pdata: a pCPU comes online."""
        ...

    def share_cpu(self, cpu: int, with_cpu: int) -> None:
        """A modelled pCPU comes online that shares the run queue of another."""
        ...

    def migrate(self, vcpu: Vcpu, cpu: int) -> None:
        """Move a vCPU that nobody executes; sets ``vcpu.processor``. Both run queues' locks held."""
        ...

    def load(self, cpu: int) -> int:
        """How much is assigned to a pCPU's run queue (vCPUs)."""
        ...

    def has_siblings(self, vcpu: Vcpu) -> bool:
        """Whether another vCPU of its domain waits for the same pCPU. A hint; without locks."""
        ...

    def find_work(self, cpu: int, now_ns: int) -> Domain | int | None:
        """For a pCPU that is idle or runs something unimportant: a domain to ask for, or when to look again (ns)."""
        ...

    def add_domain(self, domain: Domain) -> None:
        """init_domain: sets ``domain.sched_data``."""
        ...

    def remove_domain(self, domain: Domain) -> None:
        """destroy_domain; its vCPUs are gone already."""
        ...

    def add_vcpu(self, vcpu: Vcpu) -> None:
        """alloc_vdata, insert_vcpu: sets ``vcpu.sched_data``. Locked."""
        ...

    def remove_vcpu(self, vcpu: Vcpu) -> None:
        """remove_vcpu, free_vdata; it is not running. Locked."""
        ...

    def wake(self, vcpu: Vcpu, now_ns: int) -> Sequence[int]:
        """It became runnable. Returns the pCPUs that ought to decide again. Locked."""
        ...

    def sleep(self, vcpu: Vcpu) -> Sequence[int]:
        """It is not runnable any more. Returns as :meth:`wake`. Locked."""
        ...

    def yield_to_others(self, vcpu: Vcpu, target: Vcpu | None = None) -> bool:
        """SCHEDOP_yield by the running vCPU; a decision follows. With ``target``, another vCPU of the same domain that
        should be next: False, and nothing happens, if that does not wait for this pCPU. Locked."""
        ...

    def do_schedule(self, cpu: int, current: Vcpu | None, now_ns: int) -> Decision:
        """Choose who runs on ``cpu``, where ``current`` ran until now. Locked."""
        ...

    def rotate(self, cpu: int, current: Vcpu, now_ns: int, executed_ns: int) -> tuple[Vcpu, int] | None:
        """:meth:`do_schedule` for the frequent case that vCPUs of one domain take turns, and nobody else is concerned:
        who is next (perhaps the same), and for how long (ns). None: nothing happened, ask :meth:`do_schedule`.
        Locked."""
        ...

    def busy(self, cpu: int) -> None:
        """tick_resume: ``cpu`` was idle and runs a vCPU now. On its thread, without locks."""
        ...

    def adjust(self, domain: Domain, weight: int | None = None, cap: int | None = None) -> None:
        """XEN_DOMCTL_SCHEDOP_putinfo; None leaves a parameter as it is. Raises XenError(EINVAL)."""
        ...

    def parameters(self, domain: Domain) -> tuple[int, int]:
        """XEN_DOMCTL_SCHEDOP_getinfo: weight and cap."""
        ...

    def set_global(self, *, tslice_ms: int, ratelimit_us: int) -> None:
        """XEN_SYSCTL_SCHEDOP_putinfo. Raises XenError(EINVAL)."""
        ...

    def global_parameters(self) -> dict[str, int]:
        """XEN_SYSCTL_SCHEDOP_getinfo: "tslice_ms", "ratelimit_us"."""
        ...

    def dump(self, cpu: int) -> list[str]:
        """dump_cpu_state: lines for debug key 'r'. Locked."""
        ...
