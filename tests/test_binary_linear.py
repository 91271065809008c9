# SPDX-License-Identifier: Apache-2.0
"""Products of packed bits, and the linear layer made of them."""

from __future__ import annotations

import pytest
import torch

from fastbb import ops, reference
from fastbb.testing import SAMPLES, TOLERANCES, assert_close
from fastbb.testing.binary_linear import CASES, build

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GEMM, LINEAR = "fastbb::bgemm", "fastbb::binary_linear"


def test_gemm_is_exact(isa):
    for sample in SAMPLES[GEMM]("cpu", torch.float32):
        out = ops.bgemm(**sample.kwargs, impl="fused")
        assert out.dtype == torch.int32
        assert torch.equal(out, reference.bgemm(*sample.args)), sample.name


@pytest.mark.parametrize(("a_kind", "low", "high"), [("signed", -1, 2), ("unsigned", 0, 2)])
def test_gemm_is_the_product_of_the_numbers(a_kind, low, high):
    """Without the package's own packing: values drawn first, bits made by hand."""
    generator = torch.Generator().manual_seed(3)
    a = torch.randint(0, 2, (11, 200), generator=generator)
    b = torch.randint(0, 2, (14, 200), generator=generator)

    def packed(bits: torch.Tensor) -> torch.Tensor:
        padded = torch.zeros(bits.shape[0], 256, dtype=torch.int64)
        padded[:, :200] = bits
        return (padded.view(-1, 32, 8) << torch.arange(8)).sum(-1).to(torch.uint8)

    left = 2 * a - 1 if a_kind == "signed" else a
    expected = (left @ (2 * b - 1).T).to(torch.int32)
    assert torch.equal(ops.bgemm(packed(a), packed(b), k=200, a_kind=a_kind), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_matches_reference(isa, dtype):
    for sample in SAMPLES[LINEAR]("cpu", dtype):
        out = ops.binary_linear(**sample.kwargs, impl="fused")
        expected = reference.binary_linear(**sample.kwargs)
        assert out.dtype == expected.dtype and out.is_contiguous(), sample.name
        if sample.kwargs.get("out_kind") is not None:
            assert torch.equal(out, expected), sample.name
            continue
        bounds = TOLERANCES[LINEAR][dtype].forward
        assert_close(out, expected.double(), bounds, sample.name)


def test_same_bits_at_any_number_of_threads(isa):
    for name in ("bert", "many_rows", "gelu_to_ternary"):
        sample = build(name)
        torch.set_num_threads(1)
        one = ops.binary_linear(**sample.kwargs)
        torch.set_num_threads(2)
        assert torch.equal(one, ops.binary_linear(**sample.kwargs)), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), -0.0])
@pytest.mark.parametrize("kind", ["plus", "minus", "ternary", "unsigned"])
def test_values_that_are_no_numbers(isa, kind, bad):
    """NaN is a 0 bit in every plane, infinities count by their sign, -0 is zero."""
    x = torch.randn(4, 70)
    x[1, 3] = bad
    weight = torch.randn(9, 70)
    bits, scale = reference.pack_weight(weight)
    settings = {"k": 70, "kind": kind, "alpha": torch.tensor([0.5])}
    out = ops.binary_linear(x, bits, scale, **settings, impl="fused")
    clean = x.clone()
    clean[1, 3] = {"nan": -1.0 if kind in ("plus", "minus") else 0.0}.get(str(bad), bad)
    if str(bad) == "nan" and kind == "plus":
        clean[1, 3] = -1.0
    expected = ops.binary_linear(clean, bits, scale, **settings, impl="reference")
    assert torch.isfinite(out).all()
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)


