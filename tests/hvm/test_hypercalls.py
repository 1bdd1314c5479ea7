# SPDX-License-Identifier: GPL-2.0-only
"""What a PVH guest asks for, and what it gets: parameters, features, vCPUs, events, 32-bit calls."""

from __future__ import annotations

import errno
import struct

import pytest

from pyxen.abi.hvm import hvm_vcpu
from pyxen.abi.hvm.hvm_op import EVTCHN_UPCALL_VECTOR, GET_MEM_TYPE, HVM_PARAM, HvmOp
from pyxen.abi.hvm.params import HvmParam
from pyxen.abi.vcpu import VcpuOp
from pyxen.abi.xen import DOMID_SELF, Hypercall, VmAssist
from pyxen.errors import XenError
from pyxen.hypervisor.vcpu import PauseFlag
from pyxen.hypervisor.x86.hvm.p2m_types import P2mType
from pyxen.hypervisor.x86.hypercall_page import hvm_page
from pyxen.machine.cpu.base import RAX, RBX, RCX, RDX, RSI
from tests.hvm.rig import AT, Guest, Machine

HVM_OP, VCPU_OP, EVTCHN, VERSION = Hypercall.HVM_OP, Hypercall.VCPU_OP, Hypercall.EVENT_CHANNEL_OP, (
    Hypercall.XEN_VERSION)
CALLBACK = 2 << 56 | 0xF3


def set_param(guest: Guest, index: int, value: int, domid: int = DOMID_SELF) -> int:
    return guest.op(HVM_OP, HvmOp.SET_PARAM, HVM_PARAM.pack(domid, 0, index, value))[0]


def get_param(guest: Guest, index: int, domid: int = DOMID_SELF) -> int:
    result, data = guest.op(HVM_OP, HvmOp.GET_PARAM, HVM_PARAM.pack(domid, 0, index, 0))
    return result if result else HVM_PARAM.unpack(data)[3]


# --- parameters ------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [HvmParam.CALLBACK_IRQ, HvmParam.STORE_EVTCHN, HvmParam.CONSOLE_EVTCHN,
                                   HvmParam.VM_GENERATION_ID_ADDR, HvmParam.VM86_TSS])
def test_what_a_guest_may_set(guest: Guest, index: int) -> None:
    assert set_param(guest, index, 77) == 0
    assert get_param(guest, index) == 77


@pytest.mark.parametrize("index", [HvmParam.STORE_PFN, HvmParam.CONSOLE_PFN, HvmParam.IDENT_PT, HvmParam.TIMER_MODE,
                                   HvmParam.DM_DOMAIN, HvmParam.IOREQ_PFN, HvmParam.TRIPLE_FAULT_REASON])
def test_what_a_guest_may_not_set(guest: Guest, index: int) -> None:
    assert set_param(guest, index, 1) == -errno.EPERM


def test_what_a_guest_may_read(guest: Guest) -> None:
    guest.machine.privcmd.hvm_param_set(guest.domid, HvmParam.STORE_PFN, 0x123)
    assert get_param(guest, HvmParam.STORE_PFN) == 0x123
    assert get_param(guest, HvmParam.IOREQ_PFN) == -errno.EPERM
    assert get_param(guest, 39) == -errno.EINVAL
    assert get_param(guest, 1 << 31) == -errno.EINVAL
    assert get_param(guest, 1, 0) == -errno.EINVAL  # no such domain has parameters
    other = Guest(guest.machine)
    assert get_param(guest, 1, other.domid) == set_param(guest, 0, 1, other.domid) == -errno.EPERM
    assert get_param(guest, 1, 999) == -errno.ESRCH


def test_values_are_checked(host: Machine, guest: Guest) -> None:
    privcmd, domid = host.privcmd, guest.domid
    ports = HvmParam.ACPI_IOPORTS_LOCATION
    for index, value, error in ((HvmParam.TIMER_MODE, 4, errno.EINVAL), (ports, 2, errno.EINVAL),
                                (ports, 0, errno.ENODEV), (HvmParam.ALTP2M, 1, errno.EOPNOTSUPP),
                                (HvmParam.NESTEDHVM, 1, errno.EOPNOTSUPP), (40, 0, errno.EINVAL)):
        with pytest.raises(XenError) as caught:
            privcmd.hvm_param_set(domid, index, value)
        assert caught.value.errno == error
    assert set_param(guest, HvmParam.X87_FIP_WIDTH, 3) == -errno.EINVAL
    with pytest.raises(XenError) as caught:
        privcmd.hvm_param_get(0, 1)
    assert caught.value.errno == errno.EINVAL


