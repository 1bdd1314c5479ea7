# SPDX-License-Identifier: GPL-2.0-only
"""Control operations: structures, privcmd, the life of a domain."""

from __future__ import annotations

import asyncio
import errno
import struct
from collections.abc import Callable

import pytest

from pyxen.abi import domctl as dabi
from pyxen.abi import sysctl as sabi
from pyxen.abi.arch_x86 import GUEST_CONTEXT_SIZE, GuestContext
from pyxen.abi.domctl import Domctl
from pyxen.abi.sysctl import Sysctl
from pyxen.abi.xen import Hypercall, Virq
from pyxen.errors import XenError
from pyxen.hypervisor.frames import PGT_WRITABLE
from pyxen.hypervisor.lifecycle import domain_kill
from pyxen.hypervisor.x86 import hypercall_page
from tests.hypervisor.rig import GDT_PFN, LDT_PFN, PAGES, Guest, Machine, va


def domctl(host: Machine, command: int, domid: int = 0, union: bytes = b"", *buffers: bytearray) -> tuple[int, bytes]:
    """(domid, union) after a XEN_DOMCTL."""
    request = bytearray((dabi.HEADER.pack(command, 0xB, domid) + union).ljust(dabi.SIZE, b"\0"))
    host.privcmd.hypercall(Hypercall.DOMCTL, [request, *buffers])
    return struct.unpack_from("<H", request, 8)[0], bytes(request[dabi.UNION :])


def sysctl(host: Machine, command: int, union: bytes = b"", *buffers: bytearray) -> bytes:
    request = bytearray((sabi.HEADER.pack(command, 0xC) + union).ljust(sabi.SIZE, b"\0"))
    host.privcmd.hypercall(Hypercall.SYSCTL, [request, *buffers])
    return bytes(request[sabi.UNION :])


HANDLE = 0x12000  # of the second buffer: the first is one page with a hole behind it


def fails(number: int, call: Callable[[], object]) -> None:
    with pytest.raises(XenError) as caught:
        call()
    assert caught.value.errno == number


def test_sizes_are_those_of_the_c_structures() -> None:
    """Computed by hand from 4.6's domctl.h and sysctl.h."""
    assert dabi.GETDOMAININFO.size == 96
    assert (dabi.GETVCPUINFO.size, dabi.VCPUCONTEXT.size, dabi.SCHEDULER_OP.size) == (24, 16, 12)
    assert (sabi.PHYSINFO.size, sabi.READCONSOLE.size, sabi.GETDOMAININFOLIST.size) == (104, 24, 24)
    assert GUEST_CONTEXT_SIZE == 5168


def test_a_domain_by_domctls_alone(host: Machine) -> None:
    create = dabi.CREATEDOMAIN.pack(0, bytes(range(16)), 0)
    assert domctl(host, Domctl.CREATEDOMAIN, 7, create)[0] == 7
    fails(errno.EINVAL, lambda: domctl(host, Domctl.CREATEDOMAIN, 7, create))
    assert domctl(host, Domctl.CREATEDOMAIN, 0, create)[0] == 1
    fails(errno.EINVAL, lambda: domctl(host, Domctl.CREATEDOMAIN, 0, dabi.CREATEDOMAIN.pack(0, bytes(16), 1)))
    domctl(host, Domctl.MAX_MEM, 7, dabi.MAX_MEM.pack(4096))
    domctl(host, Domctl.MAX_VCPUS, 7, dabi.MAX_VCPUS.pack(3))
    domctl(host, Domctl.MAX_VCPUS, 7, dabi.MAX_VCPUS.pack(3))
    for wrong in (0, 2, 4, 129, 0xFFFFFFFF):
        fails(errno.EINVAL, lambda: domctl(host, Domctl.MAX_VCPUS, 7, dabi.MAX_VCPUS.pack(wrong)))  # noqa: B023
    domctl(host, Domctl.SETDOMAINHANDLE, 7, b"h" * 16)
    domid, union = domctl(host, Domctl.GETDOMAININFO, 2)
    info = dabi.GETDOMAININFO.unpack_from(union)
    assert (domid, info[0], info[3], info[10], info[12]) == (7, 7, 1024, 2, b"h" * 16)
    assert info[1] & 8  # paused
    domctl(host, Domctl.SET_MAX_EVTCHN, 7, struct.pack("<I", 0xFFFFFFFF))
    domctl(host, Domctl.UNPAUSEDOMAIN, 7)
    fails(errno.EINVAL, lambda: domctl(host, Domctl.UNPAUSEDOMAIN, 7))
    domctl(host, Domctl.PAUSEDOMAIN, 7)
    vcpu = dabi.GETVCPUINFO.unpack_from(domctl(host, Domctl.GETVCPUINFO, 7, struct.pack("<I", 2))[1])
    assert vcpu[:4] == (2, 0, 0, 0)
    fails(errno.EINVAL, lambda: domctl(host, Domctl.GETVCPUINFO, 7, struct.pack("<I", 3)))
    fails(errno.ESRCH, lambda: domctl(host, Domctl.PAUSEDOMAIN, 99))
    fails(errno.ENOSYS, lambda: domctl(host, 1000, 7))
    for domid in (7, 1):
        domctl(host, Domctl.DESTROYDOMAIN, domid)
    fails(errno.ESRCH, lambda: domctl(host, Domctl.GETDOMAININFO, 1))
    assert host.hv.allocator.free_frames == host.baseline


