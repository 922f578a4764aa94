"""Requests with random prompts on one queue pair of an engine, and when each of their tokens came.

Called by tools/bench_step.py. Test: pytest tests/host/test_bench_step.py
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from blinkimp import ring_abi as abi
from blinkimp.host.engine import Engine
from blinkimp.nic_shim.queue_pair import PortStatus, QueuePairPort, WaitEvent, sampling_record
from blinkimp.ring_abi import CompletionKind, RejectReason

IDLE_TIMEOUT_S: Final = 5.0
WAIT_S: Final = 0.1  # between looks at the engine's health, where no completion comes


class BenchError(RuntimeError):
    """The figures would not mean what they claim; the message says why."""


@dataclass(frozen=True)
class Times:
    """When things happened to each request, in ns: of the device's clock, or of this process's."""

    submitted: NDArray[np.int64]  # [batch] client
    accepted: NDArray[np.int64]  # [batch] device
    device: NDArray[np.int64]  # [batch, max_tokens]
    client: NDArray[np.int64]  # [batch, max_tokens]


class Client:
    """Random prompts on one queue pair. No two share a page's worth of tokens, so nothing is found in a cache."""

    def __init__(
        self, engine: Engine, port: QueuePairPort, progress: Callable[[str, int, int], None], timeout_s: float
    ) -> None:
        self._engine, self._port, self._progress, self._timeout_s = engine, port, progress, timeout_s
        self._random = np.random.default_rng(0)
        self._sampling = sampling_record(temperature=0.0, ignore_eos=True)
        self._next_id = 1

    def run(self, what: str, batch: int, context: int, max_tokens: int) -> Times:
        """All requests at once, to their ends."""
        sizes = self._engine.plan.sizes
        if context < 1 or context + max_tokens > sizes.max_context or batch > sizes.max_batch:
            raise BenchError(
                f"{what}: batch {batch}, {context} prompt and {max_tokens} output tokens; expected a batch of at most {sizes.max_batch} "
                f"and 1 to {sizes.max_context} tokens a request; lower --batches, --context, --tokens or --prefill"
            )
        before = self._engine.status()
        first_id, self._next_id = self._next_id, self._next_id + batch
        prompts = self._random.integers(0, self._port.vocab_size, (batch, context), dtype=np.uint32)
        submitted = np.zeros(batch, np.int64)
        pieces: list[tuple[NDArray[np.void], int]] = []  # completions, and when they were seen
        num_ended = num_submitted = num_tokens = 0
        deadline = time.monotonic() + self._timeout_s
        while num_ended < batch:
            while num_submitted < batch:
                now_ns = time.monotonic_ns()
                status = self._port.try_submit(
                    first_id + num_submitted, prompts[num_submitted], self._sampling, max_tokens=max_tokens
                )
                if status in (PortStatus.RING_FULL, PortStatus.ARENA_FULL):
                    break  # the rest when the director has taken some
                if status != PortStatus.OK:
                    raise BenchError(f"{what}: a submission came to {status.name}, expected OK; see the engine's log")
                submitted[num_submitted] = now_ns
                num_submitted += 1
            event = self._port.wait(WAIT_S)
            entries, now_ns = self._port.poll(), time.monotonic_ns()
            if len(entries):
                pieces.append((entries.copy(), now_ns))
                kinds = kinds_of(entries)
                num_ended += int(np.isin(kinds, (CompletionKind.FINISH, CompletionKind.REJECT)).sum())
                num_tokens += int((kinds == CompletionKind.TOKEN).sum())
                self._progress(what, num_tokens, batch * max_tokens)
            else:
                self._engine.check()
            if event & WaitEvent.STATE_CHANGED or (time.monotonic() > deadline and num_ended < batch):
                self._engine.check()
                raise BenchError(
                    f"{what}: {num_ended} of {batch} requests ended and {num_tokens} tokens came within {self._timeout_s:g} s; expected all; "
                    f"raise --timeout, or see the engine's log\n{self._port.dump()}\n{self._engine.status()}"
                )
        times = times_of(what, pieces, submitted, first_id, max_tokens)
        self._expect_undisturbed(what, before, batch * context)
        return times

    def _expect_undisturbed(self, what: str, before: dict[str, int], num_prompt_tokens: int) -> None:
        """Waits until the engine is idle. Every prompt token was computed once: no preemption, nothing from a prefix cache."""
        deadline = time.monotonic() + IDLE_TIMEOUT_S
        while True:
            status = self._engine.status()
            got = status["prompt_tokens"] - before["prompt_tokens"]
            is_idle = not (status["num_running"] or status["num_waiting"] or status["num_finishing"])
            if is_idle and got == num_prompt_tokens:
                return
            if time.monotonic() > deadline:
                raise BenchError(
                    f"{what}: {got} prompt tokens were computed, {status['preemptions'] - before['preemptions']} preemptions, "
                    f"idle: {is_idle}; expected {num_prompt_tokens}, 0, True; use a smaller batch or context"
                )
            time.sleep(0.001)


def kinds_of(entries: NDArray[np.void]) -> NDArray[np.uint32]:
    return np.asarray((entries["commit"] >> abi.COMMIT_KIND_SHIFT) & 0xFF, np.uint32)


def times_of(
    what: str, pieces: list[tuple[NDArray[np.void], int]], submitted: NDArray[np.int64], first_id: int, max_tokens: int
) -> Times:
    entries = np.concatenate([piece for piece, _ in pieces])
    seen_ns = np.repeat([now_ns for _, now_ns in pieces], [len(piece) for piece, _ in pieces])
    kinds, rows = kinds_of(entries), entries["request_id"].astype(np.int64) - first_id
    is_reject, is_ack, is_token = (
        kinds == kind for kind in (CompletionKind.REJECT, CompletionKind.ACK, CompletionKind.TOKEN)
    )
    if is_reject.any():
        reason = (int(entries["commit"][is_reject][0]) >> abi.COMMIT_REASON_SHIFT) & 0xFF
        raise BenchError(
            f"{what}: {int(is_reject.sum())} of {len(submitted)} requests were rejected as {RejectReason(reason).name}; expected none"
        )
    shape = (len(submitted), max_tokens)
    times = Times(submitted, np.zeros(shape[0], np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.int64))
    times.accepted[rows[is_ack]] = entries["device_ns"][is_ack]
    places = (rows[is_token], entries["index"][is_token])
    times.device[places], times.client[places] = entries["device_ns"][is_token], seen_ns[is_token]
    if int(is_token.sum()) != times.device.size or not times.device.all() or not times.accepted.all():
        raise BenchError(
            f"{what}: {int(is_token.sum())} tokens and {int(is_ack.sum())} acknowledgements came; "
            f"expected {times.device.size} and {len(submitted)}; see the engine's log"
        )
    return times


def steady_state(times: Times) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(request, output position) of each token whose step, and the step before, decoded all requests and nothing else."""
    begin, end = times.device[:, 0].max(), times.device[:, -1].min()
    is_steady = (times.device[:, :-1] >= begin) & (times.device[:, 1:] <= end)
    rows, columns = np.nonzero(is_steady)
    return rows, columns + 1
