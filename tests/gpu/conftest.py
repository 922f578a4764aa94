"""What the engine's GPU tests share: one cache of compiled kernels a session, a tiny model and the settings of a GPU engine.

Used by tests/gpu/test_engine_gpu.py and test_server_gpu.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.host.engine_support import make_tiny_checkpoint

Options = dict[str, Any]


@pytest.fixture(scope="session")
def device_options(tmp_path_factory: pytest.TempPathFactory) -> Options:
    """Fields of Config. One folder for the kernels, so that each model's is compiled once."""
    return {"device": "gpu", "cache_dir": str(tmp_path_factory.mktemp("kernels"))}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The emulated tests' random model with dimensions that the kernel takes."""
    shape = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 2, "num_key_value_heads": 1}
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), head_dim=64, **shape)
