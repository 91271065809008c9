# SPDX-License-Identifier: Apache-2.0
"""The NEON code of packing and of binary products, compiled for ARM and run under emulation."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
COMPILER = shutil.which("aarch64-linux-gnu-g++")
EMULATOR = shutil.which("qemu-aarch64")
SOURCES = (
    "csrc/core/scratch.cpp",
    "csrc/ops/binary_linear/binary_linear_cpu.cpp",
    "csrc/ops/binary_pack/binary_pack_cpu.cpp",
    "tools/aarch64/main.cpp",
)
# Those of cmake/AddFamily.cmake, and every warning an error.
FLAGS = ("-O3", "-std=c++20", "-ffp-contract=fast", "-fno-math-errno", "-fno-trapping-math")
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-psabi")
LEVEL = ("-DFASTBB_ISA_NAME=baseline", "-DFASTBB_ISA_BASELINE=1")

pytestmark = pytest.mark.skipif(
    COMPILER is None or EMULATOR is None, reason="no g++-aarch64-linux-gnu and qemu-user"
)


def build(folder: Path) -> Path:
    """The program; headers in `folder` take the place of those in csrc."""
    assert COMPILER is not None
    program = folder / "kernels"
    folders = (f"-I{folder}", f"-I{ROOT / 'csrc'}")
    command = [COMPILER, "-static", *FLAGS, *WARNINGS, *LEVEL, *folders]
    subprocess.run([*command, *(ROOT / x for x in SOURCES), "-o", program], check=True)
    return program


def run(program: Path) -> subprocess.CompletedProcess[str]:
    assert EMULATOR is not None
    return subprocess.run([EMULATOR, program], capture_output=True, text=True, check=False)


def test_results_are_exact(tmp_path: Path) -> None:
    done = run(build(tmp_path))
    assert done.returncode == 0, done.stdout
    assert "results are right" in done.stdout


def test_wrong_counts_are_noticed(tmp_path: Path) -> None:
    """The tile in use is NEON's: a change of its branch alone makes results wrong."""
    header = (ROOT / "csrc/core/popcount.h").read_text()
    neon = "vcntq_u8(bit_cast<uint8x16_t>(words))"
    assert header.count(neon) == 1
    (tmp_path / "core").mkdir()
    (tmp_path / "core/popcount.h").write_text(header.replace(neon, f"vrbitq_u8({neon})"))
    done = run(build(tmp_path))
    assert done.returncode == 1 and "a product differs" in done.stdout


@pytest.mark.parametrize("family", ["binary_attention", "elastic_binarize"])
def test_other_families_compile(family: str, tmp_path: Path) -> None:
    assert COMPILER is not None
    source = ROOT / f"csrc/ops/{family}/{family}_cpu.cpp"
    command = [COMPILER, "-c", *FLAGS, *WARNINGS, *LEVEL, f"-I{ROOT / 'csrc'}", str(source)]
    subprocess.run([*command, "-o", str(tmp_path / "object.o")], check=True)
