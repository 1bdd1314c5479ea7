# SPDX-License-Identifier: GPL-2.0-only
"""``pyxen guest``: with a stand-in for apt on PATH, so that no test needs a network."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest

from pyxen.cli.main import main
from pyxen.errors import HostError, ImageError
from pyxen.toolstack.guests import debian
from pyxen.toolstack.guests.cpio import CpioWriter
from pyxen.toolstack.guests.deb import read_members
from pyxen.toolstack.guests.initramfs import FIRST_USER_LINE, INIT, build_initramfs

BUSYBOX = b"\x7fELF not really" * 1000


def read_newc(archive: bytes) -> dict[str, tuple[int, tuple[int, int], bytes]]:
    """An independent reader: path -> (mode, device, data)."""
    out = {}
    position = 0
    while True:
        assert archive[position : position + 6] == b"070701"
        fields = [int(archive[position + 6 + 8 * i : position + 14 + 8 * i], 16) for i in range(13)]
        size, name_size = fields[6], fields[11]
        name = archive[position + 110 : position + 110 + name_size - 1].decode()
        data_at = position + 110 + name_size + 3 & ~3
        if name == "TRAILER!!!":
            assert len(archive) % 512 == 0
            return out
        out[name] = (fields[1], (fields[9], fields[10]), archive[data_at : data_at + size])
        position = data_at + size + 3 & ~3


def test_initramfs_has_what_the_kernel_looks_for() -> None:
    entries = read_newc(build_initramfs(BUSYBOX))
    mode, device, _ = entries["dev/console"]
    assert stat.S_ISCHR(mode) and device == (5, 1)
    assert entries["bin/busybox"] == (stat.S_IFREG | 0o755, (0, 0), BUSYBOX)
    assert entries["init"][0] == stat.S_IFREG | 0o755
    assert entries["init"][2].startswith(b"#!/bin/busybox sh\n")
    # orderly_poweroff() and orderly_reboot() run these two.
    for link in ("sbin/poweroff", "sbin/reboot"):
        assert stat.S_ISLNK(entries[link][0]) and entries[link][2] == b"/bin/busybox"
    assert build_initramfs(BUSYBOX) == build_initramfs(BUSYBOX)


def test_the_init_script_is_a_script() -> None:
    assert subprocess.run(["sh", "-n"], input=INIT.encode(), check=False).returncode == 0
    assert INIT.index(FIRST_USER_LINE) < INIT.index("/proc/cmdline")


def test_cpio_agrees_with_cpio(tmp_path: Path) -> None:
    writer = CpioWriter()
    writer.directory("a")
    for size in range(6):  # every padding
        writer.file(f"a/{'f' * (size + 1)}", b"x" * size)
    writer.symlink("a/link", "f")
    archive = writer.finish()
    assert [len(read_newc(archive)[f"a/{'f' * (n + 1)}"][2]) for n in range(6)] == list(range(6))
    try:
        listed = subprocess.run(["cpio", "-t", "--quiet"], input=archive, stdout=subprocess.PIPE, check=True).stdout
    except FileNotFoundError:
        pytest.skip("cpio is not installed")
    assert listed.decode().split() == list(read_newc(archive))


@pytest.mark.parametrize("paths", [["a/b"], ["a", "a"], ["/a"], ["x" * 5000]])
def test_cpio_refuses_what_the_kernel_could_not_unpack(paths: list[str]) -> None:
    writer = CpioWriter()
    with pytest.raises(ValueError, match="cpio entry"):
        for path in paths:
            writer.file(path, b"")


def make_deb(files: dict[str, bytes], compression: str = "xz") -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=f"w:{compression}") as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo("./" + name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    out = b"!<arch>\n"
    members = {"debian-binary": b"2.0\n", "control.tar.xz": b"odd", f"data.tar.{compression}": data.getvalue()}
    for name, content in members.items():
        out += b"%-16s%-12d%-6d%-6d%-8s%-10d`\n" % (name.encode(), 0, 0, 0, b"100644", len(content))
        out += content + b"\n" * (len(content) & 1)
    return out


KERNEL_DEB = make_deb({f"boot/{name}-6.1": name.encode() for name in ("vmlinuz", "System.map", "config")})
BUSYBOX_DEB = make_deb({"bin/busybox": BUSYBOX, "usr/share/doc/busybox": b""}, "gz")


def test_deb_members_by_name(tmp_path: Path) -> None:
    package = tmp_path / "k.deb"
    package.write_bytes(KERNEL_DEB)
    assert read_members(package, lambda path: path.startswith("boot/config")) == {"boot/config-6.1": b"config"}
    for damaged in (b"", KERNEL_DEB[:100], KERNEL_DEB[:-40], KERNEL_DEB.replace(b"`\n", b"  "), KERNEL_DEB[:68]):
        package.write_bytes(damaged)
        with pytest.raises(ImageError, match="not a sound Debian package"):
            read_members(package, lambda path: True)


# --- a stand-in for apt: knows its packages, keeps its rules, counts its calls ------------------------------------

FAKE_APT = """#!/bin/sh
here=$(dirname "$0")
echo "$(basename "$0") $*" >>"$here/calls"
case " $* " in
*" update "*) [ -e "$here/offline" ] && { echo "E: Could not resolve 'mirror'" >&2; exit 100; }
    touch "$here/updated" ;;
