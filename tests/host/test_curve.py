"""CURVE: clients of the allow-list are served, others are not, and bad keys are refused at start.

Run: pytest tests/host/test_curve.py
"""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from blinkimp.cli import main
from blinkimp.client import Client, ServerTimeoutError
from blinkimp.nic_shim.curve import CurveError, CurveServer, client_security, make_keys
from blinkimp.nic_shim.ingress_limits import ZmqLimits
from blinkimp.nic_shim.tokenizer import Tokenizer
from blinkimp.nic_shim.zmq_ingress import ZmqIngress
from blinkimp.protocol import Error, Finish
from tests.fake_director import FakeDirector
from tests.ingress_support import RawClient, encoded, engine_name, wait_until, write_byte_tokenizer
from tests.support import PATIENCE_S


def test_only_clients_of_the_list_are_served(tmp_path: Path) -> None:
    names = ("server", "friend", "stranger")
    secret: dict[str, Path] = {}
    public: dict[str, Path] = {}
    for name in names:
        secret[name], public[name] = make_keys(tmp_path / "keys", name)
        assert secret[name].stat().st_mode & 0o777 == 0o600
    allowed = tmp_path / "clients"
    allowed.write_bytes(b"# friends\n" + public["friend"].read_bytes() + b"\n")
    tokenizer = Tokenizer(write_byte_tokenizer(tmp_path))
    with FakeDirector(engine_name(), vocab_size=258) as director:
        curve = CurveServer(secret["server"], allowed)
        ingress = ZmqIngress(director.regions.engine_name, 0, "tcp://127.0.0.1:*", tokenizer, curve=curve)
        endpoint = ingress.start()
        try:
            with Client(
                endpoint, timeout_s=PATIENCE_S, security=client_security(str(public["server"]), secret["friend"])
            ) as client:
                assert client.generate([5, 6], max_tokens=4).num_output_tokens == 4
            for security in (client_security(public["server"], secret["stranger"]), None):
                with Client(endpoint, timeout_s=1.5, security=security) as client, pytest.raises(ServerTimeoutError):
                    client.generate([5, 6], max_tokens=4)
            assert len(director.queue_pairs[0].seen) == 1
        finally:
            ingress.stop()
            assert ingress.join(PATIENCE_S)


def test_limits_are_a_keys_over_all_its_connections(tmp_path: Path) -> None:
    names = ("server", "greedy", "other")
    keys = {name: make_keys(tmp_path, name) for name in names}
    allowed = tmp_path / "clients"
    allowed.write_bytes(b"".join(keys[name][1].read_bytes() for name in names[1:]))
    security = {name: client_security(keys["server"][1], keys[name][0]) for name in names[1:]}
    tokenizer = Tokenizer(write_byte_tokenizer(tmp_path))
    limits = ZmqLimits(max_outstanding=6, max_requests_per_client=4, max_requests_per_s=1, burst_requests=9)
    with FakeDirector(engine_name(), vocab_size=258) as director:
        director.paused = True
        curve = CurveServer(keys["server"][0], allowed)
        ingress = ZmqIngress(
            director.regions.engine_name, 0, "tcp://127.0.0.1:*", tokenizer, curve=curve, limits=limits
        )
        endpoint = ingress.start()
        try:
            with (
                RawClient(endpoint, security=security["greedy"]) as first,
                RawClient(endpoint, security=security["greedy"]) as second,
                RawClient(endpoint, security=security["other"]) as other,
            ):
                for idx in range(3):
                    first.send(encoded(id=idx))
                    second.send(encoded(id=idx))
                wait_until(lambda: ingress.sessions.num_requests == 6, "the key has what it may have")
                for raw in (first, second):
                    raw.send(encoded(id=7))
                    (error,) = raw.receive()
                    assert isinstance(error, Error) and error.code == "too_many_requests"
                    assert error.what == "too many unfinished requests of this key" and error.final
                other.send(encoded(id=1))
                wait_until(lambda: ingress.sessions.num_requests == 7, "another key is not in debt")
                director.paused = False
                first.receive_until(lambda message: isinstance(message, Finish))
                # 8 of the burst of 9 are gone, and every second brings one back.
                errors: list[Error] = []
                for idx in range(100, 160):
                    second.send(encoded(id=idx, prompt=""))
                while len(errors) < 60:
                    errors += [message for message in second.receive() if isinstance(message, Error)]
                (too_soon, *_) = [error for error in errors if error.what == "too many requests a second"]
                assert too_soon.code == "too_many_requests" and too_soon.expected == "no request for 1 s"
        finally:
            ingress.stop()
            assert ingress.join(PATIENCE_S)


def test_commands_speak_curve(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """generate, chat and bench with the keys; and what they say where one is missing or is no key."""
    keys = {name: make_keys(tmp_path / "keys", name) for name in ("server", "me")}
    tokenizer = write_byte_tokenizer(tmp_path)
    with FakeDirector(engine_name(), vocab_size=258) as director:
        curve = CurveServer(keys["server"][0], keys["me"][1])
        ingress = ZmqIngress(director.regions.engine_name, 0, "tcp://127.0.0.1:*", Tokenizer(tokenizer), curve=curve)
        target = ["--connect", ingress.start(), "--server-key", str(keys["server"][1])]
        mine = ["--client-key", str(keys["me"][0])]
        try:
            assert main(["generate", *target, *mine, "--timeout", str(PATIENCE_S), "--max-tokens", "4", "hello"]) == 0
            load = ["--concurrency", "1", "--num-requests", "2", "--input-len", "4", "--output-len", "3"]
            assert main(["bench", *target, *mine, *load, "--idle-w", "0"]) == 0
            monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
            said = [*mine, "--timeout", str(PATIENCE_S), "--max-tokens", "4", "--model", str(tokenizer)]
            assert main(["chat", *target, *said]) == 0
            assert len(director.queue_pairs[0].seen) == 4
            capsys.readouterr()
            for command in (["generate", "hello"], ["chat"], ["bench", *load]):
                assert main([*command, *target]) == 1
                assert "--client-key: got nothing, expected a value" in capsys.readouterr().err
            assert main(["generate", *target[2:], *mine, "hello"]) == 1
            assert "--connect: got nothing" in capsys.readouterr().err
            assert main(["generate", *target[:2], "--server-key", str(tokenizer), *mine, "hello"]) == 1
            assert "no key, expected a Z85 text of 40" in capsys.readouterr().err
        finally:
            ingress.stop()
            assert ingress.join(PATIENCE_S)


def test_bad_keys_are_refused(tmp_path: Path) -> None:
    secret, public = make_keys(tmp_path, "server")
    with pytest.raises(CurveError, match="new file"):
        make_keys(tmp_path, "server")
    empty = tmp_path / "empty"
    empty.write_text("# nobody\n")
    with pytest.raises(CurveError, match="allows nobody"):
        CurveServer(secret, empty)
    empty.write_text("not a key\n")
    with pytest.raises(CurveError, match="no key"):
        CurveServer(secret, empty)
    with pytest.raises(CurveError, match="cannot be read"):
        CurveServer(tmp_path / "none", public)
    secret.chmod(0o644)
    with pytest.raises(CurveError, match="chmod 600"):
        CurveServer(secret, public)
