# SPDX-License-Identifier: GPL-2.0-only
"""``python -m pyxen``: the same as the ``pyxen`` command."""

from __future__ import annotations

import sys

from pyxen.cli.main import main

sys.exit(main())
