"""`blinkimp lab`: sweeps over loads, interference on the host's CPU, reports of both, and the evidence (evidence.py).

Called by blinkimp/cli/__init__.py. Test: pytest tests/host/test_lab_sweep.py tests/host/test_lab_interference.py
"""

from __future__ import annotations

import argparse
import io
import os
import sys
from pathlib import Path
from typing import Any, Final

from blinkimp.cli.bench import add_target_flags, target_of
from blinkimp.cli.evidence import MOST_THREADS, add_evidence_parser, run_evidence_part
from blinkimp.cli.options import new_parser, new_part
from blinkimp.cli.ranges import amount, count, duration, listed

IDLE_S: Final = 2.0  # how long an idle GPU's power is looked at
EPILOG = """\
examples:
  blinkimp lab sweep --connect tcp://127.0.0.1:5555 --label persistent --folder results/sweep
  blinkimp lab sweep --url http://127.0.0.1:8000 --label vllm --folder results/sweep --scenarios 1k1k --rates 2,4,8
  blinkimp lab interference --folder results/noise --loads r8:512x128 c16:1k1k --threads 16,32,64 --reserved-cpus 2 \\
      --engine persistent tcp://127.0.0.1:5601 'blinkimp serve --model ~/llama --bind tcp://127.0.0.1:5601' \\
      --engine vllm http://127.0.0.1:8000 'python3 -m vllm.entrypoints.cli.main serve ~/llama --port 8000'
  blinkimp lab evidence --resume evidence --plan                                    the whole comparison; lab evidence --help
  blinkimp lab report --folder results/sweep results/noise --out report.html        one file, opens offline; report.md: Markdown and SVG

what happens: every cell (a load on an engine, with or without interference) is measured by the client of `blinkimp bench` and written to the
folder at once. The same command goes on where it was interrupted; failed cells are tried again. Plots need matplotlib: pip install 'blinkimp[lab]'.
How to read the figures: blinkimp/lab/LAB.md.
"""


rates = listed(amount(above=True))
intensities = listed(amount())
positive_counts = listed(count(1))
thread_counts = listed(count(0, MOST_THREADS))


def words(text: str) -> list[str]:
    return [part for part in text.split(",") if part]


SWEEP_EXAMPLES: Final = """\
blinkimp lab sweep --connect tcp://127.0.0.1:5555 --folder results/sweep --scenarios 512x128 --concurrency 4,16
blinkimp lab sweep --url http://127.0.0.1:8000 --folder results/sweep --rates 2,4,8 --report sweep.html
"""
INTERFERENCE_EXAMPLES: Final = """\
blinkimp lab interference --folder results/noise --loads r8:512x128 --kinds stream,bz2 --threads 16 --report noise.html \\
    --engine persistent tcp://127.0.0.1:5601 'blinkimp serve --bind tcp://127.0.0.1:5601 --engine-name noise'
"""
REPORT_EXAMPLES: Final = """\
blinkimp lab report --folder results/sweep results/noise --out report.html
"""


def add_parser(subparsers: Any, summary: str) -> None:
    parser = new_parser(
        subparsers, "lab", summary, EPILOG, usage="(sweep | interference | evidence | report) [options]"
    )
    parts = parser.add_subparsers(dest="part", metavar="PART", required=True, prog="blinkimp lab")
    sweep = new_part(parts, "sweep", "throughput and latency over concurrency and rates", SWEEP_EXAMPLES)
    add_target_flags(sweep)
    sweep.add_argument(
        "--scenarios",
        type=words,
        default="1k1k,1k8k,8k1k",
        metavar="LIST",
        help="prompt and output tokens, such as 512x128",
    )
    sweep.add_argument(
        "--concurrency",
        type=positive_counts,
        default="4,8,16,32,64,128,256",
        metavar="LIST",
        help="users of closed loops",
    )
    sweep.add_argument(
        "--rates", type=rates, default="", metavar="LIST", help="requests/s of open loops; none by default"
    )
    sweep.add_argument("--range-ratio", type=float, default=0.8, metavar="R", help="lengths are uniform in [R * L, L]")
    sweep.add_argument(
        "--requests-per-user",
        type=count(1),
        default=10,
        metavar="N",
        help="requests of a closed loop for each of its users",
    )
    sweep.add_argument("--duration", type=duration(above=True), default=60.0, metavar="S", help="of each open loop")
    sweep.add_argument("--warmup", type=duration(), default=5.0, metavar="S", help="of each open loop, not counted")
    noise = new_part(parts, "interference", "engines beside interference on the host's CPU", INTERFERENCE_EXAMPLES)
    noise.add_argument(
        *("--engine", "--engines"), nargs="+", action="append", required=True, metavar="WORD",
        help="NAME ADDRESS [COMMAND]: a server, and how to start it; once for each engine",
    )  # fmt: skip
    noise.add_argument(
        "--loads", nargs="+", default=["r8:512x128"], metavar="LOAD",
        help="r<requests/s>:<lengths> or c<users>:<lengths> (default r8:512x128)",
    )  # fmt: skip
    noise.add_argument(
        "--kinds", type=words, default="arithmetic,stream,llc,tlb,syscall,bz2,compile,stress-ng", metavar="LIST",
        help="of interference, as LAB.md tells them; a+b: threads take turns",
    )  # fmt: skip
    noise.add_argument(
        "--intensities",
        type=intensities,
        metavar="LIST",
        help="threads per contested CPU (default 0.5,1,2; none with --threads)",
    )
    noise.add_argument("--threads", type=thread_counts, default="", metavar="LIST", help="threads outright")
    noise.add_argument(
        "--placements", type=words, default="reserved,sharing", metavar="LIST", help="reserved, sharing, or both"
    )
    noise.add_argument("--reserved-cpus", type=int, default=2, metavar="N", help="for client and ingress")
    noise.add_argument("--duration", type=duration(above=True), default=30.0, metavar="S", help="of each load")
    noise.add_argument("--warmup", type=duration(), default=3.0, metavar="S", help="of each load, not counted")
    noise.add_argument(
        "--start-timeout", type=duration(), default=600.0, metavar="S", help="until an engine must answer"
    )
    noise.add_argument(
        "--room", type=Path, metavar="FILE", help="in common with processes that measure other engines at the same time"
    )
    add_evidence_parser(parts, words)
    report = new_part(parts, "report", "tables and plots of what was measured", REPORT_EXAMPLES)
    for part in (sweep, noise):
        part.add_argument(
            "--folder",
            type=Path,
            required=True,
            metavar="DIR",
            help="where cells are kept; measured ones are not measured again",
        )
        part.add_argument("--seed", type=count(), default=0, metavar="N", help="the same seed gives the same loads")
        part.add_argument(
            "--stop-after", type=duration(), metavar="S", help="begin no cell later; the same command goes on there"
        )
        part.add_argument("--report", type=Path, metavar="FILE", help="write the report of the folder too")
    report.add_argument("--folder", type=Path, nargs="+", required=True, metavar="DIR", help="folders of cells")
    report.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FILE",
        help=".html: one that opens offline; .md: plots in a folder beside it",
    )
    report.add_argument("--title", default="blinkimp lab", metavar="TEXT", help="of the page")


