# SPDX-License-Identifier: GPL-2.0-only
"""Affinity, cpupools, triggers and the machine's shape, by the bytes of 4.6's domctl and sysctl."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator

import pytest

from pyxen.abi import domctl as dabi
from pyxen.abi import sysctl as sabi
from pyxen.abi.domctl import Domctl
from pyxen.abi.sysctl import CpupoolOp, Sysctl
from tests.hypervisor.rig import Guest, Machine, machine
from tests.hypervisor.test_control import HANDLE, domctl, fails, sysctl

SECOND = 0x14000
"""Handle of the third buffer, when the second is at most a page."""
ANY = sabi.CPUPOOL_PAR_ANY
HARD, SOFT = dabi.VCPUAFFINITY_HARD, dabi.VCPUAFFINITY_SOFT


@pytest.fixture
def big() -> Iterator[Machine]:
    """Two nodes of two sockets... of three cores: twelve pCPUs."""
    with machine("nodes=2,sockets=4,cores=3") as host:
        yield host


@pytest.fixture
def guest(big: Machine) -> Guest:
    return big.guest("exact")


def pool_op(host: Machine, op: int, poolid: int = 0, *, sched: int = 5, domid: int = 0, cpu: int = 0,
            cpumap: bytearray | None = None) -> tuple[int, ...]:
    handle, bits = (HANDLE, 8 * len(cpumap)) if cpumap is not None else (0, 0)
    request = sabi.CPUPOOL_OP.pack(op, poolid, sched, domid, cpu, 0, handle, bits)
    answer = sysctl(host, Sysctl.CPUPOOL_OP, request, *([cpumap] if cpumap is not None else []))
    return sabi.CPUPOOL_OP.unpack_from(answer)


def members(data: bytearray) -> set[int]:
    return {bit for bit in range(8 * len(data)) if data[bit // 8] >> bit % 8 & 1}


def test_sizes_are_those_of_the_c_structures() -> None:
    """Measured with gcc from the installed headers; scheduler_op by hand from 4.6's, which is shorter."""
    assert (dabi.VCPUAFFINITY.size, dabi.SENDTRIGGER.size) == (40, 8)
    assert (sabi.CPUPOOL_OP.size, sabi.SCHEDULER_OP.size, sabi.CPUTOPOINFO.size) == (40, 24, 16)
    assert (sabi.NUMAINFO.size, sabi.GETCPUINFO.size, sabi.CPUTOPO.size, sabi.MEMINFO.size) == (24, 24, 12, 16)


# --- affinity --------------------------------------------------------------------------------------------


def affinity(
    host: Machine, command: int, guest: Guest, vcpu: int, flags: int, hard: bytearray, soft: bytearray
) -> None:
    union = dabi.VCPUAFFINITY.pack(vcpu, flags, HANDLE, 8 * len(hard), SECOND, 8 * len(soft))
    domctl(host, command, guest.domid, union, hard, soft)


def test_affinity_is_set_and_what_comes_of_it_is_returned(big: Machine, guest: Guest) -> None:
    hard, soft = bytearray(b"\xff\xff"), bytearray(2)
    affinity(big, Domctl.GETVCPUAFFINITY, guest, 0, HARD | SOFT, hard, soft)
    assert members(hard) == members(soft) == set(range(12))
    hard, soft = bytearray(b"\x0e\xf1"), bytearray(b"\x03\x01")  # 1-3, 8; 12 and up do not exist
    affinity(big, Domctl.SETVCPUAFFINITY, guest, 0, HARD | SOFT, hard, soft)
    assert members(hard) == {1, 2, 3, 8}
    assert members(soft) == {1, 8}
    vcpu = guest.domain.vcpus[0]
    assert (vcpu.hard_affinity, vcpu.soft_affinity) == ({1, 2, 3, 8}, {0, 1, 8})
    hard, soft = bytearray(4), bytearray(b"\xaa")
    affinity(big, Domctl.GETVCPUAFFINITY, guest, 0, HARD, hard, soft)
    assert members(hard) == {1, 2, 3, 8}
    assert soft == b"\xaa"  # not asked for
    affinity(big, Domctl.SETVCPUAFFINITY, guest, 0, SOFT, hard, bytearray(2))
    assert (vcpu.hard_affinity, vcpu.soft_affinity) == ({1, 2, 3, 8}, frozenset())
    affinity(big, Domctl.SETVCPUAFFINITY, guest, 0, HARD | SOFT, bytearray(b"\xff\x0f"), bytearray(b"\xff\x0f"))
    assert (vcpu.hard_affinity, vcpu.soft_affinity) == (None, None)


