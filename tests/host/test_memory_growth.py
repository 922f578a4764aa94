"""What a request leaves behind in the processes that serve it: nothing. Bytes a request, whatever the machine's speed.

The long version: python tools/bench_streams.py --transport both --rate 4000 --seconds 600.
Run: pytest tests/host/test_memory_growth.py
"""

from __future__ import annotations

from pathlib import Path

from tests.host.server_support import ServerProcess
from tests.support import load_tool

# A request's state is 2 to 3 KB. Some 500 bytes of cycles a request wait for the collector, which comes by the clock (nic_shim/garbage.py).
MOST_BYTES_A_REQUEST = 1200
NUM_WARM, NUM_MEASURED = 1500, 3000


def test_requests_leave_no_memory_behind(tmp_path: Path) -> None:
    clients, bench = load_tool("stream_clients"), load_tool("bench_streams")
    http = f"127.0.0.1:{bench.free_port()}"
    with ServerProcess(
        tmp_path,
        wait=False,
        load_format="null",
        null_step_us=0,
        num_threads=0,
        http=http,
        max_batch=64,
        max_requests_per_s=1 << 20,
    ) as server:
        server.wait_for_log("serves on", 2)
        processes = bench.processes_of(server.process.pid)
        assert {process.name for process in processes} == {"host", "device", "zmq ingress", "http ingress"}

        def serve(num_requests: int) -> None:
            for transport, address in (("zmq", server.endpoints[0]), ("http", http)):
                plan = clients.Plan(
                    transport=transport, address=address, num_streams=64, num_connections=4, seconds=60, least_tokens=1, most_tokens=8,
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
            assert grown < MOST_BYTES_A_REQUEST, f"{process.name}: {grown:.0f} bytes a request, {before} -> {after} KB"
