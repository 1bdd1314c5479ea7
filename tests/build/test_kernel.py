# SPDX-License-Identifier: GPL-2.0-only
"""Kernel files, good and hostile: whatever is wrong, one ImageError line and bounded memory."""

from __future__ import annotations

import bz2
import gzip
import lzma
import random
import shutil
import struct
import subprocess
import zlib

import lz4.block
import lzallright
import pytest
import zstandard
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pyxen.abi.elfnote import XenElfNote
from pyxen.errors import ImageError
from pyxen.toolstack.build import decompress as decompress_module
from pyxen.toolstack.build.decompress import compression, decompress
from pyxen.toolstack.build.kernel import load_kernel
from tests.build.make_elf import VIRT_BASE, Kernel, Load, bzimage, note, number, text, xen_kernel, xen_notes

BODY = random.Random(4).randbytes(150_000) + b"all work and no play " * 40_000
ELF = xen_kernel(loads=[Load(0x100000, BODY)])


def sized(stream: bytes, data: bytes = ELF) -> bytes:
    return stream + struct.pack("<I", len(data))


def lz4_legacy(data: bytes) -> bytes:
    out = struct.pack("<I", 0x184C2102)
    for i in range(0, len(data), 8 << 20):
        block = lz4.block.compress(data[i : i + (8 << 20)], store_size=False)
        out += struct.pack("<I", len(block)) + block
    return out


def lzop(data: bytes, block_size: int = 256 << 10, flags: int = 1) -> bytes:
    """What lzop writes, with its block checksums (flags & 1)."""
    name = b"vmlinux"
    header = struct.pack(">HHHBBIIIIB", 0x1030, 0x20A0, 0x0940, 1, 5, flags, 0o644, 0, 0, len(name))
    out = b"\x89LZO\0\r\n\x1a\n" + header + name + bytes(4)
    for i in range(0, len(data), block_size):
        raw = data[i : i + block_size]
        packed = lzallright.LZOCompressor().compress(raw)
        packed = packed if len(packed) < len(raw) else raw
        out += struct.pack(">II", len(raw), len(packed))
        out += struct.pack(">I", zlib.adler32(raw)) if flags & 1 else b""
        out += packed
    return out + bytes(4)


PAYLOADS = {
    "gzip": gzip.compress(ELF, 1),
    "bzip2": sized(bz2.compress(ELF, 1)),
    "xz": sized(
        lzma.compress(
            ELF,
            check=lzma.CHECK_CRC32,
            filters=[{"id": lzma.FILTER_X86}, {"id": lzma.FILTER_LZMA2, "preset": 1}],
        )
    ),
    "lzma": sized(lzma.compress(ELF, format=lzma.FORMAT_ALONE, preset=1)),
    "lzo": sized(lzop(ELF)),
    "lz4": sized(lz4_legacy(ELF)),
    "zstd": sized(zstandard.ZstdCompressor(write_content_size=False).compress(ELF)),
    "none": ELF,
}


@pytest.mark.parametrize("name", PAYLOADS)
def test_bzimage_with_every_compression_linux_knows(name: str) -> None:
    image = load_kernel(bzimage(PAYLOADS[name]))
    assert bytes(image.segments[0].data) == BODY
    assert image.parms.entry == VIRT_BASE + 0x100000


def test_plain_and_gzipped_elf() -> None:
    for data in (ELF, gzip.compress(ELF, 1)):
        image = load_kernel(data)
        assert (image.start, image.end) == (0x100000, 0x100000 + len(BODY))


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("lzo", ["lzop", "-9", "-c"]),
        ("lz4", ["lz4", "-l", "-9", "-c"]),
        ("zstd", ["zstd", "-19", "-c"]),
        ("xz", ["xz", "--check=crc32", "--x86", "--lzma2=preset=1", "-c"]),
        ("lzma", ["xz", "--format=lzma", "-1", "-c"]),
        ("bzip2", ["bzip2", "-c"]),
        ("gzip", ["gzip", "-n", "-c"]),
    ],
)
def test_streams_of_the_real_compressors(name: str, command: list[str]) -> None:
    """The kernel build pipes vmlinux through exactly these programs."""
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    stream = subprocess.run(command, input=ELF, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, check=True).stdout
    assert compression(stream) == name
    assert decompress(stream) == ELF


