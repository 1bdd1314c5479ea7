# SPDX-License-Identifier: GPL-2.0-only
"""Which machine frames guest code writes: one map for all engines, in use while some domain is in log-dirty mode that
has no nested tables to protect (see :mod:`pyxen.hypervisor.x86.pv.log_dirty`).

Every engine has it, since a domain may move to another one at any time; so the map also learns what other domains
write, which nobody asks for. Engines only set bytes. Who clears one does it while the owner of the frame executes
nowhere, and has its translations dropped before it executes again.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pyxen.machine.cpu.base import Cpu


class DirtyMap:
    """A byte for each of ``nr_frames``, 1 when it was written; made when it is first wanted, and then kept.

    Its lock is a leaf.
    """

    def __init__(self, nr_frames: int, engines: Sequence[Cpu]) -> None:
        self._nr_frames = nr_frames
        self._engines = tuple(engines)
        self._lock = threading.Lock()
        self._users: set[object] = set()
        self._frames: memoryview | None = None

    def use(self, user: object) -> None:
        """Have engines fill the map until ``user`` calls :meth:`release`. What they write through translations that
        they have already is not noticed: flush."""
        with self._lock:
            self._users.add(user)
            if self._frames is None:
                self._frames = memoryview(mmap.mmap(-1, self._nr_frames))
            for cpu in self._engines:
                cpu.set_dirty_map(self._frames)

    def release(self, user: object) -> None:
        """``user`` needs it no more; without effect for one that does not use it."""
        with self._lock:
            if user in self._users:
                self._users.discard(user)
                if not self._users:
                    for cpu in self._engines:
                        cpu.set_dirty_map(None)

    def take(self, first: int, count: int) -> bytes:
        """The bytes of ``count`` frames from ``first`` on, which become 0. See the module's text."""
        frames = self._frames
        if frames is None:
            return bytes(count)
        found = bytes(frames[first : first + count])
        if 1 in found:
            frames[first : first + count] = bytes(count)
        return found
