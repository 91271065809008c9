# SPDX-License-Identifier: Apache-2.0
"""A second statement of window attention, by token addresses instead of rolls and pads.

`fastbb.reference` moves tensors around; this oracle computes, for every window, which token of
the map each slot holds. The two share no code, so an error in one shows as a difference. It also
gives the log-sum-exp that the raw operator returns and the reference does not.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# The slot of a token that padding added: one row behind the real tokens of the flattened map.
PADDING = -1


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Runs the block with `count` threads. The many small steps of an exact result take longer
    with a team, above all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def axis_tokens(length: int, window: int, shift: int, pad_mode: str) -> list[int]:
    """The map coordinate at each place of a padded, rolled axis, or PADDING."""
    padded = -(-length // window) * window
    if pad_mode == "roll_then_pad":
        return [(p + shift) % length if p < length else PADDING for p in range(padded)]
    rolled = [(p + shift) % padded for p in range(padded)]
    return [y if y < length else PADDING for y in rolled]


def gather_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    window: tuple[int, int] | None = None,
    shift: tuple[int, int] = (0, 0),
    pad_mode: str = "none",
    k_pad: Tensor | None = None,
    v_pad: Tensor | None = None,
    bias_table: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | str | None = None,
    mask_value: float = -100.0,
    scale: float | Tensor | None = None,
    qk_l2norm: bool = False,
) -> tuple[Tensor, Tensor]:
    """Arguments of `fastbb.ops.window_attention` (pairs, not ints), in one float dtype.

    Returns the result and the log-sum-exp `[B, nW, h, N]` (full domain `[B, 1, h, Nq]`), which is
    0 for padded queries.
    """
    h, d = k.shape[-2:]
    if not isinstance(scale, Tensor):
        scale = torch.full((h,), d**-0.5 if scale is None else scale, dtype=k.dtype)

    def attend(queries: Tensor, keys: Tensor, values: Tensor, extra: Tensor | float) -> Any:
        if qk_l2norm:
            queries = queries / queries.norm(dim=-1, keepdim=True).clamp_min(1e-12)
            keys = keys / keys.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        logits = torch.einsum("ihd,jhd,h->hij", queries, keys, scale.reshape(h)) + extra
        return torch.einsum("hij,jhd->ihd", logits.softmax(-1), values), logits.logsumexp(-1)

    if k.dim() == 4:
        out, lse_all = q.new_zeros(q.shape), q.new_zeros(q.shape[0], 1, h, q.shape[1])
        for b in range(k.shape[0]):
            extra = 0.0 if bias is None else bias
            if isinstance(mask, Tensor):
                extra = extra + mask[b % mask.shape[0]]
            out[b], lse_all[b, 0] = attend(q[b], k[b], v[b], extra)
        return out, lse_all

    assert window is not None
    (wh, ww), (B, H, W) = window, k.shape[:3]
    rows = axis_tokens(H, wh, shift[0], pad_mode)
    columns = axis_tokens(W, ww, shift[1], pad_mode)
    windows_x = len(columns) // ww
    n_windows = len(rows) // wh * windows_x
    slots = [(a, c) for a in range(wh) for c in range(ww)]
    fixed: Tensor | float = 0.0
    if bias_table is not None:
        row, column = torch.tensor(slots).unbind(1)
        down, right = row[:, None] - row, column[:, None] - column
        index = (down + wh - 1) * (2 * ww - 1) + right + ww - 1
        fixed = bias_table[index].permute(2, 0, 1)
    elif bias is not None:
        fixed = bias

    def with_padding(x: Tensor, pad: Tensor | None) -> Tensor:
        last = x.new_zeros(h, d) if pad is None else pad.reshape(h, d)
        return torch.cat([x.reshape(H * W, h, d), last[None]])

    out = v.new_zeros(v.shape)
    lse_all = k.new_zeros(B, n_windows, h, wh * ww)
    for i in range(n_windows):
        y0, x0 = i // windows_x * wh, i % windows_x * ww
        places = [(rows[y0 + a], columns[x0 + c]) for a, c in slots]
        tokens = torch.tensor([PADDING if PADDING in p else p[0] * W + p[1] for p in places])
        real = tokens != PADDING
        extra = fixed
        if isinstance(mask, Tensor):
            extra = extra + mask[i % mask.shape[0]]
        elif mask == "swin":
            # The roll leaves one seam per axis, inside the last window, s slots before its end.
            last_y, last_x = y0 + wh == len(rows), x0 + ww == len(columns)
            side = [
                2 * (last_y and a >= wh - shift[0]) + (last_x and c >= ww - shift[1])
                for a, c in slots
            ]
            apart = torch.tensor(side)[:, None] != torch.tensor(side)[None]
            extra = extra + torch.zeros(apart.shape, dtype=k.dtype).masked_fill(apart, mask_value)
        for b in range(B):
            keys, values = with_padding(k[b], k_pad)[tokens], with_padding(v[b], v_pad)[tokens]
            queries = q[b] if q.dim() == 4 else with_padding(q[b], None)[tokens]
            result, lse = attend(queries, keys, values, extra)
            out[b].view(H * W, h, d)[tokens[real]] = result[real]
            lse_all[b, i][:, real] = lse[:, real]
    return out, lse_all
