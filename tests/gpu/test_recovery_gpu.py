"""A kernel that traps, and an engine host that is killed while its kernel runs: the next process gets the GPU, and streams go on.

Run: pytest -m gpu tests/gpu/test_recovery_gpu.py -rP     (prints how long streams paused)
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from blinkimp.config import Config
from blinkimp.host.engine_process import EXIT_FAULTED
from blinkimp.host.fault_report import FOLDER_NAME, FaultReport
from blinkimp.host.shared_memory import SHM_DIR
from blinkimp.host.watchdog import Symptom
from tests.host.engine_support import PortClient, engine_config, running_engine, wait_for
from tests.host.recovery_support import Jobs, find_stop_string, num_restarts, record_fault
from tests.host.server_support import ServerProcess
from tests.support import PATIENCE_S, ROOT, python_path

# The embedded model says a token in less than a millisecond: long enough to be hit in the middle.
NUM_TOKENS = 1500

# An engine in a process of its own that breaks its program and says what became of it. Its context is lost: it must end by _exit.
BROKEN_ENGINE = """
import json, os, sys, time
from blinkimp.config import Config
from blinkimp.host.engine import Engine, EngineFaultError
from tests.gpu.fault_injection import break_program
from tests.host.engine_support import PortClient

engine = Engine(Config(**json.loads(sys.argv[1])))
engine.start()
with PortClient(engine.config.engine_name, 0) as client:
    before = client.generate([1, 2, 3], 20).tokens
    break_program(engine.device)
    client.submit([1, 2, 3], 20)
    try:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            engine.check()
            time.sleep(0.01)
        verdict = None
    except EngineFaultError as error:
        verdict = error.verdict
    wait_until = time.monotonic() + 10
    while engine.device.is_alive() and time.monotonic() < wait_until:
        time.sleep(0.01)
    print(json.dumps({"before": before, "symptom": verdict and verdict.symptom, "text": verdict and verdict.text,
                      "is_alive": engine.device.is_alive(), "driver": engine.device.fault()}), flush=True)
    engine.abandon()
    os._exit(3)
"""


def test_trap_is_recorded_and_the_next_process_gets_the_gpu(tiny: Path, device_options: dict[str, Any]) -> None:
    config: Config = engine_config(tiny, **device_options)
    values = {name: getattr(config, name) for name in config.__struct_fields__}
    try:
        ran = subprocess.run(
            [sys.executable, "-c", BROKEN_ENGINE, msgspec.json.encode(values).decode()],
            cwd=ROOT, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": python_path()},
        )  # fmt: skip
    finally:
        for path in SHM_DIR.glob(f"blinkimp.{config.engine_name}.*"):
            path.unlink()
    assert ran.returncode == EXIT_FAULTED, ran.stderr
    outcome = msgspec.json.decode(ran.stdout.splitlines()[-1])
    print(outcome)
    assert outcome["symptom"] == Symptom.FAULT_RECORD, outcome
    assert "kSiteUnknownOp" in outcome["text"] and "seen 0x4d" in outcome["text"]
    assert not outcome["is_alive"] and "CUDA_ERROR_" in outcome["driver"], "the context is lost"
    with running_engine(tiny, **device_options) as engine, PortClient(engine.config.engine_name, 0) as client:
        assert client.generate([1, 2, 3], 20).tokens == outcome["before"], "another process, the same tokens"


def tokens_of(results: dict[str, Any]) -> dict[str, Any]:
    """Ids, text, reason and stop string of the ZeroMQ jobs, text and reason of the HTTP ones."""
    zmq = {name: (*result[:2], *result[4:]) for name, result in results.items() if name != "http"}
    return {**zmq, "http": [(text, reason) for text, _, reason in results["http"]]}


@pytest.mark.parametrize("symptom", [Symptom.FAULT_RECORD, Symptom.HOST_DEATH, "trap"])
def test_streams_go_on_after_a_fault(
    tmp_path: Path, device_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch, symptom: str
) -> None:
    from tests.gpu.fault_injection import environment

    monkeypatch.setenv("PYTHONPATH", environment(tmp_path))
    options = {**device_options, "http": "127.0.0.1:0", "constraint_slots": 2}
    folder = Path(device_options["cache_dir"]) / FOLDER_NAME
    with ServerProcess(tmp_path, num_queue_pairs=3, **options) as server:
        stop = find_stop_string(server)
        undisturbed = Jobs(server, stop, NUM_TOKENS).join()
        files = set(folder.glob("*.json"))
        jobs = Jobs(server, stop, NUM_TOKENS)
        jobs.wait_begun()
        if symptom == Symptom.FAULT_RECORD:
            record_fault(server)  # the kernel knows nothing of it and runs on: it must go with its process
        else:
            server.kill("host.engine_process", signal.SIGUSR1 if symptom == "trap" else signal.SIGKILL)
        began_at = time.monotonic()
        assert jobs.num_ended < len(jobs.jobs), "some streams must still run"
        wait_for(lambda: num_restarts(server) == 1, PATIENCE_S, "the next engine has made its memory")
        disturbed = jobs.join()
        print(f"streams ended {time.monotonic() - began_at:.1f} s after the fault")
        assert tokens_of(disturbed) == tokens_of(undisturbed)
        (report,) = [
            msgspec.json.decode(path.read_bytes(), type=FaultReport) for path in set(folder.glob("*.json")) - files
        ]
        assert report.symptom == (Symptom.FAULT_RECORD if symptom == "trap" else symptom), report
        server.wait_for_log("is back")
        server.process.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0
        assert not list(SHM_DIR.glob(f"blinkimp.{server.config.engine_name}.*"))
