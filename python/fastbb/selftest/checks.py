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

from fastbb import reference
from fastbb.ops import binary_attention, elastic_binarize, window_attention
from fastbb.testing import (
    SAMPLES,
    Bounds,
    Sample,
    Tolerance,
    assert_close,
    assert_grads_close,
)
from fastbb.testing import elastic_binarize as _elastic
from fastbb.testing.sample import in_float64 as plain_in_float64
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


def _exact_gemm(sample: Sample) -> Outputs:
    return {"out": reference.bgemm(*sample.args).double()}


def _exact_linear(sample: Sample) -> Outputs:
    """Bits from float32 as the operator's own are; floats that are rounded no further."""
    kwargs = {**sample.kwargs, "out_dtype": torch.float64}
    return {"out": reference.binary_linear(**kwargs).double()}


def _exact_pack(sample: Sample) -> Outputs:
    x, shift, alpha, kind = sample.args
    if alpha is None:
        return {"out": reference.pack_sign(x, shift, kind)}
    return {"out": reference.pack_unsigned(x, alpha, shift)}


def _exact_weight(sample: Sample) -> Outputs:
    return dict(zip(("bits", "scale"), reference.pack_weight(*sample.args), strict=True))


def _exact_unpack(sample: Sample) -> Outputs:
    return {"out": reference.unpack_bits(*sample.args)}


def _exact_embedding(sample: Sample) -> Outputs:
    ids, bits, scale, *rest = sample.args
    return {"out": reference.binary_embedding(ids, bits, scale.float(), *rest)}


def _exact_binary_attention(sample: Sample) -> Outputs:
    """The result by the reference in float64; planes of q, k and v from the CPU kernel. Those of
    the probabilities may differ at ties, which the result would show.
    """
    kwargs = plain_in_float64(sample.kwargs)
    _, _, *planes = torch.ops.fastbb.binary_attention.default(*sample.args)
    names = ("q_planes", "k_planes", "v_planes")
    exact = dict(zip(names, planes[:3], strict=True))
    return {"out": binary_attention(**kwargs, impl="reference"), **exact}


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
    return _gradients(window_attention(**kwargs, impl="reference"), sample, leaves(kwargs))


def _gradients(result: Tensor, sample: Sample, wanted: dict[str, Tensor]) -> Outputs:
    # Rounded as the operator's own gradient is.
    grad_out = random_like(result.to(sample.args[0].dtype), _GRAD_SEED).double()
    grads = torch.autograd.grad(result, list(wanted.values()), grad_out)
    return dict(zip(wanted, grads, strict=True))


def _exact_elastic(sample: Sample) -> Outputs:
    kwargs = plain_in_float64(sample.kwargs)
    planes = _elastic.exact_planes(kwargs) if sample.args[-1] else torch.empty(0)
    return {"out": elastic_binarize(**kwargs, impl="reference"), "planes": planes.double()}


def _exact_planes(sample: Sample) -> Outputs:
    return {"out": _elastic.exact_planes(plain_in_float64(sample.kwargs)).double()}


def _exact_elastic_gradients(sample: Sample) -> Outputs:
    kwargs = plain_in_float64(sample.kwargs)
    return _gradients(elastic_binarize(**kwargs, impl="reference"), sample, leaves(kwargs))


def _elastic_with_gradients(device: str | torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    return SAMPLES["fastbb::elastic_binarize"](device, dtype, requires_grad=True)


def _with_gradients(device: str | torch.device, dtype: torch.dtype) -> Iterator[Sample]:
    return SAMPLES["fastbb::window_attention"](device, dtype, requires_grad=True)


CHECKS: dict[str, Check] = {
    "bgemm": Check("bgemm", ("bgemm",), SAMPLES["fastbb::bgemm"], _exact_gemm),
    "binary_attention": Check(
        "binary_attention",
        ("binary_attention",),
        SAMPLES["fastbb::binary_attention"],
        _exact_binary_attention,
        names=("out", "lse", "q_planes", "k_planes", "v_planes", "p_planes"),
    ),
    "binary_embedding": Check(
        "binary_embedding",
        ("binary_embedding",),
        SAMPLES["fastbb::binary_embedding"],
        _exact_embedding,
    ),
    "binary_linear": Check(
        "binary_linear", ("binary_linear",), SAMPLES["fastbb::binary_linear"], _exact_linear
    ),
    "elastic_binarize": Check(
        "elastic_binarize",
        ("elastic_binarize",),
        SAMPLES["fastbb::elastic_binarize"],
        _exact_elastic,
        names=("out", "planes"),
    ),
    "elastic_binarize_backward": Check(
        "elastic_binarize",
        ("elastic_binarize", "elastic_binarize_backward"),
        _elastic_with_gradients,
        _exact_elastic_gradients,
        gradients=True,
    ),
    "elastic_planes": Check(
        "elastic_planes",
        ("elastic_planes",),
        SAMPLES["fastbb::elastic_planes"],
        _exact_planes,
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
