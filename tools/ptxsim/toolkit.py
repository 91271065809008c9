# SPDX-License-Identifier: Apache-2.0
"""Finds a CUDA toolkit and compiles with it: from $NVCC, from PATH, or from the packages that
`pip install nvidia-cuda-nvcc nvidia-cuda-crt nvidia-cuda-runtime nvidia-cuda-cccl nvidia-nvvm` puts
next to the running Python, or `make cuda-toolkit` into .venv-cuda.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import site
import subprocess
import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
CACHE = ROOT / "build" / "ptx"
INCLUDE = ROOT / "csrc"
LOWEST = (13, 0)
KINDS = {"ptx": ("-ptx", "compute_"), "cubin": ("-cubin", "sm_")}
HEADERS = {".h", ".cuh", ".hpp"}


class CompileError(Exception):
    """nvcc failed; the message is what it printed."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA compiler.

    Attributes:
        nvcc: its path.
        version: (major, minor) of its release.
    """

    nvcc: Path
    version: tuple[int, int]

    def compile(
        self, source: Path, arch: str, kind: str = "ptx", flags: tuple[str, ...] = ()
    ) -> Path:
        """Compiles a .cu file for one architecture, or finds the result of an earlier call.

        Args:
            source: the file; csrc/ is on the include path.
            arch: a compute capability without dot, such as "80" or "90a".
            kind: "ptx" or "cubin".
            flags: more arguments of nvcc.

        Returns:
            The path of the result below build/ptx.

        Raises:
            CompileError: with nvcc's output.
        """
        mode, prefix = KINDS[kind]
        command = [
            str(self.nvcc),
            mode,
            f"-arch={prefix}{arch}",
            "-std=c++20",
            "-lineinfo",
            f"-I{INCLUDE}",
            *flags,
        ]
        target = CACHE / f"{source.stem}.{arch}.{self._key(source, command)}.{kind}"
        if target.is_file():
            return target
        CACHE.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}.partial")
        done = subprocess.run(
            [*command, "-o", str(partial), str(source)], capture_output=True, text=True
        )
        if done.returncode:
            raise CompileError(f"{source.name} for {arch}:\n{done.stdout}{done.stderr}")
        target.with_suffix(".log").write_text(done.stdout + done.stderr)
        partial.replace(target)
        return target

    def messages(self, target: Path) -> str:
        """What nvcc printed when it wrote a result of `compile`."""
        return target.with_suffix(".log").read_text()

    def _key(self, source: Path, command: list[str]) -> str:
        """A hash of the compiler, the arguments, the source and every header it could include."""
        digest = hashlib.sha256(repr((self.version, command)).encode())
        headers = [p for p in sorted(INCLUDE.rglob("*")) if p.suffix in HEADERS]
        near = [p for p in sorted(source.parent.glob("*")) if p.suffix in HEADERS]
        for path in [source, *near, *headers]:
            digest.update(path.read_bytes())
        return digest.hexdigest()[:16]


def _packages() -> Path:
    """Where the toolkit's packages unpack, of the running Python."""
    folders = [sysconfig.get_paths()["purelib"], *site.getsitepackages()]
    for folder in folders:
        found = sorted(Path(folder).glob("nvidia/cu[0-9]*"), reverse=True)
        if found:
            return found[0]
    return Path(folders[0]) / "nvidia" / "cu13"


def _candidates() -> list[tuple[str, Path]]:
    found = []
    if os.environ.get("NVCC"):
        return [("$NVCC", Path(os.environ["NVCC"]))]
    on_path = shutil.which("nvcc")
    if on_path:
        found.append(("PATH", Path(on_path)))
    found.append(("the Python packages", _packages() / "bin" / "nvcc"))
    own = (ROOT / ".venv-cuda").glob("lib/python3*/site-packages/nvidia/cu*/bin/nvcc")
    return [*found, *((".venv-cuda", path) for path in own)]


def _none(what: str, reason: str) -> tuple[None, str]:
    """The answer where there is none; an error where the environment requires one."""
    if os.environ.get("FASTBB_REQUIRE_CUDA_TOOLKIT") == "1":
        raise RuntimeError(f"a {what} is required: {reason}")
    return None, reason


@lru_cache(maxsize=1)
def find_disassembler() -> tuple[Path | None, str]:
    """nvdisasm, which is no part of the compiler's packages, or None; in words, where it is.

    Raises:
        RuntimeError: there is none, and FASTBB_REQUIRE_CUDA_TOOLKIT is 1.
    """
    places = {"PATH": shutil.which("nvdisasm"), "the Python packages": _packages() / "bin/nvdisasm"}
    for where, path in places.items():
        if path is not None and Path(path).is_file():
            return Path(path), where
    reason = "no nvdisasm in PATH or the Python packages (pip install nvidia-cuda-nvdisasm)"
    return _none("disassembler", reason)


@lru_cache(maxsize=1)
def find() -> tuple[Toolkit | None, str]:
    """The first toolkit that is new enough, or None; in words, where it is or why there is none.

    Raises:
        RuntimeError: there is none, and FASTBB_REQUIRE_CUDA_TOOLKIT is 1.
    """
    reasons = []
    for where, nvcc in _candidates():
        if not nvcc.is_file():
            reasons.append(f"no nvcc in {where}")
            continue
        done = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True)
        match = re.search(r"release (\d+)\.(\d+)", done.stdout)
        if done.returncode or match is None:
            reasons.append(f"nvcc in {where} does not run")
            continue
        version = int(match[1]), int(match[2])
        if version < LOWEST:
            reasons.append(f"nvcc in {where} is {match[0]}, older than {LOWEST[0]}.{LOWEST[1]}")
            continue
        return Toolkit(nvcc, version), f"{match[0]} from {where}"
    return _none("CUDA toolkit", "; ".join(reasons))
