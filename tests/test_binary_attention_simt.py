# SPDX-License-Identifier: Apache-2.0
"""The sources of binary attention's CUDA kernel, compiled as C++ for the host and run there, plain,
under AddressSanitizer with UBSan, and under ThreadSanitizer. `make test-simt` runs more.
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import simt
from binary_attention_ptx import KINDS, STES, Call, Case

pytestmark = pytest.mark.skipif(simt.compiler() is None, reason="no g++")
# Random cases of each sanitizer.
ROUNDS = int(os.environ.get("FASTBB_SIMT_ROUNDS", "6"))
ELEMENTS = {"f32": "float", "f16": "__half", "bf16": "__nv_bfloat16"}


def program_of(kind: str, sanitizer: str = "plain", sources: Path = simt.CSRC) -> Path:
    parts = ["_cuda_plan.cpp", f"_cuda_{kind}.cu"]
    defines = [f"FASTBB_SIMT_ELEMENT={ELEMENTS[kind]}"]
    return simt.build("binary_attention", parts, sanitizer, sources, defines)


def check(program: Path, case: Case, seed: int = 0) -> None:
    call = Call(case)
    simt.run(program, call.arena, bytes(call.params), [], seed)
    call.check()


def random_settings(draw: random.Random) -> dict[str, Any]:
    return {
        "nq": draw.choice([1, draw.randint(2, 40), draw.randint(100, 200)]),
        "nk": draw.choice([1, 128, draw.randint(2, 300)]),
        "dim": draw.choice([1, 30, 32, 64, 65, 100, 128]),
        "heads": draw.randint(1, 2),
        "batch": draw.randint(1, 2),
        "alphas": draw.random() < 0.8,
        "mask": draw.choice(["", "keys", "full"]),
        "rank": draw.choice([0, 1, 2, 60]),
        "v_p": draw.random() < 0.5,
        "probs": draw.choice(["softmax", "softmax", "bool"]),
        "ste": draw.choice(STES),
        "dropout_p": draw.choice([0.0, 0.0, 0.25]),
        "special": draw.random() < 0.3,
        "strided": draw.random() < 0.5,
        "save": draw.random() < 0.7,
    }


@pytest.mark.parametrize("sanitizer", simt.SANITIZERS)
@pytest.mark.parametrize("kind", KINDS.values() if ROUNDS > 6 else ["f32"])
def test_random_cases(kind: str, sanitizer: str) -> None:
    program = program_of(kind, sanitizer)
    (dtype,) = (dtype for dtype, name in KINDS.items() if name == kind)
    for seed in range(ROUNDS):
        settings = random_settings(random.Random(f"{kind} {sanitizer} {seed}"))
        try:
            check(program, Case(**settings, dtype=dtype), seed)
        except (AssertionError, simt.HostError) as error:
            raise AssertionError(f"{settings}") from error


# What each way of running must notice: file, text, what takes its place, sanitizer, message.
MUTATIONS = {
    "barrier": (
        ".cuh",
        "start, one_chunk);\n      __syncthreads();",
        "start, one_chunk);",
        "thread",
        "data race",
    ),
    "barrier of a warp": (".cuh", "    __syncwarp();\n", "", "thread", "data race"),
    "keys": (
        "_pack.cuh",
        "channel < source.head_dim && token < source.tokens",
        "channel < source.head_dim",
        "address",
        "AddressSanitizer",
    ),
    "queries": (
        ".cuh",
        "if (q.query[i] >= p.nq) continue;\n      Element",
        "Element",
        "address",
        "A",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_noticed(name: str, tmp_path: Path) -> None:
    file, text, instead, sanitizer, message = MUTATIONS[name]
    sources = tmp_path / "csrc"
    shutil.copytree(simt.CSRC, sources)
    path = sources / f"ops/binary_attention/binary_attention_cuda{file}"
    assert path.read_text().count(text) == 1
    path.write_text(path.read_text().replace(text, instead))
    program = program_of("f32", sanitizer, sources)
    with pytest.raises(simt.HostError, match=message):
        check(program, Case(20, 140, 64, dtype=torch.float32, rank=2))
