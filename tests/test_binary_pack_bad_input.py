# SPDX-License-Identifier: Apache-2.0
"""Bad input of packing: clear errors, and never a read or write out of bounds."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastbb import ops

X = torch.randn(3, 40)
META = X.to("meta")
ONE = torch.tensor(1.0)
BITS = torch.zeros(5, 16, dtype=torch.uint8)
PLANES = torch.zeros(5, 2, 16, dtype=torch.uint8)
IDS = torch.tensor([0, 4])
SCALE = torch.ones(5)


def sign(**changes: Any) -> Tensor:
    return ops.pack_sign(**{"x": X} | changes)


def unsigned(**changes: Any) -> Tensor:
    return ops.pack_unsigned(**{"x": X, "alpha": ONE} | changes)


def weight(**changes: Any) -> Any:
    return ops.pack_weight(**{"weight": X} | changes)


def unpack(**changes: Any) -> Tensor:
    return ops.unpack_bits(**{"bits": BITS, "k": 40} | changes)


def embed(**changes: Any) -> Tensor:
    return ops.binary_embedding(**{"ids": IDS, "bits": BITS, "scale": SCALE, "k": 40} | changes)


BadCall = tuple[Callable[..., Any], dict[str, Any], type[Exception], str]
# fmt: off
BAD_CALLS: list[BadCall] = [
    (sign, {"x": [1.0]}, TypeError, "pack_sign: x must be a torch.Tensor, got list"),
    (sign, {"x": X.int()}, TypeError, "x must have a dtype of"),
    (sign, {"x": torch.tensor(1.0)}, ValueError, "x must have shape [..., K], got []"),
    (sign, {"shift": X}, ValueError, "shift must have shape [K] = [40], got [3, 40]"),
    (sign, {"shift": X[0, 1:]}, ValueError, "shift must have shape [K] = [40], got [39]"),
    (sign, {"shift": X[0].int()}, TypeError, "shift must have a dtype of"),
    (sign, {"shift": META[0]}, ValueError, "shift must be on x's device cpu, got meta"),
    (sign, {"zero_policy": "unsigned"}, ValueError, "zero_policy must be one of"),
    (sign, {"impl": "fast"}, ValueError, "impl must be"),
    (sign, {"x": X.double(), "impl": "fused"}, NotImplementedError, "dtype torch.float64"),
    (sign, {"x": META, "impl": "fused"}, NotImplementedError, "device meta"),
    (unsigned, {"alpha": 0.5}, TypeError, "alpha must be a torch.Tensor, got float"),
    (unsigned, {"alpha": torch.ones(2)}, ValueError, "alpha must have shape [1] or [], got [2]"),
    (unsigned, {"alpha": torch.ones(1, 1)}, ValueError, "alpha must have shape [1] or []"),
    (unsigned, {"alpha": META[0, 0]}, ValueError, "alpha must be on x's device cpu, got meta"),
    (unsigned, {"alpha": torch.tensor(1)}, TypeError, "alpha must have a dtype"),
    (weight, {"weight": X[0]}, ValueError, "weight must have shape [N, K], got [40]"),
    (weight, {"weight": X.long()}, TypeError, "weight must have a dtype"),
    (weight, {"center": "mean"}, ValueError, "center must be one of"),
    (weight, {"scale": "none"}, ValueError, "scale must be one of"),
    (weight, {"zero_policy": None}, ValueError, "zero_policy must be one of"),
    (unpack, {"bits": X}, TypeError, "bits must have a dtype of ['torch.uint8']"),
    (unpack, {"k": 129}, ValueError, "bits must have 32 bytes per row for k = 129, got [5, 16]"),
    (unpack, {"k": 0}, ValueError, "bits must have 0 bytes per row"),
    (unpack, {"k": -1}, ValueError, "k must be at least 0, got -1"),
    (unpack, {"k": 4.0}, TypeError, "k must be an int, got float"),
    (unpack, {"k": True}, TypeError, "k must be an int, got bool"),
    (unpack, {"kind": "plus"}, ValueError, "kind must be one of"),
    (unpack, {"kind": "ternary"}, ValueError, "bits must have shape [..., 2, bytes], got [5, 16]"),
    (unpack, {"bits": BITS[0], "kind": "ternary"}, ValueError, "must have shape [..., 2, bytes]"),
    (unpack, {"dtype": torch.int8}, TypeError, "dtype must be one of"),
    (unpack, {"dtype": "float32"}, TypeError, "dtype must be one of"),
    (unpack, {"dtype": torch.float64, "impl": "fused"}, NotImplementedError, "torch.float64"),
    (embed, {"ids": IDS.float()}, TypeError, "ids must have a dtype of"),
    (embed, {"ids": [0]}, TypeError, "ids must be a torch.Tensor"),
    (embed, {"bits": PLANES}, ValueError, "bits must have shape [V, bytes]"),
    (embed, {"k": 200}, ValueError, "bits must have 32 bytes per row"),
    (embed, {"scale": SCALE[1:]}, ValueError, "scale must have shape [V] = [5] or [1], got [4]"),
    (embed, {"scale": ONE}, ValueError, "scale must have shape [V] = [5] or [1], got []"),
    (embed, {"scale": META[0, :5]}, ValueError, "scale must be on ids's device cpu, got meta"),
    (embed, {"bits": BITS.to("meta")}, ValueError, "bits must be on ids's device cpu, got meta"),
    (embed, {"ids": IDS + 1}, IndexError, "ids must be at least 0 and less than V = 5, got 5"),
    (embed, {"ids": IDS - 1}, IndexError, "ids must be at least 0 and less than V = 5, got -1"),
    (embed, {"ids": IDS + 2, "impl": "reference"}, IndexError, "less than V = 5, got 6"),
    (embed, {"ids": -IDS, "impl": "reference"}, IndexError, "less than V = 5, got -4"),
]
# fmt: on


@pytest.mark.parametrize(("call", "changes", "error", "text"), BAD_CALLS)
def test_public_functions(
    call: Callable[..., Any], changes: dict[str, Any], error: type[Exception], text: str
) -> None:
    call()
    with pytest.raises(error, match=re.escape(text)):
        call(**changes)


PACK = torch.ops.fastbb.pack_bits.default
WEIGHT = torch.ops.fastbb.pack_weight.default
UNPACK = torch.ops.fastbb.unpack_bits.default
EMBED = torch.ops.fastbb.binary_embedding.default
F32 = torch.float32

RAW_CALLS: list[tuple[Any, tuple[Any, ...], str]] = [
    (PACK, (X.double(), None, None, "plus"), "pack_bits: x must be float32"),
    (PACK, (ONE, None, None, "plus"), "x must be [..., K], got []"),
    (PACK, (X, X[0, 1:], None, "plus"), "shift must have shape [K], got [39]"),
    (PACK, (X, X[0].int(), None, "plus"), "shift must have a floating-point dtype"),
    (PACK, (X, None, None, "unsigned"), "alpha must be given for unsigned bits alone, got false"),
    (PACK, (X, None, ONE, "plus"), "alpha must be given for unsigned bits alone, got true"),
    (PACK, (X, None, X[0], "unsigned"), "alpha must be [1] or 0-d, got [40]"),
    (PACK, (X, None, None, "signed"), "kind must be plus, minus, ternary or unsigned, got signed"),
    (WEIGHT, (X[0], "none", "row", "plus"), "pack_weight: weight must be [N, K], got [40]"),
    (WEIGHT, (X.int(), "none", "row", "plus"), "weight must be float32"),
    (WEIGHT, (X, "all", "row", "plus"), "center must be none, tensor or row, got all"),
    (WEIGHT, (X, "row", "none", "plus"), "scale must be tensor or row, got none"),
    (WEIGHT, (X, "row", "row", "unsigned"), "zero_policy must be plus, minus or ternary"),
    (UNPACK, (X, 40, "signed", F32), "unpack_bits: bits must have dtype uint8"),
    (UNPACK, (BITS, 129, "signed", F32), "bits must have 16 bytes for every 128 of k begun"),
    (UNPACK, (BITS, -1, "signed", F32), "k must not be negative or too large, got -1"),
    (UNPACK, (BITS, 2**63 - 1, "signed", F32), "k must not be negative or too large"),
    (UNPACK, (BITS, 40, "ternary", F32), "bits must be [..., 2, bytes], got [5, 16]"),
    (UNPACK, (BITS[0, 0], 0, "signed", F32), "bits must be [..., bytes], got []"),
    (UNPACK, (BITS, 40, "plus", F32), "kind must be signed, unsigned or ternary, got plus"),
    (UNPACK, (BITS, 40, "signed", torch.float64), "dtype must be float32"),
    (EMBED, (IDS.short(), BITS, SCALE, 40, F32), "ids must have dtype int64 or int32"),
    (EMBED, (IDS, PLANES, SCALE, 40, F32), "bits must be [V, bytes], got [5, 2, 16]"),
    (EMBED, (IDS, BITS, SCALE[1:], 40, F32), "scale must be [V] or [1], got [4]"),
    (EMBED, (IDS, BITS, SCALE.int(), 40, F32), "scale must have a floating-point dtype"),
    (EMBED, (IDS + 1, BITS, SCALE, 40, F32), "ids must be at least 0 and less than V = 5, got 5"),
    (
        EMBED,
        (IDS.int() - 7, BITS, SCALE, 40, F32),
        "ids must be at least 0 and less than V = 5, got -7",
    ),
    (
        EMBED,
        (IDS, BITS[:0], SCALE[:0], 40, F32),
        "ids must be at least 0 and less than V = 0, got 0",
    ),
]


@pytest.mark.parametrize(("op", "args", "text"), RAW_CALLS)
def test_raw_operators_protect_memory(op: Any, args: tuple[Any, ...], text: str) -> None:
    with pytest.raises(RuntimeError, match=re.escape(text)):
        op(*args)


def test_first_bad_id_is_named_at_any_number_of_threads(isa: str) -> None:
    """Among many rows, in several tasks, each of which finds one."""
    ids = torch.zeros(5000, dtype=torch.int64)
    ids[1234], ids[1235], ids[2500], ids[-1] = 77, 88, -5, 2**62
    with pytest.raises(RuntimeError, match=r"less than V = 5, got 77$"):
        EMBED(ids, BITS, SCALE, 100, F32)
    with pytest.raises(IndexError, match=r"less than V = 5, got 77$"):
        ops.binary_embedding(ids.view(50, 100), BITS, SCALE, k=100)


def test_compiled_graphs_raise_at_run_time() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(embed, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids=IDS), embed(ids=IDS))
    with pytest.raises((RuntimeError, IndexError), match="ids must be"):
        compiled(ids=IDS + 1)
