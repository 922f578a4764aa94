#!/usr/bin/env python3
"""The director's two latencies, from the in-kernel trace: the gap between steps, and how soon a submission is seen by an idle engine.

    python tools/director_gap.py --out FILE.json                   batch 1, 64 and 256 of the 8B shape on the GPU
    python tools/director_gap.py --device emulated --shape embedded --batches 1,8

gap: from the sight of the last worker's arrival (STEP_END) to the publication of the next plan (STEP_START), where both steps decode the
whole batch. poll: from right before the ingress writes a PING to the return of the director's read that found it there (POLLED). The clocks are
aligned by what cannot be otherwise (blinkimp/trace/clock.py): a ping was committed before it was seen, and the clock in the status page stamped
before the host saw it. The figure is given for the latest and the earliest that these allow: latest is too high by the quickest posted write of
the run, earliest too low by the quickest sight of a ping.
Test: pytest tests/host/test_director_gap.py
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import numpy as np  # noqa: E402  (the path above comes first)
from numpy.typing import NDArray  # noqa: E402
from step_engine import ATTACH_TIMEOUT_S, config_of  # noqa: E402
from step_requests import BenchError, Client, Wave  # noqa: E402
from step_rows import SHAPES  # noqa: E402
from step_stats import header, write_report  # noqa: E402

from blinkimp.cli.terminal import LoadingBars, set_up_logging  # noqa: E402
from blinkimp.host.engine import Engine  # noqa: E402
from blinkimp.host.power import open_nvml  # noqa: E402
from blinkimp.host.shared_memory import Region, open_engine_page, open_trace  # noqa: E402
from blinkimp.host.trace_reader import TraceReader, events_of, high_half  # noqa: E402
from blinkimp.host.watch_word import STATUS_DEVICE_NS, watch_word  # noqa: E402
from blinkimp.nic_shim.queue_pair import PortStatus, QueuePairPort  # noqa: E402
from blinkimp.ring_abi import TraceKind  # noqa: E402
from blinkimp.trace.clock import Bounds, align  # noqa: E402

TRACE_EVENTS = 1 << 20
PROMPT_TOKENS = 32
PING_PAUSE_S = 0.004  # at most; some of the rounds after which an idle director looks after the rest (kQuietRoundNs)
SIGHT_TIMEOUT_S = 0.005  # an idle director writes the status page more often than that


def spread(values_us: NDArray[np.float64]) -> dict[str, Any]:
    low, median, high, worst = np.percentile(values_us, [10, 50, 99, 100])
    return {
        "p10_us": round(float(low), 3),
        "median_us": round(float(median), 3),
        "p99_us": round(float(high), 3),
        "max_us": round(float(worst), 3),
        "n": len(values_us),
    }


def gaps_us(events: NDArray[np.void], batch: int) -> NDArray[np.float64]:
    """Between two steps in a row, both of `batch` sequences."""
    starts, ends = events_of(events, TraceKind.STEP_START), events_of(events, TraceKind.STEP_END)
    rows = starts["argument"] & np.uint64(0xFFFFFFFF)
    num_seqs = high_half(starts["argument"]) & np.uint64(0xFFFF)
    is_full = dict(zip(starts["step"].tolist(), ((num_seqs == batch) & (rows == batch)).tolist(), strict=True))
    end_of = dict(zip(ends["step"].tolist(), ends["time_ns"].astype(np.int64).tolist(), strict=True))
    start_of = dict(zip(starts["step"].tolist(), starts["time_ns"].astype(np.int64).tolist(), strict=True))
    found = [
        (start_of[step] - end_of[step - 1]) / 1e3
        for step in start_of
        if is_full[step] and is_full.get(step - 1) and step - 1 in end_of
    ]
    return np.array(found)


@dataclass(frozen=True)
class Moments:
    """What was stamped on either side. [num_pings] int64 ns: committed, seen by the host's clock, polled by the device's; [num_sights] of the status
    page's clock: its value and when the host saw it."""

    committed: NDArray[np.int64]
    seen: NDArray[np.int64]
    polled: NDArray[np.int64]
    stamped: NDArray[np.int64]
    sighted: NDArray[np.int64]


def poll_us(moments: Moments) -> dict[str, Any]:
    polled, committed = moments.polled, moments.committed
    lower_at = np.concatenate([polled, moments.stamped])
    clock = align(
        Bounds(polled, polled - committed, lower_at, lower_at - np.concatenate([moments.seen, moments.sighted]))
    )
    if clock.record.slack_ns > 0:
        raise BenchError(
            f"the clocks ran apart by {clock.record.slack_ns:.0f} ns during the pings; expected them to run straight; repeat the run"
        )
    delay, error = clock.to_host(polled) - committed, clock.error_at(polled)
    return {
        "if_latest": spread((delay + error) / 1e3),
        "if_earliest": spread(np.maximum(delay - error, 0) / 1e3),
        "round_trip": spread((moments.seen - committed) / 1e3),
        "offset_known_within_us": round(float(2 * error.max()) / 1e3, 3),
    }


