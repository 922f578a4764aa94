"""The errors that end a request on the way through the engine, in words: what, got, expected, remedy.

Called by nic_shim/engine_link.py. Test: pytest tests/host/test_zmq_ingress.py tests/host/test_recovery_link.py
"""

from __future__ import annotations

from blinkimp import ring_abi as abi
from blinkimp.complaints import MAX_QUOTED_CHARS
from blinkimp.nic_shim.live_request import LiveRequest
from blinkimp.protocol import ErrorCode

_REJECT_CODES: dict[int, tuple[ErrorCode, str]] = {
    abi.REJECT_PROMPT_EMPTY: ("prompt_empty", "give at least one token"),
    abi.REJECT_TOO_LONG: ("prompt_too_long", "shorten the prompt or lower max_tokens"),
    abi.REJECT_BAD_SAMPLING: ("bad_sampling", "keep sampling fields within the ranges of nic_shim/PROTOCOL.md"),
    abi.REJECT_BAD_TOKEN: ("bad_token", "use token ids of this model's vocabulary"),
    abi.REJECT_DRAINING: ("draining", "submit to another server, or again after the restart"),
}
_REJECT_NAMES = {reason.value: reason.name.lower() for reason in abi.RejectReason}


def fail_rejected(request: LiveRequest, reason: int, limit: int) -> None:
    """REJECT, with the limit that was broken or 0."""
    code, remedy = _REJECT_CODES.get(reason, ("rejected", "report this with the ingress's log: it is a defect"))
    name = _REJECT_NAMES.get(reason, f"reason {reason}")
    got = f"{len(request.prompt_ids)} prompt tokens, max_tokens {request.max_tokens}, {request.sampling}"
    expected = f"a request within the engine's limit {limit}" if limit else "a request that the engine can run"
    request.fail(code, f"the engine rejected the request: {name}", got[:MAX_QUOTED_CHARS], expected, remedy)


def fail_too_large(request: LiveRequest, arena_bytes: int) -> None:
    request.fail(
        "prompt_too_long",
        "the prompt does not fit into the queue pair",
        f"{len(request.prompt_ids)} tokens",
        f"a request body of at most {arena_bytes // 2} bytes",
        "shorten the prompt, or start the engine with a larger arena",
    )


def fail_out_of_order(request: LiveRequest, index: int) -> None:
    request.fail(
        "engine_error",
        "the engine's tokens are out of order",
        f"output position {index}",
        f"position {len(request.output_ids)}",
        "submit again, and report this with the engine's log: it is a defect",
    )


def fail_crashed(request: LiveRequest) -> None:
    """See nic_shim/crash_suspects.py."""
    request.fail(
        "engine_error",
        "the engine crashed each time it ran this request",
        f"{request.num_crashes} crashes, the last at output token {request.crash_position}",
        "an answer",
        "do not submit it again as it is; report it with the fault file that the server's log names",
    )


def fail_lost(request: LiveRequest, engine_name: str, lost_s: float, loss_timeout_s: float) -> None:
    request.fail(
        "engine_lost",
        "the engine is gone",
        f"no answer for {lost_s:.1f} s",
        f"an engine named {engine_name!r} within {loss_timeout_s:g} s",
        "submit again when `health` says ok; restart the engine if it does not come back",
    )
