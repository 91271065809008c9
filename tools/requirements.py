# SPDX-License-Identifier: Apache-2.0
"""Prints what pyproject.toml requires, one line each: to build, to run, and for the given extras.

    python tools/requirements.py [EXTRA ...]

Installing these lines in one pip command lets pip choose torch, torchvision and timm together;
the package itself is then built without isolation, against the torch that it will run with.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    from pip._vendor import tomli as tomllib

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"

# scikit-build-core adds these itself, but only to isolated builds.
BUILD_TOOLS = ["cmake>=3.25", "ninja"]


def requirements(pyproject: dict[str, Any], extras: list[str]) -> list[str]:
    """Requirement lines without repeats; `fastbb[demo]` in an extra stands for that other extra.

    Raises ValueError for an extra that the project does not have.
    """
    project = pyproject["project"]
    available: dict[str, list[str]] = project.get("optional-dependencies", {})
    own_extras = re.compile(rf"{re.escape(project['name'])}\[(.+)\]")
    lines = [*pyproject["build-system"]["requires"], *BUILD_TOOLS, *project["dependencies"]]
    queue, seen = list(extras), set()
    while queue:
        extra = queue.pop(0)
        if extra in seen:
            continue
        seen.add(extra)
        if extra not in available:
            raise ValueError(f"requirements: extra must be one of {list(available)}, got {extra!r}")
        for line in available[extra]:
            own = own_extras.fullmatch(line.replace(" ", ""))
            if own:
                queue += own[1].split(",")
            else:
                lines.append(line)
    return list(dict.fromkeys(lines))


if __name__ == "__main__":
    print("\n".join(requirements(tomllib.loads(PYPROJECT.read_text("utf-8")), sys.argv[1:])))
