"""`blinkimp tune`: changes limits of a running engine's schedule, from the next step on.

Called by blinkimp/cli/__init__.py. Test: pytest tests/host/test_tune.py
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from blinkimp.cli.options import add_engine_name_flag, engine_name_of, new_parser
from blinkimp.cli.ranges import duration

EPILOG = """\
examples:
  blinkimp tune --max-running 64                     at most 64 requests in the batch; those that run go on
  blinkimp tune --step-tokens 512 --prefill-chunk 256
  blinkimp tune --aging-ms 5000                      5 s of waiting are worth one priority level; `never` turns aging off
  blinkimp tune --max-running 0                      as launched again

what happens: the words are written to the engine's control page in shared memory, and the command returns when the director says that it
obeys them. What is not named stays as it is; more than the engine was launched for counts as that. Only the user who started the engine can.
"""


def aging(text: str) -> int:
    from blinkimp.host.tuning import NEVER

    if text != "never" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected milliseconds such as 5000, or never")
    return NEVER if text == "never" else int(text)


def add_parser(subparsers: Any, summary: str) -> None:
    parser = new_parser(subparsers, "tune", summary, EPILOG, usage="[options]")
    parser.add_argument("--max-running", type=int, metavar="N", help="requests in the batch; 0 = as launched")
    parser.add_argument("--step-tokens", type=int, metavar="N", help="tokens (rows) of a step")
    parser.add_argument(
        "--prefill-chunk",
        type=int,
        metavar="N",
        dest="prefill_chunk_tokens",
        help="prompt tokens of one request in a step",
    )
    parser.add_argument(
        "--aging-ms", type=aging, metavar="MS", help="waiting that is worth one priority level, or never"
    )
    parser.add_argument(
        "--timeout", type=duration(), default=5.0, metavar="S", help="how long the director may take (5)"
    )
    add_engine_name_flag(parser)


def run(options: argparse.Namespace) -> int:
    from blinkimp import ring_abi as abi
    from blinkimp.host.shared_memory import SharedMemoryError, open_engine_page
    from blinkimp.host.tuning import NEVER, WORDS, TuningError, write_tuning

    words = {name: getattr(options, name) for name in WORDS}
    try:
        name = engine_name_of(options)
        with open_engine_page(name, writable=True) as region:
            obeyed = write_tuning(region.view(abi.ENGINE_PAGE), options.timeout, **words)
    except (SharedMemoryError, TuningError) as error:
        print(f"blinkimp tune: {error}", file=sys.stderr)
        return 1
    for word, value in obeyed.items():
        print(
            f"{word:<22} {'as launched' if value == 0 else 'never' if value == NEVER and word == 'aging_ms' else value}"
        )
    return 0
