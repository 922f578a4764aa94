"""Parking on the GPU: the kernel leaves, is launched again, and goes on; what that costs the first token, and what power it saves.

Run: pytest -m gpu tests/gpu/test_parking_gpu.py -rP     (prints delays, and power where NVML tells it)
"""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from blinkimp.host.power import PowerSource, idle_power_w, open_nvml
from blinkimp.ring_abi import EngineState
from tests.gpu.gpu_harness import KernelRunner
from tests.host.engine_support import HostProcess, PortClient, running_engine, wait_for

PARK_S = 0.3
NUM_TURNS = 12
MOST_EXTRA_MS = 2.0
SETTLE_S = 3.0  # of clocks, before power is looked at
LOOK_S = 3.0
MOST_EXTRA_W = 10.0


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
    """Same tokens, same connection; at most 2 ms later than on an engine that polls.

    The host is a process of its own, as in serving: this one polls without a pause, and a thread that shares its interpreter's lock would
    get it some milliseconds late at each of the few calls that a launch takes.
    """
    with (
        HostProcess(tiny, park_after_s=PARK_S, **device_options) as host,
        PortClient(host.engine_name, 0) as client,
    ):
        expected = client.generate([1, 2, 3], 20).tokens
        awake = [first_token_ms(client) for _ in range(NUM_TURNS)]
        parked = []
        for _ in range(NUM_TURNS):
            wait_for(lambda: host.status()["state"] == EngineState.PARKED, 10, "the kernel leaves")
            time.sleep(0.05)  # the host, too, has seen it: until then it looks every 10 ms
            parked.append(first_token_ms(client))
        assert client.generate([1, 2, 3], 20).tokens == expected
        assert host.status()["ingress_drops"] == 0
        host.process.send_signal(signal.SIGTERM)
        status, stderr = host.wait(30)
        assert status == 0, stderr
    extra_ms = float(np.median(parked) - np.median(awake))
    print(
        f"first token: awake {np.median(awake):.3f} ms, parked {np.median(parked):.3f} ms (best {min(parked):.3f}, worst {max(parked):.3f}), "
        f"{extra_ms:.3f} more"
    )
    assert extra_ms < MOST_EXTRA_MS


def test_a_parked_engine_stops(tiny: Path, device_options: dict[str, Any]) -> None:
    with running_engine(tiny, park_after_s=PARK_S, **device_options) as engine:
        wait_for(lambda: engine.status()["state"] == EngineState.PARKED, 10, "the kernel leaves")
        assert engine.drain(10) and engine.halt()
        assert engine.status()["state"] == EngineState.STOPPED


def settled_power_w(source: PowerSource) -> float:
    time.sleep(SETTLE_S)
    power_w = idle_power_w(source, LOOK_S)
    assert power_w is not None
    return power_w


def test_power_of_a_parked_engine(tiny: Path, device_options: dict[str, Any]) -> None:
    """Within 10 W of the same GPU with a context and nothing to run. Without any context the GPU draws still less; that is printed only, as
    nothing of an engine could reach it."""
    source = open_nvml()
    if source is None:
        pytest.skip("NVML tells no power of this GPU")
    none_w = settled_power_w(source)
    with KernelRunner() as runner:
        runner.zeros((1 << 20,), np.uint8)  # a first use of the context
        context_w = settled_power_w(source)
    with running_engine(tiny, park_after_s=PARK_S, **device_options) as engine:
        wait_for(lambda: engine.status()["state"] == EngineState.PARKED, 10, "the kernel leaves")
        parked_w = settled_power_w(source)
        assert engine.status()["state"] == EngineState.PARKED, "something woke it while its power was looked at"
    print(f"no context {none_w:.1f} W, a context with nothing to run {context_w:.1f} W, parked {parked_w:.1f} W")
    assert parked_w < context_w + MOST_EXTRA_W
