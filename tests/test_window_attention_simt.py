# SPDX-License-Identifier: Apache-2.0
"""The sources of window attention's CUDA kernels, compiled as C++ for the host and run there: all
samples and random ones, plain, under AddressSanitizer with UBSan, and under ThreadSanitizer.
`make test-simt` runs more.
"""

from __future__ import annotations

import os
import random
import shutil
from pathlib import Path

import pytest

import simt
from fastbb.ops import window_attention
from fastbb.testing import CUDA_KINDS, CUDA_TOLERANCES, assert_close
from fastbb.testing.window_attention import CASES, Case, build, in_float64
from test_window_attention_backward_ptx import call_of, compare
from window_attention_ptx import MATHS, BackwardCall, Call

pytestmark = pytest.mark.skipif(simt.compiler() is None, reason="no g++")
BOUNDS = CUDA_TOLERANCES["fastbb::window_attention"]
# Random samples of each type and sanitizer.
ROUNDS = int(os.environ.get("FASTBB_SIMT_ROUNDS", "6"))

ALL = [name for name, case in CASES.items() if case.batch and name != "no_queries"]
SOME = ["swin", "swin_v2", "gcvit_global_padded", "dim_30", "dim_64", "dim_128", "full_bias_mask"]
SOME += ["many_windows", "window_12", "full_l2norm_queries", "full_l2norm_keys"]
PARTS = ["_cuda_plan.cpp", "_cuda_{kind}.cu", "_cuda_backward_{kind}.cu"]


def program_of(kind: str, sanitizer: str = "plain", sources: Path = simt.CSRC) -> Path:
    parts = [part.format(kind=kind) for part in PARTS]
    defines = [f"FASTBB_SIMT_MATH={MATHS[kind]}"]
    return simt.build("window_attention", parts, sanitizer, sources, defines)


def run(program: Path, call: Call | BackwardCall, many_blocks: int, seed: int) -> None:
    options = [call.workspace is not None, many_blocks]
    simt.run(program, call.arena, bytes(call.params), options, seed, without=[call.workspace])


def check(
    program: Path, name: str, kind: str, seed: int = 0, blocks: tuple[int, int] = (2048, 1024)
) -> None:
    """Forward and backward of a sample; `blocks` are enough, so that more share one."""
    sample = build(name, dtype=CUDA_KINDS[kind])
    call = Call(sample.kwargs, kind == "tf32", blocks[0])
    run(program, call, blocks[0], seed)
    expected = window_attention(**in_float64(sample.kwargs), impl="reference")
    assert_close(call.result(), expected, BOUNDS[kind].forward_for(sample.difficulty), "out")
    backward = call_of(name, kind, blocks[1])
    run(program, backward, blocks[1], seed)
    compare(backward, name, kind)


@pytest.mark.parametrize("name", ALL)
def test_float16(name: str) -> None:
    check(program_of("f16"), name, "f16")


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("kind", ["bf16", "f32", "tf32"])
def test_other_types(name: str, kind: str) -> None:
    check(program_of(kind), name, kind)


@pytest.mark.parametrize("name", SOME)
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_under_sanitizers(name: str, sanitizer: str) -> None:
    check(program_of("f16", sanitizer), name, "f16", blocks=(4, 2))


def random_case(draw: random.Random) -> Case:
    batch, heads = draw.randint(1, 3), draw.randint(1, 3)
    dim = draw.choice([8, 17, 30, 32, 40, 64, 96, 128])
    l2norm = draw.random() < 0.2
    per_head = l2norm or draw.random() < 0.3
    common = {
        "batch": batch,
        "heads": heads,
        "dim": dim,
        "l2norm": l2norm,
        "scale": "per_head" if per_head else None,
        "difficulty": 30.0 if l2norm else 3.0,
    }
    if draw.random() < 0.3:
        bias, mask = draw.choice([None, "dense"]), draw.choice([None, 1, batch])
        nq, nk = draw.randint(1, 300), draw.randint(1, 300)
        return Case(nq=nq, nk=nk, bias=bias, mask=mask, **common)
    window = draw.randint(1, 12), draw.randint(1, 14)
    shift = tuple(draw.randint(0, w - 1) for w in window)
    pad_mode = draw.choice(["none", "pad_then_roll", "roll_then_pad"])
    size = tuple(w * draw.randint(1, 3) for w in window)
    if pad_mode != "none":
        size = tuple(max(1, n - draw.randint(0, w - 1)) for n, w in zip(size, window, strict=True))
    return Case(
        size=size,
        window=window,
        shift=shift,
        pad_mode=pad_mode,
        pads=pad_mode != "none" and draw.random() < 0.5,
        mask=draw.choice([None, "swin", 1]),
        bias=draw.choice([None, "table", "table", "dense"]),
        shared_q=draw.random() < 0.25,
        **common,
    )


@pytest.mark.parametrize("sanitizer", simt.SANITIZERS)
@pytest.mark.parametrize("kind", list(MATHS) if ROUNDS > 6 else ["f16", "f32"])
def test_random_samples(kind: str, sanitizer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = program_of(kind, sanitizer)
    for seed in range(ROUNDS):
        draw = random.Random(f"{kind} {sanitizer} {seed}")
        name = f"random {kind} {sanitizer} {seed}"
        monkeypatch.setitem(CASES, name, random_case(draw))
        blocks = draw.choice([1, 7, 2048]), draw.choice([1, 7, 1024])
        try:
            check(program, name, kind, seed, blocks)
        except (AssertionError, simt.HostError) as error:
            raise AssertionError(f"{name}: {CASES[name]}, blocks {blocks}") from error


# What each way of running must notice: file, text, what takes its place, sanitizer, message.
MUTATIONS = {
    "barrier": (
        "_forward.cuh",
        "      __syncthreads();\n      stage = 1 - stage;",
        "      stage = 1 - stage;",
        "thread",
        "data race",
    ),
    "wait": (
        "_backward_keys.cuh",
        "ptx::cp_async_wait<kStages - 1>();",
        "ptx::cp_async_wait<kStages>();",
        "plain",
        "did not wait for|^d[qkv]",
    ),
    "memory": (
        ".cuh",
        "if (index < task.behind && token < p.nk) {",
        "if (index < task.behind && token < p.nk + 64) {",
        "address",
        "AddressSanitizer",
    ),
    "index": (
        "_math.cuh",
        "lane / 16 * Math::kChunk]",
        "lane / 16 * 40000]",
        "address",
        "out of bounds",
    ),
    "divergence": (
        "_backward_keys.cuh",
        "        __syncthreads();\n        tile_dq",
        "        if (warp == 0) __syncthreads();\n        tile_dq",
        "plain",
        "barrier",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutations_are_noticed(name: str, tmp_path: Path) -> None:
    file, text, instead, sanitizer, message = MUTATIONS[name]
    sources = tmp_path / "csrc"
    shutil.copytree(simt.CSRC, sources)
    path = sources / f"ops/window_attention/window_attention_cuda{file}"
    assert path.read_text().count(text) == 1
    path.write_text(path.read_text().replace(text, instead))
    program = program_of("f16", sanitizer, sources)
    with pytest.raises((AssertionError, simt.HostError), match=message):
        for case in ("window_12", "swin_v2", "dim_128", "full_l2norm_keys"):
            check(program, case, "f16", blocks=(1, 1))