@pytest.mark.parametrize("name", [name for name in PAYLOADS if name != "none"])
def test_truncated_or_flipped_payload_is_one_line(name: str) -> None:
    payload = PAYLOADS[name]
    rng = random.Random(name)
    for cut in (9, len(payload) // 3, len(payload) - 9):
        with pytest.raises(ImageError):
            load_kernel(bzimage(payload[:cut] + payload[-4:]))
    for _ in range(20):
        damaged = bytearray(payload)
        damaged[rng.randrange(len(payload))] ^= 1 << rng.randrange(8)
        try:
            load_kernel(bzimage(bytes(damaged)))
        except ImageError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("name", [name for name in PAYLOADS if name != "none"])
def test_a_bomb_stops_at_the_limit(name: str) -> None:
    """A payload that unpacks to more than its trailer says is refused, and never unpacked whole."""
    stream = PAYLOADS[name] if name == "gzip" else PAYLOADS[name][:-4]
    with pytest.raises(ImageError, match="more than 50000 bytes|too large"):
        decompress(stream, 50_000)
    if name != "gzip":
        with pytest.raises(ImageError, match="more than 50000 bytes|too large"):
            load_kernel(bzimage(stream + struct.pack("<I", 50_000)))
        with pytest.raises(ImageError, match="should unpack"):
            load_kernel(bzimage(stream + struct.pack("<I", len(ELF) + 1)))
        with pytest.raises(ImageError, match="absurd"):
            load_kernel(bzimage(stream + b"\xff\xff\xff\xff"))


def test_lzop_blocks_are_checked() -> None:
    good = lzop(ELF)
    assert decompress(lzop(ELF, flags=0)) == ELF
    start = good.index(b"vmlinux") + 11
    huge = bytearray(good)
    struct.pack_into(">I", huge, start, 0x7FFFFFFF)
    with pytest.raises(ImageError, match="absurd block size"):
        decompress(bytes(huge))
    wrong = bytearray(good)
    wrong[start + 8] ^= 1  # its checksum
    with pytest.raises(ImageError, match="damaged"):
        decompress(bytes(wrong))


def test_lz4_frames_may_be_concatenated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decompress_module, "_LZ4_LEGACY_BLOCK", 1 << 20)
    assert decompress(lz4_legacy(b"one") + lz4_legacy(b"two")) == b"onetwo"


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty"),
        (b"#!/bin/sh\necho\n" * 100, "neither a bzImage nor an ELF"),
        (bzimage(PAYLOADS["gzip"])[:0x230], "truncated"),
        (bzimage(PAYLOADS["gzip"])[:5000], "truncated"),
        (bzimage(PAYLOADS["gzip"], protocol=0x207), "too old"),
        (bzimage(b"????????" * 9 + bytes(4)), "unknown compression"),
        (gzip.compress(b"not a kernel"), "neither"),
        (ELF[:40], "truncated"),
        (ELF[:2000], "truncated"),
        (ELF[:4] + b"\x01" + ELF[5:], "32-bit"),
        (ELF[:5] + b"\x02" + ELF[6:], "big-endian"),
        (Kernel(machine=183, notes=xen_notes(0)).build(), "another processor"),
        (Kernel(kind=1, notes=xen_notes(0)).build(), "not an executable"),
        (Kernel(loads=[], notes=xen_notes(0)).build(), "nothing to load"),
        (Kernel(loads=[Load(0, b"x" * 99, size=98)]).build(), "in memory"),
        (Kernel(loads=[Load((1 << 64) - 4096, b"x", size=8192)]).build(), "wraps"),
        (Kernel(loads=[Load(0, b"x", size=8192), Load(4096, b"x")]).build(), "overlap"),
        (Kernel(notes=note(1, b"12345678")[:-4] + b"").build(), "leaves its segment"),
        (Kernel(notes=note(0, b"") * 1025).build(), "more than 1024 notes"),
        (Kernel().build(), "not for Xen"),
        (Kernel(notes=xen_notes(5)).build(), "outside of the kernel"),
        (xen_kernel(note(XenElfNote.HYPERCALL_PAGE, b"xyz")), "3 bytes"),
        (xen_kernel(number(XenElfNote.HYPERCALL_PAGE, VIRT_BASE + 0x100001)), "hypercall page"),
        (xen_kernel(number(XenElfNote.HYPERCALL_PAGE, VIRT_BASE + 0x900000)), "hypercall page"),
        (xen_kernel(number(XenElfNote.INIT_P2M, VIRT_BASE)), None),
        (xen_kernel(number(XenElfNote.INIT_P2M, VIRT_BASE + 0x1000)), "INIT_P2M"),
        (xen_kernel(number(XenElfNote.INIT_P2M, 0xFFFF800000000000)), "INIT_P2M"),
        (xen_kernel(number(XenElfNote.VIRT_BASE, 0xFFFF800000000000)), "impossible address"),
        (xen_kernel(number(XenElfNote.PADDR_OFFSET, 0x200000)), "impossible address"),
        (xen_kernel(text(XenElfNote.LOADER, "grub")), "loader"),
        (xen_kernel(text(XenElfNote.XEN_VERSION, "xen-2.0")), "built for xen-2.0"),
        (xen_kernel(text(XenElfNote.FEATURES, "!teleport")), "unknown Xen feature 'teleport'"),
        (xen_kernel(text(XenElfNote.FEATURES, "!dom0")), "only as dom0"),
    ],
)
def test_bad_kernels_say_what_is_wrong(data: bytes, message: str | None) -> None:
    if message is None:
        load_kernel(data)  # 2 MiB aligned and below the kernel: fine
        return
    with pytest.raises(ImageError, match=message) as caught:
        load_kernel(data)
    assert "\n" not in str(caught.value)


