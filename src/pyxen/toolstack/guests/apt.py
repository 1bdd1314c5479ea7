# SPDX-License-Identifier: GPL-2.0-only
"""Download Debian packages as an ordinary user, with apt itself: its sources, its mirrors, its signature checks.

apt keeps its state below /var; given other folders it works for anybody. The system's own package lists are read first
(no network); only when they do not know the package, or point to a version that is gone, private lists are fetched.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import unquote

from pyxen.errors import HostError

ARCHITECTURE: Final = "amd64"
_OFFLINE_HINT: Final = "is this machine online, and does `apt-get update' work?"
_DEBIAN_HINT: Final = "needs apt and Debian's package sources; elsewhere give kernel= and ramdisk= files of your own"


@dataclass(frozen=True, slots=True)
class Package:
    """One version of a package that can be downloaded."""

    name: str
    version: str
    file_name: str
    size: int

    @property
    def spec(self) -> str:
        return f"{self.name}={self.version}"


class Apt:
    """apt-get and apt-cache with folders of our own under ``work``, which the caller removes."""

    def __init__(self, work: Path, progress: Callable[[str], None]) -> None:
        if shutil.which("apt-get") is None:
            raise HostError("apt-get is not installed", hint=_DEBIAN_HINT)
        self._work = work
        self._progress = progress
        self._private_lists = False
        for folder in ("state/lists/partial", "cache/archives/partial", "debs"):
            (work / folder).mkdir(parents=True)
        (work / "status").touch()

    def find(self, spec: str) -> Package:
        """The version of ``spec`` (``name``, ``name=version`` or ``name/release``) that apt would download."""
        package = self._candidate(spec)
        if package is None and not self._private_lists:
            self.update()
            package = self._candidate(spec)
        if package is None:
            raise HostError(f"apt knows no package {spec}", hint=_DEBIAN_HINT)
        return package

    def depends(self, package: Package) -> list[str]:
        """Its Depends field, alternatives and all, one entry an item: ``name (= version)``."""
        output = self._run("apt-cache", "show", package.spec).stdout
        for line in output.splitlines():
            key, _, value = line.partition(":")
            if key == "Depends":
                return [item.strip() for item in value.split(",")]
        return []

    def download(self, packages: list[Package]) -> list[Path]:
        """Fetch and verify; the files, in the same order."""
        specs = [package.spec for package in packages]
        result = self._run("apt-get", "download", *specs, check=False)
        if result.returncode and not self._private_lists:
            # The lists of a machine that was not updated for long name files that mirrors have dropped since.
            self.update()
            result = self._run("apt-get", "download", *specs, check=False)
        if result.returncode:
            raise HostError(f"cannot download {' '.join(specs)}: {_last_error(result)}", hint=_OFFLINE_HINT)
        return [self._work / "debs" / package.file_name for package in packages]

    def update(self) -> None:
        """Fetch lists of our own; from here on only those are used."""
        self._progress("updating package lists")
        self._private_lists = True
        result = self._run("apt-get", "update", check=False)
        if result.returncode:
            raise HostError(f"cannot fetch package lists: {_last_error(result)}", hint=_OFFLINE_HINT)

    def _candidate(self, spec: str) -> Package | None:
        result = self._run("apt-get", "download", "--print-uris", spec, check=False)
        # 'uri' name_version_arch.deb size hash
        for line in result.stdout.splitlines():
            if line.startswith("'") and line.count(" ") >= 2:
                file_name, size = line.rpartition("' ")[2].split(" ")[:2]
                name, version, _ = (unquote(part) for part in file_name.split("_"))
                return Package(name, version, file_name, int(size))
        return None

    def _run(self, program: str, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        options = {
            "Dir::Cache": self._work / "cache",
            "Dir::State::status": self._work / "status",  # nothing is installed, as far as apt is concerned
            "APT::Architecture": ARCHITECTURE,
            "APT::Architectures::": ARCHITECTURE,
            "Acquire::Languages": "none",
            "Debug::NoLocking": "1",
        }
        if self._private_lists:
            options["Dir::State"] = self._work / "state"
        if os.geteuid() == 0:
            options["APT::Sandbox::User"] = "root"  # _apt cannot enter our folder, and nothing here needs it to
        flags = [f"-o{key}={value}" for key, value in options.items()]
        result = subprocess.run(
            [program, "-qq", *flags, *arguments],
            cwd=self._work / "debs",
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            env={**os.environ, "LC_ALL": "C.UTF-8"},
        )
        if check and result.returncode:
            raise HostError(f"{program} failed: {_last_error(result)}", hint=_OFFLINE_HINT)
        return result


def _last_error(result: subprocess.CompletedProcess[str]) -> str:
    """apt's own reason: its first line marked E:, else W:, else the last one it wrote."""
    lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
    for mark in ("E: ", "W: "):
        for line in lines:
            if line.startswith(mark):
                return line.removeprefix(mark)
    return lines[-1] if lines else f"exit status {result.returncode}"
