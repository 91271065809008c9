# SPDX-License-Identifier: Apache-2.0
"""The command `fastbb`: `demo`, `bench`, `selftest`, `examples` and `info`.

Exit status: 0 success; 1 a result is wrong; 2 a request that cannot be served.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fastbb._console import Progress, UsageError, WrongResult
from fastbb.cuda_facts import cuda_info
from fastbb.measure import machine_info, pinned_threads


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 2
    name = " ".join(filter(None, ("fastbb", args.command, getattr(args, "example", None))))
    return run_command(name, args.function, args)


def run_command(
    name: str, function: Callable[[argparse.Namespace, Progress], None], args: argparse.Namespace
) -> int:
    """Runs `function` with torch's threads pinned to `args.threads`; returns the exit status."""
    progress = Progress()
    try:
        with pinned_threads(getattr(args, "threads", None)):
            function(args, progress)
    except UsageError as error:
        progress.close()
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except WrongResult as error:
        progress.close()
        print(f"{name}: WRONG RESULT: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="fastbb", description="Faster vision backbones with the same outputs."
    )
    commands = parser.add_subparsers(dest="command", metavar="command")
    _add_demo(commands)
    _add_bench(commands)
    _add_selftest(commands)
    _add_examples(commands)
    info = commands.add_parser("info", help="show what was built and what this machine can run")
    info.set_defaults(function=_info)
    return parser


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser(
        "demo",
        help="run a timm or torchvision model on photographs, before and after accelerate_",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument(
        "--model",
        default="gcvit_tiny",
        help="a GC ViT, Swin or PVT v2 of timm, or a Swin of torchvision (torchvision/swin_t)",
    )
    demo.add_argument(
        "--checkpoint",
        type=Path,
        help="file with the model's state_dict (torch or safetensors); random weights otherwise",
    )
    demo.add_argument("--seed", type=int, default=0, help="of the random weights")
    demo.add_argument("--out", type=Path, default=Path("fastbb-demo"), help="folder for results")
    demo.add_argument(
        "--compile-bf16", action="store_true", help="also compare with torch.compile in bfloat16"
    )
    demo.add_argument("--rounds", type=positive, default=20, help="samples per candidate")
    demo.add_argument(
        "--quick", action="store_true", help="3 rounds: shows that all works, not how fast it is"
    )
    add_common_arguments(demo)
    demo.set_defaults(function=_demo)


def _add_bench(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    bench = commands.add_parser(
        "bench",
        help="time the attention core of real layers against eager, SDPA, torch.compile and others",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_bench_arguments(bench)
    bench.set_defaults(function=_bench)


def _add_selftest(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    selftest = commands.add_parser(
        "selftest",
        help="compare every operator with its reference on this CPU or, with --cuda, on the GPUs",
    )
    selftest.add_argument("--cuda", action="store_true", help="on all CUDA devices, not on the CPU")
    selftest.add_argument("--op", type=words, help="comma-separated operators; default: all")
    selftest.add_argument(
        "--case", type=words, default=("*",), help="comma-separated samples, with * and ?"
    )
    selftest.add_argument("--json", type=Path, help="file for all results")
    selftest.add_argument("--threads", type=positive, help="of torch; default: torch's own choice")
    selftest.set_defaults(function=_selftest)


def _add_examples(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    examples = commands.add_parser(
        "examples", help="whole tasks with real weights and data: binary-minilm"
    )
    names = examples.add_subparsers(dest="example", metavar="example", required=True)
    minilm = names.add_parser(
        "binary-minilm",
        help="distil a pre-trained text encoder to a binary one, pack it and measure both",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    minilm.add_argument("--dataset", choices=("r8", "20newsgroups"), default="r8")
    minilm.add_argument("--preset", choices=("bipft", "bit", "bibert"), default="bipft")
    minilm.add_argument("--steps", type=positive, default=argparse.SUPPRESS, help="of distillation")
    minilm.add_argument(
        "--teacher-steps", type=positive, default=argparse.SUPPRESS, help="of fine-tuning in float"
    )
    minilm.add_argument(
        "--max-length", type=positive, default=64, help="tokens after which documents are cut"
    )
    minilm.add_argument(
        "--precision",
        choices=("auto", "fp32", "bf16"),
        default="auto",
        help="of matrix products in training; auto: bf16 where the processor multiplies it",
    )
    minilm.add_argument("--seed", type=int, default=0)
    minilm.add_argument("--cache", type=Path, help="folder for downloads; default: ~/.cache/fastbb")
    minilm.add_argument(
        "--out", type=Path, default=Path("fastbb-binary-minilm"), help="folder for results"
    )
    minilm.add_argument("--threads", type=positive, help="of torch; default: torch's own choice")
    minilm.add_argument(
        "--quick", action="store_true", help="8 steps: shows that all works, not how well"
    )
    minilm.set_defaults(function=_binary_minilm)


def add_bench_arguments(bench: argparse.ArgumentParser) -> None:
    """Arguments of `fastbb bench`, which `bench/bench_window_attention.py` takes too."""
    bench.add_argument(
        "--models",
        type=words,
        default=("gcvit_tiny", "swin_tiny", "pvt_v2_b2"),
        help="comma-separated: gcvit_xxtiny, gcvit_tiny, swin_tiny, swinv2_tiny_w8, pvt_v2_b2, "
        "swin_tiny_det (800x1344), gcvit_tiny_512",
    )
    bench.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1")
    bench.add_argument("--dtypes", type=words, default=("fp32",), help="fp32, bf16, fp16")
    bench.add_argument(
        "--modes", type=words, default=("forward",), help="forward, forward+backward"
    )
    bench.add_argument(
        "--rounds",
        type=positive,
        default=argparse.SUPPRESS,
        help="samples per candidate (default: 15 on the CPU, 100 on a CUDA device)",
    )
    bench.add_argument("--json", type=Path, help="file for all numbers")
    add_common_arguments(bench)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of everything that measures."""
    parser.add_argument(
        "--batch", type=positive_numbers, default=(1, 8), help="comma-separated batch sizes"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument("--threads", type=positive, help="of torch; default: torch's own choice")


def words(text: str) -> tuple[str, ...]:
    """Argument type: comma-separated words."""
    return tuple(part.strip() for part in text.split(","))


def positive(text: str) -> int:
    """Argument type: an integer of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a positive integer, got {text!r}")
    return int(text)


def positive_numbers(text: str) -> tuple[int, ...]:
    """Argument type: comma-separated integers of at least 1."""
    return tuple(positive(part) for part in words(text))


def _demo(args: argparse.Namespace, progress: Progress) -> None:
    from fastbb.demo import DemoOptions, run_demo
    from fastbb.demo.run import Options

    measure = Options(
        batches=args.batch,
        rounds=3 if args.quick else args.rounds,
        warmup=1 if args.quick else 2,
        layer_runs=1 if args.quick else 5,
        compile=not args.no_compile,
        compile_bf16=args.compile_bf16,
    )
    run_demo(DemoOptions(args.model, args.checkpoint, args.seed, args.out, measure), progress)


def _bench(args: argparse.Namespace, progress: Progress) -> None:
    from fastbb.bench.tables import format_results

    machine = machine_info()
    print(f"{machine['cpu']}: {machine['threads']} threads, {machine['isa']}")
    results = run_bench(args, progress)
    for name, value in results.get("cuda", {}).items():
        print(f"{name}: {value}")
    print(format_results(results))
    if args.json is not None:
        args.json.write_text(json.dumps({"machine": machine, **results}, indent=1) + "\n")


def run_bench(args: argparse.Namespace, progress: Progress) -> dict[str, Any]:
    """Measures what `add_bench_arguments` describes; see `bench.window_attention.run`."""
    from fastbb.bench.machines import find_machine
    from fastbb.bench.shapes import MODELS, attention_shapes
    from fastbb.bench.window_attention import DTYPES, MODES, Options, run

    for option, values, known in (
        ("--models", args.models, tuple(MODELS)),
        ("--dtypes", args.dtypes, tuple(DTYPES)),
        ("--modes", args.modes, MODES),
    ):
        unknown = [value for value in values if value not in known]
        if unknown:
            raise UsageError(f"{option} must be among {', '.join(known)}, got {unknown[0]!r}")
    options = Options(
        batches=args.batch,
        dtypes=args.dtypes,
        modes=args.modes,
        compile=not args.no_compile,
        rounds=getattr(args, "rounds", None),
    )
    ops = ["window_attention"]
    if "forward+backward" in args.modes:
        ops.append("window_attention_backward")
    machine = find_machine(args.device, ops)
    return run(attention_shapes(args.models), options, progress, machine)


def _selftest(args: argparse.Namespace, progress: Progress) -> None:
    from fastbb import selftest

    options = selftest.Options(cases=args.case)
    if args.op is not None:
        options = selftest.Options(tuple(x.removeprefix("fastbb::") for x in args.op), args.case)
    targets = selftest.cuda_targets(list(options.ops)) if args.cuda else selftest.cpu_targets()
    rows = selftest.run(options, targets, progress)
    machine = machine_info()
    if args.cuda:
        machine |= cuda_info([each.device.index for each in targets])
    print(selftest.format_report(rows, machine))
    if args.json is not None:
        args.json.write_text(json.dumps(selftest.to_dict(rows, machine), indent=1) + "\n")
    if selftest.failures(rows):
        raise WrongResult(selftest.summary(rows))


def _binary_minilm(args: argparse.Namespace, progress: Progress) -> None:
    from fastbb import examples

    options = examples.Options(
        preset=args.preset, precision=args.precision, seed=args.seed, out=args.out
    )
    if args.quick:
        options = examples.quick(options)
    options = examples.with_steps(
        options, getattr(args, "steps", None), getattr(args, "teacher_steps", None)
    )
    cache = examples.default_cache() if args.cache is None else args.cache
    examples.run_binary_minilm(
        lambda shown: examples.load_task(args.dataset, args.max_length, cache, shown),
        options,
        progress,
    )


def _info(args: argparse.Namespace, progress: Progress) -> None:
    machine = machine_info()
    build = machine.pop("fastbb")
    for title, facts in (("build", build), ("machine", machine)):
        print(title)
        for name, value in facts.items():
            shown = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
            print(f"  {name}: {shown}")
