# SPDX-License-Identifier: Apache-2.0
"""The commands `fastbb demo` and `info`, end to end on a tiny model, and their parts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastbb
from fastbb._console import Progress, UsageError, markdown_table, require, text_table
from fastbb.cli import main
from fastbb.demo.photos import load_photos
from fastbb.demo.run import Options, measure_model
from fastbb.demo.source import load_source, read_checkpoint
from fastbb.layer_time import KINDS, layer_times, stage_of, sum_over
from fastbb.measure import pinned_threads

pytest.importorskip("timm")
pytest.importorskip("skimage")

MODEL = "gcvit_xxtiny"
DEMO = ["demo", "--quick", "--no-compile", "--batch", "1,2", "--threads", "1", "--model"]


@pytest.fixture(scope="module")
def source():
    return load_source(MODEL)


# The demo


def test_demo_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*DEMO, MODEL, "--out", str(tmp_path / "new" / "folder")]) == 0
    out, err = capsys.readouterr()
    saved = json.loads((tmp_path / "new/folder/demo.json").read_text())

    assert saved["model"] == MODEL and saved["library"] == "timm"
    assert saved["weights"].startswith("random (seed 0)") and "random (seed 0)" in out
    assert saved["photographs"] == ["astronaut", "cat"]
    assert len(saved["acceleration"]["swapped"]) >= 12 and not saved["failures"]
    assert saved["machine"]["threads"] == 1 and saved["machine"]["isa"] == fastbb.isa()
    assert saved["logit_spread"] > 0.05, "the photographs must give different logits"

    names = ("eager fp32", "eager bf16", "fastbb fp32", "fastbb bf16")
    rows = {(row["candidate"], row["batch"]): row for row in saved["rows"]}
    assert set(rows) == {(name, batch) for name in names for batch in (1, 2)}
    for (name, batch), row in rows.items():
        assert 0 < row["seconds"]["p20"] <= row["seconds"]["p50"] <= row["seconds"]["p80"]
        assert row["images_per_second"] == pytest.approx(batch / row["seconds"]["p50"])
        assert row["peak_allocated_bytes"] > 1e6
        limit = {"eager fp32": 0.0, "fastbb fp32": 1e-4}.get(name, 0.2)
        assert row["difference"]["max_abs"] <= limit
        assert row["difference"]["mean_abs"] <= row["difference"]["max_abs"]
        assert row["difference"]["top5"] >= (1.0 if name == "fastbb fp32" else 0.6)
        assert f"{name}  " in out
    assert rows["eager bf16", 1]["difference"]["max_abs"] > 0

    for entry in saved["layer_times"]:
        assert set(entry["candidates"]) == set(names)
        for layers in entry["candidates"].values():
            spent = {layer["kind"]: layer["seconds"] for layer in layers}
            assert set(spent) == set(KINDS) and min(spent.values()) > 0
            assert {f"stage {i}" for i in (1, 2, 3, 4)} < {layer["stage"] for layer in layers}
    picture = (tmp_path / "new/folder/layer_times.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 20_000
    assert "batch 2: timing 4 candidates in turns" in err, "progress goes to stderr"


def test_demo_refuses_wrong_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    accelerate_ = fastbb.accelerate_

    def wrong(model: nn.Module, dtype: torch.dtype | None = None):
        report = accelerate_(model, dtype)
        model.head.fc.bias.data[7] += 0.01
        return report

    monkeypatch.setattr(fastbb, "accelerate_", wrong)
    assert main([*DEMO, MODEL, "--out", str(tmp_path)]) == 1
    assert "WRONG RESULT: fastbb's float32 logits differ from the library's by 0.01" in (
        capsys.readouterr().err
    )
    assert list(tmp_path.iterdir()) == []


def test_failed_candidates_are_named(source, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that fails costs its own row and nothing else."""

    def broken_compile(model: nn.Module, dynamic: bool):
        def run(x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no C++ compiler\nsecond line")

        return run

    monkeypatch.setattr(torch, "compile", broken_compile)
    options = Options(batches=(1,), rounds=1, warmup=1, layer_runs=1)
    images = torch.randn(1, 3, 224, 224)
    with pinned_threads(1):
        result = measure_model(source.module, images, options, Progress())
    reason = "RuntimeError: no C++ compiler"
    assert result["failures"] == {
        "torch.compile fp32": reason,
        "fastbb + torch.compile fp32": reason,
    }
    assert len(result["rows"]) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "gcvit_tinyy"], "got 'gcvit_tinyy'; close names: gcvit_tiny"),
        (["--model", "torchvision/gcvit_tiny"], "must be a model of timm or torchvision"),
        (["--model", "resnet10t"], "must have attention that fastbb accelerates"),
        (["--model", MODEL, "--checkpoint", "nowhere.pth"], "must be a file, got 'nowhere.pth'"),
        (["--model", MODEL, "--out", __file__], "--out must be a folder to write to"),
    ],
)
def test_demo_requests_that_cannot_be_served(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["demo", "--quick", "--no-compile", "--batch", "1", "--out", str(tmp_path)]
    assert main([*command, *arguments]) == 2
    error = capsys.readouterr().err
    assert "fastbb demo: " in error and message in error and "Traceback" not in error


@pytest.mark.parametrize("value", ["0", "-1", "x", "1,,2", ""])
def test_batch_sizes_must_be_positive(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["demo", "--batch", value])
    assert stop.value.code == 2
    assert "must be a positive integer" in capsys.readouterr().err


def test_missing_packages_name_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert main([*DEMO, MODEL, "--out", str(tmp_path)]) == 2
    assert "pip install 'fastbb[demo]'" in capsys.readouterr().err
    with pytest.raises(UsageError, match="reading needs no_such_package"):
        require("no_such_package.part", "reading")


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "demo" in capsys.readouterr().out


def test_info_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastbb", "info"], capture_output=True, text=True, check=True
    )
    assert f"  isa_levels: {', '.join(fastbb.isa_levels())}" in done.stdout
    assert f"  torch: {torch.__version__}" in done.stdout


