# SPDX-License-Identifier: Apache-2.0
"""Peers that only runs on CUDA devices are compared with: SDPA's backends one by one,
FlexAttention, and xFormers where it is installed.

Layers as those of `bench.peers`: (shape, inputs) -> (map `[B, H, W, C]`, windowed x).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from fastbb.bench import peers
from fastbb.bench.peers import LayerInputs
from fastbb.bench.shapes import AttentionShape

Layer = Callable[[AttentionShape, LayerInputs], tuple[Tensor, Tensor]]

BACKENDS = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}


def cuda_layers(compile: bool = True) -> dict[str, Layer]:
    """name -> layer. Some have no kernel for some layers (SDPA's flash backend takes no mask): the
    call raises then. FlexAttention is a kernel only when it is compiled.
    """
    layers: dict[str, Layer] = {name: _with_backend(x) for name, x in BACKENDS.items()}
    if compile:
        layers["flex"] = torch.compile(flex_layer, dynamic=False)
    if importlib.util.find_spec("xformers") is not None:
        layers["xformers"] = xformers_layer
    return layers


def _with_backend(backend: SDPBackend) -> Layer:
    def layer(shape: AttentionShape, inputs: LayerInputs) -> tuple[Tensor, Tensor]:
        with sdpa_kernel(backend):
            return peers.sdpa_layer(shape, inputs)

    return layer


def flex_layer(shape: AttentionShape, inputs: LayerInputs) -> tuple[Tensor, Tensor]:
    """FlexAttention, which reads the bias from its table and the mask of the window."""
    x_windows = peers.partition_x(shape, inputs.x)
    q, k, v, scale = peers.scaled_heads(shape, inputs)
    out = flex_attention(q, k, v, score_mod=score_mod(shape, inputs), scale=scale)
    assert isinstance(out, Tensor)
    return peers.to_map(shape, out), x_windows


def score_mod(shape: AttentionShape, inputs: LayerInputs) -> Callable[..., Tensor] | None:
    """What FlexAttention adds to the score of (problem, head, query, key); None: nothing."""
    table, index, mask = inputs.table, inputs.index, inputs.mask
    if table is None or index is None:
        return None
    tokens, windows = shape.queries_keys[0], shape.windows

    def biased(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + table[index[i * tokens + j], h]

    def biased_and_masked(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        assert mask is not None
        return biased(score, b, h, i, j) + mask[b % windows, i, j]

    return biased if mask is None else biased_and_masked


def xformers_layer(shape: AttentionShape, inputs: LayerInputs) -> tuple[Tensor, Tensor]:
    """`memory_efficient_attention` of xFormers with bias and mask as one dense bias."""
    ops: Any = importlib.import_module("xformers.ops")
    x_windows = peers.partition_x(shape, inputs.x)
    q, k, v, scale = peers.scaled_heads(shape, inputs)
    bias = peers.dense_bias(shape, inputs)
    if bias is not None:
        # Rows must begin at multiples of eight elements, and the shape must name every problem.
        keys = bias.shape[-1]
        bias = F.pad(bias, (0, -keys % 8)).expand(q.shape[0], -1, -1, -1)[..., :keys]
    heads_inside = (x.transpose(1, 2) for x in (q, k, v))
    out = ops.memory_efficient_attention(*heads_inside, attn_bias=bias, scale=scale)
    return peers.to_map(shape, out.transpose(1, 2)), x_windows
