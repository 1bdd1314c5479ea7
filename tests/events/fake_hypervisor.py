# SPDX-License-Identifier: GPL-2.0-only
"""What event channels and grant tables see of a hypervisor, small enough to look through: plain memory, a scheduler
that notes whom it woke, an XSM that can be told to refuse, page counts that can be looked at."""

from __future__ import annotations

import errno
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pyxen.abi.xen import DOMID_SELF, DomId, VcpuId
from pyxen.errors import GuestAccessError, XenError
from pyxen.hypervisor.domain import Domain
from pyxen.hypervisor.event_channel import EventChannels
from pyxen.hypervisor.rendezvous import Rendezvous
from pyxen.hypervisor.vcpu import PauseFlag, Vcpu

PAGE = 4096


class FakeMemory:
    """A few frames of RAM."""

    def __init__(self, nr_frames: int = 256) -> None:
        self.nr_frames = nr_frames
        self.b = memoryview(bytearray(nr_frames * PAGE))
        self.d = self.b.cast("I")
        self.q = self.b.cast("Q")
        self.written_frames: list[int] = []

    def read(self, maddr: int, size: int) -> bytes:
        return bytes(self.b[maddr : maddr + size])

    def write(self, maddr: int, data: bytes) -> None:
        self.b[maddr : maddr + len(data)] = data

    def zero(self, mfn: int, count: int = 1) -> None:
        self.b[mfn * PAGE : (mfn + count) * PAGE] = bytes(count * PAGE)

    def written(self, mfn: int, count: int = 1) -> None:
        self.written_frames.append(mfn)


class FakeScheduler:
    """Wakes, and remembers whom."""

    def __init__(self) -> None:
        self.woken: list[Vcpu] = []
        self.yields: list[tuple[Vcpu, Vcpu]] = []

    def vcpu_unblock(self, vcpu: Vcpu) -> None:
        vcpu.pause_flags &= ~(PauseFlag.BLOCKED | PauseFlag.POLLING)
        vcpu.poll_port = 0
        self.woken.append(vcpu)

    def vcpu_yield_to(self, vcpu: Vcpu, target: Vcpu) -> None:
        self.yields.append((vcpu, target))


class RecordingRendezvous(Rendezvous):
    """Remembers who was held."""

    def __init__(self) -> None:
        super().__init__()
        self.held: list[Domain] = []

    @contextmanager
    def holding(self, domain: Domain) -> Iterator[None]:
        self.held.append(domain)
        with super().holding(domain):
            yield


class FakeCpu:
    def __init__(self) -> None:
        self.kicks = 0

    def kick(self) -> None:
        self.kicks += 1


class FakeXsm:
    """Allows everything but the hooks named in ``refuse``; notes each call."""

    def __init__(self) -> None:
        self.refuse: set[str] = set()
        self.calls: list[str] = []

    def __getattr__(self, hook: str) -> Any:
        def check(*args: object) -> None:
            self.calls.append(hook)
            if hook in self.refuse:
                raise XenError(errno.EPERM)

        return check


class FakeLog:
    def __init__(self) -> None:
        self.lines: list[str] = []

    def printk(self, text: str) -> None:
        self.lines.append(text)