def run(options: argparse.Namespace) -> int:
    from blinkimp.cli.terminal import ends_in_order, set_up_logging
    from blinkimp.lab.plots import check_plots
    from blinkimp.outputs import check_outputs

    set_up_logging("warning")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # a run may be killed with its output in a pipe
    if options.part == "evidence":
        return run_evidence_part(options)
    if options.part == "report":
        from blinkimp.lab.report import write_report
        from blinkimp.lab.store import Store

        check_outputs([options.out])
        check_plots()
        num_cells = write_report([Store(folder) for folder in options.folder], options.out, options.title)
        print(f"wrote {options.out}: {num_cells} cells")
        return 0
    check_outputs([options.report])  # before anything is measured
    if options.report is not None:
        check_plots()
    with ends_in_order():  # the engines that it has started end with it
        num_failed = run_sweep_part(options) if options.part == "sweep" else run_interference_part(options)
    if options.report is not None:
        from blinkimp.lab.report import write_report
        from blinkimp.lab.store import Store

        print(f"wrote {options.report}: {write_report([Store(options.folder)], options.report)} cells")
    return 1 if num_failed else 0


def run_sweep_part(options: argparse.Namespace) -> int:
    from blinkimp.cli.terminal import LoadingBars
    from blinkimp.host.power import idle_power_w, open_nvml
    from blinkimp.lab.store import Store
    from blinkimp.lab.sweep import parse_scenario, points_of, run_sweep

    scenarios = [parse_scenario(text) for text in options.scenarios]
    points = points_of(scenarios, options.concurrency, options.rates)
    target = target_of(options)
    source = open_nvml()
    # The server runs already: what it draws without load, once for all cells.
    idle_w = idle_power_w(source, IDLE_S) if options.idle_w is None else options.idle_w
    with LoadingBars() as bars:
        return run_sweep(
            points,
            target,
            Store(options.folder),
            range_ratio=options.range_ratio,
            duration_s=options.duration,
            warmup_s=options.warmup,
            requests_per_user=options.requests_per_user,
            seed=options.seed,
            source=source,
            idle_w=idle_w,
            progress=bars,
            stop_after_s=options.stop_after,
        )


def run_interference_part(options: argparse.Namespace) -> int:
    from blinkimp.cli.terminal import LoadingBars
    from blinkimp.host.power import idle_power_w, open_nvml
    from blinkimp.lab.engines import EngineSpec, placement_of
    from blinkimp.lab.interference import Grid, parse_load, run_interference, usable_kinds
    from blinkimp.lab.room import Room
    from blinkimp.lab.store import Store

    intensities = options.intensities
    if intensities is None:
        intensities = [] if options.threads else [0.5, 1.0, 2.0]
    grid = Grid(
        placements=[placement_of(name, options.reserved_cpus, os.sched_getaffinity(0)) for name in options.placements],
        kinds=usable_kinds(options.kinds, print),
        intensities=intensities,
        threads=options.threads,
        loads=[parse_load(text) for text in options.loads],
        duration_s=options.duration,
        warmup_s=options.warmup,
        seed=options.seed,
    )
    engines = [EngineSpec.of(parts) for parts in options.engine]
    source = open_nvml()
    idle_w = idle_power_w(source, IDLE_S)  # before any engine is there
    with LoadingBars() as bars:
        return run_interference(
            engines,
            grid,
            Store(options.folder),
            source=source,
            idle_w=idle_w,
            start_timeout_s=options.start_timeout,
            progress=bars,
            stop_after_s=options.stop_after,
            room=None if options.room is None else Room(options.room),
        )
