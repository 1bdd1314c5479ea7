# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.hypervisor.rig import Guest, Machine, machine


@pytest.fixture
def host() -> Iterator[Machine]:
    with machine() as found:
        yield found


@pytest.fixture(params=["exact", "fast"])
def guest(host: Machine, request: pytest.FixtureRequest) -> Guest:
    """A guest in each PV mode."""
    return host.guest(request.param)


@pytest.fixture
def exact(host: Machine) -> Guest:
    """A guest in the reference mode, where the rule does not depend on it."""
    return host.guest("exact")
