# SPDX-License-Identifier: Apache-2.0
"""`fastbb bench --device cuda`: its peers on the CPU, its path with a pretended device."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastbb.bench import cuda_peers, machines, peers, roofline
from fastbb.bench import window_attention as bench
from fastbb.bench.machines import CudaMachine, find_machine
from fastbb.bench.shapes import AttentionShape, attention_shapes
from fastbb.bench.tables import format_results
from fastbb.cli import main
from fastbb.measure import interleaved
from fastbb.ops import _cuda

pytest.importorskip("timm")

CPU = torch.device("cpu")
GPU = "NVIDIA A100-SXM4-40GB"
LAYERS = {
    "gcvit_xxtiny": "s4 global",
    "swin_tiny": "s4 local",
    "swinv2_tiny_w8": "s3 cosine shifted",
    "swin_tiny_det": "s4 shifted",
    "pvt_v2_b2": "s4 reduced",
}
NO_WARNING_OF_FLASH = pytest.mark.filterwarnings("ignore:Flash attention kernel not used")


class PretendedCuda:
    """What the benchmark uses of `torch.cuda`, on the CPU. Its clock counts microseconds: every
    event takes 3.5, calls that advance `now` take more.
    """

    def __init__(self, name: str = GPU) -> None:
        self.now = 0.0
        self.order: list[str] = []
        self.properties = SimpleNamespace(
            name=name,
            major=8,
            minor=0,
            multi_processor_count=108,
            total_memory=40 * 2**30,
            L2_cache_size=2**20,
        )
        self.held, self.peak = 1000, 0

    def set_device(self, device: torch.device) -> None:
        self.order.append("set device")

    def get_device_properties(self, device: Any) -> SimpleNamespace:
        return self.properties

    def Event(self, enable_timing: bool) -> SimpleNamespace:
        assert enable_timing
        event = SimpleNamespace(time=0.0)

        def record() -> None:
            self.order.append("record")
            self.now += 3.5
            event.time = self.now

        event.record = record
        event.synchronize = lambda: self.order.append("wait")
        event.elapsed_time = lambda end: (end.time - event.time) * 1e-3
        return event

    def _sleep(self, cycles: int) -> None:
        assert cycles > 0
        self.order.append("sleep")

    def synchronize(self, device: torch.device) -> None:
        self.order.append("synchronize")

    def memory_allocated(self, device: torch.device) -> int:
        return self.held

    def reset_peak_memory_stats(self, device: torch.device) -> None:
        self.peak = self.held

    def max_memory_allocated(self, device: torch.device) -> int:
        return self.peak


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> PretendedCuda:
    monkeypatch.setattr(machines, "LEAST_FLUSH_BYTES", 2**16)
    return PretendedCuda()


def layer(key: str) -> AttentionShape:
    return next(s for s in attention_shapes([key]) if s.name == f"{key} {LAYERS[key]}")


# Peers


def plain_attention(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any, scale: float | None) -> Tensor:
    """xFormers' `memory_efficient_attention` as its documentation tells: [B, M, H, K]."""
    if attn_bias is not None:
        assert attn_bias.shape == (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        assert attn_bias.stride(-2) % 8 == 0 and attn_bias.stride(-1) == 1
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    logits = torch.einsum("bihd,bjhd->bhij", q * scale, k)
    logits = logits if attn_bias is None else logits + attn_bias
    return torch.einsum("bhij,bjhd->bihd", logits.softmax(-1), v)


@pytest.fixture
def xformers(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    ops = ModuleType("xformers.ops")
    vars(ops)["memory_efficient_attention"] = plain_attention
    package = ModuleType("xformers")
    vars(package)["__spec__"] = ModuleSpec("xformers", None)
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", ops)
    return ops


@pytest.mark.parametrize("key", LAYERS)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_further_peers_compute_the_same_layer(key: str, xformers: ModuleType) -> None:
    """FlexAttention and xFormers' arguments, and SDPA's backends that the CPU has."""
    shape = layer(key)
    inputs = peers.make_inputs(shape, 2)
    further = {"flex": cuda_peers.flex_layer, **cuda_peers.cuda_layers(compile=False)}
    assert set(further) == {"flex", "xformers", *cuda_peers.BACKENDS}
    with torch.inference_mode():
        calls = bench.forward_candidates(shape, inputs, False, further)
        results, left_out = bench._results(calls, further)
        differences = bench.verify(shape, torch.float32, inputs, results)
    assert set(left_out) == {"sdpa efficient", "sdpa cudnn"}, "the CPU has flash and math"
    assert all("No viable backend" in reason for reason in left_out.values())
    assert max(differences.values()) < 2e-5, differences


@NO_WARNING_OF_FLASH
def test_gradients_of_further_peers(xformers: ModuleType) -> None:
    """FlexAttention has none on the CPU, the flash backend none of a bias."""
    shape = layer("swin_tiny_det")
    inputs = peers.make_inputs(shape, 1)
    further = cuda_peers.cuda_layers(compile=False)
    calls = bench.training_candidates(shape, inputs, False, further)
    results, left_out = bench._results(calls, further)
    assert set(left_out) == {"sdpa flash", "sdpa efficient", "sdpa cudnn"}
    differences = bench.verify(shape, torch.float32, inputs, results)
    assert max(differences.values()) < 2e-5, differences


def test_flex_is_compiled_or_left_out() -> None:
    assert "flex" in cuda_peers.cuda_layers(compile=True)
    assert "flex" not in cuda_peers.cuda_layers(compile=False)


def test_errors_of_our_own_are_not_left_out() -> None:
    def broken() -> Tensor:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        bench._results({"fastbb": broken}, {})
    further: Any = {"flex": None}
    assert bench._results({"flex": broken}, further) == ({}, {"flex": "out of memory"})


# Time and memory


def test_time_is_taken_between_events(cuda: PretendedCuda) -> None:
    machine = CudaMachine(CPU, cuda)
    cuda.order.clear()
    machine._flush.fill_(1)

    def call() -> None:
        cuda.order.append("call")
        assert not machine._flush.any(), "the cache is flushed before"
        cuda.now += 10.0

    assert machine.seconds(call, 2) == pytest.approx((2 * 10.0 + 3.5) * 1e-6 / 2)
    assert cuda.order == ["sleep", "record", "call", "call", "record", "wait"]
    cuda.order.clear()
    times = interleaved({"a": call, "b": call}, timer=machine.seconds, rounds=3, warmup=1)
    assert cuda.order.count("call") == 2 * (1 + 3)
    assert times["a"].p50 == pytest.approx(13.5e-6)
    assert machine._flush.numel() == 2 * cuda.properties.L2_cache_size


def test_memory_is_what_a_call_adds(cuda: PretendedCuda) -> None:
    machine = CudaMachine(CPU, cuda)

    def call() -> None:
        cuda.peak = max(cuda.peak, cuda.held + 300)

    assert machine.peak_bytes(call) == 300
    assert machine.peak_bytes(lambda: None) == 0


# Peaks


def test_peaks_of_known_devices(cuda: PretendedCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    peak = CudaMachine(CPU, cuda).roofline()
    assert (peak.source, peak.copy_bytes) == ("data sheet", 1555e9)
    assert (peak.flops(torch.float16), peak.flops(torch.float32)) == (312e12, 19.5e12)
    monkeypatch.setattr(roofline, "tf32_allowed", lambda: True)
    assert CudaMachine(CPU, cuda).roofline().flops(torch.float32) == 156e12
    for bandwidth, half, tf32, fp32 in roofline.DATA_SHEETS.values():
        assert 300 <= bandwidth <= 10000 and fp32 <= tf32 < half <= 2500


def test_peaks_of_other_devices_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "DEVICE_GEMM_SIZES", (8, 16))
    monkeypatch.setattr(roofline, "DEVICE_COPY_BYTES", 1000)
    calls = 0

    def timer(fn: Callable[[], object], count: int) -> float:
        nonlocal calls
        calls += 1
        fn()
        return 1e-6 if calls % 2 else 2e-6

    peak = roofline.device_roofline("NVIDIA Unheard-of", CPU, timer)
    assert peak.source == "measured" and calls > 20
    assert peak.half_flops == peak.fp32_flops == pytest.approx(2 * 16**3 / 1e-6)
    assert peak.copy_bytes == pytest.approx(2 * 1000 / 1e-6)


# The command


def bench_command(*arguments: str) -> list[str]:
    size = ["--models", "swin_tiny", "--batch", "1", "--rounds", "2", "--no-compile"]
    return ["bench", "--device", "cuda", *size, "--threads", "1", *arguments]


@pytest.fixture
def pretended_gpu(cuda: PretendedCuda, monkeypatch: pytest.MonkeyPatch) -> PretendedCuda:

    def machine(name: str, ops: list[str]) -> CudaMachine:
        assert name == "cuda" and "window_attention" in ops
        return CudaMachine(torch.device("cpu", 0), cuda)

    monkeypatch.setattr(machines, "find_machine", machine)
    return cuda


@NO_WARNING_OF_FLASH
@pytest.mark.parametrize(("dtype", "mode"), [("fp16", "forward"), ("fp32", "forward+backward")])
def test_end_to_end(
    dtype: str,
    mode: str,
    pretended_gpu: PretendedCuda,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "bench.json"
    assert main(bench_command("--dtypes", dtype, "--modes", mode, "--json", str(file))) == 0
    out = capsys.readouterr().out
    results = json.loads(file.read_text())
    assert results["cuda"]["cuda:0"]["name"] == GPU and results["roofline"]["device"] == GPU
    for row in results["rows"]:
        timed = row["candidates"]
        assert {"eager", "sdpa", "fastbb", "sdpa math"} <= set(timed)
        assert ("sdpa flash" in timed) == (mode == "forward")
        assert not set(row["left_out"]) & set(timed)
        assert timed["fastbb"]["seconds"]["p50"] == pytest.approx(3.5e-6)
    assert f"Peaks on {GPU} (data sheet): fp32 19500 GFLOP/s, 16-bit 312000" in out
    assert "math ms" in out and "Not timed: sdpa cudnn (No viable backend" in out

    scripts = Path(__file__).parent.parent / "bench"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(scripts))
        import report
        import results_file

        saved = results_file.save_section("window_attention", results, tmp_path / "results")
        assert saved.name.startswith("nvidia-a100-sxm4-40gb-torch-")
        assert report.main(["--results", str(tmp_path / "results")]) == 0
    assert f"{GPU}, driver " in (tmp_path / "results/README.md").read_text()


def test_peers_that_are_wrong_are_not_timed(
    pretended_gpu: PretendedCuda,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def wrong(shape: AttentionShape, inputs: peers.LayerInputs) -> tuple[Tensor, Tensor]:
        out, x_windows = peers.eager_layer(shape, inputs)
        return out + 0.01, x_windows

    monkeypatch.setattr(machines, "cuda_layers", lambda compile: {"flex": wrong})
    assert main(bench_command()) == 0
    out = capsys.readouterr().out
    assert "Not timed: flex (differs by 0.01, allowed is 0.0004): swin_tiny s1 local" in out
    assert "Flex ms" not in out

    right = peers.fastbb_layer
    monkeypatch.setattr(peers, "fastbb_layer", lambda *args: right(*args) * 1.01)
    assert main(bench_command()) == 1
    assert "WRONG RESULT: swin_tiny s1 local" in capsys.readouterr().err


def test_tables_show_who_was_timed() -> None:
    spread = {"p20": 1e-3, "p50": 1e-3, "p80": 1e-3}
    facts = {
        "seconds": spread,
        "fastbb_speed_up": spread,
        "flops_per_second": 1e9,
        "share_of_peak_flops": 0.5,
        "share_of_peak_bandwidth": 0.25,
        "peak_bytes": 2**20,
    }
    names = ("eager", "sdpa", "fastbb", "flex")
    row = {
        "shape": layer("swin_tiny").to_dict(),
        "batch": 1,
        "dtype": "fp16",
        "mode": "forward",
        "left_out": {"xformers": "no kernel"},
        "candidates": {name: facts for name in names},
    }
    peak = roofline.DeviceRoofline("NVIDIA X", "measured", 1e12, 2e12, 3e11)
    text = format_results({"roofline": peak.to_dict(), "rows": [row]})
    heading = next(line for line in text.splitlines() if line.startswith("layer"))
    assert heading.split("  ")[0] == "layer (count)" and "Flex ms" in heading
    assert "xFormers" not in text and "Not timed: xformers (no kernel): swin_tiny s4 local" in text
    assert "memory 300.0 GB/s" in text and "x Flex" in text


# Devices


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:-1", "meta"])
def test_unknown_devices(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", name]) == 2
    assert f"--device must be cpu, cuda or cuda:NUMBER, got '{name}'" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_no_gpu(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--device", name]) == 2
    err = capsys.readouterr().err
    assert f"fastbb bench: --device {name}: " in err and "torch says:" in err


def test_operators_without_a_kernel_are_not_timed(cuda_machine: pytest.MonkeyPatch) -> None:
    """Their reference would run in place of the kernel."""
    cuda_machine.setattr(torch.cuda, "is_available", lambda: True)
    cuda_machine.setattr(torch.cuda, "device_count", lambda: 1)
    cuda_machine.setattr(_cuda, "has_kernel", lambda op: op == "window_attention")
    cuda_machine.setattr(machines, "CudaMachine", lambda device: device)
    assert find_machine("cuda", ("window_attention",)) == torch.device("cuda", 0)
    with pytest.raises(machines.UsageError, match="window_attention_backward has no CUDA kernel"):
        find_machine("cuda", ("window_attention", "window_attention_backward"))
    with pytest.raises(machines.UsageError, match="cuda:1: torch finds 1 CUDA devices"):
        find_machine("cuda:1", ("window_attention",))
