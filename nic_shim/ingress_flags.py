"""Command-line flags that the ZeroMQ and the HTTP ingress have in common: the engine, what is written down, how it ends, limits by name;
and an address of HTTP.

The supervisor gives them to every ingress that it starts (host/supervisor.py). Called by nic_shim/zmq_ingress.py, http_ingress.py and
metrics_server.py. Test: pytest tests/host/test_zmq_ingress.py tests/host/test_http_ingress.py tests/host/test_metrics_server.py
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


def parse_bind(bind: str) -> tuple[str, int]:
    """HOST:PORT, [IPV6]:PORT, :PORT (loopback). Raises ValueError."""
    host, colon, port = bind.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65535:
        raise ValueError(f"--bind {bind!r} cannot be used; expected HOST:PORT such as 127.0.0.1:8000; correct it")
    return host.strip("[]") or "127.0.0.1", int(port)
