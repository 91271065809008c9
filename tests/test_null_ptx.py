# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernel of the null operator, executed as the PTX that nvcc wrote, with the launches of
the C++ plan.
"""

from __future__ import annotations

import ctypes
import functools
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import ptxsim
from fastbb import _C
from fastbb.testing import SAMPLES
from ptx_text import kernel_of
from ptxsim import toolkit

SOURCE = Path(__file__).resolve().parent.parent / "csrc/ops/null/null_cuda.cu"
TOOLKIT, WHERE = toolkit.find()
needs_toolkit = pytest.mark.skipif(TOOLKIT is None, reason=f"no CUDA toolkit: {WHERE}")
KERNELS = {16: "uint4", 8: "uint2", 4: "Ij", 2: "It"}  # parts of mangled names, by unit
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_LONG = ctypes.c_int64


class Params(ctypes.Structure):
    """`NullParams`."""

    _fields_ = [
        ("dtype", ctypes.c_int32),
        ("x", ctypes.c_uint64),
        ("x_row", _LONG),
        ("out", ctypes.c_uint64),
        ("rows", _LONG),
        ("columns", _LONG),
    ]


class Plan(ctypes.Structure):
    """`NullCudaPlan`."""

    _fields_ = [
        *((name, _LONG) for name in ("grid", "block", "shared_bytes")),
        *((name, _LONG) for name in ("unit_bytes", "units", "lanes", "chunks")),
    ]


@functools.cache
def ptx() -> str:
    assert TOOLKIT is not None
    return TOOLKIT.compile(SOURCE, "80").read_text()


def plan_of(params: Params) -> Plan:
    names = ("x", "x_row", "out", "rows", "columns")
    made = _C.null_cuda_plan(
        element_bytes=4 if params.dtype == 0 else 2, **{n: getattr(params, n) for n in names}
    )
    return Plan(**made.pop("launch"), **made)


def run(module: ptxsim.Module, x: torch.Tensor) -> tuple[torch.Tensor, Plan]:
    """A copy of x by the kernel, and the plan. Where x lies in its storage counts for the plan."""
    bits = {4: torch.int32, 2: torch.int16}[x.element_size()]
    storage = x.view(bits).as_strided((x.untyped_storage().size() // x.element_size(),), (1,), 0)
    out = torch.empty(x.shape, dtype=x.dtype)
    arena = ptxsim.Arena()
    p = Params(DTYPES[x.dtype], 0, x.stride(0), 0, *x.shape)
    p.x = arena.add(storage.numpy(), "in") + x.storage_offset() * x.element_size()
    p.out = arena.add(out.view(bits).numpy(), "out")
    plan = plan_of(p)
    if plan.grid == 0:
        assert x.numel() == 0
        return out, plan
    (name,) = (each for each in module.kernels if KERNELS[plan.unit_bytes] in each)
    launch = {"grid": plan.grid, "block": plan.block, "dynamic_shared": plan.shared_bytes}
    module.launch(name, args=[p, plan], arena=arena, **launch)
    written = np.ascontiguousarray(arena.get(p.out))
    return torch.from_numpy(written).view(x.dtype).reshape(x.shape), plan


@needs_toolkit
@pytest.mark.parametrize("dtype", DTYPES)
def test_samples(dtype: torch.dtype) -> None:
    module = ptxsim.load(ptx())
    for sample in SAMPLES["fastbb::null"]("cpu", dtype):
        (x,) = sample.args
        assert torch.equal(run(module, x)[0], x), sample.name


# Views of a [rows + 1, width] buffer of float16: offset, columns, width -> unit.
LAYOUTS = {
    "aligned": (0, 64, 64, 16),
    "row of 8 bytes": (0, 20, 20, 8),
    "stride of 4 bytes": (0, 16, 18, 4),
    "odd start": (3, 32, 64, 2),
    "odd columns": (0, 33, 64, 2),
    "several chunks": (0, 9000, 9000, 16),
    "several chunks of small units": (1, 1299, 1300, 2),
}


@needs_toolkit
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str) -> None:
    offset, columns, width, unit = LAYOUTS[name]
    rows = 3 if columns > 1000 else 70
    buffer = torch.randn((rows + 1) * width).half()
    x = buffer.as_strided((rows, columns), (width, 1), offset)
    copy, plan = run(ptxsim.load(ptx()), x)
    assert plan.unit_bytes == unit
    assert (plan.chunks > 1) == ("chunks" in name)
    assert torch.equal(copy, x)


OPPOSITE = {"ge": "lt", "lt": "ge", "gt": "le", "le": "gt"}
# Comparisons with the sizes, and the scaling of an index to bytes.
MUTATED = re.compile(r"setp\.(?P<compare>ge|gt|lt|le)\.s64|(?P<shift>shl\.b64\s+\S+\s+\S+) 1;")


def mutant(match: re.Match[str]) -> str:
    if match["compare"]:
        return f"setp.{OPPOSITE[match['compare']]}.s64"
    return f"{match['shift']} 2;"


@needs_toolkit
def test_mutations_are_noticed() -> None:
    x = torch.randn(5, 64)[:, :61].half()  # the last of 4 units per thread is partly there

    def survives(text: str) -> bool:
        try:
            return torch.equal(run(ptxsim.load(text), x)[0], x)
        except ptxsim.PtxError:
            return False

    header, kernel = kernel_of(ptx(), KERNELS[2])
    assert survives(header + kernel)
    changes = list(MUTATED.finditer(kernel))
    assert {match["compare"] is None for match in changes} == {True, False}
    for match in changes:
        changed = kernel[: match.start()] + mutant(match) + kernel[match.end() :]
        assert not survives(header + changed), match[0]


@needs_toolkit
@pytest.mark.parametrize("arch", ["80", "86", "89", "90", "100", "120"])
def test_nothing_spills(arch: str) -> None:
    assert TOOLKIT is not None
    strict = ("-Xptxas", "-warn-spills,-warn-lmem-usage,-Werror")
    assert TOOLKIT.compile(SOURCE, arch, "cubin", strict).is_file()


def test_plan_covers_all_rows_once() -> None:
    """The C++ plan alone, at sizes that are too large to run."""
    for rows, columns in ((1, 1), (127, 3), (10**6, 96), (1, 10**9), (3, 2**20 + 8)):
        plan = plan_of(Params(2, 0, columns, 0, rows, columns))
        assert plan.units * plan.unit_bytes == 2 * columns
        assert plan.lanes & (plan.lanes - 1) == 0 and plan.block % plan.lanes == 0
        assert (plan.chunks - 1) * 4 * plan.lanes < plan.units <= plan.chunks * 4 * plan.lanes
        assert plan.grid == -(-rows // (plan.block // plan.lanes)) * plan.chunks < 2**31
    assert plan_of(Params(0, 0, 4, 0, 0, 4)).grid == plan_of(Params(0, 0, 0, 0, 4, 0)).grid == 0
