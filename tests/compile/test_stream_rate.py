"""tools/stream_rate.cu compiles without spills, and its constants are those of its launcher.

Run: pytest tests/compile/test_stream_rate.py
"""

from __future__ import annotations

import re

import pytest

from blinkimp.host.compile import compile_cubin
from blinkimp.host.gpu_driver import GpuError
from tests.support import load_tool

tool = load_tool("stream_rate")


def test_the_kernel_compiles_without_spills() -> None:
    cubin, reports = compile_cubin(tool.SOURCE)
    assert cubin and [report.name for report in reports] == ["stream_rate"]
    assert not reports[0].has_spills


def test_the_launcher_knows_the_kernels_constants() -> None:
    found = dict(re.findall(r"constexpr u32 (k\w+) = (\d+);", tool.SOURCE.read_text()))
    assert found == {"kTileBytes": str(tool.TILE_BYTES), "kNumStages": str(tool.NUM_STAGES)}


def test_without_a_gpu_the_tool_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def no_gpu() -> None:
        raise GpuError("cuInit: got CUDA_ERROR_NO_DEVICE, expected CUDA_SUCCESS")

    monkeypatch.setattr(tool, "GpuContext", no_gpu)
    assert tool.main() == 1
    assert "needs a GPU" in capsys.readouterr().err
