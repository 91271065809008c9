# SPDX-License-Identifier: Apache-2.0
"""Which releases of timm compute what the fast classes compute."""

from __future__ import annotations

import re

import timm


def version_reasons(minimum: str, older: str) -> list[str]:
    """A reason when the installed timm is older than `minimum`; `older` says what differs there."""
    if _numbers(timm.__version__) >= _numbers(minimum):
        return []
    return [f"timm {timm.__version__} is older than {minimum}: {older}"]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version)[:3])
