# SPDX-License-Identifier: GPL-2.0-only
"""Bare programs as PVH guests on the real engine: holes, devices taken as memory, faults without end.

Each is a few instructions of flat 32-bit code at 1 MiB; what becomes of its domain is the test.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator

import pytest

from pyxen.hypervisor.hypervisor import Hypervisor
from pyxen.hypervisor.lifecycle import domain_kill
from pyxen.hypervisor.privcmd import DomainInfo, PrivCmd
from pyxen.machine.clock import RealClock
from pyxen.machine.cpu.unicorn_x86 import UnicornX86
from pyxen.machine.memory import Memory
from pyxen.machine.topology import Topology

pytestmark = [pytest.mark.engine, pytest.mark.timeout(120)]

ENTRY = 0x100000
OFF = b"\x66\xba\x04\xb0" b"\x66\xb8\x00\x20" b"\x66\xef" b"\xf4"
"""mov dx, 0xb004; mov ax, 1 << 13; out dx, ax; hlt: soft off."""
FAIL = b"\x0f\x0b"
"""ud2, without an IDT: a triple fault."""


def mov(register: int, value: int) -> bytes:
    return bytes((0xB8 + register,)) + struct.pack("<I", value)


def load(address: int) -> bytes:
    return b"\xa1" + struct.pack("<I", address)


def store(address: int) -> bytes:
    return b"\xa3" + struct.pack("<I", address)


def expect(value: int) -> bytes:
    """cmp eax, value; je past a ud2."""
    return b"\x3d" + struct.pack("<I", value) + b"\x74\x02" + FAIL


def paging(root: int) -> bytes:
    """CR3, then CR0.PG."""
    return mov(0, root) + b"\x0f\x22\xd8" b"\x0f\x20\xc0" b"\x0d\0\0\0\x80" b"\x0f\x22\xc0\x90\x90"


class Host:
    def __init__(self) -> None:
        self.memory = Memory(64 << 20)
        clock = RealClock()
        self.cpu = UnicornX86(self.memory, clock, 0)
        topology = Topology.parse("nodes=1,sockets=1,cores=1,threads=1")
        self.hv = Hypervisor(self.memory, clock, topology, [self.cpu], verbose=True)
        self.privcmd = PrivCmd(self.hv)
        self.hv.start()

    def start(self, code: bytes, vcpus: int = 1) -> int:
        privcmd = self.privcmd
        domid = privcmd.domain_create(bytes(16), max_vcpus=vcpus, kind="pvh")
        privcmd.max_mem(domid, 8192)
        privcmd.populate_physmap(domid, range(512))
        privcmd.write_physical(domid, ENTRY, code)
        privcmd.vcpu_set_pvh_start(domid, ENTRY, 0x1000)
        privcmd.domain_unpause(domid)
        return domid

    def destroy(self, domid: int) -> None:
        while not domain_kill(self.hv.domains[domid]):
            pass

    def run(self, code: bytes, vcpus: int = 1) -> DomainInfo:
        domid = self.start(code, vcpus)
        for _ in range(2000):
            info = self.privcmd.domain_info(domid)
            assert info is not None
            if info.shutdown:
                self.info = self.privcmd.paging_allocation(domid)
                self.destroy(domid)
                return info
            time.sleep(0.005)
        registers = self.privcmd.vcpu_hvm_context(domid)
        raise AssertionError(f"it runs for ever, at {registers.gpr[16]:#x}")


@pytest.fixture(scope="module")
def host() -> Iterator[Host]:
    host = Host()
    yield host
    host.hv.stop()
    host.memory.close()


def off(info: DomainInfo) -> bool:
    return info.shutdown_code == 0 and not info.crash_reason


def test_a_hole_reads_as_ones_and_takes_anything(host: Host) -> None:
    code = b""
    for address in (0xF0000000, 0xF0000FFC, 0x80000000, 0xFEC00000):
        code += load(address) + expect(0xFFFFFFFF) + store(address) + load(address) + expect(0xFFFFFFFF)
    assert off(host.run(code + OFF))


def test_across_the_end_of_memory(host: Host) -> None:
    """An access with one half in RAM and the other in a hole."""
    assert off(host.run(mov(0, 0) + store(0x1FFFFC) + load(0x1FFFFE) + expect(0xFFFF0000) + OFF))


def test_a_copy_between_holes(host: Host) -> None:
    """REP MOVSD from one hole into another, over page ends."""
    code = mov(6, 0xF0000FF0) + mov(7, 0xE0000FF0) + mov(1, 64) + b"\xf3\xa5" + OFF
    assert off(host.run(code))


def test_thousands_of_holes(host: Host) -> None:
    """mov ebx, 0x10000000; 1: mov eax, [ebx]; add ebx, 0x10000; cmp ebx, 0xf0000000; jb 1b"""
    before = host.hv.allocator.free_frames
    code = mov(3, 0x10000000) + b"\x8b\x03\x81\xc3\x00\x00\x01\x00\x81\xfb\x00\x00\x00\xf0\x72\xf0"
    info = host.run(code + OFF)
    assert off(info)
    assert host.info[1] < 64  # frames of tables
    assert host.hv.allocator.free_frames == before


def test_the_local_apic_is_there(host: Host) -> None:
    code = load(0xFEE00030) + expect(0x50014) + mov(0, 0x1FF) + store(0xFEE000F0) + load(0xFEE000F0) + expect(0x1FF)
    assert off(host.run(code + OFF))


def test_hypercalls_by_either_instruction(host: Host) -> None:
    for instruction in (b"\x0f\x01\xc1", b"\x0f\x01\xd9"):
        code = mov(3, 0) + mov(1, 0) + mov(0, 17) + instruction + expect(4 << 16 | 6)
        assert off(host.run(code + OFF))


@pytest.mark.parametrize(("code", "says"), [
    (paging(0xF0000000), "page tables"), (paging(0xFEE00000), ""), (mov(0, 0xF0000000) + b"\xff\xe0", "executes"),
    (mov(0, 0xFEE00000) + b"\xff\xe0", ""),
    (mov(4, 0xF0000800) + b"\x50\x58" + FAIL, ""), (mov(4, 0xFEE00800) + b"\x50\x58" + FAIL, ""),
    (FAIL, "Triple fault"), (b"\xcd\x80", "Triple fault"), (b"\x0f\x01\x1d\0\0\0\xf0" + b"\xcd\x20", ""),
    (mov(4, 0xFEE00800) + b"\xb8\0\0\0\0\xcc", ""), (b"\x0f\x01\x15\0\0\xe0\xfe" + b"\xea\0\0\0\0\x08\0", ""),
    (b"\xb8\x18\0\0\0\x0f\x00\xd8", ""),
])
def test_devices_and_holes_as_memory_end_their_domain(host: Host, code: bytes, says: str) -> None:
    """Page tables, code, stacks, descriptor tables where no memory is; faults nobody takes. One line says so, and the
    next domain finds the host as it was."""
    host.privcmd.console_ring(clear=True)
    info = host.run(code + OFF)
    log = host.privcmd.console_ring()
    assert info.shutdown_code in (0, 1, 3)
    if says:
        assert info.shutdown_code != 0
        assert says in log, log
    elif info.shutdown_code:
        assert f"d{info.domid}" in log, log
    assert "internal error" not in log
    assert "Traceback" not in log
    assert off(host.run(OFF))


def test_interrupts_off_and_halted_is_off(host: Host) -> None:
    assert off(host.run(b"\xfa\xf4"))


def test_a_loop_without_interrupts_does_not_hold_anyone_up(host: Host) -> None:
    domid = host.start(b"\xfa\xeb\xfe")
    assert off(host.run(OFF))
    info = host.privcmd.domain_info(domid)
    assert info is not None
    assert not info.shutdown
    host.destroy(domid)


def test_a_second_vcpu_by_init_and_sipi(host: Host) -> None:
    """Real mode at 0x8000: mov ax, 0; mov ds, ax; mov word [0x9000], 0x1234; cli; hlt. The first waits for it."""
    trampoline = b"\x31\xc0\x8e\xd8\xc7\x06\x00\x90\x34\x12\xfa\xf4"
    code = b""
    for at in range(0, len(trampoline), 4):
        code += mov(0, int.from_bytes(trampoline[at : at + 4], "little")) + store(0x8000 + at)
    for register, value in ((0x310, 2 << 24), (0x300, 0xC500), (0x300, 0x4608)):
        code += mov(0, value) + store(0xFEE00000 + register)
    code += b"\xf3\x90" + load(0x9000) + b"\x3d\x34\x12\0\0\x75\xf2"
    assert off(host.run(code + OFF, 2))


def test_log_dirty_under_the_engine(host: Host) -> None:
    """A guest that writes a page, halts with interrupts off; the bitmap has that page, and the next write too."""
    # 1: inc dword [0x50000]; mov [0x60000], eax; jmp 1b
    domid = host.start(b"\xff\x05\0\0\x05\0" + store(0x60000) + b"\xeb\xf3")
    privcmd = host.privcmd
    privcmd.log_dirty_enable(domid)
    for _ in range(3):
        deadline = time.monotonic() + 20
        seen: set[int] = set()
        while seen != {0x50, 0x60} and time.monotonic() < deadline:
            time.sleep(0.01)
            bitmap, _stats = privcmd.log_dirty_peek(domid, 512)
            seen = {n for n in range(512) if bitmap[n >> 3] >> (n & 7) & 1}
        assert seen == {0x50, 0x60}
        privcmd.log_dirty_clean(domid, 512)
    privcmd.log_dirty_disable(domid)
    host.destroy(domid)
