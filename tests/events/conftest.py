# SPDX-License-Identifier: GPL-2.0-only
from __future__ import annotations

import pytest

from pyxen.hypervisor.domain import Domain
from tests.events.fake_hypervisor import FakeHypervisor


@pytest.fixture
def host() -> FakeHypervisor:
    return FakeHypervisor()


@pytest.fixture
def one(host: FakeHypervisor) -> Domain:
    """A guest with two vCPUs, whose engine runs on the test's thread."""
    return host.create(1)


@pytest.fixture
def two(host: FakeHypervisor) -> Domain:
    return host.create(2)
