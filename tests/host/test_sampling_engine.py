"""What requests ask of the sampling op, through the queue pair and a whole emulated engine: each token is the one that the model's logits
and the request's words give, also after preemptions and in a second life; every output of a constraint matches it.

The reference computes the logits of a finished request in one step; the interpreter's bits do not depend on batch and chunks, so tokens,
logprobs and alternatives are compared exactly. Run: pytest tests/host/test_sampling_engine.py
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from blinkimp import native
from blinkimp import ring_abi as abi
from blinkimp.host.engine import Engine
from blinkimp.host.program import load_model
from blinkimp.host.reference import ReferenceRunner
from blinkimp.host.weights import HostTarget
from blinkimp.nic_shim.constraint_table import build_constraint_table
from blinkimp.nic_shim.queue_pair import PortStatus, sampling_record
from blinkimp.ring_abi import CompletionKind, FinishReason, RejectReason
from tests.host.engine_support import (
    TINY_VOCAB,
    PortClient,
    assert_all_pages_are_back,
    finished,
    make_tiny_checkpoint,
    running_engine,
    wait_for,
)
from tests.host.sampling_jobs import EOS_ID, Job, digits_table, random_job, text_of
from tests.host.standing_still import standing_still
from tests.sampling_reference import NativeSampler, Params
from tests.support import PATIENCE_S

MOST_TOKENS = 400


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny", seed=3)


@pytest.fixture(scope="module")
def sampler() -> NativeSampler:
    return NativeSampler(native.load())


@pytest.fixture(scope="module")
def runner(tiny: Path) -> ReferenceRunner:
    model = load_model(tiny, HostTarget(), compute="f32", max_context=512)
    return ReferenceRunner(model, num_requests=1, max_batch=MOST_TOKENS)


@pytest.fixture(scope="module")
def engine(tiny: Path) -> Iterator[Engine]:
    with running_engine(tiny) as running:
        yield running


@pytest.fixture
def client(engine: Engine) -> Iterator[PortClient]:
    with PortClient(engine.config.engine_name, 0) as attached:
        yield attached


def test_random_requests_side_by_side_are_what_the_words_say(
    client: PortClient, runner: ReferenceRunner, sampler: NativeSampler
) -> None:
    rng = random.Random(17)
    jobs = [random_job(rng) for _ in range(60)]
    ids = [job.submit(client) for job in jobs]
    client.wait_all(PATIENCE_S)
    for job, request_id in zip(jobs, ids, strict=True):
        job.check(client.streams[request_id], runner, sampler)
    used = [job for job in jobs if job.repetition_penalty != 1 or job.presence_penalty or job.frequency_penalty]
    assert len(used) > 20 and len({job.params.num_top_logprobs for job in jobs}) == 4


def test_preemption_keeps_counts_and_outputs(tiny: Path, runner: ReferenceRunner, sampler: NativeSampler) -> None:
    rng = random.Random(5)
    with running_engine(tiny, num_pages=9, max_context=256, max_batch=8, prefix_cache=False) as engine:
        with PortClient(engine.config.engine_name, 0) as client:
            table = digits_table()
            assert client.port.load_constraint(0, table.data) == PortStatus.OK
            jobs = [random_job(rng, longest_prompt=60, max_tokens=150) for _ in range(24)]
            for job in jobs[::3]:
                job.table, job.slot, job.min_tokens, job.stop_ids = table, 0, 0, ()
            for job in jobs:
                job.max_tokens, job.ignore_eos = 110, job.table is None
                job.stop_ids = ()
            with standing_still(engine.device.pid):  # so that they run side by side, and want pages at once
                ids = [job.submit(client) for job in jobs]
            client.wait_all(PATIENCE_S)
            for job, request_id in zip(jobs, ids, strict=True):
                job.check(client.streams[request_id], runner, sampler)
        assert_all_pages_are_back(engine.status)
        assert engine.status()["preemptions"] >= 3


def test_second_life_goes_on_as_the_first(client: PortClient, runner: ReferenceRunner, sampler: NativeSampler) -> None:
    """num_prior_outputs: positions, counts and the constraint go on where the outputs in the prompt end."""
    table = digits_table()
    assert client.port.load_constraint(1, table.data) == PortStatus.OK
    rng = random.Random(8)
    for i in range(8):
        job = random_job(rng, max_tokens=30)
        job.max_tokens, job.min_tokens, job.ignore_eos, job.stop_ids = 20, 12, i % 2 == 1, ()
        job.repetition_penalty, job.frequency_penalty = 1.2, 0.3
        if i % 2 == 0:
            job.table, job.slot, job.min_tokens = table, 1, 0
        whole = client.streams[job.submit(client)]
        client.wait_all(PATIENCE_S)
        job.check(whole, runner, sampler)
        num_delivered = min(9, len(whole.tokens) - 1)
        if num_delivered < 1:
            continue
        state = 0
        for token in whole.tokens[:num_delivered]:
            state = table.next_state(state, token) or 0 if job.table is not None else 0
        job.prompt = job.prompt + whole.tokens[:num_delivered]
        job.max_tokens, job.num_prior_outputs, job.state = job.max_tokens - num_delivered, num_delivered, state
        rest = client.streams[job.submit(client)]
        client.wait_all(PATIENCE_S)
        assert rest.tokens == whole.tokens[num_delivered:] and rest.end == whole.end
        job.check(rest, runner, sampler)


# ---- Constraints -----------------------------------------------------------------------------------------------------
def test_every_output_of_a_constraint_matches(
    client: PortClient, runner: ReferenceRunner, sampler: NativeSampler
) -> None:
    table = digits_table()
    assert client.port.load_constraint(2, table.data) == PortStatus.OK
    rng = random.Random(23)
    jobs = []
    for seed in range(60):
        params = Params(temperature=rng.choice([0.0, 1.0, 5.0]), seed=seed, top_p=rng.choice([1.0, 0.8]))
        prompt = [rng.randrange(3, 200) for _ in range(rng.randint(1, 20))]
        jobs.append(Job(prompt, 40, params, logit_bias={EOS_ID: 2.0}, table=table, slot=2))
    ids = [job.submit(client) for job in jobs]
    client.wait_all(PATIENCE_S)
    texts = []
    for job, request_id in zip(jobs, ids, strict=True):
        stream = client.streams[request_id]
        job.check(stream, runner, sampler)
        text = "".join(text_of(token) for token in stream.tokens if token != EOS_ID)
        whole = re.fullmatch(r"\d{1,3}(-[a-f]+)*", text)
        assert whole or (stream.end == finished(FinishReason.LENGTH) and re.fullmatch(r"\d{1,3}(-[a-f]+)*-?", text)), (
            text
        )
        texts.append(text)
    assert len(set(texts)) > 20


def test_constraint_without_a_way_on_finishes_the_request(client: PortClient, engine: Engine) -> None:
    table = build_constraint_table(TINY_VOCAB, [{50: 1}, {60: 2}, {EOS_ID: 2}], max_bytes=1 << 16)
    assert client.port.load_constraint(0, table.data) == PortStatus.OK
    before = engine.status()["finished_constraint"]
    stream = client.generate([7, 8], 10, sampling=sampling_record(min_tokens=8, seed=1), constraint_slot=0)
    assert stream.tokens == [50, 60] and stream.end == finished(FinishReason.CONSTRAINT)
    stream = client.generate([7, 8], 10, sampling=sampling_record(seed=1), constraint_slot=0)
    assert stream.tokens == [50, 60, EOS_ID] and stream.end == finished(FinishReason.EOS)
    assert client.generate([3, 4, 5], 4).end == finished(FinishReason.LENGTH), "others go on"
    wait_for(lambda: engine.status()["finished_constraint"] == before + 1, PATIENCE_S, "it is counted")


@pytest.mark.parametrize(
    "damage", ["empty slot", "no such slot", "state", "vocabulary", "sizes", "truncated", "no states"]
)
def test_constraint_that_is_not_whole_is_rejected(client: PortClient, damage: str) -> None:
    data = bytearray(digits_table().data)
    words = np.frombuffer(data, np.uint32, 4)
    slot, state = 3, 0
    match damage:
        case "no such slot":
            slot = client.port.num_constraint_slots
        case "state":
            state = 6
        case "vocabulary":
            words[1] += 1
        case "sizes":
            words[3] += 1
        case "no states":
            words[2] = 0
        case "truncated":
            data = data[:-2]
    loaded = client.port.load_constraint(slot if damage != "no such slot" else 0, bytes(data))
    assert loaded == PortStatus.OK
    if damage == "empty slot":
        slot = 5
    rejected = (CompletionKind.REJECT, int(RejectReason.BAD_CONSTRAINT))
    assert client.generate([7, 8], 4, constraint_slot=slot, constraint_state=state).end == rejected
    assert client.port.load_constraint(3, digits_table().data) == PortStatus.OK, "the slot is as good as new"
    assert client.generate([7, 8], 4, constraint_slot=3).end in (
        finished(FinishReason.LENGTH),
        finished(FinishReason.EOS),
    )


def test_slots_of_queue_pairs_are_their_own(client: PortClient, engine: Engine) -> None:
    assert client.port.load_constraint(7, digits_table().data) == PortStatus.OK
    with PortClient(engine.config.engine_name, 1) as other:
        end = other.generate([7, 8], 4, constraint_slot=7).end
        assert end == (CompletionKind.REJECT, int(RejectReason.BAD_CONSTRAINT))


# ---- Anything at all -------------------------------------------------------------------------------------------------
def test_random_words_and_automata_are_rejected_or_served(tiny: Path) -> None:
    """No combination of words, and no bytes in a constraint's slot, can fault the engine or stop the others."""
    rng = np.random.default_rng(99)
    num_requests = 2500
    with running_engine(tiny, max_batch=32) as engine, PortClient(engine.config.engine_name, 0) as client:
        for i in range(num_requests):
            if i % 25 == 0:
                load_random_constraint(client, rng)
            sampling = sampling_record(
                temperature=float(rng.choice([0.0, 1.0, 1e30, 1e-30, -1.0, np.nan])),
                top_p=float(rng.choice([1.0, 0.5, 1e-30, 0.0])),
                top_k=int(rng.choice([0, 1, 40, 2**32 - 1])),
                min_p=float(rng.choice([0.0, 1.0, 0.1])),
                seed=int(rng.integers(0, 2**63)),
                min_tokens=int(rng.choice([0, 2, 2**32 - 1])),
                repetition_penalty=float(rng.choice([0.0, 1.0, 1.5, 1e-30, 1e30, -1.0])),
                presence_penalty=float(rng.choice([0.0, 2.0, -2.0, 2.5])),
                frequency_penalty=float(rng.choice([0.0, 2.0, -2.0, np.inf])),
                num_top_logprobs=int(rng.choice([0, 0, 3, 20, 21])),
            )
            bias_ids = rng.integers(0, TINY_VOCAB + (i % 40 == 0), int(rng.choice([0, 0, 5, 512])))
            bias = {int(token): float(rng.choice([1.0, -1e38, 3e38, 0.0])) for token in bias_ids}
            if i % 50 == 0:
                bias[0] = float("nan")
            prompt = rng.integers(0, TINY_VOCAB, int(rng.integers(1, 40))).tolist()
            client.submit(
                prompt,
                int(rng.integers(1, 4)),
                sampling,
                tuple(int(token) for token in rng.integers(0, TINY_VOCAB, int(rng.integers(0, 17)))),
                logit_bias=bias,
                num_prior_outputs=int(rng.choice([0, 0, 1, len(prompt), len(prompt) + 1])),
                constraint_slot=int(rng.integers(0, 9)) if rng.random() < 0.4 else None,
                constraint_state=int(rng.choice([0, 1, 5, 65535, 2**32 - 1])),
                flags=int(rng.choice([0, 1, 0, 1, 2])),
                cache_salt=int(rng.integers(0, 3)),
            )
        client.wait_all(PATIENCE_S)
        ends: dict[tuple[CompletionKind, int], int] = {}
        for stream in client.streams.values():
            assert stream.end is not None
            ends[stream.end] = ends.get(stream.end, 0) + 1
            assert all(0 <= token < TINY_VOCAB for token in stream.tokens)
        assert sum(count for (kind, _), count in ends.items() if kind == CompletionKind.FINISH) > 100, ends
        for reason in (RejectReason.BAD_SAMPLING, RejectReason.MALFORMED, RejectReason.BAD_CONSTRAINT):
            assert ends.get((CompletionKind.REJECT, int(reason)), 0) > 10, ends
        assert client.generate([1, 2, 3], 5).end == finished(FinishReason.LENGTH)
        wait_for(lambda: engine.status()["num_pages_used"] == 0, PATIENCE_S, "pages are back")


def load_random_constraint(client: PortClient, rng: np.random.Generator) -> None:
    """A good table with some bytes changed, or with a header that fits and nothing else."""
    data = bytearray(digits_table().data)
    begin = int(rng.choice([0, abi.CONSTRAINT_HEADER.itemsize]))
    for place in rng.integers(begin, len(data), int(rng.choice([0, 1, 50, 5000]))):
        data[place] = int(rng.integers(0, 256))
    assert client.port.load_constraint(int(rng.integers(0, 8)), bytes(data)) == PortStatus.OK
