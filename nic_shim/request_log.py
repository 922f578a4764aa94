"""The log line of a request that has ended: its id, how it ended, its tokens and where its time went.

The same fields over HTTP and ZeroMQ; nic_shim/METRICS.md lists them. Called by nic_shim/http_response.py, nic_shim/zmq_ingress.py and
nic_shim/message_handler.py.
Test: pytest tests/host/test_http_log.py tests/host/test_zmq_log.py
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from blinkimp.logs import log_event
from blinkimp.nic_shim.live_request import LiveRequest
from blinkimp.nic_shim.request_metrics import Times, finished_reason, times_of
from blinkimp.protocol import Error, Finish


def log_request(log: logging.Logger, requests: Sequence[LiveRequest], **fields: Any) -> None:
    """One line for the choices of one request. `fields` come first: request_id, transport, ..."""
    if not log.isEnabledFor(logging.INFO):
        return
    times = [times_of(request) for request in requests if request.end is not None]
    reasons = {finished_reason(request) if request.end is not None else "abort" for request in requests}
    ends = [request.end for request in requests]
    # The prompt of several choices is one prompt: choices of one prompt share the array.
    prompts = {id(request.prompt_ids): request for request in requests}.values()
    log_event(
        log,
        logging.INFO,
        "request",
        **fields,
        reason=",".join(sorted(reasons)),
        error=next((end.code for end in ends if isinstance(end, Error)), None),
        choices=len(requests),
        prompt_tokens=sum(len(request.prompt_ids) for request in prompts),
        cached_tokens=sum(request.num_cached_tokens for request in prompts),
        output_tokens=sum(len(request.output_ids) for request in requests),
        queue_s=_seconds(times, lambda one: one.queue_s, min),
        prefill_s=_seconds(times, lambda one: one.prefill_s, min),
        ttft_s=_seconds(times, lambda one: one.ttft_s, min),
        decode_s=_seconds(times, lambda one: one.decode_s, max),
        e2e_s=_seconds(times, lambda one: one.e2e_s, max),
        # As text: log collectors have signed 64-bit integers, or doubles.
        seed=next((str(end.seed) for end in ends if isinstance(end, Finish)), None),
    )


def log_zmq_request(log: logging.Logger, request: LiveRequest) -> None:
    """Of one that has ended."""
    request_id = zmq_request_id(request.session.identity, request.client_id)
    log_request(log, [request], request_id=request_id, transport="zmq", stream=request.stream)


def log_refusal(log: logging.Logger, identity: bytes, client_id: int, refusal: Error) -> None:
    """Of one that was not taken at all."""
    request_id = zmq_request_id(identity, client_id)
    log_event(log, logging.INFO, "request", request_id=request_id, transport="zmq", reason="error", error=refusal.code)


def zmq_request_id(identity: bytes, client_id: int) -> str:
    """The client's own id, made unique by who it is (the identity that ZeroMQ gave its connection)."""
    return f"{identity.hex()}-{client_id}"


def _seconds(
    times: list[Times], which: Callable[[Times], float | None], of_all: Callable[[Iterable[float]], float]
) -> float | None:
    """Of several choices the first to start, and the last to end."""
    known = [value for value in map(which, times) if value is not None]
    return round(of_all(known), 6) if known else None