def test_notes_are_decoded() -> None:
    image = load_kernel(
        xen_kernel(
            number(XenElfNote.HYPERCALL_PAGE, VIRT_BASE + 0x101000),
            number(XenElfNote.INIT_P2M, 1 << 39),
            note(XenElfNote.MOD_START_PFN, struct.pack("<I", 1)),
            text(XenElfNote.GUEST_OS, "tiny"),
            text(XenElfNote.FEATURES, "!writable_page_tables|pae_pgdir_above_4gb|from_the_future"),
            note(XenElfNote.SUPPORTED_FEATURES, struct.pack("<I", 0x8800)),
            note(XenElfNote.L1_MFN_VALID, struct.pack("<QQ", 1, 1)),
            number(999, 7),
        )
    )
    parms = image.parms
    assert (parms.virt_base, parms.virt_kstart) == (VIRT_BASE, VIRT_BASE + 0x100000)
    assert (parms.hypercall_page, parms.init_p2m, parms.mod_start_pfn) == (VIRT_BASE + 0x101000, 1 << 39, True)
    assert (parms.guest_os, parms.l1_mfn_valid) == ("tiny", ((1, 1),))
    assert (parms.features_supported, parms.features_required) == (0x8811, 1)


def test_segment_notes_win_over_section_notes_and_those_over_the_string() -> None:
    string = "LOADER=generic,XEN_VER=xen-3.0,VIRT_BASE=0x40000000,HYPERCALL_PAGE=0x101,FEATURES=pae_pgdir_above_4gb"
    legacy = Kernel(loads=[Load(0x40100000, bytes(8192))], xen_guest=string, entry=0x40100000)
    parms = load_kernel(legacy.build()).parms
    # ELF_PADDR_OFFSET defaults to VIRT_BASE here, and the hypercall page is a page number.
    assert (parms.virt_offset, parms.entry, parms.hypercall_page) == (0, 0x40100000, 0x40101000)
    assert load_kernel(legacy.build()).start == 0x100000
    sections = Kernel(notes=xen_notes(VIRT_BASE + 0x100010), notes_in_section=True, xen_guest=string)
    assert load_kernel(sections.build()).parms.entry == VIRT_BASE + 0x100010


SMALL = xen_kernel(number(XenElfNote.INIT_P2M, 1 << 39), text(XenElfNote.FEATURES, "!writable_page_tables"))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 399), st.integers(0, 255)), min_size=1, max_size=8), st.integers(0, 10_000))
@example([(56, 255), (57, 255)], 0)  # 65535 program headers
@example([(60, 255), (61, 255)], 0)  # 65535 sections
def test_no_header_byte_can_do_more_than_raise_image_error(edits: list[tuple[int, int]], cut: int) -> None:
    """Random header bytes: either a kernel whose segments lie inside of the file, or ImageError."""
    data = bytearray(SMALL)
    tail = len(data) - 400
    for position, value in edits:
        data[position if position < 200 else tail + position] = value
    try:
        image = load_kernel(bytes(data[: len(data) - cut] if cut < 300 else data))
    except ImageError:
        return
    for segment in image.segments:
        assert len(segment.data) <= segment.size
    assert 0 <= image.start < image.end
