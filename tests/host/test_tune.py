"""Limits that change while an engine runs: Engine.tune() and `blinkimp tune`. Run: pytest tests/host/test_tune.py"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from blinkimp.host.tuning import NEVER, TuningError
from tests.host.engine_support import PortClient, running_engine
from tests.support import PATIENCE_S, ROOT, python_path


def tune(engine_name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "blinkimp", "tune", "--engine-name", engine_name, *arguments]
    environment = {**os.environ, "PYTHONPATH": python_path()}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=PATIENCE_S
    )


def test_a_lower_limit_lets_those_that_run_go_on_and_admits_no_more(tiny: Path) -> None:
    # The ring holds few completions: nothing ends before this client, however slow, has seen it run.
    with (
        running_engine(tiny, max_batch=8, num_completions=64) as engine,
        PortClient(engine.config.engine_name, 0) as client,
    ):
        ids = [client.submit([5, 6, 7], 400) for _ in range(6)]
        client.wait_begun(ids)
        assert engine.tune(max_running=1, aging_ms=NEVER)["max_running"] == 1
        late = client.submit([5, 6, 7], 3)
        client.wait_all(PATIENCE_S)
        assert all(len(client.streams[i].tokens) == 400 for i in ids) and len(client.streams[late].tokens) == 3
        more = [client.submit([5, 6, 7], 150) for _ in range(3)]
        most = 0
        while client.num_unfinished:
            client.poll(0.002)
            most = max(most, engine.status()["num_running"])
        assert most == 1 and all(len(client.streams[i].tokens) == 150 for i in more)
        assert engine.status()["tuning_generation"] == 1


def test_the_command_reaches_a_running_engine(tiny: Path) -> None:
    with running_engine(tiny) as engine:
        result = tune(engine.config.engine_name, "--max-running", "3", "--aging-ms", "never")
        assert result.returncode == 0, result.stderr
        assert result.stdout.split() == (
            [
                "max_running",
                "3",
                "step_tokens",
                "as",
                "launched",
                "prefill_chunk_tokens",
                "as",
                "launched",
                "aging_ms",
                "never",
            ]
        )
        assert engine.tune(step_tokens=9999999)["max_running"] == 3, "what is not named stays"
        assert engine.status()["tuning_generation"] == 2


def test_what_cannot_be_is_refused(tiny: Path) -> None:
    with running_engine(tiny) as engine:
        with pytest.raises(TuningError, match="max_running: got -1, expected 0"):
            engine.tune(max_running=-1)
        assert engine.status()["tuning_generation"] == 0
    result = tune("no-such-engine", "--max-running", "3")
    assert result.returncode == 1 and "no-such-engine" in result.stderr
