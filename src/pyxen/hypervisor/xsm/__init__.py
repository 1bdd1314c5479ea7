# SPDX-License-Identifier: GPL-2.0-only
"""Xen Security Modules: every request passes one of these hooks before it acts (xen/include/xsm/xsm.h).

:class:`Xsm` is the dummy policy, which allows what Xen's own dummy does (xen/include/xsm/dummy.h); FLASK is a subclass.
"""

from pyxen.hypervisor.xsm.dummy import Xsm

__all__ = ["Xsm"]
