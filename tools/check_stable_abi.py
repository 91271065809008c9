# SPDX-License-Identifier: Apache-2.0
"""Builds one wheel and runs that same file on several torch releases.

    python tools/check_stable_abi.py PYTHON [PYTHON ...]

Each PYTHON is the interpreter of an environment with torch and numpy; all have one Python
version and different torch releases. The first one also has the build requirements, and the wheel
is compiled against its torch. The environments are left as they are: the wheel is unpacked into a
temporary environment on top of each. There, window attention is compared with its reference,
forward and backward, at every instruction-set level of this machine.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

# Runs in each environment. Differences are relative to the largest reference value.
PROBE = """
import json, pathlib, torch, fastbb
from fastbb.ops import window_attention

def leaves():
    random = torch.Generator().manual_seed(0)
    make = lambda *shape: torch.randn(shape, generator=random).requires_grad_()
    return {"qkv": make(2, 10, 13, 3, 4, 32), "bias_table": make(13 * 13, 4), "scale": make(4),
            "k_pad": make(4, 32), "v_pad": make(4, 32)}

def run(impl, packed):
    sides = leaves()
    qkv = sides.pop("qkv")
    tensors = (qkv,) if packed else qkv.unbind(3)
    out = window_attention(*tensors, window=7, shift=3, mask="swin",
                           pad_mode="roll_then_pad", impl=impl, **sides)
    return [out, *torch.autograd.grad(out.square().sum(), [qkv, *sides.values()])]

expected = run("reference", False)
worst = {}
for level in fastbb.isa_levels():
    with fastbb.cap_isa(level):
        pairs = zip(run("fused", True) + run("fused", False), expected * 2, strict=True)
        worst[level] = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
package = pathlib.Path(fastbb.__file__).parent
print(json.dumps({
    "torch": torch.__version__, "package": str(package), "worst": worst,
    "built_with": fastbb.build_info()["torch_built_with"],
    "libraries": sorted(str(path) for path in package.glob("*.so")),
}))
"""
TOLERANCE = 2e-5


def run(*command: str | Path) -> str:
    """Standard output of a command; raises with its error output when it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def build_wheel(python: Path, folder: Path) -> Path:
    """Compiles (incrementally, in the usual build tree) and packs the wheel."""
    run(python, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", folder, ROOT)
    (wheel,) = folder.glob("fastbb-*.whl")
    return wheel


def overlay(python: Path, wheel: Path, folder: Path) -> Path:
    """A new environment in `folder` with the wheel, which sees the packages of `python`'s."""
    run(python, "-m", "venv", "--without-pip", folder)
    above = folder / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    own, base = (Path(run(each, "-c", ask).strip()) for each in (above, python))
    # Python reads no .pth files of a folder named like this, so an editable fastbb stays unseen.
    (own / "base.pth").write_text(f"{base}\n")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--target", own, wheel)
    return above


def probe(python: Path, folder: Path) -> dict[str, Any]:
    """What the wheel does under the torch of `python`."""
    result: dict[str, Any] = json.loads(run(python, "-c", PROBE).splitlines()[-1])
    if not result["package"].startswith(str(folder)):
        raise RuntimeError(f"fastbb was imported from {result['package']}, not from the wheel")
    digest = hashlib.sha256()
    for library in result["libraries"]:
        digest.update(Path(library).read_bytes())
    result["digest"] = digest.hexdigest()
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pythons", nargs="+", type=Path, metavar="PYTHON")
    pythons = [path.absolute() for path in parser.parse_args().pythons]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        print(">> building the wheel", flush=True)
        wheel = build_wheel(pythons[0], folder)
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.2f} MB", flush=True)
        results = [
            probe(overlay(python, wheel, folder / str(i)), folder)
            for i, python in enumerate(pythons)
        ]
    bad = 0
    for result in results:
        worst = ", ".join(f"{level} {value:.1e}" for level, value in result["worst"].items())
        good = max(result["worst"].values()) <= TOLERANCE
        bad += not good
        print(
            f"torch {result['torch']} (built with {result['built_with']}): largest difference "
            f"from the reference, results and gradients: {worst}: {'ok' if good else 'WRONG'}"
        )
    releases = {result["torch"] for result in results}
    digests = {result["digest"] for result in results}
    if len(releases) < len(results):
        print(f"these environments must have different torch releases, got {sorted(releases)}")
        bad += 1
    if len(digests) != 1:
        print(f"the libraries must be the same files, got digests {sorted(digests)}")
        bad += 1
    else:
        print(f"the same libraries in all: sha256 {digests.pop()[:16]}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
