# SPDX-License-Identifier: Apache-2.0
"""`fastbb examples binary-minilm`: a pre-trained text encoder becomes binary, and is measured."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fastbb
from fastbb._console import Progress, UsageError, WrongResult, require, text_table
from fastbb.examples.classifier import TextClassifier, accuracy, predict, without_dropout_
from fastbb.examples.plot import plot_curves
from fastbb.examples.recipe import Held, Schedule, distil, fine_tune, freeze_
from fastbb.examples.source import TextTask
from fastbb.examples.texts import Documents, pad, split, training_batches
from fastbb.measure import Spread, compare_outputs, interleaved, machine_info, speed_up

LEAST_AGREEMENT = 0.99
"""Share of test documents for which the packed form must predict what the training form does:
their sums are rounded differently, and a sum near a threshold can become the other bit."""

FLOAT, BINARY, PACKED = "fp32", "binary, training form", "binary, packed"


TEACHER = Schedule(steps=200, batch=32, rate=5e-5, warmup=0.1)
STUDENT = Schedule(steps=1000, batch=16, rate=1e-3)


@dataclass(frozen=True)
class Options:
    """What `fastbb examples binary-minilm` was asked for."""

    preset: str = "bipft"
    teacher: Schedule = TEACHER
    student: Schedule = STUDENT
    held_out: int = 256
    """Training documents that are kept out of training, for the curves."""
    test_documents: int | None = None
    """How many of the test documents are used; None: all."""
    points: int = 8
    """Of each curve."""
    precision: str = "auto"
    """Of matrix products in training: `"fp32"`, `"bf16"`, or `"auto"`: bf16 where it is fast."""
    batches: tuple[int, ...] = (1, 32)
    """Batch sizes whose latency is measured."""
    rounds: int = 30
    seed: int = 0
    out: Path = field(default_factory=lambda: Path("fastbb-binary-minilm"))


def quick(options: Options) -> Options:
    """The same in less than a minute: it shows that all works, and nothing more."""
    return dataclasses.replace(
        options,
        teacher=dataclasses.replace(options.teacher, steps=8),
        student=dataclasses.replace(options.student, steps=8),
        held_out=64,
        test_documents=256,
        points=2,
        rounds=3,
    )


def with_steps(options: Options, student: int | None, teacher: int | None) -> Options:
    """Other numbers of steps, where they are given."""
    if student is not None:
        options = dataclasses.replace(
            options, student=dataclasses.replace(options.student, steps=student)
        )
    if teacher is not None:
        options = dataclasses.replace(
            options, teacher=dataclasses.replace(options.teacher, steps=teacher)
        )
    return options


def run_binary_minilm(
    load: Callable[[Progress], TextTask], options: Options, progress: Progress
) -> dict[str, Any]:
    """Trains, packs, saves and measures; prints a table and writes the folder `options.out`:
    `results.json`, `curves.png` and `packed.safetensors`.

    Args:
        load: makes the task; `source.load_task` with its arguments, or a test's own.

    Returns what `results.json` holds.

    Raises: UsageError for a request that cannot be served; WrongResult when the packed form does
    not predict what the training form does, or a saved one is not the same when it is loaded.
    """
    require("matplotlib", "plotting")
    safetensors = require("safetensors.torch", "saving packed weights", extra="text")
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out must be a folder to write to, got {str(options.out)!r}") from error
    started = time.perf_counter()
    machine = machine_info()
    half = uses_bfloat16(options.precision)
    print(
        f"fastbb {machine['fastbb']['version']}, torch {machine['torch']} on {machine['cpu']}: "
        f"{machine['threads']} threads, {machine['isa']}; training in {'bf16' if half else 'fp32'}"
    )
    with _deterministic(options.seed):
        task = load(progress)
        test = _some(task.test, options.test_documents)
        train, kept = split(task.train, min(options.held_out, len(task.train) // 2), options.seed)
        print(
            f"model: {task.model_name}\ndata: {task.data_name}; {len(train)} documents to train, "
            f"{len(kept)} for the curves, {len(test)} to test"
        )
        held = Held(kept, options.points)
        teacher = TextClassifier(without_dropout_(task.encoder), len(task.classes))
        training = (options.seed, half, progress)
        progress.step(f"fine-tuning in float: {options.teacher.steps} steps")
        curves = {FLOAT: fine_tune(teacher, train, options.teacher, held, *training)}
        freeze_(teacher)

        student = copy.deepcopy(teacher).requires_grad_(True)
        conversion = fastbb.binarize_(student, options.preset)
        _calibrate(student, train, options)
        progress.step(f"distilling the {options.preset} student: {options.student.steps} steps")
        curves["binary"] = distil(student, teacher, train, options.student, held, *training)
        freeze_(student)
    trained = time.perf_counter()

    packed = copy.deepcopy(student)
    packing = fastbb.pack_(packed)
    path = options.out / "packed.safetensors"
    progress.step(f"saving {path}")
    note = {"classes": json.dumps(task.classes), "preset": options.preset}
    safetensors.save_file(packed.state_dict(), path, metadata=note)
    sizes = {FLOAT: len(safetensors.save(teacher.state_dict())), PACKED: path.stat().st_size}

    logits = {}
    for name, model in ((FLOAT, teacher), (BINARY, student), (PACKED, packed)):
        progress.step(f"testing: {name}")
        logits[name] = predict(model, test, progress=progress.update)
    _check_packed(logits)
    _check_saved(safetensors.load_file(path), teacher, packed, test, options)

    models = {FLOAT: teacher, BINARY: student, PACKED: packed}
    latency = _latency(models, test, options, progress)
    label, _ = train.majority()
    result = {
        "model": task.model_name,
        "data": task.data_name,
        "classes": list(task.classes),
        "documents": {"train": len(train), "held_out": len(kept), "test": len(test)},
        "options": {**dataclasses.asdict(options), "out": str(options.out)},
        "training_precision": "bf16" if half else "fp32",
        "converted": conversion.to_dict(),
        "packed": packing.to_dict(),
        "accuracy": {name: accuracy(found, test.labels) for name, found in logits.items()},
        "majority": (test.labels == label).float().mean().item(),
        "packed_agrees": _agreement(logits[PACKED], logits[BINARY]),
        "packed_difference": dataclasses.asdict(compare_outputs(logits[PACKED], logits[BINARY])),
        "bytes": sizes,
        "latency": latency,
        "curves": curves,
        "seconds": {
            "fine-tuning": curves[FLOAT][-1]["seconds"],
            "distillation": curves["binary"][-1]["seconds"],
            "until trained": trained - started,
            "all": time.perf_counter() - started,
        },
        "machine": machine,
    }
    picture = options.out / "curves.png"
    plot_curves(result, picture)
    (options.out / "results.json").write_text(json.dumps(result, indent=1) + "\n")
    progress.close()
    print(f"\n{format_result(result)}\n")
    print(f"packed weights: {path}\ncurves: {picture}\nall: {options.out / 'results.json'}")
    return result


def uses_bfloat16(precision: str) -> bool:
    """Whether matrix products of training are bfloat16: asked for, or fast on this machine."""
    if precision not in ("auto", "fp32", "bf16"):
        raise UsageError(f"--precision must be auto, fp32 or bf16, got {precision!r}")
    return precision == "bf16" or (precision == "auto" and "avx512_bf16" in fastbb.isa_levels())


@contextlib.contextmanager
def _deterministic(seed: int) -> Iterator[None]:
    """Seeds torch; within the block it takes deterministic algorithms where it has them."""
    torch.manual_seed(seed)
    before = torch.are_deterministic_algorithms_enabled()
    warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warned)


def _some(documents: Documents, count: int | None) -> Documents:
    if count is None or count >= len(documents):
        return documents
    return split(documents, count, 0)[1]


def _calibrate(student: TextClassifier, train: Documents, options: Options) -> None:
    """Sets the learned scales from one batch; a preset without any has nothing to set."""
    if not any(name.endswith(("alpha", "alphas")) for name, _ in student.named_parameters()):
        return
    batch = next(training_batches(train, 2 * options.student.batch, options.seed))
    with fastbb.nn.calibrate(student), torch.no_grad():
        student(batch.ids, batch.mask)


def _agreement(a: Tensor, b: Tensor) -> float:
    return (a.argmax(1) == b.argmax(1)).float().mean().item()


def _check_packed(logits: dict[str, Tensor]) -> None:
    same = _agreement(logits[PACKED], logits[BINARY])
    if not same >= LEAST_AGREEMENT:
        raise WrongResult(
            f"packed and training form predict the same class for {same:.1%} of the documents, "
            f"at least {LEAST_AGREEMENT:.0%} is expected: please report this as a bug"
        )


def _check_saved(
    state: dict[str, Tensor],
    teacher: TextClassifier,
    packed: TextClassifier,
    test: Documents,
    options: Options,
) -> None:
    """A model built anew, made binary and packed, is `packed` once it has loaded its file."""
    encoder = type(teacher.encoder)(teacher.encoder.config)
    if not hasattr(teacher.encoder, "pooler") or teacher.encoder.pooler is None:
        encoder.pooler = None
    loaded = TextClassifier(encoder, teacher.head.out_features)
    fastbb.binarize_(loaded, options.preset)
    fastbb.pack_(loaded)
    loaded.load_state_dict(state)
    some = _some(test, 64)
    if not torch.equal(predict(loaded, some), predict(packed, some)):
        raise WrongResult("a model that loads packed.safetensors must be the one that was saved")


def _latency(
    models: dict[str, TextClassifier], test: Documents, options: Options, progress: Progress
) -> list[dict[str, Any]]:
    """Seconds per batch of the longest test documents, measured in turns."""
    longest = sorted(range(len(test)), key=lambda i: -len(test.tokens[i]))
    rows = []
    for size in options.batches:
        batch = pad(test, (longest * size)[:size])
        progress.step(f"batch {size}: timing {len(models)} models in turns")

        def call(model: TextClassifier, batch: Any = batch) -> Callable[[], Tensor]:
            return lambda: model(batch.ids, batch.mask)

        with torch.inference_mode():
            times = interleaved(
                {name: call(model) for name, model in models.items()},
                rounds=options.rounds,
                sample_seconds=0.02,
                max_seconds=30,
                progress=progress.update,
            )
        for name, timing in times.items():
            faster: Spread = speed_up(times[FLOAT], timing)
            rows.append(
                {
                    "batch": size,
                    "tokens": batch.ids.shape[1],
                    "model": name,
                    "seconds": dataclasses.asdict(timing.spread),
                    "speed_up_over_fp32": dataclasses.asdict(faster),
                }
            )
    return rows


def format_result(result: dict[str, Any]) -> str:
    """The results as a text table."""
    header = ["model", "test accuracy", "MB on disk"]
    batches = sorted({row["batch"] for row in result["latency"]})
    header += [f"ms at batch {batch}" for batch in batches]
    rows = []
    for name, found in result["accuracy"].items():
        size = result["bytes"].get(name)
        cells = [name, f"{found:.4f}", "" if size is None else f"{size / 1e6:.2f}"]
        for batch in batches:
            (row,) = (r for r in result["latency"] if (r["model"], r["batch"]) == (name, batch))
            ratio = row["speed_up_over_fp32"]["p50"]
            cells.append(f"{1e3 * row['seconds']['p50']:.2f} ({ratio:.1f}x)")
        rows.append(cells)
    rows.append(["majority class", f"{result['majority']:.4f}", *[""] * (len(header) - 2)])
    seconds = result["seconds"]
    smaller = result["bytes"][FLOAT] / result["bytes"][PACKED]
    return (
        f"{text_table(header, rows)}\n\n"
        f"packed weights are {smaller:.1f} times smaller; packed and training form predict the "
        f"same class for {result['packed_agrees']:.2%} of the test documents\n"
        f"fine-tuning {seconds['fine-tuning']:.0f} s, distillation "
        f"{seconds['distillation']:.0f} s, all {seconds['all']:.0f} s"
    )
