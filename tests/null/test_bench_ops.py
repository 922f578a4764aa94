"""tools/bench_ops.py without a GPU: variants, how long a run takes, what is written and printed, and that logits which differ are said.

Run: pytest tests/null/test_bench_ops.py
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import ROOT

sys.path.insert(0, str(ROOT / "tools"))
import bench_ops as tool
from ops_parts import PARTS
from ops_report import TORCH, layout
from ops_timing import Figures, Settings
from step_rows import parse_rows

FIGURES = Figures(ms=1.5, sustained_ms=2.0, joules=1.0, watts=500.0, sm_clock_mhz=1500.0, counter_step_s=0.06)
TORCH_FIGURES = Figures(ms=1.2, sustained_ms=1.6, joules=0.5, watts=500.0, sm_clock_mhz=1500.0, counter_step_s=0.02)
MAX_RUN_S = 210  # of the rows and parts that are the default, with torch


def test_a_variant_is_named_with_its_macros() -> None:
    variant = tool.parse_variant("wide:BK_WIDE_TOKENS=64,BK_X=2")
    assert variant == tool.Variant("wide", (("BK_WIDE_TOKENS", "64"), ("BK_X", "2")))
    for wrong in ("wide", ":BK_WIDE_TOKENS=64", "wide:", "wide:BK_WIDE_TOKENS", "base:BK_X=1", "torch:BK_X=1"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected NAME:MACRO=VALUE"):
            tool.parse_variant(wrong)


def test_the_default_run_with_torch_fits_into_its_time() -> None:
    rows, parts = parse_rows(tool.DEFAULT_ROWS), list(PARTS)
    assert len(rows) == 8 and tool.torch_parts(parts) == ["qkv", "attention", "o", "gate_up", "down", "lm_head"]
    both_s = tool.process_s(rows, parts, Settings()) + tool.process_s(rows, tool.torch_parts(parts), Settings())
    assert 150 < both_s + tool.IDLE_S < MAX_RUN_S
    assert tool.process_s(rows, parts, Settings(seconds=0)) < 0.7 * tool.process_s(rows, parts, Settings())
    assert tool.process_s(rows[:1], ["qkv"], Settings()) < 20 < tool.timeout_s(rows[:1], ["qkv"], Settings())


def test_other_logits_are_found() -> None:
    base = {"d1@64": np.zeros((1, 4), np.uint32), "p128": np.ones((1, 4), np.uint32)}
    assert tool.differing(base, base) == []
    assert tool.differing(base, base | {"p128": np.zeros((1, 4), np.uint32)}) == ["p128"]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A GPU of 132 SMs on which every build answers at once; what was asked of each."""
    asked: dict[str, Any] = {}

    def measure(variant: tool.Variant, cubin: bytes, num_workers: int, *request: Any) -> Any:
        asked[variant.name] = (cubin, num_workers, *request)
        if variant.name == "hangs":
            return "no answer in 240 s"
        rows, parts, settings = request
        figures = FIGURES if settings.seconds else Figures(ms=FIGURES.ms)
        bits = np.full((1, 4), int(variant.name == "other"), np.uint32)
        return {row.name: dict.fromkeys(parts, figures) for row in rows}, {row.name: bits for row in rows}

    monkeypatch.setattr(tool, "probe_gpu", lambda: argparse.Namespace(num_multiprocessors=132))
    monkeypatch.setattr(tool, "compile_variants", lambda variants, num_workers: [v.name.encode() for v in variants])
    monkeypatch.setattr(tool, "open_nvml", lambda: None)
    monkeypatch.setattr(tool, "idle_power_w", lambda source, seconds: 80.0)
    monkeypatch.setattr(tool, "measure_apart", measure)
    return asked


