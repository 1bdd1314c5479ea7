# SPDX-License-Identifier: GPL-2.0-only
"""What no guest can be made of: one clear line, a hint at most, an exit code, and a host as it was before."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyxen.toolstack.config.paths import guest_dir
from tests.build.make_elf import Kernel, Load, bzimage, xen_kernel
from tests.e2e.place import Place
from tests.host.small_guests import config, write_kernel

pytestmark = [pytest.mark.guest, pytest.mark.engine, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """One host for all of them: what one leaves behind the next would see."""
    place = Place(tmp_path_factory.mktemp("bad") / "run")
    place.pyxen("host", "start", "--memory", "512M")
    yield place
    place.close()


def refused(place: Place, file: Path | str, *extra: str, words: str, code: int = 1) -> None:
    """``xl create`` of it fails in at most two lines (after xl's own first one), one with ``words``."""
    before = place.leftovers()
    done = place.xl("create", "-q", str(file), *extra, code=None)
    lines = done.stderr.splitlines()
    assert done.returncode == code, (done.returncode, done.stderr)
    assert done.stdout == ""
    assert re.search(words, lines[0], re.IGNORECASE), done.stderr
    assert len(lines) == 1 or (len(lines) == 2 and lines[1].startswith("hint: ")), done.stderr
    assert all(len(line) < 400 for line in lines)
    place.settled(before)


def write(folder: Path, kernel: Path | str, *lines: str) -> Path:
    file = folder / "vm.cfg"
    file.write_text("\n".join(['name = "vm"', f'kernel = "{kernel}"', "memory = 32", *lines]) + "\n")
    return file


ELF = xen_kernel()
ELF32 = bytes([*b"\x7fELF", 1, 1, 1]) + bytes(9) + struct.pack("<HHI", 2, 3, 1) + bytes(200)

IMAGES: dict[str, tuple[bytes, str]] = {
    "zero length": (b"", "empty|neither|not a kernel|too short|no kernel"),
    "zeros": (bytes(4096), "not a kernel|neither|no kernel"),
    "text": (b"#!/bin/sh\necho hello\n" * 100, "not a kernel|neither|no kernel"),
    "an ELF magic": (b"\x7fELF", "ELF"),
    "an ELF header cut": (ELF[:40], "ELF"),
    "program headers cut": (ELF[:100], "ELF|truncated|cut|short"),
    "a segment cut": (ELF[:4000], "ELF|truncated|cut|short|segment|end"),
    "no Xen notes": (Kernel().build(), "Xen|PV"),
    "32 bits": (ELF32, "32|64-bit|ELF"),
    "another machine": (Kernel(machine=183, notes=b"").build(), "machine|x86"),
    "an entry nowhere": (Kernel(loads=[Load(0x100000, bytes(64))], entry=0).build(), "Xen|PV"),
    "a segment of 2^60 bytes": (xen_kernel(loads=[Load(0x100000, bytes(64), size=1 << 60)]), "impossible address"),
    "a bzImage of rubbish": (bzimage(b"rubbish" * 100), "kernel size|payload"),
    "a gzip cut": (bzimage(b"\x1f\x8b\x08\0" + bytes(30)), "gzip|compress|payload|corrupt"),
    "an LZ4 cut": (bzimage(b"\x02\x21\x4c\x18" + b"\xff\xff\xff\x00" + bytes(64)), "lz4|compress|payload"),
}


@pytest.mark.parametrize("name", IMAGES)
def test_kernels_that_are_none(shared: Place, tmp_path: Path, name: str) -> None:
    data, words = IMAGES[name]
    (tmp_path / "k").write_bytes(data)
    refused(shared, write(tmp_path, tmp_path / "k"), words=words)


@pytest.mark.parametrize("share", [0.001, 0.01, 0.3, 0.7, 0.999])
def test_debians_kernel_cut_short(shared: Place, tmp_path: Path, debian: Path, share: float) -> None:
    whole = (guest_dir("debian") / "vmlinuz").read_bytes()
    (tmp_path / "k").write_bytes(whole[: int(len(whole) * share)])
    refused(shared, write(tmp_path, tmp_path / "k"), words="kernel|payload|compress|truncated|lz4")


def test_kernels_that_cannot_be_read(shared: Place, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "fifo")
    with open(tmp_path / "huge", "wb") as file:
        file.truncate(1 << 40)
    cases = {
        "missing": "No such file or directory",
        "folder": "Is a directory",
        "fifo": "not a regular file",
        "huge": "larger than 1024 MiB",
        "/dev/zero": "not a regular file",
        "x" * 5000: "File name too long|longer",
        "folder/../missing/x": "No such file",
    }
    before = shared.leftovers()
    for kernel, words in cases.items():
        path = kernel if kernel.startswith("/") else f"{tmp_path}/{kernel}"
        done = shared.xl("create", "-q", str(write(tmp_path, path)), code=1)
        assert re.search(words, done.stderr.splitlines()[0]), done.stderr
        assert len(done.stderr.splitlines()) <= 2
        shared.settled(before)
    good = write_kernel(tmp_path / "k")
    refused(shared, write(tmp_path, good, f'ramdisk = "{tmp_path}/none"'), words="ramdisk .*No such file")
    refused(shared, write(tmp_path, good, f'ramdisk = "{tmp_path}/huge"'), words="ramdisk .*larger than")
    refused(shared, write(tmp_path, "guest:debian/../../x"), words="guest file")
    refused(shared, write(tmp_path, "guest:nothing/vmlinuz"), words="not there yet")


def test_a_kernel_that_only_root_may_read(shared: Place, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    good = write_kernel(tmp_path / "k")
    good.chmod(0)
    refused(shared, write(tmp_path, good), words="Permission denied")


def test_memory(shared: Place, tmp_path: Path, debian: Path) -> None:
    good = write_kernel(tmp_path / "k")
    free = shared.free_kib()
    refused(shared, write(tmp_path, good), "memory=8192", words=r"not enough memory .*\b[0-9]+ KiB are missing")
    done = shared.xl("create", "-q", str(write(tmp_path, good)), "memory=8192", code=1)
    numbers = re.search(r"([0-9]+) KiB are needed, ([0-9]+) KiB are free, ([0-9]+) KiB are missing", done.stderr)
    assert numbers is not None
    needed, said, missing = (int(number) for number in numbers.groups())
    assert (said, missing) == (free, needed - free)
    refused(shared, debian, "memory=16", words="memory")
    (tmp_path / "ramdisk").write_bytes(bytes(40 << 20))
    refused(shared, write(tmp_path, good, f'ramdisk = "{tmp_path}/ramdisk"'), words="memory|ramdisk")


CONFIGS: dict[str, tuple[str, str, int]] = {
    "empty": ("", "name|kernel", 1),
    "no kernel": ('name = "vm"\nmemory = 32\n', "kernel", 1),
    "no name": ('kernel = "/k"\n', "name", 1),
    "a name with a slash": ('name = "a/b"\nkernel = "/k"\n', "name", 1),
    "a very long name": (f'name = "{"x" * 300}"\nkernel = "/k"\n', "name", 1),
    "no memory": ('name = "vm"\nkernel = "/k"\nmemory = 0\n', "memory", 1),
    "negative memory": ('name = "vm"\nkernel = "/k"\nmemory = -5\n', "near `-5'", 1),
    "2^63 of memory": (f'name = "vm"\nkernel = "/k"\nmemory = {1 << 63}\n', "memory", 1),
    "no vcpus": ('name = "vm"\nkernel = "/k"\nvcpus = 0\n', "vCPU", 1),
    "a million vcpus": ('name = "vm"\nkernel = "/k"\nvcpus = 1000000\n', "vcpu", 1),
    "another type": ('name = "vm"\nkernel = "/k"\ntype = "hvm"\n', "hvm", 1),
    "an unknown type": ('name = "vm"\nkernel = "/k"\ntype = "vax"\n', "type|vax", 1),
    "an unknown action": ('name = "vm"\nkernel = "/k"\non_crash = "cry"\n', "on_crash|cry", 1),
    "an option of tomorrow": ('name = "vm"\nkernel = "/k"\ndisk = ["/a,raw,xvda,w"]\n', "disk", 1),
    "Domain-0": ('name = "Domain-0"\nkernel = "/k"\n', "already exists", 1),
    "an unknown mode": ('name = "vm"\nkernel = "/k"\npv_mode = "quick"\n', "pv_mode", 1),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_that_mean_nothing(shared: Place, tmp_path: Path, name: str) -> None:
    text, words, code = CONFIGS[name]
    (tmp_path / "vm.cfg").write_text(text)
    done = shared.xl("create", "-q", str(tmp_path / "vm.cfg"), code=None)
    assert done.returncode != 0
    assert re.search(words, done.stderr), done.stderr
    # xl's parser has its own words, several of them.
    assert len(done.stderr.splitlines()) <= 2 or done.stderr.endswith("Failed to parse config: Invalid argument\n")
    assert shared.names() == ["Domain-0"]
    assert code == 1


def test_configurations_that_are_none(shared: Place, tmp_path: Path) -> None:
    for data in (b"name = [", b'name = "unfinished', b"= = =\n", bytes(range(256)), b"[" * 100_000, b"\xff\xfe" * 50):
        (tmp_path / "vm.cfg").write_bytes(data)
        done = shared.xl("create", "-q", str(tmp_path / "vm.cfg"), code=1)
        assert done.stderr.splitlines()[-1] == "Failed to parse config: Invalid argument", done.stderr
        assert len(done.stderr) < 1500
    for path, code in ((tmp_path / "none.cfg", 3), (tmp_path, 3), ("/dev/zero", 3)):
        done = shared.xl("create", "-q", str(path), code=code)
        assert done.stderr.startswith("Failed to read config file: ")
        assert len(done.stderr.splitlines()) == 1


def test_a_name_in_use(shared: Place, tmp_path: Path) -> None:
    file = tmp_path / "vm.cfg"
    kernel = write_kernel(tmp_path / "k", then="block")
    file.write_text(config(kernel, "vm"))
    shared.xl("create", str(file), 'uuid="00112233-4455-6677-8899-aabbccddeeff"')
    refused(shared, file, words='domain with name "vm" already exists')
    file.write_text(config(kernel, "other", 'uuid = "00112233-4455-6677-8899-aabbccddeeff"'))
    refused(shared, file, words="uuid .* is already that of domain [0-9]+ .vm.")
    assert "already exists" in shared.xl("rename", "vm", "Domain-0", code=1).stderr
    shared.xl("destroy", "vm")


def test_commands_on_what_is_not_there(shared: Place) -> None:
    for command in ("pause", "unpause", "destroy", "shutdown", "reboot", "console", "vcpu-list", "uptime"):
        for which in ("nobody", "4711", "99999999999999", "", "a/b", "../../x", "%00"):
            done = shared.xl(command, which, code=None)
            assert done.returncode != 0, (command, which)
            assert len(done.stderr.splitlines()) in (1, 2), (command, which, done.stderr)
            assert "invalid domain identifier" in done.stderr, (command, which, done.stderr)
