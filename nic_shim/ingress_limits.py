"""The limits of both ingresses: what they grant their clients, by default, by flags (nic_shim/ingress_flags.py) and under `blinkimp serve`.

A limit that is a key of the server's configuration has its default there (blinkimp/config.py); HTTP.md and PROTOCOL.md tell users of all.
Called by nic_shim/zmq_ingress.py, http_ingress.py, ingress_flags.py, message_handler.py, http_gate.py and host/supervisor.py.
Test: pytest tests/null/test_ingress_limits.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Self, TypeVar

from blinkimp.config import Config
from blinkimp.nic_shim.admission import larger_limit

_OTHER_INGRESS: Final = "send it to another ingress of the server (serve --num-ingress)"
# Of each limit of ZeroMQ on what is unfinished: what else may be done than to wait.
REMEDIES: Final[Mapping[str, str]] = {
    "max_requests_per_client": "send the others over another connection",
    "max_outstanding": larger_limit("max_outstanding"),
    "max_requests": _OTHER_INGRESS,
    "max_clients": _OTHER_INGRESS,
}
BURST_S: Final = 2  # what max_requests_per_s grants in so long may come at once
_DEFAULTS: Final = Config()

Value = TypeVar("Value", int, float)


def _limit(default: Value, text: str) -> Value:
    """`text`: what --help says of it."""
    return dataclasses.field(default=default, metadata={"text": text})


@dataclass(frozen=True)
class IngressLimits:
    """What both have. All on by default."""

    max_request_bytes: int = _limit(
        _DEFAULTS.max_request_bytes, "bytes of one body or message; larger ones are refused"
    )
    max_prompt_chars: int = _limit(_DEFAULTS.max_prompt_chars, "characters of a prompt given as text")
    max_memory_bytes: int = _limit(4 << 30, "resident memory of this process; beyond it, it ends with status 1")
    max_outstanding: int = _limit(
        _DEFAULTS.max_outstanding,
        "unfinished requests (HTTP: choices) of one caller: of an API key or CURVE key, where no keys are asked for "
        "of a ZeroMQ connection, or of all of HTTP",
    )
    max_requests_per_s: float = _limit(_DEFAULTS.max_requests_per_s, "requests a second of one caller")
    burst_requests: int = _limit(BURST_S * _DEFAULTS.max_requests_per_s, "requests of one caller at once")
    loss_timeout_s: float = _limit(60.0, "without an engine for so long, requests fail")

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value <= 0:
                raise ValueError(f"{name} is {value}; expected more than 0; correct the ingress's options")

    @classmethod
    def of(cls, config: Config) -> Self:
        """Of an ingress of this server. What is no key of the configuration stays at its default."""
        return cls(
            max_request_bytes=config.max_request_bytes,
            max_prompt_chars=config.max_prompt_chars,
            max_outstanding=config.max_outstanding,
            max_requests_per_s=config.max_requests_per_s,
            burst_requests=BURST_S * config.max_requests_per_s,
            loss_timeout_s=config.recovery_timeout_s,
        )


@dataclass(frozen=True)
class HttpLimits(IngressLimits):
    """What one HTTP ingress grants."""

    max_connections: int = _limit(4096, "connections at once; others get 503")
    read_timeout_s: float = _limit(
        _DEFAULTS.read_timeout_s, "without a byte of an awaited request for so long, its connection is closed"
    )

    @classmethod
    def of(cls, config: Config) -> Self:
        return dataclasses.replace(super().of(config), read_timeout_s=config.read_timeout_s)


@dataclass(frozen=True)
class ZmqLimits(IngressLimits):
    """What one ZeroMQ ingress grants. Its stall_timeout_s is of a client: the configuration's, of the device, is another."""

    max_clients: int = _limit(1024, "clients with requests or unread replies")
    max_requests_per_client: int = _limit(256, "requests of one connection, unfinished or not read yet")
    max_requests: int = _limit(4096, "unfinished requests of this ingress")
    stall_timeout_s: float = _limit(60.0, "a client that reads nothing for so long is dropped")