def test_a_bitmap_of_odd_size_ends_where_it_says(big: Machine, guest: Guest) -> None:
    room = bytearray(b"\xff\xff")
    union = dabi.VCPUAFFINITY.pack(0, HARD, HANDLE, 3, 0, 0)
    domctl(big, Domctl.SETVCPUAFFINITY, guest.domid, union, room)
    assert guest.domain.vcpus[0].hard_affinity == {0, 1, 2}
    assert room == b"\x07\xff"


def test_affinity_that_cannot_be_changes_nothing(big: Machine, guest: Guest) -> None:
    page, vcpu = bytearray(4096), guest.domain.vcpus[0]
    affinity(big, Domctl.SETVCPUAFFINITY, guest, 0, HARD, bytearray(b"\x03"), page)

    def trial(number: int, vcpu_id: int, flags: int, hard: bytes, handle: int = HANDLE, bits: int = 16) -> None:
        union = dabi.VCPUAFFINITY.pack(vcpu_id, flags, handle, bits, 0, 0)
        fails(number, lambda: domctl(big, Domctl.SETVCPUAFFINITY, guest.domid, union, bytearray(hard)))
        assert (vcpu.hard_affinity, vcpu.soft_affinity) == ({0, 1}, None)

    trial(errno.EINVAL, 0, HARD, b"\0\0")
    trial(errno.EINVAL, 0, HARD, b"\0\x10")  # a pCPU that does not exist
    trial(errno.EINVAL, 0, 0, b"\1\0")
    trial(errno.EINVAL, 0, HARD, b"\1\0", handle=0)
    trial(errno.EINVAL, 0, HARD | SOFT, b"\1\0")
    trial(errno.EINVAL, 2, HARD, b"\1\0")
    trial(errno.EINVAL, 0xFFFFFFFF, HARD, b"\1\0")
    trial(errno.EFAULT, 0, HARD, b"\1\0", handle=1 << 63)
    for call in (lambda: domctl(big, Domctl.SETVCPUAFFINITY, 0, bytes(40)),
                 lambda: big.privcmd.vcpu_set_affinity(0, 0, {0})):
        fails(errno.EINVAL, call)


def test_room_beyond_memory_is_a_fault_and_not_a_gigabyte_of_zeros(big: Machine, guest: Guest) -> None:
    union = dabi.VCPUAFFINITY.pack(0, HARD, HANDLE, 0xFFFFFFFF, 0, 0)
    fails(errno.EFAULT, lambda: domctl(big, Domctl.GETVCPUAFFINITY, guest.domid, union, bytearray(4096)))


def test_hard_affinity_needs_a_pcpu_of_the_pool(big: Machine, guest: Guest) -> None:
    privcmd = big.privcmd
    for cpu in (10, 11):
        privcmd.cpupool_remove_cpu(0, cpu)
    fails(errno.EINVAL, lambda: privcmd.vcpu_set_affinity(guest.domid, 0, {10, 11, 50}))
    assert privcmd.vcpu_set_affinity(guest.domid, 0, {9, 10}, {10}) == ({9}, frozenset())
    assert privcmd.vcpu_get_affinity(guest.domid, 0) == ({9, 10}, {10})


# --- cpupools --------------------------------------------------------------------------------------------


def test_a_pool_s_life_in_bytes(big: Machine, guest: Guest) -> None:
    assert pool_op(big, CpupoolOp.CREATE, ANY)[1] == 1
    assert pool_op(big, CpupoolOp.CREATE, 7)[1] == 7
    room = bytearray(b"\xff" * 4)
    info = pool_op(big, CpupoolOp.INFO, 2, cpumap=room)
    assert (info[1], info[2], info[5], members(room)) == (7, 5, 0, set())  # the next one, as Xen's
    pool_op(big, CpupoolOp.RMCPU, 0, cpu=3)
    pool_op(big, CpupoolOp.RMCPU, 0, cpu=3)  # it is gone: no error
    pool_op(big, CpupoolOp.RMCPU, 0, cpu=ANY)
    pool_op(big, CpupoolOp.FREEINFO, cpumap=room)
    assert members(room) == {3, 11}
    pool_op(big, CpupoolOp.ADDCPU, 7, cpu=ANY)
    pool_op(big, CpupoolOp.ADDCPU, 7, cpu=11)
    pool_op(big, CpupoolOp.MOVEDOMAIN, 7, domid=guest.domid)
    assert guest.domain.cpupool == 7
    info = pool_op(big, CpupoolOp.INFO, 7, cpumap=room)
    assert (info[5], members(room)) == (1, {3, 11})
    small = bytearray(1)
    pool_op(big, CpupoolOp.INFO, 7, cpumap=small)
    assert small == b"\x08"
    pool_op(big, CpupoolOp.MOVEDOMAIN, 0, domid=guest.domid)
    pool_op(big, CpupoolOp.RMCPU, 7, cpu=ANY)
    pool_op(big, CpupoolOp.RMCPU, 7, cpu=ANY)
    pool_op(big, CpupoolOp.DESTROY, 7)
    assert [info.poolid for info in big.privcmd.cpupool_list()] == [0, 1]


