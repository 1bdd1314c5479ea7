# SPDX-License-Identifier: GPL-2.0-only
"""Hosts and guests for tests that go through the real command line."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyxen.testing.pytest_plugin import pytest_configure, pyxen_host, pyxen_virtual_clock
from pyxen.toolstack.config.paths import guest_dir
from tests.e2e.place import Place

__all__ = ["pytest_configure", "pyxen_host", "pyxen_virtual_clock"]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """A place without a host yet; whatever runs there is stopped, and must stop cleanly."""
    place = Place(tmp_path / "run")
    try:
        yield place
        place.close()
    finally:
        with contextlib.suppress(FileNotFoundError, ValueError, ProcessLookupError):
            os.kill(place.pid(), signal.SIGKILL)


@pytest.fixture(scope="session")
def debian() -> Path:
    """The configuration of Debian's kernel."""
    if not (guest_dir("debian") / "vmlinuz").is_file():
        pytest.skip("no Debian guest in the cache: pyxen guest fetch debian")
    return Path(__file__).resolve().parents[2] / "examples" / "debian-pv.cfg"