def test_domctls_on_a_built_domain(exact: Guest) -> None:
    host, domid = exact.machine, exact.domid
    page = bytearray(GUEST_CONTEXT_SIZE)
    host.cpu.unload()
    domctl(host, Domctl.GETVCPUCONTEXT, domid, dabi.VCPUCONTEXT.pack(0, HANDLE), page)
    assert GuestContext.unpack(bytes(page)).ctrlreg[3] == exact.mfns[0] << 12
    domctl(host, Domctl.SETVCPUCONTEXT, domid, dabi.VCPUCONTEXT.pack(0, HANDLE), page)
    fails(errno.ENODATA, lambda: domctl(host, Domctl.GETVCPUCONTEXT, domid, dabi.VCPUCONTEXT.pack(1, HANDLE), page))
    domctl(host, Domctl.HYPERCALL_INIT, domid, struct.pack("<Q", exact.mfns[30]))
    assert exact.get(va(30), 4096) == hypercall_page.page()
    fails(errno.EACCES, lambda: domctl(host, Domctl.HYPERCALL_INIT, domid, struct.pack("<Q", exact.mfns[0])))
    put = dabi.SCHEDULER_OP.pack(5, 0, 512, 50)
    domctl(host, Domctl.SCHEDULER_OP, domid, put)
    got = domctl(host, Domctl.SCHEDULER_OP, domid, dabi.SCHEDULER_OP.pack(5, 1, 0, 0))[1]
    assert dabi.SCHEDULER_OP.unpack_from(got)[2:] == (512, 50)
    fails(errno.EINVAL, lambda: domctl(host, Domctl.SCHEDULER_OP, domid, dabi.SCHEDULER_OP.pack(6, 1, 0, 0)))


