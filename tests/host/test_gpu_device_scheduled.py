"""host/gpu_device.py with orchestrator = cpu, where there is no GPU: context, compiler and driver are the test's own, the rest is as in serving.

Run: pytest tests/host/test_gpu_device_scheduled.py
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from blinkimp.config import Config
from blinkimp.host import gpu_device
from blinkimp.host.compile_cache import CompiledKernel
from blinkimp.host.cpu_orchestrator import OrchestratorKind
from blinkimp.host.device_protocol import DeviceError, Launch, Progress
from blinkimp.host.emulated_process import Order, build_params
from blinkimp.host.engine import Engine
from blinkimp.host.gpu_driver import GpuProperties
from blinkimp.host.gpu_kernel import BEGIN_STEP_NAME, KERNEL_NAME
from blinkimp.host.host_memory import DeviceMemory
from blinkimp.host.memory_plan import EngineSizes
from blinkimp.host.model_config import ModelConfig
from blinkimp.host.program import Model, load_model
from blinkimp.host.shared_memory import Region
from blinkimp.host.weights import HostTarget
from blinkimp.ring_abi import EngineState
from tests.host.cuda_driver_support import (
    BEGIN_STEP,
    CONTEXT,
    PERSISTENT_KERNEL,
    STREAM,
    build_fake_driver,
    open_fake_driver,
)
from tests.host.engine_support import PortClient, engine_config, make_tiny_checkpoint, running_engine

NUM_MULTIPROCESSORS = 3
SIZES = {"max_batch": 8, "max_step_tokens": 64, "num_pages": 32, "max_context": 256, "num_requests": 64}


class FakeContext:
    """A Hopper with three SMs and this process's memory."""

    handle = CONTEXT
    properties = GpuProperties("Fake H200", (9, 0), NUM_MULTIPROCESSORS, 8 << 30, 13000)

    def __init__(self, device_idx: int = 0) -> None:
        self.is_closed = False

    def make_current(self) -> None: ...

    def synchronize(self, stream: Any = None) -> None: ...

    def free_bytes(self) -> int:
        return 4 << 30

    def create_stream(self) -> int:
        return STREAM

    def register_host(self, address: int, num_bytes: int) -> int:
        return address

    def upload(self, address: int, values: np.ndarray[Any, Any]) -> None:
        ctypes.memmove(address, values.ctypes.data, values.nbytes)

    def load_kernel(self, cubin: bytes, name: str, shared_memory_bytes: int = 0) -> int:
        assert (name == KERNEL_NAME) == (shared_memory_bytes > 0), "begin_step has no dynamic shared memory"
        return {KERNEL_NAME: PERSISTENT_KERNEL, BEGIN_STEP_NAME: BEGIN_STEP}[name]

    def close(self) -> None:
        self.is_closed = True


class ScheduledGpu(gpu_device.GpuDevice):
    """Its weights stay in this process, in the layout that the CPU interpreter reads."""

    def _load(self, launch: Launch, progress: Progress | None) -> Model:
        self.target = HostTarget()
        self._model = load_model(launch.model_folder, self.target, compute="bf16", max_context=launch.sizes.max_context)
        return self._model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 2, "num_key_value_heads": 1}
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), head_dim=64, **shape)


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fake_driver(tmp_path_factory.mktemp("driver"))


@pytest.fixture
def driver(library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ctypes.CDLL]:
    """host/gpu_device.py, with everything that needs a GPU taken out."""
    memory = DeviceMemory()

    def allocate(context: Any, config: ModelConfig, sizes: EngineSizes, dims: Any, ops: Any) -> np.ndarray[Any, Any]:
        order = Order("unused", "", "auto", 0, 0, sizes, NUM_MULTIPROCESSORS - 1, 0, 0)
        model: Any = SimpleNamespace(dims=dims, ops=ops)
        page: Any = SimpleNamespace(address=0)
        return build_params(order, model, memory, page, list[Region]())

    def get_kernel(source: str, *_: Any) -> CompiledKernel:
        return SimpleNamespace(cubin=source.encode(), from_cache=True, load_ns=0)  # type: ignore[return-value]

    monkeypatch.setattr(gpu_device, "GpuContext", FakeContext)
    monkeypatch.setattr(gpu_device, "CUDA_DRIVER", str(library))
    monkeypatch.setattr(gpu_device, "allocate_engine", allocate)
    monkeypatch.setattr(gpu_device, "get_kernel", get_kernel)
    fake = open_fake_driver(library)
    yield fake
    fake.fake_cuda_close()


def config_of(tiny: Path, orchestrator: OrchestratorKind, **changes: Any) -> Config:
    return engine_config(tiny, device="gpu", orchestrator=orchestrator, **SIZES, **changes)


@pytest.mark.parametrize("orchestrator", ["cpu", "cpu-ahead"])
def test_a_gpu_whose_steps_are_launched_by_the_host(
    driver: ctypes.CDLL, tiny: Path, orchestrator: OrchestratorKind
) -> None:
    with (
        running_engine(tiny, compute_dtype="bf16", **SIZES) as emulated,
        PortClient(emulated.config.engine_name, 0) as client,
    ):
        expected = [client.generate([i, 1, 2], 40).tokens for i in range(4)]
    device = ScheduledGpu(orchestrator=orchestrator)
    assert f"scheduled by this process ({orchestrator})" in device.describe()
    with (
        Engine(config_of(tiny, orchestrator), device=device) as engine,
        PortClient(engine.config.engine_name, 0) as client,
    ):
        assert [client.generate([i, 1, 2], 40).tokens for i in range(4)] == expected
        engine.check()
        assert engine.halt() and engine.status()["state"] == EngineState.STOPPED
        num_steps = engine.status()["step"]  # of its last status: one before may be older than what clients were told
        assert not device.is_alive() and device.fault() is None
    assert device._context.is_closed and driver.fake_cuda_num_violations() == 0
    assert driver.fake_cuda_num_steps() == num_steps


def test_op_times_are_refused_by_name(driver: ctypes.CDLL, tiny: Path) -> None:
    config = config_of(tiny, "cpu", trace_events=1 << 16, trace_op_period=4)
    with pytest.raises(DeviceError, match=r"trace_op_period is not 0, expected 0 with orchestrator=cpu"):
        Engine(config, device=ScheduledGpu(orchestrator="cpu")).start()
