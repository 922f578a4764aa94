"""tools/bench_load.py on a tiny shape: a checkpoint in shards that loads, figures that add up, nothing left behind.

Run: pytest tests/null/test_bench_load_tool.py
"""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from blinkimp.host.checkpoint import Checkpoint
from blinkimp.host.program import load_model
from tests.support import load_tool

TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "vocab_size": 300,
}


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("bench_load")


def test_figures_of_a_tiny_checkpoint(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "REQUIRED_HEADROOM_BYTES", 0)
    base = tool.WRITTEN | TINY
    file = tmp_path / "load.json"
    assert (
        tool.main(
            ["--gb", "0.001", "--folder", str(tmp_path), "--repeats", "2", "--threads", "2", "--json", str(file)], base
        )
        == 0
    )
    result = json.loads(file.read_text())
    assert result["num_layers"] > 1 and result["num_threads"] == 2
    assert len(result["seconds"]["read"]) == 2
    assert "page cache -> staging memory" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["load.json"]


def test_shards_hold_every_tensor_once(tool: ModuleType, tmp_path: Path) -> None:
    config = tool.config_of(10**6, tool.WRITTEN | TINY)
    num_bytes = tool.write_checkpoint(tmp_path, config, shard_bytes=300_000)
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    shapes = tool.shapes_of(config)
    assert num_bytes == sum(2 * int(np.prod(shape)) for shape in shapes.values())
    checkpoint = Checkpoint(tmp_path)
    for name, shape in shapes.items():
        checkpoint.tensor(name, shape)
    checkpoint.finish()
    target = tool.ReadOnlyTarget(2)
    load_model(tmp_path, target, compute="bf16")
    target.stream.finish()
    vectors = sum(2 * int(np.prod(shape)) for shape in shapes.values() if len(shape) == 1)
    assert target.num_bytes == num_bytes - vectors


def test_a_folder_that_is_too_small_is_refused(
    tool: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tool, "REQUIRED_HEADROOM_BYTES", 1 << 60)
    assert tool.main(["--gb", "0.001", "--folder", str(tmp_path)], tool.WRITTEN | TINY) == 1
    assert "lower --gb" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
