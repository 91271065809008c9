# SPDX-License-Identifier: Apache-2.0
"""The attention core of real layers: fastbb against eager math, SDPA, torch.compile and, on CUDA
devices, FlexAttention and xFormers.

`run` is what `fastbb bench` and `bench/bench_window_attention.py` execute: outputs (and
gradients) are compared first, then all candidates of a layer are timed in turns.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastbb._console import Progress, WrongResult
from fastbb.bench import peers
from fastbb.bench.cuda_peers import Layer
from fastbb.bench.machines import CpuMachine, Machine
from fastbb.bench.peers import LayerInputs
from fastbb.bench.roofline import DeviceRoofline, Roofline
from fastbb.bench.shapes import AttentionShape
from fastbb.measure import Timing, interleaved, speed_up

OURS = "fastbb"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODES = ("forward", "forward+backward")

FP32_TOLERANCE = 1e-4
"""Largest accepted difference of outputs, which are of order 1, and of gradients relative to
their largest element."""

HALF_FACTOR = 2.0
"""fastbb's 16-bit result may be this many times further from the float32 result than eager's."""

PEER_FACTOR = 4.0
"""A further peer's result may be this many times further off than fastbb's may be; the peer is not
timed otherwise."""

NO_LAYERS: Mapping[str, Layer] = {}


@dataclass(frozen=True)
class Options:
    """What to run."""

    batches: tuple[int, ...] = (1, 8)
    dtypes: tuple[str, ...] = ("fp32",)
    """Of `DTYPES`."""
    modes: tuple[str, ...] = ("forward",)
    """Of `MODES`."""
    compile: bool = True
    rounds: int | None = None
    """Samples per candidate; None: the machine's own number."""


def forward_candidates(
    shape: AttentionShape,
    inputs: LayerInputs,
    compile: bool = True,
    further: Mapping[str, Layer] = NO_LAYERS,
) -> dict[str, Callable[[], Tensor]]:
    """name -> callable that returns the layer's map `[B, H, W, C]`."""

    def eager() -> Tensor:
        return peers.eager_layer(shape, inputs)[0]

    candidates: dict[str, Callable[[], Tensor]] = {
        "eager": eager,
        "sdpa": lambda: peers.sdpa_layer(shape, inputs)[0],
        OURS: lambda: peers.fastbb_layer(shape, inputs),
    }
    if inputs.table is not None:
        bias = peers.dense_bias(shape, inputs)
        candidates["sdpa, bias kept"] = lambda: peers.sdpa_layer(shape, inputs, bias)[0]
    if compile:
        layer = torch.compile(peers.eager_layer, dynamic=False)
        candidates["torch.compile"] = lambda: layer(shape, inputs)[0]

    def output_of(peer: Layer) -> Callable[[], Tensor]:
        return lambda: peer(shape, inputs)[0]

    return candidates | {name: output_of(peer) for name, peer in further.items()}


def training_candidates(
    shape: AttentionShape,
    inputs: LayerInputs,
    compile: bool = True,
    further: Mapping[str, Layer] = NO_LAYERS,
) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """name -> callable that returns the output and the gradients by `gradient_names`."""
    inputs = _with_gradients(inputs)
    grad_out = _like(inputs.x, seed=1)
    grad_windows = _like(peers.eager_layer(shape, inputs)[1], seed=2)

    def peer(layer: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[], tuple[Tensor, ...]]:
        leaves = [inputs.windowed, *_side_leaves(inputs), inputs.x]

        def step() -> tuple[Tensor, ...]:
            out, x_windows = layer(shape, inputs)
            grads = torch.autograd.grad((out, x_windows), leaves, (grad_out, grad_windows))
            return (out, *grads[:-1])

        return step

    def ours() -> tuple[Tensor, ...]:
        out = peers.fastbb_layer(shape, inputs)
        # The bias of padded tokens belongs to the projection: its gradient is part of the work.
        pads = [] if inputs.pads is None else [inputs.pads]
        leaves = [inputs.qkv, *_side_leaves(inputs)]
        grads = torch.autograd.grad(out, [*leaves, *pads], grad_out)
        return (out, *grads[: len(leaves)])

    candidates = {"eager": peer(peers.eager_layer), "sdpa": peer(peers.sdpa_layer), OURS: ours}
    if compile:
        candidates["torch.compile"] = peer(torch.compile(peers.eager_layer, dynamic=False))
    return candidates | {name: peer(layer) for name, layer in further.items()}


