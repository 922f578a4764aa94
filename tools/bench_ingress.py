"""How much one ZeroMQ ingress carries: requests/s and streamed tokens/s, with a scripted director in place of an engine.

    python tools/bench_ingress.py [--streams 64] [--seconds 5]

Runs the director, the ingress and each client as processes of their own, and prints what arrived at the clients, the ingress's CPU time per
token, and the time from submit to the first token of a lone request. Compare figures only with the same number of free cores: with
two cores the four processes share them. Test: pytest tests/host/test_ingress_processes.py
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.queues import Queue
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from blinkimp.client import Client  # noqa: E402  (the path above comes first)
from tests.ingress_support import write_byte_tokenizer  # noqa: E402


def start(module: str, *arguments: str) -> tuple[subprocess.Popen[str], str]:
    """A process that says `ready ...` once it serves."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", module, *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=ROOT)
    assert process.stdout is not None
    ready = process.stdout.readline().split()
    if not ready or ready[0] != "ready":
        raise RuntimeError(f"{module} said {ready}, expected `ready`; see its messages above")
    return process, ready[-1]


def cpu_s(pid: int) -> float:
    """CPU seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run_streams(endpoint: str, num_streams: int, max_tokens: int, detokenize: bool, seconds: float) -> tuple[int, int]:
    """Keeps num_streams requests running. Returns (tokens, requests) that arrived."""
    num_tokens = num_requests = 0
    with Client(endpoint, timeout_s=30) as client:

        def submit() -> Any:
            return client.submit([5, 6, 7], max_tokens=max_tokens, ignore_eos=True, detokenize=detokenize)

        streams = [submit() for _ in range(num_streams)]
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            client._pump(deadline)
            for idx, stream in enumerate(streams):
                state = stream._state
                while state.chunks:
                    num_tokens += len(state.chunks.popleft().token_ids)
                if state.finish is not None:
                    num_requests += 1
                    streams[idx] = submit()
                elif state.failure is not None:
                    raise state.failure
    return num_tokens, num_requests


def worker(queue: Queue[tuple[int, int]], arguments: tuple[Any, ...]) -> None:
    queue.put(run_streams(*arguments))


def measure(
    name: str, endpoint: str, ingress_pid: int, num_clients: int, num_streams: int, max_tokens: int, detokenize: bool,
    seconds: float,
) -> None:  # fmt: skip
    context = multiprocessing.get_context("spawn")
    queue: Queue[tuple[int, int]] = context.Queue()
    arguments = (endpoint, num_streams // num_clients, max_tokens, detokenize, seconds)
    cpu_before = cpu_s(ingress_pid)
    processes = [context.Process(target=worker, args=(queue, arguments)) for _ in range(num_clients)]
    for process in processes:
        process.start()
    results = [queue.get() for _ in processes]
    for process in processes:
        process.join()
    used_s = cpu_s(ingress_pid) - cpu_before
    num_tokens, num_requests = (sum(column) for column in zip(*results, strict=True))
    print(
        f"{name:44} {num_tokens / seconds:9,.0f} tokens/s {num_requests / seconds:8,.0f} requests/s   "
        f"ingress CPU {used_s / seconds * 100:4.0f} %, {used_s / max(1, num_tokens) * 1e6:5.1f} us a token"
    )


def measure_latency(endpoint: str, num_samples: int) -> None:
    samples_ms = []
    with Client(endpoint, timeout_s=30) as client:
        for _ in range(num_samples):
            started = time.perf_counter()
            next(client.submit([5, 6, 7], max_tokens=1, detokenize=False))
            samples_ms.append((time.perf_counter() - started) * 1e3)
            time.sleep(0.002)
    quantiles = statistics.quantiles(samples_ms, n=100)
    print(f"{'submit to first token, one request at a time':44} p50 {quantiles[49]:.2f} ms, p99 {quantiles[98]:.2f} ms")


def with_server(step_us: float, use: Callable[[str, int], None]) -> None:
    """A director process and an ingress process around use(endpoint, ingress_pid)."""
    engine_name = f"bench-{secrets.token_hex(4)}"
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = write_byte_tokenizer(Path(folder))
        director, _ = start(
            "tests.fake_director", "--engine", engine_name, "--step-us", str(step_us), "--vocab-size", "258"
        )
        try:
            flags = ["--max-requests-per-client", "4096"]
            bind = f"ipc://{folder}/ingress"
            ingress, endpoint = start(
                "blinkimp.nic_shim.zmq_ingress",
                "--engine",
                engine_name,
                "--bind",
                bind,
                "--tokenizer",
                str(tokenizer),
                *flags,
            )
            try:
                use(endpoint, ingress.pid)
            finally:
                ingress.terminate()
                ingress.wait()
        finally:
            director.terminate()
            director.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=5.0)
    arguments = parser.parse_args()
    streams, seconds = arguments.streams, arguments.seconds
    print(f"{os.cpu_count()} cores; director, ingress and clients are processes of their own; byte-level tokenizer")

    def at_full_speed(endpoint: str, pid: int) -> None:
        measure(f"{streams} streams, text, 1 client", endpoint, pid, 1, streams, 1024, True, seconds)
        measure(f"{streams} streams, ids only, 1 client", endpoint, pid, 1, streams, 1024, False, seconds)
        measure(f"{streams} streams, text, 2 clients", endpoint, pid, 2, streams, 1024, True, seconds)
        measure(f"{streams} at a time, 1 token each", endpoint, pid, 1, streams, 1, False, seconds)

    def paced(endpoint: str, pid: int) -> None:
        measure(f"{streams} streams, text, a step each 5 ms", endpoint, pid, 1, streams, 1024, True, seconds)

    with_server(0.0, at_full_speed)
    with_server(5000.0, paced)
    with_server(100.0, lambda endpoint, pid: measure_latency(endpoint, 300))


if __name__ == "__main__":
    main()
