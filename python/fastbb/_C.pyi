# SPDX-License-Identifier: Apache-2.0
from typing import Any

def build_info() -> dict[str, object]: ...
def isa() -> str: ...
def isa_levels() -> list[str]: ...
def set_isa(level: str) -> None: ...
def null_cuda_plan(
    *, element_bytes: int, x: int, x_row: int, out: int, rows: int, columns: int
) -> dict[str, Any]: ...
def window_attention_plan(
    *,
    batch: int,
    heads: int,
    head_dim: int,
    nq: int,
    nk: int,
    windows_y: int = 1,
    windows_x: int = 1,
    q_shared: bool = False,
    dense_bias_gradient: bool = False,
) -> dict[str, int]: ...