def test_sysctls(exact: Guest) -> None:
    host = exact.machine
    info = sabi.PHYSINFO.unpack_from(sysctl(host, Sysctl.PHYSINFO))
    assert info[:6] == (1, 1, 1, 0, 1, 0)
    assert info[7:9] == (4096, host.hv.allocator.free_frames)
    assert sabi.SCHED_ID.unpack_from(sysctl(host, Sysctl.SCHED_ID)) == (5,)
    found = bytearray(96 * 4)
    union = sysctl(host, Sysctl.GETDOMAININFOLIST, sabi.GETDOMAININFOLIST.pack(0, 4, HANDLE, 0), found)
    assert sabi.GETDOMAININFOLIST.unpack_from(union)[3] == 2
    assert [struct.unpack_from("<H", found, 96 * i)[0] for i in (0, 1)] == [0, exact.domid]
    text = bytearray(1 << 15)
    union = sysctl(host, Sysctl.READCONSOLE, sabi.READCONSOLE.pack(0, 0, 0, HANDLE, len(text)), text)
    _, _, index, _, count = sabi.READCONSOLE.unpack_from(union)
    assert bytes(text[:count]).decode() == host.log()
    host.hv.log.printk("one")
    host.hv.log.printk("two")
    union = sysctl(host, Sysctl.READCONSOLE, sabi.READCONSOLE.pack(0, 1, index, HANDLE, 12), text)
    _, _, index, _, count = sabi.READCONSOLE.unpack_from(union)
    assert bytes(text[:count]) == b"(XEN) one\n(X"
    union = sysctl(host, Sysctl.READCONSOLE, sabi.READCONSOLE.pack(1, 1, index, HANDLE, 99), text)
    assert bytes(text[: sabi.READCONSOLE.unpack_from(union)[4]]) == b"EN) two\n"
    assert host.log() == ""
    sysctl(host, Sysctl.DEBUG_KEYS, sabi.DEBUG_KEYS.pack(HANDLE, 1), bytearray(b"h"))
    assert "installed handlers" in host.log()
    fails(errno.ENOSYS, lambda: sysctl(host, 1000))


# --- contexts --------------------------------------------------------------------------------------------


def test_a_context_is_what_was_set(guest: Guest) -> None:
    host = guest.machine
    host.cpu.unload()
    got = GuestContext.unpack(host.privcmd.vcpu_get_context(guest.domid))
    want = guest.context()
    for name in ("rip", "gpr", "cs", "ss", "kernel_sp", "event_callback", "failsafe_callback", "syscall_callback",
                 "gdt_frames", "gdt_ents", "flags"):
        assert getattr(got, name) == getattr(want, name) | (1 if name == "flags" else 0) if name == "flags" else (
            getattr(got, name) == getattr(want, name))
    assert got.ctrlreg[1] == guest.mfns[4] << 12
    host.privcmd.vcpu_set_context(guest.domid, 0, got.pack())
    assert host.privcmd.vcpu_get_context(guest.domid) == got.pack()


def test_iopl_is_virtual_in_both_directions(host: Machine) -> None:
    guest = host.guest("exact", rflags=0x1202)
    assert guest.pv.iopl == 1
    host.cpu.unload()
    assert GuestContext.unpack(host.privcmd.vcpu_get_context(guest.domid)).rflags == 0x1202
    assert host.privcmd.vcpu_registers(guest.domid).flags == 0x202


@pytest.mark.parametrize(
    "fields",
    [
        {"rip": 1 << 47}, {"event_callback": 1 << 47}, {"gs_base_user": 1 << 63}, {"gdt_ents": 14 * 512 + 1},
        {"gdt_ents": 1 << 63}, {"ldt_ents": 8193}, {"ldt_base": 1, "ldt_ents": 1}, {"flags": 0, "ctrlreg": [0] * 8},
        {"ctrlreg": [0] * 8}, {"ctrlreg": [0, 0, 0, 1 << 63, 0, 0, 0, 0]}, {"ctrlreg": [0, 1, 0, 0, 0, 0, 0, 0]},
        {"gdt_frames": [1 << 60] + [0] * 15}, {"flags": 0},
    ],
)
def test_a_context_that_cannot_be_set_leaves_nothing_behind(host: Machine, fields: dict[str, object]) -> None:
    guest = Guest(host, "exact")
    if fields.get("ctrlreg") == [0, 1, 0, 0, 0, 0, 0, 0]:
        fields = {"ctrlreg": [0, 1, 0, guest.mfns[0] << 12, 0, 0, 0, 0]}
    if fields == {"flags": 0}:
        fields = {"flags": 0, "ctrlreg": [0, 0, 0, guest.mfns[0] << 12, 0, 0, 0, 0]}
    frames = guest.hv.frames
    before = [(frames.count_info[m], frames.type_info[m]) for m in guest.mfns]
    fails(errno.EINVAL, lambda: guest.set_context(**fields))
    with frames.lock:  # on a busy computer the rest of a table's undoing may wait for the next memory hypercall
        frames.start_budget(frames.deadline + 10**12)
        assert frames.put_deferred(guest.domid)
    counts = [(c, t & (1 << 40) - 1) for c, t in ((frames.count_info[m], frames.type_info[m]) for m in guest.mfns)]
    assert counts == [(c, t & (1 << 40) - 1) for c, t in before]
    assert (guest.pv.guest_table, guest.pv.guest_table_user, guest.pv.gdt_frames) == (0, 0, [])
    fails(errno.ENODATA, lambda: host.privcmd.vcpu_get_context(guest.domid))
    guest.set_context()