def _with_gradients(inputs: LayerInputs) -> LayerInputs:
    learned = {
        name: value.detach().clone().requires_grad_()
        for name in ("x", "q", "qkv", "windowed", "table", "scale", "pads")
        if (value := getattr(inputs, name)) is not None
    }
    return dataclasses.replace(inputs, **learned)


def _side_leaves(inputs: LayerInputs) -> list[Tensor]:
    return [x for x in (inputs.q, inputs.table, inputs.scale) if x is not None]


def _like(x: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(x.shape, generator=generator).to(x)


def verify(
    shape: AttentionShape, dtype: torch.dtype, inputs: LayerInputs, results: dict[str, Any]
) -> dict[str, float]:
    """Largest difference of every candidate's output to float32 eager math on the same inputs.

    `results` are the candidates' returned values. Gradients, where there are any, are compared
    relative to their largest element, and count as part of the difference.

    Raises: WrongResult when fastbb is further off than `allowed_difference`.
    """
    if dtype == torch.float32:
        expected = results["eager"]
    else:
        wide = _widen(inputs)
        if isinstance(results["eager"], tuple):
            expected = training_candidates(shape, wide, compile=False)["eager"]()
        else:
            expected = peers.eager_layer(shape, wide)[0]
    differences = {
        name: _difference(_parts(shape, name, value), _parts(shape, "eager", expected))
        for name, value in results.items()
    }
    limit = allowed_difference(dtype, differences)
    if not differences[OURS] <= limit:
        raise WrongResult(
            f"{shape.name} ({dtype}): fastbb differs from float32 eager math by "
            f"{differences[OURS]:.3g}, allowed is {limit:.3g}"
        )
    return differences


def allowed_difference(dtype: torch.dtype, differences: Mapping[str, float]) -> float:
    """Of fastbb: `FP32_TOLERANCE`, or what `HALF_FACTOR` makes of eager's difference."""
    return FP32_TOLERANCE if dtype == torch.float32 else HALF_FACTOR * differences["eager"]


def _widen(inputs: LayerInputs) -> LayerInputs:
    fields = {f.name: getattr(inputs, f.name) for f in dataclasses.fields(inputs)}
    return LayerInputs(
        **{
            name: x.detach().float() if x is not None and x.is_floating_point() else x
            for name, x in fields.items()
        }
    )


def _parts(shape: AttentionShape, name: str, value: Any) -> list[Tensor]:
    """Output and gradients; that of the projection per window, without padded tokens.

    A peer's gradients at padded tokens belong to the projection's bias; fastbb returns their sum
    as the gradient of the pads, which its own tests check.
    """
    if isinstance(value, Tensor):
        return [value.detach().float()]
    out, dqkv, *rest = (x.detach().float() for x in value)
    if shape.window is not None:
        pads = dqkv.new_zeros(dqkv.shape[-3:])
        if name == OURS:
            dqkv = peers.to_windows(dqkv, shape, pads)
        else:
            real = peers.to_windows(out.new_ones(out.shape[:3] + pads.shape), shape, pads)
            dqkv = dqkv * real
    return [out, dqkv, *rest]


def _difference(actual: list[Tensor], expected: list[Tensor]) -> float:
    gaps = [(a - e).abs().max().item() for a, e in zip(actual, expected, strict=True)]
    sizes = [1.0] + [e.abs().max().clamp_min(1e-12).item() for e in expected[1:]]
    ratios = [gap / size for gap, size in zip(gaps, sizes, strict=True)]
    return float("inf") if any(math.isnan(r) for r in ratios) else max(ratios)


def measure_layer(
    shape: AttentionShape,
    batch: int,
    dtype_name: str,
    mode: str,
    options: Options,
    roofline: Roofline | DeviceRoofline,
    progress: Progress,
    machine: Machine,
) -> dict[str, Any]:
    """One row: times, ratios, shares of peak and peak memory of every candidate of one layer."""
    dtype = DTYPES[dtype_name]
    inputs = peers.make_inputs(shape, batch, dtype).to(machine.device)
    backward = mode == "forward+backward"
    make = training_candidates if backward else forward_candidates
    # All layers compile the same Python function, and torch stops compiling after some shapes.
    torch.compiler.reset()
    further = machine.further_layers(options.compile)
    with torch.inference_mode(not backward):
        candidates: dict[str, Callable[[], Any]] = {}
        candidates |= make(shape, inputs, options.compile, further)
        with progress.waiting("compiling and comparing"):
            results, left_out = _results(candidates, further)
            differences = verify(shape, dtype, inputs, results)
        limit = PEER_FACTOR * allowed_difference(dtype, differences)
        for name in further:
            if name in results and not differences[name] <= limit:
                left_out[name] = f"differs by {differences[name]:.3g}, allowed is {limit:.3g}"
        candidates = {name: fn for name, fn in candidates.items() if name not in left_out}
        peaks = {name: machine.peak_bytes(fn) for name, fn in candidates.items()}
        times = interleaved(
            candidates,
            timer=machine.seconds,
            rounds=options.rounds or machine.rounds,
            sample_seconds=machine.sample_seconds,
            progress=progress.update,
        )
    flops = shape.flops(batch, backward)
    traffic = shape.bytes_moved(batch, dtype.itemsize, backward)
    return {
        "shape": shape.to_dict(),
        "batch": batch,
        "dtype": dtype_name,
        "mode": mode,
        "flops": flops,
        "bytes": traffic,
        "score_bytes": shape.score_elements(batch) * dtype.itemsize,
        "left_out": left_out,
        "candidates": {
            name: _time_facts(timing, flops, traffic, dtype, roofline)
            | {
                "fastbb_speed_up": dataclasses.asdict(speed_up(timing, times[OURS])),
                "max_difference": differences[name],
                "peak_bytes": peaks[name],
            }
            for name, timing in times.items()
        },
    }


def _results(
    candidates: Mapping[str, Callable[[], Any]], further: Mapping[str, Layer]
) -> tuple[dict[str, Any], dict[str, str]]:
    """What every candidate returns, and why some of the further peers return nothing."""
    results, left_out = {}, {}
    for name, fn in candidates.items():
        try:
            results[name] = fn()
        # Libraries have many errors for layers that they do not serve.
        except Exception as error:
            if name not in further:
                raise
            left_out[name] = (str(error).strip() or type(error).__name__).splitlines()[0]
    return results, left_out


def _time_facts(
    timing: Timing,
    flops: int,
    traffic: int,
    dtype: torch.dtype,
    roofline: Roofline | DeviceRoofline,
) -> dict[str, Any]:
    return {
        "seconds": dataclasses.asdict(timing.spread),
        "flops_per_second": flops / timing.p50,
        "share_of_peak_flops": flops / timing.p50 / roofline.flops(dtype),
        "share_of_peak_bandwidth": traffic / timing.p50 / roofline.copy_bytes,
    }


def run(
    shapes: Sequence[AttentionShape],
    options: Options,
    progress: Progress,
    machine: Machine | None = None,
) -> dict[str, Any]:
    """Measures every shape at every batch size and dtype, on the CPU or on `machine`; a dict ready
    for `json.dumps`.
    """
    machine = CpuMachine() if machine is None else machine
    progress.step("measuring this machine's peaks")
    roofline = machine.roofline()
    rows = []
    todo = list(itertools.product(options.modes, options.dtypes, options.batches, shapes))
    for number, (mode, dtype, batch, shape) in enumerate(todo, 1):
        progress.step(f"{number} of {len(todo)}: {shape.name}, {mode}, batch {batch}, {dtype}")
        rows.append(measure_layer(shape, batch, dtype, mode, options, roofline, progress, machine))
    progress.close()
    return {"roofline": roofline.to_dict(), "rows": rows, **machine.facts()}
