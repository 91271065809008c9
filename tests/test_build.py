# SPDX-License-Identifier: Apache-2.0
"""The build keeps its promises: baseline code is baseline, kernels know no torch, the operator
library needs torch's stable ABI only. Every check is also shown to fail.
"""

from __future__ import annotations

import importlib.util
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import check_baseline_objects as checker
import fastbb
from requirements import requirements

ROOT = Path(__file__).resolve().parent.parent

needs_x86 = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64"),
    reason=f"instruction-set levels exist on x86-64 only, this is {platform.machine()}",
)
needs_binutils = pytest.mark.skipif(
    not (shutil.which("objdump") and shutil.which("nm")), reason="objdump and nm are not installed"
)
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


def library(name: str) -> Path:
    """An installed library of fastbb."""
    spec = importlib.util.find_spec("fastbb._ops")
    assert spec is not None and spec.origin is not None
    (path,) = Path(spec.origin).parent.glob(f"{name}*.so")
    return path


def cmake() -> str:
    """The build's cmake: a package of this environment, or the system's."""
    found = shutil.which("cmake", path=Path(sys.executable).parent) or shutil.which("cmake")
    if found is None:
        pytest.skip("cmake is not installed")
    return found


# Instruction sets


@needs_x86
@needs_binutils
def test_baseline_objects_hold_no_later_instructions() -> None:
    tree = checker.newest_build()
    if tree is None:
        pytest.skip("no build tree under build/: fastbb was not built from this folder")
    result = checker.check(tree)
    assert not result.problems, "\n".join(result.problems)
    levels = [level for level in fastbb.isa_levels() if level != "baseline"]
    assert result.baseline >= 2 and result.libraries == 2
    assert result.higher >= len(levels)


CLEAN = "int plain(const int* x) { return x[0] + x[1]; }"
VECTOR = """
#include <immintrin.h>
extern "C" void twice(float* x) {
  _mm256_storeu_ps(x, _mm256_add_ps(_mm256_loadu_ps(x), _mm256_loadu_ps(x)));
}
"""
WEAK = (
    """
template <class T> __attribute__((noinline)) T shared_by_all(T x) { return x * x + x; }
extern "C" float use(float x) { return shared_by_all(x); }
"""
    + VECTOR
)
INITIALISER = (
    """
extern "C" float measure(float);
static float table = measure(1.0f);
extern "C" float read_table() { return table; }
"""
    + VECTOR
)


def compile_into(tree: Path, target: str, source: str, *flags: str) -> None:
    folder = tree / "CMakeFiles" / f"{target}.dir"
    folder.mkdir(parents=True)
    (folder / "planted.cpp").write_text(source)
    subprocess.run(
        ["g++", "-O2", *flags, "-c", str(folder / "planted.cpp"), "-o", str(folder / "planted.o")],
        check=True,
    )


@needs_x86
@needs_binutils
@needs_compiler
@pytest.mark.parametrize(
    ("target", "source", "flags", "problem"),
    [
        ("fastbb_core", CLEAN, (), None),
        ("fastbb_x_baseline", CLEAN, (), None),
        ("fastbb_x_avx2", VECTOR, ("-mavx2",), None),
        ("fastbb_core", VECTOR, ("-mavx",), "beyond x86-64"),
        ("fastbb_x_baseline", VECTOR, ("-mavx",), "beyond x86-64"),
        ("fastbb_x_baseline", VECTOR, ("-mavx512f",), "beyond x86-64"),
        # Scalar code of a higher level uses no wide register, only VEX forms or newer SSE.
        ("fastbb_x_baseline", "float f(float a, float b) { return a * b; }", ("-mavx",), "beyond"),
        ("fastbb_core", "long f(long a) { return __builtin_popcountl(a); }", ("-mpopcnt",), "bey"),
        ("fastbb_core", "#include <cmath>\nfloat f(float a) { return std::floor(a); }",
         ("-msse4.1", "-ffast-math"), "beyond"),
        ("fastbb_x_baseline", "", (), "no instructions found"),
        ("fastbb_x_avx2", WEAK, ("-mavx2",), "weak symbol float shared_by_all<float>"),
        ("fastbb_x_avx512", INITIALISER, ("-mavx512f",), "static initialiser"),
        ("fastbb_x_avx512_bf16", CLEAN, (), "no vector instructions"),
    ],
)  # fmt: skip
def test_checker_finds_planted_faults(
    tmp_path: Path, target: str, source: str, flags: tuple[str, ...], problem: str | None
) -> None:
    compile_into(tmp_path, target, source, *flags)
    problems = checker.check(tmp_path).problems
    if problem is None:
        assert not problems
    else:
        assert any(problem in found for found in problems), problems


# Linking


def undefined_symbols(path: Path) -> list[str]:
    text = subprocess.run(
        ["nm", "-D", "--undefined-only", str(path)], check=True, capture_output=True, text=True
    ).stdout
    return [line.split()[-1] for line in text.splitlines()]


def needed_libraries(path: Path) -> list[str]:
    text = subprocess.run(
        ["objdump", "-p", str(path)], check=True, capture_output=True, text=True
    ).stdout
    return re.findall(r"NEEDED\s+(\S+)", text)


# Names of torch's C++ classes and functions in mangled form, e.g. _ZN2at6Tensor...
TORCH_CPP = re.compile(r"_ZN?K?\w*?(2at|3c10|5torch)[A-Z0-9]")


@needs_binutils
def test_operator_library_uses_the_stable_abi_only() -> None:
    symbols = undefined_symbols(library("_ops"))
    assert any(name.startswith(("aoti_torch_", "torch_")) for name in symbols)
    assert not [name for name in symbols if TORCH_CPP.match(name)]


@needs_binutils
def test_torch_cpp_symbols_are_recognised() -> None:
    """torch's own Python library uses the C++ classes, and the pattern sees that."""
    import torch

    path = Path(torch.__file__).parent / "lib" / "libtorch_python.so"
    assert any(TORCH_CPP.match(name) for name in undefined_symbols(path))


@needs_binutils
@pytest.mark.parametrize("name", ["libfastbb_kernels", "_C"])
def test_kernels_and_bindings_link_no_torch(name: str) -> None:
    needed = needed_libraries(library(name))
    assert not [each for each in needed if "torch" in each or "c10" in each]


@needs_binutils
@pytest.mark.parametrize("name", ["libfastbb_kernels", "_C", "_ops"])
def test_no_thread_pool_of_its_own(name: str) -> None:
    needed = needed_libraries(library(name))
    assert not [each for each in needed if re.match(r"lib(g|i)?omp|libtbb", each)]


# Requirements of the Makefile


PROJECT = {
    "build-system": {"requires": ["backend>=1", "torch>=2"]},
    "project": {
        "name": "fastbb",
        "dependencies": ["torch>=2", "numpy"],
        "optional-dependencies": {"demo": ["timm"], "test": ["fastbb[demo]", "pytest"]},
    },
}


def test_requirements_follow_extras() -> None:
    lines = requirements(PROJECT, ["test"])
    assert lines == ["backend>=1", "torch>=2", "cmake>=3.25", "ninja", "numpy", "pytest", "timm"]


def test_requirements_refuse_unknown_extras() -> None:
    with pytest.raises(ValueError, match=r"extra must be one of .*'demo', 'test'.*, got 'gpu'"):
        requirements(PROJECT, ["gpu"])
