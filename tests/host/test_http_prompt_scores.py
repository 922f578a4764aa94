"""Log-probabilities of the prompt (echo with logprobs): what the model says of each token, in one piece or several.

Run: pytest tests/host/test_http_prompt_scores.py
"""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from blinkimp.nic_shim import http_prompt_scores
from blinkimp.nic_shim.http_types import CompletionRequest
from blinkimp.nic_shim.live_request import LiveRequest
from blinkimp.nic_shim.tokenizer import Tokenizer
from blinkimp.protocol import Finish, Sampling, Submit, Tokens
from tests.http_support import EMBEDDED, HttpServer, embedded
from tests.ingress_support import wait_until

PROMPT = "def read_file(path):"
LONG = [(7 * i * i + 13 * i) % 3000 + 300 for i in range(2 * http_prompt_scores.PIECE_TOKENS + 40)]


@pytest.fixture(scope="module")
def server() -> Iterator[HttpServer]:
    with embedded() as (http, _):
        yield http
        http.wait_until_idle()


def forced(server: HttpServer, before: list[int], token: int) -> tuple[float, dict[str, float]]:
    """What the model says of `token` behind `before`, asked in another way: a bias makes it say so."""
    bias = {"logit_bias": {str(token): 100}, "logprobs": 2, "return_token_ids": True}
    (choice,) = server.complete(before, max_tokens=1, temperature=0, **bias)["choices"]
    assert choice["token_ids"] == [token]
    return choice["logprobs"]["token_logprobs"][0], choice["logprobs"]["top_logprobs"][0]


@pytest.mark.parametrize("fields", [{}, {"prefix_cache": False}], ids=["cached", "not cached"])
def test_every_token_of_the_prompt_has_the_models_own_logprob(server: HttpServer, fields: dict[str, Any]) -> None:
    reply = server.complete(LONG, max_tokens=3, temperature=0, echo=True, logprobs=2, ignore_eos=True, **fields)
    (choice,) = reply["choices"]
    logprobs = choice["logprobs"]
    assert {len(values) for values in logprobs.values()} == {len(LONG) + 3}
    assert logprobs["token_logprobs"][0] is None and logprobs["top_logprobs"][0] is None
    last = http_prompt_scores.PIECE_TOKENS
    for position in (1, 2, last - 1, last, last + 1, 2 * last, 2 * last + 1, len(LONG) - 1):
        value, top = forced(server, LONG[:position], LONG[position])
        assert logprobs["token_logprobs"][position] == value, position
        assert logprobs["top_logprobs"][position] == top
    plain = server.complete(LONG, max_tokens=3, temperature=0, logprobs=2, ignore_eos=True)["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"][len(LONG) :] == plain["token_logprobs"], "the output's own are as they were"
    assert reply["usage"]["prompt_tokens"] == len(LONG) and reply["usage"]["completion_tokens"] == 3


def test_without_output_and_as_a_stream(server: HttpServer) -> None:
    fields = {"echo": True, "logprobs": 1, "max_tokens": 0, "n": 2}
    whole = server.complete([PROMPT, "x = 1"], **fields)
    texts = [choice["text"] for choice in whole["choices"]]
    assert texts == [PROMPT, PROMPT, "x = 1", "x = 1"]
    assert {choice["finish_reason"] for choice in whole["choices"]} == {"length"}
    assert whole["usage"]["completion_tokens"] == 0
    for choice in whole["choices"]:
        assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
        offsets = choice["logprobs"]["text_offset"]
        assert [choice["text"][at] for at in offsets] == [token[0] for token in choice["logprobs"]["tokens"]]
    events = server.post("/v1/completions", {"prompt": [PROMPT, "x = 1"], "stream": True, **fields}).events
    streamed: dict[int, list[float | None]] = {idx: [] for idx in range(4)}
    for event in events:
        for choice in event["choices"]:
            streamed[choice["index"]] += (choice["logprobs"] or {"token_logprobs": []})["token_logprobs"]
    assert list(streamed.values()) == [choice["logprobs"]["token_logprobs"] for choice in whole["choices"]]
    one = server.complete([5], echo=True, logprobs=0, max_tokens=2, temperature=0)["choices"][0]["logprobs"]
    assert len(one["tokens"]) == 3 and one["token_logprobs"][0] is None and one["top_logprobs"] is None


