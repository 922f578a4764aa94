"""Paged attention in float64 numpy, and steps of ragged requests to hold device/attention.cuh against it.

A Step holds everything the kernel reads, poisoned where it must not look: pages of nobody and keys past a context are NaN.
Used by tests/host/test_attention_simt.py (emulated warps) and tests/gpu/test_attention.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from blinkimp import ring_abi

PAGE = ring_abi.PAGE_TOKENS
SPLIT_TOKENS = 4 * PAGE  # kSplitTokens of device/portable/attention_math.cuh
POISON = 0xFFFF  # a bf16 NaN

Array = np.ndarray[Any, Any]

ARGS = np.dtype(  # AttentionArgs of device/attention_schedule.cuh
    [
        ("seqs", "<u8"),
        *(
            (name, "<u4")
            for name in ("num_seqs", "num_heads", "num_kv_heads", "group", "window", "max_pages_per_request")
        ),
        ("scale", "<f4"),
        *((name, "<u4") for name in ("cta_idx", "num_ctas", "num_slots")),
        *((name, "<u8") for name in ("page_tables", "query", "kv", "part_outputs", "part_softmax")),
    ]
)
assert ARGS.itemsize == 88


def to_bf16(values: Array) -> Array:
    """float32 to bf16 bits, rounded to nearest even."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << 16).view(np.float32)


@dataclass(frozen=True)
class Shape:
    num_heads: int
    num_kv_heads: int
    head_dim: int
    window: int = 0

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads


@dataclass
class Sequence:
    """All tokens of one request: bf16 bits of q [tokens, num_heads, head_dim], k and v [tokens, num_kv_heads, head_dim]."""

    query: Array
    key: Array
    value: Array

    @property
    def num_tokens(self) -> int:
        return int(self.query.shape[0])


def random_sequence(rng: np.random.Generator, shape: Shape, num_tokens: int, sharpness: float = 1.0) -> Sequence:
    """sharpness > 1 makes softmax peaky, so that one wrong key shows."""

    def normal(num_heads: int, scale: float) -> Array:
        return to_bf16(
            rng.standard_normal((num_tokens, num_heads, shape.head_dim), dtype=np.float32) * np.float32(scale)
        )

    return Sequence(
        normal(shape.num_heads, sharpness), normal(shape.num_kv_heads, 1.0), normal(shape.num_kv_heads, 1.0)
    )


def rising_sequence(rng: np.random.Generator, shape: Shape, num_tokens: int, powers: float) -> Sequence:
    """Scores that rise from page to page of a split by about so many powers of two (fall, if negative), and begin anew with the next split."""
    sequence = random_sequence(rng, shape, num_tokens)
    level = np.arange(num_tokens) // PAGE % (SPLIT_TOKENS // PAGE) * powers
    sequence.query[..., 0] = to_bf16(np.array([8.0], np.float32))
    sequence.key[..., 0] = to_bf16(level * np.sqrt(shape.head_dim) / (np.log2(np.e) * 8.0))[:, None]
    return sequence


