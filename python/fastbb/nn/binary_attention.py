# SPDX-License-Identifier: Apache-2.0
"""Self-attention between binary queries, keys, values and probabilities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbb.nn.binary_calibrate import set_alpha
from fastbb.nn.binary_linear import BinaryLinear
from fastbb.nn.binary_presets import Preset, preset_of
from fastbb.ops import binary_attention
from fastbb.ops._checks import check_float, fail

ESTIMATORS = ("q_p", "k_p", "q_m", "k_m", "v_p")
ESTIMATOR_STD = 0.02


def add_attention_state(
    module: nn.Module, dim: int, preset: Preset, rank: int | None, **factory: Any
) -> dict[str, nn.Module | nn.Parameter | None]:
    """Parameters and modules, by name, that binary attention adds to a module of `dim` channels."""
    if rank is None:
        rank = preset.estimator_rank
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 0:
        fail(type(module).__qualname__, "estimator_rank", "must be an int of at least 0", rank)
    state: dict[str, nn.Module | nn.Parameter | None] = {
        "alphas": nn.Parameter(torch.ones(4, **factory)) if preset.elastic_attention else None
    }
    for name in ESTIMATORS if rank > 0 else ():
        linear = nn.Linear(dim, 1 if name == "v_p" else rank, **factory)
        nn.init.normal_(linear.weight, std=ESTIMATOR_STD)
        nn.init.zeros_(linear.bias)
        state[name] = linear
    return state


def estimates(module: Any, x: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What binary attention on x `[B, N, C]` is short of (Xing et al. 2024), of low rank.

    est_q `[B, N, 2r]` and est_k `[B, N, 2r]`, whose product is
    q_m k_p^T + q_p k_m^T + q_p k_p^T, and v_p `[B, N]`: one matrix product makes them all.
    """
    if not hasattr(module, "q_p"):
        return None, None, None
    rank = module.q_p.out_features
    q_p, k_p, q_m, k_m, v_p = (getattr(module, name) for name in ESTIMATORS)
    weight = torch.cat([q_m.weight + q_p.weight, q_p.weight, k_p.weight, k_m.weight, v_p.weight])
    bias = torch.cat([q_m.bias + q_p.bias, q_p.bias, k_p.bias, k_m.bias, v_p.bias])
    all_five = F.linear(x, weight, bias).to(x.dtype)
    est_q, est_k, v = all_five.split([2 * rank, 2 * rank, 1], -1)
    return est_q, est_k, v.squeeze(-1)


def attend(
    module: Any,
    x: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: float,
) -> Tensor:
    """Binary attention of a module with `add_attention_state`'s state and its `preset`.

    x `[B, N, C]` is the layer's input; q, k, v `[B, N, h, d]`; mask, added to scores, `[B, N]` or
    `[B, N, N]`. Returns `[B, N, h * d]`.
    """
    if module.calibrating:
        _calibrate(module, q, k, v)
    est_q, est_k, v_p = estimates(module, x)
    dropout = dropout if module.training else 0.0
    # From torch's generator, so that its seed decides what is dropped.
    seed = int(torch.randint(0, 2**62, ()).item()) if dropout > 0.0 else 0
    out = binary_attention(
        q,
        k,
        v,
        alphas=module.alphas,
        mask=mask,
        est_q=est_q,
        est_k=est_k,
        v_p=v_p,
        scale=q.shape[-1] ** -0.5,
        probs=module.preset.probs,
        ste=module.preset.attention_ste,
        dropout_p=dropout,
        seed=seed,
    )
    return out.flatten(2)


@torch.no_grad()
def _calibrate(module: Any, q: Tensor, k: Tensor, v: Tensor) -> None:
    if module.alphas is not None:
        for i, operand in enumerate((q, k, v)):
            set_alpha(module.alphas[i], operand, None, "ternary")
        # A row of probabilities sums to 1, so that their mean is known.
        module.alphas[3] = 4.0 / k.shape[1]
    module.calibrating = False


class BinarySelfAttention(nn.Module):
    """Self-attention `[B, N, C]` -> `[B, N, C]` of BERT, binary throughout, without the projection.

    Args:
        dim: channels C.
        heads: heads h.
        preset: a name in `fastbb.nn.PRESETS`, or a `Preset`.
        estimator_rank: rank r of the estimators of what binary products lose (Xing et al. 2024):
            Linear layers `q_p`, `k_p`, `q_m`, `k_m` to r and `v_p` to 1 channel. 0: none.
        dropout: of the attention probabilities, in training.

    `query`, `key`, `value` are `BinaryLinear`; `alphas` `[4]` are the learned scales of queries,
    keys, values and probabilities, where the preset has them.
    """

    calibrating = False
    alphas: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        heads: int,
        *,
        preset: str | Preset = "bipft",
        estimator_rank: int | None = 0,
        dropout: float = 0.0,
        **factory: Any,
    ) -> None:
        super().__init__()
        op = "BinarySelfAttention"
        self.preset = preset_of(op, preset)
        if heads < 1 or dim % heads != 0:
            fail(op, "heads", f"must divide dim {dim}", heads)
        check_float(op, "dropout", dropout)
        if not 0.0 <= dropout < 1.0:
            fail(op, "dropout", "must be in [0, 1)", dropout)
        self.heads = heads
        self.dropout = dropout
        self.query: nn.Module = BinaryLinear(dim, dim, **self.preset.linear, **factory)
        self.key: nn.Module = BinaryLinear(dim, dim, **self.preset.linear, **factory)
        self.value: nn.Module = BinaryLinear(dim, dim, **self.preset.linear, **factory)
        state = add_attention_state(self, dim, self.preset, estimator_rank, **factory)
        for name, value in state.items():
            setattr(self, name, value)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x `[B, N, C]`; mask, added to the scores, `[B, N]` or `[B, N, N]`."""
        shape = (self.heads, x.shape[-1] // self.heads)
        q, k, v = (layer(x).unflatten(-1, shape) for layer in (self.query, self.key, self.value))
        return attend(self, x, q, k, v, mask, self.dropout)

    def extra_repr(self) -> str:
        return f"heads={self.heads}, probs={self.preset.probs!r}, dropout={self.dropout}"
