"""`blinkimp generate`: completes one prompt and streams the completion to stdout.

Called by blinkimp/cli/__init__.py. Test: pytest tests/host/test_cli.py
"""

from __future__ import annotations

import argparse
import sys
import time
from typing import Any

from rich.markup import escape

from blinkimp.cli.client_keys import security_of
from blinkimp.cli.local_server import add_server_flags, server_for
from blinkimp.cli.options import add_sampling_flags, new_parser, sampling_of
from blinkimp.cli.terminal import stderr_console
from blinkimp.cli.user_text import checked, hide_bad_bytes

EPILOG = """\
examples:
  blinkimp generate 'def read_file(path):'
  blinkimp generate --max-tokens 400 --temperature 0.8 --seed 7 'class Stack:'
  blinkimp generate --connect tcp://127.0.0.1:5555 'import os'     a server that runs already
  blinkimp generate --connect tcp://gpu1:5555 --server-key gpu1.pub --client-key me.key 'import os'     an encrypted one
  cat prompt.txt | blinkimp generate -                             the prompt from stdin

what happens: without --connect a server of its own is started on a private socket (the embedded model takes about a second), asked, and
stopped. The completion goes to stdout as it is generated, everything else to stderr.
"""


def add_parser(subparsers: Any, summary: str) -> None:
    parser = new_parser(subparsers, "generate", summary, EPILOG, usage="[options] PROMPT")
    parser.add_argument("prompt", help="text to complete; - reads stdin")
    add_sampling_flags(parser, max_tokens=128)
    add_server_flags(parser)


def run(options: argparse.Namespace) -> int:
    from blinkimp.client import Client

    hide_bad_bytes()
    prompt = checked("the prompt", sys.stdin.read() if options.prompt == "-" else options.prompt)
    security = security_of(options)
    with server_for(options) as endpoint, Client(endpoint, timeout_s=options.timeout, security=security) as client:
        if sys.stdout.isatty():
            sys.stdout.write(prompt)
        with client.submit(prompt, **sampling_of(options)) as stream:
            first_s = start_s = time.monotonic()
            for piece_idx, piece in enumerate(stream.text_pieces()):
                if piece_idx == 0:
                    first_s = time.monotonic()
                sys.stdout.write(piece)
                sys.stdout.flush()
            end_s = time.monotonic()
            finish = stream.finish
        sys.stdout.write("\n")
        sys.stdout.flush()
        if finish is not None:
            rate = (finish.num_output_tokens - 1) / max(end_s - first_s, 1e-9)
            speed = f", then {rate:.0f} tokens/s" if finish.num_output_tokens > 1 else ""
            stderr_console.print(
                f"[dim]{finish.num_output_tokens} tokens; the first after {(first_s - start_s) * 1e3:.0f} ms{speed}; "
                f"finished: {escape(finish.reason)}; seed {finish.seed}[/]",
                highlight=False,
                soft_wrap=True,
            )
    return 0