# --- hvm_op ----------------------------------------------------------------------------------------


def test_memory_types(guest: Guest) -> None:
    def kind(pfn: int) -> int:
        result, data = guest.op(HVM_OP, HvmOp.GET_MEM_TYPE, GET_MEM_TYPE.pack(DOMID_SELF, 9, pfn))
        assert result == 0
        return int(GET_MEM_TYPE.unpack(data)[1])

    assert kind(20) == 0
    guest.p2m.set_entry(40, guest.mfn(40), 0, P2mType.RAM_RO)
    assert kind(40) == 1
    assert kind(5000) == kind(0xFEE00) == kind((1 << 64) - 1) == 2


def test_flush_tlbs(guest: Guest) -> None:
    before = len(guest.journal("flush"))
    assert guest.call(HVM_OP, HvmOp.FLUSH_TLBS, 0) == 0
    assert len(guest.journal("flush")) == before + 1
    assert guest.call(HVM_OP, HvmOp.FLUSH_TLBS, AT) == -errno.EINVAL


@pytest.mark.parametrize("op", [HvmOp.SET_PCI_INTX_LEVEL, HvmOp.SET_ISA_IRQ_LEVEL, HvmOp.ALTP2M, 99, 1 << 40])
def test_what_needs_a_device_model_is_not_there(guest: Guest, op: int) -> None:
    assert guest.call(HVM_OP, op, AT) == -errno.ENOSYS


def test_pagetable_dying_is_accepted(guest: Guest) -> None:
    assert guest.op(HVM_OP, HvmOp.PAGETABLE_DYING, struct.pack("<H6xQ", DOMID_SELF, 0x1000))[0] == 0


def test_upcalls_through_the_local_apic(guest: Guest) -> None:
    for vcpu, vector, result in ((0, 0xF, -errno.EINVAL), (2, 0xF3, -errno.ENOENT), (0, 0xF3, 0)):
        data = EVTCHN_UPCALL_VECTOR.pack(vcpu, vector)
        assert guest.op(HVM_OP, HvmOp.SET_EVTCHN_UPCALL_VECTOR, data)[0] == result
    apic = guest.hvm.vlapic
    port = _ipi_port(guest)
    assert guest.op(EVTCHN, 4, struct.pack("<I", port))[0] == 0
    assert not apic.irr  # off: accepts nothing
    apic.write(0xF0, 0x1FF)
    assert apic.irr == 1 << 0xF3
    guest.traps.interrupt_window(0x1000)
    assert guest.journal("interrupt") == [("interrupt", 0xF3)]
    assert apic.isr == 1 << 0xF3


def _ipi_port(guest: Guest, vcpu: int = 0) -> int:
    result, data = guest.op(EVTCHN, 7, struct.pack("<II", vcpu, 0))
    assert result == 0
    return int(struct.unpack("<II", data)[1])


def test_the_callback_vector(guest: Guest) -> None:
    assert set_param(guest, HvmParam.CALLBACK_IRQ, CALLBACK) == 0
    port = _ipi_port(guest)
    assert not guest.journal("window")
    assert guest.op(EVTCHN, 4, struct.pack("<I", port))[0] == 0
    assert guest.journal("window") == [("window", True)]
    assert set_param(guest, HvmParam.CALLBACK_IRQ, 0) == 0
    assert guest.journal("window")[-1] == ("window", False)
    for nonsense in (2 << 56 | 3, 1 << 56 | 0xF3, 5):  # a CPU vector, INTx, a GSI: nothing of it is delivered
        assert set_param(guest, HvmParam.CALLBACK_IRQ, nonsense) == 0
        assert guest.hvm.pending_vector() == -1


# --- version, assists, hypercalls that are not there ---------------------------------------------------


def test_features(guest: Guest) -> None:
    result, data = guest.op(VERSION, 6, struct.pack("<II", 0, 0))
    assert result == 0
    assert struct.unpack("<II", data)[1] == 1 << 0 | 1 << 2 | 1 << 8 | 1 << 9


def test_assists(guest: Guest) -> None:
    assert guest.call(Hypercall.VM_ASSIST, 0, VmAssist.RUNSTATE_UPDATE_FLAG) == 0
    assert guest.call(Hypercall.VM_ASSIST, 0, VmAssist.WRITABLE_PAGETABLES) == -errno.EINVAL


