# SPDX-License-Identifier: GPL-2.0-only
"""HYPERVISOR_grant_table_op, and debug key 'g' (Xen: do_grant_table_op in xen/common/grant_table.c).

The table itself is :class:`GrantTable` of :mod:`pyxen.hypervisor.grant_entry`.  A batch is an array of ``count``
structures.  Each gets its own status; only a bad pointer or an unknown command fails the call.  A batch is preemptible
between two elements: it is continued with the rest of the array.

Not offered: version 2 (set_version answers ENOSYS, as Xen with max-ver:1), transfer (ENOSYS), dump_table (no Xen has
it).
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from pyxen.abi import grant_table as abi
from pyxen.abi.grant_table import Gntst, GnttabCmd
from pyxen.abi.xen import PAGE_SHIFT, PAGE_SIZE, DomId
from pyxen.errors import XenError
from pyxen.hypervisor.grant_copy import CopyEnd, copy
from pyxen.hypervisor.grant_entry import GrantError, stopped
from pyxen.hypervisor.grant_entry import GrantTable as GrantTable
from pyxen.hypervisor.grant_map import Unmapping, begin_unmap, finish_unmap, map_grant
from pyxen.hypervisor.grant_map import map_for_backend as map_for_backend
from pyxen.hypervisor.hypercall import Caller, Preempted, should_preempt
from pyxen.hypervisor.x86.hvm.grant_map import create_grant_p2m_mapping, replace_grant_p2m_mapping
from pyxen.hypervisor.x86.pv.grant_map import create_grant_pv_mapping, replace_grant_pv_mapping

if TYPE_CHECKING:
    from pyxen.hypervisor.domain import Domain
    from pyxen.hypervisor.hypervisor import Hypervisor

UNMAP_BATCH: Final = 32
"""GNTTAB_UNMAP_BATCH_SIZE: unmappings that share one TLB flush."""


def do_grant_table_op(caller: Caller, cmd: int, arg: int, count: int) -> int:
    """Hypercall 20. Raises XenError: ENOSYS, EINVAL, GuestAccessError; Preempted between two elements."""
    count &= 0xFFFFFFFF
    if count >> 31:
        raise XenError(errno.EINVAL)
    match cmd:
        case GnttabCmd.MAP_GRANT_REF:
            _batch(caller, cmd, arg, count, abi.MAP_GRANT_REF.size, _map)
        case GnttabCmd.UNMAP_GRANT_REF:
            _unmap_batches(caller, cmd, arg, count, replace=False)
        case GnttabCmd.UNMAP_AND_REPLACE:
            _unmap_batches(caller, cmd, arg, count, replace=True)
        case GnttabCmd.COPY:
            _batch(caller, cmd, arg, count, abi.COPY.size, _copy)
        case GnttabCmd.SWAP_GRANT_REF:
            _batch(caller, cmd, arg, count, abi.SWAP_GRANT_REF.size, _swap)
        case GnttabCmd.CACHE_FLUSH:
            _batch(caller, cmd, arg, count, abi.CACHE_FLUSH.size, _cache_flush)
        case GnttabCmd.SETUP_TABLE:
            _setup_table(caller, arg, count)
        case GnttabCmd.QUERY_SIZE:
            _query_size(caller, arg, count)
        case GnttabCmd.SET_VERSION:
            _set_version(caller, arg)
        case GnttabCmd.GET_VERSION:
            _get_version(caller, arg)
        case GnttabCmd.GET_STATUS_FRAMES:
            _get_status_frames(caller, arg, count)
        case _:
            raise XenError(errno.ENOSYS)
    return 0


def _batch(caller: Caller, cmd: int, arg: int, count: int, size: int, one: Callable[[Caller, int], None]) -> None:
    for index in range(count):
        if index and should_preempt(caller):
            raise Preempted((cmd, arg, count - index))
        one(caller, arg)
        arg += size


def _status(operation: Callable[[], object]) -> Gntst:
    """Do it; what a guest is told of the outcome."""
    try:
        operation()
    except GrantError as error:
        return error.status
    return Gntst.OKAY


def _target(caller: Caller, domid: int) -> Domain:
    """The domain an operation names. GrantError(BAD_DOMAIN)."""
    try:
        return caller.domain.hypervisor.domain(DomId(domid), caller.domain)
    except XenError as error:
        raise GrantError(Gntst.BAD_DOMAIN, f"no domain {domid}") from error


def _permitted(hook: Callable[[Domain, Domain], None], current: Domain, target: Domain) -> None:
    try:
        hook(current, target)
    except XenError as error:
        raise GrantError(Gntst.PERMISSION_DENIED, str(error)) from error


# --- map, unmap -------------------------------------------------------------------------------------


def _map(caller: Caller, arg: int) -> None:
    host_addr, flags, ref, domid, _, handle, bus = abi.MAP_GRANT_REF.unpack(caller.read(arg, abi.MAP_GRANT_REF.size))
    mapper = caller.domain

    def install(mfn: int) -> int:
        if caller.vcpu is None:
            raise GrantError(Gntst.GENERAL_ERROR, "dom0's software maps through privcmd")
        if mapper.is_hvm:
            return create_grant_p2m_mapping(mapper, host_addr, mfn, flags)
        return create_grant_pv_mapping(caller.vcpu, host_addr, mfn, flags)

    try:
        granter = _target(caller, domid)
        with stopped(granter):
            handle, mfn = map_grant(mapper, granter, ref, flags, install)
        bus = mfn << PAGE_SHIFT
        status = Gntst.OKAY
    except GrantError as error:
        status = error.status
    caller.write(arg, abi.MAP_GRANT_REF.pack(host_addr, flags, ref, domid, status, handle, bus))


def _unmap_batches(caller: Caller, cmd: int, arg: int, count: int, *, replace: bool) -> None:
    size = abi.UNMAP_GRANT_REF.size
    while count:
        begun: list[Unmapping] = []
        try:
            for _ in range(min(count, UNMAP_BATCH)):
                _unmap_one(caller, arg, begun, replace)
                arg += size
                count -= 1
        finally:
            # Also after a bad pointer: what was begun is finished, and never before the flush.
            if any(unmapping.done for unmapping in begun):
                _flush(caller.domain)
                for unmapping in begun:
                    with stopped(unmapping.track.granter):
                        finish_unmap(caller.domain, unmapping)
        if count and should_preempt(caller):
            raise Preempted((cmd, arg, count))


def _unmap_one(caller: Caller, arg: int, begun: list[Unmapping], replace: bool) -> None:
    host_addr, second, handle, _ = abi.UNMAP_GRANT_REF.unpack(caller.read(arg, abi.UNMAP_GRANT_REF.size))
    bus, new_addr = (0, second) if replace else (second, 0)

    def remove(mfn: int, flags: int) -> int:
        if caller.vcpu is None:
            raise GrantError(Gntst.GENERAL_ERROR, "dom0's software unmaps through privcmd")
        if caller.domain.is_hvm:
            return replace_grant_p2m_mapping(caller.domain, host_addr, mfn, new_addr, flags)
        return replace_grant_pv_mapping(caller.vcpu, host_addr, mfn, new_addr, flags)

    def begin() -> None:
        track = caller.domain.grant_table.maptrack.get(handle)
        if track is None or caller.vcpu is None:
            raise GrantError(Gntst.BAD_HANDLE, f"bad handle {handle}")
        with stopped(track.granter):
            begun.append(begin_unmap(caller.domain, handle, host_addr, bus, remove))

    status = _status(begin)
    caller.write(arg, abi.UNMAP_GRANT_REF.pack(host_addr, second, handle, status))


def _flush(domain: Domain) -> None:
    """gnttab_flush_tlb()."""
    frames = domain.hypervisor.frames
    with frames.lock:
        frames.flush(domain)


# --- copy, swap, cache_flush -----------------------------------------------------------------------------


def _copy(caller: Caller, arg: int) -> None:
    data = caller.read(arg, abi.COPY.size)
    number1, domid1, offset1, number2, domid2, offset2, length, flags, _ = abi.COPY.unpack(data)
    source_gref, dest_gref = bool(flags & abi.GNTCOPY_SOURCE_GREF), bool(flags & abi.GNTCOPY_DEST_GREF)
    # A reference is 32 bits of the union; the rest of the word is padding then.
    source = CopyEnd(source_gref, number1 & 0xFFFFFFFF if source_gref else number1, DomId(domid1), offset1)
    dest = CopyEnd(dest_gref, number2 & 0xFFFFFFFF if dest_gref else number2, DomId(domid2), offset2)
    status = _status(lambda: copy(caller.domain, source, dest, length))
    caller.write(arg + abi.COPY_STATUS_OFFSET, status.to_bytes(2, "little", signed=True))


def _swap(caller: Caller, arg: int) -> None:
    a, b, _ = abi.SWAP_GRANT_REF.unpack(caller.read(arg, abi.SWAP_GRANT_REF.size))
    status = _status(lambda: caller.domain.grant_table.swap(a, b))
    caller.write(arg, abi.SWAP_GRANT_REF.pack(a, b, status))


def _cache_flush(caller: Caller, arg: int) -> None:
    """__gnttab_cache_flush() on x86: our caches are coherent, so what remains are its checks."""
    address, offset, length, op = abi.CACHE_FLUSH.unpack(caller.read(arg, abi.CACHE_FLUSH.size))
    if offset >= PAGE_SIZE or offset + length > PAGE_SIZE:
        raise XenError(errno.EINVAL)
    if not length or not op:
        return
    if op & abi.GNTTAB_CACHE_SOURCE_GREF:
        raise XenError(errno.EOPNOTSUPP)
    domain = caller.domain
    mfn = address >> PAGE_SHIFT
    owner = domain.hypervisor.frames.page_owner(mfn)
    if owner is None:
        raise XenError(errno.EINVAL if mfn >= domain.hypervisor.memory.nr_frames else errno.EPERM)
    if owner != domain.domid and not any(
            (active := track.granter.grant_table.active.get(track.ref)) is not None and active.mfn == mfn
            for track in domain.grant_table.maptrack.values()):
        raise XenError(errno.EINVAL)
    if op & abi.GNTTAB_CACHE_INVAL and not op & abi.GNTTAB_CACHE_CLEAN:
        raise XenError(errno.EOPNOTSUPP)  # x86 cannot discard without writing back


# --- the table itself ----------------------------------------------------------------------------------------


def _setup_table(caller: Caller, arg: int, count: int) -> None:
    if count != 1:
        raise XenError(errno.EINVAL)
    domid, nr_frames, _, frame_list = abi.SETUP_TABLE.unpack(caller.read(arg, abi.SETUP_TABLE.size))

    def act() -> None:
        domain = _target(caller, domid)
        _permitted(caller.domain.hypervisor.xsm.grant_setup, caller.domain, domain)
        table = domain.grant_table
        table.grow(nr_frames)
        try:
            caller.write(frame_list, b"".join(_gmfn(domain, mfn).to_bytes(8, "little")
                                              for mfn in table.frames[:nr_frames]))
        except XenError as error:
            raise GrantError(Gntst.BAD_VIRT_ADDR, str(error)) from error

    status = _status(act)
    caller.write(arg + abi.SETUP_STATUS_OFFSET, status.to_bytes(2, "little", signed=True))


def _gmfn(domain: Domain, mfn: int) -> int:
    """gnttab_shared_gmfn(): of a translated domain, where the frame stands in its physmap (all ones: nowhere)."""
    return domain.hypervisor.frames.m2p.get(mfn) if domain.is_hvm else mfn


def _query_size(caller: Caller, arg: int, count: int) -> None:
    if count != 1:
        raise XenError(errno.EINVAL)
    domid, current, maximum, _ = abi.QUERY_SIZE.unpack(caller.read(arg, abi.QUERY_SIZE.size))
    try:
        domain = _target(caller, domid)
        _permitted(caller.domain.hypervisor.xsm.grant_query_size, caller.domain, domain)
        current, maximum = len(domain.grant_table.frames), domain.grant_table.max_frames
        status = Gntst.OKAY
    except GrantError as error:
        status = error.status
    caller.write(arg, abi.QUERY_SIZE.pack(domid, current, maximum, status))


def _set_version(caller: Caller, arg: int) -> None:
    """1 is what there is; 2 is refused as by a Xen told max-ver:1. Either way the version in force is written back."""
    (version,) = abi.SET_VERSION.unpack(caller.read(arg, abi.SET_VERSION.size))
    if version not in (1, 2):
        raise XenError(errno.EINVAL)
    caller.write(arg, abi.SET_VERSION.pack(caller.domain.grant_table.version))
    if version == 2:
        raise XenError(errno.ENOSYS)


def _get_version(caller: Caller, arg: int) -> None:
    domid, pad, _ = abi.GET_VERSION.unpack(caller.read(arg, abi.GET_VERSION.size))
    domain = caller.domain.hypervisor.domain(DomId(domid), caller.domain)
    caller.domain.hypervisor.xsm.grant_query_size(caller.domain, domain)
    caller.write(arg, abi.GET_VERSION.pack(domid, pad, domain.grant_table.version))


def _get_status_frames(caller: Caller, arg: int, count: int) -> None:
    """Only a version-2 table has status frames: always an error status."""
    if count != 1:
        raise XenError(errno.EINVAL)
    nr_frames, domid, _, frame_list = abi.GET_STATUS_FRAMES.unpack(caller.read(arg, abi.GET_STATUS_FRAMES.size))

    def act() -> None:
        domain = _target(caller, domid)
        _permitted(caller.domain.hypervisor.xsm.grant_setup, caller.domain, domain)
        raise GrantError(Gntst.GENERAL_ERROR, "version 1 has no status frames")

    caller.write(arg, abi.GET_STATUS_FRAMES.pack(nr_frames, domid, _status(act), frame_list))


# --- debug key 'g' -------------------------------------------------------------------------------------------


def dump_grant_tables(hypervisor: Hypervisor) -> None:
    """gnttab_usage_print_all(), as Xen prints it."""
    printk = hypervisor.log.printk
    printk("gnttab_usage_print_all [ key 'g' pressed")
    for domain in list(hypervisor.domains.values()):
        for line in _table_lines(domain):
            printk(line)
    printk("gnttab_usage_print_all ] done")


def _table_lines(domain: Domain) -> list[str]:
    table = domain.grant_table
    lines = [
        "      -------- active --------       -------- shared --------",
        "[ref] localdom mfn      pin          localdom gmfn     flags",
        f"grant-table for remote d{domain.domid} (v{table.version})",
        f"  {len(table.frames)} frames ({table.max_frames} max), "
        f"{table.maptrack_frames} maptrack frames ({table.max_maptrack_frames} max)",
    ]
    with table.lock:
        for ref, active in sorted(table.active.items()) if table.frames else ():
            flags, domid, frame = table.entry(ref)
            lines.append(f"[0x{ref:03x}]  {active.domid:5} 0x{active.mfn:06x} 0x{active.pin:08x}      "
                         f"{domid:5} 0x{frame:06x} 0x{flags:02x}")
    if not table.active:
        lines.append("no active grant table entries")
    return lines


