# SPDX-License-Identifier: GPL-2.0-only
"""Xen's public headers in ``xen/include/public/hvm``."""
