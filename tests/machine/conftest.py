# SPDX-License-Identifier: GPL-2.0-only
"""Machines for engine tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.machine.hvm_support import HvmMachine
from tests.machine.support import Machine


@pytest.fixture
def machine() -> Iterator[Machine]:
    m = Machine()
    yield m
    m.close()


@pytest.fixture
def pair() -> Iterator[Machine]:
    m = Machine(engines=2)
    yield m
    m.close()


@pytest.fixture
def nested() -> Iterator[HvmMachine]:
    m = HvmMachine()
    yield m
    m.close()
