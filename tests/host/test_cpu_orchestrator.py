"""A host that schedules (orchestrator = cpu, cpu-ahead) says the same as a device that schedules itself, on the emulated device.

Every test runs the same requests with the director on the device and in the host: tokens, logprobs, alternatives and ends must be equal, which
they are only if the device's tables are what the director's are whenever a step runs. Run: pytest tests/host/test_cpu_orchestrator.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from blinkimp import ring_abi as abi
from blinkimp.host.shared_memory import open_trace
from blinkimp.host.trace_reader import TraceReader, events_of, high_half
from blinkimp.nic_shim.queue_pair import PortStatus, sampling_record
from blinkimp.ring_abi import TraceKind
from tests.host.engine_support import (
    PortClient,
    Stream,
    assert_all_pages_are_back,
    make_tiny_checkpoint,
    running_engine,
    wait_for,
)
from tests.host.orchestrator_jobs import answers, large_table, long_jobs, mixed_jobs, walk_large_table
from tests.host.sampling_jobs import Job, digits_table, table_of_dfa
from tests.host.standing_still import held
from tests.support import PATIENCE_S

IN_THE_HOST = ("cpu", "cpu-ahead")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), seed=3)


def run_jobs(tiny: Path, jobs: list[Job], orchestrator: str, **options: Any) -> tuple[list[Stream], dict[str, int]]:
    with running_engine(tiny, orchestrator=orchestrator, **options) as engine:
        with PortClient(engine.config.engine_name, 0) as client:
            for slot in {job.slot for job in jobs if job.slot is not None}:
                assert client.port.load_constraint(slot, digits_table().data, PATIENCE_S) == PortStatus.OK
            with held(engine):  # all are there before one of them ends
                ids = [job.submit(client) for job in jobs]
            client.wait_all(PATIENCE_S)
            streams = [client.streams[request_id] for request_id in ids]
            assert_all_pages_are_back(engine.status)
            status = engine.status()
        return streams, status


def test_every_kind_of_request_gets_the_same_answer(tiny: Path) -> None:
    jobs, options = mixed_jobs(), {"prefill_chunk_tokens": 48, "max_batch": 12}
    expected, _ = run_jobs(tiny, jobs, "gpu", **options)
    assert sum(len(stream.tokens) for stream in expected) > 400 and any(any(stream.tops) for stream in expected)
    for orchestrator in IN_THE_HOST:
        assert run_jobs(tiny, jobs, orchestrator, **options)[0] == expected, orchestrator


def test_preempted_requests_get_the_same_answer(tiny: Path) -> None:
    jobs = long_jobs()
    options = {"num_pages": 9, "max_context": 256, "max_batch": 8, "prefix_cache": False}
    expected, _ = run_jobs(tiny, jobs, "gpu", **options)
    for orchestrator in IN_THE_HOST:
        streams, status = run_jobs(tiny, jobs, orchestrator, **options)
        assert streams == expected, orchestrator
        assert status["preemptions"] >= 3, orchestrator


@pytest.mark.parametrize("orchestrator", IN_THE_HOST)
def test_pages_of_the_prefix_cache_are_found(tiny: Path, orchestrator: str) -> None:
    shared = [3 + i % 200 for i in range(200)]
    prompts = [[*shared, 10 + i, 20 + i] for i in range(6)]
    with (
        running_engine(tiny, orchestrator=orchestrator) as engine,
        PortClient(engine.config.engine_name, 0) as client,
    ):
        expected = [
            client.generate(prompt, 20, flags=int(abi.RequestBodyFlags.NO_PREFIX_CACHE)).tokens for prompt in prompts
        ]
        num_before = engine.status()["prompt_tokens"]
        assert [client.generate(prompt, 20).tokens for prompt in prompts] == expected
        num_computed = engine.status()["prompt_tokens"] - num_before
        assert num_computed < 3 * len(prompts[0]), (
            f"{num_computed} prompt tokens were computed for six prompts that begin alike"
        )


def test_a_constraint_that_is_loaded_again_is_the_new_one(tiny: Path) -> None:
    """A slot is sent to the device when a request that uses it is admitted, and only where it has changed."""
    with running_engine(tiny, orchestrator="cpu") as engine, PortClient(engine.config.engine_name, 0) as client:
        table, only_a = digits_table(), table_of_dfa(lambda state, text: state if text == "a" else None, 1, set())
        job = Job([5, 6, 7], 6, table=table, slot=2)
        assert client.port.load_constraint(2, table.data, PATIENCE_S) == PortStatus.OK
        first = answers(client, [job])[0]
        assert client.port.load_constraint(2, only_a.data, PATIENCE_S) == PortStatus.OK
        second = answers(client, [job])[0]
        assert client.port.load_constraint(2, table.data, PATIENCE_S) == PortStatus.OK
        third = answers(client, [job])[0]
        assert third.tokens == first.tokens != second.tokens
        assert second.tokens == [ord("a")] * 6


def test_more_than_a_batch_holds(tiny: Path) -> None:
    """An automaton of a megabyte goes to the device in two batches."""
    said, table = {}, large_table()
    for orchestrator in ("gpu", *IN_THE_HOST):
        with (
            running_engine(tiny, orchestrator=orchestrator) as engine,
            PortClient(engine.config.engine_name, 0) as client,
        ):
            said[orchestrator] = walk_large_table(client, table)
    assert said["cpu"] == said["cpu-ahead"] == said["gpu"]


def test_the_trace_of_a_host_that_schedules(tiny: Path) -> None:
    """Events of the director in the host, op times of the workers in the device's process: one clock, one trace."""
    options = {"trace_events": abi.LEAST_TRACE_EVENTS, "trace_op_period": 4, "orchestrator": "cpu-ahead"}
    with running_engine(tiny, **options) as engine, TraceReader(open_trace(engine.config.engine_name)) as reader:
        with PortClient(engine.config.engine_name, 0) as client:
            expected = [client.generate([1, 2, 3 + i], 20).tokens for i in range(3)]
        wait_for(lambda: engine.status()["num_running"] == 0, PATIENCE_S, "all is over")
        events = reader.read()
    tokens = high_half(events_of(events, TraceKind.TOKEN)["argument"]).tolist()
    assert tokens == [token for stream in expected for token in stream]
    starts, ends = events_of(events, TraceKind.STEP_START), events_of(events, TraceKind.STEP_END)
    assert starts["step"].tolist() == ends["step"].tolist() == list(range(len(starts)))
    sampled = events_of(events, TraceKind.OP_TIMES)
    assert sampled["step"].tolist() == list(range(0, len(starts), 4))


def test_a_slot_of_counts_that_others_had_meanwhile(tiny: Path) -> None:
    """Long requests with penalties give way to short ones before them, which count in the slots that they come back to."""
    options = {"num_pages": 9, "max_context": 256, "max_batch": 6, "prefix_cache": False}
    sampling = sampling_record(temperature=0.0, repetition_penalty=1.3, frequency_penalty=0.2, ignore_eos=True)
    said: dict[str, list[list[int]]] = {}
    for orchestrator in ("gpu", *IN_THE_HOST):
        with (
            running_engine(tiny, orchestrator=orchestrator, **options) as engine,
            PortClient(engine.config.engine_name, 0) as client,
        ):
            with held(engine):
                ids = [client.submit([50 + i, 7, 9], 220, sampling) for i in range(6)]
            client.wait_begun(ids)
            ids += [client.submit([i % 40 + 3] * 60, 6, sampling, priority=-8) for i in range(80)]
            client.wait_all(PATIENCE_S)
            said[orchestrator] = [client.streams[i].tokens for i in ids]
            assert engine.status()["preemptions"] >= 1, orchestrator
    assert said["cpu"] == said["gpu"] and said["cpu-ahead"] == said["gpu"]
