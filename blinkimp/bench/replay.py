"""A load that was: the arrivals of a live run, sent again at the same times with the same prompts, parameters and seeds.

    LoadOptions(replay=Path("arrivals.jsonl"))       # from `blinkimp trace arrivals`

The arrivals' times are the intended times of the load, so lateness of the client shows as in any open loop. Where an arrival says what it came to,
the tokens of the replay are held against it: another build of the same model must say the same, bit for bit.
Called by blinkimp/bench/load_plan.py, runner.py and the backends. Test: pytest tests/host/test_replay.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import msgspec
import numpy as np

from blinkimp.bench.errors import LoadError
from blinkimp.bench.limits import MOST_TOKENS
from blinkimp.bench.load_plan import LoadOptions, LoadPlan, check_times
from blinkimp.bench.record import Record
from blinkimp.protocol import Sampling, Submit
from blinkimp.trace.arrivals import CUT_OFF, REPEATABLE, Arrival, output_digest, read_arrivals
from blinkimp.trace.errors import TraceError

MOST_NAMED: Final = 10  # differing requests that the report names


@dataclass(frozen=True)
class ReplayPlan(LoadPlan):
    """A plan whose requests are given."""

    arrivals: tuple[Arrival, ...] = ()

    def prompt(self, idx: int) -> list[int]:
        arrival = self.arrivals[idx]
        if arrival.prompt_ids or not arrival.num_prompt_tokens:
            return arrival.prompt_ids
        random = np.random.default_rng([arrival.prompt_seed, idx])
        ids: list[int] = random.integers(0, self.vocab_size, arrival.num_prompt_tokens).tolist()
        return ids

    def arrival(self, idx: int) -> Arrival:
        return self.arrivals[idx]


def make_replay_plan(options: LoadOptions, vocab_size: int) -> ReplayPlan:
    assert options.replay is not None, "make_plan() looked"
    try:
        arrivals = read_arrivals(options.replay)
    except TraceError as error:
        raise LoadError(str(error)) from error
    if options.num_requests is not None:
        arrivals = arrivals[: options.num_requests]
    arrivals = [repeatable(arrival) for arrival in arrivals]
    for number, arrival in enumerate(arrivals, 1):
        if arrival.num_prompt_tokens > MOST_TOKENS:
            raise LoadError(
                f"{options.replay}, line {number}: got {arrival.num_prompt_tokens} prompt tokens, expected at most {MOST_TOKENS}; make it anew "
                "with `blinkimp trace arrivals`"
            )
    intended_s = np.array([arrival.at_ns for arrival in arrivals], np.float64) / 1e9 * options.time_scale
    check_times(intended_s)
    return ReplayPlan(
        options,
        intended_s,
        np.array([arrival.num_prompt_tokens for arrival in arrivals], np.int64),
        np.array([arrival.sampling.max_tokens for arrival in arrivals], np.int64),
        options.seed,
        vocab_size,
        tuple(arrivals),
    )


def repeatable(arrival: Arrival) -> Arrival:
    """A request that was cut off asks for as many tokens as it got, so that the load is the same."""
    outcome = arrival.outcome
    if outcome is None or outcome.reason not in CUT_OFF:
        return arrival
    most = len(arrival.delivered_ids) + max(1, outcome.num_output_tokens)
    sampling = msgspec.structs.replace(
        arrival.sampling, max_tokens=most, min_tokens=min(arrival.sampling.min_tokens, most)
    )
    return msgspec.structs.replace(arrival, sampling=sampling)


def submit_of(request_id: int, prompt: list[int], arrival: Arrival) -> Submit:
    """As the live run's client sent it, over ZeroMQ; prompts as ids."""
    return Submit(
        request_id,
        prompt,
        arrival.sampling,
        stream=arrival.stream,
        detokenize=arrival.detokenize,
        delivered_ids=arrival.delivered_ids,
        priority=arrival.priority,
        timeout_s=arrival.timeout_s,
        cache_salt=arrival.cache_salt,
        prefix_cache=arrival.prefix_cache,
    )


def openai_fields(arrival: Arrival) -> dict[str, Any]:
    """The same for an OpenAI-compatible server: its fields, and those that vLLM and nic_shim/HTTP.md add. Only what is not the default."""
    default, sampling = Sampling(), arrival.sampling
    if sampling.constraint is not None:
        raise LoadError(
            "replay: an arrival has a constraint, which cannot be said to every server alike; replay it with --connect"
        )
    fields: dict[str, Any] = {
        "temperature": sampling.temperature,
        "max_tokens": sampling.max_tokens,
        "seed": sampling.seed,
    }
    names = ("top_k", "top_p", "min_p", "stop_token_ids", "ignore_eos", "stop", "min_tokens", "repetition_penalty")
    for name in (*names, "presence_penalty", "frequency_penalty", "logit_bias"):
        if (value := getattr(sampling, name)) != getattr(default, name):
            fields[name] = value
    if arrival.priority:
        fields["priority"] = arrival.priority
    return fields


def compare_outputs(plan: ReplayPlan, records: list[Record]) -> dict[str, Any]:
    """How many of the outputs that can be repeated were. Records without token ids (HTTP) are not compared."""
    num_compared, differing = 0, []
    for record in records:
        outcome = plan.arrivals[record.idx].outcome
        if outcome is None or record.token_ids is None or not record.is_complete:
            continue
        if outcome.reason not in REPEATABLE and not (outcome.reason in CUT_OFF and outcome.num_output_tokens):
            continue
        num_compared += 1
        if output_digest(record.token_ids) != outcome.digest:
            differing.append(record.idx)
    return {
        "num_arrivals": len(plan.arrivals),
        "num_compared": num_compared,
        "num_identical": num_compared - len(differing),
        "differing": differing[:MOST_NAMED],
    }
