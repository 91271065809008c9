# SPDX-License-Identifier: Apache-2.0
"""The sources of the CUDA kernels of products of packed bits, compiled as C++ for the host and run
there, plain, under AddressSanitizer with UBSan, and under ThreadSanitizer. `make test-simt` runs
more.
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest
import torch

import simt
from binary_linear_ptx import ACTIVATIONS, DTYPES, KINDS, LARGE, SMALL, Call, Case

pytestmark = pytest.mark.skipif(simt.compiler() is None, reason="no g++")
# Random cases of each sanitizer.
ROUNDS = int(os.environ.get("FASTBB_SIMT_ROUNDS", "6"))
# Bits multiplied as they are, and spread to int8.
ARCHS = {"bits": (), "int8": ("__CUDA_ARCH__=1000",)}


def program_of(arch: str, sanitizer: str = "plain", sources: Path = simt.CSRC) -> Path:
    parts = ["_cuda_plan.cpp", "_cuda.cu"]
    return simt.build("binary_linear", parts, sanitizer, sources, ARCHS[arch])


def check(program: Path, case: Case, many_tiles: int, seed: int = 0) -> None:
    call = Call(case, many_tiles, seed)
    simt.run(program, call.arena, bytes(call.params), [many_tiles], seed)
    call.check()


def random_case(draw: random.Random) -> Case:
    out = draw.choice([torch.int32, *DTYPES, *KINDS])
    return Case(
        m=draw.choice([1, draw.randint(2, 40), draw.randint(100, 300)]),
        n=draw.choice([1, 4 * draw.randint(1, 80), draw.randint(2, 300)]),
        k=draw.choice([1, 128 * draw.randint(1, 16), draw.randint(2, 3000)]),
        a=draw.choice(list(KINDS)),
        b=draw.choice(["plus", "minus", "unsigned"]),
        batch=draw.choice([1, 1, 3]),
        out=out,
        alpha=draw.choice([None, 0.3]),
        scale=draw.choice(["none", "one", "all"]),
        bias=draw.random() < 0.5,
        # Bits of GELU could differ by its rounding.
        activation=draw.choice(["none", "relu"] if out in KINDS else list(ACTIVATIONS)),
        shift=draw.random() < 0.5,
        gap=draw.choice([0, 16]),
        overlap=draw.random() < 0.3,
    )


@pytest.mark.parametrize("sanitizer", simt.SANITIZERS)
@pytest.mark.parametrize("arch", ARCHS)
def test_random_cases(arch: str, sanitizer: str) -> None:
    program = program_of(arch, sanitizer)
    for seed in range(ROUNDS if arch == "bits" else ROUNDS // 2):
        draw = random.Random(f"{arch} {sanitizer} {seed}")
        case, many_tiles = random_case(draw), draw.choice([SMALL, LARGE])
        try:
            check(program, case, many_tiles, seed)
        except (AssertionError, simt.HostError) as error:
            raise AssertionError(f"{case}, {many_tiles} tiles") from error


# What each way of running must notice: file, text, what takes its place, sanitizer, message.
MUTATIONS = {
    "barrier of stages": (
        ".cuh",
        "    __syncthreads();\n    if (chunk + kStages - 1 < chunks)",
        "    if (chunk + kStages - 1 < chunks)",
        "thread",
        "data race",
    ),
    "barrier of ones": (
        ".cuh",
        "s.column_ones);\n  __syncthreads();",
        "s.column_ones);",
        "thread",
        "data race",
    ),
    "wait": (
        ".cuh",
        "ptx::cp_async_wait<kStages - 2>();",
        "ptx::cp_async_wait<kStages - 1>();",
        "plain",
        "not equal|did not wait for|torch.equal",
    ),
    "rows": (
        "_tile.cuh",
        "bytes && i < source.rows",
        "bytes && i <= source.rows",
        "address",
        "AddressSanitizer",
    ),
    "columns": (
        "_epilogue.cuh",
        "const int64_t column = i < place.count ? place.column + i : 0;",
        "const int64_t column = place.column + i;",
        "address",
        "AddressSanitizer",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_noticed(name: str, tmp_path: Path) -> None:
    file, text, instead, sanitizer, message = MUTATIONS[name]
    sources = tmp_path / "csrc"
    shutil.copytree(simt.CSRC, sources)
    path = sources / f"ops/binary_linear/binary_linear_cuda{file}"
    assert path.read_text().count(text) == 1
    path.write_text(path.read_text().replace(text, instead))
    case = Case(35, 133, 1600, out="ternary", scale="all", bias=True)
    with pytest.raises((AssertionError, simt.HostError), match=message):
        check(program_of("bits", sanitizer, sources), case, SMALL)