@pytest.mark.parametrize(
    ("number", "op", "poolid", "fields"),
    [
        (errno.EEXIST, CpupoolOp.CREATE, 0, {}),
        (errno.ENOENT, CpupoolOp.CREATE, ANY, {"sched": 6}),
        (errno.ENOENT, CpupoolOp.CREATE, ANY, {"sched": 0xFFFFFFFF}),
        (errno.ENOENT, CpupoolOp.DESTROY, 9, {}),
        (errno.EBUSY, CpupoolOp.DESTROY, 0, {}),
        (errno.ENOENT, CpupoolOp.INFO, 9, {"cpumap": bytearray(2)}),
        (errno.EINVAL, CpupoolOp.ADDCPU, 0, {"cpu": 12}),
        (errno.EINVAL, CpupoolOp.ADDCPU, 0, {"cpu": ANY}),  # there is no free one
        (errno.EBUSY, CpupoolOp.ADDCPU, 0, {"cpu": 3}),
        (errno.ENOENT, CpupoolOp.RMCPU, 9, {"cpu": 3}),
        (errno.EINVAL, CpupoolOp.RMCPU, 0, {"cpu": 0xFFFFFFF0}),
        (errno.ESRCH, CpupoolOp.MOVEDOMAIN, 0, {"domid": 99}),
        (errno.ESRCH, CpupoolOp.MOVEDOMAIN, 0, {"domid": 0x7FF0}),
        (errno.EINVAL, CpupoolOp.MOVEDOMAIN, 0, {"domid": 0}),
        (errno.ENOENT, CpupoolOp.MOVEDOMAIN, 9, {"domid": 1}),
        (errno.ENOSYS, 0, 0, {}),
        (errno.ENOSYS, 8, 0, {}),
    ],
)
def test_pool_operations_that_fail(
    big: Machine, guest: Guest, number: int, op: int, poolid: int, fields: dict[str, int]
) -> None:
    fails(number, lambda: pool_op(big, op, poolid, **fields))  # type: ignore[arg-type]


def test_a_domain_does_not_move_to_a_pool_without_pcpus(big: Machine, guest: Guest) -> None:
    poolid = big.privcmd.cpupool_create()
    fails(errno.ENOENT, lambda: big.privcmd.cpupool_move_domain(poolid, guest.domid))
    assert guest.domain.cpupool == 0


# --- the scheduler's parameters ----------------------------------------------------------------------------


def test_scheduler_parameters(big: Machine) -> None:
    def op(poolid: int, sched: int, command: int, tslice: int = 0, ratelimit: int = 0) -> tuple[int, ...]:
        request = sabi.SCHEDULER_OP.pack(poolid, sched, command, tslice, ratelimit)
        return sabi.SCHEDULER_OP.unpack_from(sysctl(big, Sysctl.SCHEDULER_OP, request))

    assert op(0, 5, sabi.SCHEDOP_GETINFO)[3:] == (30, 1000)
    assert op(0, 5, sabi.SCHEDOP_PUTINFO, 10, 500)[3:] == (10, 500)
    assert big.privcmd.sched_credit_parameters(0) == (10, 500)
    fails(errno.ESRCH, lambda: op(3, 5, sabi.SCHEDOP_GETINFO))
    fails(errno.EINVAL, lambda: op(0, 6, sabi.SCHEDOP_GETINFO))
    fails(errno.EINVAL, lambda: op(0, 5, 2))
    for tslice, ratelimit in ((0, 0), (1001, 0), (30, 99), (1, 2000), (30, 0xFFFFFFFF)):
        fails(errno.EINVAL, lambda: op(0, 5, sabi.SCHEDOP_PUTINFO, tslice, ratelimit))  # noqa: B023
    fails(errno.EINVAL, lambda: big.privcmd.sched_credit_set_parameters(0, tslice_ms=-1, ratelimit_us=0))
    assert op(0, 5, sabi.SCHEDOP_GETINFO)[3:] == (10, 500)


# --- triggers ------------------------------------------------------------------------------------------------


def test_an_nmi_is_pending_once_and_the_vcpu_is_woken(big: Machine, guest: Guest) -> None:
    vcpu = guest.domain.vcpus[0]
    vcpu.pause_flags |= 1  # blocked
    domctl(big, Domctl.SENDTRIGGER, guest.domid, dabi.SENDTRIGGER.pack(dabi.SENDTRIGGER_NMI, 0))
    assert vcpu.nmi_pending
    assert not vcpu.pause_flags & 1
    big.privcmd.send_trigger(guest.domid, dabi.SENDTRIGGER_NMI)
    for number, trigger, vcpu_id in (
        (errno.ESRCH, 0, 2), (errno.ESRCH, 0, 0xFFFFFFFF), (errno.ENOSYS, 1, 0), (errno.ENOSYS, 2, 0),
        (errno.EINVAL, 3, 0), (errno.EINVAL, 4, 0), (errno.ENOSYS, 99, 0),
    ):
        union = dabi.SENDTRIGGER.pack(trigger, vcpu_id)
        fails(number, lambda: domctl(big, Domctl.SENDTRIGGER, guest.domid, union))  # noqa: B023


