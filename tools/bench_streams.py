"""What one ingress carries: streamed tokens/s over ZeroMQ or HTTP, and by how much it delays each token, with no model behind it.

    python tools/bench_streams.py --transport zmq --rate 42000 --seconds 20 --repeats 3
    python tools/bench_streams.py --transport http --rate 10500
    python tools/bench_streams.py --transport both --rate 4000 --seconds 600          memory over ten minutes
    python tools/bench_streams.py --json tools/results/load_emulated.json             the first two, five times each

`blinkimp serve --load-format null` runs as for a user: host, emulated device, ingress processes; the null program gives each running request
a token a step, --rate tokens/s over all streams. Clients (tools/stream_clients.py) are processes of their own. All of it shares this
machine's CPUs; where others use them too, `chrt -r 1` in front gives what a quiet machine would, and the figures say so. Added latency of
a token: from the director's commit of it, by the engine's trace, to the client's receipt of it.
Test: pytest tests/host/test_bench_streams.py
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import secrets
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

from process_memory import Process, memory_of, processes_of  # noqa: E402  (the path above comes first)
from process_memory import describe as describe_memory  # noqa: E402
from stream_clients import NUM_KEY_TOKENS, TICK_NS, Plan  # noqa: E402
from stream_latency import TokenTimes, added_latencies_ns, quantiles_ms  # noqa: E402

from blinkimp.host.shared_memory import open_trace  # noqa: E402
from blinkimp.host.trace_reader import TraceReader  # noqa: E402

TARGETS: Final = {"zmq": 40_000, "http": 10_000}  # streamed tokens/s with 512 streams on 2 cores
DEFAULT_RATES: Final = {"zmq": 42_000, "http": 10_500}
WARM_S: Final = 2.0  # after every stream has begun; less in a shorter run
# A ZeroMQ queue takes its memory in two blocks of 256 messages, whose pages count as messages reach them: with both in use from the start, what
# grows later is a leak.
NUM_WARM_MESSAGES: Final = 600  # each way on each ZeroMQ connection
TRACE_EVENTS: Final = 1 << 20
TRACE_READ_S: Final = 0.5
SAMPLED_STREAMS: Final = 128  # so many streams' arrivals are kept, of a long run fewer
MAX_SAMPLED_TOKENS: Final = 2_000_000
START_TIMEOUT_S: Final = 180.0
SCHEDULERS: Final = {os.SCHED_OTHER: "other", os.SCHED_FIFO: "fifo", os.SCHED_RR: "rr", os.SCHED_BATCH: "batch"}


class Server:
    """`blinkimp serve` with the null program, and what /proc says of its processes."""

    def __init__(self, num_streams: int, step_us: int, folder: Path) -> None:
        self.engine_name = f"bench-{secrets.token_hex(4)}"
        self.addresses: dict[str, str] = {}  # by transport, once it serves
        flags: dict[str, Any] = {
            "load_format": "null", "null_step_us": step_us, "device": "emulated", "engine_name": self.engine_name,
            "bind": "tcp://127.0.0.1:*", "http": "127.0.0.1:0", "num_queue_pairs": 2, "max_batch": 512,
            "max_context": 2048, "num_completions": 1 << 16, "arena_bytes": 1 << 20, "max_outstanding": 4 * num_streams,
            "max_requests_per_s": 1 << 20, "trace_events": TRACE_EVENTS, "log_level": "info",
        }  # fmt: skip
        self._log_path = folder / "server.log"
        command = [sys.executable, "-m", "blinkimp", "serve"]
        for name, value in flags.items():
            command += [f"--{name.replace('_', '-')}", str(value)]
        with self._log_path.open("wb") as log:
            self._process = subprocess.Popen(
                command, stderr=log, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
            )  # fmt: skip

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while len(found := re.findall(r"serves on (\S+)\n", self._log_path.read_text())) < 2:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server did not start:\n{self._log_path.read_text()}")
            time.sleep(0.05)
        for endpoint in found:
            scheme, _, address = endpoint.partition("://")
            self.addresses |= {"http": address} if scheme == "http" else {"zmq": endpoint}

    def processes(self) -> list[Process]:
        return processes_of(self._process.pid)

    def stop(self) -> None:
        for _ in range(2):
            self._process.terminate()
            try:
                self._process.wait(30)
                return
            except subprocess.TimeoutExpired:
                continue
        self._process.kill()


@contextmanager
def running_server(num_streams: int, step_us: int) -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as folder:
        server = Server(num_streams, step_us, Path(folder))
        try:
            server.wait_ready()
            yield server
        finally:
            server.stop()


class TraceCollector:
    """Reads the trace on a thread, a few times a second: the ring holds half a minute."""

    def __init__(self, engine_name: str) -> None:
        self._reader = TraceReader(open_trace(engine_name))
        self._parts: list[Any] = []
        self._stop = threading.Event()
        self.keeps = True  # else what is read is dropped
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(TRACE_READ_S):
            self._read()

    def _read(self) -> None:
        events = self._reader.read()
        if self.keeps:
            self._parts.append(events)

    def finish(self) -> tuple[Any, int]:
        """All events, and how many were lost."""
        self._stop.set()
        self._thread.join()
        self._read()
        num_lost = self._reader.num_lost
        self._reader.close()
        return np.concatenate(self._parts), num_lost


# ---- One run -----------------------------------------------------------------------------------------------------------
def run_once(transport: str, options: argparse.Namespace, rate: float) -> dict[str, Any]:
    """Serves, loads, measures."""
    step_us = round(1e6 * options.streams / rate) if rate else 0
    transports = ["zmq", "http"] if transport == "both" else [transport]
    load_before, warm_s = os.getloadavg()[0], min(WARM_S, options.seconds)
    with running_server(options.streams, step_us) as server, tempfile.TemporaryDirectory() as folder:
        trace = TraceCollector(server.engine_name)
        clients = []
        num_streams = options.streams // len(transports)
        sample_period = max(
            1, num_streams // SAMPLED_STREAMS, int((rate or 1e6) * options.seconds / MAX_SAMPLED_TOKENS)
        )
        for idx, name in enumerate(transports):
            plan = Plan(
                transport=name, address=server.addresses[name], num_streams=num_streams, num_connections=min(options.connections, num_streams),
                seconds=options.seconds + START_TIMEOUT_S, least_tokens=max(1, options.tokens // 2), most_tokens=options.tokens * 3 // 2,
                sample_period=sample_period, seed=secrets.randbits(31), output=f"{folder}/{idx}.npz",
                num_warm_messages=NUM_WARM_MESSAGES,
            )  # fmt: skip
            command = [sys.executable, str(ROOT / "tools" / "stream_clients.py"), msgspec.json.encode(plan).decode()]
            environment = {**os.environ, "PYTHONPATH": str(ROOT)}
            clients.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment))
        try:
            for client in clients:
                assert client.stdout is not None
                if client.stdout.readline().strip() != "started":
                    raise RuntimeError("a client did not start; its message is above")
            time.sleep(warm_s)
            processes = server.processes()
            begin_ns = time.monotonic_ns()
            for process in processes:
                process.cpu_begin_s = process.cpu_s()
            while time.monotonic_ns() - begin_ns < options.seconds * 1e9 - 0.5e9:
                for process in processes:
                    process.sample()
                if any(client.poll() for client in clients):
                    raise RuntimeError("a client failed; its message is above")
                time.sleep(min(1.0, max(0.0, begin_ns / 1e9 + options.seconds - 0.4 - time.monotonic())))
            for process in processes:
                process.cpu_end_s = process.cpu_s()
            end_ns = time.monotonic_ns()
            for client in clients:  # which began at different times: all of them run until here
                client.terminate()
            for client in clients:
                if client.wait(START_TIMEOUT_S) != 0:
                    raise RuntimeError("a client failed; its message is above")
        finally:
            for client in clients:
                client.kill()
                client.communicate()
        events, num_lost = trace.finish()
        times = TokenTimes(events, NUM_KEY_TOKENS)
        result: dict[str, Any] = {
            "streams": options.streams, "rate_asked": rate, "step_us": step_us, "seconds": round((end_ns - begin_ns) / 1e9, 2),
            "warm_messages_a_zmq_connection": NUM_WARM_MESSAGES,
            "load_average": [round(load_before, 2), round(os.getloadavg()[0], 2)], "trace_events_lost": num_lost,
        }  # fmt: skip
        for idx, name in enumerate(transports):
            with np.load(f"{folder}/{idx}.npz") as arrivals:
                result[name] = summary_of(dict(arrivals), times, begin_ns, end_ns)
    seconds = (end_ns - begin_ns) / 1e9
    result["cpu_percent"] = {
        process.name: round(100 * (process.cpu_end_s - process.cpu_begin_s) / seconds, 1) for process in processes
    }
    result["memory"] = {process.name: memory_of(process) for process in processes}
    return result


def summary_of(arrivals: dict[str, Any], times: TokenTimes, begin_ns: int, end_ns: int) -> dict[str, Any]:
    """Of one client. Whole ticks of the clock only, so that the tokens of the window are counted exactly."""
    first, last = -(-begin_ns // TICK_NS), end_ns // TICK_NS
    per_tick = np.zeros(max(1, last - first))
    is_inside = (arrivals["ticks"] >= first) & (arrivals["ticks"] < last)
    per_tick[arrivals["ticks"][is_inside] - first] = arrivals["tokens"][is_inside]
    ticks_a_second = 10**9 // TICK_NS
    per_second = np.convolve(per_tick, np.ones(min(ticks_a_second, len(per_tick))), mode="valid")
    num_tokens, num_events, num_requests, num_refused = arrivals["totals"].tolist()
    latencies = added_latencies_ns(times, arrivals, begin_ns, end_ns)
    return {
        "tokens_per_s": round(float(per_tick.mean()) * ticks_a_second, 1),
        "least_tokens_in_a_second": int(per_second.min()),
        "tokens_per_event": round(num_tokens / max(1, num_events), 3),
        "requests": num_requests,
        "refused_and_asked_again": num_refused,
        "latency_samples": len(latencies),
        "added_latency_ms": quantiles_ms(latencies),
    }


# ---- Reports -----------------------------------------------------------------------------------------------------------
def describe(run: dict[str, Any]) -> str:
    lines = []
    for name in ("zmq", "http"):
        if name not in run:
            continue
        figures = run[name]
        latency = ", ".join(f"{quantile} {value:g}" for quantile, value in figures["added_latency_ms"].items())
        lines.append(
            f"{name:5} {figures['tokens_per_s']:9,.0f} tokens/s (asked {run['rate_asked']:,.0f}), {figures['tokens_per_event']:.2f} an event; "
            f"added latency ms: {latency}; CPU % {run['cpu_percent']}; load {run['load_average']}"
        )
    lines += [describe_memory(name, figures) for name, figures in run["memory"].items()]
    return "\n".join(lines)


def summarise(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Median and spread over the runs; the target is met where it is met by the median."""
    rates = [run[name]["tokens_per_s"] for run in runs]
    p99 = [run[name]["added_latency_ms"].get("p99", 0.0) for run in runs]
    return {
        "target_tokens_per_s": TARGETS[name],
        "median_tokens_per_s": statistics.median(rates),
        "spread_tokens_per_s": [min(rates), max(rates)],
        "median_p99_added_latency_ms": statistics.median(p99),
        "spread_p99_added_latency_ms": [min(p99), max(p99)],
        "is_met": statistics.median(rates) >= TARGETS[name],
    }


