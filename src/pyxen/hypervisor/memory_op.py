# SPDX-License-Identifier: GPL-2.0-only
"""HYPERVISOR_memory_op (Xen: xen/common/memory.c, xen/arch/x86/mm.c arch_memory_op, x86_64/mm.c).

Extent loops return how many extents were done, as Xen's do; a continuation carries that number in the command's
upper bits.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

from pyxen.abi import memory as abi
from pyxen.abi.arch_x86 import MACH2PHYS_VIRT_START
from pyxen.abi.memory import Xenmem
from pyxen.abi.xen import DOMID_SELF, MASK64, DomId
from pyxen.errors import XenError
from pyxen.hypervisor import physmap
from pyxen.hypervisor.hypercall import Preempted, should_preempt

if TYPE_CHECKING:
    from pyxen.hypervisor.domain import Domain
    from pyxen.hypervisor.hypercall import Caller
    from pyxen.hypervisor.hypervisor import Hypervisor

_MAX_ORDER_GUEST: Final = 9
_MAX_ORDER_CONTROL: Final = 20


def do_memory_op(caller: Caller, command: int, arg: int) -> int:
    """HYPERVISOR_memory_op(cmd, arg)."""
    start = command >> abi.MEMOP_EXTENT_SHIFT
    operation = command & abi.MEMOP_CMD_MASK
    if operation in (Xenmem.INCREASE_RESERVATION, Xenmem.DECREASE_RESERVATION, Xenmem.POPULATE_PHYSMAP):
        return _reservation(caller, operation, start, arg)
    if operation == Xenmem.ADD_TO_PHYSMAP_BATCH:
        return _add_to_physmap_batch(caller, start, arg)
    if start and operation != Xenmem.ADD_TO_PHYSMAP:
        raise XenError(errno.EINVAL)  # no other operation here is ever continued
    handler = _OPERATIONS.get(operation)
    if handler is None:
        raise XenError(errno.ENOSYS)
    result: int = handler(caller, arg)
    return result


def _target(caller: Caller, domid: int) -> Domain:
    return caller.domain.hypervisor.domain(DomId(domid), caller.domain)


def _reservation(caller: Caller, operation: int, start: int, arg: int) -> int:
    """XENMEM_{increase,decrease}_reservation and XENMEM_populate_physmap: the number of extents done.

    Whatever stops the loop (an address that faults, a frame that is not the domain's, no memory) ends it with that
    number, as in Xen; a frame whose number could not be told is the domain's all the same.
    """
    count: int
    extents, count, order, flags, domid = abi.RESERVATION.unpack(caller.read(arg, abi.RESERVATION.size))
    if count > MASK64 >> abi.MEMOP_EXTENT_SHIFT or start >= count:
        return start
    current = caller.domain
    domain = _target(caller, domid)
    hypervisor = current.hypervisor
    hypervisor.xsm.memory_adjust_reservation(current, domain)
    if order > (_MAX_ORDER_CONTROL if current.is_privileged else _MAX_ORDER_GUEST):
        return start
    if operation == Xenmem.DECREASE_RESERVATION:
        with _stopped(caller, domain):
            return _decrease(caller, domain, extents, count, order, start, arg)
    if flags & abi.MEMF_POPULATE_ON_DEMAND or not _reachable(hypervisor, flags & abi.MEMF_ADDRESS_BITS):
        return start
    frames = hypervisor.frames
    size = 1 << order
    populate = operation == Xenmem.POPULATE_PHYSMAP
    for done in range(start, count):
        if done > start and should_preempt(caller):
            raise Preempted((operation | done << abi.MEMOP_EXTENT_SHIFT, arg))
        try:
            gpfn = caller.read_u64(extents + done * 8) if populate else 0
            if populate and domain.is_hvm:
                with _stopped(caller, domain):
                    physmap.populate_one(domain, gpfn, order)
                continue
            first = frames.alloc_domheap(domain, order)
            if populate:
                for i in range(size):
                    frames.set_gpfn(first + i, gpfn + i & MASK64)
            if populate or (extents and not domain.is_hvm):
                caller.write_u64(extents + done * 8, first)
        except XenError:
            return done
    return count


def _decrease(
    caller: Caller, domain: Domain, extents: int, count: int, order: int, start: int, arg: int
) -> int:
    frames = domain.hypervisor.frames
    for done in range(start, count):
        if done > start and should_preempt(caller):
            raise Preempted((Xenmem.DECREASE_RESERVATION | done << abi.MEMOP_EXTENT_SHIFT, arg))
        try:
            first = caller.read_u64(extents + done * 8)
        except XenError:
            return done
        for mfn in range(first, first + (1 << order)):
            if not (physmap.remove_page(domain, mfn) if domain.is_hvm else frames.guest_remove_page(mfn, domain)):
                return done
    return count


@contextmanager
def _stopped(caller: Caller, domain: Domain) -> Iterator[None]:
    """Nobody executes in ``domain`` while its frames are taken: its engine may hold translations of them.

    A domain that does it to itself is at a hypercall, on its engine's thread.
    """
    if domain is caller.domain:
        yield
        return
    scheduler = domain.hypervisor.scheduler
    scheduler.domain_pause(domain)
    try:
        yield
    finally:
        scheduler.domain_unpause(domain)


def _reachable(hypervisor: Hypervisor, address_bits: int) -> bool:
    """Whether every frame of this machine has an address of that many bits (0: any). There are no zones to choose."""
    return not address_bits or hypervisor.memory.size_bytes <= 1 << address_bits


def _maximum_ram_page(caller: Caller, arg: int) -> int:
    return int(caller.domain.hypervisor.memory.nr_frames - 1)


def _statistics(caller: Caller, arg: int) -> Domain:
    (domid,) = struct.unpack("<H", caller.read(arg, 2))
    domain = _target(caller, domid)
    caller.domain.hypervisor.xsm.memory_stat_reservation(caller.domain, domain)
    return domain


def _current_reservation(caller: Caller, arg: int) -> int:
    return _statistics(caller, arg).tot_pages


def _maximum_reservation(caller: Caller, arg: int) -> int:
    return _statistics(caller, arg).max_pages


def _maximum_gpfn(caller: Caller, arg: int) -> int:
    domain = _statistics(caller, arg)
    if domain.is_hvm:
        return domain.hvm.p2m.max_mapped_gfn
    max_pfn: int = domain.hypervisor.memory.q[(domain.shared_info_mfn << 9) + (3088 >> 3)]
    return max_pfn - 1 if max_pfn else 0


def _machphys_mfn_list(caller: Caller, arg: int) -> int:
    """First machine frame of each 2 MiB of the M2P table; zero where the table's frames are not there."""
    limit, out, _ = abi.MFN_LIST.unpack(caller.read(arg, abi.MFN_LIST.size))
    frames = caller.domain.hypervisor.frames.m2p.frames
    firsts = frames[::512][: min(limit, 1 << 16)]
    caller.write(out, struct.pack(f"<{len(firsts)}Q", *firsts))
    caller.write(arg, abi.MFN_LIST.pack(limit, out, len(firsts)))
    return 0


def _machphys_mapping(caller: Caller, arg: int) -> int:
    hypervisor = caller.domain.hypervisor
    end = MACH2PHYS_VIRT_START + len(hypervisor.frames.m2p.frames) * 4096
    caller.write(arg, abi.MACHPHYS_MAPPING.pack(MACH2PHYS_VIRT_START, end, hypervisor.memory.nr_frames - 1))
    return 0


def _memory_map(caller: Caller, arg: int) -> int:
    """XENMEM_memory_map: the map the toolstack set; ENOSYS if it set none."""
    entries = [] if caller.domain.is_privileged else caller.domain.arch.memory_map
    if not entries:
        raise XenError(errno.ENOSYS)
    limit, buffer = abi.MEMORY_MAP.unpack(caller.read(arg, abi.MEMORY_MAP.size))
    count = min(limit, len(entries))
    caller.write(buffer, b"".join(abi.E820ENTRY.pack(*entry) for entry in entries[:count]))
    caller.write(arg, abi.MEMORY_MAP.pack(count, buffer))
    return 0


def _set_memory_map(caller: Caller, arg: int) -> int:
    domid, count, buffer = abi.FOREIGN_MEMORY_MAP.unpack(caller.read(arg, abi.FOREIGN_MEMORY_MAP.size))
    if count > abi.E820_MAX:
        raise XenError(errno.EINVAL)
    domain = _target(caller, domid)
    caller.domain.hypervisor.xsm.domain_memory_map(caller.domain, domain)
    if domain.is_privileged:
        raise XenError(errno.EINVAL)
    data = caller.read(buffer, count * abi.E820ENTRY.size)
    domain.arch.memory_map = [(a, s, t) for a, s, t in abi.E820ENTRY.iter_unpack(data)]
    return 0


def _machine_memory_map(caller: Caller, arg: int) -> int:
    hypervisor = caller.domain.hypervisor
    hypervisor.xsm.machine_memory_map(caller.domain)
    limit, buffer = abi.MEMORY_MAP.unpack(caller.read(arg, abi.MEMORY_MAP.size))
    if limit < 1:
        raise XenError(errno.EINVAL)
    caller.write(buffer, abi.E820ENTRY.pack(0, hypervisor.memory.size_bytes, abi.E820_RAM))
    caller.write(arg, abi.MEMORY_MAP.pack(1, buffer))
    return 0


def _add_to_physmap(caller: Caller, arg: int) -> int:
    """Only translated domains have a physmap to add to: a PV domain gets EACCES, as in Xen 4.6.

    A range is continued by what is left of it in the caller's structure, as Xen's is.
    """
    domid, size, space, index, gpfn = abi.ADD_TO_PHYSMAP.unpack(caller.read(arg, abi.ADD_TO_PHYSMAP.size))
    domain = _target(caller, domid)
    caller.domain.hypervisor.xsm.add_to_physmap(caller.domain, domain)
    if not domain.is_hvm:
        raise XenError(errno.EACCES)
    if space == abi.MapSpace.GMFN_FOREIGN:
        raise XenError(errno.ENOSYS)  # by the batched form only: here is no place for the other domain's id
    count = size if space == abi.MapSpace.GMFN_RANGE else 1
    for done in range(count):
        if done and should_preempt(caller):
            caller.write(arg, abi.ADD_TO_PHYSMAP.pack(domid, size - done, space, index + done, gpfn + done))
            raise Preempted((Xenmem.ADD_TO_PHYSMAP, arg))
        with _stopped(caller, domain):
            physmap.add_to_physmap_one(domain, space, index + done, gpfn + done)
    return 0


def _add_to_physmap_batch(caller: Caller, start: int, arg: int) -> int:
    """Each page has its own result; the call fails only for what concerns all of them."""
    domid, space, size, foreign_domid, indices, gpfns, errors = abi.ADD_TO_PHYSMAP_BATCH.unpack(
        caller.read(arg, abi.ADD_TO_PHYSMAP_BATCH.size))
    if space == abi.MapSpace.GMFN_RANGE or start > size:
        raise XenError(errno.EINVAL)
    domain = _target(caller, domid)
    hypervisor = caller.domain.hypervisor
    hypervisor.xsm.add_to_physmap(caller.domain, domain)
    foreign: Domain | None = None
    if space == abi.MapSpace.GMFN_FOREIGN:
        foreign = hypervisor.domains.get(DomId(foreign_domid))
        if foreign is None:
            raise XenError(errno.ESRCH)
        hypervisor.xsm.map_gmfn_foreign(caller.domain, foreign)
    if not domain.is_hvm:
        raise XenError(errno.EACCES)
    for done in range(start, size):
        if done > start and should_preempt(caller):
            raise Preempted((Xenmem.ADD_TO_PHYSMAP_BATCH | done << abi.MEMOP_EXTENT_SHIFT, arg))
        index, gpfn = caller.read_u64(indices + done * 8), caller.read_u64(gpfns + done * 8)
        try:
            with _stopped(caller, domain):
                physmap.add_to_physmap_one(domain, space, index, gpfn, foreign)
            result = 0
        except XenError as error:
            result = -error.errno
        caller.write(errors + done * 4, struct.pack("<i", result))
    return 0


def _remove_from_physmap(caller: Caller, arg: int) -> int:
    domid, gpfn = struct.unpack("<H6xQ", caller.read(arg, 16))
    domain = _target(caller, domid)
    hypervisor = caller.domain.hypervisor
    hypervisor.xsm.remove_from_physmap(caller.domain, domain)
    if domain.is_hvm:
        with _stopped(caller, domain):
            physmap.remove_from_physmap(domain, gpfn)
        return 0
    # guest_physmap_remove_page of an untranslated domain has nothing to do, but the frame must be the domain's
    if not hypervisor.frames.get_page(gpfn, domain):
        raise XenError(errno.ENOENT)
    hypervisor.frames.put_page(gpfn)
    return 0


def _exchange(caller: Caller, arg: int) -> int:
    """XENMEM_exchange: give frames, get as many others, in other orders if wanted. All or nothing for each chunk."""
    (in_list, in_count, in_order, _in_flags, in_domid,
     out_list, out_count, out_order, out_flags, out_domid, done) = abi.EXCHANGE.unpack(
        caller.read(arg, abi.EXCHANGE.size))
    hypervisor = caller.domain.hypervisor
    limit = _MAX_ORDER_CONTROL if caller.domain.is_privileged else _MAX_ORDER_GUEST
    if max(in_order, out_order) > limit:
        raise XenError(errno.EPERM)
    if in_domid != out_domid or in_count << in_order != out_count << out_order or done > in_count or in_count > 1 << 32:
        raise XenError(errno.EINVAL)
    domain = _target(caller, in_domid)
    hypervisor.xsm.memory_exchange(caller.domain, domain)
    if domain.is_hvm:
        raise XenError(errno.EOPNOTSUPP)  # its frame numbers say nothing of machine memory
    if not _reachable(hypervisor, out_flags & abi.MEMF_ADDRESS_BITS):
        raise XenError(errno.ENOMEM)
    in_chunk, out_chunk = 1 << max(out_order - in_order, 0), 1 << max(in_order - out_order, 0)
    done -= done % in_chunk
    try:
        with _stopped(caller, domain):
            while done < in_count:
                if should_preempt(caller):
                    raise Preempted((Xenmem.EXCHANGE, arg))
                first_out = (done << in_order) >> out_order
                _exchange_chunk(
                    caller, domain, (in_list + done * 8, in_chunk, in_order),
                    (out_list + first_out * 8, out_chunk, out_order),
                )
                done += in_chunk
    finally:
        caller.write_u64(arg + abi.EXCHANGE.size - 8, done)
    return 0


def _exchange_chunk(caller: Caller, domain: Domain, given: tuple[int, int, int], wanted: tuple[int, int, int]) -> None:
    """All or nothing. Both are (address of extents, their number, order)."""
    frames = domain.hypervisor.frames
    at, count, order = given
    gmfns = struct.unpack(f"<{count}Q", caller.read(at, count * 8))
    mfns = [base + i for base in gmfns for i in range(1 << order)]
    at, count, order = wanted
    gpfns = struct.unpack(f"<{count}Q", caller.read(at, count * 8))
    got = frames.exchange(domain, mfns, count, order)
    for gpfn, mfn in zip(gpfns, got, strict=True):
        for i in range(1 << order):
            frames.set_gpfn(mfn + i, gpfn + i & MASK64)
    caller.write(at, struct.pack(f"<{count}Q", *got))


def _claim_pages(caller: Caller, arg: int) -> int:
    """XENMEM_claim_pages: accepted when the memory is there now (nothing else allocates while a domain is built)."""
    _, count, order, _flags, domid = abi.RESERVATION.unpack(caller.read(arg, abi.RESERVATION.size))
    current = caller.domain
    current.hypervisor.xsm.claim_pages(current)
    if order or domid == DOMID_SELF:
        raise XenError(errno.EINVAL)
    domain = _target(caller, domid)
    if count > current.hypervisor.allocator.free_frames + domain.tot_pages:
        raise XenError(errno.ENOMEM)
    return 0


def _pod(caller: Caller, arg: int) -> int:
    raise XenError(errno.EINVAL)  # populate on demand is of HVM domains, and not here


def _get_vnumainfo(caller: Caller, arg: int) -> int:
    raise XenError(errno.EOPNOTSUPP)  # no domain has a virtual NUMA topology


_OPERATIONS: dict[int, Callable[[Caller, int], Any]] = {
    Xenmem.MAXIMUM_RAM_PAGE: _maximum_ram_page,
    Xenmem.CURRENT_RESERVATION: _current_reservation,
    Xenmem.MAXIMUM_RESERVATION: _maximum_reservation,
    Xenmem.MAXIMUM_GPFN: _maximum_gpfn,
    Xenmem.MACHPHYS_MFN_LIST: _machphys_mfn_list,
    Xenmem.MACHPHYS_MAPPING: _machphys_mapping,
    Xenmem.MEMORY_MAP: _memory_map,
    Xenmem.SET_MEMORY_MAP: _set_memory_map,
    Xenmem.MACHINE_MEMORY_MAP: _machine_memory_map,
    Xenmem.ADD_TO_PHYSMAP: _add_to_physmap,
    Xenmem.REMOVE_FROM_PHYSMAP: _remove_from_physmap,
    Xenmem.EXCHANGE: _exchange,
    Xenmem.CLAIM_PAGES: _claim_pages,
    Xenmem.SET_POD_TARGET: _pod,
    Xenmem.GET_POD_TARGET: _pod,
    Xenmem.GET_VNUMAINFO: _get_vnumainfo,
}
