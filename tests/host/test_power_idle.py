"""tools/power_idle.py with a scripted GPU and engines on the emulated device, and without a GPU.

Run: pytest tests/host/test_power_idle.py
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from blinkimp.host.gpu_driver import GpuError
from blinkimp.host.power import Reading
from tests.support import load_tool

tool = load_tool("power_idle")


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tool, "open_nvml", lambda: None)
    assert tool.main(["--device", "gpu"]) == 1
    assert "expected an NVIDIA driver" in capsys.readouterr().err


class Gpu:
    """A GPU that draws 80 W, and 130 W while somebody has a context on it; counts contexts."""

    name, driver = "scripted", "1.0"
    num_contexts = num_opened = 0

    def read(self) -> Reading:
        return Reading(130.0 if self.num_contexts else 80.0, None, 1980, 3201)

    def context(self) -> Any:
        def close() -> None:
            self.num_contexts -= 1

        self.num_contexts += 1
        self.num_opened += 1
        return SimpleNamespace(allocate=lambda num_bytes, what, zero: 0, close=close)


def test_no_context_a_context_and_both_engines_are_measured_and_the_engines_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The engines are emulated, so what they draw is what a GPU without a context does."""
    gpu = Gpu()
    monkeypatch.setattr(tool, "NUM_PROMPTS", 2)
    monkeypatch.setattr(tool, "SETTLE_S", 0.0)
    monkeypatch.setattr(tool, "PARK_S", 0.05)
    monkeypatch.setattr(tool, "open_nvml", lambda: gpu)
    monkeypatch.setattr(tool, "GpuContext", gpu.context)
    bench = tool.EngineBench
    monkeypatch.setattr(tool, "EngineBench", lambda shape, device, *rest: bench(shape, "emulated", *rest))
    out = tmp_path / "power.json"
    flags = ["--shape", "embedded", "--seconds", "0.3", "--park-after", "0.2", "--prompt", "16", "--out", str(out)]
    assert tool.main(flags) == 0
    report = json.loads(out.read_text())
    assert report["idle_gpu_w"] == pytest.approx(80) and report["idle_context_w"] == pytest.approx(130)
    assert [engine["park_after_s"] for engine in report["engines"]] == [0.0, 0.2]
    for engine in report["engines"]:
        assert engine["idle_power_w"] == pytest.approx(80)
        assert engine["first_token_at_once"]["n"] == engine["first_token_after_idle"]["n"] == 2
    assert (gpu.num_opened, gpu.num_contexts) == (1, 0), "the context is gone before an engine starts"
    assert "idle GPU: 80.0 W without a context of this process, 130.0 W with one" in capsys.readouterr().out


def test_a_context_that_cannot_be_made_is_an_error_in_the_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> None:
        raise GpuError("cuDevicePrimaryCtxRetain: got CUDA_ERROR_OUT_OF_MEMORY")

    monkeypatch.setattr(tool, "SETTLE_S", 0.0)
    monkeypatch.setattr(tool, "open_nvml", Gpu)
    monkeypatch.setattr(tool, "GpuContext", refuse)
    monkeypatch.setattr(tool, "keys", list)
    times = dict.fromkeys(("first_token_at_once", "first_token_after_idle"), tool.spread(np.array([1_000_000])))
    monkeypatch.setattr(tool, "measure", lambda *_: {"park_after_s": None, "idle_power_w": 134.0, **times})
    out = tmp_path / "power.json"
    assert tool.main(["--seconds", "0.3", "--out", str(out)]) == 1
    report = json.loads(out.read_text())
    assert report["idle_context_w"] is None
    assert any("a context with nothing to run: cuDevicePrimaryCtxRetain" in error for error in report["errors"])
