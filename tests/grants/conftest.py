# SPDX-License-Identifier: GPL-2.0-only
"""Two guests with grant tables, and page tables that are a dictionary."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from pyxen.abi import grant_table as abi
from pyxen.abi.grant_table import Gntmap, Gntst, Gtf
from pyxen.hypervisor import grant_table
from pyxen.hypervisor.domain import Domain
from pyxen.hypervisor.grant_table import GrantTable, do_grant_table_op
from pyxen.hypervisor.vcpu import Vcpu
from tests.events.fake_hypervisor import FakeCaller, FakeHypervisor

ARG = 0x1000
BAD_VA = 0xBAD000


class PageTables:
    """Stands for x86/pv/grant_map.py: what each vCPU's domain has mapped where."""

    def __init__(self) -> None:
        self.ptes: dict[tuple[int, int], tuple[int, int]] = {}

    def create(self, vcpu: Vcpu, addr: int, mfn: int, flags: int) -> int:
        if addr == BAD_VA:
            return Gntst.GENERAL_ERROR
        self.ptes[vcpu.domain.domid, addr] = mfn, flags & Gntmap.READONLY
        return Gntst.OKAY

    def replace(self, vcpu: Vcpu, addr: int, mfn: int, new_addr: int, flags: int) -> int:
        if self.ptes.get((vcpu.domain.domid, addr), (None, 0))[0] != mfn:
            return Gntst.GENERAL_ERROR
        del self.ptes[vcpu.domain.domid, addr]
        if new_addr:
            self.ptes[vcpu.domain.domid, addr] = self.ptes.pop((vcpu.domain.domid, new_addr))
        return Gntst.OKAY


class Grants:
    """Two guests (domids 1 and 2) and dom0; frames 40..47 are d1's, 48..55 d2's."""

    def __init__(self) -> None:
        self.host = FakeHypervisor()
        self.tables = PageTables()
        self.one, self.two = self.host.create(1), self.host.create(2)
        for domain in (self.host.dom0, self.one, self.two):
            domain.grant_table = GrantTable(domain)
        for mfn in range(40, 48):
            self.host.frames.give(self.one, mfn)
            self.host.frames.give(self.two, mfn + 8)

    def grant(self, granter: Domain, ref: int, mfn: int, to: Domain, flags: int = 0) -> None:
        """Write an entry as the granter would."""
        word = Gtf.PERMIT_ACCESS | flags | to.domid << 16 | mfn << 32
        self.host.memory.q[granter.grant_table._word(ref)] = word

    def flags(self, granter: Domain, ref: int) -> Gtf:
        return granter.grant_table.entry(ref)[0]

    def op(self, caller: FakeCaller, cmd: int, data: bytes, count: int = 1) -> bytes:
        caller.write(ARG, data)
        assert do_grant_table_op(caller, cmd, ARG, count) == 0
        return caller.read(ARG, len(data))

    def map(self, mapper: Domain, granter: Domain, ref: int, *, va: int = 0x5000,
            flags: int = int(Gntmap.HOST_MAP)) -> tuple[int, int, int]:
        """status, handle, bus address."""
        data = abi.MAP_GRANT_REF.pack(va, flags, ref, granter.domid, 99, 0xFFFF, 0)
        *_, status, handle, bus = abi.MAP_GRANT_REF.unpack(self.op(FakeCaller(mapper), 0, data))
        return status, handle, bus

    def unmap(self, mapper: Domain, handle: int, *, va: int = 0x5000, bus: int = 0) -> int:
        data = abi.UNMAP_GRANT_REF.pack(va, bus, handle, 99)
        return int(abi.UNMAP_GRANT_REF.unpack(self.op(FakeCaller(mapper), 1, data))[3])

    def copy(self, caller: Domain, source: tuple[int, int, int], dest: tuple[int, int, int], length: int,
             flags: int) -> int:
        """Each end is (ref or mfn, domid, offset)."""
        data = abi.COPY.pack(*source, *dest, length, flags, 99)
        return int(abi.COPY.unpack(self.op(FakeCaller(caller), 5, data))[8])


@pytest.fixture
def grants(monkeypatch: pytest.MonkeyPatch) -> Grants:
    made = Grants()
    use_fake_page_tables(monkeypatch.setattr, made.tables)
    return made


def use_fake_page_tables(setattr_: Callable[[object, str, object], None], tables: PageTables) -> None:
    setattr_(grant_table, "create_grant_pv_mapping", tables.create)
    setattr_(grant_table, "replace_grant_pv_mapping", tables.replace)


def elsewhere(action: Callable[[], object]) -> None:
    """Run on another thread; its exception is the test's."""
    caught: list[BaseException] = []

    def run() -> None:
        try:
            action()
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if caught:
        raise caught[0]
