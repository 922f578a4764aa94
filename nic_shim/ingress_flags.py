"""Command-line flags that the ZeroMQ and the HTTP ingress have in common: the engine, what is written down, how it ends, limits by name;
and an address of HTTP.

The supervisor gives them to every ingress that it starts (host/supervisor.py). Called by nic_shim/zmq_ingress.py, http_ingress.py and
metrics_server.py. Test: pytest tests/host/test_zmq_ingress.py tests/host/test_http_ingress.py tests/host/test_metrics_server.py
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TypeVar

from blinkimp.config import Config
from blinkimp.logs import add_log_flags
from blinkimp.nic_shim.ingress_limits import IngressLimits

Limits = TypeVar("Limits", bound=IngressLimits)


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
    parser.add_argument(
        "--drain-timeout",
        type=float,
        default=Config().drain_timeout_s,
        help="seconds for running requests after SIGTERM (default %(default)g)",
    )
    add_log_flags(parser)


def add_limit_flags(parser: argparse.ArgumentParser, kind: type[IngressLimits]) -> None:
    """--max-outstanding and so on, one for each limit."""
    for limit in dataclasses.fields(kind):
        shown = f"{limit.default:g}" if isinstance(limit.default, float) else str(limit.default)
        text = f"{limit.metadata['text']} (default {shown})"
        parser.add_argument(_flag(limit.name), type=type(limit.default), default=limit.default, help=text)


def limits_of(arguments: argparse.Namespace, kind: type[Limits]) -> Limits:
    """As the flags say. Raises ValueError."""
    return kind(**{limit.name: getattr(arguments, limit.name) for limit in dataclasses.fields(kind)})


def limit_arguments(limits: IngressLimits) -> list[str]:
    """The flags that say these limits."""
    return [text for name, value in dataclasses.asdict(limits).items() for text in (_flag(name), str(value))]


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


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