# --- the machine -----------------------------------------------------------------------------------------------


def test_cpu_topology(big: Machine) -> None:
    size = sabi.CPUTOPOINFO.unpack_from(sysctl(big, Sysctl.CPUTOPOINFO, sabi.CPUTOPOINFO.pack(0, 0)))
    assert size == (12, 0)
    room = bytearray(b"\xff" * 12 * 14)
    answer = sysctl(big, Sysctl.CPUTOPOINFO, sabi.CPUTOPOINFO.pack(14, HANDLE), room)
    assert sabi.CPUTOPOINFO.unpack_from(answer)[0] == 12
    assert list(sabi.CPUTOPO.iter_unpack(room))[:12] == [(cpu, cpu // 3, cpu // 6) for cpu in range(12)]
    assert room[12 * 12 :] == b"\xff" * 24
    room = bytearray(36)
    answer = sysctl(big, Sysctl.CPUTOPOINFO, sabi.CPUTOPOINFO.pack(2, HANDLE), room)
    assert sabi.CPUTOPOINFO.unpack_from(answer)[0] == 2
    assert room[24:] == bytes(12)
    fails(errno.EFAULT, lambda: sysctl(big, Sysctl.CPUTOPOINFO, sabi.CPUTOPOINFO.pack(12, HANDLE), bytearray(12)))


def test_numa_info(big: Machine) -> None:
    assert sabi.NUMAINFO.unpack_from(sysctl(big, Sysctl.NUMAINFO, sabi.NUMAINFO.pack(0, 0, 0)))[0] == 2
    memory, distances = bytearray(64), bytearray(16)
    answer = sysctl(big, Sysctl.NUMAINFO, sabi.NUMAINFO.pack(4, HANDLE, SECOND), memory, distances)
    assert sabi.NUMAINFO.unpack_from(answer)[0] == 2
    found = list(sabi.MEMINFO.iter_unpack(memory))
    assert [size for size, _ in found] == [8 << 20, 8 << 20, 0, 0]
    assert sum(free for _, free in found) == big.hv.allocator.free_frames << 12
    assert struct.unpack("<4I", distances) == (10, 20, 20, 10)
    one = bytearray(4)
    sysctl(big, Sysctl.NUMAINFO, sabi.NUMAINFO.pack(1, 0, HANDLE), one)
    assert one == b"\x0a\0\0\0"
    nodes = big.privcmd.numa_info()
    assert [(node.total_kb, node.distances) for node in nodes] == [(8192, (10, 20)), (8192, (20, 10))]


def test_idle_times(big: Machine) -> None:
    room = bytearray(8 * 13)
    answer = sysctl(big, Sysctl.GETCPUINFO, sabi.GETCPUINFO.pack(13, HANDLE, 0), room)
    assert sabi.GETCPUINFO.unpack_from(answer)[2] == 12
    assert list(struct.unpack("<13Q", room))[:12] == big.privcmd.cpu_idle_times()
    answer = sysctl(big, Sysctl.GETCPUINFO, sabi.GETCPUINFO.pack(0, HANDLE, 0), room)
    assert sabi.GETCPUINFO.unpack_from(answer)[2] == 0


def test_a_guest_is_refused(big: Machine, guest: Guest) -> None:
    """Decoded and then refused by XSM, not by absence: EPERM."""
    from pyxen.hypervisor.hypercall import call
    from pyxen.hypervisor.hypercall_table import build_table
    from pyxen.hypervisor.privcmd import Dom0Caller

    def ask(number: int, request: bytes) -> int:
        caller = Dom0Caller(guest.domain, [bytearray(request)])
        return call(caller, build_table(guest=True), number, (caller.address(0), 0, 0, 0, 0, 0))

    for command in (Sysctl.CPUPOOL_OP, Sysctl.SCHEDULER_OP, Sysctl.GETCPUINFO, Sysctl.CPUTOPOINFO, Sysctl.NUMAINFO):
        assert ask(35, sabi.HEADER.pack(command, 0xC).ljust(sabi.SIZE, b"\0")) == -errno.EPERM
    for command in (Domctl.SETVCPUAFFINITY, Domctl.GETVCPUAFFINITY, Domctl.SENDTRIGGER):
        request = dabi.HEADER.pack(command, 0xB, guest.domid).ljust(dabi.SIZE, b"\0")
        assert ask(36, request) == -errno.EPERM
