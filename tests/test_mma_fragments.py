# SPDX-License-Identifier: Apache-2.0
"""Where ptxsim takes the elements of an mma from, against CuTe's layouts of the same instructions,
evaluated on the CPU.
"""

from __future__ import annotations

import functools
import importlib.util
import subprocess
from pathlib import Path

import numpy as np
import pytest

from ptxsim import toolkit
from ptxsim.fragments import WARP, a_fragment, b_fragment, c_fragment

# Instruction of CuTe -> k, and elements of a register.
INSTRUCTIONS = {
    "SM80_16x8x8_F32F16F16F32_TN": (8, 2),
    "SM80_16x8x16_F32F16F16F32_TN": (16, 2),
    "SM80_16x8x8_F32BF16BF16F32_TN": (8, 2),
    "SM80_16x8x16_F32BF16BF16F32_TN": (16, 2),
    "SM80_16x8x4_F32TF32TF32F32_TN": (4, 1),
    "SM80_16x8x8_F32TF32TF32F32_TN": (8, 1),
    "SM80_16x8x16_S32S8S8S32_TN": (16, 4),
    "SM80_16x8x32_S32S8S8S32_TN": (32, 4),
    "SM80_16x8x256_S32U1U1S32_TN_XORPOPC": (256, 32),
}
PROGRAM = """
#include <cute/atom/mma_traits_sm80.hpp>
#include <cstdio>

template <class Layout>
void print(const char* name, Layout layout) {
  std::printf("%s", name);
  for (int lane = 0; lane < 32; ++lane)
    for (int i = 0; i < int(cute::size<1>(layout)); ++i) std::printf(" %d", int(layout(lane, i)));
  std::printf("\\n");
}

template <class Instruction>
void print(const char* name) {
  using Traits = cute::MMA_Traits<Instruction>;
  std::printf("%s\\n", name);
  print("A", typename Traits::ALayout{});
  print("B", typename Traits::BLayout{});
  print("C", typename Traits::CLayout{});
}

int main() {
%s
}
"""


def command() -> list[str]:
    """Compiles C++ with the headers of CuTe and of the CUDA runtime, which it includes."""
    spec = importlib.util.find_spec("cutlass_library")
    if spec is None or spec.origin is None:
        pytest.skip("no nvidia-cutlass package")
    found, where = toolkit.find()
    if found is None:
        pytest.skip(f"no CUDA toolkit: {where}")
    cute = Path(spec.origin).parent / "source" / "include"
    return [str(found.nvcc), "-x", "c++", "-std=c++17", f"-I{cute}", "-cudart=none"]


@functools.cache
def layouts(folder: Path) -> dict[str, dict[str, np.ndarray]]:
    """Instruction -> matrix -> place of each [lane, element] in the matrix, column by column."""
    calls = "\n".join(f'  print<cute::{name}>("{name}");' for name in INSTRUCTIONS)
    source, program = folder / "layouts.cpp", folder / "layouts"
    source.write_text(PROGRAM.replace("%s\n}\n", f"{calls}\n}}\n"))
    subprocess.run([*command(), "-o", program, source], check=True)
    lines = subprocess.run([program], capture_output=True, text=True, check=True).stdout.split("\n")
    found = {}
    for i, name in enumerate(INSTRUCTIONS):
        title, *rows = lines[4 * i : 4 * i + 4]
        assert title == name
        found[name] = {
            row[0]: np.array(row.split()[1:], dtype=np.int64).reshape(WARP, -1) for row in rows
        }
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cute")


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_fragments_are_those_of_cute(name: str, folder: Path) -> None:
    k, per_register = INSTRUCTIONS[name]
    expected = layouts(folder)[name]
    row, column = a_fragment(16 * k // WARP // per_register, per_register)
    assert np.array_equal((row + 16 * column).reshape(WARP, -1), expected["A"])
    row, column = b_fragment(8 * k // WARP // per_register, per_register)
    assert np.array_equal((column + 8 * row).reshape(WARP, -1), expected["B"])
    row, column = c_fragment(1)
    assert np.array_equal((row + 16 * column).reshape(WARP, -1), expected["C"])
