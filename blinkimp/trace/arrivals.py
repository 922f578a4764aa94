"""Arrivals: what a live run was asked, so that another build can be asked the same at the same times.

    arrivals = collect_arrivals([Path("captured")])      # folders of an ingress's captures, .jsonl files, or a recorded trace
    write_arrivals(Path("arrivals.jsonl"), arrivals)     # for blinkimp bench --replay

A capture (nic_shim/arrival_capture.py) has prompts and every sampling parameter, the drawn seed too: its replay gives the same tokens, bit for
bit, and the digest of each output says whether it did. A recorded trace has times and lengths only: its replay draws prompts of the same lengths.
Called by blinkimp/cli/trace.py, blinkimp/bench/replay.py, nic_shim/arrival_capture.py. Test: pytest tests/null/test_trace_arrivals.py
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, TypeVar

import msgspec
import numpy as np

from blinkimp.outputs import OutputError, check_outputs, is_same, replacing
from blinkimp.protocol import Sampling
from blinkimp.trace.errors import TraceError

_log = logging.getLogger(__name__)

CAPTURE_GLOB: Final = "arrivals.*.jsonl"
# These ends follow from the request alone; the others from when somebody gave up.
REPEATABLE: Final = frozenset({"eos", "stop_id", "stop", "length", "constraint"})
CUT_OFF: Final = frozenset({"cancelled", "draining"})  # the tokens until then are repeatable


class Outcome(msgspec.Struct, forbid_unknown_fields=True):
    """What a request came to."""

    reason: str  # of Finish, or an error's code
    num_output_tokens: int
    digest: str  # output_digest() of them


class Arrival(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """One request. Prompt ids, or a length and a seed to draw them with."""

    at_ns: int  # from the first arrival; in a capture, the ingress's clock
    num_prompt_tokens: int
    sampling: Sampling
    prompt_ids: list[int] = []
    prompt_seed: int = 0
    priority: int = 0
    timeout_s: float | None = None
    cache_salt: str = ""
    prefix_cache: bool = True
    stream: bool = True
    detokenize: bool = True
    delivered_ids: list[int] = []
    outcome: Outcome | None = None


class Captured(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """A line of a capture: a request when it came, and, under the same number, what became of it."""

    number: int
    arrival: Arrival | None = None
    outcome: Outcome | None = None


def output_digest(token_ids: Iterable[int]) -> str:
    return hashlib.blake2b(np.array(list(token_ids), np.uint32).tobytes(), digest_size=16).hexdigest()


# ---- Collecting --------------------------------------------------------------------------------------------------------
def collect_arrivals(sources: Sequence[Path]) -> list[Arrival]:
    """Of all sources, by time. Raises TraceError."""
    found: list[Arrival] = []
    for source in sources:
        files = sorted(source.glob(CAPTURE_GLOB)) if source.is_dir() else [source]
        if not files:
            raise TraceError(
                f"{source}: has no {CAPTURE_GLOB}; expected the folder that `blinkimp serve --capture-arrivals` was given"
            )
        for path in files:
            found += of_capture(path) if path.suffix == ".jsonl" else of_trace(path)
    if not found:
        raise TraceError(f"{', '.join(map(str, sources))}: no request in it; expected some: was there any load?")
    found.sort(key=lambda arrival: arrival.at_ns)
    return found


def of_capture(path: Path) -> list[Arrival]:
    found: dict[int, Arrival] = {}
    for line in _lines(path, Captured):
        if line.arrival is not None:
            found[line.number] = line.arrival
        elif line.outcome is not None and line.number in found:
            found[line.number].outcome = line.outcome
    return list(found.values())


def of_trace(path: Path) -> list[Arrival]:
    """Times and lengths; greedy, as many tokens as there were."""
    from blinkimp.trace.figures import lives_of
    from blinkimp.trace.file import TraceFile
    from blinkimp.trace.scan import scan

    trace = TraceFile(path)
    lives = lives_of(scan(trace.events), trace.clock)
    at = np.where(np.isfinite(lives.at["received"]), lives.at["received"], lives.at["queued"])
    found = []
    for idx in np.nonzero(np.isfinite(at) & (lives.table["num_tokens"] > 0))[0].tolist():
        row = lives.table[idx]
        sampling = Sampling(temperature=0.0, max_tokens=int(row["num_tokens"]), ignore_eos=True)
        found.append(Arrival(int(at[idx]), int(row["prompt_tokens"]), sampling, prompt_seed=idx, detokenize=False))
    return found


# ---- The file of a replay ----------------------------------------------------------------------------------------------
def check_arrivals_output(path: Path, sources: Sequence[Path]) -> None:
    """Neither a source nor a name by which the next look at a capture's folder would take it for a part of the capture. Raises OutputError."""
    captures = [source for source in sources if source.is_dir()]
    captures += [source.parent for source in sources if source.match(CAPTURE_GLOB)]
    check_outputs([path], [*sources, *(part for folder in captures for part in folder.glob(CAPTURE_GLOB))])
    if path.match(CAPTURE_GLOB) and any(is_same(path.parent, folder) for folder in captures):
        raise OutputError(
            f"{path}: got a name of the capture's own pattern ({CAPTURE_GLOB}) in its folder, expected another: it would be read as a part "
            f"of the capture; choose another folder, or a name such as {path.with_name('arrivals.jsonl')}"
        )


def write_arrivals(path: Path, arrivals: Sequence[Arrival]) -> None:
    """Times from the first arrival. Readable by its owner only: prompts are private. Raises OutputError."""
    first_ns = arrivals[0].at_ns
    with replacing(path, 0o600) as temporary, temporary.open("wb") as file:
        for arrival in arrivals:
            moved = msgspec.structs.replace(arrival, at_ns=arrival.at_ns - first_ns)
            file.write(msgspec.json.encode(moved) + b"\n")


def read_arrivals(path: Path) -> list[Arrival]:
    """What write_arrivals() wrote. Raises TraceError."""
    found = _lines(path, Arrival)
    if not found:
        raise TraceError(f"{path}: has no lines, expected one a request; `blinkimp trace arrivals` makes them")
    if any(late.at_ns < early.at_ns for early, late in itertools.pairwise(found)):
        raise TraceError(
            f"{path}: times go backwards, expected at_ns ascending; make it anew with `blinkimp trace arrivals`"
        )
    return found


LineType = TypeVar("LineType")


def _lines(path: Path, line_type: type[LineType]) -> list[LineType]:
    decoder = msgspec.json.Decoder(line_type)
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise TraceError(f"{path}: cannot be read ({error.strerror}); check the name") from error
    found = []
    for number, line in enumerate(lines, 1):
        try:
            found.append(decoder.decode(line))
        except msgspec.DecodeError as error:
            if number == len(lines) and line_type is Captured:
                # The ingress was killed while it wrote, or its disk was full.
                _log.warning(
                    "%s, line %d: the last record is torn and is left out; the %d before it are whole",
                    path,
                    number,
                    len(found),
                )
                break
            maker = "serve --capture-arrivals" if line_type is Captured else "trace arrivals"
            raise TraceError(f"{path}, line {number}: {error}; expected a line of `blinkimp {maker}`") from error
    return found
