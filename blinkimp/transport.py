"""What both ends of the ZeroMQ wire set on their sockets: finding out that a peer's host is gone, and the seam for CURVE. Which addresses
others can reach.

Called by nic_shim/zmq_ingress.py, nic_shim/http_ingress.py, blinkimp/client.py, blinkimp/async_client.py.
Test: pytest tests/host/test_ingress_slow_clients.py

Hazard: ZMTP heartbeats (ZMQ_HEARTBEAT_IVL) are off and must stay so. In libzmq up to 4.3.5 a ping that meets a full receive queue
aborts the process (zeromq/libzmq issues 3937, 4767). TCP's own keep-alive does the work, and `alive` messages that of the protocol.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable
from typing import Any

import zmq

KEEPALIVE_IDLE_S = 5  # with the next two: a silent peer whose host vanished is disconnected within 11 s
KEEPALIVE_INTERVAL_S = 2
KEEPALIVE_COUNT = 3
MAX_RETRANSMIT_MS = 10_000  # the same where data is under way to it

Security = Callable[["zmq.Socket[Any]"], None]  # configures CURVE on a socket before it binds or connects


def detect_lost_hosts(socket: zmq.Socket[Any]) -> None:
    """Lets the kernel find out that a peer's host is gone. No effect on ipc endpoints."""
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, KEEPALIVE_IDLE_S)
    socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, KEEPALIVE_INTERVAL_S)
    socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, KEEPALIVE_COUNT)
    socket.setsockopt(zmq.TCP_MAXRT, MAX_RETRANSMIT_MS)


def is_loopback(host: str) -> bool:
    """Whether an address to bind to can be reached from this machine only."""
    if host in ("localhost", "lo"):
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
