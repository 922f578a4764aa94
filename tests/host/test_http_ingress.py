"""The HTTP ingress with the embedded model on the emulated device: both APIs, whole and streamed, the small endpoints, draining.

Run: pytest tests/host/test_http_ingress.py
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from blinkimp import __version__
from blinkimp.nic_shim.tokenizer import Tokenizer
from tests.http_support import EMBEDDED, MODEL, HttpServer, embedded, http_ingress, scripted
from tests.ingress_support import wait_until
from tests.support import PATIENCE_S

PROMPT = "def read_file(path):"
GREEDY = {"temperature": 0.0, "ignore_eos": True}


@pytest.fixture(scope="module")
def server() -> Iterator[HttpServer]:
    with embedded() as (http, _):
        yield http
        http.wait_until_idle()


def text_of(events: list[Any], choice_idx: int = 0) -> str:
    pieces = [choice for event in events for choice in event["choices"] if choice["index"] == choice_idx]
    return "".join(piece["text"] if "text" in piece else piece["delta"].get("content", "") for piece in pieces)


def test_a_completion_whole_and_streamed_is_the_same(server: HttpServer) -> None:
    fields = {"prompt": PROMPT, "max_tokens": 24, "model": MODEL, **GREEDY}
    whole = server.complete(**fields)
    assert whole["object"] == "text_completion" and whole["model"] == MODEL
    (choice,) = whole["choices"]
    assert choice["finish_reason"] == "length" and choice["logprobs"] is None
    num_prompt = len(Tokenizer(EMBEDDED).encode(PROMPT))
    usage = whole["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (
        num_prompt,
        24,
        num_prompt + 24,
    )
    reply = server.post("/v1/completions", {**fields, "stream": True, "stream_options": {"include_usage": True}})
    assert reply.headers["content-type"].startswith("text/event-stream")
    events = reply.events
    assert text_of(events) == choice["text"]
    assert [event["choices"][0]["finish_reason"] for event in events[:-1]] == [None] * (len(events) - 2) + ["length"]
    assert all(event["usage"] is None for event in events[:-1])
    assert events[-1]["choices"] == [] and events[-1]["usage"]["total_tokens"] == num_prompt + 24
    assert len({event["id"] for event in events}) == 1


def test_prompts_of_every_kind_give_the_same_text(server: HttpServer) -> None:
    ids = Tokenizer(EMBEDDED).encode(PROMPT).tolist()
    texts = []
    for prompt in (PROMPT, ids, [PROMPT, PROMPT], [ids, ids]):
        choices = server.complete(prompt, max_tokens=8, **GREEDY)["choices"]
        assert [choice["index"] for choice in choices] == list(range(len(choices)))
        texts += [choice["text"] for choice in choices]
    assert len(texts) == 6 and len(set(texts)) == 1


def test_echo_puts_the_prompt_in_front(server: HttpServer) -> None:
    plain = server.complete(PROMPT, max_tokens=8, **GREEDY)["choices"][0]["text"]
    assert server.complete(PROMPT, max_tokens=8, echo=True, **GREEDY)["choices"][0]["text"] == PROMPT + plain
    events = server.post(
        "/v1/completions", {"prompt": PROMPT, "max_tokens": 8, "echo": True, "stream": True, **GREEDY}
    ).events
    assert text_of(events) == PROMPT + plain


def test_n_choices_of_a_seeded_request_differ_and_repeat(server: HttpServer) -> None:
    def sample(n: int, seed: int) -> list[str]:
        reply = server.complete(PROMPT, max_tokens=16, n=n, seed=seed, temperature=1.0)
        assert reply["usage"]["prompt_tokens"] < 20, "a prompt counts once"
        return [choice["text"] for choice in reply["choices"]]

    texts = sample(4, 7)
    assert len(set(texts)) == 4
    assert sample(4, 7) == texts
    assert sample(1, 9) == texts[2:3], "copy i has seed + i"
    assert sample(1, -1) != texts[:1]


def test_n_choices_share_the_pages_of_their_prompt(server: HttpServer) -> None:
    """10 full pages and 20 tokens of prompt, 8 choices: 10 pages for all and one each, in place of 88."""
    prompt = [(11 * idx * idx + 5 * idx) % 3000 + 300 for idx in range(660)]
    before = server.wait_until_idle()
    most_used = 0
    with ThreadPoolExecutor(1) as pool:
        reply = pool.submit(server.complete, prompt, n=8, seed=3, max_tokens=40, ignore_eos=True)
        while not reply.done():
            most_used = max(most_used, server.status()["num_pages_used"])
    usage, status = reply.result()["usage"], server.wait_until_idle()
    assert most_used <= 10 + 8 * 2
    assert status["prompt_tokens"] - before["prompt_tokens"] == 660 + 7 * 20, "the shared pages are computed once"
    assert usage["prompt_tokens"] == 660 and usage["completion_tokens"] == 8 * 40
    assert len({choice["text"] for choice in reply.result()["choices"]}) > 1


def test_chat_whole_and_streamed_is_the_same(server: HttpServer) -> None:
    fields: dict[str, Any] = {
        "messages": [
            {"role": "system", "content": "Code."},
            {"role": "user", "content": [{"type": "text", "text": "import"}, {"type": "text", "text": "os"}]},
        ],
        "max_completion_tokens": 12,
        **GREEDY,
    }
    reply = server.post("/v1/chat/completions", fields)
    assert reply.status == 200, reply.body
    (choice,) = reply.json["choices"]
    assert reply.json["object"] == "chat.completion" and choice["message"]["role"] == "assistant"
    events = server.post("/v1/chat/completions", {**fields, "stream": True}).events
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all(event["object"] == "chat.completion.chunk" and "usage" not in event for event in events)
    assert text_of(events) == choice["message"]["content"]


def test_a_chat_without_max_tokens_may_fill_the_context(server: HttpServer) -> None:
    tokenizer = Tokenizer(EMBEDDED)
    long_text = tokenizer.decode(tokenizer.encode(PROMPT * 400)[:2000].tolist())  # leaves little room
    reply = server.post("/v1/chat/completions", {"messages": [{"role": "user", "content": long_text}], **GREEDY})
    usage = reply.json["usage"]
    assert usage["total_tokens"] == 2048 and reply.json["choices"][0]["finish_reason"] == "length"


def test_token_ids_and_logprobs_on_request(server: HttpServer) -> None:
    reply = server.complete(PROMPT, max_tokens=6, logprobs=0, return_token_ids=True, **GREEDY)
    choice = reply["choices"][0]
    tokenizer = Tokenizer(EMBEDDED)
    assert choice["prompt_token_ids"] == tokenizer.encode(PROMPT).tolist()
    assert tokenizer.decode(choice["token_ids"]) == choice["text"] == "".join(choice["logprobs"]["tokens"])
    assert all(value <= 0 for value in choice["logprobs"]["token_logprobs"]) and len(choice["token_ids"]) == 6
    offsets = choice["logprobs"]["text_offset"]
    assert [
        choice["text"][offset:].startswith(token)
        for offset, token in zip(offsets, choice["logprobs"]["tokens"], strict=True)
    ]
    fields = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "logprobs": True, **GREEDY}
    content = server.post("/v1/chat/completions", fields).json["choices"][0]["logprobs"]["content"]
    assert len(content) == 3 and all(bytes(entry["bytes"]).decode() == entry["token"] for entry in content)


def test_a_stop_string_is_cut_and_named(server: HttpServer) -> None:
    text = server.complete(PROMPT, max_tokens=40, **GREEDY)["choices"][0]["text"]
    stop = text[11:16]
    assert text.index(stop) == 11
    for stream in (False, True):
        reply = server.post(
            "/v1/completions", {"prompt": PROMPT, "max_tokens": 40, "stop": [stop, "zzz"], "stream": stream, **GREEDY}
        )
        last = reply.events[-1]["choices"][0] if stream else reply.json["choices"][0]
        assert (text_of(reply.events) if stream else last["text"]) == text[:11]
        assert (last["finish_reason"], last["stop_reason"]) == ("stop", stop)


def test_top_logprobs_penalties_and_bias_reach_the_model(server: HttpServer) -> None:
    fields = {
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 4,
        "logprobs": True,
        "top_logprobs": 20,
        **GREEDY,
    }
    content = server.post("/v1/chat/completions", fields).json["choices"][0]["logprobs"]["content"]
    for entry in content:
        values = [top["logprob"] for top in entry["top_logprobs"]]
        assert len(values) == 20 and values == sorted(values, reverse=True)
        assert entry["token"] == entry["top_logprobs"][0]["token"] and entry["logprob"] == values[0], (
            "greedy takes the likeliest"
        )
    (token,) = Tokenizer(EMBEDDED).encode(" zebra").tolist()[:1]
    biased = server.complete(PROMPT, max_tokens=5, logit_bias={str(token): 100}, return_token_ids=True, **GREEDY)
    assert biased["choices"][0]["token_ids"] == [token] * 5
    penalised = server.complete(
        PROMPT, max_tokens=5, logit_bias={str(token): 5}, presence_penalty=2, return_token_ids=True, **GREEDY
    )
    assert penalised["choices"][0]["token_ids"] != [token] * 5


def test_a_prompt_that_was_seen_comes_from_the_cache_unless_salted_or_opted_out(server: HttpServer) -> None:
    prompt = [9 + idx % 300 for idx in range(200)]

    def cached(**fields: Any) -> int:
        reply = server.complete(prompt, max_tokens=2, **GREEDY, **fields)
        return int(reply["usage"]["prompt_tokens_details"]["cached_tokens"])

    assert cached(prefix_cache=False) == 0 and cached() == 0
    assert cached() == 192, "three full pages"
    assert cached(prefix_cache=False) == 0
    assert cached(cache_salt="mine") == 0 and cached(cache_salt="mine") == 192


def test_a_deadline_ends_a_request_with_what_it_has(server: HttpServer) -> None:
    reply = server.complete(PROMPT, max_tokens=1900, timeout=0.01, **GREEDY)
    assert reply["choices"][0]["finish_reason"] == "timeout"
    assert 0 <= reply["usage"]["completion_tokens"] < 1900


def test_tokenize_and_detokenize_are_inverse(server: HttpServer) -> None:
    reply = server.post("/tokenize", {"prompt": PROMPT, "return_token_strs": True}).json
    assert reply["tokens"] == Tokenizer(EMBEDDED).encode(PROMPT).tolist()
    assert reply["count"] == len(reply["tokens"]) and reply["max_model_len"] == 2048
    assert "".join(reply["token_strs"]) == PROMPT
    assert server.post("/detokenize", {"tokens": reply["tokens"]}).json == {"prompt": PROMPT}
    chat = server.post("/tokenize", {"messages": [{"role": "user", "content": "x"}]}).json
    assert server.post("/detokenize", {"tokens": chat["tokens"]}).json["prompt"].endswith("User: x\n\nAssistant:")


def test_small_endpoints(server: HttpServer) -> None:
    models = server.get("/v1/models").json
    assert [model["id"] for model in models["data"]] == [MODEL] and models["data"][0]["max_model_len"] == 2048
    assert models["data"][0]["vocab_size"] == 4096
    assert server.get(f"/v1/models/{MODEL}").json["id"] == MODEL
    assert server.get("/v1/models/other").status == 404
    assert server.get("/health").json == {"status": "ok"} and server.get("/ready").status == 200
    assert server.get("/version").json == {"version": __version__}
    assert b"\nblinkimp:engine_num_pages{" in server.get("/metrics").body
    document = server.get("/openapi.json").json
    assert "/v1/chat/completions" in document["paths"] and "ChatRequest" in document["components"]["schemas"]
    page = server.get("/docs").body.decode()
    assert "max_completion_tokens" in page and "http://" not in page and "https://" not in page


def test_a_drain_finishes_running_requests_and_refuses_new_ones(tmp_path: Path) -> None:
    """The model is a scripted one, which stands still until the new ones have been refused."""
    with scripted(tmp_path, num_queue_pairs=2) as first:
        with http_ingress(first.http.engine_name, tmp_path, queue_pair_idx=1) as http:
            first.director.paused = True
            results: list[Any] = []
            fields = {"prompt": PROMPT, "max_tokens": 100, **GREEDY}
            thread = threading.Thread(target=lambda: results.append(http.post("/v1/completions", fields)))
            thread.start()
            wait_until(lambda: http.status()["num_running"] == 1, "the request runs")
            http.process.send_signal(signal.SIGTERM)
            wait_until(lambda: http.get("/ready").status == 503, "the drain begins")
            refused = http.post("/v1/completions", {"prompt": "x"})
            assert (
                refused.status == 503 and refused.headers["retry-after"] and refused.json["error"]["code"] == "draining"
            )
            first.director.paused = False
            thread.join(PATIENCE_S)
            assert results[0].json["usage"]["completion_tokens"] == 100
            assert http.process.wait(PATIENCE_S) == 0
        assert first.http.get("/ready").status == 200, "the other ingress goes on"