def test_feed_forward_from_bits_to_bits(isa):
    """Two layers through packed bits are the two layers one after the other."""
    x = torch.randn(2, 21, 96)
    up, down = torch.randn(160, 96), torch.randn(96, 160)
    shift, alpha = torch.randn(160) * 0.1, torch.tensor([0.6])
    up_bits, up_scale = reference.pack_weight(up)
    down_bits, down_scale = reference.pack_weight(down)
    for kind, activation in (("ternary", "gelu"), ("unsigned", "relu")):
        bits = ops.binary_linear(
            x, up_bits, up_scale, k=96, activation=activation, out_kind=kind, out_shift=shift,
            out_alpha=alpha if kind == "unsigned" else None,
        )  # fmt: skip
        fused = ops.binary_linear(bits, down_bits, down_scale, k=160, kind=kind, alpha=alpha)
        middle = ops.binary_linear(x, up_bits, up_scale, k=96, activation=activation)
        apart = ops.binary_linear(
            middle, down_bits, down_scale, k=160, kind=kind, alpha=alpha, shift=shift
        )
        assert torch.equal(fused, apart)


def test_opcheck():
    for name in ("bert", "packed", "relu_to_unsigned", "gelu_to_ternary", "no_rows"):
        torch.library.opcheck(torch.ops.fastbb.binary_linear.default, build(name).args)
    for sample in list(SAMPLES[GEMM]("cpu", torch.float32))[::5]:
        torch.library.opcheck(torch.ops.fastbb.bgemm.default, sample.args)


@pytest.mark.parametrize("name", ["bert", "packed", "gelu_to_ternary"])
def test_compiles_without_graph_break(name):
    sample = build(name)

    def call(x: torch.Tensor) -> torch.Tensor:
        return ops.binary_linear(**{**sample.kwargs, "x": x})

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(sample.kwargs["x"]), call(sample.kwargs["x"]))


def test_compiles_with_dynamic_rows():
    sample = build("bert")
    settings = {key: value for key, value in sample.kwargs.items() if key != "x"}

    def call(x: torch.Tensor) -> torch.Tensor:
        return ops.binary_linear(x, **settings)

    compiled = torch.compile(call, fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 8, 17):
        x = torch.randn(rows, 192)
        assert torch.equal(compiled(x), call(x))


def bits_of(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": torch.zeros(2, 95)}, ValueError, "binary_linear: x must have k = 96 elements"),
        ({"x": bits_of(2, 12)}, ValueError, "binary_linear: x must have 16 bytes"),
        ({"x": "x"}, TypeError, "x must be a torch.Tensor, got str"),
        ({"x": torch.zeros(2, 96, dtype=torch.int64)}, TypeError, "x must have a dtype"),
        ({"weight_bits": bits_of(5, 12)}, ValueError, "weight_bits must have 16 bytes"),
        ({"weight_bits": bits_of(5, 32)}, ValueError, "weight_bits must have 16 bytes"),
        ({"weight_bits": bits_of(16)}, ValueError, "weight_bits must have at least 2 dimensions"),
        ({"weight_bits": bits_of(1, 5, 16)}, ValueError, r"weight_bits must be \[N, bytes\]"),
        ({"weight_bits": torch.zeros(5, 16)}, TypeError, "weight_bits must have a dtype"),
        ({"weight_scale": torch.zeros(4)}, ValueError, r"weight_scale must have one of \[1, 5\]"),
        ({"weight_scale": None}, TypeError, "weight_scale must be a torch.Tensor"),
        ({"bias": torch.zeros(4)}, ValueError, "bias must have one of"),
        ({"alpha": torch.zeros(2)}, ValueError, "alpha must have one of"),
        ({"shift": torch.zeros(95)}, ValueError, "shift must have one of"),
        ({"x": bits_of(2, 2, 16), "shift": torch.zeros(96)}, ValueError, "must be None for packed"),
        ({"kind": "sign"}, ValueError, "kind must be one of"),
        ({"kind": "unsigned"}, ValueError, "alpha must be given for unsigned bits"),
        ({"activation": "tanh"}, ValueError, "activation must be one of"),
        ({"out_kind": "both"}, ValueError, "out_kind must be one of"),
        ({"out_kind": "unsigned"}, ValueError, "out_alpha must be given"),
        ({"out_shift": torch.zeros(5)}, ValueError, "out_alpha and out_shift need out_kind"),
        ({"out_dtype": torch.int32}, TypeError, "out_dtype must be a floating-point dtype"),
        ({"k": -1}, ValueError, "k must be 0 to"),
        ({"k": 96.0}, TypeError, "k must be an int"),
        ({"impl": "fast"}, ValueError, "impl must be"),
        ({"out_dtype": torch.float64, "impl": "fused"}, NotImplementedError, "out_dtype"),
    ],
)
def test_bad_input(change, error, text):
    arguments = {
        "x": torch.zeros(2, 96),
        "weight_bits": bits_of(5, 16),
        "weight_scale": torch.ones(1),
        "k": 96,
        **change,
    }
    with pytest.raises(error, match=text):
        ops.binary_linear(**arguments)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"a": bits_of(3, 32)}, ValueError, "bgemm: a must have 16 bytes"),
        ({"b": bits_of(3, 15)}, ValueError, "bgemm: b must have 16 bytes"),
        ({"b": bits_of(2, 3, 16)}, ValueError, r"b must have a's batch dimensions \[\]"),
        ({"a_kind": "ternary"}, ValueError, "a must have at least 3 dimensions"),
        (
            {"a": bits_of(4, 3, 16), "a_kind": "ternary"},
            ValueError,
            "a must have 2 planes in its last dimension but one",
        ),
        ({"b_kind": "ternary"}, ValueError, "b_kind must be one of"),
        ({"a": torch.zeros(3, 16)}, TypeError, "a must have a dtype"),
        ({"k": 2**29}, ValueError, "k must be 0 to"),
    ],
)
def test_bad_gemm_input(change, error, text):
    arguments = {"a": bits_of(3, 16), "b": bits_of(4, 16), "k": 100, **change}
    with pytest.raises(error, match=text):
        ops.bgemm(**arguments)


