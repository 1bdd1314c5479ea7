# SPDX-License-Identifier: GPL-2.0-only
"""A built guest, seen as it will see itself: through its own page tables, registers and start_info."""

from __future__ import annotations

import asyncio
import random
import struct
import time
from itertools import pairwise

import iced_x86
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyxen.abi.elfnote import XenElfNote
from pyxen.abi.xen import PAGE_SIZE, START_INFO, EvtchnPort, Hypercall, Sif
from pyxen.errors import ConfigError, ImageError, XenError
from pyxen.toolstack.build.kernel import KernelImage, load_kernel
from pyxen.toolstack.build.pv_builder import BuiltDomain, build
from pyxen.toolstack.build.pv_layout import plan
from pyxen.toolstack.build.pv_pages import hypercall_page
from tests.build.fake_machine import ADDRESS, DOMID, NX, SHARED_INFO_MFN, FakeMachine
from tests.build.make_elf import VIRT_BASE, Load, note, number, xen_kernel

RNG = random.Random(1)
TEXT = Load(0x100000, RNG.randbytes(9000), flags=5)
DATA = Load(0x103800, RNG.randbytes(3000), flags=6, size=50_000)
RAMDISK = RNG.randbytes(700_001)
P2M_VA = 1 << 39
OWN_P2M = number(XenElfNote.INIT_P2M, P2M_VA)
UNMAPPED_RAMDISK = note(XenElfNote.MOD_START_PFN, struct.pack("<I", 1))


def run_build(
    machine: FakeMachine, image: KernelImage, nr_pages: int, ramdisk: bytes | None = RAMDISK, cmdline: str = "quiet"
) -> BuiltDomain:
    return asyncio.run(
        build(machine, DOMID, image, ramdisk, cmdline, nr_pages, store_port=EvtchnPort(1), console_port=EvtchnPort(2))
    )


def kernel(*notes: bytes, loads: list[Load] | None = None) -> KernelImage:
    return load_kernel(xen_kernel(*notes, loads=loads or [TEXT, DATA]))


