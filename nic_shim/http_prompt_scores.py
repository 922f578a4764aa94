"""Log-probabilities of a prompt's own tokens, for `echo` with `logprobs`.

Problem   The engine reports the logprob of tokens that it samples; a prompt's are not sampled.
Rule      The prompt is cut into pieces. A request for each has the prompt up to the piece, and a constraint, a chain of states that allow one
          token each, makes it say the piece. Its logprobs are those of the model's own logits, before any constraint.
Hazard    Every piece needs the KV of all before it: pieces run once the prompt itself has been computed, so that the prefix cache has
          it. With `prefix_cache` false each computes it again.

Each piece takes a constraint slot and counts as a request in the metrics. Called by nic_shim/http_response.py, on the event loop.
Test: pytest tests/host/test_http_prompt_scores.py
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from collections.abc import Collection
from typing import Final

from blinkimp.nic_shim.admission import PromptIds
from blinkimp.nic_shim.constraint_compiler import LoadedConstraint
from blinkimp.nic_shim.constraint_table import ConstraintTooLargeError, build_constraint_table
from blinkimp.nic_shim.engine_thread import EngineThread
from blinkimp.nic_shim.http_errors import HttpError, http_error_of
from blinkimp.nic_shim.http_exchange import ClientGoneError, Exchange
from blinkimp.nic_shim.http_types import GenerationFields
from blinkimp.nic_shim.live_request import LiveRequest
from blinkimp.protocol import Error, Finish, Sampling, Submit, Tokens

PIECE_TOKENS: Final = 128  # a longer one takes more steps, a shorter one more slots
PIECES_AT_ONCE: Final = 4  # of the 8 slots that a queue pair has by default


class _Piece:
    """The session of one request: what has come for it."""

    def __init__(self) -> None:
        self.tokens: Tokens | None = None
        self.ended: asyncio.Future[Finish | Error] = asyncio.get_running_loop().create_future()

    def push(self, messages: list[Tokens | Finish | Error]) -> None:
        for message in messages:
            if isinstance(message, Tokens):
                self.tokens = message
            elif not self.ended.done():
                self.ended.set_result(message)


async def score_prompt(engine: EngineThread, exchange: Exchange, choice: LiveRequest, body: GenerationFields) -> Tokens:
    """The tokens of the choice's prompt from the second on, as if the model had said them. Raises HttpError, ClientGoneError."""
    places = asyncio.Semaphore(PIECES_AT_ONCE)

    async def one(begin: int) -> Tokens:
        async with places:
            return await _score_piece(engine, exchange, choice, begin, body)

    scores = Tokens(0, 1, [], [], "")
    jobs = deque(asyncio.ensure_future(one(begin)) for begin in range(1, len(choice.prompt_ids), PIECE_TOKENS))
    try:
        while jobs:
            piece = await jobs.popleft()
            scores.token_ids += piece.token_ids
            scores.logprobs += piece.logprobs
            scores.top = scores.top + piece.top
    finally:
        await _cancel(jobs)
        jobs.clear()  # a job holds its exception, whose traceback holds this frame
    return scores


async def _cancel(jobs: Collection[asyncio.Future[Tokens]]) -> None:
    for job in jobs:
        job.cancel()
    await asyncio.gather(*jobs, return_exceptions=True)


async def _score_piece(
    engine: EngineThread, exchange: Exchange, choice: LiveRequest, begin: int, body: GenerationFields
) -> Tokens:
    prompt_ids, num_top = choice.prompt_ids, choice.sampling.top_logprobs
    piece_ids = prompt_ids[begin : begin + PIECE_TOKENS]
    loop = asyncio.get_running_loop()
    constraint = await loop.run_in_executor(None, _chain, engine, piece_ids)
    sampling = Sampling(temperature=0.0, max_tokens=len(piece_ids), ignore_eos=True, top_logprobs=num_top)
    submit = Submit(
        0,
        "",
        sampling,
        stream=False,
        detokenize=False,
        priority=body.priority or 0,
        timeout_s=choice.remaining_ns() / 1e9 or None,  # its own would begin anew
        cache_salt=body.cache_salt or "",
        prefix_cache=body.prefix_cache is not False,
    )
    session = _Piece()
    request = LiveRequest(submit, session)
    request.prompt_ids = prompt_ids[:begin]
    request.constraint = constraint
    exchange.start_helper(request)
    try:
        end = await session.ended
    finally:
        exchange.end_helper(request)
    if isinstance(end, Error):
        raise http_error_of(end)
    if exchange.is_gone:
        raise ClientGoneError
    if session.tokens is None or session.tokens.token_ids != piece_ids.tolist():
        raise HttpError(
            504 if end.reason == "timeout" else 503,
            f"the prompt's log-probabilities are not complete: a part of it ended for the reason {end.reason}, expected all "
            "of its tokens; allow more time, or leave out echo or logprobs",
            code=end.reason,
        )
    return session.tokens


def _chain(engine: EngineThread, piece_ids: PromptIds) -> LoadedConstraint:
    """States that allow the piece's tokens, one after the other. On a thread."""
    port = engine.link.port
    rows = [{int(token): position + 1} for position, token in enumerate(piece_ids)]
    rows.append({int(piece_ids[-1]): len(piece_ids)})  # never asked: the request is as long as the piece
    try:
        table = build_constraint_table(port.vocab_size, rows, max_bytes=port.constraint_slot_bytes)
    except ConstraintTooLargeError as error:
        raise HttpError(
            422,
            f"echo with logprobs cannot be used: {error}",
            code="constraint_too_large",
            param="echo",
        ) from None
    return LoadedConstraint(b"prompt" + hashlib.blake2b(piece_ids.tobytes(), digest_size=32).digest(), table)
