"""A whole server under faults: supervisor, emulated device, two ZeroMQ ingresses, clients. Test: pytest tests/host/test_server.py"""

from __future__ import annotations

import json
import os
import signal
import socket
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from blinkimp import ring_abi as abi
from blinkimp.client import Client
from blinkimp.host.shared_memory import SHM_DIR, engine_is_alive, open_engine_page
from blinkimp.protocol import Error
from blinkimp.ring_abi import EngineCommand
from tests.host.engine_support import assert_all_pages_are_back, make_tiny_checkpoint, process_state, wait_for
from tests.host.server_support import (
    GREEDY,
    PROMPT,
    ServerProcess,
    sigterm_finishes_running_streams_and_refuses_new_ones,
    streams_held,
    streams_through_an_ingress_finish_while_the_supervisor_is_stopped,
)
from tests.ingress_support import RawClient, encoded, larger_limit_in
from tests.support import PATIENCE_S


def test_32_streams_through_an_ingress_finish_while_the_supervisor_is_stopped(tmp_path: Path) -> None:
    streams_through_an_ingress_finish_while_the_supervisor_is_stopped(tmp_path, 32, 96)


def test_killed_ingress_is_started_again_and_the_other_one_does_not_notice(tmp_path: Path) -> None:
    # The ring holds few completions: streams of an ingress that does not read them do not end before its death is noticed.
    with ServerProcess(tmp_path, num_ingress=2, num_completions=256, ingress_timeout_s=1.0) as server:
        with Client(server.endpoints[1], timeout_s=PATIENCE_S) as client:
            expected = client.generate(PROMPT, max_tokens=300, **GREEDY).token_ids
        victim_pid = server.ingress_pid(0)
        with streams_held(server, (server.endpoints[1], 4, 300), (server.endpoints[0], 4, 600)) as (untouched, doomed):
            os.kill(victim_pid, signal.SIGKILL)
        untouched.go_on()
        died_at = time.monotonic()
        wait_for(
            lambda: server.status()["finished_cancelled"] >= 4, PATIENCE_S, "the dead ingress's requests are cancelled"
        )
        noticed_s = time.monotonic() - died_at
        assert [tokens for tokens, _ in untouched.join()] == [expected] * 4
        server.wait_for_log("serves on", 3)
        assert server.ingress_pid(0) != victim_pid
        resumed = [tokens for tokens, _ in doomed.join()]
        assert resumed == resumed[:1] * 4 and len(resumed[0]) == 600, "clients resume where they were"
        assert resumed[0][:300] == expected
        print(f"the dead ingress's requests were gone after {noticed_s:.2f} s")
        assert any("SIGKILL" in line for line in server.log)
        assert_all_pages_are_back(server.status)


def test_sigterm_finishes_running_streams_and_refuses_new_ones(tmp_path: Path) -> None:
    sigterm_finishes_running_streams_and_refuses_new_ones(tmp_path, 8, 512)


def command_of(server: ServerProcess) -> int:
    """What the engine's host has told the device."""
    with open_engine_page(server.config.engine_name) as page:
        return int(page.view(abi.ENGINE_PAGE)["control"]["command"][0])


def test_second_signal_ends_a_drain_at_once(tmp_path: Path) -> None:
    with ServerProcess(tmp_path) as server:
        with streams_held(server, (server.endpoints[0], 16, 1500)) as (streams,):
            server.process.send_signal(signal.SIGINT)
            server.wait_for_log("another signal stops at once")
            time.sleep(0.3)
            assert server.process.poll() is None
            server.process.send_signal(signal.SIGINT)
            # The device finds the order when it goes on, before anything has ended by itself.
            wait_for(lambda: command_of(server) == EngineCommand.STOP, PATIENCE_S, "the device is told to stop")
        assert server.wait(PATIENCE_S) == 0
        assert [reason for _, reason in streams.join()] == ["draining"] * 16


def server_that_inherits(action: signal.Handlers, folder: Path) -> ServerProcess:
    """What SIGHUP does to it at its start; this process may be under nohup itself."""
    before = signal.signal(signal.SIGHUP, action)
    try:
        return ServerProcess(folder)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_closed_terminal_drains_however_often_it_says_so(tmp_path: Path) -> None:
    with server_that_inherits(signal.SIG_DFL, tmp_path) as server:
        with streams_held(server, (server.endpoints[0], 4, 300)) as (streams,):
            for _ in range(3):
                server.process.send_signal(signal.SIGHUP)
                time.sleep(0.1)
            server.wait_for_log("another signal stops at once")
        assert server.wait(PATIENCE_S) == 0
        assert [reason for _, reason in streams.join()] == ["length"] * 4
        assert not list(SHM_DIR.glob(f"blinkimp.{server.config.engine_name}.*"))