def test_a_user_root_that_fails_takes_the_kernels_back(host: Machine) -> None:
    guest = Guest(host, "exact")
    guest.store(4, 3, guest.mfns[30] << 12 | 7)
    guest.store(30, 0, 0xFFFF_FFFF_F000 | 7)
    fails(errno.EINVAL, guest.set_context)
    assert guest.pv.guest_table == 0
    assert guest.hv.frames.type_info[guest.mfns[0]] & (1 << 40) - 1 == 0


def test_tables_of_a_vcpu_that_was_set_up_stay(exact: Guest) -> None:
    exact.machine.cpu.unload()
    exact.set_context(rip=0x400200)
    fails(errno.EOPNOTSUPP, lambda: exact.set_context(ctrlreg=[0, 0, 0, exact.mfns[4] << 12, 0, 0, 0, 0]))
    fails(errno.EOPNOTSUPP, lambda: exact.set_context(gdt_ents=0))
    assert exact.pv.guest_table == exact.mfns[0]


def test_a_context_reaches_no_engine_that_runs_somebody_else(host: Machine) -> None:
    """What was loaded there once is no business of ours."""
    first, second = host.guest("exact"), host.guest("exact")
    host.cpu.unload()
    first.load()
    second.load()
    host.cpu.journal.clear()
    first.set_context(debugreg=[0x400100, 0, 0, 0, 0, 0, 0, 0x402])
    assert not [entry for entry in host.cpu.journal if entry[0] in ("gdt", "ldt", "cr3")]
    assert host.cpu.get_debug_register(0) == 0
    assert host.cpu.get_debug_register(7) == 0x400


def test_a_vcpu_without_vcpu_info_cannot_be_set_up(host: Machine) -> None:
    domid = host.privcmd.domain_create(bytes(16), max_vcpus=33)
    fails(errno.EINVAL, lambda: host.privcmd.vcpu_set_context(domid, 32, GuestContext().pack()))
    for wrong in (-1, 33, 1 << 40):
        fails(errno.EINVAL, lambda: host.privcmd.vcpu_set_context(domid, wrong, bytes(5168)))  # noqa: B023
    fails(errno.EINVAL, lambda: host.privcmd.vcpu_set_context(domid, 0, bytes(5167)))


# --- privcmd ---------------------------------------------------------------------------------------------


def test_a_writable_mapping_keeps_a_frame_from_becoming_a_table(host: Machine) -> None:
    guest = Guest(host, "exact")
    mapping = host.privcmd.foreign_map(guest.domid, guest.mfns[0])
    fails(errno.EINVAL, guest.set_context)
    mapping.close()
    mapping.close()
    guest.set_context()
    fails(errno.EINVAL, lambda: host.privcmd.foreign_map(guest.domid, guest.mfns[0]))
    with pytest.raises(TypeError):
        host.privcmd.foreign_map(guest.domid, guest.mfns[0], writable=False).view[0] = 1
    for gfn, count in ((-1, 1), (1, 1), (1 << 60, 1), (guest.mfns[0], 0), (guest.mfns[0], -1)):
        fails(errno.EINVAL, lambda: host.privcmd.foreign_map(guest.domid, gfn, count))  # noqa: B023
    free = guest.mfns[60]
    taken = guest.hv.frames.count_info[free]
    fails(errno.EINVAL, lambda: host.privcmd.foreign_map(guest.domid, free, 1000))
    assert guest.hv.frames.count_info[free] == taken


