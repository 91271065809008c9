# SPDX-License-Identifier: Apache-2.0
"""A binary BERT encoder end to end against float ones, its size, and what its training keeps.

Candidates of one size run in turns in one process: Hugging Face's encoder in float32 (eager) and
bfloat16, the same with dynamically quantized linear layers, the binary encoder as it is trained
(latent weights) and packed. Random weights: time does not depend on their values.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastbb
from fastbb._console import Progress, WrongResult, require
from fastbb.measure import interleaved, saved_bytes, speed_up

PACKED = "fastbb, packed"
LATENT = "fastbb, latent weights"
PEERS = ("fp32", "bf16", "int8 dynamic")
PRESETS = ("bipft", "bit")


@dataclass(frozen=True)
class EncoderShape:
    """Sizes of a BERT encoder."""

    name: str
    dim: int
    depth: int
    heads: int
    intermediate: int


SHAPES = (
    EncoderShape("bert_base", 768, 12, 12, 3072),
    EncoderShape("minilm_l6", 384, 6, 12, 1536),
)


def float_encoder(shape: EncoderShape) -> nn.Module:
    """Hugging Face's BertModel with random weights."""
    transformers = require("transformers", "to build the float encoder")
    config = transformers.BertConfig(
        hidden_size=shape.dim,
        num_hidden_layers=shape.depth,
        num_attention_heads=shape.heads,
        intermediate_size=shape.intermediate,
    )
    torch.manual_seed(0)
    return transformers.BertModel(config).eval()


def binary_encoder(model: nn.Module, preset: str, ids: Tensor) -> nn.Module:
    """The encoder, converted, with scales set from a batch."""
    binary = copy.deepcopy(model)
    fastbb.binarize_(binary, preset)
    with fastbb.nn.calibrate(binary), torch.no_grad():
        binary(ids)
    return binary.eval()


def candidates(
    shape: EncoderShape, preset: str, batch: int, tokens: int
) -> tuple[dict[str, Callable[[], Tensor]], dict[str, int]]:
    """name -> callable that returns the last hidden state; and sizes in bytes."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (batch, tokens), generator=generator)
    model = float_encoder(shape)
    halves = copy.deepcopy(model).to(torch.bfloat16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantized = torch.ao.quantization.quantize_dynamic(
            copy.deepcopy(model), {nn.Linear}, dtype=torch.qint8
        )
    latent = binary_encoder(model, preset, ids)
    packed = copy.deepcopy(latent)
    fastbb.pack_(packed)
    sizes = {
        "float32, file": file_bytes(model),
        "packed, file": file_bytes(packed),
        **asdict(fastbb.binarize.model_sizes(packed)),
    }
    models = {"fp32": model, "bf16": halves, "int8 dynamic": quantized}
    models |= {LATENT: latent, PACKED: packed}

    def call(module: nn.Module) -> Callable[[], Tensor]:
        return lambda: module(ids)[0]

    return {name: call(module) for name, module in models.items()}, sizes


def file_bytes(model: nn.Module) -> int:
    """Bytes of its state_dict, saved by safetensors."""
    safetensors = require("safetensors.torch", "to save weights")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        safetensors.save_model(model, str(path))
        return path.stat().st_size


def run(
    progress: Progress,
    rounds: int = 15,
    shapes: Sequence[EncoderShape] = SHAPES,
    batches: Sequence[int] = (1, 8),
    tokens: int = 128,
) -> dict[str, Any]:
    """Measures every encoder; what `table` shows."""
    rows = []
    for shape in shapes:
        for preset in PRESETS:
            for batch in batches:
                progress.step(f"{shape.name}, {preset}, batch {batch}")
                with torch.no_grad():
                    calls, sizes = candidates(shape, preset, batch, tokens)
                    difference = (calls[PACKED]() - calls[LATENT]()).abs().max().item()
                    if not difference < 1e-3:
                        raise WrongResult(f"{shape.name}: packed differs by {difference:.3g}")
                    times = interleaved(calls, rounds=rounds, max_seconds=60)
                rows.append(
                    {
                        "shape": asdict(shape),
                        "preset": preset,
                        "batch": batch,
                        "tokens": tokens,
                        "max_difference": difference,
                        "bytes": sizes,
                        "seconds": {name: asdict(t.spread) for name, t in times.items()},
                        "speed_up": {
                            name: asdict(speed_up(times[name], times[PACKED])) for name in PEERS
                        },
                    }
                )
    progress.step("training memory")
    return {"rows": rows, "training": [training_bytes(shape, tokens) for shape in shapes]}


def training_bytes(shape: EncoderShape, tokens: int, batch: int = 8) -> dict[str, Any]:
    """Bytes that a training step keeps for its backward pass: float32, binary by the definitions in
    plain PyTorch, binary by the kernels. Parameters are not counted.
    """
    ids = torch.randint(1000, 30000, (batch, tokens), generator=torch.Generator().manual_seed(0))
    model = float_encoder(shape)
    binary = binary_encoder(model, "bipft", ids).train()

    def step(module: nn.Module) -> int:
        return saved_bytes(lambda: module(ids)[0].sum(), module)

    with fastbb.use_fused(False):
        simulated = step(binary)
    return {
        "shape": asdict(shape),
        "batch": batch,
        "tokens": tokens,
        "bytes": {"fp32": step(model.train()), "simulated": simulated, "fastbb": step(binary)},
    }


def table(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: milliseconds, how many times faster packed is, megabytes on disk."""
    names = (*PEERS, LATENT, PACKED)
    header = ["encoder", "preset", "batch x tokens", *(f"{name} ms" for name in names)]
    header += [*(f"x {name}" for name in PEERS), "MB fp32", "MB packed", "x linear weights"]
    lines = []
    for row in results["rows"]:
        sizes = row["bytes"]
        lines.append(
            [
                row["shape"]["name"],
                row["preset"],
                f"{row['batch']} x {row['tokens']}",
                *(f"{row['seconds'][name]['p50'] * 1e3:.1f}" for name in names),
                *(f"{row['speed_up'][name]['p50']:.1f}" for name in PEERS),
                f"{sizes['float32, file'] / 1e6:.1f}",
                f"{sizes['packed, file'] / 1e6:.1f}",
                f"{sizes['linear_float32'] / sizes['linear']:.1f}",
            ]
        )
    return header, lines


def training_table(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: megabytes kept for the backward pass."""
    header = ["encoder", "batch x tokens", "MB fp32", "MB simulated", "MB fastbb", "x fp32"]
    header.append("x simulated")
    lines = []
    for row in results["training"]:
        kept = row["bytes"]
        lines.append(
            [
                row["shape"]["name"],
                f"{row['batch']} x {row['tokens']}",
                *(f"{kept[name] / 1e6:.0f}" for name in ("fp32", "simulated", "fastbb")),
                *(f"{kept[name] / kept['fastbb']:.1f}" for name in ("fp32", "simulated")),
            ]
        )
    return header, lines