@pytest.mark.parametrize("run", [1 << 20, 77, 1000])
@pytest.mark.parametrize("notes", [(), (OWN_P2M,), (UNMAPPED_RAMDISK,), (OWN_P2M, UNMAPPED_RAMDISK)])
def test_guest_finds_everything_start_info_promises(run: int, notes: tuple[bytes, ...]) -> None:
    nr_pages = 4000
    machine = FakeMachine(6000, run=run)
    built = run_build(machine, kernel(*notes, number(XenElfNote.HYPERCALL_PAGE, VIRT_BASE + 0x102000)), nr_pages)
    context = machine.context
    assert context is not None

    # Entry state: kernel text at RIP, a writable stack below RSP, start_info at RSI.
    assert context.rip == VIRT_BASE + 0x100000
    assert (context.cs, context.ss, context.rflags) == (0xE033, 0xE02B, 0x200)
    assert machine.pte(context.gpr[4] - 8) & 2
    raw = machine.read(context.gpr[6], START_INFO.size)
    (magic, pages, shared_info, flags, store_mfn, store_port, console_mfn, console_port, pt_base, nr_pt, mfn_list, mod,
     mod_len, cmdline, first_p2m, nr_p2m) = START_INFO.unpack(raw)  # fmt: skip
    assert magic.rstrip(b"\0") == b"xen-3.0-x86_64"
    assert (pages, shared_info, cmdline.rstrip(b"\0")) == (nr_pages, SHARED_INFO_MFN * PAGE_SIZE, b"quiet")
    assert (store_mfn, store_port) == (built.store_gfn, 1)
    assert (console_mfn, console_port) == (built.console_gfn, 2)

    # The p2m list names the frames the M2P knows, in order.
    p2m = struct.unpack(f"<{nr_pages}Q", machine.read(mfn_list, nr_pages * 8))
    assert [machine.m2p[mfn] for mfn in p2m] == list(range(nr_pages))
    assert (mfn_list == P2M_VA) == (OWN_P2M in notes)

    # Kernel text, data and cleared bss, the hypercall page inside the text.
    text = machine.read(VIRT_BASE + TEXT.paddr, len(TEXT.data))
    assert text[:0x2000] == TEXT.data[:0x2000]
    assert machine.read(VIRT_BASE + 0x102000, PAGE_SIZE) == hypercall_page()
    assert machine.read(VIRT_BASE + DATA.paddr, 50_000) == DATA.data.ljust(50_000, b"\0")

    # The ramdisk: mapped, or by frame number.
    assert mod_len == len(RAMDISK)
    if UNMAPPED_RAMDISK in notes:
        assert flags == Sif.MOD_START_PFN
        frames = b"".join(machine.bytes[m * PAGE_SIZE : (m + 1) * PAGE_SIZE] for m in p2m[mod : mod + 171])
        assert frames[: len(RAMDISK)] == RAMDISK
    else:
        assert flags == 0
        assert machine.read(mod, len(RAMDISK)) == RAMDISK

    # Page tables: where start_info says, with the root first, readable and not writable.
    assert machine.pte(pt_base) & ADDRESS == context.ctrlreg[3] == built.l4_mfn * PAGE_SIZE
    bootstrap = {(machine.pte(pt_base + i * PAGE_SIZE) & ADDRESS) >> 12 for i in range(nr_pt)}
    if OWN_P2M in notes:
        assert bootstrap | set(p2m[first_p2m : first_p2m + nr_p2m]) >= machine.tables
        assert p2m[first_p2m] == (machine.pte(mfn_list) & ADDRESS) >> 12
    else:
        assert bootstrap == machine.tables
        assert (first_p2m, nr_p2m) == (0, 0)
    assert not any(machine.pte(pt_base + i * PAGE_SIZE) & 2 for i in range(nr_pt))

    # Rings are clear, upcalls masked on every vCPU.
    assert not any(machine.bytes[built.console_gfn * PAGE_SIZE : (built.console_gfn + 1) * PAGE_SIZE])
    shared = machine.bytes[SHARED_INFO_MFN * PAGE_SIZE : (SHARED_INFO_MFN + 1) * PAGE_SIZE]
    assert all(shared[vcpu * 64 + 1] == 1 for vcpu in range(32))

    # 512 KiB free after the stack, up to a 4 MiB boundary.
    mapped = built.layout.main.area.end
    assert mapped % 1024 == 0
    assert mapped - built.layout.boot_stack > 128


def test_code_is_executable_and_nothing_else() -> None:
    machine = FakeMachine(3000)
    built = run_build(machine, kernel(), 2048)
    layout = built.layout
    code = range(0x100, 0x103)
    for pfn in range(layout.main.area.end):
        assert bool(machine.pte(layout.va(pfn)) & NX) == (pfn not in code), hex(pfn)


def test_a_hypercall_page_outside_of_the_text_is_executable_too() -> None:
    image = kernel(number(XenElfNote.HYPERCALL_PAGE, VIRT_BASE + 0x105000))
    machine = FakeMachine(3000)
    run_build(machine, image, 2048)
    assert not machine.pte(VIRT_BASE + 0x105000) & NX
    assert machine.pte(VIRT_BASE + 0x106000) & NX


def test_a_kernel_of_one_rwx_segment_may_execute_everywhere() -> None:
    machine = FakeMachine(3000)
    built = run_build(machine, kernel(loads=[Load(0x100000, TEXT.data, flags=7)]), 2048)
    assert not any(machine.pte(built.layout.va(pfn)) & NX for pfn in range(2048))


def test_a_small_guest_maps_what_it_has() -> None:
    """An 800 KiB guest: the slack is cut at the end of memory."""
    machine = FakeMachine(3000)
    built = run_build(machine, kernel(loads=[Load(0, TEXT.data)]), 200, ramdisk=None)
    assert machine.pte(built.layout.va(199))
    assert machine.pte(built.layout.va(200)) == 0


