# SPDX-License-Identifier: Apache-2.0
def build_info() -> dict[str, object]: ...
def isa() -> str: ...
def isa_levels() -> list[str]: ...
def set_isa(level: str) -> None: ...
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
