# SPDX-License-Identifier: GPL-2.0-only
"""The dummy security policy: what Xen allows without FLASK (xen/include/xsm/dummy.h).

Hooks are named as Xen's. The first argument is the domain that acts.  Each hook has one of four defaults: *hook*
(anyone), *target*
(oneself, the domain one is the device model of, or a privileged domain), *priv* (privileged only), *other* (spelled
out).  A refusal is
XenError(EPERM).
"""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from pyxen.errors import XenError

if TYPE_CHECKING:
    from pyxen.hypervisor.domain import Domain


def _target(current: Domain, target: Domain | None) -> None:
    if target is not None and target is not current and not current.is_privileged:
        raise XenError(errno.EPERM)


def _privileged(current: Domain) -> None:
    if not current.is_privileged:
        raise XenError(errno.EPERM)


class Xsm:
    """The hooks, with the dummy's answers."""

    name = "dummy"

    def hypercall(self, current: Domain, number: int) -> None:
        """Every dispatch passes here; the dummy allows any number."""

    # --- event channels -------------------------------------------------------------------------

    def evtchn_unbound(self, current: Domain, domain: Domain, channel: object, remote_domid: int) -> None:
        """*target*: allocate an unbound port in ``domain``."""
        _target(current, domain)

    def evtchn_interdomain(self, current: Domain, channel: object, remote: Domain, remote_channel: object) -> None:
        """*hook*: bind to a remote port (the remote end said for whom it is)."""

    def evtchn_send(self, current: Domain, channel: object) -> None:
        """*hook*."""

    def evtchn_status(self, current: Domain, domain: Domain, channel: object) -> None:
        """*target*."""
        _target(current, domain)

    def evtchn_reset(self, current: Domain, domain: Domain) -> None:
        """*target*."""
        _target(current, domain)

    # --- grants -----------------------------------------------------------------------------------

    def grant_mapref(self, current: Domain, granter: Domain, flags: int) -> None:
        """*hook*: the grant itself names who may map."""

    def grant_unmapref(self, current: Domain, granter: Domain) -> None:
        """*hook*."""

    def grant_setup(self, current: Domain, domain: Domain) -> None:
        """*target*."""
        _target(current, domain)

    def grant_transfer(self, current: Domain, domain: Domain) -> None:
        """*hook*."""

    def grant_copy(self, current: Domain, domain: Domain) -> None:
        """*hook*."""

    def grant_query_size(self, current: Domain, domain: Domain) -> None:
        """*target*."""
        _target(current, domain)

    # --- memory -------------------------------------------------------------------------------------

    def memory_adjust_reservation(self, current: Domain, domain: Domain) -> None:
        """*target*: increase, decrease, populate."""
        _target(current, domain)

    def memory_stat_reservation(self, current: Domain, domain: Domain) -> None:
        """*target*: current and maximum reservation."""
        _target(current, domain)

    def memory_exchange(self, current: Domain, domain: Domain) -> None:
        """*target*."""
        _target(current, domain)

    def add_to_physmap(self, current: Domain, domain: Domain) -> None:
        """*target*."""
        _target(current, domain)

    def remove_from_physmap(self, current: Domain, domain: Domain) -> None:
        """*target*."""
        _target(current, domain)

    def map_gmfn_foreign(self, current: Domain, foreign: Domain) -> None:
        """*target*: put a frame of ``foreign`` into another domain's physmap."""
        _target(current, foreign)

    def claim_pages(self, current: Domain) -> None:
        """*priv*."""
        _privileged(current)

    def domain_memory_map(self, current: Domain, domain: Domain) -> None:
        """*target*: XENMEM_set_memory_map."""
        _target(current, domain)

    def machine_memory_map(self, current: Domain) -> None:
        """*priv*."""
        _privileged(current)

    def mmu_update(
        self, current: Domain, page_table_domain: Domain | None, foreign: Domain | None, flags: int = 0
    ) -> None:
        """*target* for both the owner of the tables and the owner of the frames they map."""
        _target(current, page_table_domain)
        _target(current, foreign)

    def mmuext_op(self, current: Domain, foreign: Domain) -> None:
        """*target*."""
        _target(current, foreign)

    def update_va_mapping(self, current: Domain, foreign: Domain) -> None:
        """*target*."""
        _target(current, foreign)

    def hvm_param(self, current: Domain, domain: Domain) -> None:
        """*target*: HVMOP_set_param, HVMOP_get_param and what reads a domain's map."""
        _target(current, domain)

    # --- control --------------------------------------------------------------------------------------

    def domctl(self, current: Domain, target: Domain | None, command: int) -> None:
        """*other*: privileged only, for every command that exists here."""
        _privileged(current)

    def sysctl(self, current: Domain, command: int) -> None:
        """*priv*."""
        _privileged(current)

    def platform_op(self, current: Domain, command: int) -> None:
        """*priv*."""
        _privileged(current)

    def schedop_shutdown(self, current: Domain, target: Domain) -> None:
        """*target* (dm): SCHEDOP_remote_shutdown."""
        _target(current, target)

    def console_io(self, current: Domain, domain: Domain, command: int) -> None:
        """*other*: any domain may write a line (as a debug build of Xen lets it); reading needs privilege."""
        if command != 0:
            _privileged(current)

    def readconsole(self, current: Domain, clear: bool) -> None:
        """*priv*."""
        _privileged(current)

    def physdev_op(self, current: Domain, command: int) -> None:
        """*hook* for what any PV guest may ask (IOPL, I/O bitmap, end of interrupt)."""
