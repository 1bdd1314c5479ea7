# SPDX-License-Identifier: GPL-2.0-only
"""Fixtures: a daemon behind a socket in a thread of its own, for clients that block."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyxen.xenstore.daemon import XenstoreDaemon


class ServedDaemon:
    """A daemon on its own event loop in a thread."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.loop = asyncio.new_event_loop()
        self.daemon = XenstoreDaemon(None)
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self.daemon.start(path), self.loop).result(10)

    def stop(self) -> None:
        asyncio.run_coroutine_threadsafe(self.daemon.stop(), self.loop).result(10)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[ServedDaemon]:
    """A fresh daemon, its socket at ``.path``."""
    daemon = ServedDaemon(tmp_path / "xenstored" / "socket")
    yield daemon
    daemon.stop()


@pytest.fixture
def xenstored_socket(served: ServedDaemon) -> Path:
    """Path of a fresh daemon's socket."""
    return served.path
