# SPDX-License-Identifier: Apache-2.0
"""pytest-benchmark with pinned threads and this package's machine facts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from fastbb import measure


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--threads", type=int, help="threads of torch; default: torch's own choice")


@pytest.fixture(scope="session", autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    with measure.pinned_threads(request.config.getoption("--threads")) as count:
        yield count


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: Any) -> None:
    machine_info["fastbb"] = measure.machine_info()
