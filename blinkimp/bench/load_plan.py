"""What a load consists of: each request's prompt, output length and, in an open loop, the time it is meant to be sent.

    plan = make_plan(LoadOptions(rate=8, duration_s=60, input_len=512, output_len=128), vocab_size=4096)

A trace is a file of JSON lines {"at_s": 0.25, "input_tokens": 512, "output_tokens": 128}; at_s may be absent where rate or concurrency is given.
Called by blinkimp/bench/runner.py. Test: pytest tests/null/test_bench_plan.py
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from blinkimp.bench import lengths
from blinkimp.bench.arrivals import arrival_times
from blinkimp.bench.errors import LoadError
from blinkimp.bench.limits import MOST_REQUESTS, MOST_SECONDS, MOST_TOKENS
from blinkimp.outputs import replacing
from blinkimp.trace.arrivals import Arrival

# What LoadOptions holds of lengths where nothing was asked for; fixed lengths are a range of ratio 1.
DRAWN: Final[dict[str, dict[str, Any]]] = {
    "fixed": {"input_len": 512, "output_len": 128, "range_ratio": 1.0},
    "range": {"input_len": 512, "output_len": 128, "range_ratio": 0.8},
    "sharegpt": {},
}


@dataclass(frozen=True)
class LoadOptions:
    """One load. Either rate or concurrency or a trace with times; either num_requests or duration_s."""

    rate: float | None = None  # requests/s of an open loop
    concurrency: int | None = None  # requests at a time: alone it is a closed loop, beside `rate` a cap
    burstiness: float = 1.0
    ramp_s: float = 0.0
    warmup_s: float = 0.0  # requests that were meant to be sent before are not counted
    num_requests: int | None = None
    duration_s: float | None = None  # of sending
    lengths: Literal["fixed", "range", "sharegpt"] | None = None  # None, as what follows, of a file; else fixed
    input_len: int | None = None  # this and the next two: as in DRAWN
    output_len: int | None = None
    range_ratio: float | None = None
    trace: Path | None = None
    replay: Path | None = None  # arrivals of a live run (blinkimp/bench/replay.py); nothing else then says what is sent
    time_scale: float = 1.0  # a trace's and a replay's times are multiplied by it
    max_total_len: int | None = None
    seed: int = 0

    def to_json(self) -> dict[str, Any]:
        """As a report holds it: paths and infinity, which JSON lacks, are text."""
        return {
            key: str(value) if isinstance(value, Path) or value == math.inf else value
            for key, value in vars(self).items()
        }

    def __post_init__(self) -> None:
        if self.replay is not None:
            if self.rate is not None or self.concurrency is not None or self.trace is not None:
                raise LoadError(
                    "load: got --replay beside --rate, --concurrency or --trace; expected it alone: the arrivals say when and what is sent"
                )
        elif not self.has_times and self.rate is None and self.concurrency is None:
            raise LoadError(
                "load: got neither rate nor concurrency nor a trace; expected one: give --rate, --concurrency or --trace"
            )
        elif self.trace is None and (self.num_requests is None) == (self.duration_s is None):
            got = (
                "neither a number of requests nor a duration"
                if self.duration_s is None
                else "a number of requests and a duration"
            )
            raise LoadError(f"load: got {got}; expected one of both: give --num-requests or --duration")
        self._refuse_unused()
        least = {
            "input_len": 1,
            "output_len": 1,
            "max_total_len": 2,
            "concurrency": 1,
            "num_requests": 1,
            "seed": 0,
            "warmup_s": 0,
            "ramp_s": 0,
            "time_scale": 0,
            "duration_s": 0,
        }
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and not value >= bound:  # not a number is not, either
                raise LoadError(f"{name}: got {value}, expected at least {bound}")
        for name in ("rate", "duration_s", "warmup_s", "ramp_s", "time_scale"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise LoadError(f"{name}: got {value}, expected a finite number")
        most: dict[str, float] = {
            **dict.fromkeys(("input_len", "output_len", "max_total_len"), MOST_TOKENS),
            **dict.fromkeys(("num_requests", "concurrency"), MOST_REQUESTS),
            **dict.fromkeys(("duration_s", "warmup_s", "ramp_s"), MOST_SECONDS),
        }
        for name, limit in most.items():
            if (value := getattr(self, name)) is not None and value > limit:
                raise LoadError(f"{name}: got {value}, expected at most {limit:g}")
        if self.rate is not None and self.duration_s is not None and self.rate * self.duration_s > MOST_REQUESTS:
            raise LoadError(
                f"load: got {self.rate:g} requests/s for {self.duration_s:g} s, expected at most {MOST_REQUESTS} requests; lower --rate or --duration"
            )
        self._fill_lengths()

    def _refuse_unused(self) -> None:
        """What a kind of load has no use for is refused: left aside, it would make another load than the one that was asked for."""
        given = {
            "--duration": self.duration_s is not None,
            "--ramp": self.ramp_s != 0,
            "--burstiness": self.burstiness != 1,
            "--time-scale": self.time_scale != 1,
            "--seed": self.seed != 0,
            "--lengths": self.lengths is not None,
            "--input-len": self.input_len is not None,
            "--output-len": self.output_len is not None,
            "--range-ratio": self.range_ratio not in (None, 1),
            "--max-total-len": self.max_total_len is not None,
        }
        file = "--trace" if self.replay is None else "--replay"
        sender = "--concurrency" if self.rate is None else "--rate"
        rules = [  # whether it holds, with what, what is unused then, remedy
            (
                self.has_times,
                file,
                ["--duration", "--ramp", "--burstiness"],
                "the file says when requests are sent; --num-requests sends the first ones only",
            ),
            (
                not self.has_times,
                sender,
                ["--time-scale"],
                f"it multiplies the times of a file (--trace, --replay), and here {sender} says when requests are sent",
            ),
            (self.is_closed, sender, ["--burstiness"], "a closed loop draws no arrivals; --rate beside it does"),
            (
                self.trace is not None and self.rate is not None,
                "--trace and --rate",
                ["--duration"],
                "the load is as long as the trace; --num-requests sends the first ones only",
            ),
            (self.replay is not None, file, ["--seed"], "the file has the prompts and the seeds"),
            (
                self.is_of_file,
                file,
                ["--lengths", "--input-len", "--output-len", "--range-ratio", "--max-total-len"],
                "the file says how long prompts and outputs are",
            ),
            (
                self.lengths == "sharegpt",
                "--lengths sharegpt",
                ["--input-len", "--output-len", "--range-ratio"],
                "it draws lengths of its own; --max-total-len is the most of both together",
            ),
            (self.lengths in (None, "fixed"), "fixed lengths", ["--range-ratio"], "it is of --lengths range"),
            (self.lengths != "sharegpt", "fixed and range lengths", ["--max-total-len"], "it is of --lengths sharegpt"),
        ]
        for holds, beside, unused, remedy in rules:
            found = ", ".join(name for name in unused if given[name])
            if holds and found:
                raise LoadError(f"load: got {found} with {beside}; expected {beside} without: {remedy}")

    def _fill_lengths(self) -> None:
        if self.is_of_file:
            return
        for name, value in {"lengths": "fixed", **DRAWN[self.lengths or "fixed"]}.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    @property
    def is_of_file(self) -> bool:
        """The file of --trace or --replay says how long prompts and outputs are."""
        return self.trace is not None or self.replay is not None

    @property
    def has_times(self) -> bool:
        """The file of --trace or --replay says when requests are sent."""
        return self.replay is not None or (self.trace is not None and self.rate is None and self.concurrency is None)

    @property
    def is_closed(self) -> bool:
        return self.replay is None and self.rate is None and self.concurrency is not None


class TraceLine(msgspec.Struct, forbid_unknown_fields=True):
    input_tokens: Annotated[int, msgspec.Meta(ge=1, le=MOST_TOKENS)]
    output_tokens: Annotated[int, msgspec.Meta(ge=1, le=MOST_TOKENS)]
    at_s: float | None = None


@dataclass(frozen=True)
class LoadPlan:
    """Requests in the order in which they are sent."""

    options: LoadOptions
    intended_s: NDArray[np.float64] | None  # [requests] from the start; None: a closed loop
    input_lens: NDArray[np.int64]  # [requests]
    output_lens: NDArray[np.int64]  # [requests]
    prompt_seed: int
    vocab_size: int

    def __len__(self) -> int:
        return len(self.input_lens)

    def prompt(self, idx: int) -> list[int]:
        """Random token ids, the same for the same seed; no two requests share a beginning."""
        random = np.random.default_rng([self.prompt_seed, idx])
        ids: list[int] = random.integers(0, self.vocab_size, self.input_lens[idx]).tolist()
        return ids

    def arrival(self, idx: int) -> Arrival | None:
        """How the request is sampled, where that is given (blinkimp/bench/replay.py)."""
        return None


def read_trace(path: Path) -> list[TraceLine]:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise LoadError(f"trace {path}: cannot be read ({error.strerror}); check --trace") from error
    decoder = msgspec.json.Decoder(TraceLine)
    found = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            found.append(decoder.decode(line))
        except msgspec.DecodeError as error:
            raise LoadError(
                f'trace {path}, line {number}: {error}; expected {{"at_s": 0.25, "input_tokens": 512, "output_tokens": 128}}'
            ) from error
    if not found:
        raise LoadError(f"trace {path}: got no lines, expected at least one request")
    return found


def write_trace(path: Path, plan: LoadPlan) -> None:
    """The plan as a trace that read_trace() takes. Raises OutputError."""
    times = plan.intended_s
    lines = [
        TraceLine(
            int(plan.input_lens[i]), int(plan.output_lens[i]), None if times is None else round(float(times[i]), 6)
        )
        for i in range(len(plan))
    ]
    with replacing(path) as temporary:
        temporary.write_bytes(b"\n".join(msgspec.json.encode(line) for line in lines) + b"\n")


def num_of_closed(options: LoadOptions) -> int:
    """A closed loop by duration draws on more requests than it can use up: they cost nothing until they are sent."""
    assert options.duration_s is not None
    return min(MOST_REQUESTS, max(4096, math.ceil(options.duration_s * (options.concurrency or 1) * 100)))


def make_plan(options: LoadOptions, vocab_size: int) -> LoadPlan:
    """The same options and seed give the same plan. Raises LoadError."""
    if options.replay is not None:
        from blinkimp.bench.replay import make_replay_plan  # it is made of this module's parts

        return make_replay_plan(options, vocab_size)
    random = np.random.default_rng(options.seed)
    intended: NDArray[np.float64] | None = None
    if options.trace is not None:
        inputs, outputs, intended = _of_trace(options)
        num_requests = len(inputs)
    if options.rate is not None:
        duration_s = options.duration_s if options.trace is None else None
        wanted = num_requests if options.trace is not None else options.num_requests
        intended = arrival_times(
            random,
            rate=options.rate,
            burstiness=options.burstiness,
            ramp_s=options.ramp_s,
            num_requests=wanted,
            duration_s=duration_s,
        )
        num_requests = len(intended)
    elif options.trace is None:
        num_requests = options.num_requests or num_of_closed(options)
    if options.trace is None:
        inputs, outputs = _drawn(random, num_requests, options)
    if num_requests == 0:
        raise LoadError(
            f"load: no request within {options.duration_s} s at {options.rate}/s; expected some: raise --duration or --rate"
        )
    if options.is_closed:
        intended = None
    if intended is not None:
        check_times(intended)
    return LoadPlan(options, intended, inputs, outputs, options.seed, vocab_size)


def check_times(intended_s: NDArray[np.float64]) -> None:
    if not (latest := float(intended_s.max())) <= MOST_SECONDS:
        raise LoadError(
            f"load: a request would be sent after {latest:g} s, expected at most {MOST_SECONDS:g}; look at the rate, or at the file's times"
        )


def _drawn(random: np.random.Generator, num_requests: int, options: LoadOptions) -> lengths.Lengths:
    if options.lengths == "sharegpt":
        return lengths.sharegpt_like(random, num_requests, options.max_total_len)
    input_len, output_len, ratio = options.input_len, options.output_len, options.range_ratio
    assert input_len is not None and output_len is not None and ratio is not None, "LoadOptions has filled them in"
    if options.lengths == "range":
        return lengths.random_range(random, num_requests, input_len, output_len, ratio)
    return lengths.fixed(num_requests, input_len, output_len)


def _of_trace(options: LoadOptions) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64] | None]:
    assert options.trace is not None
    lines = read_trace(options.trace)
    if options.num_requests is not None:
        lines = lines[: options.num_requests]
    inputs = np.array([line.input_tokens for line in lines], np.int64)
    outputs = np.array([line.output_tokens for line in lines], np.int64)
    if not options.has_times:
        return inputs, outputs, None
    if any(line.at_s is None for line in lines):
        raise LoadError(
            f"trace {options.trace}: a line has no at_s; expected times, or --rate or --concurrency in their place"
        )
    times = np.array([line.at_s for line in lines], np.float64) * options.time_scale
    if (np.diff(times) < 0).any() or times[0] < 0:
        raise LoadError(
            f"trace {options.trace}: times go backwards; expected at_s ascending from 0 or more; sort the lines"
        )
    return inputs, outputs, times
