"""Traces of an engine that does not exist, of any length: for measuring the analysis, and for tests that know the answer.

A batch of `batch` requests decodes step by step; when one ends another enters, with a prompt of two chunks. Step n begins at n * step_ns by the
device's clock, which is OFFSET_NS ahead of the host's; every duration is fixed, so every figure of blinkimp/trace/figures.py can be told in advance.
Called by tools/bench_trace.py and the tests. Test: pytest tests/null/test_trace_scan.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from blinkimp import ring_abi as abi
from blinkimp.ring_abi import FinishReason, TraceKind

OFFSET_NS: Final = 1_700_000_000_000_000_000
FIRST_ID: Final = 1 << 61
EVENTS_A_STEP: Final = 3  # STEP_START, STEP_END, COMMIT


@dataclass(frozen=True)
class Shape:
    """Of the made-up engine."""

    batch: int = 64
    prompt_tokens: int = 300
    output_tokens: int = 128
    step_ns: int = 8_000_000
    gap_ns: int = 2_000  # of them between two steps
    queue_ns: int = 5_000_000  # of each request
    ingress_ns: int = (
        40_000  # each: received to claimed, claimed to committed, committed to polled, a token to its reading
    )


def life(shape: Shape) -> NDArray[np.int64]:
    """[events, 4]: of one request (step since its admission, ns since that step's start, kind, argument)."""
    step_end, ingress = shape.step_ns - shape.gap_ns, shape.ingress_ns
    polled = -shape.queue_ns - 1000
    half = shape.prompt_tokens // 2
    rows = [
        (0, polled - 3 * ingress, TraceKind.RECEIVED, shape.prompt_tokens | shape.output_tokens << 32),
        (0, polled - 2 * ingress, TraceKind.CLAIMED, 0),
        (0, polled - ingress, TraceKind.COMMITTED, 0),
        (0, polled, TraceKind.POLLED, 0),
        (0, -shape.queue_ns, TraceKind.QUEUED, shape.prompt_tokens | shape.output_tokens << 32),
        (0, 0, TraceKind.ADMITTED, 0),
        (0, step_end, TraceKind.CHUNK, half << 32),
        (1, step_end, TraceKind.CHUNK, half | (shape.prompt_tokens - half) << 32),
    ]
    for position in range(shape.output_tokens):
        rows.append((1 + position, step_end, TraceKind.TOKEN, position | (position % 1000) << 32))
        if position == 0:
            rows.append((1, step_end + ingress, TraceKind.FIRST_DRAINED, 0))
            rows.append((1, step_end + 2 * ingress, TraceKind.STREAMED, 1))
    last = shape.output_tokens
    rows.append((last, step_end, TraceKind.FINISHED, int(FinishReason.LENGTH) | shape.output_tokens << 32))
    rows.append((last, step_end + ingress, TraceKind.FINISH_DRAINED, 0))
    rows.append((last, step_end + 2 * ingress, TraceKind.ENDED, shape.output_tokens))
    return np.array(rows, np.int64)


def make_trace(
    num_events: int, shape: Shape | None = None, first_step: int = 0, first_wave: int = 0
) -> NDArray[np.void]:
    """About num_events, whole lives only: `batch` requests at a time, each wave entering when the one before has ended. A trace that is too
    large for memory is made in parts: first_wave says how many waves came before."""
    shape = shape or Shape()
    template = life(shape)
    steps_a_life = shape.output_tokens + 1
    events_a_wave = shape.batch * len(template) + EVENTS_A_STEP * steps_a_life
    num_waves = max(1, num_events // events_a_wave)
    order, wave = _wave(shape, template, steps_a_life)
    events = np.empty(num_waves * len(wave), abi.TRACE_EVENT)
    for number in range(num_waves):
        part = events[number * len(wave) : (number + 1) * len(wave)]
        idx = first_wave + number
        part[:] = wave
        part["time_ns"] += np.uint64(idx * steps_a_life * shape.step_ns)
        part["step"] += np.uint32((idx * steps_a_life + first_step) & 0xFFFFFFFF)
        part["request_id"][order] += np.uint64(idx * shape.batch)
    return events


def num_waves_of(events: NDArray[np.void], shape: Shape) -> int:
    """Of what make_trace() gave."""
    return len(events) // (shape.batch * len(life(shape)) + EVENTS_A_STEP * (shape.output_tokens + 1))


def _wave(shape: Shape, template: NDArray[np.int64], steps_a_life: int) -> tuple[NDArray[np.int64], NDArray[np.void]]:
    """The first wave, and which of its events are a request's."""
    batch, num_rows = shape.batch, len(template)
    requests = np.zeros(batch * num_rows, abi.TRACE_EVENT)
    repeated = np.repeat(template, batch, 0)
    is_device = repeated[:, 2] < int(TraceKind.RECEIVED)
    start_ns = 1_000_000_000 + repeated[:, 0] * shape.step_ns
    requests["time_ns"] = start_ns + repeated[:, 1] + np.where(is_device, OFFSET_NS, 0)
    requests["kind"], requests["step"], requests["argument"] = repeated[:, 2], repeated[:, 0], repeated[:, 3]
    requests["request_id"] = FIRST_ID + np.tile(np.arange(batch), num_rows)
    requests["queue_pair_idx"] = np.tile(np.arange(batch) % 2, num_rows)
    numbers = np.arange(steps_a_life)
    steps = np.zeros((EVENTS_A_STEP, steps_a_life), abi.TRACE_EVENT)
    for row, (kind, at_ns) in enumerate(
        ((TraceKind.STEP_START, 0), (TraceKind.STEP_END, shape.step_ns - shape.gap_ns), (TraceKind.COMMIT, shape.step_ns - shape.gap_ns))
    ):  # fmt: skip
        steps[row]["time_ns"] = OFFSET_NS + 1_000_000_000 + numbers * shape.step_ns + at_ns
        steps[row]["kind"], steps[row]["step"] = int(kind), numbers
    half = shape.prompt_tokens // 2
    num_step_rows = np.select([numbers == 0, numbers == 1], [half * batch, (shape.prompt_tokens - half) * batch], batch)
    num_sampled = np.where(numbers == 0, 0, batch)
    steps[0]["argument"] = num_step_rows | (batch | num_sampled << 16) << 32
    steps[2]["argument"] = np.where(numbers == steps_a_life - 1, batch, 0) | num_sampled << 32
    everything = np.concatenate([requests, steps.reshape(-1)])
    host_ns = everything["time_ns"].astype(np.int64)
    host_ns[host_ns >= OFFSET_NS] -= OFFSET_NS
    order = np.argsort(host_ns, kind="stable")
    is_request = np.nonzero(order < len(requests))[0]
    return is_request, everything[order]
