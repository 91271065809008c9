# SPDX-License-Identifier: Apache-2.0
"""What a reader of a result must know about a CUDA device, its driver and CUDA's versions."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from fastbb.ops import _cuda

_KERNEL_MODULE = Path("/proc/driver/nvidia/version")


def driver_version() -> str:
    """Version of NVIDIA's driver, e.g. `580.65.06`; `unknown` where the system does not tell."""
    if _KERNEL_MODULE.is_file():
        match = re.search(r"Module\s+(?:for \S+\s+)?(\d[\d.]+)", _KERNEL_MODULE.read_text())
        if match:
            return match[1]
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "unknown"
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = done.stdout.split()
    return lines[0] if done.returncode == 0 and lines else "unknown"


def reasons_against(ops: Iterable[str], indices: Iterable[int]) -> list[str]:
    """Why operators do not run on devices, each reason once; empty when all run on all of them.

    Ends with torch's own error where it finds no device: a missing driver, an old one, a CPU build.
    """
    ops = list(ops)
    found = {x: None for index in indices for op in ops for x in _cuda.cuda_reasons(op, index)}
    return [*found, *_why_no_device()]


def _why_no_device() -> list[str]:
    if torch.cuda.is_available():
        return []
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return [f"torch says: {error}"]
    return []


def device_facts(index: int, cuda: Any = torch.cuda) -> dict[str, Any]:
    """Name, compute capability and sizes of a device."""
    properties = cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory GiB": round(properties.total_memory / 2**30, 1),
    }


def cuda_info(indices: list[int], cuda: Any = torch.cuda) -> dict[str, Any]:
    """Facts of the driver and of these devices, by their names in torch."""
    return {
        "driver": driver_version(),
        "CUDA of torch": torch.version.cuda,
        **{f"cuda:{index}": device_facts(index, cuda) for index in indices},
    }
