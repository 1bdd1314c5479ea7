# SPDX-License-Identifier: GPL-2.0-only
"""The 2-level event ABI: bitmaps in shared_info, a selector word per vCPU (Xen: xen/common/event_2l.c).

Everything here reads and writes words that the guest changes with locked instructions, on an engine that does not hold
the GIL.  A read-modify-write from Python is therefore only right on the thread that runs that engine; the caller
(:mod:`pyxen.hypervisor.event_channel`) sees to that.  The ``is_*`` readers may be called from any thread.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from pyxen.abi.event_channel import EVTCHN_2L_NR_CHANNELS
from pyxen.abi.xen import PAGE_SHIFT, SHARED_EVTCHN_MASK, SHARED_EVTCHN_PENDING, VI_PENDING_SEL

if TYPE_CHECKING:
    from pyxen.hypervisor.domain import Domain
    from pyxen.hypervisor.vcpu import Vcpu


_TO_MASK = SHARED_EVTCHN_MASK - SHARED_EVTCHN_PENDING >> 3
"""From a word of pending bits to that of their masks."""


class EventAbi(Protocol):
    """``struct evtchn_port_ops``: how ports of one domain become visible to its guest.

    The FIFO ABI is to be a second class of this shape. Methods that change guest memory answer whether the vCPU's
    upcall must now be marked pending.
    """

    max_ports: int

    def set_pending(self, vcpu: Vcpu | None, port: int) -> bool:
        """Mark ``port`` pending; True when ``vcpu`` has to be told."""
        ...

    def clear_pending(self, port: int) -> None:
        """Forget a pending event (the port is being freed)."""
        ...

    def unmask(self, vcpu: Vcpu | None, port: int) -> bool:
        """EVTCHNOP_unmask; True when ``vcpu`` has to be told."""
        ...

    def is_pending(self, port: int) -> bool: ...

    def is_masked(self, port: int) -> bool: ...

    def is_busy(self, port: int) -> bool:
        """Whether a free port cannot be reused yet (FIFO: still linked)."""
        ...

    def describe(self, vcpu: Vcpu | None, port: int) -> str:
        """The ABI's column of debug key 'e'."""
        ...


class TwoLevel:
    """``evtchn_port_ops_2l``. A domain without shared_info (dom0 is software of ours) has no bits to show."""

    max_ports = EVTCHN_2L_NR_CHANNELS

    def __init__(self, domain: Domain) -> None:
        self._domain = domain
        self._q = domain.hypervisor.memory.q

    def _word(self, table: int, port: int) -> int:
        """Index into memory.q of the word that holds ``port``; -1 without shared_info."""
        mfn = self._domain.shared_info_mfn
        return ((mfn << PAGE_SHIFT) + table >> 3) + (port >> 6) if mfn else -1

    def _test(self, table: int, port: int) -> bool:
        index = self._word(table, port)
        return index >= 0 and bool(self._q[index] >> (port & 63) & 1)

    def _select(self, vcpu: Vcpu | None, port: int) -> bool:
        """Set the selector bit of ``port``'s word; whether it was clear."""
        if vcpu is None or not vcpu.info_maddr:
            return False  # Xen's dummy_vcpu_info: registering a real one marks every word
        index = vcpu.info_maddr + VI_PENDING_SEL >> 3
        old = self._q[index]
        bit = 1 << (port >> 6)
        if old & bit:
            return False
        self._q[index] = old | bit
        return True

    def set_pending(self, vcpu: Vcpu | None, port: int) -> bool:
        """evtchn_2l_set_pending()."""
        index = self._word(SHARED_EVTCHN_PENDING, port)
        if index < 0:
            return False
        q = self._q
        old = q[index]
        bit = 1 << (port & 63)
        if old & bit:
            return False
        q[index] = old | bit
        return not q[index + _TO_MASK] & bit and self._select(vcpu, port)

    def clear_pending(self, port: int) -> None:
        """evtchn_2l_clear_pending()."""
        index = self._word(SHARED_EVTCHN_PENDING, port)
        if index >= 0:
            self._q[index] &= ~(1 << (port & 63))

    def unmask(self, vcpu: Vcpu | None, port: int) -> bool:
        """evtchn_2l_unmask(): as the guest's own unmasking, plus the selector when an event waits."""
        index = self._word(SHARED_EVTCHN_MASK, port)
        if index < 0:
            return False
        old = self._q[index]
        bit = 1 << (port & 63)
        if not old & bit:
            return False
        self._q[index] = old & ~bit
        return self.is_pending(port) and self._select(vcpu, port)

    def is_pending(self, port: int) -> bool:
        return self._test(SHARED_EVTCHN_PENDING, port)

    def is_masked(self, port: int) -> bool:
        return self._test(SHARED_EVTCHN_MASK, port)

    def is_busy(self, port: int) -> bool:
        return False

    def describe(self, vcpu: Vcpu | None, port: int) -> str:
        """Whether the selector bit of the port's word is set."""
        if vcpu is None or not vcpu.info_maddr:
            return "0"
        return str(self._q[vcpu.info_maddr + VI_PENDING_SEL >> 3] >> (port >> 6) & 1)
