"""What the ZeroMQ ingress grants its clients, and what a client may do that has had it all.

Called by nic_shim/zmq_ingress.py and message_handler.py. Test: pytest tests/host/test_ingress_bad_messages.py
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from blinkimp.nic_shim.admission import larger_limit

_OTHER_INGRESS: Final = "send it to another ingress of the server (serve --num-ingress)"
# Of each limit on what is unfinished: what else may be done than to wait.
REMEDIES: Final[Mapping[str, str]] = {
    "max_requests_per_client": "send the others over another connection",
    "max_outstanding": larger_limit("max_outstanding"),
    "max_requests": _OTHER_INGRESS,
    "max_clients": _OTHER_INGRESS,
}


@dataclass(frozen=True)
class IngressLimits:
    """All on by default; `python -m blinkimp.nic_shim.zmq_ingress --help` has the flags, and blinkimp/config.py has keys for some.

    A caller is a CURVE key, or a connection where the socket is plain."""

    max_request_bytes: int = 2 << 20
    max_prompt_chars: int = 1 << 20  # of a prompt given as text
    max_memory_bytes: int = 4 << 30  # resident memory of the ingress
    max_clients: int = 1024  # that have requests or unread replies
    max_requests_per_client: int = 256  # unfinished, or finished and not read
    max_outstanding: int = 1024  # unfinished requests of one caller, over all its connections
    max_requests_per_s: int = 500  # of one caller
    burst_requests: int = 1000  # of one caller, at once
    max_requests: int = 4096
    stall_timeout_s: float = 60.0  # a client that reads nothing for longer is dropped
    loss_timeout_s: float = 60.0  # without an engine for longer, its requests fail

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value <= 0:
                raise ValueError(f"{field.name} is {value}; expected more than 0; correct the ingress's options")
