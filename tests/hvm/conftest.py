# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hvm.rig import Guest, Machine, machine


@pytest.fixture
def host() -> Iterator[Machine]:
    with machine() as found:
        yield found


@pytest.fixture
def guest(host: Machine) -> Guest:
    """A PVH guest in long mode; vCPU 0 is loaded."""
    return host.guest()
