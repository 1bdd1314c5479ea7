# SPDX-License-Identifier: GPL-2.0-only
"""A built PVH guest, seen as it will see itself: from its registers to start_info and everything that points to."""

from __future__ import annotations

import asyncio
import random
import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyxen.abi.elfnote import XenElfNote
from pyxen.abi.hvm.params import HvmParam
from pyxen.abi.xen import PAGE_SIZE, EvtchnPort
from pyxen.errors import ConfigError, ImageError, XenError
from pyxen.toolstack.build import acpi
from pyxen.toolstack.build.kernel import PvhImage, load_kernel, load_pvh_kernel
from pyxen.toolstack.build.pvh_builder import BuiltPvhDomain, build
from pyxen.toolstack.build.pvh_layout import plan
from tests.build.fake_pvh import DOMID, FakePvh
from tests.build.make_elf import Kernel, Load, bzimage, note, number, pvh_kernel, text, xen_kernel
from tests.build.test_acpi import walk

RNG = random.Random(3)
TEXT = Load(0x1000000, RNG.randbytes(9000), flags=5)
DATA = Load(0x1003800, RNG.randbytes(3000), flags=6, size=50_000)
RAMDISK = RNG.randbytes(700_001)
MIB = 256  # pages
OLD_LINUX = (text(XenElfNote.GUEST_OS, "linux"),)
NEW_LINUX = (*OLD_LINUX, number(XenElfNote.SUPPORTED_FEATURES, 1 << 15))


def run_build(
    machine: FakePvh, image: PvhImage, nr_pages: int, ramdisk: bytes | None = RAMDISK, cmdline: str = "quiet",
    vcpus: int = 3,
) -> BuiltPvhDomain:  # fmt: skip
    return asyncio.run(
        build(machine, DOMID, image, ramdisk, cmdline, nr_pages, vcpus=vcpus, store_port=EvtchnPort(1),
              console_port=EvtchnPort(2))
    )  # fmt: skip


def kernel(*notes: bytes, bits: int = 64, loads: list[Load] | None = None) -> PvhImage:
    return load_pvh_kernel(pvh_kernel(*notes, loads=loads or [TEXT, DATA], bits=bits))


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("notes", [(), OLD_LINUX, NEW_LINUX])
@pytest.mark.parametrize("run", [1 << 40, 77, 1000])
def test_guest_finds_everything_start_info_promises(run: int, notes: tuple[bytes, ...], bits: int) -> None:
    nr_pages = 32 * MIB
    machine = FakePvh(run=run)
    built = run_build(machine, kernel(*notes, bits=bits), nr_pages)

    assert machine.start is not None
    entry, start_info = machine.start
    assert entry == TEXT.paddr
    magic, version, flags, modules, modlist, cmdline, rsdp, memmap, entries = struct.unpack(
        "<IIIIQQQQI4x", machine.read(start_info, 56)
    )
    assert (magic, version, flags, modules) == (0x336EC578, 1, 0, 1)
    assert machine.text(cmdline) == b"quiet"
    start, size, module_cmdline, reserved = struct.unpack("<QQQQ", machine.read(modlist, 32))
    assert (size, module_cmdline, reserved) == (len(RAMDISK), 0, 0)
    assert start % PAGE_SIZE == 0
    assert machine.read(start, size) == RAMDISK

    # The memory map: as hypercall and start_info say it, ascending, apart, and true.
    told = [struct.unpack("<QQI4x", machine.read(memmap + 24 * i, 24)) for i in range(entries)]
    assert told == machine.memory_map
    assert all(a + size <= b for (a, size, _), (b, _, _) in pairwise(told))
    assert sum(size for _, size, kind in told if kind == 1) // PAGE_SIZE in (nr_pages, nr_pages - 1)
    assert {gfn for a, size, _ in told for gfn in range(a >> 12, a + size >> 12)} == {
        gfn for first, size in machine.runs for gfn in range(first, first + size)
    }

    # ACPI: the RSDP where this kernel looks, and it and the tables are in memory of type 3.
    assert rsdp == (0xFFFC0 if notes == OLD_LINUX else 0xFC000000)
    tables = acpi.AcpiTables(machine.read(rsdp, 36), machine.read(0xFC000040, machine.runs[-2][1] * 4096 - 64))
    assert walk(tables)["APIC"].count(bytes((0, 8))) >= 3
    for address in (rsdp, 0xFC000040):
        assert any(a <= address < a + size for a, size, kind in told if kind == 3)

    # Kernel text, data and cleared bss.
    assert machine.read(TEXT.paddr, len(TEXT.data)) == TEXT.data
    assert machine.read(DATA.paddr, 50_000) == DATA.data.ljust(50_000, b"\0")

    # The rings: inside reserved memory, clear, and told by parameters.
    assert machine.params == {
        HvmParam.STORE_PFN: built.store_gfn, HvmParam.STORE_EVTCHN: 1,
        HvmParam.CONSOLE_PFN: built.console_gfn, HvmParam.CONSOLE_EVTCHN: 2,
    }  # fmt: skip
    assert (built.store_gfn, built.console_gfn) == (0xFEFFC, 0xFEFFF)  # a real guest's (oracle: xenstore-ls)
    for gfn in (built.store_gfn, built.console_gfn):
        assert not any(machine.page(gfn))
        assert any(a <= gfn << 12 < a + size for a, size, kind in told if kind == 2)
    assert machine.open_mappings == 0


