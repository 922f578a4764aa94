"""A host that launches each step (orchestrator = cpu, cpu-ahead) says the same as the persistent kernel, on the GPU: it is the same cubin.

Run: pytest -m gpu tests/gpu/test_cpu_orchestrator_gpu.py -rP     (prints time per token of each)
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from blinkimp.host.gpu_device import GpuDevice
from blinkimp.nic_shim.queue_pair import PortStatus
from tests.gpu.test_engine_gpu import embedded_prompts
from tests.host import engine_scenarios as scenarios
from tests.host.engine_support import HostProcess, PortClient, Stream, process_state, running_engine, wait_for
from tests.host.orchestrator_jobs import answers, long_jobs, mixed_jobs
from tests.host.sampling_jobs import Job, digits_table

Options = dict[str, Any]
IN_THE_HOST = ("cpu", "cpu-ahead")


def run_jobs(model: Path, jobs: list[Job], orchestrator: str, options: Options) -> tuple[list[Stream], dict[str, int]]:
    with running_engine(model, orchestrator=orchestrator, **options) as engine:
        assert isinstance(engine.device, GpuDevice)
        with PortClient(engine.config.engine_name, 0) as client:
            for slot in {job.slot for job in jobs if job.slot is not None}:
                assert client.port.load_constraint(slot, digits_table().data) == PortStatus.OK
            return answers(client, jobs), engine.status()


def assert_same(streams: list[Stream], expected: list[Stream], what: str) -> None:
    """Tokens and ends; how far logprobs are apart is printed."""
    assert [(stream.tokens, stream.end) for stream in streams] == [
        (stream.tokens, stream.end) for stream in expected
    ], what
    pairs = [
        (a, b)
        for got, other in zip(streams, expected, strict=True)
        for a, b in zip(got.logprobs, other.logprobs, strict=True)
    ]
    print(f"{what}: {len(pairs)} tokens, largest difference of logprobs {max(abs(a - b) for a, b in pairs):g}")


@pytest.mark.parametrize("kernel", ["auto", "portable"])
def test_every_kind_of_request_gets_the_same_answer(tiny: Path, device_options: Options, kernel: str) -> None:
    """Bits do not depend on the batch, so what is in which step does not matter."""
    jobs, options = mixed_jobs(), {"prefill_chunk_tokens": 48, "max_batch": 12, "kernel": kernel, **device_options}
    expected, _ = run_jobs(tiny, jobs, "gpu", options)
    for orchestrator in IN_THE_HOST:
        assert_same(run_jobs(tiny, jobs, orchestrator, options)[0], expected, f"{kernel} {orchestrator}")


def test_preempted_requests_get_the_same_answer(tiny: Path, device_options: Options) -> None:
    jobs = long_jobs()
    options = {"num_pages": 9, "max_context": 256, "max_batch": 8, "prefix_cache": False, **device_options}
    expected, _ = run_jobs(tiny, jobs, "gpu", options)
    for orchestrator in IN_THE_HOST:
        streams, status = run_jobs(tiny, jobs, orchestrator, options)
        assert_same(streams, expected, orchestrator)
        assert status["preemptions"] >= 3, orchestrator


def test_the_embedded_models_tokens_and_what_they_cost(device_options: Options) -> None:
    prompts, expected = embedded_prompts(), None
    for orchestrator in ("gpu", *IN_THE_HOST):
        with (
            running_engine("embedded", orchestrator=orchestrator, **device_options) as engine,
            PortClient(engine.config.engine_name, 0) as client,
        ):
            alone = client.generate(prompts[0], 256).tokens
            begin = time.perf_counter()
            assert client.generate(prompts[0], 256).tokens == alone
            us_per_token = (time.perf_counter() - begin) / 256 * 1e6
            ids = [client.submit(prompt, 128) for prompt in prompts * 8]
            client.wait_all(60)
            tokens = [client.streams[i].tokens for i in ids]
            print(
                f"{orchestrator}: {us_per_token:.0f} us a token alone, gap {engine.status()['gap_ns_last'] / 1e3:.1f} us"
            )
        expected = expected or tokens
        assert tokens == expected, orchestrator


def test_random_requests_leave_nothing_behind(tiny: Path, device_options: Options) -> None:
    scenarios.random_requests_leave_nothing_behind(tiny, mean_tokens=30, orchestrator="cpu-ahead", **device_options)


def test_cancel_takes_effect_at_the_next_commit(tiny: Path, device_options: Options) -> None:
    scenarios.cancel_takes_effect_at_the_next_commit(tiny, orchestrator="cpu", **device_options)


def test_a_batch_of_256(tiny: Path, device_options: Options) -> None:
    scenarios.batch_of_256_streams_runs_at_once(tiny, orchestrator="cpu", **device_options)


def test_a_stopped_host_says_no_token(tiny: Path, device_options: Options) -> None:
    """With orchestrator=gpu the same streams end while the host is stopped (test_engine_gpu.py)."""
    with (
        HostProcess(tiny, num_completions=1024, ingress_timeout_s=30.0, orchestrator="cpu", **device_options) as host,
        PortClient(host.engine_name, 0) as client,
    ):
        ids = [client.submit([i % 4, 1], 400) for i in range(32)]
        client.wait_begun(ids)
        os.kill(host.process.pid, signal.SIGSTOP)
        wait_for(lambda: process_state(host.process.pid) == "T", 5, "the host is stopped")
        time.sleep(0.1)
        client.poll()
        assert client.num_unfinished == 32, "the streams must still run when the host stops"
        time.sleep(0.5)
        assert client.poll() == 0, "somebody schedules although the host is stopped"
        os.kill(host.process.pid, signal.SIGCONT)
        client.wait_all(60)
        host.process.send_signal(signal.SIGTERM)
        assert host.wait(30)[0] == 0
