"""The emulated device's process under ThreadSanitizer and AddressSanitizer. Test: pytest tests/host/test_engine_sanitized.py

Only the device runs instrumented; the client in this process is the ordinary build, as the two share nothing but memory.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from blinkimp.nic_shim.constraint_table import build_constraint_table
from blinkimp.nic_shim.queue_pair import PortStatus, sampling_record
from blinkimp.ring_abi import FinishReason
from tests.host.engine_support import TINY_VOCAB, HostProcess, PortClient, finished, make_tiny_checkpoint, wait_for
from tests.support import PATIENCE_S, ROOT, load_tool


def submit_with_everything(client: PortClient) -> None:
    """Requests that use every part of the sampling op, among them constraints that are loaded while others run."""
    for i in range(10):
        table = build_constraint_table(TINY_VOCAB, [{i + 3: 1, i + 4: 0}, {i + 5: 0, i + 6: 1}], max_bytes=1 << 20)
        slot = i % client.port.num_constraint_slots
        if i < client.port.num_constraint_slots:
            assert client.port.load_constraint(slot, table.data, PATIENCE_S) == PortStatus.OK
        sampling = sampling_record(
            temperature=0.5 * (i % 3),
            top_k=5 * (i % 2),
            top_p=0.9,
            seed=i,
            min_tokens=20,
            repetition_penalty=1.2,
            frequency_penalty=0.1,
            num_top_logprobs=2 * i,
        )
        bias = dict.fromkeys(range(i, i + 30), 1.5)
        client.submit([7, 8, 9, i], 60, sampling, (4, 5), logit_bias=bias, constraint_slot=slot if i % 2 else None)


# With cpu-ahead the scheduling thread of the host runs instrumented, too, beside the device's process.
@pytest.mark.parametrize(
    ("sanitizer", "orchestrator"), [("thread", "gpu"), ("address", "gpu"), ("thread", "cpu-ahead")]
)
def test_device_process_is_clean(sanitizer: str, orchestrator: str, tmp_path: Path) -> None:
    build_native = load_tool("build_native")
    library = ROOT / "build" / "native" / f"libblinkimp-{sanitizer}.so"
    build_native.build(library, sanitizer)
    environment = build_native.sanitizer_environment(sanitizer, library)
    make_tiny_checkpoint(tmp_path)
    # Address randomisation off: ThreadSanitizer's shadow memory needs it so. A report ends the device, and with it the host: status 1.
    options = {"prefix": ("setarch", "-R"), "environment": environment, "num_threads": 3, "num_pages": 24}
    with HostProcess(tmp_path, max_batch=8, max_step_tokens=64, orchestrator=orchestrator, **options) as host:
        with PortClient(host.engine_name, 0) as client, PortClient(host.engine_name, 1) as other:
            expected = client.generate([1, 2, 3], 60).tokens
            ids = [client.submit([1, 2, 3], 60) for _ in range(12)]
            long_ids = [other.submit(list(range(i, i + 150)), 100) for i in range(6)]
            submit_with_everything(client)
            wait_for(
                lambda: other.poll() >= 0 and other.streams[long_ids[0]].tokens,
                PATIENCE_S,
                "the other client's stream runs",
            )
            other.port.try_cancel(long_ids[0])
            other.port.try_ping(1, 0)
            other.close()  # in the middle: its requests are cancelled
            client.wait_all(PATIENCE_S)
            assert all(client.streams[i].tokens == expected for i in ids)
            last = client.submit([1, 2, 3], 200)
            wait_for(lambda: client.poll() >= 0 and client.streams[last].tokens, PATIENCE_S, "the last stream runs")
            host.process.send_signal(signal.SIGTERM)
            client.wait_all(PATIENCE_S)
            assert client.streams[last].end == finished(FinishReason.LENGTH)
        assert host.wait(PATIENCE_S) == (0, "")