def test_a_report_has_bursts_under_ms_and_what_goes_on_beside_them(
    asked: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "ops.json"
    flags = ["--rows", "d1@64,p128", "--parts", "down,qkv", "--seconds", "0.5", "--commit", "abc", "--out", str(out)]
    assert tool.main([*flags, "--variant", "same:BK_X=1"]) == 0
    assert asked["same"] == (b"same", 131, parse_rows("d1@64,p128"), ["qkv", "down"], Settings(seconds=0.5))
    report = json.loads(out.read_text())
    assert (
        report["commit"] == "abc"
        and report["failures"] == {}
        and report["differing_logits"] == {"base": [], "same": []}
    )
    assert report["ms"]["base"] == {"d1@64": {"qkv": 1.5, "down": 1.5}, "p128": {"qkv": 1.5, "down": 1.5}}
    for key, value in (("sustained_ms", 2.0), ("joules", 1.0), ("watts", 500.0), ("joules_above_idle", 0.84)):
        assert report[key]["same"]["p128"]["down"] == value
    assert report["idle_w"] == 80.0 and report["costs"]["p128"]["down"]["bytes"] > 0
    assert report["settings"]["seconds"] == 0.5 and "60 ms between two steps" in report["resolution"]
    said = capsys.readouterr()
    assert "| d1@64 | qkv | base | 1.5000 |" in said.out and "60 ms between two steps" in said.out
    assert "s on the GPU once 2 kernels are compiled" in said.err


def test_a_variant_that_fails_is_named_and_the_others_stand(
    asked: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert tool.main(["--rows", "d1@64", "--no-energy", "--variant", "hangs:BK_X=1"]) == 1
    assert asked["base"][-1] == Settings(seconds=0) and asked["base"][-2] == list(PARTS)
    said = capsys.readouterr()
    assert "| d1@64 | all | base | 1.5000" in said.out and "hangs: not measured: no answer in 240 s" in said.err


def test_logits_that_differ_are_an_error(asked: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["--rows", "d1@64", "--variant", "other:BK_X=1"]) == 1
    assert "other: logits differ from base's in d1@64" in capsys.readouterr().err


# ---- torch -----------------------------------------------------------------------------------------------------------
class TorchProcess:
    """Stands in for subprocess.run(): writes what tools/torch_ops.py would, or does not."""

    def __init__(self, rows: list[str], failures: dict[str, str], status: int) -> None:
        self.rows, self.failures, self.status = rows, failures, status
        self.command: list[str] = []

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[bytes]:
        self.command = command
        if self.rows or self.failures:
            of_part = Figures(ms=TORCH_FIGURES.ms) if "--no-energy" in command else TORCH_FIGURES
            figures = {TORCH: {row: {"qkv": of_part} for row in self.rows}}
            said = {TORCH: {"torch": "2.9", "cuda": "13.0", "sdpa": {}}, "failures": self.failures}
            Path(command[command.index("--out") + 1]).write_text(json.dumps(layout(figures, 80.0) | said))
        return subprocess.CompletedProcess(command, self.status)


def run_with_torch(monkeypatch: pytest.MonkeyPatch, process: TorchProcess, out: Path, *flags: str) -> dict[str, Any]:
    monkeypatch.setattr(tool.subprocess, "run", process)
    status = tool.main(["--rows", "d1@64,p128", "--torch", "--commit", "abc", "--out", str(out), *flags])
    report: dict[str, Any] = json.loads(out.read_text())
    assert status == (1 if report["failures"] else 0)
    return report


def test_torch_stands_beside_as_one_more_variant(
    asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = TorchProcess(["d1@64", "p128"], {}, 0)
    report = run_with_torch(monkeypatch, process, tmp_path / "ops.json", "--parts", "qkv,sample")
    flags = dict(zip(process.command[2::2], process.command[3::2], strict=True))
    del flags["--out"]
    assert flags == {
        "--shape": "llama-3-8b",
        "--rows": "d1@64,p128",
        "--parts": "qkv",
        "--seconds": "0.6",
        "--idle-w": "80.0",
    }
    assert report["joules"][TORCH]["p128"] == {"qkv": 0.5} and report["joules"]["base"]["p128"] == {
        "qkv": 1.0,
        "sample": 1.0,
    }
    assert report[TORCH]["torch"] == "2.9" and list(report["differing_logits"]) == ["base"]
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| p128 | qkv | base"))
    assert line.endswith("| 1.2000 | 1.6000 | 0.5000 | 500 | 1.25 | 2.00 |")


@pytest.mark.parametrize(
    ("process", "failures"),
    [
        (TorchProcess([], {}, 2), {"torch": "ended with status 2 and no figures; its messages stand above"}),
        (TorchProcess(["d1@64"], {"p128": "out of memory"}, 1), {"torch p128": "out of memory"}),
        (TorchProcess(["d1@64"], {}, -11), {"torch p128": "ended before it, with status -11"}),
    ],
    ids=["no figures", "one row", "an end"],
)
def test_what_torch_lacks_is_named(
    asked: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    process: TorchProcess,
    failures: dict[str, str],
) -> None:
    report = run_with_torch(monkeypatch, process, tmp_path / "ops.json", "--no-energy")
    assert "--no-energy" in process.command and report["failures"] == failures
    assert report["ms"]["base"]["p128"]["down"] == 1.5


def test_a_process_without_end_is_named(asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def run(command: list[str], *, timeout: float, **_: Any) -> None:
        raise subprocess.TimeoutExpired(command, timeout)

    report = run_with_torch(monkeypatch, run, tmp_path / "ops.json")  # type: ignore[arg-type]
    assert report["failures"]["torch"].startswith("still ran after")


def test_torch_is_not_asked_for_what_it_lacks(
    asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    process = TorchProcess(["d1@64", "p128"], {}, 0)
    assert TORCH not in run_with_torch(monkeypatch, process, tmp_path / "ops.json", "--parts", "all,sample")["ms"]
    assert process.command == []


# ---- Processes and machines --------------------------------------------------------------------------------------
def test_a_child_that_raises_says_so() -> None:
    """No rows: refused before any GPU is looked for."""
    answer = tool.measure_apart(tool.Variant("base"), b"", 131, [], ["qkv"], Settings())
    assert isinstance(answer, str) and answer.startswith("ValueError")


def test_wrong_flags_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    for flags in (["--rows", "x1"], ["--parts", "mlp"], ["--rows", ","]):
        with pytest.raises(SystemExit):
            tool.main(flags)
    assert tool.main(["--seconds", "0.1"]) == 2
    assert "seconds: got 0.1, expected at least 0.25" in capsys.readouterr().err
