"""`blinkimp lab evidence`: the whole comparison under interference, in calls of limited length, and the page of its results.

Called by blinkimp/cli/lab.py. Test: pytest tests/host/test_evidence.py
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

from blinkimp.cli.options import HelpFormatter
from blinkimp.cli.ranges import amount, count, duration, listed

SHAPE: Final = "llama-3-8b"  # --model: made up by the lab, with weights made up by each engine
START_S: Final = {"persistent": 30.0, "cpu": 30.0, "cpu-ahead": 30.0, "vllm": 110.0}  # until measured; with the warm-up
EMULATED_START_S: Final = 8.0
CONTEXT: Final = 4096
MOST_THREADS: Final = 100_000  # of interference
EPILOG: Final = """\
examples:
  blinkimp lab evidence --resume evidence --plan                                   what is measured in which order, with estimates
  blinkimp lab evidence --resume evidence --budget-s 540 \\
      --vllm-command 'python3 -m vllm.entrypoints.cli.main serve {model} --load-format dummy --max-model-len 4096 \\
                      --no-enable-prefix-caching --host 127.0.0.1 --port {port}'   one call; the same command goes on
  blinkimp lab evidence --resume evidence --report RESULTS.md                      tables and plots of what is there (.html: one file)
  CUDA_VISIBLE_DEVICES=0 taskset -c 0-15  blinkimp lab evidence --resume evidence/1 --engines persistent --room evidence/room &
  CUDA_VISIBLE_DEVICES=1 taskset -c 16-31 blinkimp lab evidence --resume evidence/2 --engines cpu --room evidence/room
                                          side by side on GPUs of one host; --report takes `--resume evidence`, all of it

