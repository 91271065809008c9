# SPDX-License-Identifier: Apache-2.0
"""Fixtures of all tests: seeds, threads, instruction-set levels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import fastbb
from fastbb.testing import isa_params


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    """Two threads, so that parallel paths run everywhere; restored for tests that change it."""
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(2)


@pytest.fixture(params=isa_params())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test once per instruction-set level of this build and machine."""
    with fastbb.cap_isa(request.param):
        yield request.param
