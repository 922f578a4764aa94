"""What the evidence consists of, in which order it is measured, and how long that takes: engines x transports x placements x threads x loads.

A machine is often lent for less time than the whole takes, so cells have an order of importance: rounds, and tiers within them (tier_of()). A round
is measured on every engine before the next one begins, for an engine's start costs up to two minutes. next_action() decides what is done with the
time that is left; the same function makes the plan that is printed, with estimates, and drives the real run. Within a tier levels of interference
alternate, so that processes that measure an engine each fall into step (room.py).
Called by blinkimp/lab/evidence.py and evidence_report.py. Test: pytest tests/null/test_evidence_plan.py
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from blinkimp.bench.errors import LoadError
from blinkimp.lab.engines import PlacementName
from blinkimp.lab.store import key_of
from blinkimp.lab.sweep import Point, Scenario, parse_scenario

Transport = Literal["http", "zmq"]

# How long last answers are waited for. What is not there by then is cut off, and its tokens so far count: more time would tell little more.
DRAIN_S: Final = 20.0
RAMP_SHARE: Final = 0.25  # of a closed loop's time of sending, in which its users begin one after the other
CELL_OVERHEAD_S: Final = 0.5
BURNER_START_S: Final = 2.0  # its process, numba's compilation, and half a second of it before the load
STOP_S: Final = 8.0  # of an engine
# Of the 8B shape on an H200, for estimates alone: a token's time at no load and for each request beside it, a prompt token's time.
TOKEN_S: Final = 0.0047
TOKEN_S_A_REQUEST: Final = 0.00006
PROMPT_TOKEN_S: Final = 37e-6


@dataclass(frozen=True)
class EngineFacts:
    """What the plan knows of an engine."""

    name: str
    transports: tuple[Transport, ...]
    start_s: float
    is_cpu_on_path: bool  # interference makes its cells longer


@dataclass(frozen=True)
class EvidenceGrid:
    """What is varied."""

    engines: tuple[EngineFacts, ...]
    rates: tuple[float, ...]
    open_scenario: Scenario
    users: tuple[int, ...]
    closed_scenario: Scenario
    threads: tuple[int, ...]  # with 0, ascending
    placements: tuple[PlacementName, ...]
    interference: str
    seconds: float  # of sending, in each cell
    warmup_s: float
    num_cpus: int
    num_reserved: int
    seed: int = 0
    is_traced: bool = False  # cells of ours, at a percent of their figures (cell_trace.py)

    def __post_init__(self) -> None:
        if not self.threads or self.threads[0] != 0 or list(self.threads) != sorted(set(self.threads)):
            raise LoadError(
                f"threads: got {list(self.threads)}, expected 0 and then ascending numbers, such as 0,16,64"
            )
        if not self.engines or not (self.rates or self.users):
            raise LoadError("evidence: got no engine or no load; expected at least one of each")

    @property
    def points(self) -> list[Point]:
        points = [Point(self.open_scenario, rate=rate) for rate in self.rates]
        return points + [Point(self.closed_scenario, concurrency=number) for number in self.users]

    def engine(self, name: str) -> EngineFacts:
        return next(engine for engine in self.engines if engine.name == name)

    def to_json(self) -> dict[str, Any]:
        """As from_json() takes it."""
        return {
            **vars(self),
            "engines": [vars(engine) for engine in self.engines],
            "open_scenario": self.open_scenario.name,
            "closed_scenario": self.closed_scenario.name,
        }

    @classmethod
    def from_json(cls, words: dict[str, Any]) -> EvidenceGrid:
        made: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in words.items()
        }
        made["engines"] = tuple(
            EngineFacts(**{**engine, "transports": tuple(engine["transports"])}) for engine in words["engines"]
        )
        made |= {name: parse_scenario(words[name]) for name in ("open_scenario", "closed_scenario")}
        return cls(**made)


@dataclass(frozen=True)
class EvidenceCell:
    """One measurement."""

    engine: str
    transport: Transport
    placement: PlacementName
    threads: int
    point: Point
    tier: int  # 1 is the most important
    is_again: bool = False  # the isolated run once more: how far two runs of the same differ

    @property
    def round(self) -> int:
        return 1 + bisect_left(LAST_TIERS, self.tier)

    @property
    def load(self) -> str:
        return f"{self.point.scenario.name}, {self.point.name}"

    @property
    def key(self) -> str:
        again = ("again",) if self.is_again else ()
        return key_of("evidence", self.engine, self.transport, self.placement, self.threads, self.load, *again)

    @property
    def label(self) -> str:
        again = " again" if self.is_again else ""
        return f"{self.engine} over {self.transport}, {self.placement}, {self.load}, {self.threads} threads{again}"


AGAIN_TIER: Final = 7
LAST_TIERS: Final = (2, 3, 8)  # of each round but the last


def tier_of(grid: EvidenceGrid, transport: str, placement: str, threads: int, point: Point) -> int | None:
    """How important a measurement is; None: not wanted. Most of all isolation and the most interference, over HTTP and with the first placement: at
    the middle rate (1), with the middle number of users (2), at the ends of both (3), then all other loads (4). Levels between, of the two
    middle loads (5); the second placement at the middle rate (6); both middle loads once more without interference (7); the other transport at
    the middle rate (8); levels between of the other loads (9); the rest of the other transport (10) and of the other placement (11)."""
    is_rate = point.rate is not None
    values: tuple[float, ...] = grid.rates if is_rate else grid.users
    middle = values[len(values) // 2]
    value = point.rate if point.rate is not None else point.concurrency
    is_middle, is_telling = value == middle, value in (values[0], middle, values[-1])
    is_end = threads in (0, grid.threads[-1])
    is_first_placement = placement == grid.placements[0]
    if transport == "http" and is_first_placement:
        if not is_end:
            return 5 if is_middle else 9
        if is_middle:
            return 1 if is_rate else 2
        return 3 if is_telling else 4
    is_core = is_rate and is_middle
    if is_core and is_end and (transport == "http" or is_first_placement):
        return 6 if transport == "http" else 8
    if transport == "http" or is_first_placement:
        return (10 if is_first_placement else 11) if is_core or is_end else None
    return 11 if is_core and is_end else None


def cells_of(grid: EvidenceGrid) -> list[EvidenceCell]:
    """All of them, the most important first; isolation before interference."""
    order = [engine.name for engine in grid.engines]
    cells = [
        EvidenceCell(engine.name, transport, placement, threads, point, tier)
        for engine in grid.engines
        for transport in engine.transports
        for placement in grid.placements
        for point in grid.points
        for threads in grid.threads
        if (tier := tier_of(grid, transport, placement, threads, point)) is not None
    ]
    isolated = [cell for cell in cells if cell.tier in (1, 2) and cell.threads == 0]
    cells += [replace(cell, is_again=True, tier=AGAIN_TIER) for cell in isolated]
    return sorted(cells, key=lambda cell: (cell.round, order.index(cell.engine), cell.tier))


def estimate_s(grid: EvidenceGrid, cell: EvidenceCell) -> float:
    """About how long a cell takes. On the path of each token, a CPU with many others slows everything down."""
    num_contested = max(1, grid.num_cpus - (grid.num_reserved if cell.placement == "reserved" else 0))
    slowdown = 1.0
    if grid.engine(cell.engine).is_cpu_on_path:
        slowdown += 0.5 * (cell.threads / num_contested) ** 2
    elif cell.placement == "sharing" and cell.threads:
        slowdown = 1.5
    point, overhead_s = cell.point, CELL_OVERHEAD_S + (BURNER_START_S if cell.threads else 0.0)
    beside = point.concurrency if point.concurrency is not None else (point.rate or 0.0)
    token_s = (TOKEN_S + TOKEN_S_A_REQUEST * beside) * slowdown
    request_s = point.scenario.output_len * token_s
    sending_s = grid.seconds + grid.warmup_s
    if point.concurrency is None:
        return overhead_s + sending_s + min(DRAIN_S, request_s)
    request_s += point.concurrency * point.scenario.input_len * PROMPT_TOKEN_S
    waves = math.ceil(sending_s / request_s)
    ended_s = min(waves * request_s + RAMP_SHARE * sending_s, sending_s + request_s)
    return overhead_s + min(max(sending_s, ended_s), sending_s + DRAIN_S)


# ---- What to do with the time that is left ---------------------------------------------------------------------------
@dataclass(frozen=True)
class Action:
    """Start an engine, measure a cell on the one that runs, or stop."""

    engine: str | None = None
    cell: EvidenceCell | None = None


Cost = Callable[[EvidenceCell], float]


def next_action(
    missing: Sequence[EvidenceCell],
    running: str | None,
    left_s: float,
    cell_s: Cost,
    start_s: Callable[[str], float],
) -> Action:
    """missing: by importance. An engine that runs goes on until its round is done, and farther where no other could be started in time: not for a
    single cell then, which has nothing to be compared with."""

    def other(wanted: Sequence[EvidenceCell], num_worth: int) -> Action:
        for cell in wanted:
            stop_s = STOP_S if running is None else 2 * STOP_S
            first = [one for one in wanted if one.engine == cell.engine][:num_worth]
            if cell.engine != running and start_s(cell.engine) + sum(map(cell_s, first)) + stop_s <= left_s:
                return Action(engine=cell.engine)
        return Action()

    mine = [cell for cell in missing if cell.engine == running]
    fitting = [cell for cell in mine if cell_s(cell) + STOP_S <= left_s]
    if fitting:
        earlier = [cell for cell in missing if cell.engine != running and cell.round < fitting[0].round]
        if earlier and (action := other(earlier, 2)).engine is not None:
            return action
        return Action(cell=fitting[0])
    return other(missing, 1)


def simulate(grid: EvidenceGrid, missing: Sequence[EvidenceCell], budget_s: float) -> list[list[str]]:
    """Calls of budget_s each, and what is done in them, by the estimates: lines for a reader."""
    left, calls = list(missing), []
    while left:
        lines: list[str] = []
        running: str | None = None
        at_s, num_before = 0.0, len(left)
        while True:
            action = next_action(
                left, running, budget_s - at_s, lambda cell: estimate_s(grid, cell), lambda e: grid.engine(e).start_s
            )
            if action.engine is not None:
                lines.append(f"{at_s:5.0f} s  start {action.engine} ({grid.engine(action.engine).start_s:.0f} s)")
                at_s += grid.engine(action.engine).start_s + (STOP_S if running is not None else 0.0)
                running = action.engine
            elif action.cell is not None:
                seconds = estimate_s(grid, action.cell)
                lines.append(f"{at_s:5.0f} s  {seconds:4.0f} s  tier {action.cell.tier}  {action.cell.label}")
                at_s += seconds
                left.remove(action.cell)
            else:
                break
        if len(left) == num_before:
            longest = max(estimate_s(grid, cell) + grid.engine(cell.engine).start_s for cell in left)
            raise LoadError(
                f"plan: a call of {budget_s:g} s is too short for {len(left)} cells, such as {left[0].label}; "
                f"expected at least {longest + STOP_S:.0f} s: raise --budget-s, or lower --seconds"
            )
        calls.append(lines)
    return calls
