# SPDX-License-Identifier: Apache-2.0
"""`fastbb selftest`: on the CPU as it is, and its CUDA path with a pretended device on the CPU."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import cuda_sanitize
import fastbb
from fastbb import cuda_facts, selftest
from fastbb._console import Progress, UsageError
from fastbb.cli import main
from fastbb.ops import _cuda
from fastbb.selftest.checks import CHECKS, Job
from fastbb.selftest.targets import CudaTarget, cuda_targets
from fastbb.testing import CUDA_KINDS, SAMPLES

SOME = ("odd", "swin", "gcvit_global_padded_packed", "l2norm_zero_rows", "expanded")


class PretendedCuda:
    """What the self-test uses of `torch.cuda`, for tensors on the CPU, where nothing is late."""

    def __init__(self) -> None:
        self.broken = False
        self.asleep: Callable[[], None] = lambda: None
        self.inside = False

    def synchronize(self, device: torch.device) -> None:
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def Stream(self, device: torch.device) -> str:
        return f"a stream of {device}"

    @contextlib.contextmanager
    def stream(self, stream: str) -> Iterator[None]:
        self.inside = True
        yield
        self.inside = False

    def _sleep(self, cycles: int) -> None:
        assert cycles > 0 and self.inside
        self.asleep()


@pytest.fixture
def cuda() -> PretendedCuda:
    return PretendedCuda()


def no_reasons(op: str) -> list[str]:
    return []


def run(
    cuda: PretendedCuda, op: str, cases: tuple[str, ...], reasons: Any = no_reasons
) -> list[selftest.Row]:
    target = CudaTarget(torch.device("cpu"), cuda, reasons)
    return selftest.run(selftest.Options((op,), cases), [target], Progress())


# On the CPU


def test_on_the_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    assert main(["selftest", "--case", ",".join(SOME), "--json", str(file)]) == 0
    out = capsys.readouterr().out
    saved = json.loads(file.read_text())
    levels = fastbb.isa_levels()
    assert len(saved["rows"]) == len(CHECKS) * 3 * len(levels)
    for row in saved["rows"]:
        names = {x.name for x in SAMPLES[f"fastbb::{row['op']}"]("cpu", torch.float32)}
        assert row["cases"] == len(names & set(SOME))
        assert 0 <= row["worst"] <= 1 and not row["failures"] and not row["note"]
        if row["op"] in ("null", "window_attention"):
            assert bool(row["worst_case"]) == (row["op"] != "null"), "copies are exact"
    assert {row["target"] for row in saved["rows"]} == set(levels)
    assert saved["machine"]["torch"] == torch.__version__
    for fact in (fastbb.__version__, torch.__version__, saved["machine"]["date"], "all passed"):
        assert fact in out


def test_every_operator_is_tested() -> None:
    assert {f"fastbb::{op}" for op in CHECKS} == set(SAMPLES)
    for op, check in CHECKS.items():
        assert op in check.kernels
        names = {sample.name for sample in SAMPLES[f"fastbb::{op}"]("cpu", torch.float32)}
        assert {sample.name for sample in check.samples("cpu", torch.float32)} == names


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--op", "conv"], "--op must be among "),
        (["--case", "swin,no_such_case"], "--case 'no_such_case' is the name of no sample"),
        (["--op", "null", "--case", "swin"], "--case swin is the name of no sample of null"),
    ],
)
def test_requests_that_cannot_be_served(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["selftest", *arguments]) == 2
    assert says in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["selftest", "--cuda"]) == 2
    err = capsys.readouterr().err
    built = fastbb.build_info()["cuda"]
    assert ("torch finds no CUDA device" if built else "this build has no CUDA kernels") in err
    assert "torch says:" in err


PLANTED = {
    "result": ("window_attention", "out", r"out\["),
    "log-sum-exp": ("window_attention", "lse", r"lse\["),
    "gradient": ("window_attention_backward", "bias_table", r"dbias_table\["),
    "copy": ("null", "out", r"out\["),
}


@pytest.mark.parametrize("what", PLANTED)
def test_planted_errors_are_found(
    what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    op, key, message = PLANTED[what]
    right = Job.run

    def wrong(job: Job) -> dict[str, torch.Tensor]:
        outputs = dict(right(job))
        outputs[key] = outputs[key].clone()
        outputs[key].view(-1)[3] += 0.05 * outputs[key].abs().max()
        return outputs

    monkeypatch.setattr(Job, "run", wrong)
    case = "odd" if op == "null" else "swin"
    assert main(["selftest", "--op", f"fastbb::{op}", "--case", case]) == 1
    out, err = capsys.readouterr()
    count = 3 * len(fastbb.isa_levels())
    assert f"WRONG RESULT: {count} cases, {count} failed" in err
    assert f"FAILED {op}, bf16, baseline:\n  {case}: {message[:-2]}" in out


def test_runs_that_differ_by_one_bit_are_found(
    cuda: PretendedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, calls = Job.run, iter(range(100))

    def unsteady(job: Job) -> dict[str, torch.Tensor]:
        outputs = right(job)
        if next(calls) == 1:
            outputs["q"].view(-1).view(torch.int32)[0] ^= 1
        return outputs

    monkeypatch.setattr(Job, "run", unsteady)
    (row, *_) = run(cuda, "window_attention_backward", ("swin",))
    assert row.failures == [("swin", "second run: other bits than in the first run in q")]


# With a pretended device


@pytest.mark.parametrize("op", CHECKS)
def test_cuda_path(op: str, cuda: PretendedCuda) -> None:
    """Every kind of arithmetic; on the CPU, whose kernels keep within the bounds for CUDA."""
    rows = run(cuda, op, ("*",))
    kinds = [kind for kind in CUDA_KINDS if kind != "tf32" or CHECKS[op].has_tf32]
    assert [row.kind for row in rows] == kinds
    count = len(list(SAMPLES[f"fastbb::{op}"]("cpu", torch.float32)))
    for row in rows:
        assert row.cases == count and not row.note
        assert not row.failures, row.failures


def test_tf32_is_asked_for(cuda: PretendedCuda) -> None:
    check = CHECKS["window_attention"]
    sample = next(check.samples("cpu", torch.float32))
    for tf32 in (False, True):
        job = check.job(sample, tf32)
        names = [each.name for each in job.operator._schema.arguments]
        given = dict(zip(names, job.args, strict=True))
        assert given.pop("tf32") is tf32
        assert given["swin_mask_value"] == -100.0 and given["q"] is sample.args[0]
    assert not CHECKS["null"].has_tf32


def test_operators_without_a_kernel_are_no_failures(cuda: PretendedCuda) -> None:
    def reasons(op: str) -> list[str]:
        return [f"{op} has no CUDA kernel"] if op.endswith("backward") else []

    rows = run(cuda, "window_attention_backward", ("swin",), reasons)
    assert {row.note for row in rows} == {"window_attention_backward has no CUDA kernel"}
    assert not any(row.cases or row.failures for row in rows)
    report = selftest.format_report(rows, {"driver": "580.65"})
    assert "4 of 4 lines ran in part or not at all" in report
    assert selftest.failures(rows) == 0


@pytest.mark.parametrize("op", ["window_attention", "window_attention_backward"])
def test_inputs_are_late_on_the_other_stream(
    op: str, cuda: PretendedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kernel that does not wait for its inputs, as one on the wrong stream, is found."""
    right = Job.run
    cases = ["swin", "side_float64", "expanded"]
    jobs: list[Job] = []
    early: list[dict[str, torch.Tensor]] = []

    def impatient(job: Job) -> dict[str, torch.Tensor]:
        jobs.append(job)
        return early[-1] if cuda.inside else right(job)

    def run_early() -> None:
        assert all(bool(x.isnan().all()) for x in jobs[-1].inputs())
        early.append(right(jobs[-1]))

    monkeypatch.setattr(Job, "run", impatient)
    cuda.asleep = run_early
    for row in run(cuda, op, tuple(cases)):
        assert [case for case, _ in row.failures] == cases
        assert all("run on another stream: other bits" in text for _, text in row.failures)
    before = len(early)
    cuda.asleep = lambda: early.append(right(jobs[-1]))
    assert not any(row.failures for row in run(cuda, "null", ("no rows",)))
    assert len(early) > before, "tensors without elements have nothing to be late"


