"""The same requests alone and in every company: tokens, logprobs and alternatives must be the same bits.

`reference()` asks each request alone, of an engine without prefix cache. `run_case()` starts another engine, asks the same requests as CASES says
(in random batches, in chunks of several sizes, behind cached prefixes, with preemptions, in another process) and compares; each case also
proves by the device's counters that it was what it says. Called with device="emulated" by tests/host/test_determinism.py and with device="gpu" by
tests/gpu/test_determinism_gpu.py. Test: pytest tests/host/test_determinism.py
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal

import numpy as np

from blinkimp.host.emulated_device import EmulatedDevice
from blinkimp.host.engine_view import look
from blinkimp.nic_shim.queue_pair import sampling_record
from tests.host.engine_support import (
    HostProcess,
    PortClient,
    Stream,
    assert_all_pages_are_back,
    running_engine,
)
from tests.host.standing_still import standing_still

MAX_CONTEXT = 768  # tokens: the longest prompt and output, 12 pages
LONGEST_PROMPT = 600
LONGEST_OUTPUT = 96
TIMEOUT_S = 240.0  # of all requests of a case
NUM_FEW_PAGES = 16  # the growing ones alone come to want 20
BASE_SIZES = {"max_context": MAX_CONTEXT, "num_requests": 256, "max_batch": 64, "max_step_tokens": 512}


@dataclass(frozen=True)
class Request:
    prompt: list[int]
    max_tokens: int
    sampling: dict[str, Any]  # keywords of sampling_record()
    logit_bias: dict[int, float] = field(default_factory=dict)

    def submit(self, client: PortClient, **changes: Any) -> int:
        record = sampling_record(**{**self.sampling, **changes})
        return client.submit(self.prompt, self.max_tokens, record, timeout_s=TIMEOUT_S, logit_bias=self.logit_bias)

    def __str__(self) -> str:
        words = ", ".join(f"{name} {value}" for name, value in self.sampling.items())
        return f"prompt of {len(self.prompt)} tokens, {words}, {len(self.logit_bias)} biases"


def make_requests(num_requests: int, vocab: int, longest_output: int = LONGEST_OUTPUT) -> list[Request]:
    """Even ones greedy, odd ones sampled; every third begins as others do. Always the same ones."""
    rng = np.random.default_rng(64)

    def tokens(num: int) -> list[int]:
        return [int(token) for token in rng.integers(3, vocab, num)]

    prefixes = [tokens(num) for num in (150, 333)]
    lengths = [1, 64, 65, LONGEST_PROMPT, *(int(num) for num in rng.integers(2, LONGEST_PROMPT, num_requests))]
    requests = []
    for idx, length in enumerate(lengths[:num_requests]):
        prompt = tokens(length)
        if idx % 3 == 0 and length > 100:
            prefix = prefixes[idx // 3 % 2]
            prompt[: len(prefix)] = prefix[:length]
        sampling: dict[str, Any] = {"temperature": 0.0, "ignore_eos": bool(rng.random() < 0.8)}
        if idx % 2:
            sampling |= {
                "temperature": float(rng.choice([0.3, 0.8, 1.0, 2.0])),
                "top_k": int(rng.choice([0, 0, 5, 50])),
                "top_p": float(rng.choice([1.0, 0.9])),
                "min_p": float(rng.choice([0.0, 0.02])),
                "seed": int(rng.integers(1 << 62)),
            }
        if rng.random() < 0.4:
            sampling |= {"repetition_penalty": float(rng.choice([1.3, 0.8])), "frequency_penalty": 0.4}
        if rng.random() < 0.3:
            sampling["presence_penalty"] = 0.5
        sampling["num_top_logprobs"] = int(rng.choice([0, 0, 2, 20]))
        biases = dict.fromkeys(tokens(8), 2.5) if rng.random() < 0.2 else {}
        requests.append(Request(prompt, int(rng.integers(longest_output // 2, longest_output + 1)), sampling, biases))
    return requests


# ---- Cases ---------------------------------------------------------------------------------------------------------
Arrival = Literal["one by one", "at random times", "at once"]


@dataclass(frozen=True)
class Counters:
    """What the device counted in a case."""

    status: dict[str, int]
    step_counts: list[int]  # [i]: steps of more than 2^(i-1) and at most 2^i rows
    num_output_tokens: int

    def steps_above(self, num_rows: int) -> int:
        return sum(self.step_counts[num_rows.bit_length() :])  # num_rows: a power of two


@dataclass(frozen=True)
class Case:
    proof: Callable[[Counters], bool]  # that the case was what its name says
    sizes: dict[str, Any] = field(default_factory=dict)  # fields of Config
    arrival: Arrival = "at random times"
    is_own_process: bool = False
    num_growing: int = 0  # other requests before these, of one page that become four: they take pages away from these


def _chunks(max_batch: int, num_tokens: int) -> dict[str, Any]:
    return {"max_batch": max_batch, "max_step_tokens": num_tokens, "prefill_chunk_tokens": num_tokens}


def _has_preempted(seen: Counters) -> bool:
    return seen.status["preemptions"] > 0


CASES = {
    "alone-with-prefix-cache": Case(lambda seen: seen.status["prefix_hit_tokens"] > 0, arrival="one by one"),
    "batch": Case(lambda seen: sum(seen.step_counts) < seen.num_output_tokens, arrival="at once"),
    "random-batches-in-another-process": Case(
        lambda seen: sum(seen.step_counts) < seen.num_output_tokens, is_own_process=True
    ),
    "chunks-of-16": Case(lambda seen: seen.steps_above(16) == 0, _chunks(16, 16)),
    "chunks-of-64-without-prefix-cache": Case(
        lambda seen: seen.status["prefix_hit_tokens"] == seen.steps_above(64) == 0 < seen.steps_above(32),
        {**_chunks(64, 64), "prefix_cache": False},
    ),
    "chunks-of-500": Case(lambda seen: seen.steps_above(256) > 0, _chunks(64, 500)),
    "chunks-of-7-beside-others": Case(lambda seen: seen.steps_above(8) > 0, {"prefill_chunk_tokens": 7}, "at once"),
    "preemptions": Case(_has_preempted, {"num_pages": NUM_FEW_PAGES}, num_growing=5),
    "preemptions-without-prefix-cache": Case(
        _has_preempted, {"num_pages": NUM_FEW_PAGES, "prefix_cache": False}, "at once", num_growing=5
    ),
}


def reference(model: Path | str, requests: Sequence[Request], **options: Any) -> list[Stream]:
    """What each request brings alone."""
    sizes = {**BASE_SIZES, "prefix_cache": False, **options}
    with running_engine(model, **sizes) as engine, PortClient(engine.config.engine_name, 0) as client:
        streams = _ask(client, requests, list(range(len(requests))), "one by one", np.random.default_rng(0))
        assert engine.status()["prefix_hit_tokens"] == engine.status()["preemptions"] == 0
        other_seed = [request.submit(client, seed=request.sampling["seed"] + 1) for request in requests[1::2]]
        client.wait_all(TIMEOUT_S)
        num_same = sum(
            client.streams[i].tokens == stream.tokens for i, stream in zip(other_seed, streams[1::2], strict=True)
        )
    num_distinct = len({tuple(stream.tokens) for stream in streams})
    assert num_distinct > 0.7 * len(requests), f"{num_distinct} different outputs of {len(requests)} prove little"
    assert num_same < len(other_seed) / 2, f"{num_same} of {len(other_seed)} outputs do not depend on the seed"
    return streams


def run_case(
    name: str, model: Path | str, requests: Sequence[Request], expected: Sequence[Stream], **options: Any
) -> None:
    case = CASES[name]
    rng = np.random.default_rng(len(name))
    order = [int(idx) for idx in rng.permutation(len(requests))]
    with _hosted(case, model, {**BASE_SIZES, **case.sizes, **options}) as (engine_name, status, emulated_pid):
        with PortClient(engine_name, 0) as client:
            # They begin together, so that they grow together.
            with standing_still(emulated_pid) if emulated_pid else nullcontext():
                for token in range(case.num_growing):
                    client.submit([3 + token], 250)
            streams = _ask(client, requests, order, case.arrival, rng)
        assert_all_pages_are_back(status)
        num_tokens = sum(len(stream.tokens) for stream in streams)
        counters = Counters(status(), look(engine_name).step_counts, num_tokens)
    print(
        f"{name}: {num_tokens} tokens, {sum(counters.step_counts)} steps (by rows {counters.step_counts}), "
        f"{counters.status['prefix_hit_tokens']} tokens found in the prefix cache, {counters.status['preemptions']} preemptions"
    )
    assert_same_bits(name, requests, expected, streams)
    assert case.proof(counters), f"{name}: equal, but the counters say that this was another case: {counters}"


# ---- Asking --------------------------------------------------------------------------------------------------------
@contextmanager
def _hosted(
    case: Case, model: Path | str, sizes: dict[str, Any]
) -> Iterator[tuple[str, Callable[[], dict[str, int]], int]]:
    """The name of a new engine, its status, and the process of its emulated device; 0 for a GPU."""
    if case.is_own_process:
        with HostProcess(model, **sizes) as host:
            yield host.engine_name, host.status, host.device_pid
    else:
        with running_engine(model, **sizes) as engine:
            device = engine.device
            yield engine.config.engine_name, engine.status, device.pid if isinstance(device, EmulatedDevice) else 0


def _ask(
    client: PortClient, requests: Sequence[Request], order: Sequence[int], arrival: Arrival, rng: np.random.Generator
) -> list[Stream]:
    """At random times: when those before have brought some more tokens, so that prompts stand beside decode rows; some in bursts."""
    streams: dict[int, Stream] = {}
    for idx in order:
        streams[idx] = client.streams[requests[idx].submit(client)]
        if arrival == "one by one":
            client.wait_all(TIMEOUT_S)
        elif arrival == "at random times":
            num_awaited = _num_tokens(streams) + int(rng.integers(2) * rng.integers(1, 40))
            deadline = time.monotonic() + TIMEOUT_S
            while client.num_unfinished and _num_tokens(streams) < num_awaited:
                client.poll(0.05)
                assert time.monotonic() < deadline, f"no tokens for {TIMEOUT_S} s\n{client.port.dump()}"
    client.wait_all(TIMEOUT_S)
    return [streams[idx] for idx in range(len(requests))]


def _num_tokens(streams: dict[int, Stream]) -> int:
    return sum(len(stream.tokens) for stream in streams.values())


# ---- Comparing -----------------------------------------------------------------------------------------------------
def float_bits(value: float) -> int:
    """Of the fp32 that the completion carried: -0.0 is not 0.0 here, and a NaN is itself."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    return int(bits)


