"""What the tests of engines and of the ZeroMQ ingress share. Used by tests/host; run any of them, e.g. pytest tests/host/test_faults.py

The ingress's imports are in its fixtures: a machine that has no ZeroMQ and no tokenizers can run the tests that need neither.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support import PATIENCE_S

if TYPE_CHECKING:
    from blinkimp.client import Client
    from tests.ingress_support import Served


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of two layers that nobody changes; files that want another seed or shape have a `tiny` of their own."""
    from tests.host.engine_support import make_tiny_checkpoint

    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def one_torch_thread() -> Iterator[None]:
    """torch's threads spin for each other where the cores are busy."""
    import torch

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    """A scripted engine and its ingress."""
    from tests.ingress_support import serve

    with serve(tmp_path) as running:
        yield running


@pytest.fixture
def client(served: Served) -> Iterator[Client]:
    from blinkimp.client import Client

    with Client(served.endpoint, timeout_s=PATIENCE_S) as connected:
        yield connected
