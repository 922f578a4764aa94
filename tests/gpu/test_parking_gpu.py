"""Parking on the GPU: the kernel leaves, is launched again, and goes on; what that costs the first token.

Run: pytest -m gpu tests/gpu/test_parking_gpu.py -rP     (prints delays, and power where NVML tells it)
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blinkimp.host.power import idle_power_w, open_nvml
from blinkimp.ring_abi import EngineState
from tests.host.engine_support import PortClient, running_engine, wait_for

PARK_S = 0.3
NUM_TURNS = 12
MOST_EXTRA_MS = 2.0


def first_token_ms(client: PortClient) -> float:
    begin = time.perf_counter()
    request_id = client.submit([1, 2, 3], 4)
    while not client.streams[request_id].tokens:
        client.poll()
        assert time.perf_counter() - begin < 10, "no first token"
    delay_ms = (time.perf_counter() - begin) * 1e3
    client.wait_all(10)
    return delay_ms


def test_first_token_after_parking(tiny: Path, device_options: dict[str, Any]) -> None:
    """Same tokens, same connection; at most 2 ms later than on an engine that polls."""
    with (
        running_engine(tiny, park_after_s=PARK_S, **device_options) as engine,
        PortClient(engine.config.engine_name, 0) as client,
    ):
        expected = client.generate([1, 2, 3], 20).tokens
        awake = [first_token_ms(client) for _ in range(NUM_TURNS)]
        parked = []
        for _ in range(NUM_TURNS):
            wait_for(lambda: engine.status()["state"] == EngineState.PARKED, 10, "the kernel leaves")
            time.sleep(0.05)
            engine.check()
            parked.append(first_token_ms(client))
        assert client.generate([1, 2, 3], 20).tokens == expected
        assert engine.status()["ingress_drops"] == 0
    extra_ms = float(np.median(parked) - np.median(awake))
    print(
        f"first token: awake {np.median(awake):.3f} ms, parked {np.median(parked):.3f} ms (worst {max(parked):.3f}), {extra_ms:.3f} more"
    )
    assert extra_ms < MOST_EXTRA_MS


def test_a_parked_engine_stops(tiny: Path, device_options: dict[str, Any]) -> None:
    with running_engine(tiny, park_after_s=PARK_S, **device_options) as engine:
        wait_for(lambda: engine.status()["state"] == EngineState.PARKED, 10, "the kernel leaves")
        assert engine.drain(10) and engine.halt()
        assert engine.status()["state"] == EngineState.STOPPED


def test_power_of_a_parked_engine(tiny: Path, device_options: dict[str, Any]) -> None:
    """Within 10 W of the same GPU with a context and nothing to run."""
    source = open_nvml()
    if source is None:
        pytest.skip("NVML tells no power of this GPU")
    with running_engine(tiny, park_after_s=PARK_S, **device_options) as engine:
        wait_for(lambda: engine.status()["state"] == EngineState.PARKED, 10, "the kernel leaves")
        parked_w = idle_power_w(source, 3.0)
    idle_w = idle_power_w(source, 3.0)
    assert parked_w is not None and idle_w is not None
    print(f"parked {parked_w:.1f} W, idle {idle_w:.1f} W")
    assert parked_w < idle_w + 10
