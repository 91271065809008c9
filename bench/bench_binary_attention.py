# SPDX-License-Identifier: Apache-2.0
"""Binary attention of BERT, MiniLM and ViT layers: fastbb and its peers.

    python bench/bench_binary_attention.py                 # interleaved ratios, printed
    python -m pytest bench/bench_binary_attention.py -k "bert_base and not training"

Peers are the plain PyTorch definition, which computes on +-alpha in float32 as BiT and BiPFT do,
and attention in full precision, which computes something else and shows what binarizing saves.
Results of the fused operator and the definition are compared before anything is timed. The share
of peak is that of the compulsory traffic (q, k, v and the result once) in the bandwidth of a copy:
the operator is bound by its exponentials, not by memory.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from fastbb._console import markdown_table
from fastbb.bench.roofline import measure_roofline
from fastbb.measure import interleaved, pinned_threads, speed_up
from fastbb.ops import binary_attention

OURS = "fastbb"
MODES = ("forward", "training")


@dataclass(frozen=True)
class Shape:
    """Attention of one layer."""

    batch: int
    tokens: int
    heads: int
    dim: int
    rank: int = 0

    @property
    def bytes_moved(self) -> int:
        return 4 * 4 * self.batch * self.tokens * self.heads * self.dim


SHAPES = {
    "bert_base_1": Shape(1, 128, 12, 64),
    "bert_base_8": Shape(8, 128, 12, 64),
    "bipft_8": Shape(8, 128, 12, 64, rank=2),
    "bert_base_512": Shape(1, 512, 12, 64),
    "minilm_8": Shape(8, 128, 12, 32),
    "vit_base_4": Shape(4, 197, 12, 64),
}
CANDIDATES = (OURS, "definition", "sdpa fp32", "sdpa bf16")


def candidates(shape: Shape, training: bool) -> dict[str, Callable[[], Any]]:
    """Callables by name; in training they return gradients of q, k and v."""
    generator = torch.Generator().manual_seed(0)

    def make(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator)

    b, n = shape.batch, shape.tokens
    qkv = make(b, n, 3, shape.heads, shape.dim).requires_grad_(training)
    options: dict[str, Any] = {"alphas": torch.tensor([1.0, 1.0, 1.0, 2.5 / n])}
    if shape.rank:
        options |= {"est_q": make(b, n, shape.rank), "est_k": make(b, n, shape.rank)}
        options |= {"v_p": make(b, n), "mask": torch.zeros(b, n)}

    def full(dtype: torch.dtype) -> Callable[[], Tensor]:
        given = qkv.detach().to(dtype).requires_grad_(training)

        def attend() -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in given.unbind(2))
            return scaled_dot_product_attention(q, k, v).transpose(1, 2)

        return with_gradient(attend, given)

    def binary(impl: str) -> Callable[[], Tensor]:
        return with_gradient(lambda: binary_attention(*qkv.unbind(2), **options, impl=impl), qkv)

    def with_gradient(forward: Callable[[], Tensor], leaf: Tensor) -> Callable[[], Tensor]:
        return (lambda: torch.autograd.grad(forward().sum(), leaf)[0]) if training else forward

    calls = (binary("fused"), binary("reference"), full(torch.float32), full(torch.bfloat16))
    return dict(zip(CANDIDATES, calls, strict=True))


def verify(calls: dict[str, Callable[[], Any]]) -> float:
    """Largest difference from the definition; few bits may differ, at ties of the threshold."""
    ours, exact = calls[OURS](), calls["definition"]()
    difference = (ours - exact).abs()
    share = (difference > 1e-5 * exact.abs().max()).float().mean().item()
    if share > 1e-3:
        raise AssertionError(f"{share:.2%} of the elements differ from the definition")
    return difference.max().item()


@pytest.mark.parametrize("candidate", CANDIDATES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", SHAPES)
def test_speed(benchmark: Any, name: str, mode: str, candidate: str) -> None:
    shape = SHAPES[name]
    with torch.inference_mode(mode == "forward"):
        calls = candidates(shape, mode == "training")
        difference = verify(calls)
        benchmark.group = f"{name}, {mode}"
        benchmark(calls[candidate])
    if benchmark.disabled:
        return
    seconds = benchmark.stats.stats.median
    share = shape.bytes_moved / seconds / measure_roofline().copy_bytes
    benchmark.extra_info.update(
        {"share of peak bandwidth": share, "max difference of fastbb": difference}
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--threads", type=int, help="threads of torch; default: torch's own choice")
    parser.add_argument("--rounds", type=int, default=30, help="samples per candidate")
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    args = parser.parse_args(argv)
    rows = []
    with pinned_threads(args.threads):
        peak = measure_roofline().copy_bytes
        for name in args.shapes:
            for mode in MODES:
                with torch.inference_mode(mode == "forward"):
                    calls = candidates(SHAPES[name], mode == "training")
                    verify(calls)
                    times = interleaved(calls, rounds=args.rounds, sample_seconds=0.005)
                ratios = [f"{speed_up(times[x], times[OURS]).p50:.2f}" for x in CANDIDATES[1:]]
                seconds = times[OURS].p50
                share = f"{SHAPES[name].bytes_moved / seconds / peak:.0%}"
                rows.append([name, mode, f"{1e3 * seconds:.3f}", *ratios, share])
                print(f"{name}, {mode}: done", file=sys.stderr)
    print(markdown_table(["layer", "mode", "ms", *(f"x {x}" for x in CANDIDATES[1:]), "BW"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
