# SPDX-License-Identifier: Apache-2.0
"""The headers with which CUDA sources compile for the host; test_*_simt.py run them there."""

from __future__ import annotations

import re
from pathlib import Path

import simt


def test_headers_stand_in_for_all_functions() -> None:
    """Whatever kernels may call of core/ptx.cuh has a body for the host."""
    own = (simt.CSRC / "core/ptx.cuh").read_text()
    host = (Path(simt.__file__).parent / "include/core/ptx.cuh").read_text()
    names = re.findall(r"__device__ __forceinline__ \w+ (\w+)\(", own)
    assert len(names) > 10
    for each in names:
        assert re.search(rf"\b{each}\(", host), each
