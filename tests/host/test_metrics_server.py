"""The metrics' own port: all ingresses in one answer, an engine that goes and comes, and what cannot be started.

Run: pytest tests/host/test_metrics_server.py
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from blinkimp.client import Client
from blinkimp.host.child_process import EXIT_MISCONFIGURED
from blinkimp.nic_shim.tokenizer import Tokenizer
from blinkimp.nic_shim.zmq_ingress import ZmqIngress
from tests.fake_director import FakeDirector
from tests.host.server_support import ServerProcess
from tests.http_support import http_ingress
from tests.ingress_support import engine_name, wait_until, write_byte_tokenizer
from tests.metrics_support import Scraped
from tests.support import PATIENCE_S, ROOT, python_path

COMMAND = [sys.executable, "-m", "blinkimp.nic_shim.metrics_server"]
ENVIRONMENT = {**os.environ, "PYTHONPATH": python_path()}


@contextlib.contextmanager
def metrics_server(name: str, *flags: str) -> Iterator[str]:
    command = [*COMMAND, "--engine", name, "--bind", "127.0.0.1:0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=ENVIRONMENT)
    assert process.stdout is not None
    try:
        ready = process.stdout.readline().split()
        assert ready and ready[0] == "ready"
        yield ready[1]
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def get(url: str) -> Scraped:
    with urllib.request.urlopen(url, timeout=PATIENCE_S) as reply:
        return Scraped(reply.read().decode())


def test_one_answer_has_all_ingresses_and_each_engine_counter_once(tmp_path: Path) -> None:
    write_byte_tokenizer(tmp_path)
    with FakeDirector(engine_name(), vocab_size=258, num_queue_pairs=2) as director:
        name = director.regions.engine_name
        ingress = ZmqIngress(name, 1, "tcp://127.0.0.1:*", Tokenizer(tmp_path))
        endpoint = ingress.start()
        try:
            with (
                http_ingress(name, tmp_path) as http,
                metrics_server(name, "--metrics-prefix", "vllm:", "--model-name", "m") as url,
                Client(endpoint, timeout_s=PATIENCE_S) as client,
            ):
                http.complete([5, 6, 7], max_tokens=4, ignore_eos=True)
                assert len(list(client.submit([5, 6], max_tokens=6, ignore_eos=True).tokens())) == 6
                for queue_pair, protocol, num_tokens in (("0", "http", 4), ("1", "zmq", 6)):
                    tokens = {"queue_pair": queue_pair, "protocol": protocol}
                    wait_until(
                        lambda tokens=tokens, num=num_tokens: (
                            get(url).value("blinkimp:ingress_tokens_total", **tokens) == num
                        ),
                        f"the {protocol} ingress has published its counters",
                    )
                found, other = get(url), Scraped(http.get("/metrics").body.decode())
                assert found.value("vllm:request_success_total", finished_reason="length", model_name="m") == 2
                assert found.value("vllm:request_generation_tokens_sum") == 10
                assert found.value("vllm:prompt_tokens_total") == 5
                for suffix in ("count", "sum"):
                    series = f"e2e_request_latency_seconds_{suffix}"
                    assert found.value(f"vllm:{series}") == other.value(f"blinkimp:{series}"), (
                        "every endpoint says the same"
                    )
                assert sum(sample.name == "blinkimp:engine_heartbeat_total" for sample in found.samples) == 1
        finally:
            ingress.stop()
            assert ingress.join(PATIENCE_S), "the ingress's loop does not end"


def test_an_engine_that_is_gone_is_down_and_its_successor_is_up(tmp_path: Path) -> None:
    name = engine_name()
    with contextlib.ExitStack() as stack:
        with FakeDirector(name, vocab_size=258):
            url = stack.enter_context(metrics_server(name))
            assert get(url).value("blinkimp:engine_up") == 1
        found = get(url)
        assert found.value("blinkimp:engine_up") == 0
        assert not any(sample.name.startswith("blinkimp:num_requests") for sample in found.samples)
        with FakeDirector(name, vocab_size=258):
            assert get(url).value("blinkimp:engine_up") == 1


def test_it_answers_while_the_host_is_stopped_and_ends_with_the_server(tmp_path: Path) -> None:
    with ServerProcess(tmp_path, metrics="127.0.0.1:0", log_format="json", wait=False) as server:
        server.wait_for_log('"serving"', 2)
        lines = [json.loads(line) for line in server.log]
        (url,) = [line["endpoint"] for line in lines if line.get("child") == "metrics"]
        with Client(server.config.bind, timeout_s=PATIENCE_S) as client:
            assert len(list(client.submit([17, 33], max_tokens=5, ignore_eos=True).tokens())) == 5
        os.kill(server.process.pid, signal.SIGSTOP)
        try:
            wait_until(lambda: get(url).value("blinkimp:generation_tokens_total") == 5, "the status page says so")
            found = get(url)
        finally:
            os.kill(server.process.pid, signal.SIGCONT)
        assert found.value("blinkimp:num_requests_running", model_name="embedded") == 0
        assert found.value("blinkimp:time_to_first_token_seconds_count") == 1
        server.process.send_signal(signal.SIGTERM)
        assert server.wait(PATIENCE_S) == 0
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(url, timeout=PATIENCE_S)
    events = [json.loads(line).get("event") for line in server.log]
    assert events.count("engine_running") == 1 and events.count("request") == 1 and "child_died" not in events


def test_counts_go_to_the_engine_that_runs(tmp_path: Path) -> None:
    """An ingress that outlives its engine counts for the next one, from 0."""
    write_byte_tokenizer(tmp_path)
    name = engine_name()
    with contextlib.ExitStack() as stack:
        first = FakeDirector(name, vocab_size=258)
        first.__enter__()
        ingress = ZmqIngress(name, 0, "tcp://127.0.0.1:*", Tokenizer(tmp_path))
        endpoint = ingress.start()
        stack.callback(ingress.join, PATIENCE_S)
        stack.callback(ingress.stop)
        client = stack.enter_context(Client(endpoint, timeout_s=PATIENCE_S))
        url = stack.enter_context(metrics_server(name))
        for _ in range(3):
            assert len(list(client.submit([5, 6], max_tokens=2, ignore_eos=True).tokens())) == 2
        assert get(url).value("blinkimp:request_success_total", finished_reason="length") == 3
        first.__exit__(None, None, None)
        stack.enter_context(FakeDirector(name, vocab_size=258))
        assert len(list(client.submit([5, 6], max_tokens=2, ignore_eos=True).tokens())) == 2
        assert get(url).value("blinkimp:request_success_total", finished_reason="length") == 1


@pytest.mark.parametrize("bind", ["127.0.0.1:0", "[::1]:0"])
def test_an_address_of_either_kind(bind: str) -> None:
    if ":" in bind.rpartition(":")[0] and not has_ipv6():
        pytest.skip("this machine has no IPv6 loopback")
    with (
        FakeDirector(engine_name(), vocab_size=258) as director,
        metrics_server(director.regions.engine_name, "--bind", bind) as url,
    ):
        assert get(url).value("blinkimp:engine_up") == 1


def has_ipv6() -> bool:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            return True
    except OSError:
        return False


def test_other_paths_are_refused(tmp_path: Path) -> None:
    with FakeDirector(engine_name(), vocab_size=258) as director, metrics_server(director.regions.engine_name) as url:
        with pytest.raises(urllib.error.HTTPError, match="404") as caught:
            urllib.request.urlopen(url.replace("metrics", "etc/passwd"), timeout=PATIENCE_S)
        caught.value.close()
        assert b"/metrics" in urllib.request.urlopen(url.replace("/metrics", "/"), timeout=PATIENCE_S).read()


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--engine", "no-such-engine"], "no-such-engine"),
        (["--bind", "nonsense"], "expected HOST:PORT"),
        (["--bind", "127.0.0.1:99999"], "expected HOST:PORT"),
        (["--bind", "192.0.2.1:80"], "cannot bind 192.0.2.1:80"),
    ],
)
def test_what_is_wrong_is_said(flags: list[str], complaint: str) -> None:
    with FakeDirector(engine_name(), vocab_size=258) as director:
        command = [*COMMAND, "--engine", director.regions.engine_name, "--bind", "127.0.0.1:0", *flags]
        done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=PATIENCE_S, check=False)
    expected = 1 if flags[0] == "--engine" else EXIT_MISCONFIGURED  # an engine may come yet
    assert done.returncode == expected and complaint in done.stderr and "Traceback" not in done.stderr, done.stderr
