"""The benchmarks' own measurements on a GPU: bandwidth, power, the torch baseline under torch.compile, and bench_step with a small shape.

Run: pytest -m gpu tests/gpu/test_bench_tools_gpu.py
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from blinkimp.host.power import PowerMeter, PowerSource, open_nvml
from tests.support import load_tool

pytestmark = pytest.mark.gpu


def test_bulk_copies_stream_at_a_plausible_rate() -> None:
    """An H100 has 3.35 TB/s, an H200 4.8; no Hopper has less than 1.9 or more than 5."""
    rates = load_tool("stream_rate").stream_rates()
    assert len(rates) == 10 and 1.5e12 < min(rates) <= max(rates) < 5e12
    assert max(rates) < 1.2 * min(rates)


def wait_for_steady_power(source: PowerSource) -> None:
    """What ran before leaves the GPU warm, and a falling power is not its counter's, which is up to 0.1 s behind."""
    deadline = time.monotonic() + 30
    before_w = source.read().power_w
    while time.monotonic() < deadline:
        time.sleep(1)
        now_w = source.read().power_w
        if now_w == pytest.approx(before_w, rel=0.03):
            return
        before_w = now_w


def test_power_and_energy_agree() -> None:
    source = open_nvml()
    assert source is not None
    wait_for_steady_power(source)
    with PowerMeter(source) as meter:
        begin_ns = time.monotonic_ns()
        time.sleep(1.5)
        end_ns = time.monotonic_ns()
    mean_w = meter.power_w(begin_ns, end_ns)
    samples_w = [reading.power_w for _, reading in meter.samples()]
    assert mean_w is not None and 20 < mean_w < 1500
    assert mean_w == pytest.approx(sum(samples_w) / len(samples_w), rel=0.25)


@pytest.mark.timeout(600)
def test_both_sides_are_measured_and_blinkimp_is_within_sight_of_torch(tmp_path: Path) -> None:
    out = tmp_path / "step.json"
    flags = ["--device", "gpu", "--shape", "embedded", "--rows", "d1@256,d16@256,p256", "--energy-s", "0.5"]
    assert load_tool("bench_step").main([*flags, "--tokens", "16", "--out", str(out)]) == 0
    report = json.loads(out.read_text())
    assert [row["name"] for row in report["rows"]] == ["d1@256", "d16@256", "p256"]
    assert report["gpu"] and report["driver"] and report["idle"]["gpu_w"] > 20
    for row in report["rows"]:
        assert row["torch"]["variant"].startswith("torch.compile(inductor")
        assert row["torch"]["sdpa"] in row["torch"]["sdpa_ms"]
        # No step is faster than the hardware allows, and neither side is ten times slower than the other.
        assert row["blinkimp"]["ratio_to_limit"] > 1 and row["torch"]["ratio_to_limit"] > 1
        assert 0.1 < row["speedup_over_torch"] < 10
    decode = report["rows"][0]["blinkimp"]
    assert decode["mean_context"] == pytest.approx(256, rel=0.05) and decode["director_gap_us"]["median"] < 100
