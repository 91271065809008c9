# SPDX-License-Identifier: Apache-2.0
"""The sources of elastic binarization's CUDA kernels, compiled as C++ for the host and run there,
plain, under AddressSanitizer with UBSan, and under ThreadSanitizer. `make test-simt` runs more.
"""

from __future__ import annotations

import os
import random
import shutil
import struct
from pathlib import Path

import pytest

import simt
from elastic_binarize_ptx import DTYPES, KINDS, STES, BackwardCall, Call, Case

pytestmark = pytest.mark.skipif(simt.compiler() is None, reason="no g++")
# Random cases of each sanitizer.
ROUNDS = int(os.environ.get("FASTBB_SIMT_ROUNDS", "6"))


def program_of(sanitizer: str = "plain", sources: Path = simt.CSRC) -> Path:
    return simt.build("elastic_binarize", ["_cuda_plan.cpp", "_cuda.cu"], sanitizer, sources)


def check(program: Path, case: Case, seed: int = 0) -> None:
    for call, backward in ((Call(case), False), (BackwardCall(case), True)):
        dalpha = call.dalpha if isinstance(call, BackwardCall) else 0
        words = bytes(call.params) + struct.pack("<Q", dalpha)
        simt.run(program, call.arena, words, [backward], seed)
        call.check()


@pytest.mark.parametrize("sanitizer", simt.SANITIZERS)
def test_random_cases(sanitizer: str) -> None:
    program = program_of(sanitizer)
    for seed in range(ROUNDS):
        draw = random.Random(f"{sanitizer} {seed}")
        settings = {
            "rows": draw.choice([1, draw.randint(2, 200)]),
            "k": draw.choice([1, 128, draw.randint(2, 600)]),
            "kind": draw.choice(KINDS),
            "ste": draw.choice(STES),
            "dtype": draw.choice(list(DTYPES)),
            "alpha": draw.random() < 0.7,
            "shift": draw.random() < 0.7,
            "padding": draw.choice([0, 0, 1, 5]),
            "special": draw.random() < 0.5,
        }
        try:
            check(program, Case(**settings), seed)
        except (AssertionError, simt.HostError) as error:
            raise AssertionError(f"{settings}") from error


# What each way of running must notice: text, what takes its place, sanitizer, message.
MUTATIONS = {
    "barrier": (
        "  if (lane == 0) alpha_sums[warp] = alpha_sum;\n  __syncthreads();",
        "  if (lane == 0) alpha_sums[warp] = alpha_sum;",
        "thread",
        "data race",
    ),
    "columns": ("return 32 * i < rest;", "return true;", "address", "AddressSanitizer"),
    "rows": ("if (row >= p.rows) return;", "", "address", "AddressSanitizer"),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_noticed(name: str, tmp_path: Path) -> None:
    text, instead, sanitizer, message = MUTATIONS[name]
    sources = tmp_path / "csrc"
    shutil.copytree(simt.CSRC, sources)
    path = sources / "ops/elastic_binarize/elastic_binarize_cuda.cuh"
    assert path.read_text().count(text) == 1
    path.write_text(path.read_text().replace(text, instead))
    with pytest.raises(simt.HostError, match=message):
        check(program_of(sanitizer, sources), Case(41, 133, "ternary"))
