"""`blinkimp bench`: load against a blinkimp server or any OpenAI-compatible one, and what it did.

Called by blinkimp/cli/__init__.py. Test: pytest tests/host/test_cli_bench.py
"""

from __future__ import annotations

import argparse
import signal
from pathlib import Path
from typing import Any

from blinkimp.cli.client_keys import add_key_flags, security_of
from blinkimp.cli.options import new_parser
from blinkimp.cli.ranges import amount, count, duration

EPILOG = """\
examples:
  blinkimp bench --connect tcp://127.0.0.1:5555 --rate 8 --duration 60 --input-len 512 --output-len 128
  blinkimp bench --url http://127.0.0.1:8000 --concurrency 32 --num-requests 320      any OpenAI-compatible server
  blinkimp bench --connect ... --rate 16 --burstiness 0.5 --lengths sharegpt --duration 120 --warmup 20 --goodput ttft:500 tpot:20
  blinkimp bench --lengths sharegpt --rate 8 --num-requests 1000 --save-trace requests.jsonl      makes a trace, no server needed
  blinkimp bench --connect ... --trace requests.jsonl                                 arrivals and lengths from a file
  blinkimp bench --connect ... --replay arrivals.jsonl                                a live run again: prompts, seeds, times

what happens: --rate is an open loop (requests are sent at random times whatever comes back: Poisson, or gamma with --burstiness), --concurrency
alone a closed loop (so many users, each sends when its last answer is complete); both together cap the open loop. Prompts are random token ids.
Latencies are counted from when a request was sent (as vLLM does), and from when it was meant to be sent, beside it. --out writes JSON with the
keys of vLLM's `bench serve`, and InferenceX's under `inferencex`. Ctrl-C ends the load and shows what it has measured; a second one shows nothing.
Every figure is defined in blinkimp/bench/BENCH.md.

where next:
  blinkimp lab interference --help        the same under CPU interference
"""


def add_parser(subparsers: Any, summary: str) -> None:
    parser = new_parser(
        subparsers,
        "bench",
        summary,
        EPILOG,
        usage="(--connect ENDPOINT | --url URL) (--rate R | --concurrency N | --trace FILE | --replay FILE) ...",
    )
    add_target_flags(parser)
    load = parser.add_argument_group("load")
    load.add_argument("--rate", type=float, metavar="R", help="requests/s of an open loop")
    load.add_argument("--concurrency", type=int, metavar="N", help="requests at a time")
    load.add_argument(
        "--trace", type=Path, metavar="FILE", help='JSON lines {"at_s": 0.5, "input_tokens": 512, "output_tokens": 128}'
    )
    load.add_argument(
        "--replay",
        type=Path,
        metavar="FILE",
        help="arrivals of a live run, from `blinkimp trace arrivals`: the same prompts, seeds and times, and the outputs compared",
    )
    load.add_argument(
        "--time-scale",
        type=float,
        default=1.0,
        metavar="X",
        help="multiplies the times of --trace and --replay; not with --rate or --concurrency",
    )
    load.add_argument(
        "--burstiness",
        type=float,
        default=1.0,
        metavar="B",
        help="of --rate: 1 Poisson (default), below 1 bursts, above 1 more even",
    )
    load.add_argument("--num-requests", type=int, metavar="N", help="how many")
    load.add_argument(
        "--duration", type=float, metavar="S", help="or for how long requests are sent; not with times of a file"
    )
    load.add_argument(
        "--warmup", type=float, default=0.0, metavar="S", help="requests of the first S seconds are not counted"
    )
    load.add_argument(
        "--ramp",
        type=float,
        default=0.0,
        metavar="S",
        help="from nothing to the full load in S seconds; not with times of a file",
    )
    load.add_argument(
        "--drain", type=duration(), default=120.0, metavar="S", help="how long to wait for the last answers"
    )
    load.add_argument(
        "--seed", type=int, default=0, metavar="N", help="the same seed gives the same load; not with --replay"
    )
    add_length_flags(parser)
    output = parser.add_argument_group("output")
    output.add_argument(
        "--goodput", nargs="+", default=[], metavar="NAME:MS", help="limits a good request meets: ttft, tpot, e2el"
    )
    output.add_argument("--out", type=Path, metavar="FILE", help="JSON of the figures")
    output.add_argument(
        "--details", action="store_true", help="per-request lists in the JSON, as vLLM's --save-detailed"
    )
    output.add_argument(
        "--save-trace",
        type=Path,
        metavar="FILE",
        help="write the load's arrivals and lengths as a trace; without a target that is all",
    )


