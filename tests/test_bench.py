# SPDX-License-Identifier: Apache-2.0
"""`fastbb bench`: shapes, peers, verification, results, on the layers of a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastbb.bench import peers, roofline
from fastbb.bench import window_attention as bench
from fastbb.bench.shapes import MODELS, AttentionShape, attention_shapes
from fastbb.cli import main

pytest.importorskip("timm")

MODEL = "gcvit_xxtiny"


@pytest.fixture
def quick_roofline(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(roofline, "GEMM_SIZES", (64,))
    monkeypatch.setattr(roofline, "COPY_BYTES", 2**20)
    roofline._measure.cache_clear()
    yield
    roofline._measure.cache_clear()


def test_shapes_come_from_the_models() -> None:
    """Against published figures: GC ViT-tiny's attention core has 0.484 GMACs, at 800 x 1344 Swin
    has 1392 windows in its first stage."""
    tiny = attention_shapes(["gcvit_tiny"])
    assert sum(s.flops(1) * s.count for s in tiny) / 2e9 == pytest.approx(0.484, abs=1e-3)
    assert sum(s.count for s in tiny) == 31
    assert [s.count for s in tiny if s.kind == "global"] == [1, 2, 9, 2]
    detection = attention_shapes(["swin_tiny_det"])
    assert [s.windows for s in detection if s.kind == "shifted"] == [1392, 360, 96, 24]
    assert {s.padded_size for s in detection} == {(203, 336), (105, 168), (56, 84), (28, 42)}
    reduced = attention_shapes(["pvt_v2_b2"])
    assert [s.queries_keys for s in reduced] == [(3136, 49), (784, 49), (196, 49), (49, 49)]
    with pytest.raises(ValueError, match="must be among"):
        attention_shapes(["gcvit_tiny", "vgg"])


def test_work_of_a_shape_by_hand() -> None:
    (shape,) = [s for s in attention_shapes(["gcvit_tiny"]) if s.name == "gcvit_tiny s2 global"]
    h, d, tokens, windows, n = 4, 32, 28 * 28, 16, 49
    assert shape.flops(3) == 3 * 2 * (2 * windows * h * n * n * d)
    assert shape.flops(3, backward=True) == 3 * 7 * (2 * windows * h * n * n * d)
    assert shape.bytes_moved(3, 2) == 3 * 2 * h * d * (n + 3 * tokens)
    # Backward reads q, k, v, out, dout and writes dq, dk, dv.
    assert shape.bytes_moved(1, 4, backward=True) == 4 * h * d * (
        (n + 3 * tokens) + 2 * n + 6 * tokens
    )


def test_bench_end_to_end(
    tmp_path: Path, quick_roofline, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bench.json"
    size = ["--models", MODEL, "--batch", "2", "--modes", "forward+backward", "--dtypes", "bf16"]
    effort = ["--rounds", "1", "--no-compile", "--threads", "1", "--json", str(file)]
    assert main(["bench", *size, *effort]) == 0
    out = capsys.readouterr().out
    results = json.loads(file.read_text())
    assert len(results["rows"]) == 8 and results["roofline"]["fp32_flops"] > 0
    for row in results["rows"]:
        ours, eager = row["candidates"]["fastbb"], row["candidates"]["eager"]
        assert ours["max_difference"] <= 2 * eager["max_difference"]
        assert ours["peak_bytes"] < eager["peak_bytes"]
        assert ours["fastbb_speed_up"]["p50"] == 1.0
        assert f"{row['shape']['name']} ({row['shape']['count']})" in out

    scripts = Path(__file__).parent.parent / "bench"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(scripts))
        import report
        import results_file

        saved = results_file.save_section("window_attention", results, tmp_path / "results")
        assert json.loads(saved.read_text())["window_attention"]["rows"] == results["rows"]
        assert report.main(["--results", str(tmp_path / "results")]) == 0
    page = (tmp_path / "results/README.md").read_text()
    assert f"## {saved.stem}" in page and f"| {MODEL} s1 local (1) | 49x49 |" in page


def test_bench_requests_that_cannot_be_served(capsys: pytest.CaptureFixture[str]) -> None:
    for option, value in (("--models", "vgg"), ("--dtypes", "int4"), ("--modes", "backward")):
        assert main(["bench", option, value]) == 2
        assert f"{option} must be among" in capsys.readouterr().err


def _shape(key: str, name: str) -> AttentionShape:
    assert key in MODELS
    return next(s for s in attention_shapes([key]) if s.name == f"{key} {name}")


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("gcvit_xxtiny", "s4 global"),
        ("swin_tiny", "s3 shifted"),
        ("swinv2_tiny_w8", "s3 cosine shifted"),
        ("swin_tiny_det", "s4 shifted"),
        ("pvt_v2_b2", "s4 reduced"),
    ],
)
def test_all_peers_agree(key: str, name: str) -> None:
    """Every candidate, outputs and gradients, on every kind of layer."""
    shape = _shape(key, name)
    inputs = peers.make_inputs(shape, 2)
    forward = bench.forward_candidates(shape, inputs, compile=False)
    training = bench.training_candidates(shape, inputs, compile=False)
    for candidates in (forward, training):
        results = {name: fn() for name, fn in candidates.items()}
        differences = bench.verify(shape, torch.float32, inputs, results)
        assert max(differences.values()) < 2e-5, differences


def test_planted_errors_are_found(
    quick_roofline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shape = _shape("swin_tiny", "s4 local")
    inputs = peers.make_inputs(shape, 1)
    candidates = bench.training_candidates(shape, inputs, compile=False)
    results = {name: fn() for name, fn in candidates.items()}
    for index in range(3):
        wrong = [x.clone() for x in results["fastbb"]]
        wrong[index].view(-1)[5] += 0.01 * wrong[index].abs().max()
        with pytest.raises(bench.WrongResult, match=f"{shape.name}.*fastbb differs"):
            bench.verify(shape, torch.float32, inputs, {**results, "fastbb": tuple(wrong)})
        wrong[index].view(-1)[5] = float("nan")
        with pytest.raises(bench.WrongResult, match="by inf"):
            bench.verify(shape, torch.float32, inputs, {**results, "fastbb": tuple(wrong)})

    right = peers.fastbb_layer
    monkeypatch.setattr(peers, "fastbb_layer", lambda *args: right(*args) * 1.01)
    assert main(["bench", "--models", "swin_tiny", "--batch", "1", "--no-compile"]) == 1
    assert "WRONG RESULT: swin_tiny s1 local" in capsys.readouterr().err
