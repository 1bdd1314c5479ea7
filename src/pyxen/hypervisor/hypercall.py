# SPDX-License-Identifier: GPL-2.0-only
"""The mechanism of hypercalls: continuations, and the one dispatch point (Xen: xen/arch/x86/hypercall.c,
xen/common/multicall.c).

Which number calls what is a table of its own, :mod:`pyxen.hypervisor.hypercall_table`.

A handler is ``handler(caller, *arguments) -> int``.  ``caller`` is where the request came from (see :class:`Caller`): a
guest's vCPU or dom0's software behind :mod:`pyxen.hypervisor.privcmd`.  ``XenError`` becomes ``-errno``; anything else
that is not a guest's doing is a bug of ours, and crashes only the domain that called.
"""

from __future__ import annotations

import errno
import time
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

from pyxen.abi.xen import NR_HYPERCALLS
from pyxen.errors import GuestFault, XenError

if TYPE_CHECKING:
    from pyxen.hypervisor.domain import Domain
    from pyxen.hypervisor.vcpu import Vcpu

PREEMPT_NS = 500_000
"""How long a hypercall may work before it must offer to be continued."""

_now = time.perf_counter_ns  # budgets of our own work, not guest-visible time: they stay real under a virtual clock


class Preempted(Exception):
    """A handler did part of its work and wants to be called again with ``arguments``.

    The guest re-executes its hypercall instruction with these argument registers; a dom0 caller is looped.
    """

    def __init__(self, arguments: tuple[int, ...]) -> None:
        super().__init__(arguments)
        self.arguments = arguments


class Caller(Protocol):
    """Who makes a hypercall, and its address space. Addresses are the caller's guest handles."""

    @property
    def domain(self) -> Domain: ...

    @property
    def vcpu(self) -> Vcpu | None: ...

    preempt_at: int

    def read(self, address: int, size: int) -> bytes:
        """Copy from the caller. Raises GuestAccessError (EFAULT)."""
        ...

    def write(self, address: int, data: bytes) -> None:
        """Copy to the caller. Raises GuestAccessError (EFAULT)."""
        ...

    def read_u32(self, address: int) -> int: ...

    def read_u64(self, address: int) -> int: ...

    def write_u32(self, address: int, value: int) -> None: ...

    def write_u64(self, address: int, value: int) -> None: ...


def should_preempt(caller: Caller) -> bool:
    """hypercall_preempt_check(): the first call starts the budget, later ones compare."""
    now = _now()
    if not caller.preempt_at:
        caller.preempt_at = now + PREEMPT_NS
        return False
    return now >= caller.preempt_at


Handler = Callable[..., int]


class Entry(NamedTuple):
    """One line of the hypercall table."""

    name: str
    handler: Handler
    nr_args: int


def call(caller: Caller, table: Sequence[Entry | None], number: int, arguments: tuple[int, ...]) -> int:
    """Call one entry for ``caller`` and return what RAX gets, as a signed number.

    Raises Preempted for a continuation; GuestFault when the caller must not go on.
    """
    entry = table[number] if 0 <= number < NR_HYPERCALLS else None
    domain = caller.domain
    if entry is None:
        return -errno.ENOSYS
    domain.hypercall_counts[number] += 1
    try:
        domain.hypervisor.xsm.hypercall(domain, number)
        result: int = entry.handler(caller, *arguments[: entry.nr_args])
        return result
    except XenError as error:
        return -error.errno
    finally:
        caller.preempt_at = 0


def crash_on_bug(domain: Domain, what: str, error: BaseException, rip: int | None = None) -> None:
    """An exception that is not part of any contract reached the dispatch point: log it, crash this domain only.

    ``rip`` is where the guest was, for the log: within a trap handler no register holds it.
    """
    hypervisor = domain.hypervisor
    if isinstance(error, GuestFault):
        hypervisor.crash(domain, str(error), rip)
        return
    for line in traceback.format_exception(error):
        for part in line.rstrip().splitlines():
            hypervisor.log.printk(part)
    hypervisor.crash(domain, f"internal error in {what}: {error!r}", rip)