def test_big_guests_have_the_rest_of_their_memory_above_the_hole() -> None:
    low, nr_pages = 0xFC000, 20 << 18  # 20 GiB
    machine = FakePvh()
    built = run_build(machine, kernel(), nr_pages)
    ram = [(a, size) for a, size, kind in machine.memory_map if kind == 1]
    assert ram == [(0, low << 12), (1 << 32, (nr_pages - low) << 12)]
    assert machine.owns(low - 1) and not machine.owns(0xFEE00) and machine.owns((1 << 20) + nr_pages - low - 1)
    assert not machine.owns((1 << 20) + nr_pages - low)
    assert built.layout.start_info < 1 << 32


@pytest.mark.parametrize("nr_pages", [0xFC000 - 1, 0xFC000, 0xFC000 + 1])
def test_the_hole_begins_where_the_tables_lie(nr_pages: int) -> None:
    layout = plan(kernel(), nr_pages=nr_pages, acpi_bytes=1000)
    assert sum(area.pages for area in layout.ram) == nr_pages
    assert layout.ram[0].end <= 0xFC000
    assert len(layout.ram) == (1 if nr_pages <= 0xFC000 else 2)


def test_without_a_ramdisk_there_is_no_module() -> None:
    machine = FakePvh()
    run_build(machine, kernel(), 32 * MIB, ramdisk=None, cmdline="")
    assert machine.start is not None
    _, _, _, modules, modlist, cmdline = struct.unpack_from("<IIIIQQ", machine.read(machine.start[1], 56))
    assert (modules, modlist) == (0, 0)
    assert machine.text(cmdline) == b""


def test_a_kernel_in_the_bios_area_keeps_it() -> None:
    low = Load(0x90000, bytes(0x80000))
    layout = plan(kernel(*OLD_LINUX, loads=[low]), nr_pages=16 * MIB, acpi_bytes=1000)
    assert layout.rsdp == 0xFC000000


@given(st.integers(1, 40 * MIB), st.integers(0, 20 << 20), st.integers(0, 4095), st.booleans())
def test_nothing_overlaps_or_leaves_memory(nr_pages: int, ramdisk: int, cmdline: int, old: bool) -> None:
    image = kernel(*(OLD_LINUX if old else ()))
    try:
        layout = plan(image, nr_pages=nr_pages, ramdisk_bytes=ramdisk, cmdline_bytes=cmdline, acpi_bytes=5000)
    except ImageError as error:
        assert "too little" in str(error)
        assert error.hint == "raise memory= in its configuration"
        return
    parts = [(segment.paddr, segment.size) for segment in image.elf.segments]
    parts += [(layout.ramdisk, ramdisk)] if layout.ramdisk is not None else []
    parts += [(layout.start_info, 56), (layout.memmap, 24 * len(layout.memory_map)), (layout.cmdline, cmdline + 1)]
    parts += [(layout.modlist, 32)] if layout.ramdisk is not None else []
    parts += [(layout.rsdp, 36)]
    parts.sort()
    assert all(a + size <= b for (a, size), (b, _) in pairwise(parts))
    usable = [(a, size) for a, size, kind in layout.memory_map if kind in (1, 3)]
    assert all(any(a <= at and at + size <= a + length for a, length in usable) for at, size in parts)


def test_what_does_not_fit_is_said_before_anything_is_touched() -> None:
    machine = FakePvh()
    with pytest.raises(ImageError, match="8 MiB of memory are too little for this guest: its kernel ends at 17 MiB"):
        run_build(machine, kernel(), 8 * MIB)
    with pytest.raises(ImageError, match="its ramdisk ends at 18 MiB"):
        run_build(machine, kernel(), 17 * MIB, ramdisk=RAMDISK * 2)
    with pytest.raises(ImageError, match="in the hole below 4 GiB"):
        run_build(machine, kernel(loads=[Load(0xFBFFF000, bytes(0x2000))]), 8 << 18)
    with pytest.raises(ImageError, match="start info ends at 0xfc.*in the hole"):
        run_build(machine, kernel(loads=[Load(0xFBFFF000, bytes(0x1000))]), 8 << 18, ramdisk=None)
    for wrong in ("x" * 4096, "a\0b"):
        with pytest.raises(ConfigError, match="command line"):
            run_build(machine, kernel(), 32 * MIB, cmdline=wrong)
    assert machine.given == 0
    with pytest.raises(XenError):
        run_build(FakePvh(frames=4000), kernel(), 32 * MIB)


