# SPDX-License-Identifier: GPL-2.0-only
"""What the parts of :class:`~pyxen.hypervisor.privcmd.PrivCmd` share: who acts, and on whom."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from pyxen.errors import XenError
from pyxen.hypervisor import lifecycle

if TYPE_CHECKING:
    from pyxen.hypervisor.domain import Domain
    from pyxen.hypervisor.hypervisor import Hypervisor


class Control:
    """Acts as domain 0."""

    def __init__(self, hypervisor: Hypervisor) -> None:
        self._hypervisor = hypervisor
        self._dom0 = hypervisor.dom0

    def _target(self, domid: int, command: int) -> Domain:
        domain = lifecycle.find(self._hypervisor, domid)
        self._hypervisor.xsm.domctl(self._dom0, domain, command)
        if domain.is_privileged:
            raise XenError(errno.EINVAL)  # we are it: there is no guest that could be paused or set up
        return domain