def test_sigquit_stops_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    with ServerProcess(tmp_path) as server:
        with streams_held(server, (server.endpoints[0], 4, 1500)) as (streams,):
            server.process.send_signal(signal.SIGQUIT)
            wait_for(lambda: command_of(server) == EngineCommand.STOP, PATIENCE_S, "the device is told to stop")
        assert server.wait(PATIENCE_S) == 0
        assert [reason for _, reason in streams.join()] == ["draining"] * 4
        assert not list(SHM_DIR.glob(f"blinkimp.{server.config.engine_name}.*"))


def test_sighup_that_was_ignored_at_the_start_stays_so(tmp_path: Path) -> None:
    with server_that_inherits(signal.SIG_IGN, tmp_path) as server:  # as nohup does
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        (ignored,) = (line.split()[1] for line in status.splitlines() if line.startswith("SigIgn:"))
        assert int(ignored, 16) >> (signal.SIGHUP - 1) & 1
        server.process.send_signal(signal.SIGHUP)
        with Client(server.endpoints[0], timeout_s=PATIENCE_S) as client:
            assert client.generate(PROMPT, max_tokens=4, **GREEDY).num_output_tokens == 4
        assert "draining" not in "".join(server.log)
        server.process.send_signal(signal.SIGTERM)
        assert server.wait(PATIENCE_S) == 0


def test_signal_during_loading_ends_the_server_at_once(tmp_path: Path) -> None:
    # Large enough to load for many seconds; its weights are made up.
    shape = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 16}
    make_tiny_checkpoint(tmp_path, **shape, num_key_value_heads=4, head_dim=128, config_only=True)
    with ServerProcess(tmp_path, tmp_path, load_format="dummy", wait=False) as server:
        server.wait_for_log("emulated device")
        wait_for(lambda: server.pid_of("host.emulated_process"), PATIENCE_S, "the device loads")
        server.process.send_signal(signal.SIGTERM)
        assert server.wait(PATIENCE_S) == 0
        assert "before the engine ran" in "".join(server.log)
        assert not list(SHM_DIR.glob(f"blinkimp.{server.config.engine_name}.*"))


def test_broken_checkpoint_ends_the_server_with_what_is_wrong(tmp_path: Path) -> None:
    make_tiny_checkpoint(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with ServerProcess(tmp_path, tmp_path, wait=False) as server:
        assert server.wait(PATIENCE_S) == 1
        log = "".join(server.log)
        assert "could not start" in log and "model.safetensors" in log and "Traceback" not in log


def test_port_in_use_ends_the_server_with_what_is_wrong(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        with ServerProcess(tmp_path, wait=False, http=address) as server:
            assert server.wait(PATIENCE_S) == 1
            log = "".join(server.log)
            assert log.count(f"cannot bind {address}") == 1, "it is not tried again"
            assert "the server ends" in log and "Traceback" not in log
            assert not list(SHM_DIR.glob(f"blinkimp.{server.config.engine_name}.*.engine"))


def test_every_ingress_has_the_limits_of_the_configuration(tmp_path: Path) -> None:
    limits = {"max_request_bytes": 4096, "max_prompt_chars": 1000, "read_timeout_s": 0.5}
    with ServerProcess(tmp_path, http="127.0.0.1:0", num_queue_pairs=2, **limits) as server:
        address = ("127.0.0.1", server.http_port)
        for num_chars, status, flag in ((1001, 400, "--max-prompt-chars"), (5000, 413, "--max-request-bytes")):
            prompt = "x" * num_chars
            with RawClient(server.endpoints[0]) as raw:
                raw.send(encoded(prompt=prompt))
                (error,) = raw.receive()
            assert isinstance(error, Error) and larger_limit_in(error.remedy) == flag
            body = json.dumps({"model": "embedded", "prompt": prompt}).encode()
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(f"http://{address[0]}:{address[1]}/v1/completions", body, timeout=PATIENCE_S)
            with refused.value as reply:
                assert reply.code == status and larger_limit_in(reply.read().decode()) == flag
        with socket.create_connection(address, timeout=PATIENCE_S) as connection:
            connection.sendall(b"GET")
            assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")


def test_killed_device_ends_a_server_without_restarts_with_a_clear_error(tmp_path: Path) -> None:
    with ServerProcess(tmp_path, max_restarts=0, cache_dir=str(tmp_path)) as server:
        server.kill("host.emulated_process")
        assert server.wait(PATIENCE_S) == 1
        log = "".join(server.log)
        assert "emulated device" in log and "SIGKILL" in log and "max_restarts is 0" in log and "dmesg" in log
        assert len(list((tmp_path / "faults").glob("*.json"))) == 1
        assert not engine_is_alive(server.config.engine_name)


def test_killed_supervisor_takes_its_tree_with_it(tmp_path: Path) -> None:
    with ServerProcess(tmp_path, num_ingress=2) as server:
        wait_for(lambda: len(server.pids) == 4, PATIENCE_S, "engine host, device and two ingresses")
        pids = list(server.pids)
        server.process.kill()
        server.wait(PATIENCE_S)
        wait_for(lambda: all(process_state(pid) in ("X", "Z") for pid in pids), PATIENCE_S, "all of the tree are gone")
