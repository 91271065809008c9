# SPDX-License-Identifier: Apache-2.0
"""The sources of packing's CUDA kernels, compiled as C++ for the host and run there, plain, under
AddressSanitizer with UBSan, and under ThreadSanitizer. `make test-simt` runs more.
"""

from __future__ import annotations

import ctypes
import os
import random
import shutil
from pathlib import Path

import pytest

import simt
from binary_pack_ptx import (
    DTYPES,
    KINDS,
    VALUES,
    MeansParams,
    Memory,
    PackParams,
    StatsParams,
    UnpackParams,
    check_packed,
    check_unpacked,
    check_weight,
)

pytestmark = pytest.mark.skipif(simt.compiler() is None, reason="no g++")
# Random cases of each kernel and sanitizer.
ROUNDS = int(os.environ.get("FASTBB_SIMT_ROUNDS", "6"))
WHICH = {PackParams: 0, StatsParams: 1, MeansParams: 2, UnpackParams: 3}


def program_of(sanitizer: str = "plain", sources: Path = simt.CSRC) -> Path:
    return simt.build("binary_pack", ["_cuda_plan.cpp", "_cuda.cu"], sanitizer, sources)


class Host(Memory):
    """The same launches, on the host."""

    def __init__(self, program: Path, seed: int = 0) -> None:
        super().__init__()
        self.program, self.seed = program, seed

    def run(
        self,
        names: tuple[str, ...],
        launch: dict[str, int],
        params: ctypes.Structure,
        *plan: bytes,
    ) -> None:
        simt.run(self.program, self.arena, bytes(params), [WHICH[type(params)]], self.seed)


@pytest.mark.parametrize("sanitizer", simt.SANITIZERS)
def test_random_cases(sanitizer: str) -> None:
    program = program_of(sanitizer)
    for seed in range(ROUNDS if sanitizer == "plain" else ROUNDS // 3):
        draw = random.Random(f"{sanitizer} {seed}")
        rows, k = draw.choice([1, draw.randint(2, 40)]), draw.choice([1, draw.randint(2, 2500)])
        dtype, over = draw.choice(list(DTYPES)), ["tensor", "row"]
        gap, shift = draw.choice([0, 1, 8]), draw.random() < 0.5
        center, scale = draw.choice(["none", *over]), draw.choice(over)
        sign = draw.choice(["plus", "minus", "ternary"])
        try:
            check_packed(Host(program, seed), rows, k, draw.choice(list(KINDS)), dtype, shift, gap)
            check_weight(Host(program, seed), rows, k, center, scale, sign, dtype)
            kind, scales = draw.choice(list(VALUES)), draw.randint(0, 2)
            check_unpacked(Host(program, seed), rows, k, kind, dtype, scales, index=shift)
        except (AssertionError, simt.HostError) as error:
            raise AssertionError(f"{rows} rows of {k}, {dtype}, case {seed}") from error


# What each way of running must notice: text, what takes its place, sanitizer, message.
MUTATIONS = {
    "barrier": ("  __syncthreads();\n", "", "thread", "data race"),
    "columns": ("column < p.k ? widen(x[column]) : NAN", "widen(x[column])", "address", "Address"),
    "index": ("from >= 0 && from < p.bit_rows", "from <= p.bit_rows", "address", "Address"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_noticed(name: str, tmp_path: Path) -> None:
    text, instead, sanitizer, message = MUTATIONS[name]
    sources = tmp_path / "csrc"
    shutil.copytree(simt.CSRC, sources)
    path = sources / "ops/binary_pack/binary_pack_cuda.cuh"
    assert path.read_text().count(text) == 1
    path.write_text(path.read_text().replace(text, instead))
    dtype = next(iter(DTYPES))
    program = program_of(sanitizer, sources)
    with pytest.raises(simt.HostError, match=message):
        check_packed(Host(program), 5, 130, "plus", dtype, shift=False, gap=0)
        check_weight(Host(program), 5, 130, "tensor", "tensor", "plus", dtype)
        check_unpacked(Host(program), 5, 130, "signed", dtype, scales=1, index=True)
