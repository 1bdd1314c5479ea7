# SPDX-License-Identifier: GPL-2.0-only
"""A machine for page-type tests: real memory, allocator, frame table and validation; domains and vCPUs without a CPU.

A guest's hypercall arguments are passed in a buffer of the call (:class:`Caller`), as dom0's are, so a test need not
build a mapped stack first.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

from pyxen.abi.xen import DOMID_IO, DOMID_SELF, DOMID_XEN, MMUEXT_OP
from pyxen.errors import GuestAccessError, XenError
from pyxen.hypervisor.domain import Dying
from pyxen.hypervisor.frames import FrameTable
from pyxen.hypervisor.hypercall import Preempted
from pyxen.hypervisor.x86.pv import mm
from pyxen.hypervisor.x86.pv.mm_relinquish import relinquish_memory
from pyxen.hypervisor.x86.pv.walk import guest_walk
from pyxen.hypervisor.xsm import Xsm
from pyxen.machine.memory import FrameAllocator, Memory

P, RW, USER, A, D = 1, 2, 4, 0x20, 0x40
NX = 1 << 63
GUEST_KERNEL = 1 << 52
WRITABLE_PAGETABLES = 1 << 2
XEN_ENTRY = 0x67


class FakePvVcpu:
    """As much of PvVcpu as memory management uses."""

    def __init__(self, vcpu: Any) -> None:
        self.vcpu = vcpu
        self.domain = vcpu.domain
        self.kernel_mode = True
        self.guest_table = 0
        self.guest_table_user = 0
        self.ldt_base = 0
        self.ldt_ents = 0
        self.ldt_frames: dict[int, int] = {}
        self.user_segments: dict[tuple[int, int], tuple[int, int]] = {}
        self.cpu = self.live_cpu = None
        self.hypervisor = vcpu.domain.hypervisor
        self.log: list[Any] = []

    def new_cr3(self) -> None:
        self.log.append("cr3")

    def flush_tlb(self) -> None:
        self.log.append("flush")

    def flush_tlb_page(self, va: int) -> None:
        self.log.append(va)

    def read(self, address: int, size: int) -> bytes:
        out = b""
        while size:
            maddr = guest_walk(self.hypervisor.memory, self.guest_table, address, False)
            if maddr is None:
                raise GuestAccessError(address)
            n = min(size, 4096 - (address & 0xFFF))
            out += self.hypervisor.memory.read(maddr, n)
            address, size = address + n, size - n
        return out

    @staticmethod
    def guest_address_ok(address: int, size: int = 1) -> bool:
        return address + size <= 1 << 47 or address >= 0xFFFF880000000000


class FakePvDomain:
    def __init__(self, rig: Rig, mode: str) -> None:
        self.mode = mode
        self._rig = rig
        self.area = SimpleNamespace(set_ldt_page=lambda *_: None)

    def install_xen_slots(self, l4_mfn: int, domain: Any = None) -> None:
        q = self._rig.memory.q
        q[(l4_mfn << 9) + 256] = self._rig.xen_l3 << 12 | XEN_ENTRY
        for slot in range(257, 272):
            q[(l4_mfn << 9) + slot] = 0


class FakeDomain:
    def __init__(self, rig: Rig, domid: int, mode: str = "fast", *, vcpus: int = 1, privileged: bool = False) -> None:
        self.hypervisor = rig
        self.domid = domid
        self.is_privileged = privileged
        self.dying = Dying.ALIVE
        self.log_dirty = None
        self.tot_pages = 0
        self.max_pages = 1 << 20
        self.max_vcpus = max(vcpus, 1)
        self.vm_assist = WRITABLE_PAGETABLES
        self.pv = FakePvDomain(rig, mode)
        self.vcpus: list[Any] = []
        for vcpu_id in range(vcpus):
            vcpu = SimpleNamespace(domain=self, vcpu_id=vcpu_id)
            vcpu.pv = FakePvVcpu(vcpu)
            self.vcpus.append(vcpu)

    @property
    def v(self) -> FakePvVcpu:
        return self.vcpus[0].pv  # type: ignore[no-any-return]

    @property
    def frames(self) -> list[int]:
        return list(self.hypervisor.frames.owned_by(self))  # type: ignore[arg-type]


class Caller:
    """Who makes a hypercall; addresses index ``buffer`` from 0x1000 on."""

    BASE = 0x1000

    def __init__(self, domain: FakeDomain, data: bytes = b"", *, vcpu: bool = True) -> None:
        self.domain = domain
        self.vcpu = domain.vcpus[0] if vcpu and domain.vcpus else None
        self.buffer = bytearray(data)
        self.preempt_at = 0

    def _at(self, address: int, size: int) -> int:
        at = address - self.BASE
        if at < 0 or at + size > len(self.buffer):
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


class Rig:
    """The hypervisor as memory management sees it."""

    def __init__(self, frames: int = 256) -> None:
        self.memory = Memory(frames << 12)
        self.allocator = FrameAllocator(self.memory, first_mfn=1)
        self.flushes: list[int] = []
        self.frames = FrameTable(self.memory, self.allocator, self._flush)
        self.xsm = Xsm()
        self.trace = SimpleNamespace(enabled=False)
        self.xen_l3 = self.allocator.alloc()
        self.domains: dict[int, FakeDomain] = {}
        self.dom_io = FakeDomain(self, DOMID_IO, vcpus=0)
        self.dom_xen = FakeDomain(self, DOMID_XEN, vcpus=0)
        self.dom0 = self.add(0, privileged=True)
        self.baseline = self.allocator.free_frames
        self.continuations = 0
        self.between: Callable[[], bool] = lambda: True
        """Called between two goes of a hypercall; False and the guest does not come back for it."""

    def _flush(self, domain: Any) -> None:
        assert self.frames.lock.held()
        self.flushes.append(domain.domid)
        for vcpu in domain.vcpus:
            vcpu.pv.flush_tlb()

    def add(self, domid: int, mode: str = "fast", **kwargs: Any) -> FakeDomain:
        domain = self.domains[domid] = FakeDomain(self, domid, mode, **kwargs)
        return domain

    def domain(self, domid: int, caller: Any = None) -> FakeDomain:
        if caller is not None and domid in (DOMID_SELF, caller.domid):
            return caller  # type: ignore[no-any-return]
        if domid not in self.domains:
            raise XenError(3)
        return self.domains[domid]

    # --- requests ---------------------------------------------------------------------------------

    def call(self, handler: Callable[..., int], caller: Caller, *arguments: int) -> int:
        """Call a handler through all of its continuations; the result or -errno."""
        for _ in range(100_000):
            try:
                return handler(caller, *arguments)
            except Preempted as again:
                assert not self.frames.lock.held()
                assert again.arguments != arguments or self.frames.partial or self.frames.deferred
                self.continuations += 1
                arguments = again.arguments
                if not self.between():
                    return -errno.EINTR
            except XenError as error:
                return -error.errno
        raise AssertionError("the hypercall makes no progress")

    def mmu_update(self, domain: FakeDomain, requests: Iterable[tuple[int, int]], foreigndom: int = DOMID_SELF) -> int:
        requests = list(requests)
        caller = Caller(domain, b"".join(struct.pack("<QQ", *request) for request in requests) + bytes(4))
        pdone = Caller.BASE + 16 * len(requests)
        rc = self.call(mm.do_mmu_update, caller, Caller.BASE, len(requests), pdone, foreigndom)
        self.done = caller.read_u32(pdone)
        return rc

    def update(self, domain: FakeDomain, table: int, index: int, value: int, foreigndom: int = DOMID_SELF) -> int:
        return self.mmu_update(domain, [(table << 12 | index << 3, value)], foreigndom)

    def mmuext(self, domain: FakeDomain, *operations: tuple[int, int, int], foreigndom: int = DOMID_SELF) -> int:
        caller = Caller(domain, b"".join(MMUEXT_OP.pack(*operation) for operation in operations) + bytes(4))
        pdone = Caller.BASE + MMUEXT_OP.size * len(operations)
        rc = self.call(mm.do_mmuext_op, caller, Caller.BASE, len(operations), pdone, foreigndom)
        self.done = caller.read_u32(pdone)
        return rc

    def pin(self, domain: FakeDomain, level: int, mfn: int) -> int:
        return self.mmuext(domain, (level - 1, mfn, 0))

    def unpin(self, domain: FakeDomain, mfn: int) -> int:
        return self.mmuext(domain, (4, mfn, 0))

    # --- building ---------------------------------------------------------------------------------

    def alloc(self, domain: FakeDomain, count: int = 1) -> list[int]:
        return [mfn for run in self.frames.alloc_domheap_many(domain, count) for mfn in run]  # type: ignore[arg-type]

    def set(self, table: int, index: int, value: int) -> None:
        """Store an entry as the builder does, before the frame is a page table."""
        self.memory.q[(table << 9) + index] = value

    def entry(self, table: int, index: int) -> int:
        return self.memory.q[(table << 9) + index]

    def tree(
        self, domain: FakeDomain, leaves: Iterable[tuple[int, int]] = (), slot: int = 0
    ) -> tuple[int, int, int, int]:
        """An L4, L3, L2, L1 chain for the addresses from ``slot`` << 39 on, not validated; ``leaves`` are (mfn,
        flags)."""
        l4, l3, l2, l1 = self.alloc(domain, 4)
        self.set(l4, slot, l3 << 12 | P | RW | USER)
        self.set(l3, 0, l2 << 12 | P | RW | USER)
        self.set(l2, 0, l1 << 12 | P | RW | USER)
        for i, (mfn, flags) in enumerate(leaves):
            self.set(l1, i, mfn << 12 | flags)
        return l4, l3, l2, l1

    def count(self, mfn: int) -> int:
        return self.frames.count_info[mfn] & ((1 << 40) - 1)

    def type_count(self, mfn: int) -> int:
        return self.frames.type_info[mfn] & ((1 << 40) - 1)

    def type_of(self, mfn: int) -> int:
        """0 none, 1..4 page tables, 5 descriptors, 7 writable; also of an unused frame that keeps its type."""
        return self.frames.type_info[mfn] >> 44 & 7

    def never_preempt(self) -> None:
        self.frames.preempt = lambda: False  # type: ignore[method-assign]

    def always_preempt(self) -> None:
        self.frames.preempt = lambda: True  # type: ignore[method-assign]

    def teardown(self, domain: FakeDomain) -> int:
        """Destroy a domain's memory; how many steps it took."""
        domain.dying = Dying.DYING
        steps = 1
        while not relinquish_memory(domain):  # type: ignore[arg-type]
            steps += 1
            assert steps < 100_000
        return steps
