# SPDX-License-Identifier: Apache-2.0
"""Elastic binarization: opcheck, torch.compile, bad input."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import fastbb
from fastbb.ops import elastic_binarize
from fastbb.testing.elastic_binarize import build, build_backward

FORWARD = torch.ops.fastbb.elastic_binarize.default
BACKWARD = torch.ops.fastbb.elastic_binarize_backward.default
OPCHECK_CASES = ["ternary_clip", "plus_bireal", "unsigned", "no_alpha", "strided_columns", "plain"]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", OPCHECK_CASES)
def test_opcheck(name: str) -> None:
    torch.library.opcheck(FORWARD, build(name, requires_grad=True).args)
    torch.library.opcheck(BACKWARD, build_backward(name).args)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_opcheck_16_bit(dtype: torch.dtype) -> None:
    torch.library.opcheck(FORWARD, build("minus_clip_open", dtype=dtype, requires_grad=True).args)
    torch.library.opcheck(BACKWARD, build_backward("minus_clip_open", dtype=dtype).args)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize(("kind", "ste"), [("ternary", "clip"), ("unsigned", "clip")])
def test_compiles_without_graph_break(kind: str, ste: str, dynamic: bool) -> None:
    def step(x: Tensor, alpha: Tensor, shift: Tensor) -> Tensor:
        return elastic_binarize(x * 2, alpha, shift, kind=kind, ste=ste).square().sum()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows, k in ((3, 130), (5, 130), (4, 64), (6, 257)):
        results = []
        for function in (step, compiled):
            inputs = [
                torch.linspace(-1, 1, rows * k).view(rows, k).requires_grad_(),
                torch.tensor([0.75], requires_grad=True),
                torch.linspace(-0.5, 0.5, k).requires_grad_(),
            ]
            loss = function(*inputs)
            loss.backward()
            results.append([loss.detach(), *(x.grad for x in inputs)])
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)


def test_compiled_module_with_one_graph_for_all_sizes() -> None:
    module = fastbb.nn.ElasticBinarize(96, kind="plus")
    graphs = []

    def backend(graph: torch.fx.GraphModule, _inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile(module, fullgraph=True, backend=backend, dynamic=True)
    for rows in (4, 7, 12):
        x = torch.randn(2, rows, 96)
        assert torch.equal(compiled(x), module(x))
    assert len(graphs) == 1


X = torch.randn(4, 40)
BAD_CALLS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x_list": ({"x": [1.0]}, TypeError, r"x must be a torch.Tensor, got list"),
    "x_int": ({"x": X.int()}, TypeError, r"x must have a dtype of .*, got torch.int32"),
    "x_sparse": ({"x": X.to_sparse()}, TypeError, r"x must be a dense tensor"),
    "x_scalar": ({"x": torch.tensor(1.0)}, ValueError, r"x must be \[\.\.\., K\], got \[\]"),
    "alpha_float": ({"alpha": 1.0}, TypeError, r"alpha must be a torch.Tensor, got float"),
    "alpha_int": ({"alpha": torch.ones(1).int()}, TypeError, r"alpha must have a dtype"),
    "alpha_shape": ({"alpha": torch.ones(2)}, ValueError, r"alpha must .* \[\], got \[2\]"),
    "alpha_matrix": ({"alpha": torch.ones(1, 1)}, ValueError, r"alpha must have shape"),
    "alpha_device": ({"alpha": torch.ones(1, device="meta")}, ValueError, r"alpha .*x's device"),
    "shift_shape": ({"shift": torch.ones(1)}, ValueError, r"shift must .* \[40\], got \[1\]"),
    "shift_matrix": ({"shift": torch.ones(4, 40)}, ValueError, r"shift must have shape"),
    "shift_device": ({"shift": torch.ones(40, device="meta")}, ValueError, r"shift .*x's device"),
    "kind": ({"kind": "signed"}, ValueError, r"kind must be one of .*, got 'signed'"),
    "ste": ({"ste": "react"}, ValueError, r"ste must be one of .*, got 'react'"),
    "impl": ({"impl": "fast"}, ValueError, r"impl must be .*, got 'fast'"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_call(name: str) -> None:
    change, error, text = BAD_CALLS[name]
    with pytest.raises(error, match=f"elastic_binarize: {text}"):
        elastic_binarize(**({"x": X} | change))


def test_forced_kernel_that_cannot_run_says_why() -> None:
    with pytest.raises(NotImplementedError, match=r"dtype torch\.float64"):
        elastic_binarize(X.double(), impl="fused")
    assert elastic_binarize(X.double()).dtype == torch.float64


ALPHA, SHIFT = torch.ones(1), torch.zeros(40)
GOOD_FORWARD = {
    "x": X, "alpha": ALPHA, "shift": SHIFT, "kind": "ternary", "ste": "clip", "save": True,
}  # fmt: skip
BAD_FORWARD: dict[str, tuple[dict[str, Any], str]] = {
    "x_scalar": ({"x": torch.tensor(1.0)}, "x must be"),
    "x_double": ({"x": X.double()}, "x must be float32"),
    "alpha_shape": ({"alpha": torch.ones(0)}, "alpha must have shape"),
    "alpha_int": ({"alpha": ALPHA.int()}, "alpha must have a floating-point dtype"),
    "shift_short": ({"shift": SHIFT[1:]}, "shift must have shape"),
    "shift_matrix": ({"shift": X}, "shift must have shape"),
    "kind": ({"kind": ""}, "kind must be"),
    "ste": ({"ste": "x"}, "ste must be"),
}


@pytest.mark.parametrize("name", BAD_FORWARD)
def test_raw_forward_refuses(name: str) -> None:
    change, text = BAD_FORWARD[name]
    FORWARD(*GOOD_FORWARD.values())
    with pytest.raises(RuntimeError, match=f"elastic_binarize: {text}"):
        FORWARD(*(GOOD_FORWARD | change).values())


PLANES = FORWARD(*GOOD_FORWARD.values())[1]
GOOD_BACKWARD = {
    "grad": X, "x": None, "planes": PLANES, "alpha": ALPHA, "shift": SHIFT, "kind": "ternary",
    "ste": "clip", "need_alpha": True, "need_shift": True,
}  # fmt: skip
NEEDS_X = {"kind": "unsigned", "x": X}
BAD_BACKWARD: dict[str, tuple[dict[str, Any], str]] = {
    "grad_scalar": ({"grad": torch.tensor(1.0)}, "grad must be"),
    "grad_double": ({"grad": X.double()}, "grad must be float32"),
    "no_planes": ({"planes": torch.empty(0, dtype=torch.uint8)}, "planes must have shape"),
    "planes_few": ({"planes": PLANES[:, :2].contiguous()}, "planes must have shape"),
    "planes_short": ({"planes": PLANES[..., :8].contiguous()}, "planes must have shape"),
    "planes_of_another_ste": ({"ste": "identity"}, "planes must have shape"),
    "planes_int": ({"planes": PLANES.int()}, "planes must be contiguous uint8"),
    "planes_strided": (
        {"planes": PLANES.transpose(0, 1).contiguous().transpose(0, 1)}, "planes must be contiguous"
    ),
    "no_x": ({"kind": "unsigned"}, "x must be given"),
    "no_x_bireal": ({"ste": "bireal"}, "x must be given"),
    "x_shape": (NEEDS_X | {"x": X[:3]}, "x must have grad's shape"),
    "x_dtype": (NEEDS_X | {"x": X.half()}, "x must have grad's dtype"),
    "alpha_shape": (NEEDS_X | {"alpha": torch.ones(2)}, "alpha must have shape"),
    "shift_short": (NEEDS_X | {"shift": SHIFT[1:]}, "shift must have shape"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_BACKWARD)
def test_raw_backward_refuses(name: str) -> None:
    change, text = BAD_BACKWARD[name]
    BACKWARD(*GOOD_BACKWARD.values())
    BACKWARD(*(GOOD_BACKWARD | NEEDS_X).values())
    with pytest.raises(RuntimeError, match=f"elastic_binarize: {text}"):
        BACKWARD(*(GOOD_BACKWARD | change).values())


def test_backward_without_saved_planes_raises() -> None:
    x = X.clone().requires_grad_()
    out, _ = FORWARD(x, None, None, "plus", "clip", False)
    with pytest.raises(RuntimeError, match="planes must have shape"):
        out.sum().backward()
