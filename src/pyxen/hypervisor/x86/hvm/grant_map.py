# SPDX-License-Identifier: GPL-2.0-only
"""Grant mappings in a translated guest's physmap (Xen: create_grant_p2m_mapping, replace_grant_p2m_mapping in
xen/arch/x86/mm.c).

``host_addr`` is a guest-physical address.  The references of the mapping are the grant table's: the p2m entry holds
none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from pyxen.abi.grant_table import Gntmap, Gntst
from pyxen.errors import XenError
from pyxen.hypervisor.x86.hvm.p2m_table import GFN_BITS
from pyxen.hypervisor.x86.hvm.p2m_types import P2mType

if TYPE_CHECKING:
    from pyxen.hypervisor.domain import Domain

_CONTAINS_PTE: Final = int(Gntmap.CONTAINS_PTE)
_READONLY: Final = int(Gntmap.READONLY)


def create_grant_p2m_mapping(domain: Domain, address: int, mfn: int, flags: int) -> int:
    """Map ``mfn`` at guest-physical ``address``. GNTST_okay, or GNTST_general_error: a place out of range or taken by
    another grant (which crashes the domain, as in Xen), no frame for a table.

    Memory of the domain that was there stays the domain's, without a place.
    """
    if flags & _CONTAINS_PTE or address & 0xFFF or address >> 12 + GFN_BITS:
        return Gntst.GENERAL_ERROR
    p2m = domain.hvm.p2m
    kind = P2mType.GRANT_MAP_RO if flags & _READONLY else P2mType.GRANT_MAP_RW
    try:
        p2m.add_entry(address >> 12, mfn, 0, kind)
    except XenError:
        return Gntst.GENERAL_ERROR
    return Gntst.OKAY


def replace_grant_p2m_mapping(domain: Domain, address: int, mfn: int, new_address: int, flags: int) -> int:
    """Take the mapping away. GNTST_general_error if ``mfn`` is not mapped there by a grant, or something is to be put
    in its place (which only page tables can)."""
    if new_address or flags & _CONTAINS_PTE:
        return Gntst.GENERAL_ERROR
    return Gntst.OKAY if domain.hvm.p2m.remove_grant(address >> 12, mfn) else Gntst.GENERAL_ERROR


