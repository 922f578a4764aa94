"""Drain, and ingresses as processes of their own: killed, replaced, ended, started wrongly.

Run: pytest tests/host/test_ingress_processes.py
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from blinkimp.client import Client, RequestRefusedError
from blinkimp.host.child_process import EXIT_MISCONFIGURED
from blinkimp.nic_shim.ipc_path import MAX_PATH_BYTES
from blinkimp.nic_shim.tokenizer import Tokenizer
from blinkimp.nic_shim.zmq_ingress import ZmqIngress
from tests.fake_director import FakeDirector
from tests.ingress_support import (
    Served,
    end_process,
    engine_name,
    hold_after_first_tokens,
    start_process,
    wait_until,
    write_byte_tokenizer,
)
from tests.support import PATIENCE_S, python_path


def test_drain_finishes_what_runs_and_refuses_the_rest(served: Served, client: Client) -> None:
    (stream,) = hold_after_first_tokens(served, lambda: [client.submit("x", max_tokens=500)])
    served.ingress.drain(PATIENCE_S)
    wait_until(lambda: served.ingress.handler.is_draining, "draining")
    with pytest.raises(RequestRefusedError) as caught:
        client.generate("y")
    assert caught.value.code == "draining"
    assert client.health().status == "draining"
    served.director.paused = False
    assert stream.result().num_output_tokens == 500
    assert served.ingress.join(PATIENCE_S)


def test_drain_is_bounded(served: Served, client: Client) -> None:
    (stream,) = hold_after_first_tokens(served, lambda: [client.submit("x", max_tokens=2000)])
    served.ingress.drain(0.2)
    completion = stream.result()  # it would never end by itself
    assert completion.finish_reason == "cancelled" and completion.num_output_tokens == 1
    assert served.ingress.join(PATIENCE_S)


def test_two_ingress_processes_one_is_killed_the_other_drains(tmp_path: Path) -> None:
    tokenizer = write_byte_tokenizer(tmp_path)
    with FakeDirector(engine_name(), num_queue_pairs=2, vocab_size=258) as director:
        # A path: nobody else takes it between the one process and the next.
        bind = f"ipc://{tmp_path}/first"
        first, first_endpoint = start_process(director.regions.engine_name, tokenizer, 0, "--bind", bind)
        second, second_endpoint = start_process(director.regions.engine_name, tokenizer, 1)
        try:
            with (
                Client(first_endpoint, timeout_s=PATIENCE_S) as doomed,
                Client(second_endpoint, timeout_s=PATIENCE_S) as client,
            ):
                director.paused = True  # neither ends before it is told to
                lost = doomed.submit("x", max_tokens=400)
                stream = client.submit("x", max_tokens=400)
                wait_until(lambda: all(pair.running for pair in director.queue_pairs), "both run")
                director.num_allowed_steps = 1
                next(lost), next(stream)
                first.kill()
                first.wait()
                director.queue_pairs[0].timeout_s = 1  # of its silence
                wait_until(lambda: not director.queue_pairs[0].running, "the dead one's requests are gone")
                assert director.queue_pairs[1].running, "the other one's are not"
                second.send_signal(signal.SIGTERM)
                director.paused = False
                assert stream.result().num_output_tokens == 400  # untouched, and finished during the drain
                assert second.wait(PATIENCE_S) == 0
                # A new process takes the dead one's place, and the client's request goes on where it stopped.
                third, third_endpoint = start_process(director.regions.engine_name, tokenizer, 0, "--bind", bind)
                try:
                    assert third_endpoint == first_endpoint
                    assert lost.result().num_output_tokens == 400
                    third.terminate()
                    assert third.wait(PATIENCE_S) == 0
                finally:
                    end_process(third)
        finally:
            for process in (first, second):
                end_process(process)


def run_process(engine: str, tokenizer: Path, bind: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """To its end."""
    command = [sys.executable, "-m", "blinkimp.nic_shim.zmq_ingress", "--engine", engine]
    command += ["--tokenizer", str(tokenizer), "--bind", bind, *flags]
    environment = {**os.environ, "PYTHONPATH": python_path()}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=PATIENCE_S, check=False)


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (["--engine", "no-such-engine"], "no-such-engine"),  # may come yet
        (["--tokenizer", "/nowhere"], "no tokenizer at /nowhere"),
        (["--max-requests", "0"], "max_requests is 0"),
        (["--queue-pair", "7"], "qp7"),
    ],
)
def test_process_says_what_is_wrong(tmp_path: Path, flags: list[str], complaint: str) -> None:
    expected = 1 if flags[0] in ("--engine", "--queue-pair") else EXIT_MISCONFIGURED
    tokenizer = write_byte_tokenizer(tmp_path)
    with FakeDirector(engine_name(), vocab_size=258) as director:
        done = run_process(director.regions.engine_name, tokenizer, "tcp://127.0.0.1:*", *flags)
    assert done.returncode == expected and complaint in done.stderr and "Traceback" not in done.stderr, done.stderr


def test_bind_to_a_taken_port_is_explained(served: Served, tmp_path: Path) -> None:
    with FakeDirector(engine_name(), vocab_size=258) as director:
        rival = ZmqIngress(director.regions.engine_name, 0, served.endpoint, served.tokenizer)
        with pytest.raises(OSError, match=r"cannot bind .*: Address already in use; expected a free endpoint"):
            rival.start()
        assert int(director.queue_pairs[0].ingress["owner_pid"][0]) == 0  # the queue pair was given back


def test_a_path_that_somebody_listens_on_is_not_taken_away(tmp_path: Path) -> None:
    """libzmq would remove the file and bind its own, and the first server's new clients would reach the second one."""
    endpoint, tokenizer = f"ipc://{tmp_path}/ingress", Tokenizer(write_byte_tokenizer(tmp_path))
    with (
        FakeDirector(engine_name(), vocab_size=258) as director,
        FakeDirector(engine_name(), vocab_size=258) as other,
    ):
        ingress = ZmqIngress(director.regions.engine_name, 0, endpoint, tokenizer)
        ingress.start()
        try:
            with pytest.raises(OSError, match=r"cannot bind ipc:.*: Address already in use; expected a free endpoint"):
                ZmqIngress(other.regions.engine_name, 0, endpoint, tokenizer).start()
            with Client(endpoint, timeout_s=PATIENCE_S) as client:
                assert client.generate([5, 6], max_tokens=4).num_output_tokens == 4
            assert len(director.queue_pairs[0].seen) == 1 and not other.queue_pairs[0].seen
        finally:
            ingress.stop()
            assert ingress.join(PATIENCE_S)


