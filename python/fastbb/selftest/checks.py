# SPDX-License-Identifier: Apache-2.0
"""What the self-test runs of each operator, and the exact results it compares with.

A new operator adds one line to `CHECKS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastbb.ops import (
    binary_embedding,
    pack_sign,
    pack_unsigned,
    pack_weight,
    unpack_bits,
    window_attention,
)
from fastbb.testing import (
    SAMPLES,
    Bounds,
    Sample,
    Tolerance,
    assert_close,
    assert_grads_close,
)
from fastbb.testing.sample import leaves, random_like
from fastbb.testing.window_attention import in_float64, raw_args

Outputs = dict[str, Tensor]
_GRAD_SEED = 7


@dataclass(frozen=True)
class Job:
    """One call of a raw operator, which may be repeated.

    Attributes:
        operator: overload of the raw operator, e.g. `torch.ops.fastbb.null.default`.
        args: its arguments.
        leaves: inputs whose gradients are the outputs; empty: the results are.
        grad_out: gradient of the first result, where there are leaves.
        names: of the results.
    """

    operator: Any
    args: tuple[Any, ...]
    leaves: dict[str, Tensor]
    grad_out: Tensor | None
    names: tuple[str, ...]

    def run(self) -> Outputs:
        """Results, or gradients of the leaves by name."""
        if self.leaves:
            result = self.operator(*self.args)[0]
            wanted = list(self.leaves.values())
            # What leads from the leaves to the arguments was recorded once, for all runs.
            grads = torch.autograd.grad(result, wanted, self.grad_out, retain_graph=True)
            return dict(zip(self.leaves, grads, strict=True))
        with torch.no_grad():
            results = self.operator(*self.args)
        results = (results,) if isinstance(results, Tensor) else results
        return dict(zip(self.names, results, strict=True))

    def inputs(self) -> list[Tensor]:
        """Every tensor that is read."""
        given = [*self.args, self.grad_out]
        return [x for x in given if isinstance(x, Tensor)]


@dataclass(frozen=True)
class Check:
    """How one operator is tested.

    Attributes:
        operator: name of the raw operator that is called, without the namespace.
        kernels: operators that need a kernel for this.
        samples: as in `fastbb.testing.SAMPLES`.
        exact: a sample's exact outputs, on the CPU.
        names: of the results.
        gradients: whether the outputs are gradients.
    """

    operator: str
    kernels: tuple[str, ...]
    samples: Callable[..., Iterator[Sample]]
    exact: Callable[[Sample], Outputs]
    names: tuple[str, ...] = ("out",)
    gradients: bool = False

    @property
    def overload(self) -> Any:
        return getattr(torch.ops.fastbb, self.operator).default

    @property
    def has_tf32(self) -> bool:
        """Whether products of float32 inputs may be asked to round to tf32."""
        return "tf32" in self._argument_names()

    def _argument_names(self) -> list[str]:
        return [argument.name for argument in self.overload._schema.arguments]

    def job(self, sample: Sample, tf32: bool) -> Job:
        """The call of a sample."""
        args = list(sample.args)
        if tf32:
            args[self._argument_names().index("tf32")] = True
        wanted: dict[str, Tensor] = {}
        grad_out = None
        if self.gradients:
            wanted = leaves(sample.kwargs)
            with torch.no_grad():
                grad_out = random_like(self.overload(*args)[0], _GRAD_SEED)
        return Job(self.overload, tuple(args), wanted, grad_out, self.names)

    def judge(
        self, actual: Outputs, exact: Outputs, tolerances: dict[str, Tolerance], difficulty: float
    ) -> float:
        """Largest error in units of its bound; raises OutOfBounds above 1.

        `tolerances` are by name of the result, those of gradients under `"grad"`.
        """
        if self.gradients:
            return assert_grads_close(actual, exact, tolerances["grad"].grad_for(difficulty))

        def bounds(name: str) -> Bounds:
            return tolerances[name].forward_for(difficulty)

        return max(assert_close(actual[name], exact[name], bounds(name), name) for name in exact)


def _exact_null(sample: Sample) -> Outputs:
    return {"out": sample.args[0].double()}


def _exact_pack(sample: Sample) -> Outputs:
    x, shift, alpha, kind = sample.args
    if alpha is None:
        return {"out": pack_sign(x, shift, zero_policy=kind, impl="reference")}
    return {"out": pack_unsigned(x, alpha, shift, impl="reference")}


def _exact_weight(sample: Sample) -> Outputs:
    weight, center, scale, policy = sample.args
    bits, sizes = pack_weight(
        weight, center=center, scale=scale, zero_policy=policy, impl="reference"
    )
    return {"bits": bits, "scale": sizes.double()}


def _exact_unpack(sample: Sample) -> Outputs:
    bits, k, kind, dtype = sample.args
    return {"out": unpack_bits(bits, k, kind=kind, dtype=dtype, impl="reference").double()}


def _exact_embedding(sample: Sample) -> Outputs:
    ids, bits, scale, k, dtype = sample.args
    rows = binary_embedding(ids, bits, scale.float(), k=k, dtype=dtype, impl="reference")
    return {"out": rows.double()}


def _exact_attention(sample: Sample) -> Outputs:
    """The result by the reference in float64. The reference has no log-sum-exp: that one comes from
    the CPU kernel in float32, at the level in force.
    """
    kwargs = in_float64(sample.kwargs)
    singles = {key: x.float() if isinstance(x, Tensor) else x for key, x in kwargs.items()}
    _, lse = torch.ops.fastbb.window_attention.default(*raw_args(singles))
    return {"out": window_attention(**kwargs, impl="reference"), "lse": lse.double()}


def _exact_gradients(sample: Sample) -> Outputs:
    kwargs = in_float64(sample.kwargs)
    result = window_attention(**kwargs, impl="reference")
    # Rounded as the operator's own gradient is.
    grad_out = random_like(result.to(sample.args[0].dtype), _GRAD_SEED).double()
    wanted = leaves(kwargs)
    grads = torch.autograd.grad(result, list(wanted.values()), grad_out)
    return dict(zip(wanted, grads, strict=True))


def _with_gradients(device: str | torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    return SAMPLES["fastbb::window_attention"](device, dtype, requires_grad=True)


CHECKS: dict[str, Check] = {
    "binary_embedding": Check(
        "binary_embedding",
        ("binary_embedding",),
        SAMPLES["fastbb::binary_embedding"],
        _exact_embedding,
    ),
    "null": Check("null", ("null",), SAMPLES["fastbb::null"], _exact_null),
    "pack_bits": Check("pack_bits", ("pack_bits",), SAMPLES["fastbb::pack_bits"], _exact_pack),
    "pack_weight": Check(
        "pack_weight",
        ("pack_weight",),
        SAMPLES["fastbb::pack_weight"],
        _exact_weight,
        names=("bits", "scale"),
    ),
    "unpack_bits": Check(
        "unpack_bits", ("unpack_bits",), SAMPLES["fastbb::unpack_bits"], _exact_unpack
    ),
    "window_attention": Check(
        "window_attention",
        ("window_attention",),
        SAMPLES["fastbb::window_attention"],
        _exact_attention,
        names=("out", "lse"),
    ),
    # Through autograd, so that the log-sum-exp is the one that the same device's forward made.
    "window_attention_backward": Check(
        "window_attention",
        ("window_attention", "window_attention_backward"),
        _with_gradients,
        _exact_gradients,
        gradients=True,
    ),
}
"""Operator -> its check."""
