# SPDX-License-Identifier: GPL-2.0-only
"""``xen/include/public/io/console.h``: the PV console page, ``struct xencons_interface``.

``in`` carries what a person types to the guest, ``out`` what the guest prints.  Indices are free-running
little-endian u32 counters; a byte's place is its index modulo the (power of two) ring size.
"""

from __future__ import annotations

from typing import Final

IN_SIZE: Final = 1024
OUT_SIZE: Final = 2048
IN: Final = 0
OUT: Final = 1024
IN_CONS: Final = 3072
IN_PROD: Final = 3076
OUT_CONS: Final = 3080
OUT_PROD: Final = 3084
INTERFACE_SIZE: Final = 3088
"""sizeof(struct xencons_interface)."""
