# SPDX-License-Identifier: Apache-2.0
"""Linear layers of BERT-base and MiniLM: fastbb's binary one against float32, bfloat16, int8 and
binarized layers that are simulated in float32.

Outputs are compared first, then all candidates of a layer are timed in turns. Everything starts
from float activations: binarizing (fastbb, simulation) and quantizing (int8) them is part of the
time.
"""

from __future__ import annotations

import concurrent.futures
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fastbb import _C, ops
from fastbb._console import Progress, WrongResult
from fastbb.measure import Timing, interleaved, speed_up
from fastbb.reference import binary_linear_train

OURS = "fastbb"
CORE = "fastbb, packed input"
PEERS = ("fp32", "bf16", "int8 dynamic", "int8 product", "simulated")
ROWS = (1, 8, 32, 128, 512, 1024, 4096)


@dataclass(frozen=True)
class LinearShape:
    """A linear layer of a model: `[M, k] -> [M, n]`."""

    name: str
    k: int
    n: int


SHAPES = (
    LinearShape("bert_base attention", 768, 768),
    LinearShape("bert_base up", 768, 3072),
    LinearShape("bert_base down", 3072, 768),
    LinearShape("minilm attention", 384, 384),
    LinearShape("minilm up", 384, 1536),
    LinearShape("minilm down", 1536, 384),
)


def bit_peak(seconds: float = 0.3) -> float:
    """Bits per second of AND, count and add on registers alone, on all of torch's threads at the
    level in force: the limit of the inner loop, by the same instructions.
    """
    threads = torch.get_num_threads()
    steps = 20_000
    best = 0.0
    with concurrent.futures.ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        while time.perf_counter() - start < seconds:
            before = time.perf_counter()
            bits = sum(pool.map(_C.bit_peak, [steps] * threads))
            best = max(best, bits / (time.perf_counter() - before))
    return best


def candidates(shape: LinearShape, rows: int, seed: int = 0) -> dict[str, Callable[[], Tensor]]:
    """name -> callable that returns `[rows, n]`; float32 but for `bf16`."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, shape.k, generator=generator)
    weight = torch.randn(shape.n, shape.k, generator=generator) * 0.02
    bias = torch.randn(shape.n, generator=generator)
    alpha, shift = torch.tensor([1.6]), torch.zeros(shape.k)
    halves = [each.bfloat16() for each in (x, weight, bias)]
    bits, scale = ops.pack_weight(weight)
    signs = torch.where(weight - weight.mean() >= 0, 1.0, -1.0) * scale
    packed = ops.pack_sign(x, shift)
    settings: dict[str, Any] = {"k": shape.k, "alpha": alpha}

    def simulated() -> Tensor:
        return F.linear(alpha * torch.sign(x + shift), signs, bias)

    return {
        "fp32": lambda: F.linear(x, weight, bias),
        "bf16": lambda: F.linear(*halves),
        "int8 dynamic": _dynamic_int8(x, weight, bias),
        "int8 product": _int8_product(x, weight),
        "simulated": simulated,
        CORE: lambda: ops.binary_linear(packed, bits, scale, bias, **settings),
        OURS: lambda: ops.binary_linear(x, bits, scale, bias, shift=shift, **settings),
        "definition": lambda: binary_linear_train(x, weight, bias, alpha=alpha, shift=shift),
    }


def _dynamic_int8(x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], Tensor]:
    """torch's dynamically quantized layer: activations get a scale per call."""
    layer = torch.nn.Sequential(torch.nn.Linear(weight.shape[1], weight.shape[0]))
    layer[0].weight.data, layer[0].bias.data = weight, bias
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(layer, dtype=torch.qint8)
    return lambda: quantized(x)


def _int8_product(x: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    """The product of int8 matrices alone: nothing is quantized, scaled or biased."""
    a = x.mul(30).clamp(-127, 127).to(torch.int8)
    b = weight.mul(1500).clamp(-127, 127).to(torch.int8).t()
    return lambda: torch._int_mm(a, b)


def verify(shape: LinearShape, calls: Mapping[str, Callable[[], Tensor]]) -> float:
    """Largest difference from the definition; raises WrongResult where it is not rounding."""
    exact = calls["definition"]()
    worst = 0.0
    for name in (OURS, CORE, "simulated"):
        difference = (calls[name]() - exact).abs().max().item()
        if not difference <= 1e-4 * max(exact.abs().max().item(), 1.0):
            raise WrongResult(f"{shape.name}: {name} differs by {difference:.3g}")
        worst = max(worst, difference)
    return worst


def run(
    rows: Sequence[int],
    progress: Progress,
    rounds: int = 25,
    shapes: Sequence[LinearShape] = SHAPES,
) -> dict[str, Any]:
    """Measures every shape at every number of rows; what `table` shows."""
    results = []
    with torch.inference_mode():
        for shape in shapes:
            for m in rows:
                progress.step(f"{shape.name}, {m} rows")
                calls = candidates(shape, m)
                difference = verify(shape, calls)
                timed = {name: calls[name] for name in (*PEERS, CORE, OURS)}
                times = interleaved(timed, rounds=rounds, sample_seconds=0.004)
                peak = bit_peak()
                results.append(_row(shape, m, times, peak, difference))
    return {"isa": _C.isa(), "threads": torch.get_num_threads(), "rows": results}


def _row(
    shape: LinearShape, m: int, times: dict[str, Timing], peak: float, difference: float
) -> dict[str, Any]:
    products = m * shape.k * shape.n
    return {
        "shape": asdict(shape),
        "m": m,
        "max_difference": difference,
        "bit_peak": peak,
        "share_of_peak": {name: products / times[name].p50 / peak for name in (OURS, CORE)},
        "seconds": {name: asdict(timing.spread) for name, timing in times.items()},
        "speed_up": {name: asdict(speed_up(times[name], times[OURS])) for name in PEERS},
    }


def table(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: microseconds, how many times faster fastbb is, shares of the limit."""
    header = ["layer", "K x N", "M", *(f"{x} us" for x in (*PEERS, OURS))]
    header += [f"x {x}" for x in PEERS] + ["% limit", "% limit, packed"]
    lines = []
    for row in results["rows"]:
        shape, seconds = row["shape"], row["seconds"]
        lines.append(
            [
                shape["name"],
                f"{shape['k']} x {shape['n']}",
                str(row["m"]),
                *(f"{seconds[name]['p50'] * 1e6:.0f}" for name in (*PEERS, OURS)),
                *(f"{row['speed_up'][name]['p50']:.1f}" for name in PEERS),
                *(f"{row['share_of_peak'][name] * 100:.0f}" for name in (OURS, CORE)),
            ]
        )
    return header, lines
