"""CURVE: clients of the allow-list are served, others are not, and bad keys are refused at start.

Run: pytest tests/host/test_curve.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from blinkimp.client import Client, ServerTimeoutError
from blinkimp.nic_shim.curve import CurveError, CurveServer, client_security, make_keys
from blinkimp.nic_shim.tokenizer import Tokenizer
from blinkimp.nic_shim.zmq_ingress import ZmqIngress
from tests.fake_director import FakeDirector
from tests.ingress_support import engine_name, write_byte_tokenizer


def test_only_clients_of_the_list_are_served(tmp_path: Path) -> None:
    names = ("server", "friend", "stranger")
    secret: dict[str, Path] = {}
    public: dict[str, Path] = {}
    for name in names:
        secret[name], public[name] = make_keys(tmp_path, name)
        assert secret[name].stat().st_mode & 0o777 == 0o600
    allowed = tmp_path / "clients"
    allowed.write_bytes(b"# friends\n" + public["friend"].read_bytes() + b"\n")
    tokenizer = Tokenizer(write_byte_tokenizer(tmp_path))
    with FakeDirector(engine_name(), vocab_size=258) as director:
        curve = CurveServer(secret["server"], allowed)
        ingress = ZmqIngress(director.regions.engine_name, 0, "tcp://127.0.0.1:*", tokenizer, curve=curve)
        endpoint = ingress.start()
        try:
            with Client(endpoint, timeout_s=10, security=client_security(public["server"], secret["friend"])) as client:
                assert client.generate([5, 6], max_tokens=4).num_output_tokens == 4
            for security in (client_security(public["server"], secret["stranger"]), None):
                with Client(endpoint, timeout_s=1.5, security=security) as client, pytest.raises(ServerTimeoutError):
                    client.generate([5, 6], max_tokens=4)
            assert len(director.queue_pairs[0].seen) == 1
        finally:
            ingress.stop()
            assert ingress.join(10)


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