def measure_polls(
    port: QueuePairPort, reader: TraceReader, page: Region, num_pings: int, timeout_s: float
) -> dict[str, Any]:
    reader.read()
    committed, seen = np.zeros(num_pings, np.int64), np.zeros(num_pings, np.int64)
    sights = []
    for i in range(num_pings):
        sights.append(watch_word(page, STATUS_DEVICE_NS, num_changes=1, timeout_s=SIGHT_TIMEOUT_S))
        time.sleep(
            PING_PAUSE_S * random.random()
        )  # the page is written at a moment of the director's choice; a ping comes at any
        status, committed[i], seen[i] = port.ping(i, spin_s=timeout_s, timeout_s=timeout_s)
        if status != PortStatus.OK or not len(port.poll()):
            raise BenchError(
                f"ping {i}: {status.name.lower()} after {timeout_s:g} s; expected its PONG; the engine does not take submissions\n{port.dump()}"
            )
    time.sleep(0.1)
    events = events_of(reader.read(), TraceKind.POLLED)
    polled_at = dict(zip(events["argument"].tolist(), events["time_ns"].astype(np.int64).tolist(), strict=True))
    polled = np.array([polled_at[int(at)] for at in committed])
    stamped, sighted = (np.concatenate(parts) for parts in zip(*sights, strict=True))
    return poll_us(Moments(committed, seen, polled, stamped, sighted))


def measure(arguments: argparse.Namespace, report: dict[str, Any]) -> None:
    num_tokens = arguments.steps + 8
    with tempfile.TemporaryDirectory() as folder, LoadingBars() as bars:
        settings = {"trace_events": TRACE_EVENTS, "max_batch": max(arguments.batches)}
        config = config_of(Path(folder), arguments.shape, arguments.device, PROMPT_TOKENS + num_tokens + 1, settings)
        with Engine(config, progress=bars) as engine, QueuePairPort.open(config.engine_name, 0) as port:
            port.attach(ATTACH_TIMEOUT_S)
            port.start_heartbeat()
            report["device"] = engine.device.describe()
            client = Client(engine, port, bars, arguments.timeout)
            with TraceReader(open_trace(config.engine_name)) as reader:
                with open_engine_page(config.engine_name) as page:
                    report["poll"] = measure_polls(port, reader, page, arguments.pings, arguments.timeout)
                for batch in arguments.batches:
                    reader.read()
                    client.run(f"batch {batch}", [Wave(batch, PROMPT_TOKENS, num_tokens)])
                    time.sleep(0.05)  # the last completions were published; the trace with them or right after
                    found = gaps_us(reader.read(), batch)
                    if reader.num_lost or len(found) < 3:
                        raise BenchError(
                            f"batch {batch}: {len(found)} gaps seen and {reader.num_lost} trace events lost; expected about "
                            f"{arguments.steps} and none; more --steps, or fewer"
                        )
                    report["gaps"].append({"batch": batch, **spread(found)})


def print_report(report: dict[str, Any]) -> None:
    print(f"{report['device']}")
    print(f"{'':>10} {'p10 us':>9} {'median':>9} {'p99':>9} {'max':>9} {'n':>6}")
    rows = [(f"gap b{row['batch']}", row) for row in report["gaps"]]
    rows += [(f"poll {name[3:]}", report["poll"][name]) for name in ("if_earliest", "if_latest")]
    rows.append(("ping", report["poll"]["round_trip"]))
    for name, row in rows:
        print(
            f"{name:>13} {row['p10_us']:>6.2f} {row['median_us']:>9.2f} {row['p99_us']:>9.2f} {row['max_us']:>9.2f} {row['n']:>6}"
        )
    print(f"the clocks' offset is known within {report['poll']['offset_known_within_us']:.2f} us")


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", default="1,64,256", help="by commas")
    parser.add_argument("--steps", type=int, default=200, help="of each batch")
    parser.add_argument("--pings", type=int, default=1000)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b")
    parser.add_argument("--device", choices=("auto", "gpu", "emulated"), default="auto")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds that one batch may take")
    parser.add_argument("--commit", help="what is measured, where there is no git to ask")
    parser.add_argument("--out", type=Path, help="JSON of what was measured")
    arguments = parser.parse_args(argv)
    try:
        arguments.batches = [int(word) for word in arguments.batches.split(",")]
    except ValueError:
        parser.error(f"--batches is {arguments.batches!r}, expected numbers by commas, such as 1,64,256")
    if min(arguments.batches) < 1 or max(arguments.batches) > 256 or arguments.steps < 8 or arguments.pings < 10:
        parser.error("expected batches from 1 to 256, at least 8 --steps and 10 --pings")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    set_up_logging("info")
    report: dict[str, Any] = {
        **header("director_gap", argv, arguments.commit, open_nvml()),
        "shape": arguments.shape,
        "gaps": [],
    }
    try:
        measure(arguments, report)
    except (RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print_report(report)
    write_report(report, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