def test_domain_0_is_not_a_guest(host: Machine) -> None:
    privcmd = host.privcmd
    for call in (lambda: privcmd.domain_pause(0), lambda: privcmd.domain_pause_for_destroy(0),
                 lambda: privcmd.domain_shutdown(0, 0), lambda: asyncio.run(privcmd.domain_destroy(0)),
                 lambda: privcmd.vcpu_get_context(0), lambda: privcmd.max_mem(0, 1),
                 lambda: domctl(host, Domctl.DESTROYDOMAIN, 0)):
        fails(errno.EINVAL, call)
    assert not host.hv.dom0.dying
    assert privcmd.domain_list()[0].domid == 0


def test_a_closed_port_notifies_nobody(exact: Guest) -> None:
    privcmd = exact.machine.privcmd
    ports = [privcmd.evtchn_alloc_unbound(exact.domid) for _ in range(2)]
    got: list[int] = []
    first = privcmd.evtchn_bind_interdomain(exact.domid, ports[0], lambda: got.append(0))
    first.close()
    privcmd.evtchn_bind_interdomain(exact.domid, ports[1], lambda: got.append(1))
    exact.domain.evtchn.posted.clear()
    first.notify()
    assert not exact.domain.evtchn.posted


def test_memory_and_registers_of_a_guest(exact: Guest) -> None:
    privcmd = exact.machine.privcmd
    exact.put(va(30), b"hello")
    exact.machine.cpu.unload()
    assert privcmd.read_guest(exact.domid, va(30), 5) == b"hello"
    fails(errno.EFAULT, lambda: privcmd.read_guest(exact.domid, va(PAGES), 1))
    fails(errno.EFAULT, lambda: privcmd.read_guest(exact.domid, 0xFFFF800000000000, 8))
    assert privcmd.vcpu_registers(exact.domid).gpr[16] == exact.context().rip
    for wrong in (-1, 2):
        fails(errno.EINVAL, lambda: privcmd.vcpu_registers(exact.domid, wrong))  # noqa: B023


# --- birth and death -----------------------------------------------------------------------------------------


def test_200_domains_come_and_go_and_every_frame_comes_back(host: Machine) -> None:
    for cycle in range(200):
        guest = host.guest("exact" if cycle % 2 else "fast")
        if cycle % 4 == 0:
            guest.user()
        host.destroy(guest.domain)
        assert guest.domid not in host.hv.domains
    assert host.hv.allocator.free_frames == host.baseline
    assert guest.domid == 200


@pytest.mark.parametrize("state", ["empty", "built", "paused", "running", "shut down", "crashed", "twice dying"])
def test_a_domain_can_be_destroyed_in_any_state(host: Machine, state: str) -> None:
    guest = Guest(host, "exact")
    if state != "empty":
        guest.boot()
    if state == "running":
        host.privcmd.domain_unpause(guest.domid)
    elif state == "shut down":
        host.privcmd.domain_shutdown(guest.domid, 0)
    elif state == "crashed":
        host.hv.crash(guest.domain, "a\nreason")
        assert guest.domain.crash_reason == "a reason"
    elif state == "twice dying":
        host.privcmd.domain_pause_for_destroy(guest.domid)
        paused = guest.domain.pause_count
        host.privcmd.domain_pause_for_destroy(guest.domid)
        assert guest.domain.pause_count == paused
    asyncio.run(host.privcmd.domain_destroy(guest.domid))
    assert host.privcmd.domain_info(guest.domid) is None
    assert host.hv.allocator.free_frames == host.baseline
    fails(errno.ESRCH, lambda: asyncio.run(host.privcmd.domain_destroy(guest.domid)))


def test_a_dead_domain_stays_a_zombie_while_frames_of_it_are_mapped(host: Machine) -> None:
    events: list[int] = []
    host.privcmd.bind_virq(Virq.DOM_EXC, lambda: events.append(1))
    guest = host.guest("exact")
    shared = host.privcmd.foreign_map(guest.domid, guest.domain.shared_info_mfn)
    page = host.privcmd.foreign_map(guest.domid, guest.mfns[30])
    host.destroy(guest.domain)
    info = host.privcmd.domain_info(guest.domid)
    assert info is not None
    assert (info.dying, info.tot_pages) == (True, 1)
    assert domain_kill(guest.domain)
    page.view[:5] = b"still"
    before = len(events)
    page.close()
    assert host.privcmd.domain_info(guest.domid) is not None
    shared.close()
    assert host.privcmd.domain_info(guest.domid) is None
    assert len(events) == before + 1
    assert host.hv.allocator.free_frames == host.baseline


