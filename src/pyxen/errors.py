# SPDX-License-Identifier: GPL-2.0-only
"""Every error pyxen raises on purpose, as one closed tree.

A reader who catches :class:`PyxenError` catches all of them; anything else that
escapes is a bug of ours.  Who an error is *for* decides its class:

* :class:`XenError` travels to the caller of a hypercall or a control call as ``-errno``.
* :class:`GuestFault` is a guest's own doing and crashes that domain, nobody else.
* :class:`ConfigError`, :class:`ImageError` and :class:`HostError` are for the person at the terminal:
  one line, and a hint.
* :class:`InternalError` means that we broke an invariant.
"""

from __future__ import annotations

import errno as _errno
import os


class PyxenError(Exception):
    """Root of the tree."""

    hint: str | None = None

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class XenError(PyxenError):
    """A hypercall or control call failed with ``errno`` (positive, Linux/Xen numbering)."""

    def __init__(self, errno: int, message: str | None = None, *, hint: str | None = None) -> None:
        name = _errno.errorcode.get(errno, str(errno))
        super().__init__(message or f"{name}: {os.strerror(errno)}", hint=hint)
        self.errno = errno


class GuestAccessError(XenError):
    """A guest handle points where the guest may not read or write (EFAULT)."""

    def __init__(self, address: int) -> None:
        super().__init__(_errno.EFAULT, f"bad guest address {address:#x}")
        self.address = address


class GuestFault(PyxenError):
    """The guest did something that leaves it no way to go on: ``domain_crash`` with this reason."""


class ConfigError(PyxenError):
    """A configuration (xl.cfg, command line) cannot be used; ``line`` is 1-based when known."""

    def __init__(self, message: str, *, hint: str | None = None, line: int | None = None) -> None:
        super().__init__(message, hint=hint)
        self.line = line


class ImageError(PyxenError):
    """A kernel, ramdisk, disk or stream file is not what it claims to be."""


class HostError(PyxenError):
    """The host (daemon, run directory, machine) cannot do what was asked."""


class EngineError(HostError):
    """A CPU engine is missing, unknown or failed its self-test."""


class InternalError(PyxenError):
    """Our bug."""
