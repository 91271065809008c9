# SPDX-License-Identifier: Apache-2.0
"""The picture of an example: losses and accuracies over training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastbb._console import require

_NOT_A_LOSS = ("step", "seconds", "accuracy")


def plot_curves(result: dict[str, Any], path: Path) -> None:
    """Writes a PNG of `result["curves"]`: losses of both trainings, and accuracies over time.

    Raises: UsageError when matplotlib is missing.
    """
    require("matplotlib", "plotting").use("Agg")
    pyplot = require("matplotlib.pyplot", "plotting")
    curves = result["curves"]
    figure, axes = pyplot.subplots(1, len(curves) + 1, figsize=(15, 4.2), layout="constrained")
    for axis, (name, curve) in zip(axes, curves.items(), strict=False):
        steps = [point["step"] for point in curve]
        for part in (key for key in curve[0] if key not in _NOT_A_LOSS):
            axis.plot(steps, [point[part] for point in curve], marker=".", label=part)
        axis.set_title(f"loss, {name}")
        axis.set_xlabel("step")
        axis.set_yscale("log")
        axis.legend()
    right = axes[-1]
    for name, curve in curves.items():
        minutes = [point["seconds"] / 60 for point in curve]
        right.plot(minutes, [point["accuracy"] for point in curve], marker=".", label=name)
    right.axhline(result["majority"], color="grey", linestyle=":", label="majority class")
    right.set_title("accuracy on held-out training documents")
    right.set_xlabel("minutes of training")
    right.set_ylim(0, 1)
    right.legend()
    figure.suptitle(f"{result['data']}, {result['options']['preset']}")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