def test_no_frames_for_a_domain(host: Machine) -> None:
    """Creating it fails at every allocation, and leaves nothing."""
    allocator = host.hv.allocator
    real, left = allocator.alloc, [0]

    def alloc(order: int = 0, node: int | None = None) -> int:
        if not left[0]:
            raise XenError(errno.ENOMEM)
        left[0] -= 1
        return real(order, node)

    allocator.alloc = alloc  # type: ignore[method-assign]
    for attempt in range(20):
        left[0] = attempt
        try:
            domid = host.privcmd.domain_create(bytes(16), max_vcpus=33)
        except XenError as error:
            assert error.errno == errno.ENOMEM
            assert allocator.free_frames == host.baseline
            continue
        break
    assert attempt > 4
    left[0] = 2
    domain = host.hv.domains[domid]
    fails(errno.ENOMEM, lambda: domain.pv.resize(100))
    left[0] = 100
    host.destroy(domain)
    assert allocator.free_frames == host.baseline


def test_domain_ids_go_round(host: Machine) -> None:
    host.hv._next_domid = 0x7FEF
    ids = [host.privcmd.domain_create(bytes(16)) for _ in range(3)]
    assert ids == [0x7FEF, 1, 2]
    host.hv._next_domid = 0x7FEF
    assert host.privcmd.domain_create(bytes(16)) == 3
    for handle, vcpus, mode in ((b"short", 1, "exact"), (bytes(16), 0, "exact"), (bytes(16), 129, "exact"),
                                (bytes(16), 1, "quick")):
        fails(errno.EINVAL, lambda: host.privcmd.domain_create(handle, max_vcpus=vcpus, pv_mode=mode))  # type: ignore[arg-type]  # noqa: B023


def test_descriptors(guest: Guest) -> None:
    """HYPERVISOR_set_gdt and update_descriptor; a call gate only in exact mode, and only to the guest's own code."""
    gdt = guest.mfns[GDT_PFN] << 12
    gate = 0x0000_8C00_0033_0000 | 1 << 47
    for descriptor, allowed in ((0x00AF9A000000FFFF, True), (0, True), (gate, guest.pv.exact),
                                (gate | 0x80 << 32, False),
                                (0x0000_8900_0000_0067, False), (0x0000_8C00_E00B_0000, False)):
        assert guest.call(Hypercall.UPDATE_DESCRIPTOR, gdt + 0x80, descriptor) == (0 if allowed else -errno.EINVAL)
        if allowed and descriptor:
            assert guest.hv.memory.q[gdt + 0x80 >> 3] >> 45 & 3 == 3
    for maddr in (gdt + 4, guest.mfns[0] << 12, 1 << 62, 0):
        assert guest.call(Hypercall.UPDATE_DESCRIPTOR, maddr, 0) == -errno.EINVAL
    guest.put(va(30), struct.pack("<QQ", guest.mfns[LDT_PFN], guest.mfns[0]))
    assert guest.call(Hypercall.SET_GDT, va(30), 512) == 0
    assert guest.call(Hypercall.SET_GDT, va(30), 513) == -errno.EINVAL  # the second is a page table
    assert guest.pv.gdt_frames == [guest.mfns[LDT_PFN]]
    assert guest.call(Hypercall.SET_GDT, va(30), 14 * 512 + 1) == -errno.EINVAL
    assert guest.call(Hypercall.SET_GDT, 0x1000, 1) == -errno.EFAULT
    assert guest.call(Hypercall.SET_GDT, 0, 0) == 0
    assert guest.hv.frames.type_info[guest.mfns[LDT_PFN]] & (1 << 40) - 1 == 0
    assert guest.hv.frames.type_info[guest.mfns[30]] & PGT_WRITABLE == PGT_WRITABLE
