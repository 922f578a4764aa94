#!/usr/bin/env python3
"""What traces cost: how fast they are analysed, and how much slower a traced engine is.

    python tools/bench_trace.py --events 100000000 --out FILE.json              a made-up trace of 3.2 GB: written, analysed, removed
    python tools/bench_trace.py --device gpu --out FILE.json                    the 8B shape: off, without its code, on, and op times, and a recorder
    python tools/bench_trace.py --device emulated --shape embedded --rounds 12

Analysis: `scan` is the pass over all events (blinkimp/trace/scan.py), `stats` all that `blinkimp trace stats` prints; the first run is the
file's, the best of the others counts. CPU seconds are given beside the clock's: on a machine that others use they say more.
Overhead: each round starts an engine in every mode, in another order, and measures decode steps of --rows by the device's clock; the
figure is the median over rounds of mode / off - 1, with the 10th and 90th percentile. On the emulated device, which shares its CPUs with whatever
else runs, the CPU time of the device's process per step is given beside it.
Test: pytest tests/host/test_bench_trace.py
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Final

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import numpy as np  # noqa: E402  (the path above comes first)
from step_engine import EngineBench  # noqa: E402
from step_requests import BenchError  # noqa: E402
from step_rows import SHAPES, Row, parse_rows  # noqa: E402
from step_stats import header, write_report  # noqa: E402

from blinkimp.cli.terminal import set_up_logging  # noqa: E402
from blinkimp.host.emulated_device import EmulatedDevice  # noqa: E402
from blinkimp.host.power import open_nvml  # noqa: E402
from blinkimp.trace.clock import ClockRecord  # noqa: E402
from blinkimp.trace.figures import figures_of  # noqa: E402
from blinkimp.trace.file import Metadata, TraceFile, TraceFileWriter  # noqa: E402
from blinkimp.trace.scan import scan  # noqa: E402
from blinkimp.trace.synthetic import OFFSET_NS, Shape, make_trace, num_waves_of  # noqa: E402

PART_EVENTS: Final = 10_000_000
TRACE_EVENTS: Final = 1 << 20
# No trace; a kernel without the trace's code (GPU only); events; and op times of every 64th step; and somebody who records them.
MODES: Final = ("off", "without", "on", "ops", "recorder")
ROWS: Final = {"gpu": "d1@1024,d64@1024,d256@1024", "emulated": "d1@128,d16@128"}


# ---- Analysis ------------------------------------------------------------------------------------------------------------
def write_synthetic(path: Path, num_events: int, shape: Shape) -> int:
    num_waves = 0
    with TraceFileWriter(path) as writer:
        while writer.num_events < num_events:
            events = make_trace(min(PART_EVENTS, num_events - writer.num_events), shape, first_wave=num_waves)
            num_waves += num_waves_of(events, shape)
            writer.append(events)
        clock = ClockRecord(OFFSET_NS, [(OFFSET_NS, 0.0, 500.0), (OFFSET_NS + 10**15, 0.0, 500.0)])
        writer.finish(Metadata(clock=clock), 10**15)
        return writer.num_events


def best_of(what: Any, num_runs: int) -> tuple[float, float, float]:
    """Seconds of the first run, of the best of the others, and the least CPU time of any, of all threads."""
    times, cpu_times = [], []
    for _ in range(num_runs + 1):
        began, cpu_began = time.perf_counter(), time.process_time()
        what()
        times.append(time.perf_counter() - began)
        cpu_times.append(time.process_time() - cpu_began)
    return times[0], min(times[1:]), min(cpu_times)


def measure_analysis(arguments: argparse.Namespace) -> dict[str, Any]:
    shape = Shape(batch=arguments.batch)
    scan(make_trace(1000, shape), 1)  # compiles
    path = Path(arguments.folder) / f"bench-trace-{os.getpid()}.trace"
    try:
        began = time.perf_counter()
        num_events = write_synthetic(path, arguments.events, shape)
        written_s = time.perf_counter() - began
        trace = TraceFile(path)
        rates: dict[str, Any] = {}
        for name, what in (("scan", lambda: scan(trace.events)), ("stats", lambda: figures_of(trace))):
            first_s, best_s, cpu_s = best_of(what, arguments.runs)
            rate, cpu_rate = num_events / best_s / 1e6, num_events / cpu_s / 1e6
            rates[name] = {
                "first_s": round(first_s, 6),
                "best_s": round(best_s, 6),
                "cpu_s": round(cpu_s, 6),
                "million_events_per_s": round(rate, 1),
                "million_events_per_cpu_second": round(cpu_rate, 1),
            }
            print(f"{name}: {num_events:,} events in {best_s:.2f} s: {rate:.1f} M/s, {cpu_rate:.1f} M a CPU second")
        return {
            "num_events": num_events,
            "file_bytes": path.stat().st_size,
            "num_requests": len(scan(trace.events).requests),
            "batch": shape.batch,
            "num_cpus": len(os.sched_getaffinity(0)),
            "load_average": os.getloadavg()[0],
            "written_s": round(written_s, 1),
            **rates,
        }
    finally:
        path.unlink(missing_ok=True)


# ---- Overhead ------------------------------------------------------------------------------------------------------------
class RecorderProcess:
    """`blinkimp trace record` beside the engine."""

    def __init__(self, engine_name: str, folder: Path) -> None:
        command = [
            sys.executable,
            "-m",
            "blinkimp",
            "trace",
            "record",
            "--engine-name",
            engine_name,
            "--seconds",
            "3600",
        ]
        self.path = folder / "bench.trace"
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
        self.process = subprocess.Popen(
            [*command, "-o", str(self.path)], env=environment, stdout=subprocess.PIPE, text=True
        )
        deadline = time.monotonic() + 60
        while not self.path.exists():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise BenchError(f"the recorder of {engine_name} has not begun; expected it within a minute")
            time.sleep(0.05)

    def end(self) -> int:
        """Events that it has written."""
        self.process.send_signal(signal.SIGINT)
        self.process.communicate(timeout=120)
        return len(TraceFile(self.path).events)


def cpu_seconds(pid: int) -> float:
    """Of all threads of a process that live."""
    tasks = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(path.read_text().split()[0]) for path in tasks) / 1e9


def measure_mode(arguments: argparse.Namespace, rows: list[Row], mode: str) -> dict[str, dict[str, float]]:
    settings: dict[str, Any] = {"max_batch": max(row.batch for row in rows)}
    gpu_defines = {"BK_NO_TRACE": "1"} if mode == "without" else {}
    if arguments.device == "emulated":
        settings["num_threads"] = arguments.threads
    if mode not in ("off", "without"):
        settings["trace_events"] = TRACE_EVENTS
    if mode == "ops":
        settings["trace_op_period"] = 64
    context = max(row.context for row in rows) * 2 + arguments.tokens
    found: dict[str, dict[str, float]] = {}
    with (
        tempfile.TemporaryDirectory() as folder,
        EngineBench(
            arguments.shape, arguments.device, context, settings, arguments.timeout, None, gpu_defines=gpu_defines
        ) as bench,
    ):
        recorder = None
        if mode == "recorder":
            recorder = RecorderProcess(bench.engine.config.engine_name, Path(folder))
        device = bench.engine.device
        for row in rows:
            steps_before = bench.engine.status()["step"]
            cpu_before = cpu_seconds(device.pid) if isinstance(device, EmulatedDevice) else 0.0
            measured = bench.measure(row, arguments.tokens, arguments.seconds)["device"]
            found[row.name] = {"median_ms": measured["median_ms"], "p10_ms": measured["p10_ms"]}
            if isinstance(device, EmulatedDevice):
                num_steps = bench.engine.status()["step"] - steps_before
                found[row.name]["cpu_ms"] = (cpu_seconds(device.pid) - cpu_before) * 1e3 / num_steps
        if recorder is not None and recorder.end() == 0:
            raise BenchError("the recorder has written no event; expected those of the steps that were measured")
    return found


def compare_modes(rounds: list[dict[str, dict[str, dict[str, float]]]], rows: list[Row]) -> dict[str, Any]:
    """By row and mode: median of the rounds, and the ratio to `off` of the same round."""
    table: dict[str, Any] = {}
    for row in rows:
        for mode in rounds[0]:
            entry = table.setdefault(row.name, {}).setdefault(mode, {})
            for figure in rounds[0][mode][row.name]:
                values = [one[mode][row.name][figure] for one in rounds]
                entry[figure] = round(float(np.median(values)), 5)
                if mode != "off":
                    ratios = [100 * (one[mode][row.name][figure] / one["off"][row.name][figure] - 1) for one in rounds]
                    low, middle, high = np.percentile(ratios, [10, 50, 90])
                    entry[f"{figure} overhead_percent"] = {"median": round(middle, 3), "p10": round(low, 3), "p90": round(high, 3)}  # fmt: skip
    return table


def measure_overhead(arguments: argparse.Namespace) -> dict[str, Any]:
    rows: list[Row] = parse_rows(arguments.rows or ROWS[arguments.device])
    source = random.Random(0)
    rounds = []
    for number in range(arguments.rounds):
        order = list(arguments.modes)
        source.shuffle(order)
        found = {mode: measure_mode(arguments, rows, mode) for mode in order}
        rounds.append(found)
        shown = "; ".join(f"{mode} {found[mode][rows[0].name]['median_ms']:.3f} ms" for mode in arguments.modes)
        print(f"round {number + 1} of {arguments.rounds}: {shown}")
    table = compare_modes(rounds, rows)
    for row in rows:
        for mode in arguments.modes[1:]:
            entry = table[row.name][mode]
            shown = ", ".join(
                f"{name.split()[0]} {value['median']:+.2f} %" for name, value in entry.items() if "overhead" in name
            )
            print(f"{row.name}, {mode}: {shown}")
    return {
        "shape": arguments.shape,
        "device": arguments.device,
        "rounds": len(rounds),
        "load_average": os.getloadavg()[0],
        "rows": table,
    }


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=0, help="analysis: of the made-up trace, 32 bytes each")
    parser.add_argument("--batch", type=int, default=64, help="analysis: requests at a time in it")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="analysis: where the trace is kept meanwhile")
    parser.add_argument("--device", choices=("gpu", "emulated"), help="overhead: on which device")
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b", help="overhead: of the model")
    parser.add_argument("--rows", help="overhead: such as d1@1024,d64@1024")
    parser.add_argument("--modes", nargs="+", choices=MODES, help="overhead: beside `off` (default: all)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=64, help="overhead: decode steps of a row at least")
    parser.add_argument("--seconds", type=float, default=2.0, help="overhead, GPU: of each row")
    parser.add_argument("--threads", type=int, default=1, help="overhead, emulated device: CPU threads")
    parser.add_argument("--timeout", type=float, default=300.0)
    parser.add_argument("--commit", help="what is measured, where there is no git to ask")
    parser.add_argument("--out", type=Path, help="JSON of what was measured")
    arguments = parser.parse_args(argv)
    if arguments.modes is None:
        arguments.modes = [mode for mode in MODES if mode != "without" or arguments.device == "gpu"]
    elif "without" in arguments.modes and arguments.device != "gpu":
        parser.error(
            "--modes without: got no --device gpu, expected it: the emulated device has one kernel; leave `without` out"
        )
    arguments.modes = list(dict.fromkeys(["off", *arguments.modes]))
    if not arguments.events and arguments.device is None:
        parser.error("expected --events N, --device, or both")
    if arguments.runs < 1 or arguments.rounds < 1 or arguments.events < 0 or arguments.batch < 1:
        parser.error("expected --runs, --rounds and --batch of at least 1, and --events of at least 0")
    return arguments


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    set_up_logging("warning")
    report = header("bench_trace", argv, arguments.commit, open_nvml() if arguments.device == "gpu" else None)
    try:
        if arguments.events:
            report["analysis"] = measure_analysis(arguments)
        if arguments.device is not None:
            report["overhead"] = measure_overhead(arguments)
    except (RuntimeError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    write_report(report, arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
