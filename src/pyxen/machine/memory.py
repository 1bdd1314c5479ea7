# SPDX-License-Identifier: GPL-2.0-only
"""Machine RAM: one memfd arena, seen by every engine at machine address 0."""

from __future__ import annotations