*" show linux-image-cloud-amd64="*) echo "Package: x"
    echo "Depends: linux-image-6.1 (= $(cat "$here/version")), base" ;;
*" --print-uris "*)
    [ -e "$here/needs-update" ] && [ ! -e "$here/updated" ] && exit 100
    for spec; do :; done
    name=${spec%%[=/]*}; version=$(cat "$here/version")
    case $spec in */sarge) echo "E: Release 'sarge' was not found" >&2; exit 100 ;; esac
    echo "'file:/x' ${name}_1%3a${version}_amd64.deb 1234 SHA256:00" | sed "s/1%3a$version/$version/" ;;
*" download "*)
    [ -e "$here/offline" ] && { echo "E: Failed to fetch" >&2; exit 100; }
    version=$(cat "$here/version")
    cp "$here/kernel.deb" "linux-image-6.1_${version}_amd64.deb"
    cp "$here/busybox.deb" "busybox-static_${version}_amd64.deb" ;;
esac
"""


@pytest.fixture
def apt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "apt"
    folder.mkdir()
    for program in ("apt-get", "apt-cache"):
        (folder / program).write_text(FAKE_APT)
        (folder / program).chmod(0o755)
    (folder / "version").write_text("6.1.1-1")
    (folder / "kernel.deb").write_bytes(KERNEL_DEB)
    (folder / "busybox.deb").write_bytes(BUSYBOX_DEB)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("PYXEN_CACHE", str(tmp_path / "cache"))
    return folder


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def fetch(**options: bool) -> Path:
    return debian.fetch(progress=lambda line: None, **options)


def test_fetch_brings_every_file_and_leaves_nothing_else(apt: Path, tmp_path: Path) -> None:
    target = fetch()
    assert target == tmp_path / "cache/guests/debian"
    assert names(target) == {"vmlinuz", "initramfs.img", "System.map", "config", "version"}
    assert (target / "vmlinuz").read_bytes() == b"vmlinuz"
    assert "6.1.1-1" in (target / "version").read_text()
    assert names(target.parent) == {"debian", target.resolve().name, ".lock"}


def test_fetch_again_downloads_nothing_until_there_is_a_new_version(apt: Path) -> None:
    first = fetch().resolve()
    (apt / "calls").unlink()
    assert fetch().resolve() == first
    assert " download linux" not in (apt / "calls").read_text()
    (apt / "version").write_text("6.1.2-1")
    second = fetch()
    assert second.resolve() != first
    assert not first.exists()
    assert fetch(force=True).is_dir()
    assert len([name for name in names(second.parent) if name.startswith("debian-")]) == 1


def test_a_damaged_cache_is_fetched_anew(apt: Path) -> None:
    target = fetch()
    (target / "vmlinuz").unlink()
    assert (fetch() / "vmlinuz").is_file()


def test_lists_are_updated_only_when_the_systems_do_not_do(apt: Path) -> None:
    fetch()
    assert not (apt / "updated").exists()
    (apt / "needs-update").touch()
    fetch(force=True)
    assert (apt / "updated").exists()


def test_offline_is_one_line_with_a_hint_and_keeps_what_was_there(apt: Path, capfd: pytest.CaptureFixture[str]) -> None:
    target = fetch()
    (apt / "offline").touch()
    (apt / "version").write_text("6.1.2-1")
    assert main(["guest", "fetch", "debian"]) == 1
    error = capfd.readouterr().err.splitlines()
    assert error[0].startswith("cannot fetch package lists: Could not resolve")
    assert error[1].startswith("hint: ")
    assert len(error) == 2
    assert (target / "vmlinuz").is_file()
    assert names(target.parent) == {"debian", target.resolve().name, ".lock"}


def test_packages_without_their_files_are_refused(apt: Path) -> None:
    (apt / "kernel.deb").write_bytes(make_deb({"boot/vmlinuz-6.1": b"", "boot/vmlinuz-6.2": b""}))
    with pytest.raises(ImageError, match="2 files boot/vmlinuz"):
        fetch()
    (apt / "kernel.deb").write_bytes(KERNEL_DEB)
    (apt / "busybox.deb").write_bytes(make_deb({"README": b""}))
    with pytest.raises(ImageError, match="no busybox"):
        fetch()


def test_unknown_release_and_missing_apt(apt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HostError, match="linux-image-cloud-amd64/sarge"):
        debian.fetch("sarge", progress=lambda line: None)
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(HostError, match="apt-get is not installed"):
        fetch()


def test_cache_that_cannot_be_written(apt: Path, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(HostError, match="cannot write the cache"):
        fetch()


def test_command_line(apt: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["guest", "list"]) == 0
    assert "not fetched" in capfd.readouterr().out
    assert main(["guest", "fetch", "debian"]) == 0
    out = capfd.readouterr().out
    assert "==> downloading linux-image-6.1 6.1.1-1" in out
    assert main(["guest", "list"]) == 0
    assert "linux-image-6.1 6.1.1-1" in capfd.readouterr().out
    assert main(["guest", "fetch", "plan9"]) == 1
    assert main(["guest", "fetch"]) == 2