def test_a_lost_device_ends_the_run(cuda: PretendedCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even tensors can be made on it."""
    right, check = Job.run, CHECKS["window_attention"]
    calls = 0

    def samples(device: str | torch.device, dtype: torch.dtype) -> Iterator[Any]:
        for sample in check.samples("cpu", dtype):
            if device != "cpu":
                cuda.synchronize(device)
            yield sample

    monkeypatch.setitem(CHECKS, "window_attention", dataclasses.replace(check, samples=samples))

    def crashing(job: Job) -> dict[str, torch.Tensor]:
        nonlocal calls
        calls += 1
        cuda.broken = cuda.broken or calls > 3
        cuda.synchronize(torch.device("cpu"))
        return right(job)

    monkeypatch.setattr(Job, "run", crashing)
    first, *others = run(cuda, "window_attention", ("swin", "pvt", "dim_64"))
    assert first.failures[0][1].startswith("RuntimeError: CUDA error: an illegal memory access")
    assert (first.cases, len(first.failures), first.worst) == (2, 1, float("inf"))
    assert first.note == "stopped at pvt: the device reports errors ever since"
    assert {row.note for row in others} == {"not run: the device was lost before"}
    saved = selftest.to_dict([first, *others], {})
    assert json.dumps(saved, allow_nan=False) and saved["rows"][0]["worst"] is None
    report = selftest.format_report([first, *others], {})
    assert "2 cases, 1 failed; 4 of 4 lines" in report and "FAILED window_attention, f32" in report


def test_an_error_that_passes_ends_nothing(
    cuda: PretendedCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Job.run

    def failing(job: Job) -> dict[str, torch.Tensor]:
        if job.args[0].dtype == torch.float16:
            raise RuntimeError("window_attention: too many resources")
        return right(job)

    monkeypatch.setattr(Job, "run", failing)
    rows = run(cuda, "window_attention", ("swin", "pvt"))
    assert [len(row.failures) for row in rows] == [0, 0, 2, 0]
    assert all(row.cases == 2 and not row.note for row in rows)


# Devices


@pytest.fixture
def two_gpus(cuda_machine: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    cuda_machine.setattr(torch.cuda, "is_available", lambda: True)
    cuda_machine.setattr(torch.cuda, "device_count", lambda: 2)
    return cuda_machine


def test_all_usable_devices_are_tested(two_gpus: pytest.MonkeyPatch) -> None:
    assert [each.name for each in cuda_targets(["null"])] == ["cuda:0", "cuda:1"]
    _cuda._cuda_reasons.cache_clear()
    two_gpus.setattr(_cuda, "capability_of", lambda index: ((7, 5), (8, 0))[index])
    (target,) = cuda_targets(["null", "window_attention"])
    assert target.name == "cuda:1" and target.reasons("null") == []


def test_unusable_devices_say_why(two_gpus: pytest.MonkeyPatch) -> None:
    two_gpus.setattr(_cuda, "capability_of", lambda index: ((7, 5), (7, 0))[index])
    with pytest.raises(UsageError, match=r"capability 7\.5 is below 8\.0;.*7\.0 is below"):
        cuda_targets(["null"])


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5", "550.54.15"),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build",
            "580.65.06",
        ),
    ],
)
def test_driver_version(
    text: str, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "version"
    file.write_text(f"{text}\nGCC version: 12.2.0\n")
    monkeypatch.setattr(cuda_facts, "_KERNEL_MODULE", file)
    assert cuda_facts.driver_version() == version


def test_driver_version_from_the_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_facts, "_KERNEL_MODULE", tmp_path / "missing")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cuda_facts.driver_version() == "unknown"
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 570.12\necho 570.12\n")
    tool.chmod(0o755)
    assert cuda_facts.driver_version() == "570.12"


def test_device_facts() -> None:
    properties = SimpleNamespace(
        name="NVIDIA A100", major=8, minor=0, multi_processor_count=108, total_memory=40 * 2**30
    )
    cuda = SimpleNamespace(get_device_properties=lambda index: properties)
    info = cuda_facts.cuda_info([1], cuda)
    assert info["cuda:1"]["compute capability"] == "8.0" and info["cuda:1"]["memory GiB"] == 40.0
    assert info["CUDA of torch"] == torch.version.cuda
    assert "cuda:1: name NVIDIA A100, compute capability 8.0" in selftest.format_report([], info)


# compute-sanitizer


FAKE_SANITIZER = """#!/bin/sh
if [ "$1" = --version ]; then echo "Version 2025.3.0.0 (build 1)"; exit 0; fi
echo "$@" >> {log}
echo "========= COMPUTE-SANITIZER"
echo "12 cases, all passed"
case "$2" in
  {failing}) echo "========= RACECHECK SUMMARY: 3 hazards displayed (3 errors)"; exit 86;;
  *) echo "========= ERROR SUMMARY: 0 errors";;