@pytest.mark.parametrize("base", [0, 0x1000, 0x3FF000, 0x7F_FFFF_F000, 0xFFFF880000000000, 0xFFFFFFFF801FF000])
def test_any_page_may_be_the_base(base: int) -> None:
    image = kernel(number(XenElfNote.VIRT_BASE, base), number(XenElfNote.ENTRY, base + 0x100000))
    machine = FakeMachine(3000)
    built = run_build(machine, image, 2500)
    assert machine.read(base + 0x100000, 100) == TEXT.data[:100]
    assert built.layout.va(built.layout.main.area.end) % (4 << 20) == 0 or built.layout.main.area.end == 2500


@pytest.mark.parametrize("p2m_va", [0x200000, 0x7FFFFFE00000, 0xFFFF880000000000, 0xFFFFFFFF40000000, 0x40000000])
def test_the_p2m_list_may_share_upper_tables_with_the_main_map(p2m_va: int) -> None:
    base = 0x40000000 if p2m_va == 0x200000 else VIRT_BASE
    image = kernel(
        number(XenElfNote.VIRT_BASE, base),
        number(XenElfNote.ENTRY, base + 0x100000),
        number(XenElfNote.INIT_P2M, p2m_va),
    )
    machine = FakeMachine(6000, run=500)
    built = run_build(machine, image, 4000)
    p2m = struct.unpack("<4000Q", machine.read(p2m_va, 32000))
    assert [machine.m2p[mfn] for mfn in p2m] == list(range(4000))
    assert built.layout.p2m_map is not None


def refused(image: KernelImage, message: str, nr_pages: int = 2048, ramdisk: int = 0) -> None:
    with pytest.raises(ImageError, match=message):
        plan(image, nr_pages=nr_pages, ramdisk_bytes=ramdisk)


def test_what_does_not_fit_is_refused_before_anything_is_touched() -> None:
    refused(kernel(), "its kernel ends at 2 MiB", nr_pages=260)
    refused(kernel(), "its ramdisk ends at 10 MiB", nr_pages=2048, ramdisk=8 << 20)
    refused(kernel(OWN_P2M), "p2m list", nr_pages=1024)
    high = 0xFFFFFFFFFFC00000
    refused(kernel(number(XenElfNote.VIRT_BASE, high), number(XenElfNote.ENTRY, high + 0x100000)), "address space",
            ramdisk=4 << 20)
    refused(kernel(number(XenElfNote.VIRT_BASE, VIRT_BASE + 8), number(XenElfNote.ENTRY, VIRT_BASE + 0x100008)),
            "not page-aligned")
    refused(kernel(number(XenElfNote.INIT_P2M, VIRT_BASE + 0x200000)), "no room")
    refused(kernel(number(XenElfNote.INIT_P2M, (1 << 47) - (2 << 20))), "no room", nr_pages=600_000)
    huge = load_kernel(xen_kernel(loads=[Load(0x100000, b"x", size=1 << 30)]))
    refused(huge, "its kernel ends at 1025 MiB")
    machine = FakeMachine(3000)
    with pytest.raises(ConfigError, match="1024 bytes"):
        run_build(machine, kernel(), 2048, cmdline="é" * 512)
    with pytest.raises(ImageError):
        run_build(machine, kernel(), 260)
    assert not machine.m2p


def test_out_of_machine_memory_is_the_hypervisors_error() -> None:
    with pytest.raises(XenError) as caught:
        run_build(FakeMachine(1000), kernel(), 2048)
    assert caught.value.errno == 12


def test_hypercall_page_disassembles_as_the_abi_says() -> None:
    page = hypercall_page()
    formatter = iced_x86.Formatter(iced_x86.FormatterSyntax.NASM)
    for number_ in (0, 1, Hypercall.IRET, 63, 127):
        decoder = iced_x86.Decoder(64, page[number_ * 32 : number_ * 32 + 32])
        text = []
        for instruction in decoder:
            if instruction.code == iced_x86.Code.INT3:
                break
            text.append(formatter.format(instruction))
        load = formatter.format(iced_x86.Instruction.create_reg_u32(iced_x86.Code.MOV_R32_IMM32, iced_x86.Register.EAX,
                                                                    number_))
        if number_ == Hypercall.IRET:
            assert text == ["push rcx", "push r11", "push rax", load, "syscall"]
        else:
            assert text == ["push rcx", "push r11", load, "syscall", "pop r11", "pop rcx", "ret"]


