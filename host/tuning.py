"""Changes limits of the schedule while an engine runs: the words of ControlLine (device/ring_abi.h).

The director reads them when tuning_generation changes and says in its status which generation it obeys. Called by host/engine.py and
`blinkimp tune`. Test: pytest tests/host/test_tune.py
"""

from __future__ import annotations

import time
from typing import Any, Final

from blinkimp import ring_abi as abi

WORDS: Final = ("max_running", "step_tokens", "prefill_chunk_tokens", "aging_ms")
NEVER: Final = 0xFFFFFFFF  # of aging_ms
_POLL_S: Final = 0.001


class TuningError(ValueError):
    """A word outside its range, or an engine that does not obey."""


def write_tuning(page: Any, timeout_s: float, **words: int | None) -> dict[str, int]:
    """Sets words on an engine page ([1] ENGINE_PAGE, mapped writable) and waits until the director obeys them. None keeps a word, 0 is as
    launched, more than the engine was launched for counts as that. Returns all words as they stand now."""
    control, status = page["control"], page["status"]
    for name, value in words.items():
        if name not in WORDS:
            raise TuningError(f"{name} cannot be tuned; expected one of {', '.join(WORDS)}")
        if value is not None and not 0 <= value <= 0xFFFFFFFF:
            raise TuningError(f"{name}: got {value}, expected 0 (as launched) to {0xFFFFFFFF}")
    for name, value in words.items():
        if value is not None:
            control[name][0] = value
    # Written last: what the director sees under this generation is whole. A page of one writer needs no lock; 0 is "never tuned".
    generation = int(control["tuning_generation"][0]) % 0xFFFFFFFF + 1
    control["tuning_generation"][0] = generation
    deadline = time.monotonic() + timeout_s
    while int(status["tuning_generation"][0]) != generation:
        if time.monotonic() >= deadline:
            state = abi.EngineState(int(status["state"][0])).name.lower()
            raise TuningError(
                f"the engine ({state}) has not obeyed within {timeout_s:g} s; expected tuning generation {generation}, got "
                f"{int(status['tuning_generation'][0])}; check that it runs"
            )
        time.sleep(_POLL_S)
    return {name: int(control[name][0]) for name in WORDS}
