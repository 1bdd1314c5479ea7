# SPDX-License-Identifier: GPL-2.0-only
"""Machine RAM: one memfd arena, seen by every engine at machine address 0.

A sparse memfd costs nothing until a page is touched, so a 256 GiB host starts as fast as a small one. The mapping is
shared:
engines (and later KVM, vhost processes and forks of a device model) use the same pages.

Who writes into guest-visible RAM from outside of an engine must say so with :meth:`Memory.written`: the engines keep
translations of the code they have executed and do not notice such writes by themselves.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable

from pyxen.errors import HostError, InternalError
from pyxen.machine.frame_allocator import FrameAllocator

__all__ = ["PAGE_SHIFT", "PAGE_SIZE", "FrameAllocator", "Memory"]

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT

_MADV_REMOVE = 9
_PUNCH_FROM = 16
"""From this many frames on it is cheaper to give the pages back to the host than to write zeros."""
_PUNCH_CHUNK = 2048
"""Frames given back in one system call (8 MiB): the call holds kernel locks for about a millisecond, not longer."""

_ZERO_PAGE = bytes(PAGE_SIZE)

Listener = Callable[[int, int], None]


class Memory:
    """``size_bytes`` of RAM in ``nodes`` equal NUMA nodes.

    ``b``, ``d`` and ``q`` are views of all of it as bytes, 32-bit and 64-bit words: index with the machine address
    shifted right by 0, 2 or 3. They check nothing but the end of RAM; addresses that a guest had a say in are
    validated by the caller.
    """

    def __init__(self, size_bytes: int, nodes: int = 1) -> None:
        """Raises HostError when the host cannot provide the address space."""
        if size_bytes <= 0 or size_bytes % (PAGE_SIZE * nodes):
            raise HostError(f"machine memory of {size_bytes} bytes is not a whole number of pages in each"
                            f" of {nodes} nodes")
        self.size_bytes = size_bytes
        self.nr_frames = size_bytes >> PAGE_SHIFT
        self.nodes = nodes
        self.fd = -1
        try:
            self.fd = os.memfd_create("pyxen-ram", os.MFD_CLOEXEC)
            os.ftruncate(self.fd, size_bytes)
            self._map = mmap.mmap(self.fd, size_bytes, mmap.MAP_SHARED)
        except (OSError, ValueError, OverflowError) as error:
            if self.fd >= 0:
                os.close(self.fd)
            raise HostError(f"cannot map {size_bytes >> 20} MiB of machine memory: {error}",
                            hint="start the host with a smaller --memory") from error
        self.b = memoryview(self._map)
        self.d = self.b.cast("I")
        self.q = self.b.cast("Q")
        self._anchor = ctypes.c_char.from_buffer(self._map)
        self.host_address = ctypes.addressof(self._anchor)
        self._listeners: tuple[Listener, ...] = ()
        libc = ctypes.CDLL(None, use_errno=True)
        self._madvise = libc.madvise
        self._madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        self._madvise.restype = ctypes.c_int

    def read(self, maddr: int, size: int) -> bytes:
        """Copy ``size`` bytes out. Raises InternalError outside of RAM."""
        if maddr < 0 or size < 0 or maddr + size > self.size_bytes:
            raise InternalError(f"read of {size} bytes at machine address {maddr:#x} is outside of RAM")
        return bytes(self.b[maddr:maddr + size])

    def write(self, maddr: int, data: bytes | bytearray | memoryview) -> None:
        """Copy ``data`` in; does not tell the engines (see :meth:`written`). Raises InternalError outside of RAM."""
        end = maddr + len(data)
        if maddr < 0 or end > self.size_bytes:
            raise InternalError(f"write of {len(data)} bytes at machine address {maddr:#x} is outside of RAM")
        self.b[maddr:end] = data

    def zero(self, mfn: int, count: int = 1) -> None:
        """Make ``count`` frames read as zero; large runs go back to the host. Does not tell the engines."""
        if mfn < 0 or count < 0 or mfn + count > self.nr_frames:
            raise InternalError(f"zeroing of {count} frames at mfn {mfn:#x} is outside of RAM")
        if count >= _PUNCH_FROM:
            done = 0
            while done < count:
                chunk = min(_PUNCH_CHUNK, count - done)
                address = self.host_address + ((mfn + done) << PAGE_SHIFT)
                if self._madvise(address, chunk << PAGE_SHIFT, _MADV_REMOVE):
                    break
                done += chunk
            mfn += done
            count -= done
        for frame in range(mfn, mfn + count):
            maddr = frame << PAGE_SHIFT
            self.b[maddr:maddr + PAGE_SIZE] = _ZERO_PAGE

    def add_listener(self, listener: Listener) -> None:
        """Call ``listener(maddr, size_bytes)`` for every :meth:`written`, on the caller's thread."""
        self._listeners = (*self._listeners, listener)

    def remove_listener(self, listener: Listener) -> None:
        """Undo :meth:`add_listener`; unknown listeners are ignored."""
        self._listeners = tuple(known for known in self._listeners if known != listener)

    def written(self, mfn: int, count: int = 1) -> None:
        """Code in these frames may have changed behind the engines' backs."""
        for listener in self._listeners:
            listener(mfn << PAGE_SHIFT, count << PAGE_SHIFT)

    def node_of(self, mfn: int) -> int:
        """NUMA node of a frame."""
        return mfn * self.nodes // self.nr_frames

    def node_range(self, node: int) -> range:
        """Frames of a NUMA node."""
        per_node = self.nr_frames // self.nodes
        return range(node * per_node, (node + 1) * per_node)

    def close(self) -> None:
        """Give all RAM back. Engines must be closed before; views that callers still hold keep their pages."""
        if self.fd < 0:
            return
        self._listeners = ()
        os.close(self.fd)
        self.fd = -1
        del self._anchor
        try:
            for view in (self.d, self.q, self.b):
                view.release()
            self._map.close()
        except BufferError:
            # Somebody's sub-view outlives us; the mapping goes when the last view does.
            pass
