"""tools/power_idle.py on the emulated device, and without a GPU.

Run: pytest tests/host/test_power_idle.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support import load_tool

tool = load_tool("power_idle")


def test_an_idle_engine_is_measured_and_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The emulated device has no power to tell; the times to the first token are there."""
    monkeypatch.setattr(tool, "NUM_PROMPTS", 2)
    monkeypatch.setattr(tool, "SETTLE_S", 0.05)
    monkeypatch.setattr(tool, "open_nvml", lambda: None)
    out = tmp_path / "power.json"
    flags = ["--device", "emulated", "--shape", "embedded", "--seconds", "0.1", "--park-after", "0.2", "--prompt", "16"]
    status = tool.main([*flags, "--out", str(out)])
    report = json.loads(out.read_text())
    assert status == (1 if report["errors"] else 0)
    assert all("park_after_s" in error for error in report["errors"])
    assert report["engines"] and report["idle_gpu_w"] is None
    for engine in report["engines"]:
        assert engine["idle_power_w"] is None
        assert engine["first_token_at_once"]["n"] == engine["first_token_after_idle"]["n"] == 2


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tool, "open_nvml", lambda: None)
    assert tool.main(["--device", "gpu"]) == 1
    assert "expected an NVIDIA driver" in capsys.readouterr().err