engines: persistent (this server), cpu and cpu-ahead (this server with that --orchestrator), vllm (--vllm-command; put `env NAME=VALUE` before it
for its environment).
All serve the Llama-3-8B shape with made-up weights, greedily, without a prefix cache, to the same client.
"""


def add_evidence_parser(parts: Any, words: Any) -> None:
    parser = parts.add_parser(
        "evidence",
        help="engines x interference x loads in resumable calls, and the page of results",
        epilog=EPILOG,
        description="the whole comparison under interference, and the page of its results",
        formatter_class=HelpFormatter,
    )
    parser.add_argument("--resume", type=Path, required=True, metavar="DIR", help="where the state and the results are")
    parser.add_argument(
        "--budget-s",
        type=duration(above=True),
        default=540.0,
        metavar="S",
        help="a call's length (default %(default)s)",
    )
    parser.add_argument(
        "--room", type=Path, metavar="FILE", help="in common with processes that measure other engines at the same time"
    )
    parser.add_argument("--plan", action="store_true", help="print what would be measured, and stop")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write the page (.md or .html) and stop")
    engines = parser.add_argument_group("engines")
    engines.add_argument(
        "--engines", type=words, default="persistent,cpu,vllm", metavar="LIST", help="of persistent,cpu,cpu-ahead,vllm"
    )
    engines.add_argument("--vllm-command", metavar="TEXT", help="starts vLLM; {model} and {port} are filled in")
    engines.add_argument(
        "--model", default=SHAPE, metavar="MODEL", help=f"`{SHAPE}` (made up), `embedded`, or a folder"
    )
    engines.add_argument("--device", choices=("gpu", "emulated"), default="gpu", help="of our engines")
    engines.add_argument("--serve-flags", default="", metavar="TEXT", help="more flags for `blinkimp serve`")
    engines.add_argument(
        "--trace",
        action="store_true",
        help="keep a trace of each cell of ours, and tell where its time went; costs a percent: in a folder of its own",
    )
    engines.add_argument("--transports", type=words, default="http,zmq", metavar="LIST", help="of our engines")
    grid = parser.add_argument_group("what is varied")
    grid.add_argument(
        "--rates",
        type=listed(amount(above=True)),
        default="2,4,8,16,32",
        metavar="LIST",
        help="requests/s of open loops",
    )
    grid.add_argument("--open-lengths", default="512x128", metavar="L", help="their prompt and output tokens")
    grid.add_argument("--users", type=listed(count(1)), default="4,16,64,128", metavar="LIST", help="of closed loops")
    grid.add_argument("--closed-lengths", default="1k1k", metavar="L", help="their prompt and output tokens")
    grid.add_argument(
        "--threads", type=listed(count(0, MOST_THREADS)), default="0,16,32,64", metavar="LIST", help="interfering ones"
    )
    grid.add_argument("--interference", default="stream+bz2", metavar="KIND", help="a kind, or a mixture of kinds")
    grid.add_argument(
        "--placements", type=words, default="reserved,sharing", metavar="LIST", help="who has which CPUs; LAB.md"
    )
    grid.add_argument("--reserved-cpus", type=int, default=2, metavar="N", help="for client and ingress")
    grid.add_argument(
        "--seconds",
        type=duration(above=True),
        default=20.0,
        metavar="S",
        help="of counted sending in a cell (default %(default)s)",
    )
    grid.add_argument("--warmup", type=duration(), default=2.0, metavar="S", help="of sending before, not counted")
    grid.add_argument("--seed", type=count(), default=0, metavar="N", help="of arrivals, lengths and prompts")
    parser.add_argument(
        "--cpus", type=count(1), metavar="N", help="--plan: of the machine that it is for (default: this one's)"
    )
    parser.add_argument("--commit", default="", metavar="TEXT", help="what is measured, where there is no git to ask")


def engine_name(engine: str) -> str:
    return f"evidence-{engine}-{os.getpid()}"


def serve_command(options: argparse.Namespace, engine: str, load_format: str) -> str:
    from blinkimp.lab.cell_trace import trace_flags

    flags = [
        "--device",
        options.device,
        "--load-format",
        load_format,
        "--prefix-cache",
        "false",
        "--log-level",
        "warning",
    ]
    flags += ["--max-context", str(CONTEXT)] if options.model == SHAPE else []
    flags += ["--bind", "tcp://127.0.0.1:{zmq_port}"]
    flags += ["--http", "127.0.0.1:{port}"] if "http" in options.transports else []
    flags += ["--engine-name", engine_name(engine)]
    flags += trace_flags(engine) if options.trace else []
    flags += ["--orchestrator", "gpu" if engine == "persistent" else engine]
    command = [sys.executable, "-m", "blinkimp", "serve", "--model", "{model}", *flags]
    return shlex.join([*command, *shlex.split(options.serve_flags)])


def grid_of(options: argparse.Namespace) -> Any:
    from blinkimp.bench.errors import LoadError
    from blinkimp.lab.burner import is_kind
    from blinkimp.lab.engines import words_of_command
    from blinkimp.lab.evidence_plan import EngineFacts, EvidenceGrid
    from blinkimp.lab.sweep import parse_scenario

    for name, given, known in (
        ("engines", options.engines, START_S),
        ("transports", options.transports, ("http", "zmq")),
        ("placements", options.placements, ("reserved", "sharing")),
    ):
        if not given or not set(given) <= set(known):
            raise LoadError(f"--{name}: got {','.join(given)!r}, expected some of {', '.join(known)}")
    for flags, values in (("--rates and --users", options.rates + options.users), ("--threads", options.threads)):
        if not values:
            raise LoadError(f"{flags}: got none, expected at least one, such as 4")
    for flag, text in (("--vllm-command", options.vllm_command or ""), ("--serve-flags", options.serve_flags)):
        words_of_command(flag, text)
    if not is_kind(options.interference):
        raise LoadError(
            f"--interference: got {options.interference!r}; see `blinkimp lab interference --help` for kinds"
        )
    starts = START_S if options.device == "gpu" else dict.fromkeys(START_S, EMULATED_START_S)
    engines = tuple(
        EngineFacts(
            name,
            ("http",) if name == "vllm" else tuple(options.transports),
            starts[name],
            is_cpu_on_path=name != "persistent",
        )
        for name in options.engines
    )
    return EvidenceGrid(
        engines=engines,
        rates=tuple(options.rates),
        open_scenario=parse_scenario(options.open_lengths),
        users=tuple(options.users),
        closed_scenario=parse_scenario(options.closed_lengths),
        threads=tuple(options.threads),
        placements=tuple(options.placements),
        interference=options.interference,
        seconds=options.seconds,
        warmup_s=options.warmup,
        num_cpus=options.cpus or len(os.sched_getaffinity(0)),
        num_reserved=options.reserved_cpus,
        seed=options.seed,
        is_traced=options.trace,
    )


def run_evidence_part(options: argparse.Namespace) -> int:
    from blinkimp.bench.errors import LoadError
    from blinkimp.lab.evidence_report import write_evidence_report
    from blinkimp.lab.plots import check_plots
    from blinkimp.outputs import check_outputs

    if options.report is not None:
        check_outputs([options.report])
        check_plots()
        print(f"wrote {options.report}: {write_evidence_report(options.resume, options.report)} cells")
        return 0
    grid = grid_of(options)
    if options.resume.exists() and not options.resume.is_dir():
        raise LoadError(
            f"--resume: got {options.resume}, which is a file; expected a folder, or a new name; choose another"
        )
    if options.plan:
        print_plan(grid, options)
        return 0
    if options.cpus is not None:
        raise LoadError("--cpus: it is for --plan; a run takes the CPUs that there are (taskset gives it fewer)")
    return measure_call(grid, options)


def print_plan(grid: Any, options: argparse.Namespace) -> None:
    from blinkimp.lab.evidence_plan import cells_of, estimate_s, simulate
    from blinkimp.lab.store import Store

    store = Store(options.resume / "cells")
    cells = cells_of(grid)
    missing = [cell for cell in cells if store.get(cell.key) is None]
    calls = simulate(grid, missing, options.budget_s)
    for number, lines in enumerate(calls, 1):
        print(f"call {number}")
        print("\n".join(f"  {line}" for line in lines))
    for tier in sorted({cell.tier for cell in cells}):
        of_tier = [cell for cell in cells if cell.tier == tier]
        left = [cell for cell in of_tier if cell in missing]
        seconds = sum(estimate_s(grid, cell) for cell in left)
        print(f"tier {tier} (round {of_tier[0].round}): {len(left)} of {len(of_tier)} cells missing, {seconds:.0f} s")
    print(
        f"{len(missing)} of {len(cells)} cells missing, {len(calls)} calls of {options.budget_s:g} s by these estimates"
    )


def measure_call(grid: Any, options: argparse.Namespace) -> int:
    from blinkimp.bench.errors import LoadError
    from blinkimp.cli.terminal import LoadingBars, ends_in_order
    from blinkimp.config import Config, model_folder
    from blinkimp.host.power import open_nvml
    from blinkimp.lab.evidence import Setup, run_evidence
    from blinkimp.lab.room import Room
    from blinkimp.lab.shape_model import write_llama_3_8b
    from blinkimp.nic_shim.tokenizer import Tokenizer

    if "vllm" in options.engines and not options.vllm_command:
        raise LoadError("vllm: got no command that starts it; expected --vllm-command, or --engines persistent,cpu")
    # The engine's processes are its own group's: they end with this one only if it ends as Python does.
    with ends_in_order(), tempfile.TemporaryDirectory(prefix="blinkimp-evidence-") as made:
        model, load_format = options.model, "auto"
        if model == SHAPE:
            model, load_format = made, "dummy"
            vocab_size = write_llama_3_8b(Path(made))
        else:
            vocab_size = Tokenizer(model_folder(Config(model=model))).vocab_size
        commands = {name: serve_command(options, name, load_format) for name in options.engines if name != "vllm"}
        if "vllm" in options.engines:
            commands["vllm"] = options.vllm_command
        room = None if options.room is None else Room(options.room)
        traced = {name: engine_name(name) for name in options.engines if options.trace and name != "vllm"}
        setup = Setup(grid, commands, model, vocab_size, open_nvml(), options.commit, room, traced)
        with LoadingBars() as bars:
            num_failed, _ = run_evidence(setup, options.resume, budget_s=options.budget_s, progress=bars)
    return 1 if num_failed else 0
