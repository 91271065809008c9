# SPDX-License-Identifier: Apache-2.0
"""Bad input of window attention: clear errors, never a crash."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from fastbb.ops import window_attention
from fastbb.testing.window_attention import build, build_backward

FORWARD = torch.ops.fastbb.window_attention.default
BACKWARD = torch.ops.fastbb.window_attention_backward.default

# The public function: every rule, its exception, and a message that says what and why.

WINDOWS: dict[str, Any] = dict(
    zip("qkv", torch.randn(3, 2, 8, 12, 2, 8).unbind(0), strict=True), window=(4, 4)
)
FULL: dict[str, Any] = dict(zip("qkv", torch.randn(3, 2, 5, 2, 8).unbind(0), strict=True))

# changes of a good call, exception, argument, part of the rule, part of the received value
BadCall = tuple[dict[str, Any], type[Exception], str, str, str]
# fmt: off
BAD_WINDOW_CALLS: dict[str, BadCall] = {
    "q_not_a_tensor": ({"q": [1.0]}, TypeError, "q", "torch.Tensor", "list"),
    "k_not_a_tensor": ({"k": [0.0]}, TypeError, "k", "torch.Tensor", "list"),
    "v_sparse": ({"v": WINDOWS["v"].to_sparse()}, TypeError, "v", "dense", "torch.sparse_coo"),
    "q_int": ({"q": WINDOWS["q"].int()}, TypeError, "q", "dtype", "torch.int32"),
    "q_device": ({"q": WINDOWS["q"].to("meta")}, ValueError, "q", "k's device", "meta"),
    "v_device": ({"v": WINDOWS["v"].to("meta")}, ValueError, "v", "k's device", "meta"),
    "q_dtype": ({"q": WINDOWS["q"].half()}, TypeError, "q", "k's dtype", "torch.float16"),
    "v_dtype": ({"v": WINDOWS["v"].double()}, TypeError, "v", "k's dtype", "float64"),
    "pad_mode": ({"pad_mode": "reflect"}, ValueError, "pad_mode", "one of", "'reflect'"),
    "k_rank_3": ({"k": WINDOWS["k"][0, 0]}, ValueError, "k", "[B, H, W, h, d]", "[12, 2, 8]"),
    "k_rank_6": ({"k": WINDOWS["k"][None]}, ValueError, "k", "[B, H, W, h, d]", "[1, 2"),
    "v_shape": (
        {"v": WINDOWS["v"][:, 1:]}, ValueError, "v", "[2, 8, 12, 2, 8]", "[2, 7, 12, 2, 8]",
    ),
    "q_shape": ({"q": WINDOWS["q"][..., :4]}, ValueError, "q", "[2, 8, 12, 2, 8]", "2, 4]"),
    "q_tokens": (
        {"q": torch.randn(2, 15, 2, 8)}, ValueError, "q", "[2, 16, 2, 8]", "[2, 15, 2, 8]",
    ),
    "q_batch": ({"q": torch.randn(1, 16, 2, 8)}, ValueError, "q", "[2, 16", "[1, 16"),
    "q_rank": ({"q": torch.randn(2, 16, 16)}, ValueError, "q", "shape", "[2, 16, 16]"),
    "no_heads": (
        {x: torch.randn(2, 8, 12, 0, 8) for x in "qkv"}, ValueError, "k", "one head", "0, 8]",
    ),
    "no_channels": (
        {x: torch.randn(2, 8, 12, 2, 0) for x in "qkv"}, ValueError, "k", "channel", "2, 0]",
    ),
    "no_map": ({x: torch.randn(2, 0, 12, 2, 8) for x in "qkv"}, ValueError, "k", "1 x 1", "[2, 0"),
    "window_missing": ({"window": None}, ValueError, "window", "given", "None"),
    "window_zero": ({"window": (0, 4)}, ValueError, "window", "at least 1", "(0, 4)"),
    "window_negative": ({"window": -4}, ValueError, "window", "at least 1", "(-4, -4)"),
    "window_three": ({"window": (4, 4, 4)}, ValueError, "window", "two ints", "(4, 4, 4)"),
    "window_float": ({"window": 4.0}, TypeError, "window", "int", "4.0"),
    "window_float_pair": ({"window": (4.0, 4)}, TypeError, "window", "int", "4.0"),
    "window_bool": ({"window": True}, TypeError, "window", "int", "True"),
    "window_none_pair": ({"window": (4, None)}, TypeError, "window", "int", "None"),
    "window_huge": (
        {"window": 2**40, "pad_mode": "pad_then_roll"}, ValueError, "window", "tokens", str(2**40),
    ),
    "window_huge_axis": (
        {"window": (2**31, 1), "pad_mode": "roll_then_pad"}, ValueError, "window", "tokens",
        str(2**31),
    ),
    "window_does_not_divide": (
        {"window": (4, 5)}, ValueError, "window", "divide the map (8, 12)", "(4, 5)",
    ),
    "shift_negative": ({"shift": (-1, 0)}, ValueError, "shift", "0 <= shift", "(-1, 0)"),
    "shift_window": ({"shift": (0, 4)}, ValueError, "shift", "(4, 4)", "(0, 4)"),
    "shift_float": ({"shift": 1.5}, TypeError, "shift", "int", "1.5"),
    "shift_float_pair": ({"shift": (1, 1.5)}, TypeError, "shift", "int", "1.5"),
    "shift_one": ({"shift": (1,)}, ValueError, "shift", "two ints", "(1,)"),
    "k_pad_shape": ({"k_pad": torch.randn(8)}, ValueError, "k_pad", "[h*d] = [16]", "[8]"),
    "v_pad_shape": ({"v_pad": torch.randn(8, 2)}, ValueError, "v_pad", "[h, d]", "[8, 2]"),
    "k_pad_type": ({"k_pad": 0.0}, TypeError, "k_pad", "torch.Tensor", "float"),
    "v_pad_int": (
        {"v_pad": torch.ones(16, dtype=torch.long)}, TypeError, "v_pad", "dtype", "int64",
    ),
    "v_pad_device": (
        {"v_pad": torch.ones(16, device="meta")}, ValueError, "v_pad", "device", "meta",
    ),
    "table_shape": (
        {"bias_table": torch.randn(2, 49)}, ValueError, "bias_table", "[49, 2]", "[2, 49]",
    ),
    "table_complex": (
        {"bias_table": torch.randn(49, 2, dtype=torch.complex64)}, TypeError, "bias_table",
        "dtype", "complex64",
    ),
    "bias_shape": (
        {"bias": torch.randn(2, 1, 16)}, ValueError, "bias", "[2, 16, 16]", "[2, 1, 16]",
    ),
    "bias_twice": (
        {"bias": torch.randn(2, 16, 16), "bias_table": torch.randn(49, 2)}, ValueError,
        "bias", "bias_table", "both",
    ),
    "mask_name": ({"mask": "causal"}, ValueError, "mask", '"swin"', "'causal'"),
    "mask_type": ({"mask": True}, TypeError, "mask", "torch.Tensor", "bool"),
    "mask_bool": (
        {"mask": torch.ones(1, 16, 16, dtype=torch.bool)}, TypeError, "mask", "dtype", "bool",
    ),
    "mask_rank": ({"mask": torch.ones(16, 16)}, ValueError, "mask", "nM", "[16, 16]"),
    "mask_shape": ({"mask": torch.ones(1, 16, 8)}, ValueError, "mask", "16, 16]", "[1, 16, 8]"),
    "mask_empty": ({"mask": torch.ones(0, 16, 16)}, ValueError, "mask", "divides 6", "0"),
    "mask_count": ({"mask": torch.ones(4, 16, 16)}, ValueError, "mask", "divides 6", "4"),
    "mask_grad": (
        {"mask": torch.ones(1, 16, 16, requires_grad=True)}, ValueError, "mask", "grad",
        "requires_grad=True",
    ),
    "scale_shape": ({"scale": torch.ones(3)}, ValueError, "scale", "[h] = [2]", "[3]"),
    "scale_type": ({"scale": "1"}, TypeError, "scale", "float", "str"),
    "scale_bool": ({"scale": True}, TypeError, "scale", "float", "bool"),
    "mask_value": ({"mask": "swin", "mask_value": "x"}, TypeError, "mask_value", "float", "str"),
    "qk_l2norm": ({"qk_l2norm": "yes"}, TypeError, "qk_l2norm", "bool", "str"),
    "impl": ({"impl": "fast"}, ValueError, "impl", '"auto"', "'fast'"),
}
BAD_FULL_CALLS: dict[str, BadCall] = {
    "window": ({"window": 4}, ValueError, "window", "5-D", "[2, 5, 2, 8]"),
    "shift": ({"shift": 1}, ValueError, "shift", "5-D", "[2, 5, 2, 8]"),
    "swin": ({"mask": "swin"}, ValueError, "mask='swin'", "5-D", "[2, 5, 2, 8]"),
    "pad": ({"k_pad": torch.ones(16)}, ValueError, "k_pad", "5-D", "[2, 5, 2, 8]"),
    "table": ({"bias_table": torch.ones(9, 2)}, ValueError, "bias_table", "5-D", "2, 8]"),
    "q_rank": ({"q": torch.randn(2, 5, 1, 2, 8)}, ValueError, "q", "Nq", "[2, 5, 1, 2, 8]"),
    "q_batch": ({"q": torch.randn(3, 5, 2, 8)}, ValueError, "q", "[2, 5", "[3, 5, 2, 8]"),
    "v_tokens": ({"v": torch.randn(2, 6, 2, 8)}, ValueError, "v", "[2, 5", "[2, 6, 2, 8]"),
    "no_keys": (
        {x: torch.randn(2, 0, 2, 8) for x in "kv"}, ValueError, "k", "one token", "[2, 0, 2, 8]",
    ),
    "bias": ({"bias": torch.randn(2, 5, 4)}, ValueError, "bias", "[2, 5, 5]", "[2, 5, 4]"),
    "mask_count": ({"mask": torch.ones(3, 5, 5)}, ValueError, "mask", "divides 2", "3"),
}
# fmt: on


def refuses(base: dict[str, Any], impl: str, call: BadCall) -> None:
    changes, error, argument, rule, got = call
    with pytest.raises(error) as caught:
        window_attention(**{**base, "impl": impl, **changes})
    message = str(caught.value)
    assert type(caught.value) is error
    assert re.match(r"window_attention: \w", message), message
    before, _, after = message.partition(", got ")
    for part, text in ((argument, before), (rule, before), (got, after)):
        assert part in text, f"{part!r} is not in {text!r}"


@pytest.mark.parametrize("name", BAD_WINDOW_CALLS)
@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_bad_window_call(name: str, impl: str) -> None:
    refuses(WINDOWS, impl, BAD_WINDOW_CALLS[name])


@pytest.mark.parametrize("name", BAD_FULL_CALLS)
@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_bad_full_call(name: str, impl: str) -> None:
    refuses(FULL, impl, BAD_FULL_CALLS[name])


def test_good_base_calls() -> None:
    """The calls that the tests above spoil are right without the changes."""
    for base in (WINDOWS, FULL):
        for impl in ("fused", "reference"):
            window_attention(**base, impl=impl)


# The raw operator: an error for whatever would make a kernel read outside its tensors.

FORWARD_NAMES = (
    "q", "k", "v", "bias_table", "bias", "mask", "scale_per_head", "k_pad", "v_pad", "window",
    "shift", "pad_mode", "swin_mask_value", "scale", "qk_l2norm",
)  # fmt: skip
BACKWARD_NAMES = ("grad_out", "q", "k", "v", "lse", *FORWARD_NAMES[3:], "need_side")


def _meta(x: Tensor) -> Tensor:
    return x.to("meta")


def _broken(x: Tensor) -> Tensor:
    return x.movedim(-1, 1).contiguous().movedim(1, -1)


# Changes to one argument of a windowed call (map 6 x 11, window 4 x 4, both pads, a bias table,
# shared queries, 3 images, 2 heads of 32 channels).
BAD_ARGUMENTS: dict[str, tuple[str, Any]] = {
    "q_rank": ("q", lambda x: x[0]),
    "q_tokens": ("q", lambda x: x[:, 1:]),
    "q_heads": ("q", lambda x: x[:, :, :1]),
    "q_channels": ("q", lambda x: x[..., :8]),
    "q_batch": ("q", lambda x: x[:2]),
    "q_dtype": ("q", lambda x: x.half()),
    "q_stride": ("q", _broken),
    "q_meta": ("q", _meta),
    "q_scalar": ("q", torch.tensor(1.0)),
    "k_rank_3": ("k", lambda x: x[0, 0]),
    "k_rank_0": ("k", torch.tensor(1.0)),
    "k_rank_6": ("k", lambda x: x[None]),
    "k_int": ("k", lambda x: x.int()),
    "k_double": ("k", lambda x: x.double()),
    "k_stride": ("k", _broken),
    "k_meta": ("k", _meta),
    "k_no_heads": ("k", lambda x: x[:, :, :, :0]),
    "k_no_channels": ("k", lambda x: x[..., :0]),
    "k_no_map": ("k", lambda x: x[:, :0]),
    "v_shape": ("v", lambda x: x[:, :, 1:]),
    "v_rank": ("v", lambda x: x[0]),
    "v_dtype": ("v", lambda x: x.bfloat16()),
    "v_stride": ("v", _broken),
    "v_meta": ("v", _meta),
    "table_rows": ("bias_table", lambda x: x[1:]),
    "table_heads": ("bias_table", lambda x: x[:, :1]),
    "table_rank": ("bias_table", lambda x: x[0]),
    "table_int": ("bias_table", lambda x: x.int()),
    "table_meta": ("bias_table", _meta),
    "bias_too": ("bias", torch.randn(2, 16, 16)),
    "mask_rank": ("mask", torch.zeros(16, 16)),
    "mask_shape": ("mask", torch.zeros(1, 16, 15)),
    "mask_empty": ("mask", torch.zeros(0, 16, 16)),
    "mask_bool": ("mask", torch.ones(1, 16, 16, dtype=torch.bool)),
    "mask_meta": ("mask", torch.zeros(1, 16, 16, device="meta")),
    "scale_heads": ("scale_per_head", torch.ones(3)),
    "scale_rank": ("scale_per_head", torch.ones(2, 1, 1)),
    "scale_meta": ("scale_per_head", torch.ones(2, device="meta")),
    "k_pad_short": ("k_pad", lambda x: x[1:]),
    "k_pad_rank": ("k_pad", lambda x: x.view(2, 32)),
    "k_pad_meta": ("k_pad", _meta),
    "v_pad_short": ("v_pad", lambda x: x[:1]),
    "v_pad_int": ("v_pad", lambda x: x.long()),
    "window_empty": ("window", []),
    "window_one": ("window", [4]),
    "window_three": ("window", [4, 4, 4]),
    "window_zero": ("window", [0, 4]),
    "window_negative": ("window", [4, -4]),
    "window_2_40": ("window", [2**40, 2**40]),
    "window_2_40_row": ("window", [2**40, 1]),
    "window_2_32": ("window", [2**32, 2**32]),
    "window_2_31": ("window", [2**31 - 1, 2**31 - 1]),
    "window_2_16": ("window", [2**16, 2**16]),
    "window_max": ("window", [2**63 - 1, 2**63 - 1]),
    "window_min": ("window", [-(2**63), -(2**63)]),
    "window_other": ("window", [2, 8]),
    "shift_empty": ("shift", []),
    "shift_one": ("shift", [1]),
    "shift_three": ("shift", [0, 0, 0]),
    "shift_negative": ("shift", [-1, 0]),
    "shift_window": ("shift", [0, 4]),
    "shift_huge": ("shift", [2**32, 2**32]),
    "shift_max": ("shift", [2**63 - 1, 0]),
    "shift_min": ("shift", [0, -(2**63)]),
    "pad_mode_garbage": ("pad_mode", "garbage"),
    "pad_mode_empty": ("pad_mode", ""),
    "pad_mode_none": ("pad_mode", "none"),
    "pad_mode_long": ("pad_mode", "x" * 10000),
}

BAD_BACKWARD_ARGUMENTS: dict[str, tuple[str, Any]] = {
    "grad_shape": ("grad_out", lambda x: x[:, 1:]),
    "grad_rank": ("grad_out", lambda x: x[0]),
    "grad_stride": ("grad_out", _broken),
    "grad_dtype": ("grad_out", lambda x: x.double()),
    "grad_meta": ("grad_out", _meta),
    "lse_windows": ("lse", lambda x: x[:, 1:]),
    "lse_heads": ("lse", lambda x: x[:, :, 1:]),
    "lse_tokens": ("lse", lambda x: x[..., 1:]),
    "lse_rank": ("lse", lambda x: x[0]),
    "lse_dtype": ("lse", lambda x: x.double()),
    "lse_half": ("lse", lambda x: x.half()),
    "lse_stride": ("lse", _broken),
    "lse_meta": ("lse", _meta),
    "need_side_empty": ("need_side", []),
    "need_side_four": ("need_side", [True] * 4),
    "need_side_six": ("need_side", [True] * 6),
}


def spoiled(names: tuple[str, ...], args: tuple[Any, ...], change: tuple[str, Any]) -> list[Any]:
    argument, value = change
    spoiled_args = list(args)
    i = names.index(argument)
    is_change = callable(value) and not isinstance(value, Tensor)
    spoiled_args[i] = value(args[i]) if is_change else value
    return spoiled_args


def raises_clearly(op: Any, args: list[Any]) -> None:
    with pytest.raises(RuntimeError) as caught:
        op(*args)
    assert "window_attention" in str(caught.value)


@pytest.mark.parametrize("name", BAD_ARGUMENTS)
def test_raw_forward_refuses(name: str) -> None:
    args = build("gcvit_global_padded").args
    FORWARD(*args)
    raises_clearly(FORWARD, spoiled(FORWARD_NAMES, args, BAD_ARGUMENTS[name]))


@pytest.mark.parametrize("name", BAD_ARGUMENTS | BAD_BACKWARD_ARGUMENTS)
def test_raw_backward_refuses(name: str) -> None:
    args = build_backward("gcvit_global_padded").args
    BACKWARD(*args)
    change = (BAD_ARGUMENTS | BAD_BACKWARD_ARGUMENTS)[name]
    raises_clearly(BACKWARD, spoiled(BACKWARD_NAMES, args, change))


@pytest.mark.parametrize(
    "change",
    [
        ("q", lambda x: x[:1]),
        ("q", lambda x: x[:, :, :1]),
        ("q", lambda x: x[:, :, None]),
        ("k", lambda x: x[:, :0]),
        ("v", lambda x: x[:, 1:]),
        ("bias", lambda x: x[:, 1:]),
        ("bias", lambda x: x[..., 1:]),
        ("bias", lambda x: x[:1]),
        ("mask", lambda x: x[:, 1:]),
        ("mask", lambda x: x[:0]),
        ("bias_table", torch.ones(9, 2)),
        ("k_pad", torch.ones(64)),
        ("v_pad", torch.ones(64)),
        ("window", [4, 4]),
        ("swin_mask_value", -100.0),
    ],
    ids=lambda change: change[0],
)
def test_raw_full_domain_refuses(change: tuple[str, Any]) -> None:
    args = build("full_bias_mask").args
    raises_clearly(FORWARD, spoiled(FORWARD_NAMES, args, change))
    args = build_backward("full_bias_mask").args
    raises_clearly(BACKWARD, spoiled(BACKWARD_NAMES, args, change))


@pytest.mark.parametrize("dim", [129, 256, 4096])
def test_raw_head_dim_above_the_kernels(dim: int) -> None:
    args = list(build("pvt_one_key").args)
    args[:3] = torch.randn(3, 1, 2, 1, dim).unbind(0)
    raises_clearly(FORWARD, args)


def test_expanded_maps_beyond_32_bits_are_refused() -> None:
    """Stride 0 makes tensors of any size from one element; token counts must not wrap."""
    x = torch.randn(1, 1, 1, 1, 8)
    args = list(build("swin_unshifted").args)
    args[3] = None
    for size in [(2**20, 2**20), (2**31, 1), (1, 2**33), (2**16, 2**16)]:
        args[:3] = [x.expand(1, *size, 1, 8)] * 3
        args[9:12] = [[1, 1], [0, 0], "none"]
        raises_clearly(FORWARD, args)
        with pytest.raises(ValueError, match="window_attention"):
            window_attention(*args[:3], window=1, impl="fused")
    tokens = x[0].expand(1, 2**31, 1, 8)
    with pytest.raises(ValueError, match="window_attention"):
        window_attention(x[0], tokens, tokens, impl="fused")
    args[:3], args[9] = [x[0], tokens, tokens], []
    raises_clearly(FORWARD, args)


def test_results_too_large_for_memory_raise() -> None:
    """2**50 queries: allocation fails with an error, in the public function too."""
    q = torch.randn(1, 1, 1, 8).expand(2**25, 2**25, 1, 8)
    k = torch.randn(1, 1, 1, 8).expand(2**25, 1, 1, 8)
    with pytest.raises(RuntimeError):
        window_attention(q, k, k, impl="fused")
