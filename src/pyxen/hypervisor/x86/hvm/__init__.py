# SPDX-License-Identifier: GPL-2.0-only
"""Guests under nested paging: PVH (Xen: xen/arch/x86/hvm, xen/arch/x86/mm)."""