@pytest.mark.parametrize("number", [Hypercall.MMU_UPDATE, Hypercall.SET_TRAP_TABLE, Hypercall.IRET,
                                    Hypercall.SET_GDT, Hypercall.STACK_SWITCH, Hypercall.PHYSDEV_OP, 63, 64, 1 << 63])
def test_pv_hypercalls_are_not_there(guest: Guest, number: int) -> None:
    assert guest.call(number, 1, 2, 3) == -errno.ENOSYS


def test_control_is_decoded_and_refused(guest: Guest) -> None:
    guest.put(AT, struct.pack("<IIH6x", 2, 0xB, 0).ljust(144, b"\0"))
    assert guest.call(Hypercall.DOMCTL, AT) == -errno.EPERM


def test_user_mode_may_not_call(guest: Guest) -> None:
    guest.machine.cpu.set_cpl(3)
    assert guest.call(VERSION, 0, 0) == -errno.EPERM
    guest.machine.cpu.set_cpl(0)
    assert guest.call(VERSION, 0, 0) == 4 << 16 | 6


def test_bad_pointers(guest: Guest) -> None:
    for address in (0, 0x3F0000, 1 << 47, (1 << 64) - 8):
        assert guest.call(VERSION, 6, address) == -errno.EFAULT
        assert guest.call(HVM_OP, HvmOp.GET_PARAM, address) == -errno.EFAULT


# --- vCPUs -----------------------------------------------------------------------------------------


def context64(**fields: int) -> bytes:
    names = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "rip", "rflags", "cr0", "cr3", "cr4", "efer")
    values = dict.fromkeys(names, 0) | {"cr0": 0x80000001, "cr4": 0x20, "efer": 0x500, "rip": 0x20000} | fields
    data = hvm_vcpu.HEADER.pack(1) + hvm_vcpu.X86_64.pack(*(values[n] for n in names))
    return data.ljust(hvm_vcpu.SIZE, b"\0")


def context32(**fields: int) -> bytes:
    regs = [0] * 8 + [fields.get("eip", 0x20000), 0]
    data = hvm_vcpu.HEADER.pack(0) + hvm_vcpu.X86_32.pack(
        *regs, fields.get("cr0", 1), 0, fields.get("cr4", 0), fields.get("efer", 0), 0, 0, 0, 0, 0,
        *[fields.get("limit", 0xFFFFFFFF)] * 4, 0x67, fields.get("cs", 0xC9B), 0xC93, fields.get("ss", 0xC93), 0xC93,
        fields.get("tr", 0x8B))
    return data.ljust(hvm_vcpu.SIZE, b"\0")


def initialise(guest: Guest, vcpu: int, data: bytes) -> int:
    guest.put(AT, data)
    return guest.call(VCPU_OP, VcpuOp.INITIALISE, vcpu, AT)


@pytest.mark.parametrize("data", [context64(), context32()])
def test_a_vcpu_is_brought_up(guest: Guest, data: bytes) -> None:
    assert guest.call(VCPU_OP, VcpuOp.UP, 1, 0) == -errno.EINVAL
    assert initialise(guest, 1, data) == 0
    assert initialise(guest, 1, data) == -errno.EEXIST
    assert guest.call(VCPU_OP, VcpuOp.IS_UP, 1, 0) == 0
    assert guest.call(VCPU_OP, VcpuOp.UP, 1, 0) == 0
    assert guest.call(VCPU_OP, VcpuOp.UP, 1, 0) == 0
    assert guest.call(VCPU_OP, VcpuOp.IS_UP, 1, 0) == 1
    assert guest.machine.privcmd.vcpu_hvm_context(guest.domid, 1).gpr[16] == 0x20000
    assert guest.call(VCPU_OP, VcpuOp.DOWN, 1, 0) == 0
    assert guest.vcpu(1).pause_flags & PauseFlag.DOWN


@pytest.mark.parametrize("data", [
    context64(cr0=1), context64(cr4=0), context64(efer=0x100), context64(efer=0x400), context64(rip=1 << 50),
    context64(efer=0x1500), context64(cr4=0x20 | 1 << 13), context64(cr3=1 << 45), context64(cr0=1 << 40 | 0x80000001),
    context32(cs=0xC8B), context32(cs=0xC93), context32(ss=0xC9B), context32(ss=0xC91), context32(tr=0x89),
    context32(limit=0x100000FF), context32(cr0=0x80000000), context32(efer=0x400), context32(cs=0xFC9B),
    context32(cs=0xC1B), context32(cs=0xE9B),
    hvm_vcpu.HEADER.pack(2).ljust(hvm_vcpu.SIZE, b"\0"), b"\0\0\0\0\1".ljust(hvm_vcpu.SIZE, b"\0"),
])
def test_contexts_no_cpu_could_have(guest: Guest, data: bytes) -> None:
    assert initialise(guest, 1, data) == -errno.EINVAL
    assert guest.vcpu(1).context is None


