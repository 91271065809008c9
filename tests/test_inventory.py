# SPDX-License-Identifier: Apache-2.0
"""The tree is complete and in order: every family has its files, every operator its companions,
every layer includes only what it may, every source file is short and clean.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch

import fastbb
import inventory
from fastbb.testing import SAMPLES, TOLERANCES

ROOT = Path(__file__).resolve().parent.parent

FAMILIES = inventory.families()
OPERATORS = [f"fastbb::{name}" for each in FAMILIES for name in each.operators]
SOURCE_DIRS = (".ci", "bench", "cmake", "csrc", "python", "tests", "tools")
SOURCE_SUFFIXES = {".py", ".pyi", ".h", ".cpp", ".cu", ".cuh", ".cmake", ""}
MAX_LINES = 500


def sources() -> list[Path]:
    found = [ROOT / "CMakeLists.txt", ROOT / "Makefile"]
    for folder in SOURCE_DIRS:
        found += [
            path
            for path in sorted((ROOT / folder).rglob("*"))
            if path.is_file() and path.suffix in SOURCE_SUFFIXES and "__pycache__" not in path.parts
        ]
    return found


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


# Families and operators


@pytest.mark.parametrize("each", FAMILIES, ids=lambda each: each.stem)
def test_family_has_all_files(each) -> None:
    assert not each.lacking, f"{each.stem} lacks: {', '.join(each.lacking)}"
    assert not each.stale, f"{each.stem} has excused files, drop the exception: {each.stale}"


def test_every_build_line_has_a_family() -> None:
    lines = inventory.BUILD_LINE.findall((ROOT / "CMakeLists.txt").read_text("utf-8"))
    assert sorted(lines) == [each.stem for each in FAMILIES]


def test_a_begun_family_is_named(tmp_path: Path) -> None:
    (tmp_path / "csrc/ops/foo").mkdir(parents=True)
    (tmp_path / "csrc/ops/foo/foo.cpp").write_text('m.def(\n  "foo(Tensor x) "\n  "-> Tensor");')
    (tmp_path / "CMakeLists.txt").write_text("# fastbb_add_family(foo)\n")
    (each,) = inventory.families(tmp_path)
    assert each.operators == ("foo",)
    assert "CMakeLists.txt: fastbb_add_family(foo)" in each.lacking
    assert "csrc/ops/foo/foo.cpp" not in each.lacking
    assert set(each.lacking) >= {"csrc/ops/foo/foo_cpu.cpp", "tests/test_foo.py"}
    assert each.cuda == () and "tests/test_foo_ptx.py" not in each.lacking
    (tmp_path / "csrc/ops/foo/foo_cuda_forward.cu").touch()
    (each,) = inventory.families(tmp_path)
    assert {"csrc/ops/foo/foo_cuda.h", "tests/test_foo_ptx.py"} <= set(each.lacking)
    with (tmp_path / "csrc/ops/foo/foo.cpp").open("a") as source:
        source.write('STABLE_TORCH_LIBRARY_IMPL(fastbb, CUDA, m) { m.impl("foo", TORCH_BOX(&f)); }')
    (each,) = inventory.families(tmp_path)
    assert each.cuda == ("foo",)


def test_tables_list_no_unknown_operator() -> None:
    assert set(SAMPLES) == set(TOLERANCES) == set(OPERATORS)


def _operator(name: str):
    return getattr(torch.ops.fastbb, name.removeprefix("fastbb::")).default


def _shapes(result) -> list[tuple]:
    tensors = (result,) if isinstance(result, torch.Tensor) else result
    return [(tuple(x.shape), x.dtype) for x in tensors]


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_schema_is_the_one_in_the_source(name: str) -> None:
    stem = name.removeprefix("fastbb::")
    (written,) = [
        schema
        for each in FAMILIES
        if stem in each.operators
        for schema in inventory.schemas(
            (ROOT / f"csrc/ops/{each.stem}/{each.stem}.cpp").read_text("utf-8")
        )
        if schema.startswith(f"{stem}(")
    ]
    parsed = torch._C.parse_schema(f"fastbb::{written}")
    assert _operator(name)._schema == parsed, "the built library is older than its source"


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_has_samples_and_tolerances(name: str) -> None:
    assert set(TOLERANCES[name]) >= {torch.float32, torch.bfloat16, torch.float16}
    names = [sample.name for sample in SAMPLES[name]("cpu", torch.float32)]
    assert len(names) == len(set(names)) > 0


@pytest.mark.parametrize("name", OPERATORS)
def test_operator_fake_kernel_predicts_shapes(name: str) -> None:
    def to_meta(x):
        return x.to("meta") if isinstance(x, torch.Tensor) else x

    operator = _operator(name)
    for sample in SAMPLES[name]("cpu", torch.float32):
        real = operator(*sample.args)
        fake = operator(*map(to_meta, sample.args))
        assert _shapes(fake) == _shapes(real), sample.name


def test_generated_tables_are_current() -> None:
    pages = inventory.outdated()
    assert not pages, f"run `make docs`: {pages}"


# Documentation of the public surface


@pytest.mark.parametrize("name", fastbb.ops.__all__)
def test_operator_function_is_specified(name: str) -> None:
    function = getattr(fastbb.ops, name)
    text = inspect.getdoc(function) or ""
    for part in ("Args:", "dtype", "Raises:"):
        assert part in text, f"the docstring of fastbb.ops.{name} has no {part!r}"
    assert re.search(r"\[[A-Za-z*, ]+\]|shape", text), f"fastbb.ops.{name} states no shape"
    documented = text.split("Args:", 1)[1]
    for parameter in inspect.signature(function).parameters:
        assert re.search(rf"\b{parameter}\b", text), f"fastbb.ops.{name}: {parameter}"
    assert documented.strip()


@pytest.mark.parametrize(
    "package",
    [fastbb, fastbb.ops, fastbb.reference, fastbb.nn, fastbb.models, fastbb.binarize],
)
def test_public_names_have_docstrings(package) -> None:
    assert (package.__doc__ or "").strip()
    for name in package.__all__:
        value = getattr(package, name)
        if callable(value):
            assert (value.__doc__ or "").strip(), f"{package.__name__}.{name}"


# Layers


def _includes(path: Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text("utf-8"), re.MULTILINE)


def test_only_host_code_sees_torch() -> None:
    """torch through core/torch_api.h, in <stem>.cpp and library.cpp; pybind11 in python.cpp."""
    hosts = {ROOT / f"csrc/ops/{each.stem}/{each.stem}.cpp" for each in FAMILIES}
    hosts.add(ROOT / "csrc/core/library.cpp")
    for path in sorted((ROOT / "csrc").rglob("*.*")):
        for name in _includes(path):
            where = f"{relative(path)} includes {name}"
            if name.startswith(("torch/", "ATen/", "c10/")):
                assert path == ROOT / "csrc/core/torch_api.h", where
            if name == "core/torch_api.h":
                assert path in hosts, where
            if name.startswith("pybind11/"):
                assert path == ROOT / "csrc/core/python.cpp", where


# What the modules of each package may import from fastbb. Commands (demo, bench) may use all.
MAY_IMPORT = {
    "config": {"_C"},
    "reference": {"reference"},
    "ops": {"_C", "config", "reference", "ops"},
    "testing": {"config", "reference", "testing"},
    "nn": {"config", "ops", "nn"},
    "models": {"nn", "models"},
    "accelerate": {"config", "ops", "nn", "accelerate"},
    "binarize": {"accelerate", "nn", "binarize"},
    "selftest": {
        *("_console", "config", "cuda_facts", "measure", "ops", "reference", "selftest", "testing"),
    },
}


def _imported_parts(path: Path) -> set[str]:
    """First parts of what a module imports from fastbb, inside functions too."""
    parts = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)} has a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        parts |= {name.split(".")[1] for name in names if name.startswith("fastbb.")}
    return parts


@pytest.mark.parametrize("layer", MAY_IMPORT)
def test_python_layers(layer: str) -> None:
    package = ROOT / "python/fastbb"
    paths = sorted((package / layer).rglob("*.py")) or [package / f"{layer}.py"]
    for path in paths:
        extra = _imported_parts(path) - MAY_IMPORT[layer]
        assert not extra, f"{relative(path)} imports {sorted(extra)} of fastbb"


def test_import_needs_torch_and_numpy_only() -> None:
    """Peers and plotting are extras: `import fastbb` must not load them."""
    import subprocess

    code = (
        "import sys, fastbb;"
        "extras = {'timm', 'torchvision', 'transformers', 'skimage', 'matplotlib'};"
        "print(sorted(extras & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# Source files


def test_sources_are_found() -> None:
    names = {relative(path) for path in sources()}
    assert names >= {"Makefile", ".ci/run", "csrc/core/isa.cpp", "python/fastbb/__init__.py"}


@pytest.mark.parametrize("path", sources(), ids=relative)
def test_source_file_is_in_order(path: Path) -> None:
    text = path.read_text("utf-8")
    lines = text.splitlines()
    assert len(lines) <= MAX_LINES, f"{len(lines)} lines, the limit is {MAX_LINES}"
    head = lines[1 if lines and lines[0].startswith("#!") else 0 :][:1]
    assert head in (
        ["# SPDX-License-Identifier: Apache-2.0"],
        ["// SPDX-License-Identifier: Apache-2.0"],
    ), "the licence line is not the first"
    assert text.endswith("\n")
    leftovers = re.findall(r"\b(?:TO" r"DO|FIX" r"ME|X" r"XX|HA" r"CK|TEMPO" r"RARY)\b", text)
    assert not leftovers
    machine_paths = re.findall(r"/(?:ro" r"ot|ho" r"me|wo" r"rk|Us" r"ers)/\S*", text)
    assert not machine_paths
