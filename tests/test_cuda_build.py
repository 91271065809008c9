# SPDX-License-Identifier: Apache-2.0
"""CUDA in the build: what FASTBB_CUDA and its architectures ask for, the library that comes of it,
and which devices the Python side lets through. Nothing here needs a GPU.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import fastbb
import inventory
from fastbb import ops
from fastbb.ops import _cuda
from test_build import cmake, library, needed_libraries, needs_binutils
from test_null_ptx import Params, Plan

ROOT = Path(__file__).resolve().parent.parent
BUILT = fastbb.build_info()["cuda"]
needs_kernels = pytest.mark.skipif(not BUILT, reason="this build has no CUDA kernels")
OPERATORS = [name for each in inventory.families() if each.cuda for name in each.operators]


# What is asked for


def decide(tmp_path: Path, nvcc: str | None = None, **variables: str) -> tuple[int, str]:
    """Exit status and output of cmake/Cuda.cmake where the only compiler prints `nvcc`."""
    folder = tmp_path / "cuda" / "bin"
    folder.mkdir(parents=True, exist_ok=True)
    environment = {"PATH": str(tmp_path)}
    if nvcc is not None:
        (folder / "nvcc").write_text(f"#!/bin/sh\necho '{nvcc}'\n")
        (folder / "nvcc").chmod(0o755)
        environment["CUDA_HOME"] = str(tmp_path / "cuda")
    # A copy, so that no toolkit beside the sources is found.
    script = tmp_path / "cmake" / "Cuda.cmake"
    script.parent.mkdir(exist_ok=True)
    shutil.copy(ROOT / "cmake/Cuda.cmake", script)
    definitions = [f"-D{k}={v}" for k, v in variables.items() if k.startswith("FASTBB")]
    environment |= {k: v for k, v in variables.items() if not k.startswith("FASTBB")}
    done = subprocess.run(
        [cmake(), *definitions, "-P", str(script)], capture_output=True, text=True, env=environment
    )
    return done.returncode, " ".join((done.stdout + done.stderr).split())


NVCC_13 = "Cuda compilation tools, release 13.0, V13.0.88"
NVCC_12 = "Cuda compilation tools, release 12.4, V12.4.131"


@pytest.mark.parametrize(
    ("nvcc", "variables", "says"),
    [
        (None, {"FASTBB_CUDA": "off"}, "CUDA kernels: off"),
        (NVCC_13, {"FASTBB_CUDA": "off"}, "CUDA kernels: off"),
        (None, {"FASTBB_CUDA": "auto"}, "none, for want of a toolkit (no nvcc in $CUDACXX, $NVCC"),
        (NVCC_12, {"FASTBB_CUDA": "auto"}, "($CUDA_HOME) is 12.4.131)"),
        ("hello", {"FASTBB_CUDA": "auto"}, "($CUDA_HOME) does not run as nvcc)"),
        (NVCC_13, {"FASTBB_CUDA": "auto"}, "sm 80, 90, 100, 120, PTX 120, by nvcc 13.0.88"),
        (NVCC_13, {"FASTBB_CUDA": "auto", "CUDACXX": "/no/nvcc"}, "at /no/nvcc ($CUDACXX))"),
        (NVCC_13, {"FASTBB_CUDA": "auto", "NVCC": "/no/nvcc"}, "at /no/nvcc ($NVCC))"),
        (NVCC_13, {"FASTBB_CUDA": "on"}, "sm 80, 90, 100, 120, PTX 120, by nvcc 13.0.88"),
        (NVCC_13, {"FASTBB_CUDA": "on", "FASTBB_CUDA_ARCHS": "120;8.6;90;90"}, "sm 86, 90, 120, P"),
        (
            NVCC_13,
            {"FASTBB_CUDA": "on", "TORCH_CUDA_ARCH_LIST": "7.5 8.0 9.0a+PTX"},
            "sm 80, 90, P",
        ),
        (
            NVCC_13,
            {"FASTBB_CUDA": "on", "FASTBB_CUDA_ARCHS": "80", "TORCH_CUDA_ARCH_LIST": "9.0"},
            "sm 80, PTX 80,",
        ),
    ],
)
def test_requests_that_can_be_met(
    tmp_path: Path, nvcc: str | None, variables: dict[str, str], says: str
) -> None:
    status, text = decide(tmp_path, nvcc, **variables)
    assert status == 0 and says in text, text


@pytest.mark.parametrize(
    ("nvcc", "variables", "says"),
    [
        (None, {"FASTBB_CUDA": "yes"}, "FASTBB_CUDA: must be auto, on or off, got 'yes'"),
        (
            None,
            {"FASTBB_CUDA": "on"},
            "must be auto or off without a CUDA toolkit of at least 12.8",
        ),
        (NVCC_12, {"FASTBB_CUDA": "on"}, "($CUDA_HOME) is 12.4.131), got 'on'"),
        (NVCC_13, {"FASTBB_CUDA": "on", "FASTBB_CUDA_ARCHS": "75"}, "80 or higher, got '75'"),
        (NVCC_13, {"FASTBB_CUDA": "on", "FASTBB_CUDA_ARCHS": "hopper"}, "80;90, got 'hopper'"),
        (NVCC_13, {"FASTBB_CUDA": "on", "TORCH_CUDA_ARCH_LIST": "7.5"}, "at least 8.0, got '7.5'"),
    ],
)
def test_requests_that_cannot_be_met_stop_the_build(
    tmp_path: Path, nvcc: str | None, variables: dict[str, str], says: str
) -> None:
    status, text = decide(tmp_path, nvcc, **variables)
    assert status != 0 and says in text, text


# The library


def test_build_info_says_what_was_built() -> None:
    found = bool(list(library("_C").parent.glob("libfastbb_cuda.so")))
    assert found == bool(BUILT)
    if BUILT:
        assert re.fullmatch(r"\d+\.\d+[.\d]*", BUILT["toolkit"])
        assert BUILT["sm"] == sorted(BUILT["sm"]) and BUILT["ptx"] == BUILT["sm"][-1] >= 80


@needs_kernels
@needs_binutils
def test_library_needs_neither_driver_nor_toolkit_nor_torch() -> None:
    for name in needed_libraries(library("libfastbb_cuda")):
        assert not re.match(r"lib(cuda|cudart|torch|c10|nv)", name)


def test_operators_are_registered_where_kernels_were_built() -> None:
    assert "null" in OPERATORS
    for name in OPERATORS:
        assert _cuda.has_kernel(name) == bool(BUILT), name


def launcher() -> ctypes._CFuncPtr:
    """`fastbb::null_cuda`."""
    path = library("libfastbb_cuda")
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", path], capture_output=True, text=True, check=True
    ).stdout
    (name,) = re.findall(r"\b_ZN6fastbb9null_cudaE\w+", symbols)
    function = ctypes.CDLL(str(path))[name]
    function.restype = ctypes.c_char_p
    function.argtypes = (ctypes.POINTER(Params), ctypes.POINTER(Plan), ctypes.c_void_p)
    return function


NOTHING = Params()  # no rows: a thread that runs returns at once


@needs_kernels
@needs_binutils
@pytest.mark.parametrize(
    ("plan", "says"),
    [
        (Plan(0, 128, 0, 16, 1, 1, 1), "the grid is not of 1 to 2^31-1 blocks"),
        (Plan(2**31, 128, 0, 16, 1, 1, 1), "the grid is not of 1 to 2^31-1 blocks"),
        (Plan(1, 1025, 0, 16, 1, 1, 1), "a block is not of 1 to 1024 threads"),
        (Plan(1, 128, 2**20, 16, 1, 1, 1), "a block's shared memory is not 0 to 228 KB"),
        (Plan(1, 128, 0, 3, 1, 1, 1), "a unit is not of 2, 4, 8 or 16 bytes"),
    ],
)
def test_launches_beyond_the_limits_are_refused(plan: Plan, says: str) -> None:
    assert launcher()(NOTHING, plan, None).decode() == says


@needs_kernels
@needs_binutils
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("shared", [0, 64 * 1024])
def test_launch_without_a_driver_is_an_error(shared: int) -> None:
    text = launcher()(NOTHING, Plan(1, 128, shared, 16, 1, 1, 1), None).decode()
    assert re.search("driver|device", text), text


@needs_kernels
@pytest.mark.parametrize("name", [name for name in OPERATORS if _cuda.has_kernel(name)])
def test_cuda_code_refuses_other_tensors(name: str) -> None:
    """Called past the dispatcher, as autograd and compiled code may."""
    from fastbb.testing import SAMPLES

    operator = getattr(torch.ops.fastbb, name).default
    sample = next(iter(SAMPLES[f"fastbb::{name}"]("cpu", torch.float32)))
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises(RuntimeError, match="must be a CUDA tensor, got another device"):
        operator.redispatch(cuda, *sample.args)


# Devices


@pytest.mark.parametrize(
    ("capability", "sm", "ptx", "reason"),
    [
        ((8, 0), [80, 90], 90, None),
        ((8, 9), [80, 90], 90, None),
        ((12, 1), [80, 90], 90, None),
        ((10, 3), [80, 100, 120], 120, None),
        ((7, 5), [80], 80, "compute capability 7.5 is below 8.0"),
        ((8, 0), [86, 90], 90, "8.0 has no code in this build, which has sm [86, 90]"),
        ((11, 0), [80, 90, 100, 120], 120, "11.0 has no code in this build"),
        ((9, 0), [80, 120], 120, "9.0 has no code in this build"),
    ],
)
def test_capabilities(
    capability: tuple[int, int], sm: list[int], ptx: int, reason: str | None
) -> None:
    found = _cuda.capability_reason(capability, sm, ptx)
    assert found == reason if reason is None else reason in str(found)


def test_no_reason_against_a_device_with_kernels(cuda_machine: pytest.MonkeyPatch) -> None:
    assert _cuda.cuda_reasons("null", 0) == []


@pytest.mark.parametrize(
    ("where", "name", "value", "reason"),
    [
        (_cuda._C, "build_info", lambda: {"cuda": False}, "this build has no CUDA kernels"),
        (_cuda, "has_kernel", lambda op: False, "null has no CUDA kernel"),
        (torch.version, "hip", "6.4", "this torch is built for ROCm"),
        (_cuda, "capability_of", lambda index: None, "torch finds no CUDA device"),
        (_cuda, "capability_of", lambda index: (7, 5), "capability 7.5 is below 8.0"),
    ],
)
def test_forced_kernel_says_why_not(
    cuda_machine: pytest.MonkeyPatch, where: object, name: str, value: object, reason: str
) -> None:
    cuda_machine.setattr(where, name, value)
    with FakeTensorMode():
        x = torch.empty(2, 3, device="cuda")
        with pytest.raises(NotImplementedError, match=f"null: no fused kernel .*{reason}"):
            ops.null(x, impl="fused")


@pytest.mark.parametrize("served", [True, False])
def test_choice_is_traced_as_a_constant(cuda_machine: pytest.MonkeyPatch, served: bool) -> None:
    """With fullgraph, since torch.export allows no break."""
    if not served:
        cuda_machine.setattr(_cuda, "capability_of", lambda index: None)

    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return ops.null(x)

    with FakeTensorMode():
        graph = torch.export.export(Module(), (torch.empty(2, 3, device="cuda"),), strict=True)
    assert ("fastbb.null" in str(graph)) == served