def test_other_tasks_run_while_a_guest_is_built() -> None:
    """No stretch of work without a look at the event loop is long: ticks keep coming."""
    machine = FakeMachine(20_000)
    image = load_kernel(xen_kernel(loads=[Load(0x100000, bytes(24 << 20))]))
    ticks = 0

    async def ticker() -> None:
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    async def both() -> None:
        task = asyncio.create_task(ticker())
        await build(machine, DOMID, image, None, "", 16_384, store_port=EvtchnPort(1), console_port=EvtchnPort(2))
        task.cancel()

    asyncio.run(both())
    assert ticks > 10


def test_cancelled_anywhere_it_holds_no_mapping() -> None:
    image = kernel()
    for after in range(40):
        machine = FakeMachine(3000)

        async def cancelled(machine: FakeMachine = machine, after: int = after) -> bool:
            task = asyncio.create_task(
                build(machine, DOMID, image, RAMDISK, "", 2048, store_port=EvtchnPort(1), console_port=EvtchnPort(2))
            )
            for _ in range(after):
                await asyncio.sleep(0)
            return task.cancel()

        if not asyncio.run(cancelled()):
            assert after > 5
            break
        assert machine.open_mappings == 0
        assert machine.context is None
    else:
        pytest.fail("the build never ended")


def test_a_256_mib_guest_builds_quickly() -> None:
    """150 ms are promised (docs/design.md); the machine may be busy, hence the CPU clock and the margin."""

    class Sink(FakeMachine):
        def validate(self, l4: int) -> None:
            """The hypervisor's part, not the builder's."""

    image = load_kernel(xen_kernel(OWN_P2M, UNMAPPED_RAMDISK, loads=[Load(16 << 20, bytes(50 << 20), 5), DATA]))
    machine = Sink(66_000)
    started = time.process_time()
    run_build(machine, image, 65_536)
    assert time.process_time() - started < 0.6


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 400), st.integers(0, 900), st.integers(0, 600_000), st.booleans(), st.booleans(),
    st.sampled_from([0, 0x1000, 0xFFFF880000000000, VIRT_BASE]), st.integers(0, 3000),
)
def test_layout_areas_never_overlap(
    run: int, kernel_pages: int, ramdisk: int, own: bool, unmapped: bool, base: int, extra: int
) -> None:
    notes = [number(XenElfNote.VIRT_BASE, base), number(XenElfNote.ENTRY, base + 0x100000)]
    notes += [OWN_P2M] if own else []
    notes += [UNMAPPED_RAMDISK] if unmapped else []
    image = kernel(*notes, loads=[Load(0x100000, b"x", size=kernel_pages * PAGE_SIZE + 1)])
    nr_pages = 300 + kernel_pages + extra
    try:
        layout = plan(image, nr_pages=nr_pages, ramdisk_bytes=ramdisk)
    except ImageError:
        return
    spans = [(a.pfn, a.end) for a in (layout.kernel, layout.page_tables, layout.p2m_with_tables)]
    spans += [(pfn, pfn + 1) for pfn in (layout.start_info, layout.xenstore, layout.console, layout.boot_stack)]
    if layout.ramdisk is not None:
        spans.append((layout.ramdisk.pfn, layout.ramdisk.end))
    spans.sort()
    assert all(a[1] <= b[0] for a, b in pairwise(spans))
    assert spans[-1][1] <= nr_pages
    machine = FakeMachine(nr_pages + nr_pages // run + 50, run=run)
    run_build(machine, image, nr_pages, ramdisk=bytes(ramdisk))
