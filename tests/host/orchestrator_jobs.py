"""Requests that between them use everything a host that schedules must send to the device.

Used by tests/host/test_cpu_orchestrator.py, test_cpu_orchestrator_cuda.py and tests/gpu/test_cpu_orchestrator_gpu.py.
"""

from __future__ import annotations

import random

from blinkimp.nic_shim.constraint_table import ConstraintTable, build_constraint_table
from blinkimp.nic_shim.queue_pair import PortStatus
from tests.host.engine_support import TINY_VOCAB, PortClient, Stream
from tests.host.sampling_jobs import Job, digits_table, random_job
from tests.support import PATIENCE_S

BATCH_WORDS = 240 * 1024  # kBatchWords of device/step_update.cuh
NUM_STATES = 2000  # of an automaton that is more than a batch holds


def answers(client: PortClient, jobs: list[Job]) -> list[Stream]:
    """Of all of them side by side."""
    ids = [job.submit(client) for job in jobs]
    client.wait_all(PATIENCE_S)
    return [client.streams[request_id] for request_id in ids]


def mixed_jobs() -> list[Job]:
    """All that can be asked for, prompts longer than a chunk, and a constraint in every third."""
    rng = random.Random(23)
    jobs = [random_job(rng, longest_prompt=200) for _ in range(45)]
    for job in jobs[::3]:
        job.table, job.slot, job.min_tokens, job.stop_ids = digits_table(), 1, 0, ()
    return jobs


def long_jobs() -> list[Job]:
    """More than the pages can hold at once, most with penalties: they are preempted, and their counts are made anew."""
    rng = random.Random(5)
    jobs = [random_job(rng, longest_prompt=60) for _ in range(16)]
    for i, job in enumerate(jobs):
        job.max_tokens, job.stop_ids, job.ignore_eos = 110, (), True
        job.repetition_penalty = 1.2 if i % 4 else 1.0
        if i % 5 == 0:
            job.table, job.slot, job.min_tokens, job.ignore_eos = digits_table(), 0, 0, False
    return jobs


def large_table() -> ConstraintTable:
    """Of a megabyte; every third token leads on, to states all over it."""
    rows = [
        {token: (state * 31 + token * 7) % NUM_STATES for token in range(state % 3, TINY_VOCAB, 3)}
        for state in range(NUM_STATES)
    ]
    table = build_constraint_table(TINY_VOCAB, rows, max_bytes=1 << 20)
    assert len(table.data) > 4 * BATCH_WORDS
    return table


def walk_large_table(client: PortClient, table: ConstraintTable) -> list[Stream]:
    """A request under it, admitted while another one runs."""
    assert client.port.load_constraint(3, table.data, PATIENCE_S) == PortStatus.OK
    walk = Job([5, 6, 7], 60, table=table, slot=3, ignore_eos=True)
    return answers(client, [Job([1, 2], 80, ignore_eos=True), walk])
