"""The HTTP ingress: OpenAI's API on one side, a queue pair of its own on the other. No hop through the ZeroMQ ingress.

    python -m blinkimp.nic_shim.http_ingress --engine NAME --queue-pair 1 --bind 127.0.0.1:8000 --model-folder FOLDER

Run as a process by `blinkimp serve --http HOST:PORT`; nic_shim/HTTP.md describes the API. uvicorn's loop (uvloop, httptools) speaks HTTP on
the main thread, nic_shim/engine_thread.py speaks to the queue pair. SIGTERM drains: new requests get 503, running ones finish
and are read by their clients (bounded by --drain-timeout), then exit 0; a second one ends it at once.
Test: pytest tests/host/test_http_ingress.py tests/host/test_http_drain.py
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final

import uvicorn
import uvloop

from blinkimp.host.child_process import EXIT_MISCONFIGURED
from blinkimp.host.shared_memory import SharedMemoryError
from blinkimp.logs import fail_start, log_event, set_up_logging
from blinkimp.native import NativeLibraryError
from blinkimp.nic_shim.chat_template import ChatTemplate, ChatTemplateError
from blinkimp.nic_shim.compile_queue import CompileQueue
from blinkimp.nic_shim.constraint_compiler import ConstraintCompiler
from blinkimp.nic_shim.engine_link import EngineLink
from blinkimp.nic_shim.engine_thread import EngineThread
from blinkimp.nic_shim.garbage import calm_collector
from blinkimp.nic_shim.http_app import Api
from blinkimp.nic_shim.http_exchange import deliver
from blinkimp.nic_shim.http_fields import read_generation_defaults
from blinkimp.nic_shim.http_gate import ApiKeyError, Gate, read_keys
from blinkimp.nic_shim.http_generate import Context
from blinkimp.nic_shim.http_metrics import DEFAULT_PREFIX, Metrics
from blinkimp.nic_shim.http_protocol import timed_protocol
from blinkimp.nic_shim.http_request_log import RequestLog
from blinkimp.nic_shim.ingress_flags import add_ingress_flags, add_limit_flags, eos_ids_of, limits_of, parse_bind
from blinkimp.nic_shim.ingress_limits import HttpLimits
from blinkimp.nic_shim.queue_pair import QueuePairError
from blinkimp.nic_shim.tokenizer import Tokenizer, TokenizerError
from blinkimp.transport import is_loopback

log = logging.getLogger("blinkimp.http")

ATTACH_TIMEOUT_S: Final = 10.0
DRAIN_POLL_S: Final = 0.05
CANCEL_GRACE_S: Final = 1.0  # after a drain that timed out: for the engine's FINISH, and for clients to read it
GIL_SWITCH_S: Final = 0.0005  # two threads share the interpreter: 5 ms, Python's default, would show in the latency
BACKLOG: Final = 2048


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: draining is ours."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class HttpIngress:
    """One ingress. run() serves until a signal or a failure; returns the exit status."""

    def __init__(
        self,
        engine_name: str,
        queue_pair_idx: int,
        bind: str,
        model_folder: Path,
        *,
        model_names: Sequence[str],
        api_keys: Sequence[str] = (),
        eos_ids: Sequence[int] | None = None,
        limits: HttpLimits | None = None,
        drain_timeout_s: float,
        metrics_prefix: str = DEFAULT_PREFIX,
        capture_folder: Path | None = None,
    ) -> None:
        self._limits = limits or HttpLimits()
        self._bind = parse_bind(bind)
        self._folder = model_folder
        self._model_names = tuple(model_names)
        self._drain_timeout_s = drain_timeout_s
        self._tokenizer = Tokenizer(model_folder)
        self._template = ChatTemplate(model_folder)
        self._defaults = read_generation_defaults(model_folder)
        self._gate = Gate(api_keys, self._limits)
        self._link = EngineLink(
            engine_name,
            queue_pair_idx,
            eos_ids=tuple(self._tokenizer.eos_ids if eos_ids is None else eos_ids),
            loss_timeout_s=self._limits.loss_timeout_s,
        )
        if capture_folder is not None:
            self._link.capture_arrivals(capture_folder)
        self._link.metrics.is_http = True
        self._link.metrics.num_refused = lambda: self._gate.num_refused
        self._link.metrics.num_outstanding = lambda: self._gate.num_outstanding
        self._metrics = Metrics(engine_name, prefix=metrics_prefix, model_name=self._model_names[0])
        self._failure: BaseException | None = None
        self._num_signals = 0
        if self._gate.is_open and not is_loopback(self._bind[0]):
            log.warning(
                "%s:%d can be reached by other machines and no API key is asked for; --api-key-file has them",
                *self._bind,
            )

    def run(self) -> int:
        """Attaches, binds, prints `ready URL`, serves."""
        self._link.attach(ATTACH_TIMEOUT_S)
        try:
            listener = _listen(*self._bind)
        except BaseException:
            self._link.close()
            raise
        sys.setswitchinterval(GIL_SWITCH_S)
        calm_collector()
        uvloop.run(self._serve(listener))
        if self._failure is not None:
            print(f"blinkimp http ingress: {self._failure}", file=sys.stderr)
            return 1
        return 0

    async def _serve(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        limits = self._limits
        engine = EngineThread(self._link, loop, deliver, self._on_failure, max_memory_bytes=limits.max_memory_bytes)
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="blinkimp-tokenise")
        self._context = Context(
            engine,
            self._tokenizer,
            self._template,
            self._defaults,
            self._model_names,
            limits.max_prompt_chars,
            pool,
            CompileQueue(
                ConstraintCompiler(
                    self._tokenizer.path,
                    self._link.port.vocab_size,
                    tuple(self._link.eos_ids),
                    self._link.port.constraint_slot_bytes,
                )
            ),
        )
        self._api = Api(
            self._context,
            self._gate,
            limits.max_request_bytes,
            self._render_metrics,
            str(self._folder),
        )
        config = uvicorn.Config(
            RequestLog(self._api.app(), lambda: self._link.metrics.slot),
            http=timed_protocol(limits.read_timeout_s),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=limits.max_connections,
            timeout_graceful_shutdown=2,
        )
        self._server = _Server(config)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._on_signal)
        engine.start()
        host, port = listener.getsockname()[:2]
        print(f"ready http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
        try:
            await self._server.serve(sockets=[listener])
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            self._context.compile_queue.close()
            await loop.run_in_executor(None, engine.stop)
            log_event(log, logging.INFO, "ended")

    def _render_metrics(self, accept: str | None) -> tuple[bytes, str]:
        self._link.metrics.publish_gauges()
        return self._metrics.render(accept)

    # ---- Ending ----------------------------------------------------------------------------------------------------
    def _on_failure(self, error: BaseException) -> None:
        self._failure = error
        self._server.should_exit = True

    def _on_signal(self) -> None:
        self._num_signals += 1
        if self._num_signals == 1:
            self._api.is_draining = self._link.is_ending = True
            self._drainer = asyncio.get_running_loop().create_task(self._drain())
        else:
            self._server.should_exit = self._server.force_exit = True

    async def _drain(self) -> None:
        exchanges = self._context.exchanges
        log_event(log, logging.INFO, "draining", num_unfinished=len(exchanges))
        deadline = time.monotonic() + self._drain_timeout_s
        while (exchanges or self._unread()) and time.monotonic() < deadline:
            await asyncio.sleep(DRAIN_POLL_S)
        if exchanges or self._unread():
            text = "drain timed out: cancelling %d requests; %d connections have replies that their clients do not read"
            log.warning(text, len(exchanges), len(self._unread()))
            for exchange in list(exchanges):
                exchange.cancel()
            await asyncio.sleep(CANCEL_GRACE_S)
            for transport in self._unread():
                transport.abort()
        self._server.should_exit = True

    def _unread(self) -> list[asyncio.Transport]:
        """Connections with bytes that wait for the client to read: at exit they would be lost."""
        transports = [connection.transport for connection in self._server.server_state.connections]
        return [transport for transport in transports if transport.get_write_buffer_size()]


# ---- The process -----------------------------------------------------------------------------------------------------
def _listen(host: str, port: int) -> socket.socket:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family, backlog=BACKLOG)
    except OSError as error:
        raise OSError(
            f"cannot bind {host}:{port}: {error.strerror}; expected a free address such as 127.0.0.1:8000; choose another port, or "
            "stop what holds it"
        ) from error
    listener.setblocking(False)
    return listener


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m blinkimp.nic_shim.http_ingress",
        description="Serves one engine's queue pair over HTTP, as OpenAI's API (nic_shim/HTTP.md).",
        epilog="Prints `ready URL` once clients can connect. SIGTERM drains and exits 0. API keys: --api-key-file, BLINKIMP_API_KEY.",
    )
    add_ingress_flags(parser)
    parser.add_argument("--bind", required=True, help="HOST:PORT, e.g. 127.0.0.1:8000; port 0: any free one")
    parser.add_argument(
        "--model-folder", type=Path, required=True, help="the checkpoint's folder: tokenizer, chat template, defaults"
    )
    parser.add_argument(
        "--model-name",
        action="append",
        help="what clients call the model; may be repeated (default: the folder's name)",
    )
    parser.add_argument("--api-key-file", default="", help="one key a line, mode 600; without keys anybody may ask")
    parser.add_argument(
        "--metrics-prefix", default=DEFAULT_PREFIX, help="of vLLM's names in /metrics (default %(default)s)"
    )
    add_limit_flags(parser, HttpLimits)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    set_up_logging(
        arguments.log_level, arguments.log_format, f"http ingress {arguments.queue_pair}", in_background=True
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)  # what it says of its start and end, we say
    try:
        return HttpIngress(
            arguments.engine,
            arguments.queue_pair,
            arguments.bind,
            arguments.model_folder,
            model_names=arguments.model_name or [arguments.model_folder.name],
            api_keys=read_keys(arguments.api_key_file),
            eos_ids=eos_ids_of(arguments),
            limits=limits_of(arguments, HttpLimits),
            drain_timeout_s=arguments.drain_timeout,
            metrics_prefix=arguments.metrics_prefix,
            capture_folder=arguments.capture_arrivals,
        ).run()
    except (
        SharedMemoryError, QueuePairError, TokenizerError, ChatTemplateError, ApiKeyError, NativeLibraryError, OSError, ValueError,
    ) as error:  # fmt: skip
        fail_start("blinkimp http ingress", error, arguments.log_format)
        return 1 if isinstance(error, SharedMemoryError | QueuePairError) else EXIT_MISCONFIGURED


if __name__ == "__main__":
    sys.exit(main())