# Models, weights, photographs


def test_random_weights_are_seeded_and_idle_nowhere(source) -> None:
    same, other = load_source(MODEL).module, load_source(MODEL, seed=1).module
    for name, value in source.module.state_dict().items():
        assert torch.equal(value, same.state_dict()[name]), name
        if value.is_floating_point() and value.numel() > 8:
            assert not torch.equal(value, other.state_dict()[name]), name
            assert value.std() > 0.01, f"{name} is (nearly) constant"


def test_torchvision_models() -> None:
    prefixed, plain = load_source("torchvision/swin_t"), load_source("swin_t")
    assert prefixed.library == plain.library == "torchvision"
    ((_, image),) = load_photos(1)
    assert prefixed.transform(image).shape == (3, 224, 224)


def test_photographs_are_real_and_repeat() -> None:
    photos = load_photos(10)
    assert len({name for name, _ in photos}) == 8
    assert photos[0] == photos[8]
    assert all(min(image.size) >= 256 and image.mode == "RGB" for _, image in photos)


def _save(path: Path, content: object) -> Path:
    if path.suffix == ".safetensors":
        pytest.importorskip("safetensors.torch").save_file(content, path)
    else:
        torch.save(content, path)
    return path


def test_checkpoints_are_loaded(source, tmp_path: Path) -> None:
    state = load_source(MODEL, seed=3).module.state_dict()
    files = [
        _save(tmp_path / "plain.pth", state),
        _save(tmp_path / "trainer.pth.tar", {"epoch": 1, "state_dict": state}),
        _save(tmp_path / "parallel.pt", {f"module.{k}": v for k, v in state.items()}),
        _save(tmp_path / "safe.safetensors", state),
    ]
    for file in files:
        loaded = load_source(MODEL, file)
        assert loaded.trained and str(file) in loaded.weights
        for name, value in loaded.module.state_dict().items():
            assert torch.equal(value, state[name]), (file.name, name)


def test_checkpoints_of_older_releases_are_converted(tmp_path: Path) -> None:
    """Swin's original layout: merging at the end of a stage, plain head, stored buffers."""
    name = "swin_tiny_patch4_window7_224"
    state = load_source(name, seed=3).module.state_dict()
    old = {
        k.replace("layers.1.down", "layers.0.down")
        .replace("layers.2.down", "layers.1.down")
        .replace("layers.3.down", "layers.2.down")
        .replace("head.fc", "head"): v
        for k, v in state.items()
    }
    old["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49)
    loaded = load_source(name, _save(tmp_path / "old.pth", {"model": old})).module.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in state.items())


def test_checkpoints_of_the_original_gcvit_are_converted(tmp_path: Path) -> None:
    name = "gcvit_xxtiny"
    original = fastbb.models.create_model(name)
    file = _save(tmp_path / "nvlabs.pth", fastbb.models.export_state_dict(original, "nvlabs"))
    loaded = load_source(name, file).module.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in original.state_dict().items())


