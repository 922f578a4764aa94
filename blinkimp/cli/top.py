"""`blinkimp top`: a live view of a running engine in the terminal, or one look at it for scripts.

It reads shared memory (host/engine_view.py) and asks nobody: the engine does not notice it, and it works while the host is stopped.
Called by blinkimp/cli/__init__.py. Test: pytest tests/host/test_top.py
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any, Final

from blinkimp.cli.options import add_engine_name_flag, engine_name_of, new_parser
from blinkimp.cli.ranges import bounded

EPILOG: Final = """\
examples:
  blinkimp top                            the engine named blinkimp, looked at twice a second; Ctrl-C ends it
  blinkimp top --engine-name second --interval 2
  blinkimp top --once                     one look, in words
  blinkimp top --once --json | jq .rates  one look, for a script

what it shows:
  batch     requests in the batch against what it can hold, those that wait for it, those that wait for their ingress to read
  tokens    a second, in (prompt tokens computed, and found in the prefix cache) and out; requests a second
  step      time of the last model step, gap between two steps on the device, rows a step
  pages     KV memory: used by requests, kept by the prefix cache, free; share of prompt tokens that the cache had
  qp        queue pairs: who serves each (process), entries in its rings, unfinished requests, tokens a second, times its ring was full
  GPU       power and clocks, where the engine runs on one

what happens: the engine's status page, its queue pairs and the ingresses' counters are mapped read-only; nothing is written, no process is
asked. Only the user who started the engine can. Rates are of the time between two looks (--interval); --once looks twice.

where next:
  curl http://127.0.0.1:8000/metrics      the same for Prometheus (blinkimp serve --http, or --metrics; nic_shim/METRICS.md)
  blinkimp tune --help                    change the limits of the batch while it runs
"""


def add_parser(subparsers: Any, summary: str) -> None:
    parser = new_parser(subparsers, "top", summary, EPILOG, usage="[options]")
    add_engine_name_flag(parser)
    parser.add_argument(
        "--interval",
        type=bounded(float, "seconds", 0.05, 3600.0),
        default=0.5,
        metavar="S",
        help="between two looks (default 0.5)",
    )
    parser.add_argument(
        "--once", action="store_true", help="one look; also where stdout is not a terminal, or a dumb one"
    )
    parser.add_argument("--json", action="store_true", help="with --once: one JSON object")


def run(options: argparse.Namespace) -> int:
    from rich.console import Console

    from blinkimp.cli.top_snapshot import Watcher
    from blinkimp.host.shared_memory import SharedMemoryError

    if options.json and not options.once:
        print("blinkimp top: --json is for one look: got it alone, expected --once --json; add --once", file=sys.stderr)
        return 2
    name = engine_name_of(options)
    console = Console()
    try:
        watcher = Watcher(name)
        if options.once or not console.is_terminal or console.is_dumb_terminal:  # one that cannot move its cursor
            return _look_once(console, watcher, options)
        return _live(console, watcher, options.interval)
    except SharedMemoryError as error:
        print(f"blinkimp top: {error}", file=sys.stderr)
        return 1


def _look_once(console: Any, watcher: Any, options: argparse.Namespace) -> int:
    watcher.look()
    time.sleep(options.interval)
    snapshot = watcher.look()
    if options.json:
        import msgspec

        print(msgspec.json.encode(snapshot).decode())
    else:
        from blinkimp.cli.top_screen import render

        console.print(render(snapshot, (), columns=console.width))
    return 0


def _live(console: Any, watcher: Any, interval_s: float) -> int:
    from collections import deque

    from rich.live import Live
    from rich.text import Text

    from blinkimp.cli.top_screen import render
    from blinkimp.host.shared_memory import SharedMemoryError

    history: deque[float] = deque(maxlen=120)
    watcher.look()
    with Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            time.sleep(interval_s)
            try:
                snapshot = watcher.look()
                history.append(snapshot["rates"]["output_tokens_per_s"])
                live.update(render(snapshot, tuple(history), columns=console.width), refresh=True)
            except SharedMemoryError as error:  # it may be started anew
                live.update(Text(f"waiting for the engine: {error}", style="yellow"), refresh=True)
