# SPDX-License-Identifier: Apache-2.0
"""`fastbb examples`: whole tasks by one command, with real weights and real data."""

from __future__ import annotations

from fastbb.examples.binary_minilm import Options, quick, run_binary_minilm, with_steps
from fastbb.examples.fetch import default_cache
from fastbb.examples.source import TextTask, load_task

__all__ = [
    "Options",
    "TextTask",
    "default_cache",
    "load_task",
    "quick",
    "run_binary_minilm",
    "with_steps",
]
