# SPDX-License-Identifier: Apache-2.0
"""What README.md and docs/ say is so: Python runs, links lead somewhere, targets and environment
variables exist.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import inventory

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]

_FENCE = re.compile(r"^```(?P<language>\w*)[^\n]*\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")
_VARIABLE_ROW = re.compile(r"^\| `(FASTBB_[A-Z0-9_]+)` \|", re.MULTILINE)


def page_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def snippets(text: str, language: str) -> list[str]:
    return [match["code"] for match in _FENCE.finditer(text) if match["language"] == language]


def anchor(heading: str) -> str:
    """The fragment that a Markdown viewer gives to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def make_targets(makefile: str) -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))


def run_python(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )


PAGES_WITH_PYTHON = [path for path in PAGES if snippets(path.read_text("utf-8"), "python")]


@pytest.mark.parametrize("path", PAGES_WITH_PYTHON, ids=page_id)
def test_python_snippets_run(path: Path, tmp_path: Path) -> None:
    """The snippets of a page, one after the other in one process."""
    done = run_python("\n".join(snippets(path.read_text("utf-8"), "python")), tmp_path)
    assert done.returncode == 0, done.stderr


def test_readme_has_snippets() -> None:
    assert ROOT / "README.md" in PAGES_WITH_PYTHON


def test_a_wrong_snippet_is_noticed(tmp_path: Path) -> None:
    page = textwrap.dedent(
        """
        ```python
        x = 1
        ```
        ```sh
        not python
        ```
        ```python
        assert x == 2
        ```
        """
    )
    code = snippets(page, "python")
    assert code == ["x = 1\n", "assert x == 2\n"]
    assert "AssertionError" in run_python("\n".join(code), tmp_path).stderr


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text("utf-8")
    for match in _LINK.finditer(text):
        target, _, fragment = match["target"].partition("#")
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        page = (path.parent / target).resolve() if target else path
        assert page.exists(), f"{match[0]} leads nowhere"
        if fragment:
            headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
            assert fragment in map(anchor, headings), f"{match[0]}: no such heading"


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_named_files_exist(path: Path) -> None:
    """Paths in backquotes, when they begin with a folder of the repository. The stem `foo` of the
    recipe stands for any family.
    """
    folders = "bench|cmake|csrc|docs|python|tests|tools"
    text = _FENCE.sub("", path.read_text("utf-8"))
    for name in re.findall(rf"`((?:{folders})/[\w./-]*)`", text):
        reals = [ROOT / name.replace("foo", stem) for stem in ("null", "window_attention")]
        assert any(real.exists() for real in reals), f"`{name}` does not exist"


def test_recipe_lists_the_files_of_a_family() -> None:
    recipe = (ROOT / "docs/adding-an-op.md").read_text("utf-8")
    new_files = recipe.split("## New files", 1)[1].split("## New lines", 1)[0]
    rows = re.findall(r"^\| `([^`]+)` \|", new_files, re.MULTILINE)
    required = (*inventory.REQUIRED, *inventory.REQUIRED_WITH_CUDA)
    assert sorted(rows) == sorted(pattern.format(stem="foo") for pattern in required)


def test_make_targets_exist() -> None:
    targets = make_targets((ROOT / "Makefile").read_text("utf-8"))
    assert targets >= {"help", "demo", "test", "lint"}
    for path in [*PAGES, ROOT / ".ci/run"]:
        text = path.read_text("utf-8")
        named = set(re.findall(r"(?:`|^)make ([a-z][a-z-]*)", text, re.MULTILINE))
        named |= set(re.findall(r"^step ([a-z-]+)", text, re.MULTILINE))
        assert named <= targets, f"{page_id(path)} names {sorted(named - targets)}"


def test_every_make_target_is_in_the_readme_or_help() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for phony in re.findall(r"^\.PHONY: (.+)$", makefile, re.MULTILINE):
        assert re.search(rf"^{phony}:.*## \S", makefile, re.MULTILINE), f"{phony} has no help"


def variables_read_by_the_code() -> set[str]:
    """Names that Python, C++ or the build take from the environment."""
    patterns = (
        r'environ(?:\.get\(|\[|\.setdefault\()\s*"(FASTBB_\w+)"',
        r'getenv\(\s*"(FASTBB_\w+)"',
        r'env\s*=\s*"(FASTBB_\w+)"',
    )
    paths = [ROOT / "pyproject.toml"]
    for folder in ("python", "csrc", "tools", "bench"):
        paths += [p for p in (ROOT / folder).rglob("*") if p.suffix in {".py", ".cpp", ".h", ".cu"}]
    text = "\n".join(path.read_text("utf-8") for path in paths)
    return {name for pattern in patterns for name in re.findall(pattern, text)}


@pytest.mark.parametrize("page", ["README.md", "docs/conventions.md"])
def test_environment_variables_are_those_of_the_code(page: str) -> None:
    documented = set(_VARIABLE_ROW.findall((ROOT / page).read_text("utf-8")))
    assert documented == variables_read_by_the_code()


def test_python_version_of_the_readme() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text("utf-8")
    match = re.search(r'requires-python = ">=([\d.]+)"', pyproject)
    assert match is not None
    assert f"Python {match[1]}" in (ROOT / "README.md").read_text("utf-8")
