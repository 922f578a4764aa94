"""Command-line flags that the ZeroMQ and the HTTP ingress have in common: the engine, what is written down, how it ends, limits by name.

The supervisor gives them to every ingress that it starts (host/supervisor.py). Called by nic_shim/zmq_ingress.py and nic_shim/http_ingress.py.
Test: pytest tests/host/test_zmq_ingress.py tests/host/test_http_ingress.py
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from blinkimp.logs import add_log_flags


def add_ingress_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--engine", required=True, help="name of the running engine (blinkimp serve --engine-name)")
    parser.add_argument("--queue-pair", type=int, default=0, help="index; each ingress needs its own (default 0)")
    parser.add_argument("--eos-ids", help="comma-separated; default: the checkpoint's, from beside its tokenizer")
    parser.add_argument(
        "--capture-arrivals",
        type=Path,
        metavar="FOLDER",
        help="write down every request there, prompts and all, for a replay (nic_shim/arrival_capture.py)",
    )
    parser.add_argument("--drain-timeout", type=float, default=30.0, help="seconds for running requests after SIGTERM")
    add_log_flags(parser)


def add_limit_flags(parser: argparse.ArgumentParser, defaults: object, texts: Mapping[str, str]) -> None:
    """--max-clients and so on, of the members of `defaults` that `texts` explains."""
    for name, text in texts.items():
        default = getattr(defaults, name)
        shown = f"{default:g}" if isinstance(default, float) else str(default)
        parser.add_argument(
            "--" + name.replace("_", "-"), type=type(default), default=default, help=f"{text} (default {shown})"
        )


def eos_ids_of(arguments: argparse.Namespace) -> list[int] | None:
    """None: not given. Raises ValueError."""
    if arguments.eos_ids is None:
        return None
    return [int(token) for token in arguments.eos_ids.split(",") if token]
