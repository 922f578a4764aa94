"""The scheduling host's calls into the CUDA driver, without a GPU: a driver of the test's own (fake_cuda/fake_cuda.cpp) works off one stream late,
with the CPU interpreter as its kernel, and fails when it is told to. Run: pytest tests/host/test_cpu_orchestrator_cuda.py
"""

from __future__ import annotations

import ctypes
import dataclasses
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from blinkimp import ring_abi as abi
from blinkimp.host.cpu_orchestrator import OrchestratorKind
from blinkimp.host.device_protocol import DeviceError, Launch, Progress
from blinkimp.host.emulated_device import EmulatedDevice
from blinkimp.host.emulated_process import Order, build_params
from blinkimp.host.engine import Engine, EngineFaultError
from blinkimp.host.gpu_kernel import KernelShape
from blinkimp.host.gpu_orchestrator import GpuOrchestrator
from blinkimp.host.host_memory import DeviceMemory
from blinkimp.host.program import load_model
from blinkimp.host.shared_memory import open_engine_page, open_queue_pair
from blinkimp.host.weights import HostTarget
from blinkimp.nic_shim.queue_pair import PortStatus
from blinkimp.ring_abi import EngineState
from tests.host.cuda_driver_support import (
    BEGIN_STEP,
    CONTEXT,
    PERSISTENT_KERNEL,
    STREAM,
    build_fake_driver,
    open_fake_driver,
)
from tests.host.engine_support import (
    PortClient,
    assert_all_pages_are_back,
    engine_config,
    make_tiny_checkpoint,
    running_engine,
    wait_for,
)
from tests.host.orchestrator_jobs import answers, large_table, long_jobs, mixed_jobs, walk_large_table
from tests.host.sampling_jobs import Job, digits_table
from tests.support import PATIENCE_S

NUM_WORKERS = 2


class FakeContext:
    """A GPU whose memory is this process's."""

    handle = CONTEXT

    def register_host(self, address: int, num_bytes: int) -> int:
        return address

    def upload(self, address: int, values: np.ndarray[Any, Any]) -> None:
        ctypes.memmove(address, values.ctypes.data, values.nbytes)

    def create_stream(self) -> int:
        return STREAM


class FakeGpu(EmulatedDevice):
    """What host/gpu_device.py does with orchestrator = cpu, over the fake driver."""

    def __init__(
        self, driver: Path, kind: OrchestratorKind, spin_budget_ns: int | None, script: dict[str, int]
    ) -> None:
        super().__init__(NUM_WORKERS)
        self.driver, self.ahead, self.spin_budget_ns = driver, kind == "cpu-ahead", spin_budget_ns
        self.fake = open_fake_driver(driver, **script) if driver.exists() else None
        self.loop: GpuOrchestrator | None = None

    def start(self, launch: Launch, progress: Progress | None = None) -> None:
        if self.spin_budget_ns is not None:
            launch = dataclasses.replace(launch, spin_budget_ns=self.spin_budget_ns)
        target = HostTarget()
        model = load_model(launch.model_folder, target, compute="f32", max_context=launch.sizes.max_context)
        self.target = target  # owns the weights
        self.memory, name = DeviceMemory(), launch.regions.engine_name
        order = Order(
            name, "", "auto", 0, 0, launch.sizes, NUM_WORKERS, launch.ingress_timeout_ns, launch.spin_budget_ns
        )
        self.page = open_engine_page(name, writable=True)
        self.queue_pairs = [open_queue_pair(name, i) for i in range(launch.sizes.num_queue_pairs)]
        params = build_params(order, model, self.memory, self.page, self.queue_pairs)
        self.loop = GpuOrchestrator(
            FakeContext(),
            launch,
            model,
            params,
            step=PERSISTENT_KERNEL,
            begin_step=BEGIN_STEP,
            shape=KernelShape(16, 48, 112),
            ahead=self.ahead,
            driver=str(self.driver),
        )
        status = launch.regions.engine_page.view(abi.ENGINE_PAGE)["status"]
        while int(status["state"][0]) == EngineState.STARTING:
            if not self.is_alive():
                raise DeviceError(self.fault() or "the loop ended before it started")
            time.sleep(0.001)

    def is_alive(self) -> bool:
        return self.loop is not None and self.loop.is_alive()

    def fault(self) -> str | None:
        return self.loop.fault() if self.loop is not None else None

    def stop(self, timeout_s: float) -> bool:
        ended = self.loop is None or self.loop.join(timeout_s)
        if not ended and self.loop is not None:
            self.loop.abandon()
            assert self.loop.join(PATIENCE_S), "an abandoned loop must end"
        if self.fake is not None:
            self.fake.fake_cuda_close()
        self.page.close()
        for region in self.queue_pairs:
            region.close()
        return ended

    def count(self, what: Literal["steps", "begins", "violations"]) -> int:
        assert self.fake is not None
        return int(getattr(self.fake, f"fake_cuda_num_{what}")())


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), seed=3)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_fake_driver(tmp_path_factory.mktemp("driver"))