def test_vcpus_that_are_not_there(guest: Guest) -> None:
    assert initialise(guest, 2, context64()) == -errno.ENOENT
    assert guest.call(VCPU_OP, VcpuOp.UP, 33, 0) == -errno.ENOENT
    assert initialise(guest, 0, context64()) == -errno.EEXIST
    assert guest.call(VCPU_OP, VcpuOp.GET_PHYSID, 0, AT) == -errno.ENOSYS


def test_vcpu_info_stands_where_the_guest_says(guest: Guest) -> None:
    data = struct.pack("<QII", 0x25, 64, 0)
    guest.put(AT, data)
    assert guest.call(VCPU_OP, VcpuOp.REGISTER_VCPU_INFO, 0, AT) == 0
    assert guest.vcpu().info_maddr == (guest.mfn(0x25) << 12) + 64
    guest.put(AT, struct.pack("<QII", 5000, 64, 0))
    assert guest.call(VCPU_OP, VcpuOp.REGISTER_VCPU_INFO, 1, AT) == -errno.EINVAL


# --- the hypercall page, 32-bit calls ---------------------------------------------------------------------


def test_the_hypercall_page(guest: Guest) -> None:
    assert guest.traps.write_msr(0x40000000, 0x22000)
    assert guest.get(0x22000, 4096) == hvm_page()
    assert guest.get(0x22000 + 17 * 32, 9) == b"\xb8\x11\0\0\0\x0f\x01\xd9\xc3"
    assert not guest.traps.write_msr(0x40000000, 0x22001)
    assert not guest.traps.write_msr(0x40000000, 0x5000000)
    assert not guest.traps.write_msr(0x40000000, 1 << 52)


@pytest.fixture
def old(host: Machine) -> Guest:
    """In flat 32-bit mode without paging."""
    return host.guest(long_mode=False)


def call32(guest: Guest, number: int, *arguments: int) -> int:
    gpr = guest.machine.cpu.gpr
    for register, value in zip((RBX, RCX, RDX, RSI), arguments, strict=False):
        gpr[register] = 0xDEAD0000_00000000 | value
    gpr[RAX] = number
    guest.traps.hypercall(0x1003)
    return gpr[RAX] - (1 << 32) if gpr[RAX] >> 31 else gpr[RAX]


def test_32_bit_calls(old: Guest) -> None:
    assert call32(old, VERSION, 0) == 4 << 16 | 6
    old.put(AT, struct.pack("<HHIII", DOMID_SELF, 0, 0, 0, 0x28))
    assert call32(old, Hypercall.MEMORY_OP, 7, AT) == 0
    assert old.mfn(0x28) == old.domain.shared_info_mfn
    old.put(AT, struct.pack("<QI", 5_000_000, 0))
    assert call32(old, VCPU_OP, VcpuOp.SET_SINGLESHOT_TIMER, 0, AT) == 0
    assert old.vcpu().singleshot_timer.deadline_ns == 5_000_000
    assert call32(old, Hypercall.SET_TIMER_OP, 1, 1) == 0
    assert old.vcpu().singleshot_timer.deadline_ns == 1 << 32 | 1
    old.put(AT, struct.pack("<IIQ", AT + 64, 1, 0))
    assert call32(old, Hypercall.SCHED_OP, 3, AT) in (0, -errno.EINVAL)
    old.domain.arch.memory_map = [(0, 4096, 1)]
    old.put(AT, struct.pack("<II", 5, AT + 64))
    assert call32(old, Hypercall.MEMORY_OP, 9, AT) == 0
    assert struct.unpack("<II", old.get(AT, 8)) == (1, AT + 64)
    assert struct.unpack("<QQI", old.get(AT + 64, 20)) == (0, 4096, 1)


def test_32_bit_calls_that_are_not_there(old: Guest) -> None:
    for number, command in ((Hypercall.GRANT_TABLE_OP, 0), (Hypercall.MEMORY_OP, 6), (Hypercall.DOMCTL, 0), (63, 0)):
        assert call32(old, number, command, AT) == -errno.ENOSYS
    assert "not implemented" in old.machine.log()
