"""Requests that between them use everything a host that schedules must send to the device.

Used by tests/host/test_cpu_orchestrator.py, test_cpu_orchestrator_cuda.py and tests/gpu/test_cpu_orchestrator_gpu.py.
"""

from __future__ import annotations

import random

from tests.host.engine_support import PortClient, Stream
from tests.host.sampling_jobs import Job, digits_table, random_job


def answers(client: PortClient, jobs: list[Job]) -> list[Stream]:
    """Of all of them side by side."""
    ids = [job.submit(client) for job in jobs]
    client.wait_all(60)
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
