# SPDX-License-Identifier: GPL-2.0-only
"""Names of files in a configuration: ordinary paths, and ``guest:NAME/FILE`` for what ``pyxen guest fetch`` brought.

xl.cfg has no variables, and an example that everybody can run must not name anybody's home.  So a path may start with
``guest:``; the rest is looked up below ``<cache>/guests``, where cache is $PYXEN_CACHE, else $XDG_CACHE_HOME/pyxen,
else ~/.cache/pyxen.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from pyxen.errors import ConfigError

GUEST_PREFIX = "guest:"
_GUEST_FILE = re.compile(r"([a-z0-9][a-z0-9._-]*)/([A-Za-z0-9][A-Za-z0-9._+-]*)")


def cache_dir() -> Path:
    """Where pyxen keeps what it can fetch or build again (need not exist)."""
    if own := os.environ.get("PYXEN_CACHE"):
        return Path(own)
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a relative path is invalid and to be ignored.
    base = Path(xdg) if os.path.isabs(xdg) else Path.home() / ".cache"
    return base / "pyxen"


def guest_dir(name: str) -> Path:
    """Folder of the fetched guest ``name`` (``debian``): vmlinuz, initramfs.img, System.map, config, version."""
    return cache_dir() / "guests" / name


def resolve(path: str, cwd: str | os.PathLike[str] | None = None) -> Path:
    """The file that ``path`` of a configuration names; relative ones are looked up in ``cwd`` (xl's, not the daemon's).

    Raises ConfigError for a malformed ``guest:`` name or one that was not fetched yet.
    """
    if path.startswith(GUEST_PREFIX):
        match = _GUEST_FILE.fullmatch(path.removeprefix(GUEST_PREFIX))
        if match is None:
            hint = "write it as guest:NAME/FILE, like guest:debian/vmlinuz"
            raise ConfigError(f"invalid guest file `{path[:200]}'", hint=hint)
        name, file = match.groups()
        found = guest_dir(name) / file
        if not found.is_file():
            raise ConfigError(f"guest file `{path}' is not there yet ({found})", hint=f"run: pyxen guest fetch {name}")
        return found
    if "\0" in path:
        raise ConfigError("a file name holds a NUL character")
    return Path(cwd or "") / path
