"""A whole server on the GPU: supervisor, persistent kernel, ZeroMQ ingress, client. Run: pytest -m gpu tests/gpu/test_server_gpu.py"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.host import server_support as scenarios

# The embedded model's streams are over in a tenth of a second on a GPU; so many take the ingress and the client a few seconds.
NUM_STREAMS, MAX_TOKENS = 64, 1500


def test_streams_through_an_ingress_finish_while_the_supervisor_is_stopped(
    tmp_path: Path, device_options: dict[str, Any]
) -> None:
    scenarios.streams_through_an_ingress_finish_while_the_supervisor_is_stopped(tmp_path, 32, 1500, **device_options)


def test_sigterm_finishes_running_streams_and_refuses_new_ones(tmp_path: Path, device_options: dict[str, Any]) -> None:
    scenarios.sigterm_finishes_running_streams_and_refuses_new_ones(tmp_path, NUM_STREAMS, MAX_TOKENS, **device_options)