class FakeFrames:
    """Owners and counts of frames; page types: a frame is free to take one type at a time."""

    def __init__(self, hypervisor: FakeHypervisor) -> None:
        self.hypervisor = hypervisor
        self.owner: dict[int, Domain] = {}
        self.refs: Counter[int] = Counter()
        self.type_refs: Counter[int] = Counter()
        self.page_type: dict[int, int] = {}
        self.shared: dict[int, bool] = {}
        self._next = 128

        self.lock = threading.Lock()

    def flush(self, domain: Domain) -> None:
        assert self.lock.locked()

    def get_page_type(self, mfn: int, page_type: int) -> bool:
        if self.type_refs[mfn] and self.page_type[mfn] != page_type:
            return False
        self.page_type[mfn] = page_type
        self.type_refs[mfn] += 1
        return True

    def put_page_type(self, mfn: int) -> None:
        assert self.type_refs[mfn] > 0
        self.type_refs[mfn] -= 1

    def give(self, domain: Domain, mfn: int) -> None:
        self.owner[mfn] = domain

    def alloc_xenheap(self, domain: Domain | None = None) -> int:
        mfn = self._next
        if mfn >= self.hypervisor.memory.nr_frames:
            raise XenError(errno.ENOMEM)
        self._next += 1
        if domain is not None:
            self.share_xen_page_with_guest(mfn, domain)
        return mfn

    def share_xen_page_with_guest(self, mfn: int, domain: Domain, readonly: bool = False) -> None:
        self.owner[mfn] = domain
        self.shared[mfn] = readonly

    def free_xenheap(self, mfn: int) -> None:
        self.owner.pop(mfn, None)
        self.shared.pop(mfn, None)

    def page_owner(self, mfn: int) -> int | None:
        return self.owner[mfn].domid if mfn in self.owner else None

    def get_page(self, mfn: int, domain: Domain) -> bool:
        if self.owner.get(mfn) is not domain:
            return False
        self.refs[mfn] += 1
        return True

    def put_page(self, mfn: int) -> None:
        assert self.refs[mfn] > 0, f"put of frame {mfn:#x} that nobody holds"
        self.refs[mfn] -= 1

    def get_page_and_type(self, mfn: int, domain: Domain, page_type: int) -> bool:
        if self.owner.get(mfn) is not domain:
            return False
        if self.type_refs[mfn] and self.page_type[mfn] != page_type:
            return False
        self.page_type[mfn] = page_type
        self.refs[mfn] += 1
        self.type_refs[mfn] += 1
        return True

    def put_page_and_type(self, mfn: int) -> None:
        assert self.type_refs[mfn] > 0
        self.type_refs[mfn] -= 1
        self.put_page(mfn)

    def held(self) -> dict[int, int]:
        """Frames with references, and how many."""
        return {mfn: count for mfn, count in self.refs.items() if count}


class FakeHypervisor:
    """Domains are made with :meth:`create`; each gets a shared_info frame and vCPUs whose home is this thread."""

    def __init__(self, *, dom0_vcpus: int = 0) -> None:
        self.memory = FakeMemory()
        self.scheduler = FakeScheduler()
        self.rendezvous = RecordingRendezvous()
        self.xsm = FakeXsm()
        self.log = FakeLog()
        self.frames = FakeFrames(self)
        self.domains: dict[int, Domain] = {}
        self.dom0 = self.create(0, vcpus=dom0_vcpus, shared_info=False, home=None)

    def create(self, domid: int, *, vcpus: int = 2, shared_info: bool = True, home: int | None = -1) -> Domain:
        domain = Domain(self, DomId(domid), max_vcpus=vcpus, handle=bytes(16), privileged=domid == 0)  # type: ignore[arg-type]
        if shared_info:
            domain.shared_info_mfn = 1 + domid
        for index in range(vcpus):
            vcpu = Vcpu(domain, VcpuId(index))
            vcpu.pause_flags = PauseFlag(0)
            if shared_info:
                vcpu.info_maddr = domain.shared_info_mfn * PAGE + 64 * index
            domain.vcpus.append(vcpu)
        domain.evtchn = EventChannels(domain)
        domain.evtchn.home_thread = threading.get_ident() if home == -1 else home
        self.domains[domid] = domain
        return domain

    def domain(self, domid: int, caller: Domain | None = None) -> Domain:
        if domid == DOMID_SELF and caller is not None:
            return caller
        if domid not in self.domains:
            raise XenError(errno.ESRCH)
        return self.domains[domid]

    def crash(self, domain: Domain, reason: str) -> None:
        domain.crash_reason = reason


class FakeCaller:
    """A hypercall's caller with 64 KiB of address space at 0x1000."""

    base = 0x1000

    def __init__(self, domain: Domain, vcpu: Vcpu | None = None) -> None:
        self.domain = domain
        self.vcpu = vcpu or (domain.vcpus[0] if domain.vcpus else None)
        self.preempt_at = 0
        self.buffer = bytearray(65536)

    def _at(self, address: int, size: int) -> int:
        at = address - self.base
        if not 0 <= at <= len(self.buffer) - size:
            raise GuestAccessError(address)
        return at

    def read(self, address: int, size: int) -> bytes:
        at = self._at(address, size)
        return bytes(self.buffer[at : at + size])

    def write(self, address: int, data: bytes) -> None:
        at = self._at(address, len(data))
        self.buffer[at : at + len(data)] = data

    def read_u32(self, address: int) -> int:
        return int.from_bytes(self.read(address, 4), "little")

    def read_u64(self, address: int) -> int:
        return int.from_bytes(self.read(address, 8), "little")

    def write_u32(self, address: int, value: int) -> None:
        self.write(address, value.to_bytes(4, "little"))

    def write_u64(self, address: int, value: int) -> None:
        self.write(address, value.to_bytes(8, "little"))
