"""Requests with random prompts on one queue pair of an engine, and when each of their tokens came.

Called by tools/step_engine.py and tools/bench_arrival.py. Test: pytest tests/host/test_bench_step.py
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from blinkimp import ring_abi as abi
from blinkimp.host.engine import Engine
from blinkimp.nic_shim.queue_pair import PortStatus, QueuePairPort, WaitEvent, sampling_record
from blinkimp.ring_abi import CompletionKind, RejectReason

IDLE_TIMEOUT_S: Final = 60.0
SETTLE_S: Final = 5.0  # for what a failed run has left behind
# What --sampling asks of every token. `full` is all that a request can ask for but constraints; the penalties count prompt and output.
SAMPLING: Final[dict[str, dict[str, float]]] = {
    "greedy": {"temperature": 0.0},
    "full": {
        "temperature": 0.8,
        "top_k": 50,
        "top_p": 0.95,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.1,
        "frequency_penalty": 0.1,
        "seed": 7,
    },
}
WAIT_S: Final = 0.1  # between looks at the engine's health, where no completion comes


class BenchError(RuntimeError):
    """The figures would not mean what they claim; the message says why."""


@dataclass(frozen=True)
class Wave:
    """Requests of one kind, submitted together once every request of the waves before has `after_tokens` tokens."""

    batch: int
    context: int  # prompt tokens
    max_tokens: int
    after_tokens: int = 0
    prepare: Callable[[], object] | None = None  # called once, right before the first of them is submitted


@dataclass(frozen=True)
class Times:
    """When things happened to each request of a wave, in ns: of the device's clock, or of this process's."""

    submitted: NDArray[np.int64]  # [batch] client
    accepted: NDArray[np.int64]  # [batch] device
    device: NDArray[np.int64]  # [batch, max_tokens]
    client: NDArray[np.int64]  # [batch, max_tokens]


class Client:
    """Random prompts on one queue pair. No two share a page's worth of tokens, so nothing is found in a cache."""

    def __init__(
        self,
        engine: Engine,
        port: QueuePairPort,
        progress: Callable[[str, int, int], None],
        timeout_s: float,
        sampling: str = "greedy",
    ) -> None:
        self._engine, self._port, self._progress, self._timeout_s = engine, port, progress, timeout_s
        self._random = np.random.default_rng(0)
        self._sampling = sampling_record(ignore_eos=True, **SAMPLING[sampling])  # type: ignore[arg-type]
        self.gaps: list[
            tuple[int, int]
        ] = []  # (time, ns between two steps, as the director last saw it) of the last run
        self._next_id = 1
        self._submitted_ids = range(0)  # of the last run

    def run(self, what: str, waves: Sequence[Wave]) -> list[Times]:
        """All waves to their ends; the times of each."""
        self._expect_fitting(what, waves)
        before = self._engine.status()
        first_id = self._next_id
        wave_of = np.repeat(np.arange(len(waves)), [wave.batch for wave in waves])  # [requests]
        num_requests = len(wave_of)
        self._next_id += num_requests
        self._submitted_ids = range(0)
        prompts = [
            self._random.integers(0, self._port.vocab_size, (wave.batch, wave.context), dtype=np.uint32)
            for wave in waves
        ]
        prompt_of = [prompt for rows in prompts for prompt in rows]
        submitted = np.zeros(num_requests, np.int64)
        num_got = np.zeros(num_requests, np.int64)  # tokens of each request
        total_tokens = sum(wave.batch * wave.max_tokens for wave in waves)
        pieces: list[tuple[NDArray[np.void], int]] = []  # completions, and when they were seen
        num_ended = num_submitted = num_prepared = 0
        self.gaps = []
        deadline = time.monotonic() + self._timeout_s
        while num_ended < num_requests:
            while num_submitted < num_requests:
                wave = waves[wave_of[num_submitted]]
                earlier = num_got[wave_of < wave_of[num_submitted]]
                if earlier.size and earlier.min() < wave.after_tokens:
                    break
                if wave.prepare is not None and num_prepared <= wave_of[num_submitted]:
                    num_prepared = int(wave_of[num_submitted]) + 1
                    wave.prepare()
                now_ns = time.monotonic_ns()
                status = self._port.try_submit(
                    first_id + num_submitted, prompt_of[num_submitted], self._sampling, max_tokens=wave.max_tokens
                )
                if status in (PortStatus.RING_FULL, PortStatus.ARENA_FULL):
                    break  # the rest when the director has taken some
                if status != PortStatus.OK:
                    raise BenchError(f"{what}: a submission came to {status.name}, expected OK; see the engine's log")
                submitted[num_submitted] = now_ns
                num_submitted += 1
                self._submitted_ids = range(first_id, first_id + num_submitted)
            event = self._port.wait(WAIT_S)
            entries, now_ns = self._port.poll(), time.monotonic_ns()
            entries = entries[entries["request_id"] >= first_id]  # a copy, of this run's alone: ids ascend
            if len(entries):
                pieces.append((entries, now_ns))
                self.gaps.append((now_ns, self._engine.status()["gap_ns_last"]))
                kinds = kinds_of(entries)
                num_ended += int(np.isin(kinds, (CompletionKind.FINISH, CompletionKind.REJECT)).sum())
                tokens = entries["request_id"][kinds == CompletionKind.TOKEN].astype(np.int64) - first_id
                np.add.at(num_got, tokens, 1)
                self._progress(what, int(num_got.sum()), total_tokens)
            else:
                self._engine.check()
            if event & WaitEvent.STATE_CHANGED or (time.monotonic() > deadline and num_ended < num_requests):
                self._engine.check()
                raise BenchError(
                    f"{what}: {num_ended} of {num_requests} requests ended and {int(num_got.sum())} tokens came within "
                    f"{self._timeout_s:g} s; expected all; raise --timeout, or see the engine's log\n{self._port.dump()}\n{self._engine.status()}"
                )
        times = times_of(what, pieces, submitted, first_id, waves)
        self._expect_undisturbed(what, before, sum(wave.batch * wave.context for wave in waves))
        return times

    def settle(self) -> bool:
        """After a run that raised: cancels what it left. Whether nothing of it is there now, neither a request in the engine nor a completion
        on its way."""
        deadline = time.monotonic() + SETTLE_S
        # The director takes entries in order: once it has answered the last one, none of this run waits on the ring.
        ping_id, self._next_id = self._next_id, self._next_id + 1
        to_send = [functools.partial(self._port.try_cancel, request_id) for request_id in self._submitted_ids]
        to_send.append(functools.partial(self._port.try_ping, ping_id, 0))
        is_taken = False
        while to_send or not is_taken or self._is_busy(self._engine.status()):
            if time.monotonic() > deadline:
                return False
            while to_send and to_send[0]() == PortStatus.OK:
                to_send.pop(0)
            entries = self._port.poll()
            is_taken |= bool((entries["request_id"] == ping_id).any())
            time.sleep(0.001)
        while len(self._port.poll()):
            pass
        return True

    @staticmethod
    def _is_busy(status: dict[str, int]) -> bool:
        return bool(status["num_running"] or status["num_waiting"] or status["num_finishing"])

    def _expect_fitting(self, what: str, waves: Sequence[Wave]) -> None:
        sizes = self._engine.plan.sizes
        batch = sum(wave.batch for wave in waves)
        least = min(wave.context for wave in waves)
        most = max(wave.context + wave.max_tokens for wave in waves)
        if least < 1 or most > sizes.max_context or batch > sizes.max_batch:
            raise BenchError(
                f"{what}: batch {batch}, prompts from {least} tokens, at most {most} tokens a request; expected a batch of at most "
                f"{sizes.max_batch}, and 1 to {sizes.max_context} tokens a request; choose smaller rows, or fewer --tokens"
            )

    def _expect_undisturbed(self, what: str, before: dict[str, int], num_prompt_tokens: int) -> None:
        """Waits until the engine is idle. Every prompt token was computed once: no preemption, nothing from a prefix cache."""
        deadline = time.monotonic() + IDLE_TIMEOUT_S
        while True:
            status = self._engine.status()
            got = status["prompt_tokens"] - before["prompt_tokens"]
            is_idle = not self._is_busy(status)
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
    what: str,
    pieces: list[tuple[NDArray[np.void], int]],
    submitted: NDArray[np.int64],
    first_id: int,
    waves: Sequence[Wave],
) -> list[Times]:
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
    all_times, first_row = [], 0
    for wave in waves:
        is_of_wave = (rows >= first_row) & (rows < first_row + wave.batch)
        shape = (wave.batch, wave.max_tokens)
        here = submitted[first_row : first_row + wave.batch]
        times = Times(here, np.zeros(wave.batch, np.int64), np.zeros(shape, np.int64), np.zeros(shape, np.int64))
        times.accepted[rows[is_ack & is_of_wave] - first_row] = entries["device_ns"][is_ack & is_of_wave]
        tokens = is_token & is_of_wave
        places = (rows[tokens] - first_row, entries["index"][tokens])
        times.device[places], times.client[places] = entries["device_ns"][tokens], seen_ns[tokens]
        if int(tokens.sum()) != times.device.size or not times.device.all() or not times.accepted.all():
            raise BenchError(
                f"{what}: {int(tokens.sum())} tokens and {int((is_ack & is_of_wave).sum())} acknowledgements came; "
                f"expected {times.device.size} and {wave.batch}; see the engine's log"
            )
        all_times.append(times)
        first_row += wave.batch
    return all_times


def steady_state(device_ns: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(request, output position) of each token whose step, and the step before, decoded all requests and nothing else."""
    begin, end = device_ns[:, 0].max(), device_ns[:, -1].min()
    is_steady = (device_ns[:, :-1] >= begin) & (device_ns[:, 1:] <= end)
    rows, columns = np.nonzero(is_steady)
    return rows, columns + 1
