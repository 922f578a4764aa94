"""The ZeroMQ ingress's log: one line for each request, with the client's identity and id.

Run: pytest tests/host/test_zmq_log.py
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from blinkimp.client import Client, RequestRefusedError
from tests.fake_director import FakeDirector
from tests.ingress_support import engine_name, write_byte_tokenizer
from tests.support import PATIENCE_S, ROOT, python_path


def test_every_request_leaves_one_line_of_json(tmp_path: Path) -> None:
    tokenizer = write_byte_tokenizer(tmp_path)
    with FakeDirector(engine_name(), vocab_size=258) as director:
        command = [sys.executable, "-m", "blinkimp.nic_shim.zmq_ingress", "--engine", director.regions.engine_name]
        command += ["--tokenizer", str(tokenizer), "--bind", "tcp://127.0.0.1:*", "--log-format", "json"]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
            env={**os.environ, "PYTHONPATH": python_path()},
        )  # fmt: skip
        try:
            assert process.stdout is not None
            endpoint = process.stdout.readline().split()[1]
            with Client(endpoint, timeout_s=PATIENCE_S) as client:
                assert len(list(client.submit([5, 6, 7], max_tokens=4, ignore_eos=True).tokens())) == 4
                refusals = 0
                for prompt in ([], [999999]):
                    try:
                        list(client.submit(prompt, max_tokens=4).tokens())
                    except RequestRefusedError:
                        refusals += 1
                assert refusals == 2
            process.send_signal(signal.SIGTERM)
            _, text = process.communicate(timeout=PATIENCE_S)
        finally:
            process.kill()
            process.wait()
    lines: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]
    assert [line["event"] for line in lines] == ["request", "request", "request", "draining", "ended"]
    whole, empty, unknown = (line for line in lines if line["event"] == "request")
    expected = {
        "transport": "zmq",
        "reason": "length",
        "prompt_tokens": 3,
        "output_tokens": 4,
        "error": None,
        "stream": True,
    }
    assert expected.items() <= whole.items() and whole["process"] == "zmq ingress 0"
    assert {empty["error"], unknown["error"]} == {"prompt_empty", "bad_token"} and empty["reason"] == "error"
    identities = {line["request_id"].rpartition("-")[0] for line in (whole, empty, unknown)}
    assert len(identities) == 1 and len({line["request_id"] for line in (whole, empty, unknown)}) == 3