def machine() -> dict[str, Any]:
    names = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "cpu": names[0] if names else platform.machine(),
        "num_cpus": len(os.sched_getaffinity(0)),
        "scheduler": SCHEDULERS.get(os.sched_getscheduler(0), "?") + f", nice {os.nice(0)}",
        "python": platform.python_version(),
        "kernel": platform.release(),
    }


def git_commit() -> str:
    found = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return found.stdout.strip() or "unknown"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transport", choices=("zmq", "http", "both"), help="default: zmq, then http")
    parser.add_argument(
        "--rate", type=float, help="tokens/s over all streams, 0: as fast as it goes (default 42,000, http 10,500)"
    )
    parser.add_argument("--streams", type=int, default=512, help="at once (default %(default)s; with both: half each)")
    parser.add_argument("--connections", type=int, default=16, help="of the ZeroMQ client (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=256, help="of a request, on average (default %(default)s)")
    parser.add_argument("--seconds", type=float, default=10.0, help="of a run (default %(default)s)")
    parser.add_argument("--repeats", type=int, help="runs (default 1; 5 where no transport is named)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    options = parser.parse_args(arguments)
    names = [options.transport] if options.transport else ["zmq", "http"]
    repeats = options.repeats or (1 if options.transport else 5)
    result: dict[str, Any] = {
        "machine": machine(),
        "command": "python tools/bench_streams.py " + " ".join(sys.argv[1:] if arguments is None else arguments),
        "commit": git_commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "summary": {},
        "runs": {},
    }
    for name in names:
        rate = options.rate if options.rate is not None else DEFAULT_RATES.get(name, DEFAULT_RATES["http"])
        runs = []
        for _ in range(repeats):
            runs.append(run_once(name, options, rate))
            print(describe(runs[-1]), flush=True)
        result["runs"][name] = runs
        if name in TARGETS:
            result["summary"][name] = summarise(name, runs)
            print(f"{name:5} {result['summary'][name]}")
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
