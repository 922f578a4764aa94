"""`blinkimp trace`: records what a running engine does, and says where the time went.

Called by blinkimp/cli/__init__.py. Test: pytest tests/host/test_cli_trace.py
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final

from blinkimp.cli.options import add_engine_name_flag, engine_name_of, new_parser, new_part
from blinkimp.cli.ranges import count, duration

EPILOG = """\
examples:
  blinkimp serve --trace-events 1048576 --trace-op-period 64 &            the engine keeps a trace; op times of every 64th step
  blinkimp trace record --seconds 30 -o run.trace                         attach, record, go away; the engine does not notice
  blinkimp trace stats run.trace                                          steps, ops, the director's gap, requests' timelines, ring occupancy
  blinkimp trace timeline run.trace --slowest 5                           what the five slowest requests waited for
  blinkimp trace export run.trace --perfetto run.json.gz                  open it at ui.perfetto.dev
  blinkimp trace export run.trace --parquet run.parquet                   one row an event, for polars, DuckDB, pandas (pip install 'blinkimp[trace]')
  blinkimp trace diff before.trace after.trace                            where time moved between two runs
  blinkimp trace arrivals captured/ -o arrivals.jsonl                     requests of a live run, for `blinkimp bench --replay arrivals.jsonl`

what happens: the device writes 32-byte events into a ring in shared memory, each ingress its own; `record` copies them to one file, with
samples of the rings and pings that tell how far the device's clock is from the host's. A ring that is overrun is told (`lost`).
The file's layout and what every figure means: blinkimp/trace/TRACE.md.
"""
EXAMPLES: Final = {  # one a line
    "record": "blinkimp trace record --seconds 30 -o run.trace\n"
    "blinkimp trace record --from-start --seconds 1 -o before.trace        what has just happened",
    "stats": "blinkimp trace stats run.trace\nblinkimp trace stats run.trace --json | jq .requests",
    "timeline": "blinkimp trace timeline run.trace --slowest 5\n"
    "blinkimp trace timeline run.trace --request 0x16d46746e8c1d167 --tokens",
    "export": "blinkimp trace export run.trace --perfetto run.json.gz --from 2 --to 4\n"
    "blinkimp trace export run.trace --parquet run.parquet",
    "diff": "blinkimp trace diff before.trace after.trace",
    "arrivals": "blinkimp trace arrivals captured/ -o arrivals.jsonl",
}
MAX_PERFETTO_EVENTS: Final = 5_000_000
FILE_COLUMNS: Final = 170


def request_id(text: str) -> int:
    try:
        return int(text, 0)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number such as 0x1f3a") from None


def add_parser(subparsers: Any, summary: str) -> None:
    parser = new_parser(
        subparsers, "trace", summary, EPILOG, usage="(record | stats | timeline | export | diff | arrivals) ..."
    )
    parts = parser.add_subparsers(dest="part", metavar="PART", required=True, prog="blinkimp trace")
    record = new_part(parts, "record", "copy what a running engine traces into a file", EXAMPLES["record"])
    add_engine_name_flag(record)
    record.add_argument(
        "--seconds",
        type=duration(above=True),
        default=10.0,
        metavar="S",
        help="how long (default %(default)s); Ctrl-C ends it earlier",
    )
    record.add_argument(
        "-o", "--out", type=Path, required=True, metavar="FILE", help="the trace; an existing file is replaced"
    )
    record.add_argument(
        "--from-start", action="store_true", help="with what the rings still have from before: a flight recorder"
    )
    record.add_argument(
        "--no-pings",
        action="store_true",
        help="align clocks from requests alone; pings need a queue pair that no ingress uses",
    )
    record.set_defaults(run=run_record)
    stats = new_part(parts, "stats", "steps, ops, requests, ring occupancy", EXAMPLES["stats"])
    stats.add_argument("file", type=Path, help="a trace")
    stats.add_argument("--json", action="store_true", help="as JSON, in place of tables")
    stats.set_defaults(run=run_stats)
    timeline = new_part(parts, "timeline", "requests, event by event", EXAMPLES["timeline"])
    timeline.add_argument("file", type=Path, help="a trace")
    which = timeline.add_mutually_exclusive_group(required=True)
    which.add_argument("--request", type=request_id, metavar="ID", help="its id on the ring, such as 0x1f3a")
    which.add_argument("--slowest", type=count(1), metavar="N", help="the N requests that took longest")
    timeline.add_argument("--tokens", action="store_true", help="every token, not only the first and the last")
    timeline.set_defaults(run=run_timeline)
    export = new_part(parts, "export", "for ui.perfetto.dev, or as a table", EXAMPLES["export"])
    export.add_argument("file", type=Path, help="a trace")
    export.add_argument("--perfetto", type=Path, metavar="OUT", help="Chrome JSON trace events; .gz compresses")
    export.add_argument("--gzip", action="store_true", help="compress --perfetto whatever it is called")
    export.add_argument("--parquet", type=Path, metavar="OUT", help="one row an event; needs pyarrow")
    export.add_argument(
        "--from", dest="from_s", type=float, default=0.0, metavar="S", help="--perfetto: seconds from the trace's begin"
    )
    export.add_argument(
        "--to", dest="to_s", type=float, default=float("inf"), metavar="S", help="--perfetto: until then"
    )
    export.add_argument(
        "--max-events",
        type=count(1),
        default=MAX_PERFETTO_EVENTS,
        metavar="N",
        help="--perfetto: at most (default %(default)s)",
    )
    export.set_defaults(run=run_export)
    diff = new_part(parts, "diff", "where time moved between two traces", EXAMPLES["diff"])
    diff.add_argument("before", type=Path, help="a trace")
    diff.add_argument("after", type=Path, help="another")
    diff.add_argument("--json", action="store_true", help="as JSON, in place of tables")
    diff.set_defaults(run=run_diff)
    arrivals = new_part(
        parts, "arrivals", "what a live run was asked, for `blinkimp bench --replay`", EXAMPLES["arrivals"]
    )
    arrivals.add_argument(
        "sources", type=Path, nargs="+", metavar="SOURCE",
        help="folder of `blinkimp serve --capture-arrivals` (prompts, seeds, outputs to compare), or a trace (lengths only)",
    )  # fmt: skip
    arrivals.add_argument("-o", "--out", type=Path, required=True, metavar="FILE", help="JSON lines, one a request")
    arrivals.set_defaults(run=run_arrivals)


def run(options: argparse.Namespace) -> int:
    status: int = options.run(options)
    return status


def run_record(options: argparse.Namespace) -> int:
    import signal

    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from blinkimp.cli.terminal import stderr_console
    from blinkimp.trace.file import Lost
    from blinkimp.trace.recorder import Recorder

    name = engine_name_of(options)
    stopping: list[int] = []
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    with (
        Progress(*columns, console=stderr_console, transient=True, disable=not stderr_console.is_terminal) as bar,
        Recorder(name, options.out, pings=not options.no_pings, from_start=options.from_start) as recorder,
    ):
        if not recorder.has_pings and not options.no_pings:
            print(
                "no queue pair is free for pings: clocks are aligned from requests alone (--num-queue-pairs gives more)"
            )

        def progress(num_events: int, lost: Lost, seconds: float) -> None:
            text = f"{num_events} events, {lost.device + lost.ingress} lost"
            bar.update(task, description=text, completed=seconds)

        task = bar.add_task("recording", total=options.seconds)

        before = signal.signal(signal.SIGINT, lambda number, _frame: stopping.append(number))
        try:
            metadata = recorder.run(options.seconds, should_stop=lambda: bool(stopping), progress=progress)
        finally:
            signal.signal(signal.SIGINT, before)
        num_events, num_op_samples = recorder.writer.num_events, recorder.writer.num_op_samples
    lost = metadata.lost
    print(
        f"wrote {options.out}: {num_events} events, op times of {num_op_samples} steps; ended by: {metadata.ended_by}"
    )
    if lost.device or lost.ingress or lost.op_samples:
        print(
            f"lost: {lost.device} events of the device, {lost.ingress} of ingresses, op times of {lost.op_samples} steps; "
            "start the engine with larger --trace-events, or give the recorder a CPU"
        )
    if metadata.clock.knots:
        print(f"clocks: aligned within {max(knot[2] for knot in metadata.clock.knots) / 1e3:.1f} us")
    else:
        print(
            "clocks: not aligned, because nothing went through the rings; device and ingress times cannot be compared"
        )
    return 0 if num_events else 1


def output_console() -> Any:
    """As wide as the terminal; elsewhere wide enough for every table."""
    import sys

    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else FILE_COLUMNS)


def run_stats(options: argparse.Namespace) -> int:
    import json

    from blinkimp.trace.figures import figures_of
    from blinkimp.trace.file import TraceFile
    from blinkimp.trace.tables import print_figures

    figures = figures_of(TraceFile(options.file))
    if options.json:
        print(json.dumps(figures, indent=2))
    else:
        print_figures(figures, output_console())
    return 0


def run_timeline(options: argparse.Namespace) -> int:
    from blinkimp.trace.errors import TraceError
    from blinkimp.trace.file import TraceFile
    from blinkimp.trace.tables import timeline_table
    from blinkimp.trace.timeline import longest, timeline

    trace = TraceFile(options.file)
    console = output_console()
    request_ids = [options.request] if options.request is not None else longest(trace, options.slowest)
    if not request_ids:
        raise TraceError(
            f"{options.file}: has no request from its begin to its end, expected one; `blinkimp trace stats` tells what it has"
        )
    for request_id in request_ids:
        table = timeline_table(request_id, timeline(trace, request_id), every_token=options.tokens)
        console.print(table, "", highlight=False, markup=False)
    return 0


def run_export(options: argparse.Namespace) -> int:
    from blinkimp.outputs import check_outputs
    from blinkimp.trace.errors import TraceError
    from blinkimp.trace.file import TraceFile
    from blinkimp.trace.parquet import export_parquet
    from blinkimp.trace.perfetto import Window, export_perfetto

    if options.perfetto is None and options.parquet is None:
        raise TraceError(
            "export: got no format, expected --perfetto OUT.json or --parquet OUT.parquet; give one, or both"
        )
    path: Path | None = options.perfetto
    if path is not None and options.gzip and path.suffix != ".gz":
        path = path.with_name(path.name + ".gz")
    check_outputs([path, options.parquet], [options.file])
    trace = TraceFile(options.file)
    if path is not None:
        num_events, is_whole = export_perfetto(
            trace, path, window=Window(options.from_s, options.to_s), max_events=options.max_events
        )
        print(f"wrote {path}: {num_events} events; open it at https://ui.perfetto.dev (it stays on this machine)")
        if not is_whole:
            print(f"that is not all: --max-events {options.max_events} was reached; --from and --to choose a stretch")
        if not trace.clock.is_known:
            print("the clocks are not aligned: only the device's tracks are there")
    if options.parquet is not None:
        print(f"wrote {options.parquet}: {export_parquet(trace, options.parquet)} rows")
    return 0


def run_diff(options: argparse.Namespace) -> int:
    import msgspec

    from blinkimp.trace.diff import compare, print_comparison
    from blinkimp.trace.file import TraceFile

    found = compare(TraceFile(options.before), TraceFile(options.after))
    if options.json:
        print(msgspec.json.format(msgspec.json.encode(found)).decode())
    else:
        print_comparison(found, output_console())
    return 0


def run_arrivals(options: argparse.Namespace) -> int:
    from blinkimp.trace.arrivals import check_arrivals_output, collect_arrivals, write_arrivals

    check_arrivals_output(options.out, options.sources)
    found = collect_arrivals(options.sources)
    write_arrivals(options.out, found)
    num_prompts = sum(bool(arrival.prompt_ids) for arrival in found)
    num_outcomes = sum(arrival.outcome is not None for arrival in found)
    seconds = (found[-1].at_ns - found[0].at_ns) / 1e9
    print(
        f"wrote {options.out}: {len(found)} requests in {seconds:.1f} s, {num_prompts} with their prompts, {num_outcomes} with what they came to; "
        f"blinkimp bench --connect ... --replay {options.out}"
    )
    return 0