def test_a_build_can_be_cancelled_between_any_two_chunks() -> None:
    async def at(step: int) -> bool:
        machine = FakePvh()
        task = asyncio.ensure_future(
            build(machine, DOMID, kernel(), bytes(9 << 20), "", 64 * MIB, vcpus=1, store_port=EvtchnPort(1),
                  console_port=EvtchnPort(2))
        )  # fmt: skip
        for _ in range(step):
            await asyncio.sleep(0)
        task.cancel()
        done = (await asyncio.gather(task, return_exceptions=True))[0]
        assert machine.open_mappings == 0
        if not isinstance(done, asyncio.CancelledError):
            assert machine.start is not None
            return True
        assert machine.start is None
        return False

    steps = 0
    while not asyncio.run(at(steps)):
        steps += 1
    assert steps > 12  # memory in 16 MiB, the ramdisk in 4 MiB pieces


# --- kernels -----------------------------------------------------------------------------------------------------


def test_pvh_takes_32_bit_kernels_and_pv_says_that_pvh_does() -> None:
    data = pvh_kernel(bits=32)
    assert load_pvh_kernel(data).parms.entry == 0x100000
    assert load_pvh_kernel(bzimage(data)).elf.segments[0].data == bytes(range(256)) * 32
    with pytest.raises(ImageError, match="32-bit") as caught:
        load_kernel(data)
    assert 'type = "pvh"' in (caught.value.hint or "")


def test_note_is_found_in_sections_too_and_as_8_or_4_bytes() -> None:
    for desc in (struct.pack("<I", 0x100010), struct.pack("<Q", 0x100010)):
        for bits, machine in ((32, 3), (64, 62)):
            made = Kernel(notes=note(18, desc), notes_in_section=True, bits=bits, machine=machine)
            assert load_pvh_kernel(made.build()).parms.entry == 0x100010


def test_a_kernel_without_the_note_names_the_alternative() -> None:
    with pytest.raises(ImageError, match="no PHYS32_ENTRY note") as caught:
        load_pvh_kernel(xen_kernel())
    assert caught.value.hint == 'it has a PV entry: use type = "pv"'
    legacy = Kernel(xen_guest="GUEST_OS=linux,XEN_VER=xen-3.0,VIRT_BASE=0x80000000")
    with pytest.raises(ImageError, match="no PHYS32_ENTRY note") as caught:
        load_pvh_kernel(legacy.build())
    assert caught.value.hint == 'it has a PV entry: use type = "pv"'
    with pytest.raises(ImageError, match="no PHYS32_ENTRY note") as caught:
        load_pvh_kernel(Kernel().build())
    assert "CONFIG_PVH" in (caught.value.hint or "") and 'type = "pv"' in (caught.value.hint or "")


@pytest.mark.parametrize("entry", [0, 0xFFFFF, 0x102000, 0xFFFFFFFF, 1 << 40])
def test_an_entry_outside_of_the_kernel_is_refused(entry: int) -> None:
    with pytest.raises(ImageError, match="outside of the kernel"):
        load_pvh_kernel(pvh_kernel(entry=entry))


def test_a_kernel_above_4_gib_is_refused() -> None:
    made = Kernel(loads=[Load(1 << 32, bytes(4096))], notes=note(18, struct.pack("<Q", 1 << 32)))
    with pytest.raises(ImageError, match="outside of the kernel"):
        load_pvh_kernel(made.build())


def test_dom0_kernels_and_damaged_notes_are_refused() -> None:
    with pytest.raises(ImageError, match="dom0"):
        load_pvh_kernel(pvh_kernel(text(XenElfNote.FEATURES, "!dom0|hvm_callback_vector")))
    with pytest.raises(ImageError, match="PHYS32_ENTRY has 3 bytes"):
        load_pvh_kernel(Kernel(notes=note(18, b"abc")).build())
    with pytest.raises(ImageError, match="another processor"):
        load_pvh_kernel(Kernel(bits=32, machine=62, notes=note(18, bytes(4))).build())
    with pytest.raises(ImageError, match="another processor"):
        load_pvh_kernel(Kernel(bits=64, machine=3, notes=note(18, bytes(4))).build())


@given(st.data())
def test_a_damaged_32_bit_kernel_is_one_error_line(data: st.DataObject) -> None:
    image = bytearray(pvh_kernel(bits=32))
    for _ in range(data.draw(st.integers(1, 4))):
        image[data.draw(st.integers(4, 200))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(image)))
    try:
        load_pvh_kernel(bytes(image[: len(image) - cut]))
    except ImageError as error:
        assert "\n" not in str(error)
