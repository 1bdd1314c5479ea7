# SPDX-License-Identifier: GPL-2.0-only
"""``pyxen guest fetch debian``: Debian's stock cloud kernel and a small busybox initramfs.

The result is ``<cache>/guests/debian``, a link to a folder named after its version; a new version is complete before
the link moves, so whoever reads through the link sees the old one or the new one.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from pyxen.errors import HostError, ImageError
from pyxen.toolstack.config.paths import guest_dir
from pyxen.toolstack.guests.apt import Apt, Package
from pyxen.toolstack.guests.deb import read_members
from pyxen.toolstack.guests.initramfs import INIT, build_initramfs

NAME: Final = "debian"
_METAPACKAGE: Final = "linux-image-cloud-amd64"
_BUSYBOX: Final = "busybox-static"
_FILES: Final = ("vmlinuz", "initramfs.img", "System.map", "config", "version")


def fetch(release: str | None = None, *, force: bool = False, progress: Callable[[str], None]) -> Path:
    """Bring the newest kernel (of ``release``, when apt's sources name several) and return the guest's folder.

    Does nothing when that version is there already, unless ``force``. Raises HostError (apt missing, offline, cache not
    writable) or ImageError (a package without the files it should have).
    """
    target = guest_dir(NAME)
    with _locked(target.parent), tempfile.TemporaryDirectory(prefix=".fetch-", dir=target.parent) as scratch:
        work = Path(scratch)
        apt = Apt(work / "apt", progress)
        kernel, busybox = _choose(apt, release)
        version = f"{kernel.name} {kernel.version}\n{busybox.name} {busybox.version}\ninit {_digest(INIT)}\n"
        if not force and _complete(target) and (target / "version").read_text() == version:
            progress(f"{target} is up to date ({kernel.name} {kernel.version})")
            return target
        progress(f"downloading {kernel.name} {kernel.version} ({(kernel.size + busybox.size) / 1e6:.1f} MB)")
        kernel_deb, busybox_deb = apt.download([kernel, busybox])
        progress("building the initramfs")
        ready = work / "guest"
        ready.mkdir()
        for name, data in _files(kernel_deb, busybox_deb, version).items():
            (ready / name).write_bytes(data)
        _publish(ready, target, f"{NAME}-{kernel.version}-{_digest(version)}")
    progress(f"{target} is ready ({kernel.name} {kernel.version})")
    return target


def _choose(apt: Apt, release: str | None) -> tuple[Package, Package]:
    suffix = f"/{release}" if release else ""
    meta = apt.find(_METAPACKAGE + suffix)
    busybox = apt.find(_BUSYBOX + suffix)
    for item in apt.depends(meta):
        name, _, relation = item.partition(" ")
        if name.startswith("linux-image-"):
            wanted = relation.strip("()").removeprefix("=").strip()
            return apt.find(f"{name}={wanted}" if wanted else name), busybox
    raise HostError(f"{_METAPACKAGE} {meta.version} does not name a kernel package")


def _files(kernel_deb: Path, busybox_deb: Path, version: str) -> dict[str, bytes]:
    boot = read_members(kernel_deb, lambda path: path.startswith("boot/"))
    files = {"version": version.encode()}
    for name in ("vmlinuz", "System.map", "config"):
        found = [data for path, data in boot.items() if path.startswith(f"boot/{name}-")]
        if len(found) != 1:
            raise ImageError(f"{kernel_deb.name} holds {len(found)} files boot/{name}-*, not one")
        files[name] = found[0]
    busybox = read_members(busybox_deb, lambda path: path in ("bin/busybox", "usr/bin/busybox"))
    if len(busybox) != 1:
        raise ImageError(f"{busybox_deb.name} holds no busybox program")
    files["initramfs.img"] = build_initramfs(next(iter(busybox.values())))
    return files


def _complete(target: Path) -> bool:
    return all((target / name).is_file() for name in _FILES)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def _publish(ready: Path, target: Path, name: str) -> None:
    """Move ``ready`` beside ``target`` as ``name``, turn the link to it and drop what it pointed to before."""
    place = target.parent / name
    old = target.resolve() if target.is_symlink() else None
    if place.exists():  # the same version again (force): the link must not dangle while it is replaced
        place = target.parent / f"{name}-{os.getpid()}"
    ready.rename(place)
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    link = target.parent / f".{target.name}-{os.getpid()}"
    link.unlink(missing_ok=True)
    link.symlink_to(place.name)
    link.replace(target)
    if old is not None and old != place and old.parent == target.parent.resolve():
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One fetch at a time in ``folder``; a second one waits and then finds the work done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = (folder / ".lock").open("w")
    except OSError as error:
        raise HostError(f"cannot write the cache {folder}: {error.strerror}",
                        hint="PYXEN_CACHE names another folder") from None
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
