# SPDX-License-Identifier: GPL-2.0-only
"""Guest images that ``pyxen guest fetch`` brings into the user's cache."""