@contextmanager
def running(
    driver: Path,
    model: Path,
    kind: OrchestratorKind = "cpu",
    spin_budget_ns: int | None = None,
    script: dict[str, int] | None = None,
    **options: Any,
) -> Iterator[tuple[Engine, FakeGpu, PortClient]]:
    device = FakeGpu(driver, kind, spin_budget_ns, script or {})
    with (
        Engine(engine_config(model, **options), device=device) as engine,
        PortClient(engine.config.engine_name, 0) as client,
    ):
        yield engine, device, client


def load_constraints(client: PortClient, jobs: list[Job]) -> None:
    for slot in {job.slot for job in jobs if job.slot is not None}:
        assert client.port.load_constraint(slot, digits_table().data, PATIENCE_S) == PortStatus.OK


@pytest.mark.parametrize("kind", ["cpu", "cpu-ahead"])
def test_tokens_are_those_of_the_emulated_device(driver: Path, tiny: Path, kind: OrchestratorKind) -> None:
    sizes = (
        {"prefill_chunk_tokens": 48, "max_batch": 12},
        {"num_pages": 9, "max_context": 256, "max_batch": 8, "prefix_cache": False},
    )
    for jobs, options in zip((mixed_jobs(), long_jobs()), sizes, strict=True):
        with running_engine(tiny, **options) as engine, PortClient(engine.config.engine_name, 0) as client:
            load_constraints(client, jobs)
            expected = answers(client, jobs)
        # Steps of two milliseconds: all are there long before one of them ends, and those that run want more pages than there are.
        with running(driver, tiny, kind, script={"step_delay_us": 2000}, **options) as (engine, device, client):
            load_constraints(client, jobs)
            assert answers(client, jobs) == expected
            assert_all_pages_are_back(engine.status)
            status = engine.status()
            assert device.count("violations") == 0 and device.count("begins") >= device.count("steps") == status["step"]
        if "num_pages" in options:
            assert status["preemptions"] >= 3


@pytest.mark.parametrize("kind", ["cpu", "cpu-ahead"])
def test_more_than_a_batch_holds(driver: Path, tiny: Path, kind: OrchestratorKind) -> None:
    table = large_table()
    with running_engine(tiny) as engine, PortClient(engine.config.engine_name, 0) as client:
        expected = walk_large_table(client, table)
    with running(driver, tiny, kind) as (_, device, client):
        assert walk_large_table(client, table) == expected
        assert device.count("begins") > device.count("steps"), "a batch was sent alone, because it was full"
        assert device.count("violations") == 0


def test_a_lost_context_is_reported_in_the_drivers_words(driver: Path, tiny: Path) -> None:
    with running(driver, tiny, script={"fails_at_step": 5}) as (engine, device, client):
        client.submit([1, 2, 3], 100)
        wait_for(lambda: not device.is_alive(), PATIENCE_S, "the loop ends")
        with pytest.raises(EngineFaultError, match="got CUDA_ERROR_LAUNCH_FAILED"):
            engine.check()
        client.poll()
        assert len(client.streams[1].tokens) == 4, "what was whole was said"


def test_a_workers_fault_record_is_what_is_reported(driver: Path, tiny: Path) -> None:
    with running(driver, tiny, "cpu-ahead", script={"fails_at_step": 5, "records_fault": 1}) as (
        engine,
        device,
        client,
    ):
        client.submit([1, 2, 3], 100)
        wait_for(lambda: not device.is_alive(), PATIENCE_S, "the loop ends")
        with pytest.raises(EngineFaultError, match=r"SPIN_EXPIRED .* at kSiteGridBarrier"):
            engine.check()
        assert engine.status()["state"] == EngineState.FAULTED


def test_a_step_that_hangs_outlives_its_budget(driver: Path, tiny: Path) -> None:
    with running(driver, tiny, spin_budget_ns=100_000_000, script={"hangs_at_step": 3}) as (engine, device, client):
        client.submit([1, 2, 3], 100)
        wait_for(lambda: not device.is_alive(), PATIENCE_S, "the loop ends")
        with pytest.raises(EngineFaultError, match=r"SPIN_EXPIRED .* at kSiteStepWait"):
            engine.check()


def test_a_hanging_step_does_not_hold_up_the_end(driver: Path, tiny: Path) -> None:
    with running(driver, tiny, script={"hangs_at_step": 3}) as (_, device, client):
        client.submit([1, 2, 3], 100)
        wait_for(lambda: device.count("steps") == 3, PATIENCE_S, "the step hangs")
        assert device.is_alive()
        assert not device.stop(0.2)
        device.fake = None


def test_a_driver_that_is_not_there_is_named(tmp_path: Path, tiny: Path) -> None:
    with (
        pytest.raises(DeviceError, match=r"libnothing\.so: no such library"),
        running(tmp_path / "libnothing.so", tiny),
    ):
        pass
