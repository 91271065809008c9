# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels whose machine code tests look at: what is compiled, and how it is launched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import binary_attention_ptx
import binary_linear_ptx
import binary_pack_ptx
import elastic_binarize_ptx
import window_attention_ptx


class Group(NamedTuple):
    """Kernels that are compiled and looked at together.

    Attributes:
        sources: their files.
        launch_of: by a kernel's name, as in cuda_budgets.json, a launch of the C++ plan: its block
            and shared_bytes decide how many blocks a multiprocessor holds.
        branches: compute capabilities from which on the sources have other code.
        emulated_bits: the one from which on ptxas emulates products of bits by those of int8.
    """

    sources: tuple[Path, ...]
    launch_of: Callable[[str], dict[str, int]]
    branches: tuple[int, ...] = ()
    emulated_bits: int = 1000

    def ptx_arch(self, arch: str) -> str:
        """The lowest architecture whose PTX is that of `arch`."""
        return str(max(each for each in (80, *self.branches) if each <= int(arch)))


def _window_attention(kind: str) -> Group:
    of_kind = window_attention_ptx.SOURCES[kind], window_attention_ptx.BACKWARD_SOURCES[kind]
    return Group(of_kind, window_attention_ptx.launch_of)


GROUPS = {
    # f32 and bf16 differ from f16 by a conversion.
    "binary_attention": Group(
        (binary_attention_ptx.SOURCES["f16"],), binary_attention_ptx.launch_of, emulated_bits=100
    ),
    "binary_linear": Group((binary_linear_ptx.SOURCE,), binary_linear_ptx.launch_of, (100,)),
    "binary_pack": Group((binary_pack_ptx.SOURCE,), binary_pack_ptx.launch_of),
    "elastic_binarize": Group((elastic_binarize_ptx.SOURCE,), elastic_binarize_ptx.launch_of),
    # bf16 and tf32 differ from these by a conversion.
    "window_attention f16": _window_attention("f16"),
    "window_attention f32": _window_attention("f32"),
}
