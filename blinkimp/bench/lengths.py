"""How long prompts and outputs of a load are: fixed, random in a range, like ShareGPT's, or from a trace.

Lengths are tokens. The ShareGPT-like ones are synthetic: two log-normal modes each for prompts and outputs, with the means of that data set as
papers give them (161 and 338 tokens); nothing of the data set itself is in here.
Called by blinkimp/bench/load_plan.py. Test: pytest tests/null/test_bench_plan.py
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from blinkimp.bench.errors import LoadError

Lengths = tuple[NDArray[np.int64], NDArray[np.int64]]  # prompt and output tokens of each request


@dataclass(frozen=True)
class Mode:
    """A log-normal distribution with its share of a mixture."""

    share: float
    median: float
    sigma: float


SHAREGPT_PROMPT: Final = (Mode(0.6, 20.0, 0.8), Mode(0.4, 220.0, 1.0))
SHAREGPT_OUTPUT: Final = (Mode(0.3, 30.0, 0.9), Mode(0.7, 387.0, 0.6))
SHAREGPT_LEAST: Final = 4
SHAREGPT_MOST: Final = 2048  # of prompt and output each


def fixed(num_requests: int, input_len: int, output_len: int) -> Lengths:
    return np.full(num_requests, input_len, np.int64), np.full(num_requests, output_len, np.int64)


def random_range(
    random: np.random.Generator, num_requests: int, input_len: int, output_len: int, ratio: float
) -> Lengths:
    """Uniform in [ratio * L, L], prompts and outputs independently."""
    if not 0 < ratio <= 1:
        raise LoadError(f"range ratio: got {ratio}, expected above 0, at most 1 (all lengths alike)")

    def draw(most: int) -> NDArray[np.int64]:
        return random.integers(max(1, round(ratio * most)), most + 1, num_requests)

    return draw(input_len), draw(output_len)


def mixture(random: np.random.Generator, num_requests: int, modes: tuple[Mode, ...]) -> NDArray[np.int64]:
    which = random.choice(len(modes), num_requests, p=[mode.share for mode in modes])
    medians, sigmas = np.array([mode.median for mode in modes]), np.array([mode.sigma for mode in modes])
    drawn = medians[which] * np.exp(sigmas[which] * random.standard_normal(num_requests))
    return np.asarray(np.clip(np.rint(drawn), SHAREGPT_LEAST, SHAREGPT_MOST), np.int64)


def sharegpt_like(random: np.random.Generator, num_requests: int, max_total: int | None) -> Lengths:
    """Synthetic. Pairs that exceed max_total tokens together are scaled down to it."""
    inputs, outputs = mixture(random, num_requests, SHAREGPT_PROMPT), mixture(random, num_requests, SHAREGPT_OUTPUT)
    if max_total is not None:
        scale = np.minimum(1.0, max_total / (inputs + outputs))
        inputs = np.maximum(1, np.floor(inputs * scale)).astype(np.int64)
        outputs = np.maximum(1, np.floor(outputs * scale)).astype(np.int64)
    return inputs, outputs