def outputs(stream: Stream) -> list[str]:
    """Each output of a request as text with its bits, and its end."""

    def text(token: int, logprob: float) -> str:
        return f"token {token} logprob {logprob:.7g} (0x{float_bits(logprob):08x})"

    values = [
        " ".join([text(token, logprob), *(f"top {text(*pair)}" for pair in top)])
        for token, logprob, top in zip(stream.tokens, stream.logprobs, stream.tops, strict=True)
    ]
    return [*values, f"end {stream.end}"]


def assert_same_bits(name: str, requests: Sequence[Request], expected: Sequence[Stream], got: Sequence[Stream]) -> None:
    """Fails with all requests that differ, and where the first of them begins to."""
    differences = []  # request, position, both values
    for idx, (one, other) in enumerate(zip(expected, got, strict=True)):
        pairs = zip_longest(outputs(one), outputs(other), fillvalue="nothing")
        differences += [(idx, position, *pair) for position, pair in enumerate(pairs) if pair[0] != pair[1]][:1]
    if not differences:
        return
    idx, position, alone, here = differences[0]
    where = ", ".join(f"{request_idx}@{at}" for request_idx, at, *_ in differences)
    raise AssertionError(
        f"{name}: {len(differences)} of {len(requests)} requests differ from what they bring alone (request@output: {where}).\n"
        f"request {idx} ({requests[idx]}), output {position}:\n  alone {alone}\n  {name} {here}\n"
        "Something in the step depends on what else is in it: compare logits with tests/gpu/test_model_gpu.py -k bit."
    )
