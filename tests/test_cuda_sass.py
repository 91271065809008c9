# SPDX-License-Identifier: Apache-2.0
"""Machine code of the CUDA kernels: what ptxas made of the PTX that the other tests execute.

A product on tensor cores must be one instruction, on every architecture: some are emulated by long
sequences on some of them, which no test of results would notice.
"""

from __future__ import annotations

import functools
import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from cuda_families import GROUPS
from ptx_text import kernels_of
from ptxsim import toolkit
from test_cuda_budgets import DEVICES, cubin

TOOLKIT, WHERE = toolkit.find()
NVDISASM, WHY = toolkit.find_disassembler()
pytestmark = [
    pytest.mark.skipif(TOOLKIT is None, reason=f"no CUDA toolkit: {WHERE}"),
    pytest.mark.skipif(NVDISASM is None, reason=WHY),
]

# Local memory, atomic operations.
FORBIDDEN = re.compile(r"(LDL|STL|ATOM|ATOMG|ATOMS|RED|REDG)(\.|$)")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)
BITS = r"mma\.sync\S*\.b1\.b1"
PRODUCTS = r"mma\.sync"
EXPONENTIAL = r"ex2\.approx"
# Instruction of PTX -> what it must become.
SAME_COUNT = {
    r"mma\.sync\S*\.f16\.f16": r"HMMA\.16816\.F32$",
    r"mma\.sync\S*\.tf32\.tf32": r"HMMA\.1688\.F32\.TF32$",
    BITS: r"BMMA\.168256\.AND",
    r"mma\.sync\S*\.s8\.s8": r"IMMA\.16832\.S8\.S8",
    PRODUCTS: r"[A-Z]*MMA\.",
    r"ldmatrix\S*\.x4\.shared": r"LDSM\.16\.M88\.4",
    r"ldmatrix\S*\.x4\.trans": r"LDSM\.16\.MT88\.4",
    r"bar\.sync": r"BAR\.SYNC",
    EXPONENTIAL: r"MUFU\.EX2",
}
COPY = r"cp\.async\.cg\.shared\.global"


def opcodes(path: Path) -> dict[str, Counter[str]]:
    """Instructions of a cubin by kernel."""
    text = subprocess.run([str(NVDISASM), "-c", path], capture_output=True, text=True, check=True)
    _, *parts = re.split(r"^\.text\.(\w+):$", text.stdout, flags=re.MULTILINE)
    return {
        name: Counter(INSTRUCTION.findall(body))
        for name, body in zip(parts[::2], parts[1::2], strict=True)
    }


def ptx_counts(source: Path, arch: str) -> dict[str, Counter[str]]:
    """How often the instructions of SAME_COUNT and copies stand in the PTX, by kernel."""
    assert TOOLKIT is not None
    text = TOOLKIT.compile(source, arch).read_text()
    return {
        name: Counter({p: len(re.findall(p, body)) for p in (*SAME_COUNT, COPY)})
        for name, body in kernels_of(text)[1].items()
    }


def count(found: Counter[str], pattern: str) -> int:
    return sum(n for name, n in found.items() if re.match(pattern, name))


@functools.cache
def kernels(group: str, arch: str) -> dict[str, tuple[Counter[str], Counter[str]]]:
    """PTX and machine code of each kernel."""
    found = {}
    for source in GROUPS[group].sources:
        ptx, sass = ptx_counts(source, GROUPS[group].ptx_arch(arch)), opcodes(cubin(source, arch))
        assert ptx.keys() == sass.keys()
        found |= {name: (ptx[name], sass[name]) for name in ptx}
    return found


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("arch", DEVICES)
def test_every_instruction_becomes_one(arch: str, group: str) -> None:
    for name, (ptx, sass) in kernels(group, arch).items():
        assert sum(sass.values()) > 20, name
        emulated = int(arch) >= GROUPS[group].emulated_bits
        for pattern, one in SAME_COUNT.items():
            expected, wanted = one, ptx[pattern]
            if emulated and pattern in (BITS, PRODUCTS) and wanted:
                # One routine, which all products call.
                expected, wanted = r"IMMA\.16832\.U8\.U8", 8
            found = count(sass, expected)
            # ptxas copies parts of loops, for sm_100 and later with products in them.
            exact = int(arch) < 100 and pattern != EXPONENTIAL
            most = wanted if exact else 2 * wanted
            assert wanted <= found <= most, f"{name}: {expected}"
        assert not [each for each in sass if FORBIDDEN.match(each)], name
        # Copies are merged and repeated; none may have become narrow.
        copies = count(sass, r"LDGSTS\.E\.BYPASS\.128")
        assert copies == count(sass, "LDGSTS"), name
        assert (copies > 0) == (ptx[COPY] > 0) and copies >= ptx[COPY] // 4, name


LOCAL = """
extern "C" __global__ void local(float* x, int i) {
  float values[64];
  for (int j = 0; j < 64; ++j) values[j] = x[j];
  for (int j = 0; j < 64; ++j) x[j] = values[i * j & 63];
  atomicAdd(x, 1.0f);
}
extern "C" __global__ void emulated(int* x) {
  asm("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.xor.popc {%0, %1, %2, %3}, "
      "{%0, %1, %2, %3}, {%0, %1}, {%0, %1, %2, %3};"
      : "+r"(x[0]), "+r"(x[1]), "+r"(x[2]), "+r"(x[3]));
}
"""


def test_local_memory_atomics_and_emulation_are_seen(tmp_path: Path) -> None:
    source = tmp_path / "wrong.cu"
    source.write_text(LOCAL)
    assert TOOLKIT is not None
    found = opcodes(TOOLKIT.compile(source, "90", "cubin"))
    bad = {each.split(".")[0] for each in found["local"] if FORBIDDEN.match(each)}
    assert {"LDL", "STL"} <= bad and bad & {"RED", "REDG", "ATOMG"}
    assert count(found["emulated"], "BMMA") == 2
