# SPDX-License-Identifier: Apache-2.0
"""Runs the CUDA sources of a family as C++ on the host, plain or under sanitizers.

The sources are those of the package; headers in `include` stand in for CUDA's, for `core/ptx.cuh`
and for `core/launch.cuh`. See simt.h for how blocks run. A family adds `<stem>.cpp` here, which
launches its kernels.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Container, Sequence
from pathlib import Path

from ptxsim import Arena

ROOT = Path(__file__).resolve().parent.parent.parent
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "simt"
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


def build(
    stem: str,
    parts: Sequence[str],
    sanitizer: str = "plain",
    sources: Path = CSRC,
    defines: Sequence[str] = (),
) -> Path:
    """Compiles kernels of a family, or finds the result of an earlier call.

    Args:
        stem: the family's name.
        parts: its files, by what follows the stem in their names ("_cuda_plan.cpp").
        sanitizer: a key of SANITIZERS.
        sources: a folder to use in the place of csrc.
        defines: macros, "NAME=VALUE".

    Raises:
        HostError: with the compiler's output.
    """
    here = Path(__file__).resolve().parent
    inputs = [here / "main.cpp", here / "simt.cpp", here / f"{stem}.cpp"]
    inputs += [sources / "ops" / stem / f"{stem}{part}" for part in parts]
    flags = [
        "-std=c++20",
        "-g1",
        "-fno-extern-tls-init",
        "-ffp-contract=off",
        "-Wno-unknown-pragmas",
    ]
    flags += [*SANITIZERS[sanitizer], *(f"-D{each}" for each in defines)]
    flags += [f"-I{here / 'include'}", f"-I{here}", f"-I{sources}"]
    digest = hashlib.sha256(repr((flags, parts)).encode())
    for path in sorted([*here.rglob("*.*"), *sources.rglob("*.*")]):
        if path.suffix in (".h", ".cuh", ".cu", ".cpp"):
            digest.update(path.read_bytes())
    target = CACHE / f"{stem}.{sanitizer}.{digest.hexdigest()[:16]}"
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


def run(
    program: Path,
    arena: Arena,
    params: bytes,
    options: Sequence[int] = (),
    seed: int = 0,
    without: Container[int | None] = (),
) -> None:
    """Runs a family's code on the buffers of an arena, and puts the results into it.

    Args:
        params: the parameters, with addresses of the arena.
        options: what the family's `<stem>.cpp` asks for.
        seed: of the order of threads.
        without: addresses of buffers that are left out.

    Raises:
        HostError: a sanitizer or the runtime found something.
    """
    kept = [each for each in arena.allocations if each.address not in without]
    numbers = [len(options), *options, seed, len(params) // 8]
    parts = [struct.pack(f"<{len(numbers)}q", *numbers), params]
    parts.append(struct.pack("<q", len(kept)))
    for each in kept:
        part = slice(each.start, each.start + each.size)
        raw = arena.data[part].copy()
        raw[arena.state[part] & 1 == 0] = 0xFF  # what was not written reads as NaN
        parts += [struct.pack("<2q", each.address, each.size), raw.tobytes()]
    with tempfile.TemporaryDirectory() as folder:
        case, results = Path(folder) / "case", Path(folder) / "results"
        case.write_bytes(b"".join(parts))
        done = subprocess.run(
            [program, case, results], capture_output=True, text=True, env=os.environ | OPTIONS
        )
        if done.returncode:
            raise HostError(f"exit status {done.returncode}: {done.stderr}")
        written = results.read_bytes()
    for each in kept:
        if each.mode != "in":
            arena.patch(each.address, written[: each.size])
            arena.state[each.start : each.start + each.size] |= 1
        written = written[each.size :]
