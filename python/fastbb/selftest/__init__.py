# SPDX-License-Identifier: Apache-2.0
"""The command `fastbb selftest`: every shipped sample of every operator on this machine's CPU or
GPUs, against the reference in float64, with a report to paste.
"""

from __future__ import annotations

from fastbb.selftest.report import failures, format_report, summary, to_dict
from fastbb.selftest.run import Options, Row, run
from fastbb.selftest.targets import Target, cpu_targets, cuda_targets

__all__ = [
    "Options",
    "Row",
    "Target",
    "cpu_targets",
    "cuda_targets",
    "failures",
    "format_report",
    "run",
    "summary",
    "to_dict",
]