def test_raw_operators_protect_memory():
    gemm, linear = torch.ops.fastbb.bgemm, torch.ops.fastbb.binary_linear
    good, scale, x = bits_of(4, 16), torch.ones(1), torch.zeros(2, 96)
    end = ("none", torch.float32, "float", None, None)
    for call in (
        lambda: gemm(good, bits_of(4, 32), 100, "signed", "signed"),
        lambda: gemm(good, good, 129, "signed", "signed"),
        lambda: gemm(good, bits_of(1, 4, 16), 100, "signed", "signed"),
        lambda: gemm(good, good, 100, "ternary", "signed"),
        lambda: gemm(good, good, 100, "sign", "signed"),
        lambda: gemm(good.float(), good, 100, "signed", "signed"),
        lambda: gemm(good, good, -1, "signed", "signed"),
        lambda: linear(x, good, scale, None, 128, None, None, "plus", *end),
        lambda: linear(x, good, torch.ones(3), None, 96, None, None, "plus", *end),
        lambda: linear(x, good, scale, torch.ones(5), 96, None, None, "plus", *end),
        lambda: linear(x, good, scale, None, 96, None, torch.ones(5), "plus", *end),
        lambda: linear(x.t(), good, scale, None, 2, None, None, "plus", *end),
        lambda: linear(x.int(), good, scale, None, 96, None, None, "plus", *end),
        lambda: linear(x, good, scale, None, 96, None, None, "unsigned", *end),
        lambda: linear(x, good, scale, None, 96, None, None, "plus", *end[:2], "bits", None, None),
    ):
        with pytest.raises(RuntimeError, match="must"):
            call()


def test_forced_kernel_that_cannot_run_says_why():
    sample = build("bert")
    x = sample.kwargs["x"].double()
    with pytest.raises(NotImplementedError, match=r"dtype torch\.float64"):
        ops.binary_linear(**{**sample.kwargs, "x": x}, impl="fused")
    out = ops.binary_linear(**{**sample.kwargs, "x": x, "out_dtype": torch.float64})
    assert out.dtype == torch.float64


def test_cases_cover_all_kinds():
    assert {case.kind for case in CASES.values()} == {"plus", "minus", "ternary", "unsigned"}
    assert {case.activation for case in CASES.values()} == {"none", "relu", "gelu"}
