"""A process that serves /metrics of an engine, for whoever has no HTTP ingress, or wants another address for it.

    python -m blinkimp.nic_shim.metrics_server --engine NAME --bind 127.0.0.1:9090

It only reads shared memory: no ingress and no engine notices a scrape. It outlives an engine that is started anew: `blinkimp:engine_up`
is 0 meanwhile. Run by `blinkimp serve --metrics HOST:PORT`; by hand it watches an engine that runs already. Loopback unless told.
Prints `ready URL`; SIGTERM ends it. Test: pytest tests/host/test_metrics_server.py
"""

from __future__ import annotations

import argparse
import logging
import signal
import socket
import sys
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final

from blinkimp.host.child_process import EXIT_MISCONFIGURED
from blinkimp.host.engine_view import look
from blinkimp.host.shared_memory import SharedMemoryError
from blinkimp.logs import add_log_flags, fail_start, set_up_logging
from blinkimp.nic_shim.http_metrics import DEFAULT_PREFIX, Metrics
from blinkimp.nic_shim.ingress_flags import parse_bind

log = logging.getLogger("blinkimp.metrics")

MAX_SECONDS_OF_A_CLIENT: Final = 10.0  # that does not finish its request


class MetricsServer(ThreadingHTTPServer):
    """GET /metrics, and / that points to it."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], metrics: Metrics) -> None:
        self.metrics = metrics
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, _Handler)

    @property
    def url(self) -> str:
        host, port = self.server_address[:2]
        return f"http://{f'[{host!s}]' if ':' in str(host) else host!s}:{port}/metrics"


class _Handler(BaseHTTPRequestHandler):
    server: MetricsServer
    timeout = MAX_SECONDS_OF_A_CLIENT
    server_version = "blinkimp"
    sys_version = ""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if path == "/metrics":
            body, content_type = self.server.metrics.render(self.headers.get("Accept"))
            self._reply(200, body, content_type)
        elif path == "/":
            self._reply(200, b'<a href="/metrics">metrics</a>\n', "text/html")
        else:
            self._reply(404, b"not found; expected /metrics\n", "text/plain")

    def _reply(self, status: int, body: bytes, content_type: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *arguments: object) -> None:
        log.debug(format, *arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m blinkimp.nic_shim.metrics_server",
        description="Serves Prometheus metrics of one engine and all its ingresses (nic_shim/METRICS.md).",
        epilog="Prints `ready URL` once it can be scraped. SIGTERM ends it.",
    )
    parser.add_argument("--engine", required=True, help="name of the running engine (blinkimp serve --engine-name)")
    parser.add_argument("--bind", required=True, help="HOST:PORT, e.g. 127.0.0.1:9090; port 0: any free one")
    parser.add_argument(
        "--metrics-prefix", default=DEFAULT_PREFIX, help="of vLLM's names, e.g. vllm: (default %(default)s)"
    )
    parser.add_argument("--model-name", default="", help="label model_name (default: as the engine was started)")
    add_log_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    set_up_logging(arguments.log_level, arguments.log_format, "metrics", in_background=True)
    metrics = Metrics(arguments.engine, prefix=arguments.metrics_prefix, model_name=arguments.model_name)
    try:
        look(arguments.engine)
        host, port = parse_bind(arguments.bind)
        try:
            server = MetricsServer((host, port), metrics)
        except OSError as error:
            raise OSError(
                f"cannot bind {host}:{port}: {error.strerror}; expected a free address such as 127.0.0.1:9090; choose another port, or "
                "stop what holds it"
            ) from error
    except (SharedMemoryError, OSError, ValueError) as error:
        fail_start("blinkimp metrics", error, arguments.log_format)
        return 1 if isinstance(error, SharedMemoryError) else EXIT_MISCONFIGURED
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"ready {server.url}", flush=True)
    while not stop.wait(0.5):  # a timeout, so that the main thread runs signal handlers
        pass
    server.shutdown()
    server.server_close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