def add_target_flags(parser: argparse.ArgumentParser) -> None:
    target = parser.add_argument_group("target")
    target.add_argument(
        "--connect", metavar="ENDPOINT", help="a blinkimp server's ZeroMQ endpoint, such as tcp://127.0.0.1:5555"
    )
    add_key_flags(target)
    target.add_argument("--url", metavar="URL", help="an OpenAI-compatible server, such as http://127.0.0.1:8000")
    target.add_argument(
        "--model-name",
        metavar="NAME",
        help="the model to ask for, of --url (default: the first one that the server names)",
    )
    target.add_argument("--api-key", metavar="KEY", help="for --url")
    target.add_argument("--chat", action="store_true", help="chat completions in place of completions, for --url")
    target.add_argument(
        "--vocab-size",
        type=count(1),
        metavar="N",
        help="prompts are of ids below it (default: what the server says, else 32000)",
    )
    target.add_argument(
        "--num-gpus",
        type=int,
        default=1,
        metavar="N",
        help="for figures per GPU, at least 1; above 1 no energy: one is measured",
    )
    target.add_argument(
        "--idle-w",
        type=amount(),
        metavar="W",
        help="an idle GPU's power, to be subtracted (default: what it draws right before the load)",
    )
    target.add_argument("--label", default="", help="names the engine in reports")


def add_length_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("lengths, in tokens; not with --trace or --replay, whose file has them")
    group.add_argument(
        "--lengths",
        choices=("fixed", "range", "sharegpt"),
        help="fixed (default), range, or sharegpt: synthetic, alike in distribution",
    )
    group.add_argument("--input-len", type=int, metavar="L", help="of prompts, fixed and range (default 512)")
    group.add_argument("--output-len", type=int, metavar="L", help="of outputs, fixed and range (default 128)")
    group.add_argument(
        "--range-ratio", type=float, metavar="R", help="--lengths range: uniform in [R * L, L] (default 0.8)"
    )
    group.add_argument(
        "--max-total-len", type=int, metavar="L", help="--lengths sharegpt: prompt and output together at most"
    )


def target_of(options: argparse.Namespace) -> Any:
    from blinkimp.bench.runner import Target

    return Target(
        connect=options.connect,
        url=options.url,
        model_name=options.model_name,
        api_key=options.api_key,
        vocab_size=options.vocab_size,
        chat=options.chat,
        num_gpus=options.num_gpus,
        label=options.label,
        security=security_of(options),
    )


def replay_line(replay: dict[str, Any]) -> str:
    """Whether the outputs were those of the live run."""
    if not replay["num_compared"]:
        return "replay: no output to compare (a capture has them, and only ZeroMQ tells token ids)"
    text = f"replay: {replay['num_identical']} of {replay['num_compared']} outputs identical, token by token"
    differing = ", ".join(map(str, replay["differing"]))
    return f"{text}; not those of requests {differing}" if differing else text


def run(options: argparse.Namespace) -> int:
    import asyncio
    import json

    from blinkimp.bench.load_plan import LoadOptions, make_plan, write_trace
    from blinkimp.bench.metrics import parse_slos
    from blinkimp.bench.report import table_of
    from blinkimp.bench.runner import run_load
    from blinkimp.cli.terminal import LoadingBars, set_up_logging
    from blinkimp.host.power import open_nvml
    from blinkimp.outputs import OutputError, check_outputs, replacing

    set_up_logging("warning")
    inputs = [options.trace, options.replay]
    load = LoadOptions(
        rate=options.rate,
        concurrency=options.concurrency,
        burstiness=options.burstiness,
        ramp_s=options.ramp,
        warmup_s=options.warmup,
        num_requests=options.num_requests,
        duration_s=options.duration,
        lengths=options.lengths,
        input_len=options.input_len,
        output_len=options.output_len,
        range_ratio=options.range_ratio,
        trace=options.trace,
        replay=options.replay,
        time_scale=options.time_scale,
        max_total_len=options.max_total_len,
        seed=options.seed,
    )
    if options.save_trace is not None and options.connect is None and options.url is None:
        check_outputs([options.save_trace], inputs)
        write_trace(options.save_trace, make_plan(load, vocab_size=2))
        print(f"wrote {options.save_trace}")
        return 0
    slos = parse_slos(options.goodput)
    # Before the load: figures of an hour are not lost for a folder that is not there.
    check_outputs([options.out, options.save_trace], inputs)
    with LoadingBars() as bars:
        report = asyncio.run(
            run_load(
                load,
                target_of(options),
                slos=slos,
                progress=bars,
                drain_s=options.drain,
                source=open_nvml(),
                idle_w=options.idle_w,
                details=options.details,
                keeps_when_cancelled=True,
            )
        )
    failure = None
    try:  # before anything is printed: a terminal that is gone costs the table alone
        if options.out is not None:
            with replacing(options.out) as temporary:
                temporary.write_text(json.dumps(report, indent=2) + "\n")
    except OutputError as error:
        failure = error
    print(table_of(report))
    if "replay" in report:
        print(replay_line(report["replay"]))
    if failure is not None:
        print(json.dumps(report))  # in place of the file: the load is not to be measured again for it
        raise failure
    if options.out is not None:
        print(f"wrote {options.out}")
    if options.save_trace is not None:
        write_trace(options.save_trace, make_plan(load, vocab_size=2))
    if report["stopped_early"]:
        return 128 + signal.SIGINT
    return 0 if report["completed"] else 1
