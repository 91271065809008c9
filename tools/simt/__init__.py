# SPDX-License-Identifier: Apache-2.0
"""Runs the CUDA sources of window attention as C++ on the host, plain or under sanitizers.

The sources are those of the package; headers in `include` stand in for CUDA's, for `core/ptx.cuh`
and for `core/launch.cuh`. See simt.h for how blocks run.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
CACHE = ROOT / "build" / "simt"
FAMILY = "ops/window_attention/window_attention_cuda"
MATHS = {"f16": "HalfMath", "bf16": "Bf16Math", "f32": "FloatMath", "tf32": "Tf32Math"}
SANITIZERS = {
    "plain": ["-O2"],
    "address": ["-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"],
    "thread": ["-O1", "-fsanitize=thread"],
}
# A race ends the process. What is alive at its end is no leak.
OPTIONS = {"ASAN_OPTIONS": "detect_leaks=0", "TSAN_OPTIONS": "halt_on_error=1:exitcode=66"}


class HostError(Exception):
    """A run ended with an error: the message is what it printed."""


def compiler() -> str | None:
    """g++, or None where there is none."""
    return shutil.which("g++")


def build(kind: str, sanitizer: str = "plain", sources: Path = ROOT / "csrc") -> Path:
    """Compiles the kernels of one element type, or finds the result of an earlier call.

    Args:
        kind: a key of MATHS.
        sanitizer: a key of SANITIZERS.
        sources: a folder to use in the place of csrc.

    Raises:
        HostError: with the compiler's output.
    """
    here = Path(__file__).resolve().parent
    inputs = [here / "main.cpp", here / "simt.cpp"]
    inputs += [sources / f"{FAMILY}{part}" for part in ("_plan.cpp", f"_{kind}.cu")]
    inputs += [sources / f"{FAMILY}_backward_{kind}.cu"]
    flags = [
        "-std=c++20",
        "-g1",
        "-fno-extern-tls-init",
        "-ffp-contract=off",
        "-Wno-unknown-pragmas",
    ]
    flags += [*SANITIZERS[sanitizer], f"-DFASTBB_SIMT_MATH={MATHS[kind]}"]
    flags += [f"-I{here / 'include'}", f"-I{sources}"]
    digest = hashlib.sha256(repr(flags).encode())
    for path in sorted([*here.rglob("*.*"), *sources.rglob("*.*")]):
        if path.suffix in (".h", ".cuh", ".cu", ".cpp"):
            digest.update(path.read_bytes())
    target = CACHE / f"{kind}.{sanitizer}.{digest.hexdigest()[:16]}"
    if target.is_file():
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        objects = [Path(folder) / f"{path.name}.o" for path in inputs]
        jobs = [
            subprocess.Popen(
                ["g++", "-x", "c++", "-c", *flags, str(path), "-o", str(to)],
                stderr=subprocess.PIPE,
                text=True,
            )
            for path, to in zip(inputs, objects, strict=True)
        ]
        messages = [job.communicate()[1] for job in jobs]
        if any(job.returncode for job in jobs):
            raise HostError("".join(messages))
        partial = target.with_suffix(f".{os.getpid()}.partial")
        link = ["g++", *flags, *map(str, objects), "-o", str(partial)]
        subprocess.run(link, check=True)
        partial.replace(target)
    return target


def run(program: Path, call: Any, many_blocks: int, seed: int = 0) -> None:
    """Runs a `Call` or `BackwardCall` of the PTX tests and puts the results into its arena.

    Raises:
        HostError: a sanitizer or the runtime found something.
    """
    arena = call.arena
    kept = [each for each in arena.allocations if each.address != call.workspace]
    backward = call.workspace is not None
    parts = [struct.pack("<3q", backward, many_blocks, seed), bytes(call.params)]
    parts.append(struct.pack("<q", len(kept)))
    for each in kept:
        # What was not written reads as NaN.
        raw = arena.data[each.start : each.start + each.size].tobytes()
        parts.append(struct.pack("<2q", each.address, each.size))
        parts.append(b"\xff" * each.size if each.mode == "out" else raw)
    with tempfile.TemporaryDirectory() as folder:
        case, results = Path(folder) / "case", Path(folder) / "results"
        case.write_bytes(b"".join(parts))
        done = subprocess.run(
            [program, case, results], capture_output=True, text=True, env=os.environ | OPTIONS
        )
        if done.returncode:
            raise HostError(f"exit status {done.returncode}: {done.stderr}")
        raw = results.read_bytes()
    for each in kept:
        if each.mode != "in":
            arena.patch(each.address, raw[: each.size])
            arena.state[each.start : each.start + each.size] |= 1
        raw = raw[each.size :]
