# SPDX-License-Identifier: GPL-2.0-only
"""The fixtures as an installed pyxen brings them (entry point pytest11)."""

from __future__ import annotations

from pyxen.testing.pytest_plugin import pytest_configure, pyxen_host, pyxen_virtual_clock

__all__ = ["pytest_configure", "pyxen_host", "pyxen_virtual_clock"]
