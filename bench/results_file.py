# SPDX-License-Identifier: Apache-2.0
"""One JSON file of results per machine, torch version and thread count, in `bench/results/`; one
per torch version for a GPU.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from fastbb.measure import machine_info

FOLDER = Path(__file__).parent / "results"


def file_name(machine: dict[str, Any], gpu: str | None = None) -> str:
    """E.g. `amd-epyc-avx512_bf16-2-threads-torch-2.14.1.json`, `nvidia-l4-torch-2.14.1.json`."""
    name = re.sub(r"[^a-z0-9]+", "-", (gpu or machine["cpu"]).lower()).strip("-")
    torch = machine["torch"].partition("+")[0]
    if gpu is not None:
        return f"{name}-torch-{torch}.json"
    return f"{name}-{machine['isa']}-{machine['threads']}-threads-torch-{torch}.json"


def save_section(section: str, content: dict[str, Any], folder: Path = FOLDER) -> Path:
    """Replaces one section of this machine's file, with the machine's facts at this moment."""
    machine = machine_info()
    gpu = content["roofline"]["device"] if "cuda" in content else None
    path = folder / file_name(machine, gpu)
    results = json.loads(path.read_text()) if path.is_file() else {}
    results[section] = {"machine": machine, **content}
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n")
    return path
