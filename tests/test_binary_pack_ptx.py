# SPDX-License-Identifier: Apache-2.0
"""Packing: the CUDA kernels, executed as the PTX that nvcc wrote, against the definition."""

from __future__ import annotations

import functools
import re

import pytest
import torch

import ptxsim
from binary_pack_ptx import (
    DTYPES,
    ELEMENTS,
    KINDS,
    SOURCE,
    VALUES,
    Memory,
    check_packed,
    check_unpacked,
    check_weight,
)
from fastbb import _C
from ptx_text import kernel_of
from ptxsim import toolkit

TOOLKIT, WHERE = toolkit.find()
needs_toolkit = pytest.mark.skipif(TOOLKIT is None, reason=f"no CUDA toolkit: {WHERE}")
SIZES = [(1, 1), (9, 130), (3, 1100), (2, 2048)]


@functools.cache
def ptx(arch: str = "80") -> str:
    assert TOOLKIT is not None
    return TOOLKIT.compile(SOURCE, arch).read_text()


@functools.cache
def module(arch: str = "80") -> ptxsim.Module:
    return ptxsim.load(ptx(arch))


@needs_toolkit
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_pack(kind: str, dtype: torch.dtype) -> None:
    for i, (rows, k) in enumerate(SIZES):
        check_packed(Memory(module()), rows, k, kind, dtype, shift=i % 2 == 1, gap=i)


@needs_toolkit
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", ["tensor", "row"])
@pytest.mark.parametrize("center", ["none", "tensor", "row"])
def test_pack_weight(center: str, scale: str, dtype: torch.dtype) -> None:
    kind = {"none": "ternary", "tensor": "plus", "row": "minus"}[center]
    for rows, k in ((1, 1), (20, 333)):
        check_weight(Memory(module()), rows, k, center, scale, kind, dtype)


@needs_toolkit
def test_more_rows_than_a_block_has_threads() -> None:
    check_weight(Memory(module()), 530, 3, "tensor", "tensor", "plus", torch.float32)


@needs_toolkit
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", VALUES)
def test_unpack(kind: str, dtype: torch.dtype) -> None:
    for i, (rows, k) in enumerate(SIZES):
        check_unpacked(Memory(module()), rows, k, kind, dtype, scales=i % 3, index=False)
        check_unpacked(Memory(module()), rows, k, kind, dtype, scales=2 - i % 3, index=True)


@needs_toolkit
@pytest.mark.parametrize("arch", ["90", "100", "120"])
def test_code_for_later_architectures(arch: str) -> None:
    check_packed(Memory(module(arch)), 9, 130, "ternary", torch.float16, shift=True, gap=1)
    check_weight(Memory(module(arch)), 20, 100, "tensor", "row", "plus", torch.bfloat16)
    check_unpacked(Memory(module(arch)), 3, 200, "signed", torch.float32, scales=2, index=True)


@needs_toolkit
def test_memory_is_moved_by_whole_sectors() -> None:
    """Neighbouring lanes have neighbouring elements, whatever the kernel."""
    memory = Memory(module())
    check_packed(memory, 8, 1024, "ternary", torch.float32, shift=False, gap=0)
    check_unpacked(memory, 8, 1024, "signed", torch.float16, scales=0, index=False)
    for done in memory.results:
        assert done.stats.sector_overhead("ld.global") == 1.0
        assert done.stats.sector_overhead("st.global") == 1.0


# The barrier, comparisons of indices, and whole steps of votes and shuffles.
MUTATED = re.compile(
    r"^\s*(?:bar\.sync.*"
    r"|(?P<compare>setp\.(?:ge|gt|lt|le)\.s(?:32|64)).*"
    r"|vote\.sync\.ballot\S+\s+(?P<vote>%r\d+).*"
    r"|shfl\.sync\S+\s+(?P<shuffle>%r\d+).*)$",
    re.MULTILINE,
)
OPPOSITE = {"ge": "lt", "lt": "ge", "gt": "le", "le": "gt"}


def mutant(match: re.Match[str]) -> str:
    if match["compare"]:
        word = match["compare"].split(".")[1]
        return match[0].replace(f".{word}.", f".{OPPOSITE[word]}.", 1)
    register = match["vote"] or match["shuffle"]
    return f"mov.u32 {register}, 0;" if register else ""


def check_all(text: str) -> None:
    changed = ptxsim.load(text)
    names = " ".join(changed.kernels)
    memory = Memory(changed, max_steps=20_000)  # some changes make endless loops
    if "11binary_pack" in names:
        check_packed(memory, 9, 1100, "ternary", torch.float16, shift=True, gap=1)
    if "binary_stats" in names:
        check_weight(memory, 12, 333, "tensor", "tensor", "plus", torch.float16)
    if "binary_unpack" in names:
        check_unpacked(memory, 9, 1100, "ternary", torch.float16, scales=2, index=True)


@needs_toolkit
@pytest.mark.parametrize("kernel", ["11binary_pack", "binary_unpack"])
def test_mutations_are_noticed(kernel: str) -> None:
    def survives(text: str) -> bool:
        try:
            check_all(text)
        except (ptxsim.PtxError, AssertionError):
            return False
        return True

    header, text = kernel_of(ptx(), f"{kernel}I{ELEMENTS[torch.float16]}")
    assert survives(header + text)
    changes = list(MUTATED.finditer(text))
    assert len(changes) > 5
    for match in changes:
        changed = text[: match.start()] + mutant(match) + text[match.end() :]
        assert not survives(header + changed), match[0]


@needs_toolkit
def test_the_barrier_of_means_is_needed() -> None:
    half = ELEMENTS[torch.float16]
    others = f"11binary_packI{half}", f"binary_statsI{half}"
    header, text = kernel_of(ptx(), "binary_means", *others)
    check_all(header + text)
    with pytest.raises(ptxsim.Race):
        check_all(header + re.sub(r"bar\.sync[^;]*;", "", text))


def test_plan_covers_all_rows() -> None:
    """The C++ plan alone, at sizes that are too large to run."""
    for rows, k in ((1, 1), (4096, 768), (30522, 1025), (10**6, 4096), (1, 10**9)):
        plan = _C.binary_pack_cuda_plan(rows, k)
        warps = rows * -(-k // 1024)
        assert plan["launch"]["grid"] == -(-warps * 32 // plan["launch"]["block"]) < 2**31
        assert plan["stats"]["grid"] == -(-rows * 32 // plan["stats"]["block"])
    assert _C.binary_pack_cuda_plan(0, 5)["launch"]["grid"] == 0
    assert _C.binary_pack_cuda_plan(5, 0)["launch"]["grid"] == 0