def exact_rows(shape: Shape, sequence: Sequence, begin: int, end: int) -> tuple[Array, Array]:
    """Attention of tokens [begin, end), both [end - begin, num_heads, head_dim] float64: (outputs, sums of weight x |value|)."""
    query = (
        from_bf16(sequence.query[begin:end]).astype(np.float64).transpose(1, 0, 2)
    )  # [head, token, dimension], as below
    key, value = (
        np.repeat(from_bf16(of_kv_heads[:end]).astype(np.float64).transpose(1, 0, 2), shape.group, axis=0)
        for of_kv_heads in (sequence.key, sequence.value)
    )
    scores = query @ key.transpose(0, 2, 1) / np.sqrt(shape.head_dim)
    position, key_idx = np.arange(begin, end)[:, None], np.arange(end)[None, :]
    visible = key_idx <= position
    if shape.window:
        visible &= key_idx > position - shape.window
    scores = np.where(visible[None], scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    weights /= weights.sum(axis=2, keepdims=True)
    return (weights @ value).transpose(1, 0, 2), (weights @ np.abs(value)).transpose(1, 0, 2)


@dataclass
class Share:
    """Tokens [begin, end) of a sequence are computed in the step; keys before `end` are in its pages."""

    sequence: Sequence
    begin: int
    end: int


@dataclass
class Step:
    shape: Shape
    shares: list[Share]
    seqs: Array  # PLAN_SEQ
    query: Array  # bf16 [rows, num_heads, head_dim]
    kv: Array  # bf16 [num_pages, num_kv_heads, 2, PAGE, head_dim]
    page_tables: Array  # u32 [num_requests, max_pages]
    num_slots: int

    @property
    def num_rows(self) -> int:
        return int(self.query.shape[0])

    def args(self, num_ctas: int, addresses: dict[str, int]) -> Array:
        """addresses: of seqs, page_tables, query, kv, part_outputs, part_softmax."""
        record = np.zeros(1, dtype=ARGS)
        values = {
            "num_seqs": len(self.shares),
            "num_heads": self.shape.num_heads,
            "num_kv_heads": self.shape.num_kv_heads,
            "group": self.shape.group,
            "window": self.shape.window,
            "max_pages_per_request": self.page_tables.shape[1],
            "scale": np.float32(np.log2(np.e) / np.sqrt(self.shape.head_dim)),
            "num_ctas": num_ctas,
            "num_slots": self.num_slots,
            **addresses,
        }
        for name, value in values.items():
            record[name] = value
        return record

    def expected(self) -> tuple[Array, Array]:
        """(outputs, sums of weight x |value|), both [rows, num_heads, head_dim] float64"""
        rows = [exact_rows(self.shape, one.sequence, one.begin, one.end) for one in self.shares]
        return np.concatenate([outputs for outputs, _ in rows]), np.concatenate([sums for _, sums in rows])


def make_step(rng: np.random.Generator, shape: Shape, shares: list[Share], num_slots: int | None = None) -> Step:
    """Pages are handed out at random; rows follow each other in the order of shares."""
    num_pages = [(one.end + PAGE - 1) // PAGE for one in shares]
    max_pages = max(num_pages) + 1
    page_ids = rng.permutation(sum(num_pages) + 3)
    kv = np.full((page_ids.size, shape.num_kv_heads, 2, PAGE, shape.head_dim), POISON, dtype=np.uint16)
    request_ids = rng.permutation(len(shares) + 2)[: len(shares)]
    page_tables = np.full((len(shares) + 2, max_pages), 0x7FFFFFFF, dtype=np.uint32)
    seqs = np.zeros(len(shares), dtype=ring_abi.PLAN_SEQ)
    row, next_page = 0, 0
    for i, one in enumerate(shares):
        own = page_ids[next_page : next_page + num_pages[i]]
        next_page += num_pages[i]
        page_tables[request_ids[i], : own.size] = own
        for page in range(own.size):
            tokens = slice(page * PAGE, min((page + 1) * PAGE, one.end))
            count = tokens.stop - tokens.start
            kv[own[page], :, 0, :count] = one.sequence.key[tokens].transpose(1, 0, 2)
            kv[own[page], :, 1, :count] = one.sequence.value[tokens].transpose(1, 0, 2)
        seqs[i]["request_idx"], seqs[i]["row_begin"] = request_ids[i], row
        seqs[i]["num_rows"], seqs[i]["position_begin"] = one.end - one.begin, one.begin
        row += one.end - one.begin
    query = np.concatenate([one.sequence.query[one.begin : one.end] for one in shares])
    slots = sum((one.end + SPLIT_TOKENS - 1) // SPLIT_TOKENS for one in shares) if num_slots is None else num_slots
    return Step(shape, shares, seqs, query, kv, page_tables, slots)


RunStep = Callable[[Step, int], Array]  # (step, num_ctas) -> bf16 bits [rows, num_heads, head_dim]


BF16_ROUNDING = 2.0**-8  # at most, of a value: bf16 keeps 8 bits
REST = 2.0**-10  # of exponentials, sums and products in fp32


def errors(step: Step, output: Array) -> tuple[Array, Array]:
    """(errors, what bf16 allows) of each output: weights are rounded, which their sum is not, and outputs are.

    A weight of one would be exact, but the largest of a row need not be one (raised_maximum() of device/attention_math.cuh).
    """
    exact, sums = step.expected()
    allowed = (BF16_ROUNDING + REST) * sums + BF16_ROUNDING * np.abs(exact)
    return np.abs(from_bf16(output).astype(np.float64) - exact), allowed


def check_step(run: RunStep, step: Step, num_ctas: int) -> Array:
    output = run(step, num_ctas)
    assert output.shape == step.query.shape
    unwritten = int((output == POISON).sum())
    assert unwritten == 0, f"{unwritten} of {output.size} outputs were not written, or are NaN"
    error, allowed = errors(step, output)
    # No quotient: a value of zero allows nothing, and has no error.
    worst = np.unravel_index((error - allowed).argmax(), error.shape)
    assert error[worst] <= allowed[worst], (
        f"error {error[worst]:.5f} > {allowed[worst]:.5f} at [row, head, dimension] {worst}"
    )
    return output


def check_spans(
    run: RunStep,
    rng: np.random.Generator,
    shape: Shape,
    spans: Iterable[tuple[int, int]],
    num_ctas: int,
    sharpness: float = 2.0,
) -> None:
    """One step of sequences of their own: of each its tokens [begin, end)."""
    shares = [Share(random_sequence(rng, shape, end, sharpness), begin, end) for begin, end in spans]
    check_step(run, make_step(rng, shape, shares), num_ctas)


def decode_rows(contexts: Iterable[int]) -> list[tuple[int, int]]:
    """Spans of one token each, the last one of such a context."""
    return [(int(context) - 1, int(context)) for context in contexts]


def check_grids(
    run: RunStep, rng: np.random.Generator, shape: Shape, spans: list[tuple[int, int]], grids: list[int]
) -> None:
    """As many CTAs as each of `grids` says: the same bits."""
    step = make_step(rng, shape, [Share(random_sequence(rng, shape, end), begin, end) for begin, end in spans])
    outputs = [run(step, num_ctas) for num_ctas in grids]
    for output in outputs[1:]:
        assert (output == outputs[0]).all()


def check_that_a_planted_wrong_key_is_seen(run: RunStep, rng: np.random.Generator) -> None:
    """The comparison can fail: one visible key that differs from the reference's."""
    shape = Shape(2, 1, 64)
    sequence = random_sequence(rng, shape, 100, 2.0)
    step = make_step(rng, shape, [Share(sequence, 99, 100)])
    step.kv[step.page_tables[step.seqs["request_idx"][0], 1], 0, 0, 30] = sequence.query[99, 0]
    with pytest.raises(AssertionError, match=r"error .* at"):
        check_step(run, step, num_ctas=1)


def check_chunking(
    run: RunStep, rng: np.random.Generator, shape: Shape, num_tokens: int, chunkings: list[list[int]], num_ctas: int,
    sequence: Sequence | None = None,
) -> None:  # fmt: skip
    """The rows of a sequence, computed in chunks of the given sizes beside other requests, are the same to the last bit."""
    sequence = sequence or random_sequence(rng, shape, num_tokens, 2.0)
    whole = run(make_step(rng, shape, [Share(sequence, 0, num_tokens)]), num_ctas)
    for chunks in chunkings:
        assert sum(chunks) == num_tokens
        begin = 0
        for chunk in chunks:
            other = random_sequence(rng, shape, int(rng.integers(1, 300)))
            shares = [
                Share(other, int(rng.integers(0, other.num_tokens)), other.num_tokens),
                Share(sequence, begin, begin + chunk),
            ]
            own_first = bool(rng.integers(2))
            step = make_step(rng, shape, shares[::-1] if own_first else shares, int(rng.integers(0, 40)))
            output = run(step, int(rng.integers(1, num_ctas + 1)))
            rows = output[:chunk] if own_first else output[-chunk:]
            different = int((rows != whole[begin : begin + chunk]).sum())
            assert different == 0, (
                f"{different} outputs of tokens {begin}..{begin + chunk} differ from the unchunked run"
            )
            begin += chunk