esac
"""


class Sanitizer:
    """A compute-sanitizer in PATH that notes its arguments, and a self-test that passes."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self.folder, self.log = folder, folder / "log"
        patch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        patch.setattr(sys, "executable", str(self.script("python", "#!/bin/sh\nexit 0\n")))

    def script(self, name: str, text: str) -> Path:
        path = self.folder / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    def install(self, failing: str = "nothing") -> None:
        text = FAKE_SANITIZER.replace("{log}", str(self.log)).replace("{failing}", failing)
        self.script("compute-sanitizer", text)

    def calls(self) -> list[str]:
        return self.log.read_text().splitlines()


@pytest.fixture
def sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sanitizer:
    return Sanitizer(tmp_path, monkeypatch)


def test_all_tools_run(sanitizer: Sanitizer, capfd: pytest.CaptureFixture[str]) -> None:
    sanitizer.install()
    assert cuda_sanitize.main([]) == 0
    calls = sanitizer.calls()
    assert [call.split()[1] for call in calls] == list(cuda_sanitize.TOOLS)
    for call in calls:
        assert f"--error-exitcode 86 {' '.join(cuda_sanitize.TOOLS[call.split()[1]])}" in call
        assert ("--kernel-name kns=fastbb" in call) == (call.split()[1] != "initcheck")
        assert "-m fastbb selftest --cuda --case odd,sliced,no rows,swin," in call
    out = capfd.readouterr().out
    assert "compute-sanitizer 2025.3.0.0\n  memcheck: clean: ERROR SUMMARY: 0 errors; 12 ca" in out