def test_a_prompt_with_the_end_of_sequence_in_it_is_scored_to_its_end(server: HttpServer) -> None:
    (eos, *_) = Tokenizer(EMBEDDED).eos_ids
    ids = [500, eos, 501, eos, eos, 502]
    logprobs = server.complete(ids, echo=True, logprobs=0, max_tokens=0)["choices"][0]["logprobs"]
    assert len(logprobs["token_logprobs"]) == 6
    assert logprobs["token_logprobs"][5] == forced(server, ids[:5], ids[5])[0]


def test_a_client_that_leaves_meanwhile_is_cancelled(server: HttpServer) -> None:
    body = json.dumps(
        {"prompt": LONG * 5, "echo": True, "logprobs": 1, "max_tokens": 0, "prefix_cache": False}
    ).encode()
    before = server.status()
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        # The prompt itself, and the first pieces.
        wait_until(lambda: server.status()["requests_accepted"] >= before["requests_accepted"] + 2, "pieces run")
    server.wait_until_idle()
    status = server.status()
    num_pieces = -(-(len(LONG) * 5 - 1) // http_prompt_scores.PIECE_TOKENS)
    assert status["requests_accepted"] - before["requests_accepted"] < 1 + num_pieces
    assert server.complete("x", max_tokens=2)["choices"], "and the next one is served"


def test_where_its_own_time_is_over_before_it_is_504(server: HttpServer) -> None:
    reply = server.post("/v1/completions", {"prompt": LONG, "echo": True, "logprobs": 0, "timeout": 1e-9})
    assert (reply.status, reply.json["error"]["code"]) == (504, "timeout"), reply.body


@pytest.mark.parametrize(("timeout_s", "left_s"), [(None, None), (1e6, 1e6 - 1000), (100.0, 1e-9)])
def test_all_pieces_have_the_time_of_the_request(timeout_s: float | None, left_s: float | None) -> None:
    """It came 1000 s ago. No piece's time begins when its turn comes: they would have more together, by as many as there are."""
    choice = LiveRequest(Submit(0, "", Sampling(top_logprobs=1), timeout_s=timeout_s), None)
    choice.prompt_ids = np.asarray(LONG, np.uint32)
    choice.received_ns -= 1000 * 10**9
    pieces: list[LiveRequest] = []

    def run(piece: LiveRequest) -> None:
        pieces.append(piece)
        begin = len(piece.prompt_ids)
        said = LONG[begin : begin + http_prompt_scores.PIECE_TOKENS]
        finish = Finish(0, "length", begin, len(said), 0, 0, 0, 0, 0)
        piece.session.push([Tokens(0, 0, said, [-1.0] * len(said), ""), finish])

    port = SimpleNamespace(vocab_size=4096, constraint_slot_bytes=1 << 20)
    engine: Any = SimpleNamespace(link=SimpleNamespace(port=port))
    exchange: Any = SimpleNamespace(start_helper=run, end_helper=lambda _: None, is_gone=False)
    body = CompletionRequest(prompt=LONG, timeout=timeout_s)
    scores = asyncio.run(http_prompt_scores.score_prompt(engine, exchange, choice, body))
    assert scores.token_ids == LONG[1:] and len(pieces) == 3
    for piece in pieces:
        assert piece.sampling.top_logprobs == 1
        assert (piece.timeout_s is None) if left_s is None else (piece.timeout_s or 0) <= left_s


def test_without_room_for_a_constraint_it_is_refused() -> None:
    with embedded(constraint_slots=0) as (server, _):
        reply = server.post("/v1/completions", {"prompt": PROMPT, "echo": True, "logprobs": 1})
        assert reply.status == 422 and reply.json["error"]["param"] == "echo"
        assert server.complete(PROMPT, echo=True, max_tokens=2)["choices"][0]["text"].startswith(PROMPT)
        server.wait_until_idle()