def make_something(kind: str, path: Path) -> None:
    if kind == "an ordinary file":
        path.write_text("precious")
    elif kind == "a directory":
        path.mkdir()
    else:
        (path.parent / "target").write_text("precious")
        path.symlink_to("target")


@pytest.mark.parametrize("kind", ["an ordinary file", "a directory", "a symbolic link"])
def test_a_path_that_is_no_socket_is_refused_and_stays(tmp_path: Path, kind: str) -> None:
    path, tokenizer = tmp_path / "notes", write_byte_tokenizer(tmp_path)
    make_something(kind, path)
    before = path.lstat().st_ino
    with FakeDirector(engine_name(), vocab_size=258) as director:
        done = run_process(director.regions.engine_name, tokenizer, f"ipc://{path}")
    assert done.returncode == EXIT_MISCONFIGURED and "Traceback" not in done.stderr, done.stderr
    assert f"cannot bind ipc://{path}: {path} is not a socket but {kind}; expected a free path" in done.stderr
    assert path.lstat().st_ino == before and (kind == "a directory" or path.read_text() == "precious")


def test_a_path_longer_than_sockets_have_is_refused(tmp_path: Path) -> None:
    longest = tmp_path / ("x" * (MAX_PATH_BYTES - len(os.fsencode(tmp_path)) - 1))
    tokenizer = Tokenizer(write_byte_tokenizer(tmp_path))
    with FakeDirector(engine_name(), vocab_size=258) as director:
        ingress = ZmqIngress(director.regions.engine_name, 0, f"ipc://{longest}x", tokenizer)
        with pytest.raises(OSError, match=r"x has 108 bytes; expected a path of at most 107, as sockets have"):
            ingress.start()
        ingress = ZmqIngress(director.regions.engine_name, 0, f"ipc://{longest}", tokenizer)
        ingress.start()
        assert longest.is_socket()
        ingress.stop()
        assert ingress.join(PATIENCE_S) and not longest.exists()


def test_a_socket_that_a_dead_process_left_is_nobodys(tmp_path: Path) -> None:
    path, tokenizer = tmp_path / "ingress", Tokenizer(write_byte_tokenizer(tmp_path))
    with socket.socket(socket.AF_UNIX) as left_behind:
        left_behind.bind(str(path))
    with FakeDirector(engine_name(), vocab_size=258) as director:
        ingress = ZmqIngress(director.regions.engine_name, 0, f"ipc://{path}", tokenizer)
        ingress.start()
        ingress.stop()
        assert ingress.join(PATIENCE_S) and not path.exists()


@pytest.mark.parametrize("is_successors", [False, True])
def test_socket_file_is_removed_unless_a_successor_has_its_place(tmp_path: Path, is_successors: bool) -> None:
    path = tmp_path / "ingress"
    tokenizer = Tokenizer(write_byte_tokenizer(tmp_path))
    with FakeDirector(engine_name(), vocab_size=258) as director:
        ingress = ZmqIngress(director.regions.engine_name, 0, f"ipc://{path}", tokenizer)
        ingress.start()
        assert path.is_socket()
        if is_successors:
            path.unlink()
            path.touch()
        ingress.stop()
        assert ingress.join(PATIENCE_S)
    assert path.exists() == is_successors