def test_findings_and_silence_are_not_clean(
    sanitizer: Sanitizer, capfd: pytest.CaptureFixture[str]
) -> None:
    sanitizer.install(failing="racecheck")
    assert cuda_sanitize.main(["--tool", "memcheck", "racecheck", "--op", "null"]) == 1
    assert sanitizer.calls()[0].endswith("--op null")
    out = capfd.readouterr().out
    assert "racecheck: NOT CLEAN (exit status 86): RACECHECK SUMMARY: 3 hazards displayed" in out
    assert "  memcheck: clean" in out
    quiet = cuda_sanitize.Outcome("memcheck", 0, "", "12 cases, all passed")
    assert not quiet.clean
    assert "memcheck: NOT CLEAN (exit status 0): 12 cases" in cuda_sanitize.report([quiet], "1")


def test_sanitizer_without_a_gpu_or_without_itself(
    sanitizer: Sanitizer, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    sanitizer.install()
    sanitizer.script("python", "#!/bin/sh\necho no usable CUDA device >&2\nexit 2\n")
    assert cuda_sanitize.main([]) == 2
    assert "no usable CUDA device" in capfd.readouterr().err and not sanitizer.log.exists()
    monkeypatch.setattr(cuda_sanitize, "candidates", lambda: iter([]))
    assert cuda_sanitize.main([]) == 2
    assert "pip install nvidia-cuda-sanitizer-api" in capfd.readouterr().err


def test_where_the_sanitizer_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside nvcc, in both layouts, and in CUDA_HOME; the first that can be executed."""
    for name in ("NVCC", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    monkeypatch.setenv("CUDACXX", str(tmp_path / "cuda/bin/nvcc"))
    home = tmp_path / "home"
    monkeypatch.setenv("CUDA_HOME", str(home))
    places = [
        home / "bin/compute-sanitizer",
        tmp_path / "cuda/compute-sanitizer/compute-sanitizer",
        tmp_path / "cuda/bin/compute-sanitizer",
    ]
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text("")
        assert cuda_sanitize.find() != place, "it cannot be executed"
        place.chmod(0o755)
        assert cuda_sanitize.find() == place


def test_sanitized_cases_exist() -> None:
    names = {x.name for check in CHECKS.values() for x in check.samples("cpu", torch.float32)}
    assert set(cuda_sanitize.CASES) <= names
