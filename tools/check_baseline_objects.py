# SPDX-License-Identifier: Apache-2.0
"""Proves that one binary is safe on every x86-64 CPU, from the objects of a build tree.

    python tools/check_baseline_objects.py [BUILD_DIR]     (default: the newest under build/)

Kernels are compiled once per instruction-set level, and a table picks a level at run time. Three
ways lead from there to an illegal instruction on an older CPU, and each is looked for:

1. A baseline object (core code, baseline kernels, host code) holds an instruction beyond x86-64.
2. An object of a higher level exports a weak symbol (an inline function that was not inlined, a
   template, an inline variable). The linker keeps one copy for everybody, maybe that one.
3. An object of a higher level has a static initialiser: it runs when the library is loaded.

The checker distrusts itself: every baseline object must show instructions at all, and every
object of a higher level must show vector registers that the first rule would refuse.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# x86-64 has SSE2 and nothing later. VEX and EVEX forms are the mnemonics with v, and BMI's.
_BEYOND_BASELINE = re.compile(
    r"%[yz]mm\d|%k[0-7]\b"
    r"|^(\{\w+\} )?v(?!err|erw)[a-z]"
    r"|^(andn|bextr|bls[ir]|blsmsk|bzhi|mulx|pdep|pext|rorx|sarx|shlx|shrx|lzcnt|popcnt|movbe)[lq]?\b"
    # SSE3, SSSE3, SSE4.1, SSE4.2
    r"|^(addsubp|haddp|hsubp|lddqu|movddup|movs[hl]dup|pabs|palignr|phadd|phsub|pmaddubsw|pmulhrsw)"
    r"|^(pshufb|psign|blendv?p|pblend|dpp[sd]|extractps|insertps|mpsadbw|packusdw|pcmp(eq|gt)q)"
    r"|^(pextr[bdq]|pinsr[bdq]|pmaxs[bd]|pmaxu[dw]|pmins[bd]|pminu[dw]|pmov[sz]x|pmuldq|pmulld)"
    r"|^(ptest|round[ps][sd]|movntdqa|crc32|pcmp[ei]str|phminposuw)"
)
_VECTOR = re.compile(r"%[yz]mm\d")
_LEVEL_DIR = re.compile(r"fastbb_(?P<stem>\w+?)_(?P<level>baseline|avx\w*|sse\w*)\.dir$")
# A pointer to the C++ exception handler, the same in every object.
_HARMLESS_WEAK = ("DW.ref.",)


@dataclass
class Result:
    """What was looked at, and what is wrong with it."""

    baseline: int = 0
    higher: int = 0
    libraries: int = 0
    problems: list[str] = field(default_factory=list)


def _output(*command: str | Path) -> str:
    return subprocess.run(
        [str(part) for part in command], check=True, capture_output=True, text=True
    ).stdout


def instructions(binary: Path) -> list[tuple[str, str]]:
    """(function, instruction) pairs of all code in an object or library."""
    found, function = [], "?"
    for line in _output("objdump", "-d", "-C", "--no-show-raw-insn", binary).splitlines():
        if line.endswith(">:"):
            function = line.split(" ", 1)[1].strip("<>:")
        elif ":\t" in line:
            found.append((function, line.split("\t", 1)[1].strip()))
    return found


def beyond_baseline(code: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Those instructions that a plain x86-64 CPU does not have."""
    return [(name, text) for name, text in code if _BEYOND_BASELINE.search(text)]


def weak_symbols(binary: Path) -> list[str]:
    """Defined symbols that the linker may share with other objects."""
    found = []
    for line in _output("nm", "-C", "--defined-only", binary).splitlines():
        _, kind, name = line.split(" ", 2)
        if kind in "WVu" and not name.startswith(_HARMLESS_WEAK):
            found.append(name)
    return found


def has_initialiser(binary: Path) -> bool:
    """Whether loading the object's library would run code of the object."""
    return bool(
        re.search(r"\s\.(init_array|ctors|preinit_array)", _output("objdump", "-h", binary))
    )


def _check_baseline(binary: Path, result: Result) -> None:
    code = instructions(binary)
    if not code:
        result.problems.append(f"{binary.name}: no instructions found, so nothing was checked")
    bad = beyond_baseline(code)
    for name, text in bad[:3]:
        result.problems.append(f"{binary.name}: `{text}` in {name} is beyond x86-64")
    if len(bad) > 3:
        result.problems.append(f"{binary.name}: and {len(bad) - 3} more instructions like that")


def _check_higher(binary: Path, level: str, result: Result) -> None:
    label = f"{binary.name} ({level})"
    if not any(_VECTOR.search(text) for _, text in instructions(binary)):
        result.problems.append(f"{label}: no vector instructions found; wrong flags?")
    for name in weak_symbols(binary):
        result.problems.append(f"{label}: weak symbol {name} may replace the baseline's copy")
    if has_initialiser(binary):
        result.problems.append(f"{label}: a static initialiser runs at load time")


def check(build_dir: Path) -> Result:
    """Looks at all objects of fastbb's libraries below `build_dir`."""
    result = Result()
    for directory in sorted(build_dir.glob("CMakeFiles/*.dir")):
        level = _LEVEL_DIR.search(directory.name)
        objects = sorted(directory.rglob("*.o"))
        if level and level["level"] != "baseline":
            for binary in objects:
                _check_higher(binary, level["level"], result)
                result.higher += 1
        elif level or directory.name == "fastbb_core.dir":
            for binary in objects:
                _check_baseline(binary, result)
                result.baseline += 1
    # Host code and bindings hold no kernels, so the linked libraries must be clean as a whole;
    # this also covers objects that hold no code yet, because they are optimised at link time.
    for library in sorted([*build_dir.glob("_ops*.so"), *build_dir.glob("_C*.so")]):
        _check_baseline(library, result)
        result.libraries += 1
    return result


def newest_build(root: Path = ROOT) -> Path | None:
    """The build tree under `root`/build that was configured last, or None."""
    trees = sorted(root.glob("build/*/CMakeCache.txt"), key=lambda path: path.stat().st_mtime)
    return trees[-1].parent if trees else None


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("build_dir", nargs="?", type=Path, default=newest_build())
    build_dir = parser.parse_args().build_dir
    if build_dir is None:
        print("check_baseline_objects: no build tree under build/; run `make build`")
        return 2
    result = check(build_dir)
    print(
        f"{build_dir}: {result.baseline} baseline objects, {result.higher} objects of higher "
        f"levels, {result.libraries} libraries"
    )
    if not (result.baseline and result.higher and result.libraries):
        result.problems.append("one of these kinds is missing; is the build complete?")
    for problem in result.problems:
        print(f"  {problem}")
    return 1 if result.problems else 0


if __name__ == "__main__":
    sys.exit(main())