def test_checkpoints_that_do_not_fit_change_nothing(source, tmp_path: Path) -> None:
    state = dict(source.module.state_dict())
    missing = {k: v for k, v in state.items() if k != "head.fc.bias"}
    cases = {
        "1 missing: head.fc.bias": missing,
        "1 unexpected: extra": {**state, "extra": torch.zeros(1)},
        r"1 of another shape: head.fc.bias \[10\] for \[1000\]": {
            **state,
            "head.fc.bias": torch.zeros(10),
        },
        "tensors by name": {"epoch": 3},
        "needs no code to load": _Code(),
    }
    for number, (message, content) in enumerate(cases.items()):
        with pytest.raises(UsageError, match=message):
            load_source(MODEL, _save(tmp_path / f"{number}.pth", content))
    for name in ("text.pth", "text.safetensors"):
        (tmp_path / name).write_text("hello, this is no checkpoint")
        with pytest.raises(UsageError, match="needs no code to load"):
            read_checkpoint(tmp_path / name)


class _Code:
    """Something that only unpickling with code execution can restore."""

    def __reduce__(self):
        return (print, ("loaded",))


# Time by layer


def test_layer_time_goes_to_the_innermost_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("fastbb.layer_time.time.perf_counter", lambda: now)

    class Work(nn.Module):
        def __init__(self, seconds: float, **children: nn.Module) -> None:
            super().__init__()
            self.seconds = seconds
            for name, child in children.items():
                self.add_module(name, child)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            nonlocal now
            for child in self.children():
                x = child(x)
            now += self.seconds
            return x

    class WindowAttention(Work):
        pass

    class SwinBlock(Work):
        pass

    class Mlp(Work):
        pass

    attn = WindowAttention(8.0, qkv=Work(1.0), drop=Work(16.0))
    stage = nn.Sequential(SwinBlock(2.0, attn=attn, mlp=Mlp(32.0, fc=Work(64.0))))
    model = Work(128.0, stages=nn.Sequential(stage)).eval()
    times = layer_times({"it": (model, torch.zeros(1))}, runs=2)["it"]
    assert times.pop(("head", "other")) == 128.0
    assert {key: t for key, t in times.items() if t} == {
        ("stage 1", "block"): 2.0,
        ("stage 1", "attention"): 24.0,
        ("stage 1", "projections"): 1.0,
        ("stage 1", "mlp"): 96.0,
    }
    assert sum_over(times, 0)["stage 1"] == 123.0
    assert not any(module._forward_hooks for module in model.modules()), "hooks are removed"


@pytest.mark.parametrize(
    ("path", "stage"),
    [
        ("stem.conv1", "stem"),
        ("patch_embed", "stem"),
        ("features.0.1", "stem"),
        ("features.1.0.attn", "stage 1"),
        ("features.2.norm", "stage 2"),
        ("features.3.0", "stage 2"),
        ("layers.3.blocks.0", "stage 4"),
        ("stages.0.downsample", "stage 1"),
        ("norm", "head"),
    ],
)
def test_stages(path: str, stage: str) -> None:
    assert stage_of(path) == stage


# The terminal


def test_tables() -> None:
    assert text_table(("a", "long"), [("xx", "1")]) == "a   long\n--  ----\nxx     1"
    assert markdown_table(("a", "b"), [("x", "1")]) == "| a | b |\n| --- | ---: |\n| x | 1 |"


class _Stream(list):
    tty = False

    def write(self, text: str) -> None:
        self.append(text)

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return self.tty


def test_progress_in_a_file_and_on_a_terminal() -> None:
    stream = _Stream()
    progress = Progress(stream, interval=0.05)
    progress.step("first")
    progress.update("too early to be worth a line")
    with progress.waiting("compiling"):
        threading_wait(stream)
    assert stream[0].endswith("s] first\n") and stream[1].endswith("compiling: 0 s so far\n")

    stream = _Stream()
    stream.tty = True
    progress = Progress(stream)
    progress.update("half")
    progress.step("next")
    assert stream[0].startswith("\r\033[K") and stream[1] == "\r\033[K"
    assert stream[2].endswith("s] next\n")


def threading_wait(stream: _Stream) -> None:
    """Until the stream has a second line, at most ten seconds."""
    import time

    end = time.monotonic() + 10
    while len(stream) < 2 and time.monotonic() < end:
        time.sleep(0.01)
