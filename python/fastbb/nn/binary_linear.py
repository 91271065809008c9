# SPDX-License-Identifier: Apache-2.0
"""Linear layers of binary weights and binary inputs: for training, and packed for inference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastbb.nn.binary_calibrate import set_alpha
from fastbb.ops import binary_linear, binary_linear_train, pack_weight
from fastbb.ops._checks import check_choice, fail
from fastbb.ops.binary_pack import row_bytes
from fastbb.ops.elastic_binarize import KINDS, STES, Kind, Ste

Center = Literal["none", "tensor", "row"]
Scale = Literal["tensor", "row"]
ZeroPolicy = Literal["plus", "minus"]
WeightSte = Literal["identity", "clip"]
Activation = Literal["none", "relu", "gelu"]


class BinaryLinear(nn.Linear):
    """y = (alpha * value(x + shift)) (scale * sign(weight - mean))^T + bias.

    Latent weights keep their float values and are binarized at every call, as are inputs; training
    saves bits instead of activations. Parameter names `weight` and `bias` are `nn.Linear`'s.

    Args:
        kind: values of x: `"ternary"` (+1, 0 at exactly 0, -1), `"plus"`, `"minus"`, `"unsigned"`
            (1 above alpha / 2, else 0).
        ste: gradient of the signs of x: `"clip"`, `"clip_open"`, `"identity"`, `"bireal"`.
        center: mean that is taken from the weight: of the `"tensor"`, of each `"row"`, `"none"`.
        scale: mean of |weight| that multiplies its signs: of the `"tensor"` or of each `"row"`.
        zero_policy: sign of a centred weight of 0, `"plus"` or `"minus"`.
        weight_ste: gradient of the signs of the weight, `"identity"` or `"clip"`.
        elastic: a learned scale `alpha` `[1]`; `fastbb.nn.calibrate` sets it from data. Unsigned
            values need one.
        shift: a learned shift per input channel, at first 0.

    `fastbb.nn.PRESETS` has the settings of papers.
    """

    calibrating = False
    alpha: nn.Parameter | None
    shift: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        kind: Kind = "ternary",
        ste: Ste = "clip",
        center: Center = "tensor",
        scale: Scale = "tensor",
        zero_policy: ZeroPolicy = "plus",
        weight_ste: WeightSte = "identity",
        elastic: bool = True,
        shift: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        op = "BinaryLinear"
        check_choice(op, "kind", kind, KINDS)
        check_choice(op, "ste", ste, STES)
        check_choice(op, "center", center, ("none", "tensor", "row"))
        check_choice(op, "scale", scale, ("tensor", "row"))
        check_choice(op, "zero_policy", zero_policy, ("plus", "minus"))
        check_choice(op, "weight_ste", weight_ste, ("identity", "clip"))
        if kind == "unsigned" and not elastic:
            fail(op, "elastic", "must be True for unsigned inputs", elastic)
        self.kind: Kind = kind
        self.ste: Ste = ste
        self.center: Center = center
        self.scale: Scale = scale
        self.zero_policy: ZeroPolicy = zero_policy
        self.weight_ste: WeightSte = weight_ste
        self._add_quantizer(elastic, shift)

    def _add_quantizer(self, elastic: bool, shift: bool) -> None:
        like = self.weight
        self.alpha = nn.Parameter(like.new_ones(1)) if elastic else None
        self.shift = nn.Parameter(like.new_zeros(self.in_features)) if shift else None

    @classmethod
    def from_float(cls, linear: nn.Linear, **settings: Any) -> BinaryLinear:
        """A binary layer that takes over the parameters of `linear`: the same tensors, not copies.

        `settings` are those of the constructor.
        """
        if not isinstance(linear, nn.Linear):
            fail("BinaryLinear.from_float", "linear", "must be a Linear", type(linear), TypeError)
        module = cls(
            linear.in_features,
            linear.out_features,
            bias=False,
            device="meta",
            dtype=linear.weight.dtype,
            **settings,
        )
        module.weight = linear.weight
        module.bias = linear.bias
        module._add_quantizer(module.alpha is not None, module.shift is not None)
        return module.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        if self.calibrating:
            if self.alpha is not None:
                set_alpha(self.alpha, input, self.shift, self.kind)
            self.calibrating = False
        return binary_linear_train(
            input,
            self.weight,
            self.bias,
            alpha=self.alpha,
            shift=self.shift,
            kind=self.kind,
            ste=self.ste,
            center=self.center,
            scale=self.scale,
            zero_policy=self.zero_policy,
            weight_ste=self.weight_ste,
        )

    @torch.no_grad()
    def to_packed(self) -> PackedBinaryLinear:
        """The layer for inference, with a bit per weight. Its results are the same."""
        packed = PackedBinaryLinear(
            self.in_features,
            self.out_features,
            bias=self.bias is not None,
            kind=self.kind,
            scale=self.scale,
            elastic=self.alpha is not None,
            shift=self.shift is not None,
            device="meta",
            dtype=self.weight.dtype,
        )
        packed.weight_bits, packed.weight_scale = pack_weight(
            self.weight, center=self.center, scale=self.scale, zero_policy=self.zero_policy
        )
        packed.weight_shape = shape_tensor(self.out_features, self.in_features, self.weight.device)
        for name in ("bias", "alpha", "shift"):
            value = getattr(self, name)
            setattr(packed, name, None if value is None else value.detach().clone())
        return packed.train(self.training)

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, kind={self.kind!r}, ste={self.ste!r}, "
            f"center={self.center!r}, scale={self.scale!r}, weight_ste={self.weight_ste!r}, "
            f"elastic={self.alpha is not None}, shift={self.shift is not None}"
        )


class PackedModule(nn.Module):
    """What packed modules share: buffers `weight_bits`, `weight_scale`, `weight_shape`.

    `weight_shape` `[2]` says how many rows and elements the bits stand for, so that a saved state
    is checked when it is loaded. Conversions of the dtype leave the scale in float32.
    """

    weight_bits: Tensor
    weight_scale: Tensor
    weight_shape: Tensor

    def _add_bits(self, rows: int, elements: int, scales: int, device: Any) -> None:
        bits = torch.zeros(rows, row_bytes(elements), dtype=torch.uint8, device=device)
        self.register_buffer("weight_bits", bits)
        self.register_buffer("weight_scale", torch.ones(scales, device=device))
        self.register_buffer("weight_shape", shape_tensor(rows, elements, device))
        self.sizes = (rows, elements)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        scale = self._buffers["weight_scale"]
        super()._apply(fn, recurse)
        after = self._buffers["weight_scale"]
        if scale is not None and after is not None and after.dtype != scale.dtype:
            self._buffers["weight_scale"] = scale.to(after.device)
        return self

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        name = f"{type(self).__name__}: {prefix}"
        shape = state_dict.get(f"{prefix}weight_shape")
        if shape is not None and shape.tolist() != list(self.sizes):
            error_msgs.append(
                f"{name}weight_bits must hold [rows, elements] = {list(self.sizes)}, "
                f"got {shape.tolist()}"
            )
        bits = state_dict.get(f"{prefix}weight_bits")
        if bits is not None and bits.dtype != torch.uint8:
            error_msgs.append(f"{name}weight_bits must be uint8, got {bits.dtype}")
        elif bits is not None and _bits_beyond(bits, self.sizes[1]):
            error_msgs.append(f"{name}weight_bits must be 0 from element {self.sizes[1]} on")
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,
        )


def _bits_beyond(bits: Tensor, k: int) -> bool:
    """Whether a padding bit of rows of k elements is set."""
    if bits.dim() != 2 or bits.shape[1] != row_bytes(k) or bits.is_meta:
        return False
    whole, rest = divmod(k, 8)
    tail = bits[:, whole:].clone()
    if rest:
        tail[:, 0] >>= rest
    return bool(tail.any())


def shape_tensor(rows: int, elements: int, device: Any) -> Tensor:
    """`weight_shape` of a packed module."""
    return torch.tensor([rows, elements], dtype=torch.int64, device=device)


class PackedBinaryLinear(PackedModule):
    """`BinaryLinear` for inference: a bit per weight, products by AND and population count.

    Buffers: `weight_bits` uint8 `[N, bytes]`, `weight_scale` float32 `[1]` or `[N]`,
    `weight_shape`, and `bias`, `alpha`, `shift` where the layer has them.

    Args: as `BinaryLinear`, whose `to_packed` makes one; from the constructor all weights are -1,
    to be loaded.
    """

    bias: Tensor | None
    alpha: Tensor | None
    shift: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        kind: Kind = "ternary",
        scale: Scale = "tensor",
        elastic: bool = True,
        shift: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("PackedBinaryLinear", "kind", kind, KINDS)
        check_choice("PackedBinaryLinear", "scale", scale, ("tensor", "row"))
        self.in_features = in_features
        self.out_features = out_features
        self.kind: Kind = kind
        self._add_bits(out_features, in_features, out_features if scale == "row" else 1, device)
        factory = {"device": device, "dtype": dtype}
        self.register_buffer("bias", torch.zeros(out_features, **factory) if bias else None)
        self.register_buffer("alpha", torch.ones(1, **factory) if elastic else None)
        self.register_buffer("shift", torch.zeros(in_features, **factory) if shift else None)

    def forward(
        self,
        input: Tensor,
        *,
        activation: Activation = "none",
        then: PackedBinaryLinear | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """input float `[..., K]`, or uint8: this layer's packed input -> `[..., N]`.

        `then` is the layer that gets the result alone: it is packed as that layer's input, and
        never exists as floats. `dtype` of the result is by default input's, or float32 of bits.
        """
        if torch.is_grad_enabled() and input.requires_grad:
            raise NotImplementedError(
                "PackedBinaryLinear: input must not require a gradient, since packed weights have "
                "no latent values to train and no backward; use torch.no_grad(), or train the "
                "BinaryLinear it was packed from"
            )
        if dtype is None:
            dtype = torch.float32 if input.dtype == torch.uint8 else input.dtype
        return binary_linear(
            input,
            self.weight_bits,
            self.weight_scale,
            self.bias,
            k=self.in_features,
            alpha=self.alpha,
            shift=None if input.dtype == torch.uint8 else self.shift,
            kind=self.kind,
            activation=activation,
            out_dtype=dtype,
            out_kind=None if then is None else then.kind,
            out_alpha=None if then is None else then.alpha,
            out_shift=None if then is None else then.shift,
        )

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, kind={self.kind!r}, "
            f"scales={self.weight_scale.numel()}, elastic={self.alpha is not None}, "
            f"shift={self.shift is not None}"
        )


def feed_forward(x: Tensor, up: nn.Module, down: nn.Module, activation: Activation) -> Tensor:
    """down(activation(up(x))); from bits to bits where both layers are packed."""
    if isinstance(up, PackedBinaryLinear) and isinstance(down, PackedBinaryLinear):
        return down(up(x, activation=activation, then=down), dtype=x.dtype)
    hidden = up(x)
    return down(F.relu(hidden) if activation == "relu" else F.gelu(hidden))
