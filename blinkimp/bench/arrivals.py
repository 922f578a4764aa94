"""When requests of an open loop are meant to be sent: Poisson, bursty or even arrivals, with a ramp.

Intervals are gamma distributed with shape `burstiness` and mean 1/rate: 1 is Poisson, below 1 comes in bursts, above 1 is more even, infinity is
a metronome. A ramp raises the rate linearly from 0; arrivals keep their character, for it is their clock that is stretched.
Called by blinkimp/bench/load_plan.py. Test: pytest tests/null/test_bench_plan.py
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from blinkimp.bench.errors import LoadError

BLOCK: int = 4096  # intervals drawn at a time
LEAST_BURSTINESS: Final = 0.001  # below, next to all intervals are 0, and the others never come


def arrival_times(
    random: np.random.Generator,
    *,
    rate: float,
    burstiness: float = 1.0,
    ramp_s: float = 0.0,
    num_requests: int | None = None,
    duration_s: float | None = None,
) -> NDArray[np.float64]:
    """Seconds from the start, ascending: num_requests of them, or all before duration_s."""
    if rate <= 0 or not burstiness >= LEAST_BURSTINESS or ramp_s < 0 or (num_requests is None) == (duration_s is None):
        raise LoadError(
            f"arrivals: got rate {rate}, burstiness {burstiness}, ramp {ramp_s} s, {num_requests} requests, {duration_s} s; expected "
            f"a positive rate, a burstiness of at least {LEAST_BURSTINESS}, a ramp of at least 0, and either a number of requests or a duration"
        )
    # Arrivals of a steady process with mean interval 1, then each moved to where the ramped process has had as many.
    pieces: list[NDArray[np.float64]] = []
    reached, num_drawn = 0.0, 0
    most = math.inf if duration_s is None else expected_before(duration_s, rate, ramp_s)
    while num_drawn < (num_requests or math.inf) and reached < most:
        gaps = np.ones(BLOCK) if math.isinf(burstiness) else random.gamma(burstiness, 1 / burstiness, BLOCK)
        piece = reached + np.cumsum(gaps)
        pieces.append(piece)
        reached, num_drawn = float(piece[-1]), num_drawn + BLOCK
    counted = np.concatenate(pieces)
    times = np.where(counted < rate * ramp_s / 2, np.sqrt(2 * ramp_s * counted / rate), counted / rate + ramp_s / 2)
    return times[:num_requests] if duration_s is None else times[times < duration_s]


def expected_before(seconds: float, rate: float, ramp_s: float) -> float:
    """Arrivals expected in the first so many seconds."""
    if seconds < ramp_s:
        return rate * seconds**2 / (2 * ramp_s)
    return rate * (seconds - ramp_s / 2)
