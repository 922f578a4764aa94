"""The emulated device's process under ThreadSanitizer and AddressSanitizer. Test: pytest tests/host/test_engine_sanitized.py

Only the device runs instrumented; the client in this process is the ordinary build, as the two share nothing but memory.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from blinkimp.ring_abi import FinishReason
from tests.host.engine_support import HostProcess, PortClient, finished, make_tiny_checkpoint, wait_for
from tests.support import ROOT, load_tool


@pytest.mark.parametrize("sanitizer", ["thread", "address"])
def test_device_process_is_clean(sanitizer: str, tmp_path: Path) -> None:
    build_native = load_tool("build_native")
    library = ROOT / "build" / "native" / f"libblinkimp-{sanitizer}.so"
    build_native.build(library, sanitizer)
    environment = build_native.sanitizer_environment(sanitizer, library)
    make_tiny_checkpoint(tmp_path)
    # Address randomisation off: ThreadSanitizer's shadow memory needs it so. A report ends the device, and with it the host: status 1.
    options = {"prefix": ("setarch", "-R"), "environment": environment, "num_threads": 3, "num_pages": 24}
    with HostProcess(tmp_path, max_batch=8, max_step_tokens=64, **options) as host:
        with PortClient(host.engine_name, 0) as client, PortClient(host.engine_name, 1) as other:
            expected = client.generate([1, 2, 3], 60).tokens
            ids = [client.submit([1, 2, 3], 60) for _ in range(12)]
            long_ids = [other.submit(list(range(i, i + 150)), 100) for i in range(6)]
            wait_for(
                lambda: other.poll() >= 0 and other.streams[long_ids[0]].tokens, 60, "the other client's stream runs"
            )
            other.port.try_cancel(long_ids[0])
            other.port.try_ping(1, 0)
            other.close()  # in the middle: its requests are cancelled
            client.wait_all(120)
            assert all(client.streams[i].tokens == expected for i in ids)
            last = client.submit([1, 2, 3], 200)
            wait_for(lambda: client.poll() >= 0 and client.streams[last].tokens, 60, "the last stream runs")
            host.process.send_signal(signal.SIGTERM)
            client.wait_all(60)
            assert client.streams[last].end == finished(FinishReason.LENGTH)
        assert host.wait(60) == (0, "")
