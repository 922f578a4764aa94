"""tools/examples against a whole server (`blinkimp serve --http`): JavaScript and C over HTTP, JavaScript over ZeroMQ, async ZeroMQ.

Run: pytest tests/host/test_examples.py
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.host.server_support import ServerProcess
from tests.support import PATIENCE_S, ROOT, python_path

EXAMPLES = ROOT / "tools" / "examples"
PROMPT = "def read_file(path):"


@dataclass
class Served:
    url: str
    endpoint: str
    text: str  # what the model says to PROMPT


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with ServerProcess(tmp_path_factory.mktemp("server"), http="127.0.0.1:0", num_queue_pairs=2) as server:
        address = f"127.0.0.1:{server.http_port}"
        body = json.dumps({"model": "embedded", "prompt": PROMPT, "max_tokens": 32, "temperature": 0}).encode()
        with urllib.request.urlopen(f"http://{address}/v1/completions", body, timeout=PATIENCE_S) as reply:
            text = json.load(reply)["choices"][0]["text"]
        yield Served(f"http://{address}", server.endpoints[0], text)


def output_of(*command: str) -> str:
    environment = {"PYTHONPATH": python_path(), "PATH": "/usr/bin:/bin"}
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False, env=environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def num_code_lines(path: Path) -> int:
    return sum(bool(line.strip()) and not line.strip().startswith("//") for line in path.read_text().splitlines())


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_javascript(served: Served) -> None:
    path = EXAMPLES / "minimal_http.mjs"
    assert num_code_lines(path) <= 20
    assert output_of(str(shutil.which("node")), str(path), served.url, PROMPT) == served.text


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_javascript_over_zeromq_by_hand(served: Served) -> None:
    path = EXAMPLES / "minimal_zmq.mjs"
    assert num_code_lines(path) <= 20
    host, _, port = served.endpoint.removeprefix("tcp://").partition(":")
    assert output_of(str(shutil.which("node")), str(path), host, port, PROMPT) == served.text
    command = [str(shutil.which("node")), str(path), host, port, ""]
    refused = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)
    assert refused.returncode == 1 and refused.stderr == "the prompt is empty\n", "a refusal is seen"
    assert "ï" in output_of(str(shutil.which("node")), str(path), host, port, "# naïve ïïïïïïïï")


@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_c(served: Served, tmp_path: Path) -> None:
    path = EXAMPLES / "minimal_http.c"
    assert num_code_lines(path) <= 20
    client = tmp_path / "client"
    subprocess.run(["cc", "-Wall", "-Wextra", "-Werror", "-o", client, path], check=True, timeout=PATIENCE_S)
    host, _, port = served.url.removeprefix("http://").partition(":")
    head, _, body = output_of(str(client), host, port, PROMPT).partition("\n\n")
    assert re.match(r"HTTP/1\.[01] 200", head)
    assert json.loads(body)["choices"][0]["text"] == served.text


def test_async_zeromq(served: Served) -> None:
    output = output_of(sys.executable, str(EXAMPLES / "async_streams.py"), served.endpoint, PROMPT, "import os")
    lines = output.splitlines()
    assert len(lines) == 2 and lines[0].startswith(f"{PROMPT!r} -> ")
    said = ast.literal_eval(lines[0].partition(" -> ")[2])
    assert said and served.text.startswith(said)
