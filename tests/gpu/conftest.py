"""What GPU tests share: one cache of compiled kernels a session, a tiny model and the settings of a GPU engine; a runner of single kernels, and
inputs that are fresh in each run.

Used by tests/gpu/test_engine_gpu.py and others of engines; by tests/gpu/test_attention.py and others of kernels."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.gpu.gpu_harness import KernelRunner, kernel_cache
from tests.host.engine_support import make_tiny_checkpoint

Options = dict[str, Any]
REASON_CHARS = 2000


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Why a test failed, at once: a run that is cut short prints no summary."""
    if report.failed and report.nodeid.startswith("tests/gpu/"):
        print(f"\n{report.nodeid} ({report.when}):\n{report.longreprtext[-REASON_CHARS:]}", file=sys.stderr, flush=True)


@pytest.fixture(scope="session")
def device_options() -> Options:
    """Fields of Config. One folder for the kernels, so that each model's is compiled once."""
    return {"device": "gpu", "cache_dir": str(kernel_cache())}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The emulated tests' random model with dimensions that the kernel takes."""
    shape = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 2, "num_key_value_heads": 1}
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), head_dim=64, **shape)


@pytest.fixture(scope="module")
def runner() -> Iterator[KernelRunner]:
    with KernelRunner() as kernel_runner:
        yield kernel_runner


@pytest.fixture
def rng() -> np.random.Generator:
    """Of a seed that is printed where the test fails."""
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    print(f"seed {seed}")
    return np.random.default_rng(seed)
