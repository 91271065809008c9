# SPDX-License-Identifier: Apache-2.0
"""Fixtures of all tests: seeds, threads, instruction-set levels, a pretended GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import fastbb
from fastbb.ops import _cuda
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


@pytest.fixture
def cuda_machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A build with kernels and an A100, as far as Python is asked."""
    _cuda._cuda_reasons.cache_clear()
    built = {"toolkit": "13.0", "sm": [80], "ptx": 80}
    monkeypatch.setattr(_cuda._C, "build_info", lambda: {"cuda": built})
    monkeypatch.setattr(_cuda, "has_kernel", lambda op: True)
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(_cuda, "capability_of", lambda index: (8, 0))
    yield monkeypatch
    _cuda._cuda_reasons.cache_clear()
