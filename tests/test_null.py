# SPDX-License-Identifier: Apache-2.0
"""The five tests of an operator, on the worked example."""

import pytest
import torch

from fastbb import ops, reference
from fastbb.testing import SAMPLES

OP = "fastbb::null"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_matches_reference(isa, dtype):
    for sample in SAMPLES[OP]("cpu", dtype):
        (x,) = sample.args
        out = ops.null(x, impl="fused")
        assert out.is_contiguous()
        assert torch.equal(out, reference.null(x)), sample.name


def test_gradient_matches_reference():
    x = torch.randn(5, 7, requires_grad=True)
    weight = torch.randn(5, 7)
    (ops.null(x, impl="fused") * weight).sum().backward()
    assert torch.equal(x.grad, weight)


def test_opcheck():
    for sample in SAMPLES[OP]("cpu", torch.float32, requires_grad=True):
        torch.library.opcheck(torch.ops.fastbb.null.default, sample.args)


def test_compiles_without_graph_break():
    compiled = torch.compile(lambda x: ops.null(x) * 2, fullgraph=True, backend="aot_eager")
    x = torch.randn(4, 6)
    assert torch.equal(compiled(x), x * 2)


@pytest.mark.parametrize(
    ("x", "error", "text"),
    [
        (torch.zeros(3), ValueError, r"null: x must be \[rows, columns\], got \[3\]"),
        (torch.zeros(2, 2, dtype=torch.int64), TypeError, "null: x must have a dtype"),
        ("x", TypeError, "null: x must be a torch.Tensor, got str"),
    ],
)
def test_bad_input(x, error, text):
    with pytest.raises(error, match=text):
        ops.null(x)


def test_raw_operator_protects_memory():
    for bad in (torch.zeros(3), torch.zeros(4, 4).t()[1:], torch.zeros(2, 2, dtype=torch.int8)):
        with pytest.raises(RuntimeError, match="null: x must"):
            torch.ops.fastbb.null(bad)


def test_forced_kernel_that_cannot_run_says_why():
    with pytest.raises(NotImplementedError, match=r"dtype torch\.float64"):
        ops.null(torch.zeros(2, 2, dtype=torch.float64), impl="fused")
