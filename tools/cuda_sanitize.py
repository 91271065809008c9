# SPDX-License-Identifier: Apache-2.0
"""Runs `fastbb selftest --cuda` under the tools of NVIDIA's compute-sanitizer.

    python tools/cuda_sanitize.py                       # all four tools, on a choice of samples
    python tools/cuda_sanitize.py --tool memcheck --case '*'

compute-sanitizer is looked for in PATH, beside nvcc, and in the package
nvidia-cuda-sanitizer-api of this Python. Prints a summary to paste. Exit status: 0 no tool found
anything, 1 some did, 2 there is nothing to run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "nvidia-cuda-sanitizer-api"
FOUND = 86
"""Exit status of compute-sanitizer when a tool found something."""

# Each sees other errors: accesses outside of tensors; races in shared memory; barriers that not all
# threads reach; reads of memory that nobody wrote.
TOOLS = {
    # Allocations of torch do not matter here, and its probes of the driver may fail.
    "memcheck": ["--padding", "256", "--report-api-errors", "no"],
    "racecheck": [],
    "synccheck": [],
    "initcheck": [],
}
# Only fastbb's kernels are looked at. initcheck must see all: others write what ours read.
FILTER = ["--kernel-name", "kns=fastbb"]

# Every path of the kernels once: shifted and padded windows, shared queries, packed and strided
# inputs, full domain with one and with many blocks of keys, head dims that fill no vector.
CASES = (
    "odd",
    "sliced",
    "no rows",
    "swin",
    "swin_v2",
    "window_1x1",
    "window_12",
    "window_beyond_map",
    "gcvit_global_padded",
    "gcvit_global_odd_windows",
    "roll_pad_both",
    "pad_roll_both_packed",
    "pvt_50_keys",
    "full_bias_mask",
    "full_long_keys_l2norm",
    "pvt_long_queries",
    "dim_1",
    "dim_30",
    "dim_128",
    "batch_0",
)

_SUMMARY = re.compile(r"^=+ ((?:\w+ )?SUMMARY: .*)$", re.MULTILINE)
_SELFTEST = re.compile(r"^\d+ cases, .*$", re.MULTILINE)


@dataclass(frozen=True)
class Outcome:
    """What one tool said.

    Attributes:
        status: exit status of compute-sanitizer.
        summary: its summary line, empty when it ended without one.
        cases: the self-test's own summary, empty when it ended without one.
    """

    tool: str
    status: int
    summary: str
    cases: str

    @property
    def clean(self) -> bool:
        """Nothing was found, in a self-test that ran to its end."""
        return self.status == 0 and bool(self.summary) and bool(self.cases)


def candidates() -> Iterator[Path]:
    """Where compute-sanitizer may be, best first."""
    found = shutil.which("compute-sanitizer")
    if found is not None:
        yield Path(found)
    for compiler in (os.environ.get("CUDACXX"), os.environ.get("NVCC"), shutil.which("nvcc")):
        if compiler:
            folder = Path(compiler).resolve().parent
            yield folder / "compute-sanitizer"
            yield folder.parent / "compute-sanitizer" / "compute-sanitizer"
    if "CUDA_HOME" in os.environ:
        yield Path(os.environ["CUDA_HOME"]) / "bin" / "compute-sanitizer"
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return
    yield from (Path(str(file.locate())) for file in files if file.name == "compute-sanitizer")


def find() -> Path | None:
    """The first compute-sanitizer that can be executed."""
    return next((x for x in candidates() if x.is_file() and os.access(x, os.X_OK)), None)


def command(sanitizer: Path, tool: str, selftest: Sequence[str]) -> list[str]:
    """The command line of one tool."""
    options = [*TOOLS[tool], *([] if tool == "initcheck" else FILTER)]
    return [str(sanitizer), "--tool", tool, "--error-exitcode", str(FOUND), *options, *selftest]


def run_tool(sanitizer: Path, tool: str, selftest: Sequence[str]) -> Outcome:
    """Runs one tool, shows what it prints, returns what came of it."""
    # Torch's allocator gives out parts of large blocks, where reads beyond a tensor meet another.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    line = command(sanitizer, tool, selftest)
    print(f">> {' '.join(line)}", flush=True)
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, env=environment)
    print(done.stdout, flush=True)
    summaries, cases = _SUMMARY.findall(done.stdout), _SELFTEST.findall(done.stdout)
    return Outcome(tool, done.returncode, *((x[-1] if x else "") for x in (summaries, cases)))


def report(outcomes: Sequence[Outcome], version: str) -> str:
    """One line per tool."""
    lines = [f"compute-sanitizer {version}"]
    for each in outcomes:
        verdict = "clean" if each.clean else f"NOT CLEAN (exit status {each.status})"
        said = "; ".join(x for x in (each.summary, each.cases) if x) or "ended without a summary"
        lines.append(f"  {each.tool}: {verdict}: {said}")
    return "\n".join(lines)


def version_of(sanitizer: Path) -> str:
    """As compute-sanitizer tells it, e.g. `2025.3.0.0`."""
    done = subprocess.run([sanitizer, "--version"], capture_output=True, text=True)
    match = re.search(r"Version (\S+)", done.stdout)
    return match[1] if match else "of unknown version"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--tool", choices=tuple(TOOLS), nargs="+", default=list(TOOLS))
    parser.add_argument("--case", default=",".join(CASES), help="samples, as for fastbb selftest")
    parser.add_argument("--op", help="operators, as for fastbb selftest")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    sanitizer = find()
    if sanitizer is None:
        print(
            "cuda_sanitize: found no compute-sanitizer in PATH, beside nvcc, or in the package "
            f"{PACKAGE}; install it with: pip install {PACKAGE}",
            file=sys.stderr,
        )
        return 2
    selftest = [sys.executable, "-m", "fastbb", "selftest", "--cuda", "--case", args.case]
    selftest += ["--op", args.op] if args.op else []
    # Without a tool first: it tells whether there is a GPU at all, and which.
    print(f">> {' '.join(selftest)}", flush=True)
    if subprocess.run(selftest).returncode == 2:
        return 2
    outcomes = [run_tool(sanitizer, tool, selftest) for tool in args.tool]
    print(report(outcomes, version_of(sanitizer)))
    return 0 if all(each.clean for each in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
