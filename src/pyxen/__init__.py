# SPDX-License-Identifier: GPL-2.0-only
"""A Xen host in a Python package.

``pyxen.Host`` is the host as an object; it is imported when first asked for, because the command line starts many
times a minute and needs none of it.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyxen.host import Host

__version__ = "0.1.0"
__all__ = ["Host", "__version__"]


def __getattr__(name: str) -> object:
    if name == "Host":
        from pyxen.host import Host

        return Host
    raise AttributeError(f"module 'pyxen' has no attribute {name!r}")
