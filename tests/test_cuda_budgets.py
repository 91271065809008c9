# SPDX-License-Identifier: Apache-2.0
"""Registers and blocks per multiprocessor of the CUDA kernels that are built, against a checked-in
file. `make cuda-budgets` rewrites it.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

from cuda_families import GROUPS
from ptxsim import toolkit

BUDGETS = Path(__file__).resolve().parent / "cuda_budgets.json"
REWRITE = os.environ.get("FASTBB_REWRITE_BUDGETS") == "1"
# Another release of ptxas moves a register or two, so the file names the one that it is of.
SLACK = 2
TOOLKIT, WHERE = toolkit.find()
pytestmark = [
    pytest.mark.skipif(TOOLKIT is None, reason=f"no CUDA toolkit: {WHERE}"),
    pytest.mark.skipif(shutil.which("c++filt") is None, reason="no c++filt (binutils)"),
]
STRICT = ("-Xptxas", "-v,-warn-spills,-warn-lmem-usage,-Werror")


class Device(NamedTuple):
    """Limits of a multiprocessor (CUDA programming guide, compute capabilities)."""

    threads: int
    shared: int


KB = 1024
DEVICES = {
    "80": Device(2048, 164 * KB),
    "86": Device(1536, 100 * KB),
    "89": Device(1536, 100 * KB),
    "90": Device(2048, 228 * KB),
    "100": Device(2048, 228 * KB),
    "120": Device(1536, 100 * KB),
}
REGISTERS = 64 * KB  # of each
RESERVED = KB  # shared memory of a block that the system takes


def blocks_of(device: Device, registers: int, threads: int, shared: int) -> int:
    """Blocks that a multiprocessor holds at a time.

    A warp gets registers in units of 256, and each of four schedulers has a quarter of them.
    """
    of_warp = math.ceil(registers * 32 / 256) * 256
    warps = REGISTERS // 4 // of_warp * 4
    by_registers = warps // (threads // 32)
    by_shared = device.shared // (math.ceil(shared / 128) * 128 + RESERVED)
    return min(by_registers, by_shared, device.threads // threads)


def cubin(source: Path, arch: str) -> Path:
    assert TOOLKIT is not None
    return TOOLKIT.compile(source, arch, "cubin", STRICT)


@functools.cache
def registers(group: str, arch: str) -> dict[str, int]:
    """Registers by kernel; compiling fails where one spills or uses local memory."""
    assert TOOLKIT is not None
    logs = (TOOLKIT.messages(cubin(source, arch)) for source in GROUPS[group].sources)
    found = [
        each
        for log in logs
        for each in re.findall(r"entry function '(\w+)'.*?Used (\d+) registers", log, re.DOTALL)
    ]
    names = subprocess.run(
        ["c++filt", *(name for name, _ in found)], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    short = [re.sub(r"fastbb::cuda::|^void |\(.*", "", name) for name in names]
    return {name: int(count) for name, (_, count) in zip(short, found, strict=True)}


def measured(group: str, arch: str) -> dict[str, dict[str, int]]:
    found = {}
    for kernel, count in registers(group, arch).items():
        launch = GROUPS[group].launch_of(kernel)
        blocks = blocks_of(DEVICES[arch], count, launch["block"], launch["shared_bytes"])
        found[kernel] = {"registers": count, "blocks": blocks}
    return found


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("arch", DEVICES)
def test_no_spills_and_within_budget(arch: str, group: str) -> None:
    found = measured(group, arch)
    budgets = json.loads(BUDGETS.read_text()) if BUDGETS.is_file() else {}
    if REWRITE:
        budgets.setdefault(arch, {}).update(found)
        BUDGETS.write_text(json.dumps(budgets, indent=1, sort_keys=True) + "\n")
        return
    assert found, "no kernel"
    for kernel, now in found.items():
        budget = budgets[arch][kernel]
        assert now["registers"] <= budget["registers"] + SLACK, kernel
        assert now["blocks"] >= budget["blocks"], kernel


def test_budgets_name_only_kernels_that_exist() -> None:
    kernels = {name for group in GROUPS for name in registers(group, "80")}
    budgets = json.loads(BUDGETS.read_text())
    assert list(budgets) == sorted(DEVICES)
    for arch in budgets:
        assert set(budgets[arch]) == kernels


def test_blocks_of_known_kernels() -> None:
    """By registers, by shared memory, by threads."""
    assert blocks_of(DEVICES["80"], 128, 128, 0) == 4
    assert blocks_of(DEVICES["80"], 129, 128, 0) == 3
    assert blocks_of(DEVICES["86"], 32, 128, 48 * KB) == 2
    assert blocks_of(DEVICES["80"], 32, 128, 40 * KB) == 4
    assert blocks_of(DEVICES["86"], 32, 128, 0) == 12
    assert blocks_of(DEVICES["90"], 32, 1024, 0) == 2
