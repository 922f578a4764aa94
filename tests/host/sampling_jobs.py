"""One request with all it can ask of the sampling op, and what each of its tokens must then be; a small token automaton.

Used by tests/host/test_sampling_engine.py.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from blinkimp.host.reference import Chunk, ReferenceRunner
from blinkimp.nic_shim.constraint_table import ConstraintTable, build_constraint_table
from blinkimp.nic_shim.queue_pair import sampling_record
from blinkimp.ring_abi import FinishReason
from tests.host.engine_support import TINY_VOCAB, PortClient, Stream, finished
from tests.sampling_reference import PROMPT_BIT, Edits, NativeSampler, Params

EOS_ID = 2


@dataclass
class Job:
    """One request with everything it asks for."""

    prompt: list[int]
    max_tokens: int
    params: Params = field(default_factory=lambda: Params(temperature=0.0))
    min_tokens: int = 0
    ignore_eos: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    stop_ids: tuple[int, ...] = ()
    num_prior_outputs: int = 0
    table: ConstraintTable | None = None
    slot: int | None = None
    state: int = 0

    def submit(self, client: PortClient) -> int:
        params = self.params
        sampling = sampling_record(
            temperature=params.temperature,
            top_k=params.top_k,
            top_p=params.top_p,
            min_p=params.min_p,
            seed=params.seed,
            num_top_logprobs=params.num_top_logprobs,
            ignore_eos=self.ignore_eos,
            min_tokens=self.min_tokens,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
        )
        return client.submit(
            self.prompt,
            self.max_tokens,
            sampling,
            self.stop_ids,
            logit_bias=self.logit_bias,
            num_prior_outputs=self.num_prior_outputs,
            constraint_slot=self.slot,
            constraint_state=self.state,
        )

    def check(self, stream: Stream, runner: ReferenceRunner, sampler: NativeSampler) -> None:
        """Every token, logprob and alternative, and the end."""
        tokens = self.prompt + stream.tokens
        logits = runner.step([Chunk(0, tokens, sample="all", position_begin=0)]).logits
        state = self.state
        for i, token in enumerate(stream.tokens):
            output_idx = self.num_prior_outputs + i
            first_output = len(self.prompt) - self.num_prior_outputs
            counts = np.zeros(TINY_VOCAB, dtype=np.uint16)
            for seen in tokens[first_output : len(self.prompt) + i]:
                counts[seen] += 1
            counts[tokens[:first_output]] |= np.uint16(PROMPT_BIT)
            edits = Edits(
                bias=tuple(self.logit_bias.items()),
                banned=(*self.stop_ids, EOS_ID) if output_idx < self.min_tokens else (),
                counts=counts,
                repetition_penalty=self.repetition_penalty,
                presence_penalty=self.presence_penalty,
                frequency_penalty=self.frequency_penalty,
                table=self.table,
                state=state,
            )
            row = np.ascontiguousarray(logits[len(self.prompt) + i - 1])
            expected = sampler.sample_with_top(row, self.params, output_idx, edits=edits)
            assert (token, stream.logprobs[i], stream.tops[i]) == expected, f"output {i} of {self}"
            if self.table is not None:
                state = self.table.next_state(state, token) or 0
        ends_on = {*(() if self.ignore_eos else (EOS_ID,)), *self.stop_ids}
        assert not ends_on & set(stream.tokens[:-1])
        if stream.tokens[-1] == EOS_ID and not self.ignore_eos:
            assert stream.end == finished(FinishReason.EOS)
        elif stream.tokens[-1] in self.stop_ids:
            assert stream.end == finished(FinishReason.STOP_ID)
        else:
            assert stream.end == finished(FinishReason.LENGTH) and len(stream.tokens) == self.max_tokens


def random_job(rng: random.Random, longest_prompt: int = 90, max_tokens: int = 24) -> Job:
    job = Job([rng.randrange(3, TINY_VOCAB) for _ in range(rng.randint(1, longest_prompt))], rng.randint(1, max_tokens))
    job.params = Params(
        temperature=rng.choice([0.0, 0.7, 1.0, 3.0]),
        top_k=rng.choice([0, 0, 5, 60]),
        top_p=rng.choice([1.0, 0.9]),
        min_p=rng.choice([0.0, 0.02]),
        seed=rng.getrandbits(64),
        num_top_logprobs=rng.choice([0, 0, 1, 7, 20]),
    )
    if rng.random() < 0.5:
        job.repetition_penalty = rng.choice([1.3, 0.8])
    if rng.random() < 0.4:
        job.presence_penalty, job.frequency_penalty = rng.choice([0.5, -0.25]), rng.choice([0.0, 1.5, -0.5])
    if rng.random() < 0.4:
        job.logit_bias = {
            rng.randrange(TINY_VOCAB): rng.choice([-100.0, -2.0, 3.0]) for _ in range(rng.choice([1, 30, 200]))
        }
    if rng.random() < 0.4:
        job.min_tokens, job.stop_ids = rng.randint(1, max_tokens), tuple(rng.sample(range(3, TINY_VOCAB), 4))
        job.logit_bias[EOS_ID] = job.logit_bias[job.stop_ids[0]] = 4.0  # so that something is held back
    job.ignore_eos = rng.random() < 0.3
    return job


# ---- An automaton --------------------------------------------------------------------------------------------------
PIECES = {200 + i: text for i, text in enumerate(["12", "-a", "34", "ab", "7-", "zz", "0", "ff", "9-cafe", ""])}


def text_of(token: int) -> str:
    """The tiny vocabulary: bytes, and a few longer pieces."""
    return PIECES.get(token, chr(token))


def table_of_dfa(step: Any, num_states: int, accepting: set[int]) -> ConstraintTable:
    """step(state, character) -> state or None. A token is allowed where all its characters are, and has some."""
    rows: list[dict[int, int]] = []
    for start in range(num_states):
        row = {}
        for token in range(TINY_VOCAB):
            state: int | None = start
            for character in text_of(token):
                state = step(state, character) if state is not None else None
            if state is not None and text_of(token) and token != EOS_ID:
                row[token] = state
        rows.append(row)
    return build_constraint_table(TINY_VOCAB, rows, max_bytes=1 << 20, accepting=accepting, eos_ids=(EOS_ID,))


def digits_table() -> ConstraintTable:
    r"""\d{1,3}(-[a-f]+)* over the tiny vocabulary."""

    def step(state: int, character: str) -> int | None:
        if state < 3 and character in "0123456789":
            return state + 1
        if 1 <= state <= 3 and character == "-":
            return 4
        if state in (4, 5) and character in "abcdef":
            return 5
        return 4 if state == 5 and character == "-" else None

    return table_of_dfa(step, 6, {1, 2, 3, 5})
