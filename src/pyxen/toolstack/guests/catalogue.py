# SPDX-License-Identifier: GPL-2.0-only
"""What can be fetched, and what is there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from pyxen.toolstack.config.paths import cache_dir

AVAILABLE: Final = {"debian": "Debian's stock cloud kernel (amd64) with a busybox initramfs"}


@dataclass(frozen=True, slots=True)
class FetchedGuest:
    """One guest of the cache. ``version`` is the first line of its version file."""

    name: str
    version: str
    folder: Path
    size_bytes: int


def fetched() -> list[FetchedGuest]:
    """Guests in the cache, by name."""
    guests = []
    for name in sorted(AVAILABLE):
        folder = cache_dir() / "guests" / name
        try:
            version = (folder / "version").read_text().partition("\n")[0]
            size = sum(file.stat().st_size for file in folder.iterdir())
        except OSError:
            continue
        guests.append(FetchedGuest(name, version, folder, size))
    return guests
