"""What a request leaves behind in the processes that serve it: nothing. Bytes a request, whatever the machine's speed.

The long version: python tools/bench_streams.py --transport both --rate 4000 --seconds 600.
Run: pytest tests/host/test_memory_growth.py
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.host.server_support import ServerProcess
from tests.support import PATIENCE_S, load_tool

# A request's state is 2 to 3 KB; with a cycle of references, which only the collector frees, 700 bytes of it stay over such a run. Without any
# an ingress grows by 30 to 80 bytes a request while its heap finds its size. The device's grows by whole megabytes, seldom.
MOST_BYTES_A_REQUEST = {"zmq ingress": 400, "http ingress": 400, "host": 1200, "device": 1200}
NUM_WARM, NUM_MEASURED = 1500, 3000


@pytest.fixture(autouse=True)
def _no_huge_pages() -> Iterator[None]:
    """Of this process and those that it starts: where the kernel gives them unasked, a heap grows by two megabytes at a time."""
    set_thp_disable, libc = 41, ctypes.CDLL(None)
    libc.prctl(set_thp_disable, 1, 0, 0, 0)
    yield
    libc.prctl(set_thp_disable, 0, 0, 0, 0)


def test_requests_leave_no_memory_behind(tmp_path: Path) -> None:
    clients, bench = load_tool("stream_clients"), load_tool("bench_streams")
    with ServerProcess(
        tmp_path,
        wait=False,
        load_format="null",
        null_step_us=0,
        num_threads=0,
        http="127.0.0.1:0",
        max_batch=64,
        max_requests_per_s=1 << 20,
    ) as server:
        server.wait_for_log("serves on", 2)
        processes = bench.processes_of(server.process.pid)
        assert {process.name for process in processes} == set(MOST_BYTES_A_REQUEST)

        def serve(num_requests: int) -> None:
            for transport, address in (("zmq", server.endpoints[0]), ("http", f"127.0.0.1:{server.http_port}")):
                plan = clients.Plan(
                    transport=transport, address=address, num_streams=64, num_connections=4, seconds=PATIENCE_S, least_tokens=1, most_tokens=8,
                    sample_period=1 << 30, seed=1, output="", most_requests=num_requests,
                )  # fmt: skip
                assert clients.run(plan).num_requests >= num_requests

        serve(NUM_WARM)
        for process in processes:
            process.sample()
        serve(NUM_MEASURED)
        for process in processes:
            process.sample()
            before, after = process.anonymous_kb
            grown = (after - before) * 1024 / NUM_MEASURED
            print(f"{process.name}: {grown:.0f} bytes a request, {before} -> {after} KB")
            most = MOST_BYTES_A_REQUEST[process.name]
            assert grown < most, f"{process.name}: {grown:.0f} bytes a request, {before} -> {after} KB"
