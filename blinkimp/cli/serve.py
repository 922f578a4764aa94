"""`blinkimp serve`: the engine and its ingress processes, until SIGTERM.

Called by blinkimp/cli/__init__.py, and as a child by blinkimp/cli/local_server.py. Test: pytest tests/host/test_cli.py
"""

from __future__ import annotations

import argparse
from typing import Any

from blinkimp.cli.options import add_config_flags, config_of, new_parser
from blinkimp.cli.terminal import LoadingBars
from blinkimp.logs import set_up_logging

EPILOG = """\
examples:
  blinkimp serve                                        the embedded model, tcp://127.0.0.1:5555
  blinkimp serve --http 127.0.0.1:8000                  and OpenAI's API over HTTP, with Prometheus metrics at /metrics
  blinkimp serve --http :8000 --metrics-prefix vllm: --log-format json       as vLLM's dashboards and log collectors expect
  blinkimp serve --model ~/models/Qwen3-4B --num-ingress 2
  blinkimp serve --config engine.toml                   settings from a file; BLINKIMP_* variables and flags win over it

what happens: weights are loaded, kernels compiled (once; then cached), memory is planned, the persistent kernel is launched (without a
GPU: the emulated device starts), and --num-ingress processes listen for clients, the first at --bind, the others at the next ports;
one more serves HTTP where --http says so. Only this machine can reach them unless you
give another address; then give --api-key-file too (one key a line, `chmod 600`).
From then on this process only watches. SIGTERM or Ctrl-C drains: running requests finish, new ones are refused; a second one stops at once.
A closed terminal drains it too; with nohup it lives on.

where next:
  curl http://127.0.0.1:8000/v1/completions -d '{"prompt": "import os", "max_tokens": 16}'      with --http; nic_shim/HTTP.md
  blinkimp top                                           in another terminal: what it is doing
  blinkimp generate --connect tcp://127.0.0.1:5555 'import os'
  python -c 'from blinkimp.client import Client; ...'   README, "Serve and ask"; the wire is nic_shim/PROTOCOL.md
"""


def add_parser(subparsers: Any, summary: str) -> None:
    parser = new_parser(subparsers, "serve", summary, EPILOG, usage="[options]")
    add_config_flags(parser)


def run(options: argparse.Namespace) -> int:
    from blinkimp.host.supervisor import serve

    config = config_of(options)
    set_up_logging(config.log_level, config.log_format, "host", in_background=True)
    with LoadingBars(is_shown=config.log_format == "text") as bars:
        return serve(config, bars)
